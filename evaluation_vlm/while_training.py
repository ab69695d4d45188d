"""A model is asked and judged at every evaluation of its training: numbers for the log, pages and pictures for a person.

What is special: nothing of the training changes by it. The same questions are asked each time, so that the curve is one
of the model; all processes answer, and one writes. What stands in a file is replaced whole, so that whoever looks at it
never sees half.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from processing.data_error_vlm import DuetError
from processing.processing_vlm import VLMProcessor

from .asking import answer_questions
from .judgement import KINDS_SHOWN, Judgement, judge
from .metrics import Metric
from .predictions import Prediction
from .questions import Question


class WhileTraining:
    """
    Asks a trainer's model, and judges what it answers.

    Args:
        trainer: a `Trainer`, of which `model`, `args`, `accelerator` and the cache of its collator are read.
        questions: what is asked.
        metrics: what judges the answers.
        settle: makes the settings of generation for a model.
        tell: is given every judgement, in the main process.

    Attributes:
        judgement (`Judgement`): the last one.
    """

    def __init__(
        self,
        trainer: Any,
        questions: Sequence[Question],
        metrics: Sequence[Metric],
        settings: GenerationConfig,
        tell: Callable[[Judgement], None] = lambda judgement: None,
    ):
        self.trainer, self.questions, self.metrics = trainer, questions, metrics
        self.settings, self.tell = settings, tell
        self.judgement: Judgement | None = None

    def __call__(self) -> dict[str, float]:
        """
        Ask and judge; every process has to.

        Returns:
            the values by name, see `logged`.
        """
        predictions = ask(self.trainer, self.questions, self.settings)
        self.judgement = judge(predictions, self.metrics)
        if self.trainer.is_world_process_zero():
            self.tell(self.judgement)
        return logged(self.judgement)

    def names(self) -> list[str]:
        """The names under which values will be logged: known, with what the metrics say, before anything is asked."""
        right = [_if_right(question) for question in self.questions]
        return list(logged(judge(right, self.metrics)))


def ask(trainer: Any, questions: Sequence[Question], settings: GenerationConfig) -> list[Prediction]:
    """What the model of a trainer answers; every process has to ask. See `answer_questions`."""
    from_collator = getattr(trainer.data_collator, "features", None)
    shared = trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()
    with trainer.accelerator.autocast():
        return answer_questions(
            trainer.model,
            trainer.processing_class,
            questions,
            trainer.args.per_device_eval_batch_size,
            settings,
            cache=from_collator,
            in_step=shared,
        )
