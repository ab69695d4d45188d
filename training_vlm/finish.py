"""What happens after training: losses, answers, pictures and card, each by itself.

The model is on disk, whole, before any of it is tried. What fails here is named in a line, costs nothing but itself,
and makes the run exit with 1.
"""

import contextlib
import itertools
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from transformers import GenerationConfig
from transformers.trainer_utils import TrainOutput

from evaluation_vlm.gallery import Shown, draw_gallery
from evaluation_vlm.judgement import Judgement, judge
from evaluation_vlm.metrics import METRICS
from evaluation_vlm.predictions import Prediction
from evaluation_vlm.questions import Question, find_questions
from inference_vlm.answering import answer, greedy, text_of
from processing.batching.dataset import ConversationDataset
from processing.batching.encoding import encode_item
from processing.data_error_vlm import DuetError
from processing.image_files_vlm import BadImage, check_image, load_image

from .data import Data, TrainDataset
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
    generation_args, args = arguments.generation, arguments.training
    assert args.output_dir is not None  # where none is given, the library has a name
    if trainer.is_finished:
        if trainer.is_world_process_zero():
            print(f"The model, its card and samples.png are in {args.output_dir}: nothing is left to do.", flush=True)
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
    account = trainer.gathered_account()
    if trainer.is_world_process_zero():
        with attempts.trying("the account of the data"):
            learned_from = cast(TrainDataset, trainer.train_dataset)
            print(f"\nconsumed\n{write_data_report(Path(args.output_dir), account, learned_from).table()}")
        answers = _Answers(generation_args, trainer, test)
        with attempts.trying("the test questions"):
            answers.ask_test()
        with attempts.trying("the samples"):
            answers.ask_samples()
        with attempts.trying("samples.png"):
            answers.draw()
        card = cast(RunCard, trainer.card)
        card.losses, card.judgement, card.samples = losses, answers.judgement, answers.shown()
        card.account, card.done = account, True
        with attempts.trying("the model card"):
            trainer.create_model_card()
            if answers.samples and not card.shows_samples:
                print("The card shows no samples of the data, and they are not pushed; --card_samples agrees to it.")
    if args.push_to_hub:
        with attempts.trying("the push to the Hub"):
            trainer.push_to_hub()
    # A process that exits with its process group open may be aborted, and the launcher then calls the run failed.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    attempts.exit_if_failed()
    if args.should_save:
        note_run(Path(args.output_dir), finished=trainer.state.global_step)
    if trainer.is_world_process_zero():
        _say_goodbye(stage, args.output_dir)


def _evaluated(trainer) -> dict[str, float]:
    if trainer.eval_dataset is None:
        return {}
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    return {"eval_loss": metrics["eval_loss"]} if "eval_loss" in metrics else {}


class _Answers:
    """
    What the trained model says.

    Attributes:
        judgement (`Judgement`): of the answers to the test set, `None` where there is none.
    """

    def __init__(self, generation_args, trainer, test):
        self.generation_args, self.trainer, self.test = generation_args, trainer, test
        self.processor, self.model = trainer.processing_class, composed(trainer.model)
        self.judgement: Judgement | None = None
        self.samples: list[tuple[Question, str]] = []
        self._to_show: list[Question] = []

    def ask_test(self) -> None:
        """Answer the test questions, print how many answers are exactly right, and keep the first for the samples."""
        if self.test is None:
            return
        items = list(_readable(self.test[index] for index in range(len(self.test))))
        questions = find_questions(items, self.processor)
        self._to_show = questions[:SAMPLES_SHOWN]
        answered = self._answered(questions, greedy(self.model, self.processor, self.generation_args.max_new_tokens))
        if not answered:
            raise DuetError("no question could be asked, because no image could be read.")
        self.judgement = judge([Prediction(*pair) for pair in answered], [METRICS["exact_match"]])
        exact = self.judgement.table("exact_match")
        print(f"\nTest answers exactly right ({len(answered):,} questions, greedy decoding)\n{exact}\n")
        self.trainer.save_metrics("test", self.judgement.by_name())

    def ask_samples(self) -> None:
        """Answer some questions as `GenerationArguments` say: of the test set, else what was evaluated or learned."""
        questions = self._to_show
        if self.test is None:
            dataset = self.trainer.eval_dataset or self.trainer.train_dataset
            if not isinstance(dataset, torch.utils.data.IterableDataset):
                dataset = map(dataset.__getitem__, range(len(dataset)))
            encoder = self.trainer.data_collator.encoder
            encoded = (item for item, _ in (encode_item(item, encoder) for item in dataset) if item is not None)
            questions = find_questions(itertools.islice(_readable(encoded), SAMPLES_SHOWN), self.processor)
        config = greedy(self.model, self.processor, self.generation_args.max_new_tokens)
        vars(config).update(self.generation_args.told())
        self.samples = self._answered(questions[:SAMPLES_SHOWN], config)

    def _answered(self, questions: list[Question], config: GenerationConfig) -> list[tuple[Question, str]]:
        """The questions that could be asked, with their answers."""
        batch_size = self.trainer.args.per_device_eval_batch_size
        answers = answer(self.model, self.processor, [question.prompt for question in questions], batch_size, config)
        return [(question, said) for question, said in zip(questions, answers) if said is not None]

    def draw(self) -> None:
        """Write `samples.png`, where there are samples, and a page beside it where fonts are missing."""
        if not self.samples:
            return
        image_id = self.processor.image_token_id
        shown = [
            Shown(
                load_image(question.prompt.images[-1]) if question.prompt.images else None,
                text_of(self.processor, [id for id in question.prompt.ids if id != image_id]),
                question.expected,
                said,
                question.is_right(said),
            )
            for question, said in self.samples
        ]
        page = draw_gallery(shown, Path(self.trainer.args.output_dir) / "samples.png")
        if page is not None:
            print(f"samples.png lacks characters that no font of this machine has; {page} shows them.")

    def shown(self) -> list[tuple[str, str, str]]:
        """What was asked, expected and answered."""
        decode, image = self.processor.tokenizer.decode, self.processor.image_token_id
        return [(decode([id for id in q.prompt.ids if id != image]), q.expected, said) for q, said in self.samples]


def _readable(items):
    """Those of encoded items whose images are there: one that is not costs its own questions alone."""
    for item in items:
        try:
            for reference in item["images"]:
                check_image(reference)
        except BadImage as error:
            print(f"left out of the questions: {error}")
        else:
            yield item


def _say_goodbye(stage, folder):
    print(f"The model, its processor, its card and samples.png are in {folder}. Load them with\n")
    print(f'    AutoModelForImageTextToText.from_pretrained("{folder}", trust_remote_code=True)')
    print(f'    AutoProcessor.from_pretrained("{folder}", trust_remote_code=True)\n')
    sentence, command = stage.next
    print(f"{sentence}:\n")
    print(f"    {command.format(folder=folder)}\n")


__all__ = ["Attempts", "finish"]
