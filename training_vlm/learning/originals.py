"""Frozen weights that lie on disk as they were, while memory holds a smaller copy of them or none.

What is special: whoever saves the model finds the originals in its state dict, and whoever loads weights into it gives
them to the same place, because the modules themselves say so; when training ends, they are back in memory. The file has
no name, so that nothing of it is left when the process ends, however it does.
"""

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D

from modeling_vlm.vision_vlm import blank_image
from processing.batching.features import mapped
from processing.data_error_vlm import DuetError, in_a_line

from .adapters import composed


CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)
"""Modules whose weights autocast casts whenever they are used."""

_FILE = "_originals"  # what begins with `_` is not pushed
_ALIGNED = 64  # bytes


def autocast_dtype(args: TrainingArguments) -> torch.dtype | None:
    """What autocast computes in, `None` where it is off."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def frozen_dtype_of(asked: str | None, cast: torch.dtype | None) -> torch.dtype | None:
    """
    The type in which frozen weights are held, `None` for their own.

    Args:
        asked: `EfficiencyArguments.frozen_dtype`.
        cast: what autocast computes in, `None` where it is off.

    Raises:
        DuetError: autocast computes in another, or is off.
    """
    if asked is None or (asked == "auto" and cast is None):
        return None
    if cast is None or asked not in ("auto", str(cast).removeprefix("torch.")):
        flag = {"bfloat16": "--bf16", "float16": "--fp16"}.get(asked)
        found = "computes in float32" if cast is None else f"casts to {str(cast).removeprefix('torch.')}"
        raise DuetError(
            f"--frozen_dtype {asked}: this run {found}, and other weights would change its results; add {flag} true, "
            "or leave it out."
        )
    return cast


def hold_frozen(model: PreTrainedModel, asked: str | None, args: TrainingArguments) -> "Originals":
    """
    The originals of a run, its frozen weights held as asked; to be given to the Trainer as a callback.

    Args:
        asked: `EfficiencyArguments.frozen_dtype`.

    Raises:
        DuetError: see `frozen_dtype_of` and `Originals.narrow`.
    """
    assert args.output_dir is not None  # where none is given, the library has a name
    originals, dtype = Originals(composed(model), Path(args.output_dir)), frozen_dtype_of(asked, autocast_dtype(args))
    line = ""
    if dtype is not None:
        line = originals.narrow(dtype)
        if not line:
            line = f"--frozen_dtype {asked} changes nothing: no frozen weight that autocast would cast is in float32"
    elif asked is not None:
        line = f"--frozen_dtype {asked} changes nothing: without --bf16 or --fp16 nothing is cast"
    if line and PartialState().is_main_process:
        print(line, flush=True)
    return originals


class _Original:
    """One parameter of a module, as it was: saved in place of the one in memory, and compared with what is loaded."""

    def __init__(self, name: str, parameter: nn.Parameter, tensor: torch.Tensor):
        self.name, self.parameter, self.tensor = name, parameter, tensor

    @property
    def is_released(self) -> bool:
        return self.parameter.numel() > 1 and not any(self.parameter.stride())

    def saved(self, module, state_dict, prefix, *_):
        if prefix + self.name in state_dict and not self.parameter.requires_grad:
            state_dict[prefix + self.name] = self.tensor

    def loaded(self, module, state_dict, prefix, *_):
        given = state_dict.get(prefix + self.name)
        if given is None:
            return
        is_same = given.dtype == self.tensor.dtype and torch.equal(given.cpu(), self.tensor)
        if not self.is_released:
            if not is_same:
                self.tensor = given.detach().to("cpu", self.tensor.dtype, copy=True)
        elif is_same:
            state_dict[prefix + self.name] = self.parameter  # there is nothing to be written to
        else:
            raise DuetError(
                f"the weights that are loaded have another {prefix + self.name} than those whose features are cached; "
                "leave out --cache_vision_features, or start from the model that the checkpoint came from."
            )


class Originals(TrainerCallback):
    """
    The frozen weights of a model that are not in memory as they are saved, while it trains.

    Args:
        model: whose weights they are.
        folder: on whose disk the originals lie.
    """

    def __init__(self, model: PreTrainedModel, folder: Path):
        self.model, self.folder = model, folder
        self._narrow: list[nn.Parameter] = []
        self._dtype = torch.float32
        self._modules: list[nn.Module] = []
        self._released: list[nn.Parameter] = []
        self._kept: dict[int, list[_Original]] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def narrow(self, dtype: torch.dtype) -> str:
        """
        Hold the frozen weights that autocast to `dtype` casts anyway in that type.

        Returns:
            what was done, in a line; an empty one where there is nothing to do.

        Raises:
            DuetError: the model's results would not stay what they are, or the disk is full.
        """
        name = str(dtype).removeprefix("torch.")
        self._narrow, self._dtype = list(cast_anyway(self.model)), dtype
        if not self._narrow:
            return ""
        before = _results(self.model, dtype)
        held = sum(parameter.nbytes for parameter in self._narrow)
        self._hold()
        try:
            found = _results(self.model, dtype)
            reason = None if all(map(_same, before, found)) else "its results would not stay the same"
        except RuntimeError as error:  # a module that leaves autocast for a while
            reason = in_a_line(error)
        if reason is not None:
            self.restore()
            raise DuetError(f"--frozen_dtype {name} cannot be used with this model: {reason}; leave it out.")
        count = sum(parameter.numel() for parameter in self._narrow)
        frozen = sum(p.numel() for p in self.model.parameters() if not p.requires_grad)
        saved = shown_size(held - sum(parameter.nbytes for parameter in self._narrow))
        return f"{count:,} of {frozen:,} frozen weights are held in {name}, which takes {saved} less"

    def release(self, module: nn.Module) -> None:
        """Have a frozen module out of memory while the model trains; whoever runs it before the end brings it back."""
        self._modules.append(module)

    @property
    def is_holding(self) -> bool:
        """Whether a weight is in memory otherwise than it is saved."""
        return bool(self._kept)

    def on_train_begin(self, args, state, control, **kwargs):
        """Take out of memory what was asked for: now that weights were loaded and the model has its device."""
        self._hold()
        for module in self._modules:
            self._released += [parameter for parameter in module.parameters() if parameter.numel() > 1]
            self._hooks.append(module.register_forward_pre_hook(self.bring_back))
        self._keep(self._released)
        for parameter in self._released:
            nothing = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
            parameter.data = nothing.expand(parameter.shape)

    def on_train_end(self, args, state, control, **kwargs):
        """See `restore`; what the device has no room for stays as it is held, and answers as it trained."""
        try:
            self.restore()
        except torch.OutOfMemoryError:
            print("no room for the frozen weights as they were: they stay as they are held, under autocast", flush=True)
            self.model.generate = torch.autocast(self.model.device.type, self._dtype)(self.model.generate)

    def bring_back(self, *_) -> None:
        """Put what was released back into memory, as it was there."""
        released, self._released = self._released, []
        for parameter in released:
            parameter.data = self._kept[id(parameter)][0].tensor.to(parameter.device, parameter.dtype, copy=True)

    def restore(self) -> None:
        """Put every original back into memory: the model is what it would be without all this."""
        for first, *_ in self._kept.values():
            first.parameter.data = first.tensor.to(first.parameter.device, copy=True)
        for hook in self._hooks:
            hook.remove()
        self._kept, self._hooks, self._released = {}, [], []

    def _hold(self):
        self._keep(self._narrow)
        for parameter in self._narrow:
            parameter.data = parameter.data.to(self._dtype)

    def _keep(self, parameters: Iterable[nn.Parameter]) -> None:
        """Write what is not on disk yet, and tell the modules that hold it."""
        new = [parameter for parameter in parameters if id(parameter) not in self._kept]
        if not new:
            return
        self._kept |= {id(parameter): [] for parameter in new}
        tensors = {id(p): tensor for p, tensor in zip(new, _written([p.data for p in new], self.folder))}
        for module in self.model.modules():
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                if id(parameter) in tensors:
                    original = _Original(name, parameter, tensors[id(parameter)])
                    self._kept[id(parameter)].append(original)
                    self._hooks.append(module.register_state_dict_post_hook(functools.partial(original.saved)))
                    self._hooks.append(module.register_load_state_dict_pre_hook(original.loaded))


def _written(tensors: list[torch.Tensor], folder: Path) -> list[torch.Tensor]:
    """The same tensors, read from a file as they are looked at; the processes of one machine share it."""
    state = PartialState()
    file = folder / f"{_FILE}-{state.process_index - state.local_process_index}"
    sizes = [-(-tensor.nbytes // _ALIGNED) * _ALIGNED for tensor in tensors]
    try:
        if state.is_local_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            with open(file, "wb") as stream:
                for tensor, size in zip(tensors, sizes):
                    stream.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
                    stream.write(bytes(size - tensor.nbytes))
        state.wait_for_everyone()
        content = mapped(file)
        state.wait_for_everyone()
    except OSError as error:
        raise DuetError(
            f"the frozen weights take {shown_size(sum(sizes))} of the disk of {folder} while the model trains, which "
            f"cannot be written: {in_a_line(error)}; free some, or leave out --frozen_dtype and "
            "--cache_vision_features."
        ) from error
    finally:
        if state.is_local_main_process:
            with contextlib.suppress(OSError):
                os.unlink(file)
    parts = [part[: tensor.nbytes] for part, tensor in zip(content.split(sizes), tensors)]
    return [part.view(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, tensors)]


def cast_anyway(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    """
    Frozen weights that nothing but modules of `CAST` hold.

    The first of every part stays, by which the library tells the type of the whole: for what is saved, and for what an
    encoder is given.
    """
    others = {id(next(p for p in m.parameters() if p.is_floating_point())) for m in model.modules() if _tells_type(m)}
    for module in model.modules():
        if not isinstance(module, CAST):
            others.update(map(id, module.parameters(recurse=False)))
    for module in model.modules():
        if isinstance(module, CAST):
            for parameter in module.parameters(recurse=False):
                if id(parameter) not in others and parameter.dtype == torch.float32 and not parameter.requires_grad:
                    others.add(id(parameter))
                    yield parameter


def _tells_type(module):
    return isinstance(module, PreTrainedModel) and any(p.is_floating_point() for p in module.parameters())


@torch.no_grad()
def _results(model: PreTrainedModel, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What encoder and language model make of noise and a few tokens under autocast."""
    was_training, inner = model.training, model.model
    model.eval()
    ids = [id for id in range(5) if id != model.config.image_token_id]
    with torch.autocast(model.device.type, dtype):
        _, features = inner.encode_views(blank_image(inner.vision_tower, model.config.image_size))
        logits = model(input_ids=torch.tensor([ids], device=model.device)).logits
    model.train(was_training)
    return features, logits


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def shown_size(count: int) -> str:
    """A number of bytes for a person."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


__all__ = ["Originals", "autocast_dtype", "cast_anyway", "frozen_dtype_of", "hold_frozen", "shown_size"]
