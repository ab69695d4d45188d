"""Which savings a run makes, and in a line each why it does not make one.

What is special: no saving changes a loss or a gradient. The model at hand proves that it can go without padding; the
data say whether their texts share a prefix, and whether a step of such texts still sees enough images.
"""

import math
import sys
from collections.abc import Callable
from typing import NamedTuple, cast

import numpy as np
from accelerate.utils import gather_object
from torch import nn

from processing.batching.collator import VLMDataCollator
from processing.batching.dataset import StreamedDataset
from processing.batching.encoding import Encoder
from processing.data_error_vlm import DuetError

from ..data import TrainDataset
from ..efficiency import AMPLE_IMAGES, LEAST_IMAGES, EfficiencyArguments
from ..survey import SURVEYED, length_is_fetched, some_items, sources_of
from .adapters import composed
from .batches import Budget, PlannedBatches, PlannedStream, units_of
from .probe import why_not_packed
from .sampling import order_seed
from .trainer import VLMTrainer


Probe = Callable[[nn.Module, bool], str | None]
"""Why texts of a row of a model would not be what each is alone, behind a shared prefix or not; see `probe.py`."""


class Savings(NamedTuple):
    """What was decided of padding and of shared prefixes, why, and where features come from."""

    padding_free: bool
    share_prefix: bool
    why: str = ""
    is_cached: bool = False

    def __str__(self):
        made = "no padding" if self.padding_free else "batches are padded"
        made += ", features of images read from the cache" if self.is_cached else ", each image of a batch encoded once"
        if self.share_prefix:
            made += ", what texts of an image begin with run once"
        return f"{made}; {self.why}" if self.why else made


def choose_savings(asked: EfficiencyArguments, trainer: VLMTrainer, probe: Probe = why_not_packed) -> Savings:
    """
    What the model and the data of a run let it leave out; every process has to ask, and is told the same.

    Args:
        probe: what the model proves itself by.

    Raises:
        DuetError: something was asked for by name, and cannot be.
    """
    if asked.padding_free == "off":
        return Savings(False, False)
    if reason := _why_padded(trainer, probe, share_prefix=False):
        for name in ("padding_free", "share_prefix"):
            if getattr(asked, name) == "on":
                raise DuetError(f"{name}=on cannot be: {reason}; leave it out, and batches are padded.")
        return Savings(False, False, reason)
    if asked.share_prefix == "off":
        return Savings(True, False)
    reason = _why_padded(trainer, probe, share_prefix=True)
    if asked.share_prefix == "on":
        if reason:
            raise DuetError(f"share_prefix=on cannot be: {reason}; leave it out, and each text has its own.")
        return Savings(True, True)
    shared, why = (False, reason) if reason else _shared_unasked(asked, trainer)
    return Savings(True, shared, why if shared else f"prefixes are not shared: {why}")


def _why_padded(trainer, probe, share_prefix) -> str | None:
    """The reason of the first process that has one."""
    reason = "torch_compile would compile anew for every row of texts"
    if not trainer.args.torch_compile:
        reason = probe(composed(trainer.model), share_prefix)
    return next(filter(None, gather_object([reason])), None)


def _shared_unasked(asked, trainer) -> tuple[bool, str]:
    """Whether prefixes are shared where nobody said so, and what is to be known of it."""
    args, strategy, dataset = trainer.args, trainer.args.train_sampling_strategy, trainer.train_dataset
    if strategy not in ("random", "sequential"):
        return False, f"train_sampling_strategy={strategy} has an order of its own"
    held = _held_by(dataset, trainer.data_collator.encoder, asked.max_tokens_per_batch is not None)
    if held.texts == held.images:
        return False, "each image has one text"
    if asked.max_tokens_per_batch is None:
        images = args.per_device_train_batch_size * held.images / held.texts
    else:
        limits = [asked.max_tokens_per_batch * held.images / held.positions]
        if asked.max_images_per_batch is not None:
            limits.append(asked.max_images_per_batch * held.images / max(held.shown, held.images))
        if isinstance(dataset, StreamedDataset):
            limits.append(dataset.shuffle_buffer * held.images / held.texts)
        images = min(limits)
    images *= args.gradient_accumulation_steps * args.world_size
    if not isinstance(dataset, StreamedDataset):  # a step ends with the epoch
        images = min(images, held.images)
    if images < LEAST_IMAGES:
        return False, (
            f"with {held.texts / held.images:.1f} texts an image a step would hold {images:.1f} images, and steps of "
            f"fewer than {LEAST_IMAGES} would be too much alike; --share_prefix on shares them all the same"
        )
    if images < AMPLE_IMAGES:
        return True, (
            f"a step holds {images:.1f} images, and below {AMPLE_IMAGES} it teaches less than one of as many texts of "
            "different images, if it costs less; --share_prefix off has them apart"
        )
    return True, ""


