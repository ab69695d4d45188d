"""What happens after training: losses, answers, pictures and card, each by itself.

The model is on disk, whole, before any of it is tried. What fails here is named in a line, costs nothing but itself,
and makes the run exit with 1.
"""

import contextlib
import copy
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from transformers.trainer_utils import TrainOutput

from evaluation_vlm.asking import questions_of
from evaluation_vlm.gallery import draw_gallery
from evaluation_vlm.judgement import Judgement, judge_together
from evaluation_vlm.metrics import METRICS, choose_metrics
from evaluation_vlm.predictions import Prediction
from evaluation_vlm.showing import Wording, shown_of
from evaluation_vlm.while_training import PAGE, PICTURE, ask, write_judgement
from inference_vlm.answering import greedy
from inference_vlm.program import program
from processing.batching.collator import VLMDataCollator
from processing.batching.dataset import ConversationDataset
from processing.data_error_vlm import DuetError

from .data import Data, TrainDataset, items_to_ask
from .learning.adapters import composed
from .learning.lineage import note_run
from .learning.meter import table
from .learning.trainer import VLMTrainer
from .model_card import RunCard
from .settings import Arguments
from .stages import Stage
from .survey import write_data_report


SAMPLES_SHOWN = 8


class Attempts:
    """Things that are tried one by one, of which none stops another."""

    def __init__(self, folder: str):
        self.folder = folder
        self.failed: list[str] = []

    @contextlib.contextmanager
    def trying(self, what: str, together: bool = False) -> Iterator[None]:
        """
        Note the failure of the block; what is no person's mistake shows its stack trace.

        Args:
            together: other processes are in it as well and would wait for this one, so its failure is the end.
        """
        try:
            yield
        except Exception as error:
            if not getattr(error, "is_duet_error", False):
                traceback.print_exc()
            self.failed.append(f"{what} failed: {' '.join(str(error).split()) or type(error).__name__}")
            if together:
                self.exit_if_failed()

    def exit_if_failed(self) -> None:
        """Name in a line each what failed, and exit with 1."""
        if self.failed:
            for line in self.failed:
                print(f"error: {line}", file=sys.stderr)
            print(f"The model itself is whole, in {self.folder}.", flush=True)
            sys.exit(1)


def finish(
    stage: Stage,
    arguments: Arguments,
    trainer: VLMTrainer,
    data: Data,
    test: ConversationDataset | None,
    result: TrainOutput,
) -> None:
    """
    Add to the saved model what tells of it: losses, account, answers, pictures and card; and say how to go on.

    The test questions are answered by greedy decoding; the samples as `GenerationArguments` say.

    Raises:
        SystemExit: something failed.
    """
    args = arguments.training
    assert args.output_dir is not None  # where none is given, the library has a name
    if trainer.is_finished:
        if trainer.is_world_process_zero():
            print(f"the run in {args.output_dir} has come to its end: nothing is left to do", flush=True)
        return
    attempts, losses = Attempts(args.output_dir), {"train_loss": result.training_loss}
    speed = trainer.meter.report()
    with attempts.trying("writing the metrics"):
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", {**result.metrics, **speed})
        trainer.save_state()
        if trainer.is_world_process_zero():
            print(f"\n{table(speed)}")
    with attempts.trying("the evaluation", together=args.world_size > 1):
        losses |= _evaluated(trainer)
    answers, together = _Answers(arguments, trainer, test), args.world_size > 1
    with attempts.trying("the test questions", together=together):
        answers.ask_test()
    with attempts.trying("the samples", together=together):
        answers.ask_samples()
    account = trainer.gathered_account()
    if trainer.is_world_process_zero():
        with attempts.trying("the account of the data"):
            learned_from = cast(TrainDataset, trainer.train_dataset)
            print(f"\nconsumed\n{write_data_report(Path(args.output_dir), account, learned_from).table()}")
        with attempts.trying(f"{PAGE} and {PICTURE}"):
            answers.draw()
        card = cast(RunCard, trainer.card)
        card.losses, card.samples = losses, answers.shown()
        card.judgement = answers.judgement if test is not None else None  # what it tells is of test questions
        card.account, card.done = account, True
        with attempts.trying("the model card"):
            trainer.create_model_card()
            if answers.shown() and not card.shows_samples:
                print("The card shows no samples of the data, and they are not pushed; --card_samples agrees to it.")
    # A process that exits with its process group open may be aborted, and the launcher then calls the run failed; one
    # that waited in it for a push would be, when that takes longer than `ddp_timeout`.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    if args.push_to_hub and trainer.is_world_process_zero():
        with attempts.trying("the push to the Hub"):
            trainer.push_saved()
    attempts.exit_if_failed()
    if args.should_save:
        note_run(Path(args.output_dir), finished=trainer.state.global_step, pushed=trainer.pushed_to)
    if trainer.is_world_process_zero():
        _say_goodbye(stage, args.output_dir)


