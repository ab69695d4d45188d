"""What is asked of a model while it learns and after: which questions, judged how, and when its learning ends for it.

The loss of the evaluation split is computed in any case; see `docs/evaluation.md`.
"""

from dataclasses import dataclass, field

from transformers.trainer_utils import IntervalStrategy

from evaluation_vlm.metrics import METRICS, named_metrics
from processing.data_error_vlm import DuetError

from .arguments import DataArguments
from .training_arguments import VLMTrainingArguments


LOSSES = ("loss", "eval_loss")


@dataclass
class EvaluationArguments:
    """Which answers are judged, and by what."""

    predict_with_generate: bool = field(
        default=False,
        metadata={
            "help": "At every evaluation answer the questions of test_dataset or test_split, else those of the "
            "evaluation split, by greedy decoding, and judge the answers."
        },
    )
    metrics: str | None = field(
        default=None,
        metadata={
            "help": f"What answers are judged by: {', '.join(METRICS)}, or a function of your own, FILE.py:FUNCTION; "
            "several with commas. Those that follow from each question if not given."
        },
    )
    max_eval_questions: int | None = field(
        default=None,
        metadata={"help": "At every evaluation answer that many of the questions, the same ones; all if not given."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "End the training after that many evaluations in a row without a better one."},
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "How much better an evaluation has to be to count."}
    )

    def __post_init__(self):
        for name in ("max_eval_questions", "early_stopping_patience"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise DuetError(f"{name}={value}: expected 1 or more.")
        if self.early_stopping_threshold < 0:
            raise DuetError(f"early_stopping_threshold={self.early_stopping_threshold}: expected 0 or more.")
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            raise DuetError("early_stopping_threshold says what early_stopping_patience waits for; add that.")
        if self.max_eval_questions is not None and not self.predict_with_generate:
            raise DuetError("max_eval_questions limits what predict_with_generate asks; add --predict_with_generate.")
        if self.metrics is not None:
            named_metrics(self.metrics)

    def settle(self, data_args: DataArguments, training_args: VLMTrainingArguments) -> None:
        """
        Make these settings and the others agree.

        Raises:
            DuetError: something is asked for that nothing would give.
        """
        asks_after = data_args.test_dataset is not None or data_args.test_split is not None
        if self.metrics is not None and not self.predict_with_generate and not asks_after:
            raise DuetError(
                "metrics judge answers, and nothing is asked; add --predict_with_generate, or --test_dataset FILE to "
                "ask after training."
            )
        best = training_args.metric_for_best_model
        if best not in (None, *LOSSES) and not self.predict_with_generate:
            raise DuetError(
                f"metric_for_best_model={best!r}: without answers there is eval_loss alone; add "
                "--predict_with_generate, or leave it out."
            )
        if self.early_stopping_patience is None:
            return
        if IntervalStrategy(training_args.eval_strategy) == IntervalStrategy.NO:
            raise DuetError(
                "early_stopping_patience counts evaluations, and eval_strategy is no; add --eval_strategy steps "
                "--eval_steps 500, or epoch."
            )
        if best is None:
            training_args.metric_for_best_model, training_args.greater_is_better = "loss", False
        # So that a resumed run has waited for as long as one that was not interrupted.
        training_args.restore_callback_states_from_checkpoint = True


__all__ = ["LOSSES", "EvaluationArguments"]
