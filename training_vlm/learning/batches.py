"""Batches of equal cost, planned ahead from lengths: a limit of positions in place of a number of conversations.

What is special: what is planned is what runs. A position counts when a forward pass computes it, so padding counts
where there is padding, and a prefix that several texts share counts once. The batches follow from seed and epoch alone,
and an epoch has as many as every other, so that the Trainer's arithmetic of steps, and its resuming, stay exact.
"""

import itertools
import math
import os
import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from transformers.utils import logging

from processing.batching.account import number_of
from processing.batching.encoding import Encoded, Encoder, encode_item, image_counts, place
from processing.batching.packing import Text, packed_length
from processing.data_error_vlm import DuetError
from processing.processing_vlm import VLMProcessor


if TYPE_CHECKING:
    from processing.batching.dataset import ConversationDataset, MixedDataset


logger = logging.get_logger(__name__)

_WINDOW = 32  # batches that are filled together
_EPOCHS = 4  # of which the one with the most batches says how many every epoch has
_SHUFFLES = 20  # tries of a later epoch to come out with no more


class Unit(NamedTuple):
    """Conversations that stay together: one, or those that share a prefix."""

    items: tuple[Any, ...]
    positions: int
    images: int


Batch = list[Unit]


@dataclass(frozen=True)
class Budget:
    """
    What one forward pass of one process may run.

    Args:
        tokens: positions, padding among them.
        images: different images; no limit if not given.
        padding_free: the conversations of a batch lie in one row; else a batch is its rows times its longest.
        pad_to_multiple_of: to which the length of a row is rounded up.
    """

    tokens: int
    images: int | None = None
    padding_free: bool = True
    pad_to_multiple_of: int | None = None

    def _rounded(self, positions):
        multiple = self.pad_to_multiple_of or 1
        return -(-positions // multiple) * multiple

    def run(self, batch: Batch) -> int:
        """Positions that a batch runs."""
        if self.padding_free:
            return self._rounded(sum(unit.positions for unit in batch))
        return len(batch) * self._rounded(max((unit.positions for unit in batch), default=0))

    def fits(self, unit: Unit) -> bool:
        """Whether it can be a batch by itself."""
        return self.run([unit]) <= self.tokens and (self.images is None or unit.images <= self.images)

    def check(self, source: str, positions: int, images: int) -> None:
        """
        Refuse a conversation that no batch has room for.

        Raises:
            DuetError: it has more positions or images, with its place and both numbers.
        """
        if (run := self._rounded(positions)) > self.tokens:
            raise DuetError(
                f"{source}the conversation has {number_of(run, 'position')} and max_tokens_per_batch is "
                f"{self.tokens:,}; raise that, or cut longer conversations with --max_length."
            )
        if self.images is not None and images > self.images:
            raise DuetError(
                f"{source}the conversation has {number_of(images, 'image')} and max_images_per_batch is "
                f"{self.images:,}; raise that, or leave such conversations out of the data."
            )

    def fill(self, units: Iterable[Unit]) -> list[Batch]:
        """Batches of units that each fit by themselves: the longest first, each into the first that has room."""
        units = sorted(units, key=lambda unit: -unit.positions)
        free, images = np.zeros(len(units)), np.zeros(len(units))
        batches: list[Batch] = []
        for unit in units:
            # A padded batch begins with its longest, so that what is free of it are rows.
            takes = unit.positions if self.padding_free else 1
            roomy = np.flatnonzero((free[: len(batches)] >= takes) & (images[: len(batches)] >= unit.images))
            at = int(roomy[0]) if len(roomy) else len(batches)
            if at == len(batches):
                batches.append([])
                row = (self.pad_to_multiple_of or 1) if self.padding_free else max(1, self._rounded(unit.positions))
                free[at] = self.tokens // row * (row if self.padding_free else 1)
                images[at] = math.inf if self.images is None else self.images
            batches[at].append(unit)
            free[at] -= takes
            images[at] -= unit.images
        return batches

    def plan(self, units: list[Unit], rng: random.Random) -> list[Batch]:
        """All units in batches, each of which is filled from a part of the shuffled units."""
        batches: list[Batch] = []
        left: Batch = []
        for window in self._windows(rng.sample(units, len(units))):
            filled = self.fill([*left, *window])
            left = filled.pop()
            batches += filled
        batches += [left] if left else []
        rng.shuffle(batches)
        return batches

    def _windows(self, units):
        window, size = [], 0.0
        for unit in units:
            window.append(unit)
            size += max(unit.positions / self.tokens, unit.images / (self.images or math.inf))
            if size >= _WINDOW:
                yield window
                window, size = [], 0.0
        if window:
            yield window


class PlannedBatches(torch.utils.data.Dataset):
    """
    A data set whose items are batches of another's, for a loader that takes one a process.

    Args:
        dataset: encoded ahead, so that lengths are known.
        budget: what a batch may run.
        share_prefix: keep the conversations of an image together, as what they begin with is run once.
        seed: for the order.
        processes: of which an epoch has a whole number of batches each.
        epochs: how many the run has, given the number of batches in one.

    Attributes:
        conversations (`int`): in an epoch.

    Raises:
        DuetError: a conversation is longer than the budget, or has more images.
    """

    def __init__(
        self,
        dataset: "ConversationDataset | MixedDataset",
        budget: Budget,
        share_prefix: bool = False,
        seed: int = 0,
        processes: int = 1,
        epochs: Callable[[int], int] = lambda batches: 1,
    ):
        self.dataset, self.budget, self.share_prefix = dataset, budget, share_prefix
        self.seed, self.processes, self.conversations = seed, processes, len(dataset)
        self._check_all()
        self._epoch = torch.zeros(1, dtype=torch.long).share_memory_()
        self._planned: tuple[int, list[Batch]] = (-1, [])
        self._number = self._most_batches(epochs)

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: int) -> list[Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return [self.dataset[item] for unit in self._plan(int(self._epoch))[index] for item in unit.items]

    def set_epoch(self, epoch: int) -> None:
        """Go on to another epoch, with the data set."""
        self.dataset.set_epoch(epoch)
        self._epoch.fill_(epoch)

    def run(self, index: int) -> int:
        """Positions that a batch of this epoch runs, at most."""
        return self.budget.run(self._plan(int(self._epoch))[index])

    def _check_all(self):
        for source in getattr(self.dataset, "sources", [self.dataset]):
            found = source.in_groups()
            for worst in {int(sizes.argmax()) for sizes in (found.lengths, found.images) if len(sizes)}:
                item = source[int(found.order[worst])]
                self.budget.check(place(item), int(found.lengths[worst]), int(found.images[worst]))

    def _most_batches(self, epochs):
        # How far a run goes must not matter, or one that is resumed to go further would not be the same run. Only of
        # a mix by weight, which shows others in the next epoch, the run's end tells.
        lengths, most, epoch, changes = self.dataset.in_groups().lengths, 0, 0, False
        while epoch < (max(_EPOCHS, min(epochs(most), 100)) if changes else _EPOCHS):
            self.dataset.set_epoch(epoch)
            changes = changes or not np.array_equal(lengths, self.dataset.in_groups().lengths)
            most = max(most, len(self._shuffled(self._units(), epoch, 0)))
            most = -(-most // self.processes) * self.processes
            epoch += 1
        self.dataset.set_epoch(0)
        return most

    def _plan(self, epoch):
        if self._planned[0] != epoch:
            units = self._units()
            tries = (self._shuffled(units, epoch, number) for number in range(_SHUFFLES))
            batches = next((batches for batches in tries if len(batches) <= self._number), None)
            if batches is None:
                batches = self._shuffled(units, epoch, 0)
                left_out = sum(len(unit.items) for batch in batches[self._number :] for unit in batch)
                logger.warning(
                    f"{number_of(left_out, 'conversation')} left out of epoch {epoch}, which would have more batches."
                )
            batches = _in_number(batches[: self._number], self._number)
            self._planned = epoch, self._largest_first(batches)
        return self._planned[1]

    def _shuffled(self, units, epoch, number):
        return self.budget.plan(units, random.Random(f"{self.seed} {epoch} {number}"))

    def _largest_first(self, batches):
        """What takes the most memory comes first, in each process: the most positions, then the most images."""
        for size in (lambda batch: sum(unit.images for unit in batch), self.budget.run):
            order = sorted(range(len(batches)), key=lambda index: -size(batches[index]))
            first = dict.fromkeys(order[: self.processes])
            batches = [batches[index] for index in {**first, **dict.fromkeys(range(len(batches)))}]
        return batches

    def _units(self) -> list[Unit]:
        """The items of the epoch: each by itself, or with those that share a prefix as far as there is room."""
        found = self.dataset.in_groups()
        items = zip(*(column.tolist() for column in found))
        units: list[Unit] = []
        group_before = None
        for item, group, length, shared, images, new_images in items:
            if self.share_prefix and group == group_before:
                before = units[-1]
                unit = Unit((*before.items, item), before.positions + length - shared, before.images + new_images)
                if self.budget.fits(unit):
                    units[-1] = unit
                    continue
            units.append(Unit((item,), length, images))
            group_before = group
        return units


def _in_number(batches: list[Batch], number: int) -> list[Batch]:
    """As many batches of the same conversations: those with the most are divided; one of none is there at worst."""
    batches = list(batches)
    while len(batches) < number:
        largest = max(range(len(batches)), key=lambda index: sum(len(unit.items) for unit in batches[index]), default=0)
        units = batches[largest] if batches else []
        if len(units) == 1:
            ((items, positions, images),) = units
            units = [Unit(part, positions, images) for part in (items[::2], items[1::2]) if part]
        half = len(units) // 2
        batches[largest : largest + 1] = [units[half:]]
        batches.append(units[:half])
    return batches


class PlannedStream(torch.utils.data.IterableDataset):
    """
    A stream of batches of a stream's conversations, which are encoded here, in the worker.

    Args:
        stream: conversations, those of an image one after the other where they share a prefix.
        encoder: how they are encoded.
        budget: what a batch may run.
        buffer: conversations of which batches are filled together.
        share_prefix: keep the conversations of a row together, see `PlannedBatches`.
        seed: for the order of the batches.

    Raises:
        DuetError: when it is met, a conversation that is longer than the budget or has more images.
    """

    conversations = None  # nobody knows

    def __init__(
        self,
        stream: torch.utils.data.IterableDataset,
        encoder: Encoder,
        budget: Budget,
        buffer: int,
        share_prefix: bool = False,
        seed: int = 0,
    ):
        self.stream, self.encoder, self.budget = stream, encoder, budget
        self.buffer, self.share_prefix, self.seed = buffer, share_prefix, seed

    def __iter__(self) -> Iterator[list[Any]]:
        rng = random.Random(f"{self.seed} batches")
        items = iter(self.stream)
        while buffered := list(itertools.islice(items, self.buffer)):
            units, dropped = units_of(buffered, self.encoder, self.budget, self.share_prefix)
            batches = self.budget.fill(units) or [[]]
            largest, *others = [[item for unit in batch for item in unit.items] for batch in batches]
            largest += dropped  # which the collator counts
            rng.shuffle(others)
            yield from (largest, *others)


def units_of(
    items: Iterable[Any], encoder: Encoder, budget: Budget, share_prefix: bool
) -> tuple[list[Unit], list[Any]]:
    """
    Items of a stream, encoded, in units; and those from which nothing can be learned.

    Args:
        share_prefix: keep those of a row that follow each other together, as far as there is room.

    Raises:
        DuetError: one has no room in a batch.
    """
    units: list[Unit] = []
    dropped = []
    for item in items:
        encoded, record = encode_item(item, encoder)
        if encoded is None:
            dropped.append(item)
            continue
        budget.check(place(item), record.tokens, record.images)
        unit = Unit((encoded,), record.tokens, record.images)
        if share_prefix and units and _are_of_one_row(units[-1].items[-1], encoded):
            together = _row_of((*units[-1].items, encoded), encoder.processor)
            if budget.fits(together):
                units[-1] = together
                continue
        units.append(unit)
    return units, dropped


def _row_of(items: Sequence[Encoded], processor: VLMProcessor) -> Unit:
    """Encoded conversations of one row as a unit, what they begin with run once."""
    starts: dict[Hashable, int] = {}
    texts = []
    for item in items:
        counts = image_counts(processor, item) or [processor.image_seq_length] * len(item["images"])
        ids, labels = map(np.array, processor.expand_images(item["input_ids"], item["labels"], counts=counts))
        names = [str(image) if isinstance(image, (str, os.PathLike)) else id(image) for image in item["images"]]
        firsts = [starts.setdefault(name, len(starts) << 32) for name in names]
        features = np.full(len(ids), -1)
        features[ids == processor.image_token_id] = [
            first + place for first, count in zip(firsts, counts) for place in range(count)
        ]
        texts.append(Text(ids, labels, labels, features))
    return Unit(tuple(items), packed_length(texts, share_prefix=True), len(starts))


def _are_of_one_row(one, other):
    return (one.get("source"), one.get("row")) == (other.get("source"), other.get("row"))


__all__ = ["Budget", "PlannedBatches", "PlannedStream", "Unit", "units_of"]
