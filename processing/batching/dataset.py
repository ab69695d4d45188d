"""Conversations for the Trainer: of one source or of several, encoded ahead, read when asked for, or streamed.

What is special: nothing is decoded here, so that what a data set says of itself (lengths, counts) never costs an image.
A row that cannot be read is an item like any other, with the reason in place of its messages: the collator drops and
counts it where it counts everything else. Items that are not encoded are encoded by the collator, in its worker.
"""

import functools
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any, cast

import datasets
import numpy as np
import pyarrow.compute as pc
import torch

from ..image_files_vlm import NamedImage
from ..reading.conversations import ODD, ROW, Conversation, Dropped, caption_column, caption_count
from ..reading.items import Reading
from .account import Account
from .encode_ahead import encode_rows, without_image_bytes
from .encoding import KEPT, Encoded, Encoder
from .groups import Grouped, ImageTokens, group_numbers, grouped


SHUFFLE_BUFFER = 1_000


class ConversationDataset(torch.utils.data.Dataset):
    """
    The conversations of one source, with random access.

    With `caption_choice="random"` an item is an image, and which of its captions it shows depends on seed, epoch and
    index alone, so that a resumed run sees what an uninterrupted one does.

    Args:
        rows: the rows of a source.
        reading: how a row is read.
        seed: for `caption_choice="random"`.

    Attributes:
        account (`Account`): the samples that `encode_ahead` kept and dropped; empty before.
        encodings (`datasets.Dataset`): what it encoded, `None` before.
    """

    def __init__(self, rows: datasets.Dataset, reading: Reading, seed: int = 0):
        self.rows = rows
        self.reading = reading
        self.seed = seed
        self.account = Account()
        self.encodings: datasets.Dataset | None = None
        # In memory that all processes see, so that workers which outlive an epoch see the next.
        self._epoch = torch.zeros(1, dtype=torch.long).share_memory_()
        self._ends = None if self._is_random else _conversation_ends(rows, reading)
        self._drawn: list[list[int]] | None = None  # of each image the encodings of its captions
        self._image: ImageTokens | None = None
        self._grouped: Grouped | None = None

    @property
    def is_encoded(self) -> bool:
        """Whether `encode_ahead` was called, so that `account` and `lengths` are known."""
        return self.encodings is not None

    @property
    def _is_random(self):
        return self.reading.draws(self.rows.column_names)

    def __len__(self):
        if self._drawn is not None:
            return len(self._drawn)
        if self.encodings is not None:
            return len(self.encodings)
        return len(self.rows) if self._ends is None else int(self._ends[-1])

    def __getitem__(self, index: int) -> Conversation | Dropped | Encoded:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self.encodings is None:
            row, number = self._place(index)
            items = self.reading.items(self.rows[row], row)
            return self._choice(index)(items) if self._is_random else items[number]
        item = self._encoding(index)
        number, references = item.pop("number"), item.pop("references")
        if None in references:
            position = item["position"]
            references = self.reading.items(self.rows[position], position)[number]["images"]
        else:
            references = [NamedImage(reference, self.reading.images) for reference in references]
        item = {name: value for name, value in item.items() if value is not None or name not in KEPT}
        return cast(Encoded, {**item, "images": references, "source": self.reading.source})

    def conversation(self, index: int) -> Conversation | Dropped | Encoded:
        """An item as it was before it was encoded."""
        if self.encodings is None:
            return self[index]
        item = self._encoding(index)
        return self.reading.items(self.rows[item["position"]], item["position"])[item["number"]]

    def _encoding(self, index):
        assert self.encodings is not None
        return self.encodings[index if self._drawn is None else self._choice(index)(self._drawn[index])]

    def _choice(self, index):
        return random.Random(f"{self.seed} {int(self._epoch)} {index}").choice

    def _place(self, index):
        """The row of an item, and the item's number in it."""
        if self._ends is None:
            return index, 0
        row = int(np.searchsorted(self._ends, index, side="right"))
        return row, index - (int(self._ends[row - 1]) if row else 0)

    @property
    def lengths(self) -> list[int]:
        """Positions of every item, for batches of like lengths; the first caption's where an image has several."""
        assert self.encodings is not None
        lengths = self.encodings["length"][:]
        return lengths if self._drawn is None else [lengths[drawn[0]] for drawn in self._drawn]

    @property
    def groups(self) -> np.ndarray:
        """For every item a number that items of one row share; of one image, where they are encoded and it is named."""
        if self.encodings is not None:
            return group_numbers(self._first_drawn)
        return np.arange(len(self)) if self._ends is None else np.repeat(*_rows_and_counts(self._ends))

    def in_groups(self) -> Grouped:
        """The items with what they share, where they are encoded; the longest of captions that are drawn from."""
        assert self.encodings is not None and self._image is not None
        if self._grouped is None:
            self._grouped = grouped(self._first_drawn, self._image)
            if self._drawn is not None:
                lengths = np.array(self.encodings["length"][:], dtype=np.int64)
                longest = np.array([lengths[drawn].max() for drawn in self._drawn], dtype=np.int64)
                self._grouped = self._grouped._replace(lengths=longest[self._grouped.order])
        return self._grouped

    def __getstate__(self):
        return {**self.__dict__, "_grouped": None}  # no worker needs it

    @property
    def _first_drawn(self):
        assert self.encodings is not None
        return self.encodings if self._drawn is None else self.encodings.select([drawn[0] for drawn in self._drawn])

    def set_epoch(self, epoch: int):
        """Choose captions anew (`caption_choice="random"`)."""
        self._epoch.fill_(epoch)

    def encode_ahead(self, encoder: Encoder, on_bad_sample: str = "skip") -> None:
        """
        Encode every conversation now, without decoding an image; see `encode_rows`.

        Args:
            on_bad_sample: `"error"` raises for the first row that cannot be read, `"skip"` drops and counts it.
        """
        encodings, self.account = encode_rows(self.rows, self.reading, encoder, on_bad_sample)
        self.encodings = encodings
        processor = encoder.processor
        self._image = ImageTokens(processor.image_token_id, processor.tile_tokens(1, 1), processor.max_tiles > 1)
        if self._is_random:
            drawn: dict[int, list[int]] = {}
            for index, position in enumerate(encodings["position"]):
                drawn.setdefault(position, []).append(index)
            self._drawn = list(drawn.values())


