"""How sure a value is, and whether two models differ: by drawing the questions anew, many times.

What is special: questions about an image stand or fall together, as do those of a row, so groups of questions that
share either are drawn (a bootstrap over clusters, https://doi.org/10.1201/9780429246593). Two models are compared on
the same draws, because what is hard for one is hard for the other.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from inference_vlm.encoded_images import name_of

from .predictions import Prediction, Scores


RESAMPLES, CONFIDENCE, SEED = 1_000, 0.95, 0


class Interval(NamedTuple):
    """Where a value lies: in so many of a hundred draws between these two."""

    low: float
    high: float


class Difference(NamedTuple):
    """How much more the first of two models has, and between what the difference lies."""

    value: float
    interval: Interval

    @property
    def is_sure(self) -> bool:
        """Whether there is one: the interval is on one side of 0."""
        return self.interval.low > 0 or self.interval.high < 0


class Draws:
    """
    Predictions drawn anew, group by group, the same for whatever is asked of them.

    Args:
        predictions: those of one model; of another, to be compared, in the same order.
        seed: of the draws.
        resamples: how many.
    """

    def __init__(self, predictions: Sequence[Prediction], seed: int = SEED, resamples: int = RESAMPLES):
        self.groups = [np.array(numbers) for numbers in groups_of(predictions)]
        self.seed, self.resamples = seed, resamples

    def values(self, scores: Scores) -> np.ndarray | None:
        """The value of each draw; `None` where a metric has one for all predictions only, or none for a draw."""
        if scores.each is None:
            return None
        rng = np.random.default_rng(self.seed)
        drawn = (rng.integers(len(self.groups), size=len(self.groups)) for _ in range(self.resamples))
        if scores.of is None:  # a mean: what each group adds to it is enough
            judged = np.array([score is not None for score in scores.each])
            each = np.array([score or 0.0 for score in scores.each])
            sums, counts = (np.array([part[group].sum() for group in self.groups]) for part in (each, judged))
            totals = [(sums[groups].sum(), counts[groups].sum()) for groups in drawn]
            return np.array([total / count for total, count in totals if count])
        found = (scores.among(np.concatenate([self.groups[n] for n in groups]).tolist()) for groups in drawn)
        return np.array([value for value in found if value is not None])


def row_of(question) -> object:
    """What tells a question's row from others."""
    return question.source, question.row


def groups_of(predictions: Sequence[Prediction]) -> list[list[int]]:
    """
    Numbers of predictions whose questions share a row or an image, directly or by others between them.

    Images are the same that have one name, or one content where they are stored in rows; see `name_of`.
    """
    leads: list[int] = list(range(len(predictions)))  # to an earlier one of the same group

    def first_of(number: int) -> int:
        while leads[number] != number:
            leads[number] = number = leads[leads[number]]
        return number

    seen: dict[object, int] = {}
    for number, (question, *_) in enumerate(predictions):
        shared = [("image", name_of(reference)) for reference in question.prompt.images]
        if question.row is not None:
            shared.append(("row", row_of(question)))
        for name in shared:
            one, other = sorted((first_of(number), first_of(seen.setdefault(name, number))))
            leads[other] = one
    groups: dict[int, list[int]] = {}
    for number in range(len(predictions)):
        groups.setdefault(first_of(number), []).append(number)
    return list(groups.values())


def interval_of(scores: Scores, draws: Draws) -> Interval | None:
    """Between what a value lies (95 %); `None` where a metric has no scores of single predictions."""
    values = draws.values(scores)
    return None if values is None or not len(values) else _between(values)


def difference_of(first: Scores, second: Scores, draws: Draws) -> Difference | None:
    """How far the first model is ahead, on the same questions in the same order; `None` as in `interval_of`."""
    values = draws.values(first), draws.values(second)
    if values[0] is None or values[1] is None or not len(values[0]):
        return None
    return Difference(first.value - second.value, _between(values[0] - values[1]))


def _between(values: np.ndarray) -> Interval:
    outside = (1 - CONFIDENCE) / 2
    return Interval(*(float(value) for value in np.quantile(values, (outside, 1 - outside))))


def sentence(name: str, shown: str, difference: Difference, names: tuple[str, str]) -> str:
    """Whether two models differ, for a person."""
    low, high = difference.interval
    between = f"{low:{_signed(shown)}} to {high:{_signed(shown)}}"
    if not difference.is_sure:
        return (
            f"{name}: no difference can be told between {names[0]} and {names[1]} "
            f"({difference.value:{_signed(shown)}}, 95 %: {between})."
        )
    ahead, behind = names if difference.value > 0 else names[::-1]
    return f"{name}: {ahead} is ahead of {behind} ({difference.value:{_signed(shown)}}, 95 %: {between})."


def _signed(shown: str) -> str:
    return f"+{shown}"


__all__ = ["Difference", "Draws", "Interval", "difference_of", "groups_of", "interval_of", "row_of", "sentence"]
