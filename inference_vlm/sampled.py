"""Tokens are drawn with seeds of their own, and nobody else's random numbers are touched.

What is special: to the likelihoods that the settings leave, each in logarithm, noise of Gumbel's distribution is added,
and the likeliest taken: that is a draw from them (the Gumbel-max trick, Gumbel 1954). So the library decodes greedily,
and each row draws from a generator of its own, on the CPU: a seed gives the same noise on every device, and in every
batch.
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from processing.data_error_vlm import DuetError


WARPERS = {
    "temperature": (TemperatureLogitsWarper, 1.0),
    "top_k": (TopKLogitsWarper, 0),
    "top_p": (TopPLogitsWarper, 1.0),
    "min_p": (MinPLogitsWarper, 0.0),
    "typical_p": (TypicalLogitsWarper, 1.0),
    "epsilon_cutoff": (EpsilonLogitsWarper, 0.0),
    "eta_cutoff": (EtaLogitsWarper, 0.0),
}
"""Settings of sampling in the order in which they act: what each does, and the value with which it does nothing."""


LEAST_TEMPERATURE = 1e-6
"""What lower ones count as: scores that were divided by them would not fit 32 bits."""


class Settings(NamedTuple):
    """How an answer is written: settings of generation, and what draws its tokens where they are drawn."""

    config: GenerationConfig
    seed: int | None = None


class Drawn(LogitsProcessor):
    """
    Adds the noise of one draw to the scores of each row.

    Args:
        seeds: one a row, 64 bits each.
    """

    def __init__(self, seeds: Sequence[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = [torch.empty(scores.shape[-1]).exponential_(generator=generator) for generator in self.generators]
        waits = torch.stack(rows).clamp_min(torch.finfo(torch.float32).tiny)
        return scores.float() - waits.log().to(scores.device)


def drawing(config: GenerationConfig, seeds: Sequence[int]) -> tuple[GenerationConfig, LogitsProcessorList]:
    """
    Settings with which the library decodes greedily, and what makes of that the sampling that was asked for.

    Args:
        config: settings; those of greedy decoding stay what they are.
        seeds: one a row.
    """
    if not config.do_sample:
        return config, LogitsProcessorList()
    plain, processors = copy.deepcopy(config), LogitsProcessorList()
    plain.do_sample = False
    for name, (warper, neutral) in WARPERS.items():
        value = getattr(plain, name, None)
        setattr(plain, name, None)
        if value is not None and value != neutral:
            # A whole number is a temperature, too.
            processors.append(warper(max(float(value), LEAST_TEMPERATURE) if name == "temperature" else value))
    processors.append(Drawn(seeds))
    return plain, processors


def fresh_seed() -> int:
    """A seed that nobody chose."""
    return torch.Generator().seed()


def check_settings(given: dict[str, float | None]) -> None:
    for name, (least, most, said) in _RANGES.items():
        if (value := given[name]) is not None and not least <= value <= most:  # nor NaN
            raise DuetError(f"{name}={value}: expected {said}.")
    for name in ("max_new_tokens", "top_k", "seed"):
        if (value := given[name]) is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise DuetError(f"{name}={value}: expected a whole number.")


_RANGES: dict[str, tuple[float, float, str]] = {
    "max_new_tokens": (1, 2**31, "1 or more"),
    "temperature": (0, 100, "0 or more, up to 100"),
    "top_p": (0, 1, "0 to 1"),
    "top_k": (0, 2**31, "0 (off) or more"),
    "min_p": (0, 1, "0 to 1"),
    "repetition_penalty": (1e-2, 100, "0.01 to 100"),
    "seed": (-(2**63), 2**64 - 1, "a whole number of 64 bits"),
}


__all__ = ["WARPERS", "Drawn", "Settings", "check_settings", "drawing", "fresh_seed"]
