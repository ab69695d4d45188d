"""What a metric is given and what it gives back."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .questions import Question


class Prediction(NamedTuple):
    """
    A question and what a model answered.

    Args:
        question: with every answer that is right.
        answer: what the model said.
        likelihoods: for each of the question's `choices`, the mean log-likelihood of its tokens, where that was asked
            for and there was room; see `weighing`.
    """

    question: Question
    answer: str
    likelihoods: tuple[float, ...] | None = None


class Scores(NamedTuple):
    """
    What a metric says of predictions.

    Args:
        value: the score of all, on the metric's own scale.
        each: the score of each prediction; `None` where the metric has one for all only, and in the place of a
            prediction that it says nothing of.
        of: the value of some of the predictions, by their numbers (some of them several times); the mean of their
            scores if not given. A score that is no mean, such as BLEU's, has its own.
        note: what the value was counted with, where that is not what its name promises; it goes where the value goes.
    """

    value: float
    each: list[float | None] | None = None
    of: Callable[[Sequence[int]], float] | None = None
    note: str = ""

    def among(self, numbers: Sequence[int]) -> float | None:
        """The value of some of the predictions, by their numbers; `None` where it has none for some of them."""
        if self.each is None:
            return None
        numbers = [number for number in numbers if self.each[number] is not None]
        if not numbers:
            return None
        if self.of is not None:
            return self.of(numbers)
        return sum(self.each[number] or 0.0 for number in numbers) / len(numbers)


def mean_scores(each: Sequence[float], note: str = "") -> Scores:
    """The scores of a metric that is a mean over its predictions."""
    return Scores(sum(each) / len(each), list(each), note=note)


__all__ = ["Prediction", "Scores", "mean_scores"]
