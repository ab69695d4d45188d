"""Which savings a run makes."""

import functools
import math

from transformers import TrainingArguments

from processing import VLMDataCollator
from processing.batching.dataset import StreamedDataset
from processing.data_error_vlm import DuetError

from ..data import TrainDataset
from ..efficiency import EfficiencyArguments
from .batches import Budget, PlannedBatches, PlannedStream, measured
from .sampling import order_seed


def plan_batches(
    asked: EfficiencyArguments, dataset: TrainDataset, collator: VLMDataCollator, args: TrainingArguments
) -> PlannedBatches | PlannedStream | None:
    """
    The batches of a run whose size is a number of positions; `None` where it is one of conversations.

    Raises:
        DuetError: a conversation has no room in one, or lengths cannot be known.
    """
    if asked.max_tokens_per_batch is None:
        return None
    budget = Budget(
        asked.max_tokens_per_batch, asked.max_images_per_batch, collator.padding_free, collator.pad_to_multiple_of
    )
    measure = functools.partial(measured, collator.processor) if collator.share_prefix else None
    if not isinstance(dataset, StreamedDataset):

        def epochs(batches):
            steps = math.ceil(batches / args.world_size / args.gradient_accumulation_steps)
            return math.ceil(args.num_train_epochs if args.max_steps <= 0 else args.max_steps / max(1, steps))

        return PlannedBatches(dataset, budget, order_seed(args), args.world_size, epochs, measure)
    if collator.processor.max_tiles > 1 and any(reading.images.allow_urls for _, reading in dataset.sources):
        raise DuetError(
            "with --max_tiles the length of a sample follows from the sizes of its images, and with --allow_urls these "
            "are known when a batch is made; leave out --max_tokens_per_batch, or fetch the images and name their "
            "folder with --image_dir."
        )
    return PlannedStream(dataset, collator.encoder, budget, dataset.shuffle_buffer, order_seed(args), measure)


__all__ = ["plan_batches"]
