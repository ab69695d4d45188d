"""A model of which only shapes are there: run it, and see what it would compute and what would be alive.

Weights and activations are torch's fake tensors, imported as torch documents them
(https://docs.pytorch.org/docs/stable/torch.compiler_fake_tensor.html): they go through autograd, autocast,
checkpointing and optimizers as real ones do. Ids, masks and whatever follows from them stay real, so that positions and
features are put in place as in training. Values that nobody knows are made up where a model asks for them: a router
spreads tokens evenly over its experts.
"""

import contextlib
import functools
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


aten = torch.ops.aten
_FAKE = FakeTensorMode(allow_non_fake_inputs=True)

KINDS = ("weights", "gradients", "optimizer", "logits", "weights cast by autocast", "activations")
WEIGHTS, GRADIENTS, OPTIMIZER, LOGITS, CASTS, ACTIVATIONS = KINDS


def blank(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without memory, on the CPU as far as anyone can see."""
    with _FAKE:
        return torch.empty(shape, dtype=dtype, device="cpu")


def blank_like(tensor: torch.Tensor) -> torch.Tensor:
    """One of another's shape and numbers; of a parameter a parameter, which learns where that one does."""
    made = blank(*tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


@contextlib.contextmanager
def weightless(model: nn.Module) -> Iterator[None]:
    """Within it a model, real or on the meta device, has weights without memory; shared ones stay shared."""
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensors in cast(tuple[dict[str, Any], ...], (module._parameters, module._buffers)):
            kept.append((tensors, dict(tensors)))
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = made.setdefault(id(tensor), blank_like(tensor))
    try:
        with Unknown():
            yield
    finally:
        for tensors, before in kept:
            tensors.update(before)


def hold_in_few_bits(root: nn.Module, bits: int) -> None:
    """
    Give the frozen linear layers of a model without memory weights of 4 or 8 bits, as bitsandbytes would.

    A weight is made whole where it is multiplied, forwards and backwards, and is not kept.
    """
    for module in list(root.modules()):
        if isinstance(module, (nn.Linear, Conv1D)) and not module.weight.requires_grad:
            rows, columns = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
            # Scales: of each row, or of each 64 numbers in 8 bit, and theirs of each 256 of these.
            size = rows * columns + 4 * rows if bits == 8 else rows * columns // 2 + -(-rows * columns // 64) * 65 // 64
            held = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)
            held.quant_state = SimpleNamespace(shape=torch.Size((rows, columns)))  # type: ignore[attr-defined]
            module.weight, module.__class__ = held, _InFewBits
            module.whole = rows, columns  # type: ignore[assignment]


class _InFewBits(nn.Linear):
    def forward(self, inputs):
        out = _Multiplied.apply(inputs, self.whole)
        return out if self.bias is None else out + self.bias


class _Multiplied(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, whole):
        ctx.whole = whole
        return inputs @ inputs.new_empty(whole).T

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ gradient.new_empty(ctx.whole), None


class Unknown(TorchDispatchMode):
    """Makes up what depends on values that are not there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func in (aten._local_scalar_dense.default, aten.equal.default):
            return {torch.bool: True, torch.int64: 1}.get(args[0].dtype, 1.0) if len(args) == 1 else True
        if func is aten.index.Tensor:  # with a mask the shape of what it gives depends on values, which are known
            args = (args[0], [place for index in args[1] for place in _as_places(index)])
        elif func is aten.topk.default:
            values, indices = func(*args, **kwargs)
            choices = torch.arange(indices.numel()) % args[0].shape[-1]
            return values, choices.view(indices.shape)
        elif str(func) == "aten._grouped_mm.default":  # by name: not every torch has it; its rule takes bf16 alone
            return _grouped(*args, **kwargs)
        return func(*args, **kwargs)


def _as_places(index):
    is_mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
    return index.nonzero().unbind(1) if is_mask else (index,)


def _grouped(one, other, offs=None, bias=None, out_dtype=None):
    rows = (len(offs),) if one.ndim == other.ndim == 2 else one.shape[:-2] if one.ndim == 3 else ()
    return one.new_empty((*rows, one.shape[-2], other.shape[-1]), dtype=out_dtype or one.dtype)


class Watch(TorchDispatchMode):
    """
    Counts the bytes of every tensor that is alive, fake or real, by what it is for.

    Args:
        model: a composed model, whose head gives logits.
        weights: its tensors that are alive from the beginning.

    Attributes:
        alive (`Counter`): bytes by kind, now.
        peak (`Counter`): those at the moment at which most were alive, since `begin`.
    """

    def __init__(self, model: PreTrainedModel, weights: Iterable[torch.Tensor]):
        super().__init__()
        head = cast(nn.Linear, model.get_output_embeddings())
        self._vocabulary, self._heads = head.out_features, {id(head.weight.untyped_storage())}
        self.alive: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._seen: dict[int, list] = {}  # kind, bytes and what tells the end of each storage
        self.mark(weights, WEIGHTS)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: self.mark([p.grad], GRADIENTS))

    def begin(self) -> None:
        """Look for the peak from now on."""
        self.peak = Counter(self.alive)

    def mark(self, tensors: Iterable[torch.Tensor], kind: str) -> None:
        """Say what tensors are for."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            place = id(storage)
            entry = self._seen.get(place)
            if entry is None:
                end = weakref.ref(storage, functools.partial(self._gone, place))
                entry = self._seen[place] = [kind, storage.nbytes(), end]
                self.alive[kind] += entry[1]
            elif entry[0] != kind:
                self.alive[entry[0]] -= entry[1]
                self.alive[kind] += entry[1]
                entry[0] = kind
        if self.alive.total() > self.peak.total():
            self.peak = Counter(self.alive)

    def _gone(self, place, _):
        kind, size, _ = self._seen.pop(place)
        self.alive[kind] -= size
        self._heads.discard(place)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in self._seen:
                self.mark([tensor], self._kind_of(func, args, tensor))
        return out

    def _kind_of(self, func, args, tensor):
        places = [id(part.untyped_storage()) for part in tree_leaves(args) if isinstance(part, torch.Tensor)]
        kinds = [self._seen[place][0] for place in places if place in self._seen]
        if func is aten._to_copy.default and kinds == [WEIGHTS]:
            if self._heads.issuperset(places):
                self._heads.add(id(tensor.untyped_storage()))
            return CASTS
        is_wide = tensor.ndim and tensor.shape[-1] == self._vocabulary
        return LOGITS if is_wide and (LOGITS in kinds or not self._heads.isdisjoint(places)) else ACTIVATIONS


__all__ = ["KINDS", "Unknown", "Watch", "blank", "blank_like", "hold_in_few_bits", "weightless"]
