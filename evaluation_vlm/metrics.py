"""The metrics that answers are judged by, and which of them a data set wants.

What is special: `METRICS` is a table. A new metric is a new entry there: a function of predictions, which questions it
can judge, and which it judges unasked. Each question is judged by the metrics that follow from it, so that a mixed data
set has the right one for each of its parts.
"""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from processing.data_error_vlm import DuetError, NotFound, in_a_line

from .predictions import Prediction, Scores
from .questions import Question
from .scores.answers import exact_match


class Metric(NamedTuple):
    """A way to judge answers."""

    name: str
    """What it is called in settings, logs (`eval_NAME`) and files."""
    score: Callable[[Sequence[Prediction]], Scores]
    """Predictions -> their scores; see `Scores`."""
    needs: str
    """What a question has to have, in words, for the message about those without."""
    fits: Callable[[Question], bool]
    """Whether it can judge the answer to a question."""
    follows: Callable[[Question], bool] = lambda question: False
    """Whether it judges the answer to a question where no metric was named."""
    shown: str = ".1%"
    """How its values are written in a table."""
    likelihoods: bool = False
    """Whether it judges by how likely the model finds each choice, for which the model is asked as well."""


def _any(question: Question) -> bool:
    return True


def _is_plain(question: Question) -> bool:
    return question.captions < 2


METRICS = {metric.name: metric for metric in (Metric("exact_match", exact_match, "an answer", _any, _is_plain),)}
"""Name -> metric."""


def choose_metrics(questions: Sequence[Question], asked: str | None = None) -> list[Metric]:
    """
    The metrics that questions are judged by.

    Args:
        questions: what is asked.
        asked: names of `METRICS` and functions of one's own as `FILE.py:FUNCTION`, with commas between them. Without,
            each question is judged by the metrics that follow from it.

    Raises:
        DuetError: there is no such metric, or it can judge none of the questions.
    """
    if asked is None:
        chosen = [metric._replace(fits=metric.follows) for metric in METRICS.values()]
        return [metric for metric in chosen if any(map(metric.fits, questions))]
    metrics = named_metrics(asked)
    for metric in metrics:
        if questions and not any(map(metric.fits, questions)):
            found = questions[0]
            raise DuetError(
                f"metrics={metric.name}: expected questions with {metric.needs}, and none of {len(questions):,} has "
                f"that (the first has {len(found.references)} answers and {len(found.choices)} choices); leave it out, "
                f"or choose among {', '.join(METRICS)}."
            )
    return metrics


def named_metrics(asked: str) -> list[Metric]:
    """
    The metrics of these names, before anything is asked; for `asked` see `choose_metrics`.

    Raises:
        DuetError: there is no such metric, or what computes it is not installed.
    """
    names = list(dict.fromkeys(name.strip() for name in asked.split(",") if name.strip()))
    if not names:
        raise DuetError(f"metrics={asked!r} names none; expected {', '.join(METRICS)}, or FILE.py:FUNCTION.")
    metrics = [METRICS[name] if name in METRICS else _own_metric(name) for name in names]
    doubled = [metric.name for metric in metrics]
    for name in doubled:
        if doubled.count(name) > 1:
            raise DuetError(
                f"metrics={asked!r}: two of them are called {name}; give one of the functions another name."
            )
    return metrics


def _own_metric(named: str) -> Metric:
    """A function of the user's own; see docs/evaluation.md."""
    path, _, name = named.rpartition(":")
    file = Path(path).expanduser()
    if not path or file.suffix != ".py" or not name.isidentifier():
        raise DuetError(f"metrics has {named!r}; expected {', '.join(METRICS)}, or FILE.py:FUNCTION.")
    if not file.is_file():
        raise NotFound(f"metrics={named!r}: there is no file {file}; expected FILE.py:FUNCTION.")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None  # whose name ends in .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a file of the user's own raises
        raise DuetError(
            f"metrics={named!r}: {file} cannot be read: {type(error).__name__}: {in_a_line(error)}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        there = ", ".join(
            key for key, value in vars(module).items() if callable(value) and value.__module__ == file.stem
        )
        raise DuetError(f"metrics={named!r}: {file} has no function {name}; it has {there or 'none'}.")

    def score(predictions: Sequence[Prediction]) -> Scores:
        try:
            found = function(list(predictions))
        except Exception as error:
            reason = f"{type(error).__name__}: {in_a_line(error)}"
            raise DuetError(f"metrics={named!r} failed on {len(predictions):,} predictions: {reason}") from error
        return _own_scores(named, found, len(predictions))

    return Metric(name, score, "an answer", _any)


def _own_scores(named: str, found: Any, count: int) -> Scores:
    """What a function of the user's own gave, a number or a number for each prediction, as scores."""
    try:
        if isinstance(found, Scores):
            return found
        if not isinstance(found, (str, dict)) and hasattr(found, "__len__"):
            each = [float(score) for score in found]
            if len(each) == count:
                return Scores(sum(each) / count, list(each))
        else:
            return Scores(float(found))
    except (TypeError, ValueError):
        pass
    size = f" of {len(found)}" if hasattr(found, "__len__") else ""
    raise DuetError(
        f"metrics={named!r} returned a {type(found).__name__}{size}; expected a number, or a list with a number for "
        f"each of the {count:,} predictions."
    )


__all__ = ["METRICS", "Metric", "choose_metrics", "named_metrics"]
