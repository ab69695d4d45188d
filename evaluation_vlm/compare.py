"""How sure a value is, and whether two models differ: by drawing the questions anew, many times.

What is special: the questions of a row stand or fall together, so rows are drawn, with all of their questions (a
bootstrap over clusters, https://doi.org/10.1201/9780429246593). Two models are compared on the same draws, because
what is hard for one is hard for the other.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

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
    Predictions drawn anew, row by row, the same for whatever is asked of them.

    Args:
        predictions: those of one model; of another, to be compared, in the same order.
        seed: of the draws.
        resamples: how many.
    """

    def __init__(self, predictions: Sequence[Prediction], seed: int = SEED, resamples: int = RESAMPLES):
        rows: dict[object, list[int]] = {}
        for number, (question, *_) in enumerate(predictions):
            rows.setdefault(("alone", number) if question.row is None else row_of(question), []).append(number)
        self.rows = [np.array(numbers) for numbers in rows.values()]
        self.seed, self.resamples = seed, resamples

    def values(self, scores: Scores) -> np.ndarray | None:
        """The value of each draw; `None` where a metric has one for all predictions only, or none for a draw."""
        if scores.each is None:
            return None
        rng = np.random.default_rng(self.seed)
        drawn = (rng.integers(len(self.rows), size=len(self.rows)) for _ in range(self.resamples))
        if scores.of is None:  # a mean: what each row adds to it is enough
            judged = np.array([score is not None for score in scores.each])
            each = np.array([score or 0.0 for score in scores.each])
            sums, counts = (np.array([part[row].sum() for row in self.rows]) for part in (each, judged))
            totals = [(sums[rows].sum(), counts[rows].sum()) for rows in drawn]
            return np.array([total / count for total, count in totals if count])
        found = (scores.among(np.concatenate([self.rows[row] for row in rows]).tolist()) for rows in drawn)
        return np.array([value for value in found if value is not None])


def row_of(question) -> object:
    """What tells a question's row from others."""
    return question.source, question.row


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


__all__ = ["Difference", "Draws", "Interval", "difference_of", "interval_of", "row_of", "sentence"]
