"""A step of a run, rehearsed without weights and without reading an image: what it has alive and what it computes.

What is special: it is the run's own Trainer that takes the steps, with the run's own batches, optimizer, autocast and
checkpointing, on a model of which only shapes are there. So no formula is made of what a layer keeps for its backward
pass.
"""

import contextlib
import copy
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from modeling_vlm import VLMForConditionalGeneration
from modeling_vlm.vision_vlm import blank_image
from processing.batching.account import BatchAccount
from processing.batching.encoding import Encoder
from processing.data_error_vlm import DuetError, in_a_line
from processing.image_files_vlm import ImageReference, image_size
from processing.processing_vlm import VLMProcessor

from .cache_features import refuse_address, refuse_uncacheable
from .data import TrainDataset
from .evaluation_arguments import EvaluationArguments
from .flops import Work, windows_of, work_of
from .learning.adapters import composed
from .learning.originals import autocast_dtype, cast_anyway, frozen_dtype_of
from .learning.trainer import VLMTrainer
from .learning.verify import Verification
from .run import build_trainer
from .settings import Arguments
from .weightless import ACTIVATIONS, OPTIMIZER, Watch, blank, weightless


BATCHES = 32  # of which the largest is rehearsed


@dataclass
class Rehearsed:
    """
    What was found of a run's steps.

    Attributes:
        peak: bytes alive at the moment at which most are, by kind.
        held: bytes that are alive between steps, by kind.
        account, views: of the batch that was rehearsed, the largest.
        batches: how many were looked at, those among them of which nothing is learned.
        conversations, work: what all of them hold.
        views_an_image: more than one where images are tiled.
        features: tokens and width of what the projector reads of a view.
        savings: what the run leaves out, for a reader.
    """

    peak: Counter[str]
    held: Counter[str]
    account: BatchAccount
    views: int
    batches: int
    conversations: int
    work: Work
    views_an_image: float
    features: tuple[int, int]
    savings: str


class Unread:
    """In the place of a cache of features: how many views an image has, from its header at most."""

    def __init__(self, processor: VLMProcessor, is_cached: bool):
        self.processor, self.is_cached = processor, is_cached
        self.images = self.views = 0

    def seen(self, reference: ImageReference) -> tuple[torch.Tensor, tuple[int, int]]:
        """See `FeatureCache.seen`."""
        if self.is_cached:
            refuse_address(reference)
        tiled = self.processor.max_tiles > 1
        rows, columns = self.processor.tile_grid(*image_size(reference)) if tiled else (1, 1)
        views = 1 + (rows * columns if rows * columns > 1 else 0)
        self.images, self.views = self.images + 1, self.views + views
        return torch.empty(views, 0), (rows, columns)


def rehearse(
    arguments: Arguments,
    model: VLMForConditionalGeneration,
    encoder: Encoder,
    dataset: TrainDataset,
    devices: int = 1,
) -> Rehearsed:
    """
    Take two steps of a run with the largest of its first batches.

    Args:
        model: on the meta device, with what learns of it; it is as before afterwards.
        dataset: encoded conversations of the run, or a sample of them.
        devices: that take a step together.

    Raises:
        DuetError: what the run refuses, such as a conversation that has no room or a cache of what learns; or the model
            cannot be run on shapes alone.
    """
    cached = arguments.efficiency.cache_vision_features is not None
    if cached:
        refuse_uncacheable(composed(model), [dataset])
    model = copy.deepcopy(model)  # it costs nothing
    # There is no memory to be moved.
    model.to = lambda *args, **kwargs: model  # type: ignore[assignment]  # this one model's own
    if frozen_dtype_of(arguments.efficiency.frozen_dtype, autocast_dtype(arguments.training)) is not None:
        for parameter in cast_anyway(composed(model)):
            parameter.data = parameter.data.to(torch.bfloat16)  # of the same size as float16, see `rehearsing`
    with tempfile.TemporaryDirectory() as folder, weightless(model):
        two = rehearsing(arguments, folder)
        accumulated = two.training.gradient_accumulation_steps
        two.training.gradient_accumulation_steps = accumulated * devices  # what is saved follows from a whole step
        trainer = build_trainer(two, model, encoder, dataset, None, probe=lambda *_: None)
        trainer.args.gradient_accumulation_steps = min(2, accumulated)
        trainer.describe = dict  # nothing is written that a run could go on from
        unread = cast(Any, trainer.data_collator).features = Unread(encoder.processor, cached)
        seen = list(_batches(trainer, cached))
        batches = [batch for batch in seen if batch is not None]
        work = Work()
        windows = windows_of(composed(model).config.text_config)
        for batch, lengths, predicted in batches:
            work.add(work_of(batch, lengths, predicted, windows))
        largest, _, _ = max(batches, key=lambda found: (found[0]["account"].run, _views(found[0])))
        peak, held = _steps(trainer, largest, cached)
        return Rehearsed(
            peak, held, largest["account"], _views(largest), len(seen),
            sum(len(lengths) for _, lengths, _ in batches), work, unread.views / max(1, unread.images),
            _features(composed(model)), str(trainer.savings._replace(is_cached=cached)),
        )  # fmt: skip