class _Held(NamedTuple):
    """
    What training data hold, or a sample of them in the shares that are learned from.

    Images are rows, or what rows have for their first image; of positions what texts of one share counts once; `shown`
    are all images. The last two are 0 where nobody asks.
    """

    texts: float
    images: float
    positions: float = 0
    shown: float = 0


def _held_by(dataset: TrainDataset, encoder: Encoder, in_positions: bool) -> _Held:
    if isinstance(dataset, StreamedDataset):
        found = [_sampled(source, encoder, in_positions) for source in sources_of(dataset)]
        shares = [weight / max(1, one.texts) for weight, one in zip(dataset.weights, found)]
        return _Held(*(sum(share * number for share, number in zip(shares, column)) for column in zip(*found)))
    if not in_positions:
        return _Held(len(dataset), len(np.unique(dataset.groups)))
    held = dataset.in_groups()
    positions, shown = (held.lengths - held.shared).sum(), held.new_images.sum()
    return _Held(len(dataset), len(np.unique(held.groups)), positions, shown)


def _sampled(source: StreamedDataset, encoder: Encoder, in_positions: bool) -> _Held:
    """What a source of a stream holds, by its first items."""
    items = [item for item in some_items(source, SURVEYED) if "dropped" not in item]
    if not in_positions:
        return _Held(len(items), len({item["row"] for item in items}))
    items = [item for item in items if not length_is_fetched(item, encoder)]
    units, dropped = units_of(items, encoder, Budget(sys.maxsize), share_prefix=True)
    positions, shown = (sum(getattr(unit, name) for unit in units) for name in ("positions", "images"))
    return _Held(len(items) - len(dropped), len(units), positions, shown)


def plan_batches(asked: EfficiencyArguments, trainer: VLMTrainer) -> PlannedBatches | PlannedStream | None:
    """
    The batches of a run whose size is a number of positions; `None` where it is one of conversations.

    Raises:
        DuetError: a conversation has no room in one, or lengths cannot be known.
    """
    if asked.max_tokens_per_batch is None:
        return None
    dataset, collator = cast(TrainDataset, trainer.train_dataset), cast(VLMDataCollator, trainer.data_collator)
    args = trainer.args
    budget = Budget(
        asked.max_tokens_per_batch, asked.max_images_per_batch, collator.padding_free, collator.pad_to_multiple_of
    )
    if not isinstance(dataset, StreamedDataset):

        def epochs(batches):
            steps = math.ceil(batches / args.world_size / args.gradient_accumulation_steps)
            return math.ceil(args.num_train_epochs if args.max_steps <= 0 else args.max_steps / max(1, steps))

        return PlannedBatches(dataset, budget, collator.share_prefix, order_seed(args), args.world_size, epochs)
    if collator.processor.max_tiles > 1 and any(reading.images.allow_urls for _, reading in dataset.sources):
        raise DuetError(
            "with --max_tiles the length of a sample follows from the sizes of its images, and with --allow_urls these "
            "are known when a batch is made; leave out --max_tokens_per_batch, or fetch the images and name their "
            "folder with --image_dir."
        )
    return PlannedStream(
        dataset, collator.encoder, budget, dataset.shuffle_buffer, collator.share_prefix, order_seed(args)
    )


__all__ = ["Savings", "choose_savings", "plan_batches"]
