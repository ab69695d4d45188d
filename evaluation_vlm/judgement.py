"""What metrics say of a model's answers: a value each, for all and by subset and kind."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from processing.data_error_vlm import JOINERS, DuetError

from .metrics import Metric
from .predictions import Prediction, Scores


KINDS_SHOWN = 40

Shares = dict[str, dict[str, float]]
"""Subset -> kind -> value."""


class Judgement(NamedTuple):
    """
    What metrics say of predictions.

    Args:
        predictions: all of them, in their order.
        metrics: those that had something to say.
        scores: metric -> its scores, each aligned with the predictions (`None` where it does not judge one).
    """

    predictions: list[Prediction]
    metrics: list[Metric]
    scores: dict[str, Scores]

    @property
    def values(self) -> dict[str, float]:
        """Metric -> its value over all predictions that it judges."""
        return {name: scores.value for name, scores in self.scores.items()}

    @property
    def notes(self) -> dict[str, str]:
        """Metric -> what its value was counted with, where that is not what its name promises."""
        return {name: scores.note for name, scores in self.scores.items() if scores.note}

    def shares(self, name: str) -> Shares:
        """A metric's value by subset and kind: subset -> kind -> value; empty where it has one for all only."""
        groups: dict[str, dict[str, list[int]]] = {}
        for number, (question, _, _) in enumerate(self.predictions):
            groups.setdefault(question.subset, {}).setdefault(question.kind, []).append(number)
        found: Shares = {}
        for subset, kinds in groups.items():
            for kind, numbers in sorted(kinds.items()):
                if (value := self.scores[name].among(numbers)) is not None:
                    found.setdefault(subset, {})[kind] = value
        return found

    def by_name(self) -> dict[str, float]:
        """Every value under one name: `METRIC`, `METRIC/SUBSET/KIND`, and the mean over kinds `METRIC/SUBSET/mean`."""
        named = dict(self.values)
        for name in self.scores:
            for subset, kinds in self.shares(name).items():
                named |= {f"{name}/{subset}/{kind}": value for kind, value in kinds.items()}
                named[f"{name}/{subset}/mean"] = mean_of(kinds)
        return named

    def table(self, name: str) -> str:
        """A metric's values as a table: a line a kind, a column a subset; of very many kinds the first."""
        (metric,) = (metric for metric in self.metrics if metric.name == name)
        return format_shares(self.shares(name), metric.shown)

    def report(self) -> str:
        """All values, as a training prints them: a line and a table for each metric."""
        parts = []
        for metric in self.metrics:
            scores = self.scores[metric.name]
            parts.append(f"{metric.name} {scores.value:{metric.shown}}" + (f" ({scores.note})" if scores.note else ""))
            if len(self.predictions) > 1 and scores.each is not None:
                parts.append(self.table(metric.name))
        return "\n".join(parts)

    def score_of(self, number: int) -> float | None:
        """The score of one prediction by the first metric that says something of it."""
        each = (scores.each[number] for scores in self.scores.values() if scores.each is not None)
        return next((score for score in each if score is not None), None)


def judge(predictions: Sequence[Prediction], metrics: Sequence[Metric]) -> Judgement:
    """
    What metrics say of predictions, each of those that it fits.

    Raises:
        DuetError: a metric of the user's own fails.
    """
    had_something, scores = [], {}
    for metric in metrics:
        numbers = [number for number, prediction in enumerate(predictions) if metric.fits(prediction.question)]
        if numbers:
            had_something.append(metric)
            found = metric.score([predictions[number] for number in numbers])
            scores[metric.name] = _aligned(found, numbers, len(predictions))
    return Judgement(list(predictions), had_something, scores)


def judge_together(predictions: Sequence[Prediction], metrics: Sequence[Metric]) -> Judgement:
    """
    The same, computed once: by the main process, which tells the others; each has to call it, with all predictions.

    The others know every score, but not how a part of them is judged whose value is no mean.

    Raises:
        DuetError: a metric of the user's own fails; in every process.
    """
    state = PartialState()
    if state.num_processes == 1:
        return judge(predictions, metrics)
    judgement, told = None, list[Any]([None, None])
    if state.is_main_process:
        try:
            judgement = judge(predictions, metrics)
            told[0] = {name: scores._replace(of=None) for name, scores in judgement.scores.items()}
        except Exception as error:  # whatever it is, the others have to know, which would wait
            told[1] = str(error)
            broadcast_object_list(told)
            raise
    broadcast_object_list(told)
    if told[1] is not None:
        raise DuetError(told[1])
    if judgement is not None:
        return judgement
    return Judgement(list(predictions), [metric for metric in metrics if metric.name in told[0]], told[0])


def _aligned(scores: Scores, numbers: list[int], count: int) -> Scores:
    """Scores of some predictions as scores of all."""
    if scores.each is None or len(numbers) == count:
        return scores
    each: list[float | None] = [None] * count
    for number, score in zip(numbers, scores.each):
        each[number] = score
    if scores.of is None:
        return scores._replace(each=each)
    place, of = {number: place for place, number in enumerate(numbers)}, scores.of
    return scores._replace(each=each, of=lambda chosen: of([place[number] for number in chosen]))


def mean_of(shares: dict[str, float]) -> float:
    """The mean over kinds, each counting the same."""
    return sum(shares.values()) / len(shares)


def format_shares(shares: Shares, shown: str = ".1%") -> str:
    """Values as a table: a line a kind, a column a subset; of very many kinds the first."""
    kinds = sorted(set().union(*shares.values()))
    labels = {kind: _label(kind) for kind in kinds[:KINDS_SHOWN]}
    width = max(4, *map(len, labels.values()))
    columns = {subset: max(14, len(_label(subset)) + 1) for subset in shares}
    lines = [" ".join([" " * width, *(f"{_label(subset):>{columns[subset]}}" for subset in shares)])]
    for kind, label in labels.items():
        cells = [
            f"{of_kind[kind]:>{columns[subset] - 1}{shown}} " if kind in of_kind else " " * columns[subset]
            for subset, of_kind in shares.items()
        ]
        lines.append(" ".join([f"{label:<{width}}", *cells]))
    if len(kinds) > KINDS_SHOWN:
        lines.append(f"and {len(kinds) - KINDS_SHOWN:,} kinds more")
    means = [f"{mean_of(of_kind):>{columns[subset] - 1}{shown}} " for subset, of_kind in shares.items()]
    return "\n".join([*lines, " ".join([f"{'mean':<{width}}", *means])])


# A fence of a card would end at a backtick, and what looks like a tag is none even for a reader that knows no fences.
_LOOK_ALIKE = str.maketrans({"`": "'", "<": "\u2039", ">": "\u203a"})


def _label(name: str) -> str:
    """What a data set calls a kind, as it can stand in a line of a terminal or a card."""
    line = " ".join("".join(c if c.isprintable() or c in JOINERS else " " for c in name).translate(_LOOK_ALIKE).split())
    return line if len(line) <= 40 else f"{line[:37]}..."


__all__ = ["Judgement", "Shares", "format_shares", "judge", "judge_together", "mean_of"]