def _rows_and_counts(ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(len(ends)), np.diff(ends, prepend=0)


def _conversation_ends(rows: datasets.Dataset, reading: Reading) -> np.ndarray | None:
    """For each row the number of conversations up to its end; `None` where every row holds one."""
    if reading.split_turns != "none":  # only the messages say
        shown, found = rows.with_format("arrow"), []
        for start, table in zip(itertools.count(0, 1_000), shown.iter(1_000)):
            columns = without_image_bytes(table, rows.features)
            cells = [dict(zip(columns, values)) for values in zip(*columns.values())]
            found += [len(reading.items(row, start + offset)) for offset, row in enumerate(cells)]
        return np.cumsum(np.array(found, dtype=np.int64))
    if reading.caption_choice == "first":
        return None
    counts = _caption_counts(rows, caption_column(rows.column_names, reading.columns))
    if ODD in rows.column_names:
        counts = np.ones(len(rows)) if counts is None else counts
        for row, odd in enumerate(rows.select_columns([ODD]).with_format(None)[ODD]):
            if isinstance(odd, dict):
                counts[row] = len(reading.items(odd, row))
    # An empty list is one item, which says so.
    return None if counts is None else np.cumsum(np.maximum(counts, 1).astype(np.int64))


def _caption_counts(rows: datasets.Dataset, column: str | None) -> np.ndarray | None:
    if column is None:
        return None
    table = rows.select_columns([column]).with_format("arrow")
    feature = rows.features[column]
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        counts = [pc.list_value_length(batch[column]).to_numpy() for batch in table.iter(100_000)]
        return np.nan_to_num(np.concatenate(counts).astype(float))
    if isinstance(feature, datasets.Json) or _has_written_lists(table, column):
        cells = (batch[column] for batch in rows.select_columns([column]).with_format(None).iter(10_000))
        return np.array([caption_count(cell) for batch in cells for cell in batch])
    return None


def _has_written_lists(table: datasets.Dataset, column: str) -> bool:
    if table.features[column] not in (datasets.Value("string"), datasets.Value("large_string")):
        return False
    begins = (pc.match_substring_regex(batch[column], r"^\s*\[") for batch in table.iter(100_000))
    return any(pc.any(begin).as_py() for begin in begins)


class MixedDataset(torch.utils.data.Dataset):
    """
    Several data sets as one.

    Without weights it holds each item of each once. With weights an epoch has as many items as all together, of which
    a data set gives its weight's share: a small one is repeated, each time in another order, and of a large one the
    next epoch shows the rest, which this one left out.

    Args:
        sources: the data sets.
        weights: one for each, or `None`.
        seed: for the orders.
    """

    def __init__(self, sources: list[ConversationDataset], weights: list[float] | None = None, seed: int = 0):
        self.sources, self.seed = sources, seed
        self.weights = weights
        self._epoch = torch.zeros(1, dtype=torch.long).share_memory_()
        total = sum(map(len, sources))
        if weights is None:
            shares = np.array([len(source) for source in sources], dtype=float)
        else:
            shares = total * np.array(weights, dtype=float) / sum(weights)
        self._ends = np.round(np.cumsum(shares)).astype(np.int64)
        # One order a source is kept: a new one is made when a source begins anew.
        self._order = functools.lru_cache(2 * len(sources))(self._make_order)

    def __getstate__(self):
        return {**self.__dict__, "_order": None}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._order = functools.lru_cache(2 * len(self.sources))(self._make_order)

    def _make_order(self, source, cycle):
        return np.random.default_rng([self.seed, source, cycle]).permutation(len(self.sources[source]))

    def __len__(self):
        return int(self._ends[-1])

    def _numbers(self, source: int, first: int = 0, end: int | None = None) -> np.ndarray:
        """Which items of a source this epoch shows, in the order of the mix, or some of them."""
        return np.concatenate(self._rounds(source, first, end))

    def _rounds(self, source: int, first: int = 0, end: int | None = None) -> list[np.ndarray]:
        """The same, divided where the source begins anew."""
        start, size = self._start(source), len(self.sources[source])
        numbers = np.arange(first, self._ends[source] - start if end is None else end)
        if self.weights is None or not size:
            return [numbers]
        rounds, places = np.divmod(numbers + int(self._epoch) * int(self._ends[source] - start), size)
        found = [self._order(source, int(number))[places[rounds == number]] for number in np.unique(rounds)]
        return found or [numbers]

    def _start(self, source):
        return int(self._ends[source - 1]) if source else 0

    def __getitem__(self, index: int) -> Conversation | Dropped | Encoded:
        if not 0 <= index < len(self):
            raise IndexError(index)
        source = int(np.searchsorted(self._ends, index, side="right"))
        place = index - self._start(source)
        return self.sources[source][int(self._numbers(source, place, place + 1)[0])]

    @property
    def is_encoded(self) -> bool:
        """Whether all sources are encoded."""
        return all(source.is_encoded for source in self.sources)

    @property
    def lengths(self) -> list[int]:
        """Positions of every item of this epoch, where all sources are encoded."""
        lengths = (np.array(source.lengths, dtype=np.int64) for source in self.sources)
        return [length for n, of in enumerate(lengths) for length in of[self._numbers(n)].tolist()]

    @property
    def groups(self) -> np.ndarray:
        """For every item of this epoch a number; see `ConversationDataset`. An item that comes again is of another."""
        groups = [source.groups for source in self.sources]
        return np.concatenate([groups[source][numbers] + first for source, numbers, _, first in self._parts()])

    def in_groups(self) -> Grouped:
        """The items of this epoch with what they share; see `ConversationDataset`."""
        parts = []
        for source, numbers, place, first in self._parts():
            found = self.sources[source].in_groups().chosen(numbers, place + np.arange(len(numbers)))
            parts.append(found._replace(groups=found.groups + first))
        return Grouped(*map(np.concatenate, zip(*parts)))

    def _parts(self) -> Iterator[tuple[int, np.ndarray, int, int]]:
        """Each round of each source: its items, the place of the first in the mix, and where its groups begin."""
        place = first = 0
        for source, data in enumerate(self.sources):
            for numbers in self._rounds(source):
                yield source, numbers, place, first
                place, first = place + len(numbers), first + len(data.rows)  # whose positions groups are

    @property
    def account(self) -> Account:
        """The sources' accounts together; see `ConversationDataset`."""
        account = Account()
        for source in self.sources:
            account.merge(source.account)
        return account

    def set_epoch(self, epoch: int):
        """Go on to another epoch, of every source as well."""
        self._epoch.fill_(epoch)
        for source in self.sources:
            source.set_epoch(epoch)


class StreamedDataset(torch.utils.data.IterableDataset):
    """
    Conversations of sources that are read from their beginning, without end: each begins anew when it is read through.

    Worker processes share the sources by their files, so none gives an item that another gives. Processes of a
    distributed run each read all and take their part of every batch, as accelerate does with any such data set. The
    items of a source are shuffled within a buffer, and none comes again before all have come.

    Attributes:
        keeps_rows (`bool`): whether the items of a row come one after the other, which are then shuffled as one.

    Args:
        sources: rows and how they are read, for each source.
        weights: each source's share of the items; equal shares if not given.
        seed: for the order, and for `caption_choice="random"`.
        shuffle_buffer: items among which the next is drawn; 1 keeps the order.
    """

    def __init__(
        self,
        sources: Sequence[tuple[datasets.IterableDataset, Reading]],
        weights: list[float] | None = None,
        seed: int = 0,
        shuffle_buffer: int = SHUFFLE_BUFFER,
    ):
        self.sources = sources
        self.weights = [1.0] * len(sources) if weights is None else list(weights)
        self.seed, self.shuffle_buffer = seed, shuffle_buffer
        self.keeps_rows = False

    @property
    def num_shards(self) -> int:
        """As many workers as this can share the reading."""
        return min(rows.num_shards for rows, _ in self.sources)

    def once(self) -> Iterator[Conversation | Dropped]:
        """Every item of each source once, in the order of its rows: no epoch, but a look at what there is."""
        rng = random.Random(self.seed)
        for rows, reading in self.sources:
            for items in self._once(rows, reading, None, rng):
                yield from items

    def __iter__(self) -> Iterator[Conversation | Dropped]:
        worker = torch.utils.data.get_worker_info()
        number = worker.id if worker is not None and worker.num_workers > 1 else None
        rng = random.Random(f"{self.seed} {number}")
        streams, weights = [self._endless(*source, number, rng) for source in self.sources], list(self.weights)
        ahead = [0] * len(streams)  # items that a source has given with others of their row, before its turn
        while streams:
            chosen = rng.choices(range(len(streams)), weights)[0]
            if ahead[chosen]:
                ahead[chosen] -= 1
                continue
            items = next(streams[chosen], None)
            if items is None:  # this worker has no file of this source
                del streams[chosen], weights[chosen], ahead[chosen]
            else:
                ahead[chosen] = len(items) - 1
                yield from items

    def _endless(self, rows, reading, worker, rng):
        found = True
        while found:
            found = False
            for items in _shuffled(self._once(rows, reading, worker, rng), self.shuffle_buffer, rng):
                found = True
                yield items

    def _once(self, rows, reading, worker, rng):
        for index, row in enumerate(rows):
            index = row.pop(ROW, index)
            items = reading.items(row, index if worker is None else f"{index} of worker {worker}")
            if reading.draws(row):
                yield [rng.choice(items)]
            else:
                yield from [items] if self.keeps_rows else ([item] for item in items)


def _shuffled(items: Iterator[Any], size: int, rng: random.Random) -> Iterator[Any]:
    """Every item once, each drawn from the next `size`."""
    buffer: list[Any] = []
    for item in items:
        buffer.append(item)
        if len(buffer) >= size:
            place = rng.randrange(len(buffer))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            yield buffer.pop()
    rng.shuffle(buffer)
    yield from buffer