def _evaluated(trainer) -> dict[str, float]:
    if trainer.examine is not None:
        trainer.examine.judgement = None  # of a model before this one
    if trainer.eval_dataset is None:
        return {}
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    of_interest = {"loss", *(trainer.examine.judgement.values if trainer.examine is not None else ())}
    return {f"eval_{name}": metrics[f"eval_{name}"] for name in of_interest if f"eval_{name}" in metrics}


class _Answers:
    """
    What the trained model says; every process has to ask, one writes.

    Attributes:
        judgement (`Judgement`): of the test set, else of the last evaluation; `None` where nothing was judged.
        samples (`Judgement`): of the samples, which come first, and of what was answered beside them.
    """

    def __init__(self, arguments: Arguments, trainer: VLMTrainer, test: ConversationDataset | None):
        self.trainer, self.test = trainer, test
        self.asked, self.generation_args = arguments.evaluation, arguments.generation
        self.encoder = cast(VLMDataCollator, trainer.data_collator).encoder
        self.settings = greedy(composed(trainer.model), self.encoder.processor, self.generation_args.max_new_tokens)
        self.judgement: Judgement | None = trainer.examine.judgement if trainer.examine is not None else None
        self.samples: Judgement | None = None
        self._count = 0  # of the samples

    def ask_test(self) -> None:
        """Answer and judge the test questions, and print what comes of it."""
        if self.test is None:
            return
        questions = questions_of(self.test, self.encoder)
        if self.judgement is None or len(self.judgement.predictions) < len(questions):  # or all were asked just now
            metrics = choose_metrics(questions, self.asked.metrics)
            predictions = ask(self.trainer, questions, self.settings, metrics)
            if not predictions:
                raise DuetError("no question could be asked, because no image could be read.")
            self.judgement = judge_together(predictions, metrics)
        number = len(self.judgement.predictions)
        if self.trainer.is_world_process_zero():
            exact = [metric.name for metric in self.judgement.metrics] == ["exact_match"]
            told = self.judgement.table("exact_match") if exact else self.judgement.report()
            print(f"\nTest answers{' exactly right' * exact} ({number:,} questions, greedy decoding)\n{told}\n")
            self.trainer.save_metrics("test", self.judgement.by_name())

    def ask_samples(self) -> None:
        """
        Answer some questions as `GenerationArguments` say: the first that were judged, else what was learned.

        They are judged as the others were, and among these, as the score of one may depend on all.
        """
        settings, others = copy.deepcopy(self.settings), list[Prediction]()
        vars(settings).update(self.generation_args.told())
        if self.judgement is None:
            most = 10 * SAMPLES_SHOWN
            dataset = items_to_ask(self.trainer.eval_dataset or self.trainer.train_dataset, most)
            questions = questions_of(dataset, self.encoder, most)[:SAMPLES_SHOWN]
            metrics = [METRICS["exact_match"]]  # others may need packages
        else:
            first, others = self.judgement.predictions[:SAMPLES_SHOWN], self.judgement.predictions[SAMPLES_SHOWN:]
            questions, metrics = [prediction.question for prediction in first], self.judgement.metrics
            if settings == self.settings:  # they were answered so
                self.samples, self._count = self.judgement, len(first)
                return
        said = ask(self.trainer, questions, settings, metrics)
        self.samples, self._count = judge_together([*said, *others], metrics), len(said)

    def draw(self) -> None:
        """Write the page of what was judged, or else of the samples, and the picture of the samples; in one process."""
        if self.samples is None or not self._count:
            return
        write_judgement(self.trainer, self.judgement or self.samples, "after training")
        folder, processor = self.trainer.run_folder, self.encoder.processor
        shown = shown_of(self.samples, range(self._count), Wording(processor))
        if draw_gallery(shown, folder / PICTURE).lacks:
            print(f"{PICTURE} lacks characters that no font of this machine has; {folder / PAGE} shows them.")

    def shown(self) -> list[tuple[str, str, str]]:
        """What was asked, expected and answered."""
        if self.samples is None:
            return []
        words = Wording(self.encoder.processor)
        shown = self.samples.predictions[: self._count]
        return [(words(question), question.expected, said) for question, said, _ in shown]


def _say_goodbye(stage, folder):
    print(f"The model, its processor, its card, samples.html and training.png are in {folder}. Load them with\n")
    print(f'    AutoModelForImageTextToText.from_pretrained("{folder}", trust_remote_code=True)')
    print(f'    AutoProcessor.from_pretrained("{folder}", trust_remote_code=True)\n')
    sentence, module, given = stage.next
    print(f"{sentence}:\n")
    print(f"    {program(module)} {given.format(folder=folder)}\n")


__all__ = ["Attempts", "finish"]
