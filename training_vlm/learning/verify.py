"""After its first step a run proves that what was declared to learn has changed, and that nothing else has.

What is special: no second copy of a weight is kept. Of every parameter there is a checksum over its raw bits, whatever
its numbers are, computed where it lies: 64 bits that differ for certain where one word does, and where several do by
all but one chance in 2**64. The step that counts is the first whose rate is above 0 and which no scaler skipped. A
declared parameter in which a step of that size cannot show, as one of 1.0 when a warm-up begins, is looked at again as
the rate grows. A violation ends the run before anything is saved over what is good.
"""

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import TrainerCallback

from processing.data_error_vlm import DuetError

from .adapters import composed


if TYPE_CHECKING:
    from .trainer import VLMTrainer

NAMED = 5  # parameters, in a message
_MARGIN = 0.1  # of a step's size, of which an optimizer may make less than its rate says


class _Before(NamedTuple):
    learns: bool
    checksum: int


class Verification(TrainerCallback):
    """Checks the first step of a `VLMTrainer` against what was declared."""

    def __init__(self, trainer: "VLMTrainer"):
        self.trainer = trainer
        self._before: dict[str, _Before] | None = None
        self._rate = 0.0  # of the step that was looked at last
        self._done = False

    def on_train_begin(self, args, state, control, **kwargs):
        """Begin anew with each training."""
        self._before, self._rate, self._done = None, 0.0, False

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        """Note what every parameter is, once all that loads weights or holds them otherwise has done so."""
        if self._done or self._before is not None:
            return
        learning, parameters = self.trainer.declared().learning, _in_memory(model)
        self._stop(
            f"{name} {'was declared to learn and is frozen' if name in learning else 'learns and was not declared to'}"
            for name, parameter in parameters.items()
            if parameter.requires_grad is not (name in learning)
        )
        sums = checksums(parameters.values())
        self._before = {name: _Before(name in learning, found) for name, found in zip(parameters, sums)}

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Compare, while the gradients are still there."""
        rate_of = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        rate = max(float(group["lr"]) for group in optimizer.param_groups)
        if not self._before or rate <= 0 or self.trainer.accelerator.optimizer_step_was_skipped:
            return
        parameters = {name: p for name, p in _in_memory(model).items() if name in self._before}
        sums, wrong, still = checksums(parameters.values()), [], {}
        for (name, parameter), found in zip(parameters.items(), sums):
            before = self._before[name]
            if not before.learns and found != before.checksum:
                wrong.append(f"{name} was not declared to learn and has changed")
            elif before.learns and found == before.checksum:
                still[name] = before
                if _would_show(parameter, rate_of.get(id(parameter), rate)):
                    wrong.append(f"{name} was declared to learn, was reached by a gradient and has not changed")
        self._stop(wrong)
        grew, self._rate, self._before = rate > self._rate, rate, still
        # Of several processes each may have others left, and all have to come to a verdict together.
        self._done = not grew or not still or args.world_size > 1
        if self._done:
            self._before = None

    def _stop(self, wrong: Iterable[str]) -> None:
        trainer, found = self.trainer, list(wrong)
        if trainer.args.world_size > 1:
            found = list(dict.fromkeys(gather_object(found)))
        if not found:
            return
        trainer.guard.stopped = True
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        raise DuetError(
            f"what learns at step {trainer.state.global_step + 1} is not what was declared: {'; '.join(found[:NAMED])}"
            f"{more}. Nothing was saved of it. Look for what sets requires_grad or weights beside --tune_vision, "
            "--tune_projector, --tune_text and --freeze_embeddings."
        )


def _in_memory(model) -> dict[str, nn.Parameter]:
    """The parameters of the composed model that have memory here: others are on disk alone, or another process's."""
    named = composed(model).named_parameters()
    return {name: p for name, p in named if _local(p).numel() and (p.numel() == 1 or any(_local(p).stride()))}


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """What this process has of a parameter, or of a gradient."""
    parameter = getattr(parameter, "ds_tensor", parameter)  # of DeepSpeed's third stage
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter.detach()


def _would_show(parameter: nn.Parameter, rate: float) -> bool:
    """Whether a step of this rate along the parameter's gradient is more than what its numbers round away."""
    if parameter.grad is None:
        return False
    numbers, gradient = _local(parameter), _local(parameter.grad).abs().clamp(max=1).float()
    least = torch.finfo(numbers.dtype)
    return bool((_MARGIN * rate * gradient > numbers.abs().float() * least.eps + least.tiny).any())


@torch.no_grad()
def checksums(parameters: Iterable[torch.Tensor]) -> list[int]:
    """For each parameter 64 bits that follow from the bits of all its numbers, and from their order."""
    sums = [_checksum(_words_of(_local(parameter))) for parameter in parameters]
    return torch.stack([found.to(sums[0].device) for found in sums]).tolist() if sums else []


def _words_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bits as whole numbers of 64 bits, with zeros behind the last."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    if missing := -len(raw) % 8:
        raw = nn.functional.pad(raw, (0, missing))
    elif raw.data_ptr() % 8:
        raw = raw.clone()
    return raw.view(torch.int64)


def _checksum(words: torch.Tensor) -> torch.Tensor:
    factors = _factors(words.device)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for part in words.split(len(factors)):
        # Odd factors, so that no difference of one word is multiplied away; all of it modulo 2**64.
        total = total * _NEXT + (part * factors[: len(part)]).sum()
    return total


_NEXT = 0x5851F42D4C957F2D  # odd too


@functools.cache
def _factors(device: torch.device) -> torch.Tensor:
    """As many as words are multiplied at a time: on a CPU they stay in its cache."""
    count = 1 << (17 if device.type == "cpu" else 22)
    drawn = torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(0))
    return (drawn | 1).to(device)


__all__ = ["Verification", "checksums"]
