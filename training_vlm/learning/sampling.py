"""In which order samples are learned: like lengths or texts of an image together, and another order in each epoch."""

import random
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices


if TYPE_CHECKING:
    from processing.batching.collator import VLMDataCollator
    from processing.batching.dataset import ConversationDataset, MixedDataset

    from ..arguments import DataArguments
    from ..data import TrainDataset
    from ..efficiency import EfficiencyArguments
    from .trainer import VLMTrainer


_DATA = "data"  # a digest of them, which says nothing to a reader


def order_seed(args: TrainingArguments) -> int:
    """The seed of the order in which samples are learned: `data_seed`, or `seed` where none is given."""
    return args.seed if args.data_seed is None else args.data_seed


def order_of(trainer: "VLMTrainer", data_args: "DataArguments", efficiency: "EfficiencyArguments") -> dict[str, Any]:
    """
    What the order of a run's data follows from, by name; a process's batch size alone is looked after by the library.

    What has an effect beside another setting only is there with it alone. The data themselves are what the order reads
    of them: their number, their lengths where batches follow from these, and which of them belong together.
    """
    args, dataset = trainer.args, cast("TrainDataset", trainer.train_dataset)
    collator = cast("VLMDataCollator", trainer.data_collator)
    budget, by_length = efficiency.max_tokens_per_batch, args.train_sampling_strategy == "group_by_length"
    streamed = isinstance(dataset, torch.utils.data.IterableDataset)
    found: dict[str, Any] = {
        "streaming": streamed,
        "seed of the data": order_seed(args),
        "train_sampling_strategy": args.train_sampling_strategy,
        "share_prefix": "on" if collator.share_prefix else "off",
        "max_tokens_per_batch": budget,
        "max_images_per_batch": efficiency.max_images_per_batch,
        "split_turns": data_args.split_turns,
        "caption_choice": data_args.caption_choice,
        f"weights of {'streams' if streamed else 'datasets'}": getattr(dataset, "weights", None),
    }
    if budget is None and not (by_length or streamed or collator.share_prefix):  # however they are cut into batches
        a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        found["conversations of a step"] = a_step
    else:
        found["processes"], found["gradient_accumulation_steps"] = args.world_size, args.gradient_accumulation_steps
    if budget is not None:
        found["padding_free"] = "on" if collator.padding_free else "off"
        found["pad_to_multiple_of"] = data_args.pad_to_multiple_of
        if found.get("weights of datasets") is not None:  # how far the run goes has a say in it
            found["batches of an epoch"] = len(cast(Sized, trainer.planned))
    if budget is not None or by_length:
        found["max_length"], found["truncation"] = collator.encoder.max_length, data_args.truncation
    if isinstance(dataset, torch.utils.data.IterableDataset):
        found["shuffle_buffer"], found["dataloader_num_workers"] = data_args.shuffle_buffer, args.dataloader_num_workers
    else:
        found["conversations"] = len(dataset)
        read: Sequence[Any] = ()
        if budget is not None:
            read = dataset.in_groups()
        elif by_length or collator.share_prefix:
            read = [dataset.lengths if by_length else dataset.groups]
        found[_DATA] = zlib.crc32(b"".join(np.asarray(column, dtype=np.int64).tobytes() for column in read))
    return found


def change_of_order(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What a run that goes on with another order than it had should be told, in a line; empty if it has the same."""
    changed = [name for name in now if name in before and before[name] != now[name]]
    if not changed:
        return ""
    named = [name for name in changed if name != _DATA]
    told = ", ".join(f"{name}={_shown(now[name])} (it had {_shown(before[name])})" for name in named)
    if not named:
        told = "other data than it had, as many as those but not of the same lengths or images"
    return (
        f"the run goes on with {told}: the data come in another order from here on, and of the epoch that it was in "
        "some may come twice and some not at all"
    )


def _shown(value):
    return "none" if value is None else value


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

    def __init__(self, dataset: "ConversationDataset | MixedDataset", batch_size: int, seed: int = 0):
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


class GroupedOrder(LengthGroupedOrder):
    """
    Every item once an epoch, those of a group in one batch: whole groups fill it by first fit, in a shuffled order, and
    one is divided only where none that is left has room.

    See `LengthGroupedOrder`; of the data set `groups` are read, for each item a number that those of its group share.
    """

    def __iter__(self) -> Iterator[int]:
        return iter(whole_groups(self.dataset.groups, self.batch_size, random.Random(f"{self.seed} {self.epoch}")))


def whole_groups(groups: Iterable[int], batch_size: int, rng: random.Random) -> list[int]:
    """
    An order of items, of which each `batch_size` from the first are a batch.

    Args:
        groups: for each item the group that it belongs to.
    """
    members: dict[int, list[int]] = {}
    for item, group in enumerate(groups):
        members.setdefault(group, []).append(item)
    waiting: dict[int, deque[tuple[int, list[int]]]] = {}  # by size, each in the shuffled order
    for rank, items in enumerate(rng.sample(list(members.values()), len(members))):
        waiting.setdefault(len(items), deque()).append((rank, items))
    order: list[int] = []
    while waiting:
        room = batch_size - len(order) % batch_size
        fitting = [size for size in waiting if size <= room or room == batch_size]
        size = min(fitting or waiting, key=lambda size: waiting[size][0][0])
        rank, items = waiting[size].popleft()
        if not waiting[size]:
            del waiting[size]
        order += items[:room]
        if left := items[room:]:  # the next batch begins with them, as none has waited longer
            waiting.setdefault(len(left), deque()).appendleft((rank, left))
    return order


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
