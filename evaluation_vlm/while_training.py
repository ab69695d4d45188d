"""A model is asked and judged at every evaluation of its training: numbers for the log, pictures for a person.

What is special: nothing of the training changes by it. The same questions are asked each time, so that the curve is one
of the model; all processes answer, and one writes. What stands in a file is replaced whole, so that whoever looks at it
never sees half, and what cannot be drawn costs a line and not the training.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import GenerationConfig, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from processing.data_error_vlm import in_a_line

from .asking import answer_questions
from .curves import draw_curves
from .gallery import draw_gallery
from .judgement import KINDS_SHOWN, Judgement, judge_together
from .metrics import Metric
from .predictions import Prediction
from .questions import Question
from .reporters import report_image
from .showing import Wording, evenly
from .writing import PAGE, PREDICTIONS, write_gallery, write_predictions


logger = logging.get_logger(__name__)

PICTURE, CURVES = "samples.png", "training.png"
IN_PICTURE = 8


class WhileTraining:
    """
    Asks a trainer's model, and judges what it answers.

    Args:
        trainer: a `Trainer` whose model is a composed one, and whose `processing_class` is its processor.
        questions: what is asked.
        metrics: what judges the answers.
        settings: of generation.

    Attributes:
        judgement (`Judgement`): the last one.
    """

    def __init__(
        self, trainer: Any, questions: Sequence[Question], metrics: Sequence[Metric], settings: GenerationConfig
    ):
        self.trainer, self.questions, self.metrics, self.settings = trainer, questions, metrics, settings
        self.judgement: Judgement | None = None

    def __call__(self) -> dict[str, float]:
        """
        Ask, judge, and write what a person looks at; every process has to.

        Returns:
            values by name, see `logged`; those of the main process, so that all decide alike.
        """
        predictions = ask(self.trainer, self.questions, self.settings, self.metrics)
        self.judgement = judge_together(predictions, self.metrics)
        values = [logged(self.judgement)]
        if self.trainer.args.world_size > 1:
            broadcast_object_list(values)
        if self.trainer.is_world_process_zero():
            write_judgement(self.trainer, self.judgement)
        return values[0]

    def names(self) -> list[str]:
        """
        Under which names values will be logged: known before anything is asked, as metrics are tried for it.

        What a value will be counted with, where that is not what its name promises, is printed.
        """
        right = [Prediction(question, question.expected, _as_likely(question)) for question in self.questions]
        tried = judge_together(right, self.metrics)
        if self.trainer.is_world_process_zero():
            for name, note in tried.notes.items():
                print(f"{name}: {note}", flush=True)
        names = [list(logged(tried))]
        if self.trainer.args.world_size > 1:
            broadcast_object_list(names)
        return names[0]


def _as_likely(question: Question) -> tuple[float, ...]:
    return (0.0,) * len(question.choices)


def ask(
    trainer: Any, questions: Sequence[Question], settings: GenerationConfig, metrics: Sequence[Metric]
) -> list[Prediction]:
    """What the model of a trainer answers, as metrics want it; every process has to ask. See `answer_questions`."""
    with trainer.accelerator.autocast():
        return answer_questions(
            trainer.model,
            trainer.processing_class,
            questions,
            trainer.args.per_device_eval_batch_size,
            settings,
            cache=getattr(trainer.data_collator, "features", None),
            in_step=trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled(),
            weighs=any(metric.likelihoods for metric in metrics),
            progress=not trainer.args.disable_tqdm,
        )


def logged(judgement: Judgement) -> dict[str, float]:
    """The values of a judgement as a log takes them: by kind where there are several, and not very many."""
    groups = {(question.subset, question.kind) for question, *_ in judgement.predictions}
    return judgement.by_name() if 1 < len(groups) <= KINDS_SHOWN else dict(judgement.values)


def write_judgement(trainer: Any, judgement: Judgement, what: str = "evaluation") -> None:
    """
    Write all predictions, and a choice of them as page and picture, into a run's folder; in the main process.

    Args:
        what: was judged, in a word for the page.
    """
    folder, step = Path(trainer.args.output_dir), trainer.state.global_step
    wording = Wording(trainer.processing_class)
    with unharmed(PREDICTIONS):
        write_predictions(judgement, wording, folder, step)
    if not judgement.predictions:
        return
    with unharmed(f"{PAGE} and {PICTURE}"):
        shown = write_gallery(judgement, wording, folder, f"What {folder.name} answers", f"Step {step:,} · {what}")
        picture, _ = draw_gallery(evenly(shown, IN_PICTURE), folder / PICTURE)
        report_image(trainer, "samples", picture)


class Curves(TrainerCallback):
    """
    Draws the curves of a run, and gives them to its reporters, whenever it is evaluated or saved and when it ends.

    Args:
        trainer: whose run it is.
        metrics: names of values that evaluations log, see `draw_curves`.
    """

    def __init__(self, trainer: Any, metrics: Sequence[str] = ()):
        self.trainer, self.metrics = trainer, metrics
        self._drawn = 0  # entries of the log

    def on_evaluate(self, args, state, control, **kwargs):
        self._draw(args, state)

    def on_save(self, args, state, control, **kwargs):
        self._draw(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self._draw(args, state)

    def _draw(self, args, state):
        if not state.is_world_process_zero or len(state.log_history) == self._drawn:
            return
        self._drawn = len(state.log_history)
        with unharmed(CURVES):
            picture = draw_curves(state.log_history, Path(args.output_dir) / CURVES, self.metrics)
            if picture is not None:
                report_image(self.trainer, "training", picture)


@contextlib.contextmanager
def unharmed(what: str) -> Iterator[None]:
    """The training goes on where something for a person to look at cannot be made; a line says so."""
    try:
        yield
    except Exception as error:  # whatever fonts, pictures, disks and reporters raise
        logger.warning(f"{what} could not be written: {type(error).__name__}: {in_a_line(error)}")


__all__ = ["CURVES", "PAGE", "PICTURE", "PREDICTIONS", "Curves", "WhileTraining", "ask", "logged", "write_judgement"]
