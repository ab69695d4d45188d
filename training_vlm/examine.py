"""What a run asks of its model while it learns, and what it makes of the answers: the best checkpoint, an early end.

What is special: metrics are tried before the first step, so that a name that no evaluation will log, or a function of
the user's own that fails, is known then.
"""

from typing import Any

from transformers import EarlyStoppingCallback

from evaluation_vlm.asking import questions_of
from evaluation_vlm.metrics import choose_metrics
from evaluation_vlm.questions import Question
from evaluation_vlm.showing import evenly
from evaluation_vlm.while_training import Curves, WhileTraining
from inference_vlm.answering import greedy
from processing.batching.encoding import Encoder
from processing.data_error_vlm import DuetError

from .arguments import suggest
from .data import items_to_ask
from .evaluation_arguments import LOSSES
from .learning.adapters import composed
from .learning.trainer import VLMTrainer
from .settings import Arguments


def examine(trainer: VLMTrainer, arguments: Arguments, encoder: Encoder, test: Any = None) -> None:
    """
    Have a trainer ask its model at every evaluation, as `EvaluationArguments` say, and draw its curves.

    Args:
        encoder: of the run; test questions are encoded whole.
        test: the test data, whose questions come before those of the evaluation split.

    Raises:
        DuetError: there is nothing to ask, or the metric of the best model is none that is logged.
    """
    asked, names = arguments.evaluation, []
    if asked.predict_with_generate:
        questions = _questions(trainer, encoder, test)
        metrics = choose_metrics(questions, asked.metrics)
        questions = evenly(questions, asked.max_eval_questions or len(questions))
        settings = greedy(composed(trainer.model), encoder.processor, arguments.generation.max_new_tokens)
        trainer.examine = WhileTraining(trainer, questions, metrics, settings)
        names = trainer.examine.names()
        if trainer.is_world_process_zero():
            named = ", ".join(metric.name for metric in metrics)
            print(f"at every evaluation {len(questions):,} questions are answered, and judged by {named}", flush=True)
    best = trainer.args.metric_for_best_model
    if best not in (None, *LOSSES) and best.removeprefix("eval_") not in names:
        raise DuetError(
            f"metric_for_best_model={best!r}: no evaluation of this run logs it; choose among "
            f"{', '.join(['loss', *names])}{suggest(best.removeprefix('eval_'), names)}."
        )
    trainer.add_callback(Curves(trainer, [name for name in names if "/" not in name]))
    if asked.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(asked.early_stopping_patience, asked.early_stopping_threshold))


def _questions(trainer: VLMTrainer, encoder: Encoder, test: Any) -> list[Question]:
    where, dataset = ("test data", test) if test is not None else ("evaluation split", trainer.eval_dataset)
    if dataset is None:
        raise DuetError(
            "predict_with_generate asks about held-out data, and there are none; name a --test_dataset or an "
            "--eval_split, or hold out a share with --eval_share 0.01."
        )
    questions = questions_of(test if test is not None else items_to_ask(dataset), encoder)
    if not questions:
        raise DuetError(f"predict_with_generate: the {where} hold no question whose image can be read.")
    return questions


__all__ = ["examine"]
