"""In which order samples are learned: those of like lengths together, and other ones in each epoch."""

import random
from collections.abc import Iterator

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from processing.batching.dataset import ConversationDataset, MixedDataset


def order_seed(args: TrainingArguments) -> int:
    """The seed of the order in which samples are learned: `data_seed`, or `seed` where none is given."""
    return args.seed if args.data_seed is None else args.data_seed


class LengthGroupedOrder(torch.utils.data.Sampler):
    """
    Every item once an epoch, those of like lengths beside each other.

    The order depends on seed and epoch alone: all processes have the same one, and a resumed run goes on with it. The
    lengths are read for each epoch, as a weighted mix shows other items in the next.

    Args:
        dataset: has `lengths`, the positions of every item, and `set_epoch` where they change.
        batch_size: items that should be of like lengths.
        seed: for the order.
    """

    def __init__(self, dataset: ConversationDataset | MixedDataset, batch_size: int, seed: int = 0):
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        drawn = random.Random(f"{self.seed} {self.epoch}").getrandbits(63)
        generator = torch.Generator().manual_seed(drawn)
        return iter(get_length_grouped_indices(self.dataset.lengths, self.batch_size, generator=generator))

    def set_epoch(self, epoch: int) -> None:
        """Go on to another epoch, with the data set."""
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


class EpochOfData(TrainerCallback):
    """
    Tells data set and sampler which epoch it is, in every process.

    accelerate's loader tells the sampler only, and not even that where a run of several processes resumes: there the
    sampler lies behind more layers than it looks through.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        batches = getattr(train_dataloader, "batch_sampler", None)
        while hasattr(batches, "batch_sampler"):
            batches = batches.batch_sampler
        for part in (getattr(train_dataloader, "dataset", None), getattr(batches, "sampler", None)):
            if hasattr(part, "set_epoch"):
                part.set_epoch(int(state.epoch or 0))
