"""Short answers, compared with those that people gave."""

from collections.abc import Sequence

from ..predictions import Prediction, Scores, mean_scores


def exact_match(predictions: Sequence[Prediction]) -> Scores:
    """The share of answers that are, letter for letter, a right one."""
    return mean_scores([float(question.is_right(answer)) for question, answer, _ in predictions])


__all__ = ["exact_match"]