def rehearsing(arguments: Arguments, folder: str) -> Arguments:
    """The settings of two steps of which nothing is written."""
    training = copy.copy(arguments.training)
    training.output_dir, training.max_steps = folder, 2
    training.save_strategy, training.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
    training.logging_strategy, training.report_to = IntervalStrategy.NO, []
    training.lr_scheduler_type, training.lr_scheduler_kwargs = SchedulerType.CONSTANT, {}
    training.warmup_steps, training.dataloader_num_workers, training.disable_tqdm = 0, 0, True
    training.dataloader_prefetch_factor, training.dataloader_persistent_workers = None, False
    if training.fp16:  # which a CPU does not take, and which takes as many bytes
        training.fp16, training.bf16 = False, True
    training.load_best_model_at_end = training.push_to_hub = training.eval_on_start = False
    training.debug, training.dataloader_drop_last = [], False  # the last of a sample is not the run's last
    # What is cached or held in fewer bits is neither written nor tried.
    efficiency = replace(arguments.efficiency, cache_vision_features=None, frozen_dtype=None)
    return arguments._replace(training=training, efficiency=efficiency, evaluation=EvaluationArguments())


def _batches(trainer: VLMTrainer, cached: bool) -> Iterator[tuple[dict[str, Any], list[int], int] | None]:
    """
    The first of an epoch: images without pixels, lengths of texts, predictions.

    Those of which nothing is learned are `None`, and no part of the number that is looked at.
    """
    number = 0
    for batch in trainer.get_train_dataloader():
        learned = [record for record in batch["account"].records if record.dropped is None]
        if not learned:
            yield None
            continue
        if "vision_features" in batch:
            views = len(batch.pop("vision_features"))
            if cached:
                dtype = autocast_dtype(trainer.args) or torch.float32
                batch["vision_features"] = blank(views, *_features(composed(trainer.model)), dtype=dtype)
            else:
                batch["pixel_values"] = _pixels(composed(trainer.model), views)
        yield batch, [record.tokens for record in learned], sum(record.supervised for record in learned)
        number += 1
        if number == BATCHES:
            return


def _pixels(model, views: int) -> torch.Tensor:
    return blank(views, *blank_image(model.model.vision_tower, model.config.image_size).shape[1:])


def _features(model) -> tuple[int, int]:
    """Tokens and width of what the projector reads of a view."""
    with torch.no_grad():
        return tuple(model.model.encode_views(_pixels(model, 1))[1].shape[1:])


def _views(batch) -> int:
    images = batch.get("pixel_values", batch.get("vision_features"))
    return 0 if images is None else len(images)


def _steps(trainer: VLMTrainer, batch: dict[str, Any], cached: bool) -> tuple[Counter, Counter]:
    """The peak of the second step, and what is alive before it."""
    for callback in (PrinterCallback, ProgressCallback, Verification):  # there are no weights to be verified
        trainer.remove_callback(callback)
    accumulated = trainer.args.gradient_accumulation_steps
    batches = cast(DataLoader, [batch] * (2 * accumulated))
    trainer.get_train_dataloader = lambda: batches  # type: ignore[method-assign]  # this one trainer's own
    trainer.stop.listening = contextlib.nullcontext  # type: ignore  # there is nothing to be saved
    model: VLMForConditionalGeneration = composed(trainer.model)
    unread = {id(tensor) for tensor in _tensors(model.model.vision_tower)} if cached else set()
    watch = Watch(model, [tensor for tensor in _tensors(model) if id(tensor) not in unread])
    between = _Between(watch)
    trainer.add_callback(between)
    try:
        with watch:
            watch.mark([part for part in batch.values() if isinstance(part, torch.Tensor)], ACTIVATIONS)
            trainer.train()
    except DuetError:
        raise
    except Exception as error:
        kinds = f"{model.config.vision_config.model_type} and {model.config.text_config.model_type}"
        raise DuetError(
            f"a step of this model ({kinds}) cannot be run on shapes alone, so its memory is not known "
            f"({in_a_line(error, 300)}); where it is one that needs padding, add --padding_free off."
        ) from error
    return watch.peak, between.held


class _Between(TrainerCallback):
    """Has the peak of the second step looked for, which finds the optimizer's state as all later ones do."""

    def __init__(self, watch: Watch):
        self.watch = watch
        self.held: Counter[str] = Counter()

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step == 1:
            states = [part for states in optimizer.state.values() for part in states.values()]
            self.watch.mark([part for part in states if isinstance(part, torch.Tensor)], OPTIMIZER)
            self.held = Counter(self.watch.alive)
            self.watch.begin()


def _tensors(module):
    return [*module.parameters(), *module.buffers()]


__all__ = ["BATCHES", "Rehearsed", "Unread", "rehearse", "rehearsing"]
