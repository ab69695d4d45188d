"""Whether a model keeps the texts of one row apart, found by trying it: the same texts are run together and alone.

What is special: no list of families decides, and no number says what rounding is. What padding does to the same texts
is measured on the model at hand; another text must leave a text as it is to the last bit, where changing another row of
a batch does; and texts that are let see each other must show that it would have been noticed. Windows of attention, and
sizes that masks were made for, are shortened below the row's length, so that one which is not kept shows.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from modeling_vlm import DuetError, VLMModel
from modeling_vlm.attention_vlm import attend_as_chosen
from modeling_vlm.model_error_vlm import in_a_line


LONGEST, WINDOW = 40, 8

WINDOWS = ("window", "window_size", "attention_chunk_size")
SIZES = ("max_seq_len", "max_position_embeddings", "n_positions")
"""What models call windows of attention, and configs the length that masks of a model's own are made for."""


class Texts(NamedTuple):
    """Two texts that begin alike: positions that they share, ids of both, and of the first with another end."""

    shared: int
    first: torch.Tensor
    second: torch.Tensor
    other: torch.Tensor


class Differs(Exception):
    """Why a row of texts is not the texts."""


@torch.no_grad()
def why_not_packed(model: nn.Module, share_prefix: bool = True) -> str | None:
    """
    Why texts in one row would not be what each is alone, in a clause; `None` where the model proves that they are.

    Every process of a run has to ask. The model, its random numbers and its attention are left as they were.

    Args:
        model: a composed model, with or without adapters.
        share_prefix: try texts behind a prefix that is run once, too; some models can only do without.
    """
    [core] = [module for module in model.modules() if isinstance(module, VLMModel)]
    kind = core.language_model.config.model_type
    stopped = f"the language model ({kind}) cannot be tried on {core.device}, where it is before training starts"
    try:
        if not _is_whole(core):
            return f"{stopped} without its weights (DeepSpeed's stage 3, or FSDP, has them elsewhere)"
        texts = _draw(core)
        with _as_it_was(core, model), _shortened(core, len(texts.first)):
            alone = [_states(core, text) for text in texts[1:3]]
            padded, beside = _padded(core, texts.first, texts.second), _padded(core, texts.other, texts.second)
            rounding = max(_usual(one, other) for one, other in zip(padded, alone))
            if not math.isfinite(rounding):
                raise Differs("numbers are not finite")
            trembling = _most(beside[1], padded[1])  # of a text where another row is another
            stopped = f"texts in one row cannot be run in the language model ({kind}), whose code takes none"
            together = [_together(core, first, texts.second) for first in (texts.first, texts.other)]
            if not _most(*together) > 3 * trembling:
                raise Differs("texts in one row do not see each other even where they may")
            limit = min(max(3 * rounding, _least(core)), _usual(together[0], alone[1]) / 3)
            _check(core, texts, alone, 0, limit, trembling)
            if share_prefix:
                _check(core, texts, alone, texts.shared, limit, trembling)
    except Differs as difference:
        return f"{difference} in the language model ({kind})"
    except DuetError as error:
        return str(error).rstrip(".")
    except Exception as error:  # whatever code of a model's own makes of a row that it does not understand
        return f"{stopped} ({type(error).__name__}: {in_a_line(error, 160)})"
    return None


def _check(core, texts, alone, shared, limit, trembling):
    """
    Raises:
        Differs: texts that share so many positions are not what they are alone.
    """
    where = "behind a shared prefix" if shared else "in one row"
    first, second = _row(core, texts.first, texts.second, shared)
    _, beside = _row(core, texts.other, texts.second, shared)
    if not _most(beside, second) <= 3 * trembling:
        raise Differs(f"texts {where} see each other")
    off = max(_usual(one, other[-len(one) :]) for one, other in zip((first, second), alone))
    if not off <= limit:
        raise Differs(f"texts {where} are not what they are alone ({off:.1g} off, where {limit:.1g} may be rounding)")


def _is_whole(core):
    """Whether this process has the weights: not none, not parts, no zeros that they will be put in place of."""
    weights = core.language_model.parameters()
    elsewhere = any(one.is_meta or hasattr(one, "ds_id") or not one.numel() for one in weights)
    return not elsewhere and bool(core.get_input_embeddings().weight.any())


