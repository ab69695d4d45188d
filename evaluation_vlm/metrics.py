"""The metrics that answers are judged by, and which of them a data set wants.

What is special: `METRICS` is a table. A new metric is a new entry there: a function of predictions, which questions it
can judge, and which it judges unasked. Each question is judged by the metrics that follow from it, so that a mixed data
set has the right one for each of its parts.
"""

import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from transformers.utils import logging

from processing.data_error_vlm import DuetError, NotFound, in_a_line

from .predictions import Prediction, Scores
from .questions import Question
from .scores.answers import anls, exact_match, multiple_choice, vqa_accuracy
from .scores.captions import bleu, bleu4, cider, rouge_l


logger = logging.get_logger(__name__)


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
    package: str | None = None
    """The package that computes it, of the extra `evaluation`."""
    shown: str = ".1%"
    """How its values are written in a table."""
    likelihoods: bool = False
    """Whether it judges by how likely the model finds each choice, for which the model is asked as well."""

    @property
    def is_there(self) -> bool:
        """Whether what computes it is installed."""
        return self.package is None or importlib.util.find_spec(self.package) is not None


VQA_ANSWERS = 10
"""People whom VQAv2 asked each question. Of four of them or more, three others can agree with each."""


def _any(question: Question) -> bool:
    return True


def _has_choices(question: Question) -> bool:
    return len(question.choices) > 1


def _has_people(question: Question) -> bool:
    return len(question.given) >= 4 and not _has_choices(question)


def _is_vqa(question: Question) -> bool:
    return len(question.given) == VQA_ANSWERS and not question.captions and not _has_choices(question)


def _is_captions(question: Question) -> bool:
    return question.captions > 1


def _is_plain(question: Question) -> bool:
    return not _is_vqa(question) and not _is_captions(question)


METRICS = {
    metric.name: metric
    for metric in (
        Metric("exact_match", exact_match, "an answer", _any, _is_plain),
        Metric("multiple_choice", multiple_choice, "choices", _has_choices, _has_choices, likelihoods=True),
        Metric("vqa_accuracy", vqa_accuracy, "four people's answers or more", _has_people, _is_vqa),
        Metric("anls", anls, "an answer", _any),
        Metric("cider", cider, "an answer", _any, _is_captions, "pycocoevalcap", ".3f"),
        Metric("bleu4", bleu4, "an answer", _any, _is_captions, "pycocoevalcap", ".3f"),
        Metric("rouge_l", rouge_l, "an answer", _any, _is_captions, "pycocoevalcap", ".3f"),
        Metric("bleu", bleu, "an answer", _any, package="sacrebleu", shown=".2f"),
    )
}
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
        return _following(questions)
    metrics = named_metrics(asked)
    for metric in metrics:
        fit = sum(map(metric.fits, questions))
        if questions and not fit:
            found = questions[0]
            raise DuetError(
                f"metrics={metric.name}: expected questions with {metric.needs}, and none of {len(questions):,} has "
                f"that (the first has {len(found.references)} answers and {len(found.choices)} choices); leave it out, "
                f"or choose among {', '.join(METRICS)}."
            )
        if fit < len(questions):
            _warn(f"{metric.name} judges {fit:,} of {len(questions):,} questions: those with {metric.needs}")
    return metrics


def _following(questions):
    """The metrics that follow from questions, each for those from which it does; without their package exact match."""
    chosen = [metric._replace(fits=metric.follows) for metric in METRICS.values()]
    chosen = [metric for metric in chosen if any(map(metric.fits, questions))]
    missing = [metric for metric in chosen if not metric.is_there]
    if not missing:
        return chosen
    _warn(
        f"{', '.join(metric.name for metric in missing)} would follow from these data, and {missing[0].package} is not "
        "installed: exact_match judges them instead; pip install 'duet-vlm[evaluation]' for what captions want."
    )
    there = [metric for metric in chosen if metric.is_there]
    exact, others = METRICS["exact_match"], [metric for metric in there if metric.name != "exact_match"]

    def is_left(question: Question) -> bool:
        return exact.follows(question) or not any(metric.fits(question) for metric in others)

    return [exact._replace(fits=is_left), *others]


def _warn(line: str) -> None:
    """Once, where every process would."""
    if PartialState().is_main_process:
        logger.warning(line)


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
    for metric in metrics:
        if not metric.is_there:
            raise DuetError(
                f"metrics={metric.name} needs the package {metric.package}, which is not installed here; pip install "
                "'duet-vlm[evaluation]', or leave it out."
            )
    doubled = [metric.name for metric in metrics]
    for name in doubled:
        if doubled.count(name) > 1:
            raise DuetError(
                f"metrics={asked!r}: two of them are called {name}; give one of the functions another name."
            )
    return metrics


_TAKEN = {"loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time"}
"""What the Trainer logs of an evaluation."""


def _own_metric(named: str) -> Metric:
    """A function of the user's own; see docs/evaluation.md."""
    path, _, name = named.rpartition(":")
    file = Path(path).expanduser()
    if not path or file.suffix != ".py" or not name.isidentifier():
        raise DuetError(f"metrics has {named!r}; expected {', '.join(METRICS)}, or FILE.py:FUNCTION.")
    if name in _TAKEN:
        raise DuetError(f"metrics={named!r}: the log has another eval_{name}; give the function another name.")
    if not file.is_file():
        raise NotFound(f"metrics={named!r}: there is no file {file}; expected FILE.py:FUNCTION.")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None  # whose name ends in .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a file of the user's own raises
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
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {in_a_line(error)}"
            raise DuetError(f"metrics={named!r} failed on {len(predictions):,} predictions: {reason}") from error
        return _own_scores(named, found, len(predictions))

    return Metric(name, score, "an answer", _any, shown=".3g")


def _own_scores(named: str, found: Any, count: int) -> Scores:
    """What a function of the user's own gave, a number or a number for each prediction, as scores."""
    is_number = hasattr(found, "ndim") and found.ndim == 0  # in a tensor or an array
    try:
        if isinstance(found, Scores):
            scores = None if found.each is None else [None if one is None else float(one) for one in found.each]
            value = float(found.value)
            is_finite = all(math.isfinite(number) for number in (value, *(scores or ())) if number is not None)
            if is_finite and (scores is None or len(scores) == count):
                return found._replace(value=value, each=scores)
        elif not isinstance(found, (str, dict)) and hasattr(found, "__len__") and not is_number:
            each = [float(score) for score in found]
            if len(each) == count and all(map(math.isfinite, each)):
                return Scores(sum(each) / count, list(each))
        elif math.isfinite(value := float(found)):
            return Scores(value)
    except (TypeError, ValueError):
        pass
    counted: Any = found.each if isinstance(found, Scores) else found
    size = f" of {len(counted)}" if hasattr(counted, "__len__") and not is_number else ""
    raise DuetError(
        f"metrics={named!r} returned a {type(found).__name__}{size}; expected a finite number, or a list with one for "
        f"each of the {count:,} predictions."
    )


__all__ = ["METRICS", "Metric", "choose_metrics", "named_metrics"]