def _draw(core) -> Texts:
    """Texts of the model's own tokens, and no image's."""
    longest = min(LONGEST, core.max_positions or LONGEST)
    embeddings, image = core.get_input_embeddings(), core.config.image_token_id
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(len(embeddings.weight) - 1, (3, longest), generator=drawn)
    ids = (ids + (ids >= image)).to(embeddings.weight.device)
    shared = longest // 2
    ids[:, :shared] = ids[0, :shared]
    return Texts(shared, ids[0], ids[1, : longest - longest // 6], ids[2])


def _states(core, ids, **kwargs):
    """Hidden states of one row."""
    return core(input_ids=ids.unsqueeze(0), use_cache=False, **kwargs).last_hidden_state[0]


def _padded(core, *texts):
    """Hidden states of texts that are padded."""
    ids = nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    states = core(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return [row[: len(text)] for row, text in zip(states, texts)]


def _row(core, first, second, shared):
    """Hidden states of texts in one row, of what each has behind the positions that they share."""
    if not shared:
        ids, a = torch.cat([first, second]), len(first)
        states = _states(core, ids, segments=[(0, a, -1, 0), (a, len(ids), -1, 1)])
        return states[:a], states[a:]
    # Each branch begins with its own copy of the prefix's last position.
    start = shared - 1
    ids, a = torch.cat([first, second[start:]]), len(first)
    states = _states(core, ids, segments=[(0, start, -1, -1), (start, a, 0, 0), (a, len(ids), 0, 1)])
    return states[start:a], states[a:]


def _together(core, first, second):
    """Hidden states of the second text where it sees the first; each has its own positions."""
    ids = torch.cat([first, second])
    positions = torch.cat([torch.arange(len(text), device=ids.device) for text in (first, second)])
    states = _states(core, ids, segments=[(0, len(ids), -1, 0)], position_ids=positions.unsqueeze(0))
    return states[len(first) :]


def _distances(one, other):
    one, other = one.double(), other.double()
    return ((one - other).norm(dim=-1) / other.norm(dim=-1)).nan_to_num(torch.inf, torch.inf)


def _most(one, other):
    return _distances(one, other).max().item()


def _usual(one, other):
    # Not the largest: rounding sends a token to another expert now and then.
    return _distances(one, other).quantile(0.8).item()


def _least(core):
    """A difference that is rounding even where padding happens to make none."""
    return max(2 * torch.finfo(_narrowest(core.language_model)).eps, 1e-5)


def _narrowest(language_model):
    """The type that most is computed in."""
    types = {one.dtype for one in language_model.parameters() if one.is_floating_point()}
    if "flash" in (language_model.config._attn_implementation or ""):
        types.add(torch.bfloat16)
    known = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    return max((one for one in known if one in types), key=lambda one: torch.finfo(one).eps)


@contextlib.contextmanager
def _as_it_was(core, model) -> Iterator[None]:
    """Nothing learns or is drawn, and afterwards modes and attention are what they were."""
    modes = {module: module.training for module in model.modules()}
    device, narrowest = core.get_input_embeddings().weight.device, _narrowest(core.language_model)
    cuda = [device] if device.type == "cuda" else []
    try:
        model.eval()
        mixed = narrowest in (torch.float16, torch.bfloat16)
        with torch.random.fork_rng(devices=cuda), torch.autocast(device.type, narrowest, enabled=mixed):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        attend_as_chosen(core.language_model)


@contextlib.contextmanager
def _shortened(core, longest) -> Iterator[None]:
    """Windows shorter than the texts, and masks of the model's own longer than these but shorter than a row."""
    size, kept = longest + 2, []
    config = core.language_model.config
    try:
        for owner in (config, *core.language_model.modules()):
            for name, value in list(vars(owner).items()):
                if isinstance(value, bool) or not isinstance(value, int):
                    continue
                windowed = name.endswith(WINDOWS)
                if windowed and value > WINDOW or owner is config and name in SIZES and value > size:
                    kept.append((owner, name, value))
                    vars(owner)[name] = WINDOW if windowed else size
        for module in core.language_model.modules():
            for name, value in list(module.named_buffers(recurse=False)):
                if value.ndim > 1 and value.shape[-1] == value.shape[-2] > size:
                    kept.append((module, name, value))
                    setattr(module, name, value[..., :size, :size])
        yield
    finally:
        for owner, name, value in kept:
            if name in vars(owner):
                vars(owner)[name] = value
            else:
                setattr(owner, name, value)


__all__ = ["why_not_packed"]
