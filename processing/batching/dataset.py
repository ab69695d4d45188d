"""Conversations for the Trainer: of one source or of several, encoded ahead, read when asked for, or streamed.

What is special: nothing is decoded here, so that what a data set says of itself (lengths, counts) never costs an image.
A row that cannot be read is an item like any other, with the reason in place of its messages: the collator drops and
counts it where it counts everything else. Items that are not encoded are encoded by the collator, in its worker.
"""

import dataclasses
import functools
import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets.fingerprint import Hasher

from ..data_error_vlm import DuetError
from ..processing_vlm import VLMProcessor
from ..reading.conversations import ROW, MalformedRow, caption_column, conversations_from_row
from .account import BAD_SAMPLE_REASONS, Account, Record
from .encoding import IGNORE, Encode, SampleDropped


SHUFFLE_BUFFER = 1_000


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the rows of a source are read; the fields are those of `conversations_from_row`."""

    source: str = ""
    prompt: str = ""
    caption_choice: str = "all"
    columns: dict[str, str] | None = None
    image_dir: str | None = None
    allow_urls: bool = False

    def conversations(self, row: dict[str, Any], index: int) -> list[dict[str, Any]]:
        """The conversations of a row, named by the number that its source gave it; see `conversations_from_row`."""
        return conversations_from_row(row, index=row.get(ROW, index), **dataclasses.asdict(self))

    def items(self, row: dict[str, Any], index: int) -> list[dict[str, Any]]:
        """The same; of a row that cannot be read as many items with the reason as it would have given."""
        try:
            return self.conversations(row, index)
        except MalformedRow as error:
            column = caption_column(row, self.columns) if self.caption_choice == "all" else None
            captions = row.get(column)
            count = max(1, len(captions)) if isinstance(captions, list) else 1
            row_number = row.get(ROW, index)
            return [{"source": self.source, "row": row_number, "dropped": ("malformed row", str(error))}] * count


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
        self.encodings = None
        # In memory that all processes see, so that workers which outlive an epoch see the next.
        self._epoch = torch.zeros(1, dtype=torch.long).share_memory_()
        self._ends = None if self._is_random else _conversation_ends(rows, reading)
        self._groups: list[list[int]] | None = None

    @property
    def is_encoded(self) -> bool:
        """Whether `encode_ahead` was called, so that `account` and `lengths` are known."""
        return self.encodings is not None

    @property
    def _is_random(self):
        return self.reading.caption_choice == "random"

    def __len__(self):
        if self._groups is not None:
            return len(self._groups)
        if self.encodings is not None:
            return len(self.encodings)
        return len(self.rows) if self._ends is None else int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        choice = random.Random(f"{self.seed} {int(self._epoch)} {index}").choice
        if self.encodings is None:
            row, number = self._place(index)
            items = self.reading.items(self.rows[row], row)
            return choice(items) if self._is_random else items[number]
        item = self.encodings[index if self._groups is None else choice(self._groups[index])]
        number, references = item.pop("number"), item.pop("references")
        if None in references:
            position = item["position"]
            references = self.reading.conversations(self.rows[position], position)[number]["images"]
        return {**item, "images": references, "source": self.reading.source}

    def _place(self, index):
        """The row of an item, and the item's number in it."""
        if self._ends is None:
            return index, 0
        row = int(np.searchsorted(self._ends, index, side="right"))
        return row, index - (int(self._ends[row - 1]) if row else 0)

    @property
    def lengths(self) -> list[int]:
        """Positions of every item, for batches of like lengths; of an image with several captions the first's."""
        lengths = self.encodings["length"][:]
        return lengths if self._groups is None else [lengths[group[0]] for group in self._groups]

    def set_epoch(self, epoch: int):
        """Choose captions anew (`caption_choice="random"`)."""
        self._epoch.fill_(epoch)

    def encode_ahead(
        self, processor: VLMProcessor, encode: Encode, max_length: int | None = None, on_bad_sample: str = "skip"
    ) -> None:
        """
        Encode every conversation now, in several processes where there are many, without decoding an image.

        The library caches the result beside the data set's own cache. Where images are tiled, their headers are read
        for their sizes (and those that are URLs are fetched).

        Args:
            encode: `encode_caption` or `encode_dialogue`.
            on_bad_sample: `"error"` raises for the first row that cannot be read, `"skip"` drops and counts it.
        """
        source, tiled = self.reading.source, processor.max_tiles > 1
        rows = self.rows if tiled else self.rows.with_format("arrow")  # stored images stay where they are not asked for
        encoder = _RowEncoder(processor, encode, max_length, self.reading, on_bad_sample, rows.features)
        workers = min(_cores(), len(rows) // 10_000)
        encodings = rows.map(
            encoder,
            with_indices=True,
            batched=True,
            batch_size=100 if tiled else 1_000,  # rows whose images are in memory at once
            remove_columns=rows.column_names,
            features=_COLUMNS,
            num_proc=workers if workers > 1 else None,
            desc=f"Encoding {source}",
        ).with_format(None)
        fields = Record._fields[1:]
        for batch in encodings.select_columns([*fields]).iter(10_000):
            self.account.add(Record(source, *values) for values in zip(*(batch[name] for name in fields)))
        if self.account.named:
            encodings = encodings.filter(_is_kept, input_columns=["dropped"], desc="Dropping")
        self.encodings = encodings.select_columns(
            ["input_ids", "labels", "weights", "length", "cut", "row", "position", "number", "references"]
        )
        if self._is_random:
            groups: dict[int, list[int]] = {}
            for index, position in enumerate(self.encodings["position"]):
                groups.setdefault(position, []).append(index)
            self._groups = list(groups.values())


def encode_item(
    item: dict[str, Any], processor: VLMProcessor, encode: Encode, max_length: int | None = None
) -> tuple[dict[str, Any] | None, Record]:
    """An item of a data set, encoded (or `None`, where it is dropped), and the record of what became of it."""
    source, row = item.get("source") or "", item.get("row")
    if "dropped" in item:
        return None, Record(source, row, *item["dropped"])
    images = item.get("images") or []
    if "input_ids" not in item:
        try:
            item = encode(processor, item, max_length)
        except SampleDropped as error:
            return None, Record(source, row, error.reason, error.detail)
    ids, labels = item["input_ids"], item["labels"]
    shown = ids.count(processor.image_token_id)
    if shown != len(images):
        raise DuetError(
            f"a conversation with {shown} image parts and {len(images)} images was found; expected one image for "
            "each part, in the order of the parts."
        )
    length = item["length"] if "length" in item else len(ids) + shown * (processor.image_seq_length - 1)
    record = Record(
        source,
        row,
        cut=item.get("cut"),
        images=shown,
        tokens=length,
        image_tokens=length - len(ids) + shown,
        supervised=sum(label != IGNORE for label in labels[1:]),
    )
    return {**item, "images": images}, record


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_kept(reason):
    return reason is None


# Declared, because a first batch without a drop, or of nothing else, would let `datasets` infer null columns.
_COLUMNS = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
        "weights": datasets.List(datasets.Value("float32")),
        "length": datasets.Value("int64"),
        "row": datasets.Value("int64"),
        "position": datasets.Value("int64"),
        "number": datasets.Value("int64"),
        "references": datasets.List(datasets.Value("string")),
        "dropped": datasets.Value("string"),
        "detail": datasets.Value("string"),
        "cut": datasets.Value("string"),
        "images": datasets.Value("int64"),
        "tokens": datasets.Value("int64"),
        "image_tokens": datasets.Value("int64"),
        "supervised": datasets.Value("int64"),
    }
)


# All that could change what a row becomes.
_CODE = Hasher.hash([file.read_text(encoding="utf-8") for file in sorted(Path(__file__).parents[1].rglob("*.py"))])


class _RowEncoder:
    """A batch of rows, as columns or as an Arrow table -> columns of encodings, for `datasets.map`."""

    def __init__(self, processor, encode, max_length, reading, on_bad_sample, features):
        self.processor, self.encode, self.max_length = processor, encode, max_length
        self.reading, self.on_bad_sample, self.features = reading, on_bad_sample, features
        # `datasets` finds its cache by what is in here: another version of the code that labels is another cache.
        self.code = _CODE

    def __call__(self, batch, indices):
        columns = without_image_bytes(batch, self.features) if isinstance(batch, pa.Table) else dict(batch)
        encoded = []
        for offset, position in enumerate(indices):
            row = {name: values[offset] for name, values in columns.items()}
            for number, item in enumerate(self.reading.items(row, position)):
                encoding, record = encode_item(item, self.processor, self.encode, self.max_length)
                if self.on_bad_sample == "error" and record.dropped in BAD_SAMPLE_REASONS:
                    raise DuetError(record.detail)
                if encoding is None:
                    encoding = {"input_ids": [], "labels": [], "weights": [], "length": 0, "images": []}
                references = [image if isinstance(image, str) else None for image in encoding["images"]]
                places = {"position": position, "number": number, "references": references}
                encoded.append({**encoding, **record._asdict(), **places})
        return {name: [item[name] for item in encoded] for name in _COLUMNS}


def without_image_bytes(table: pa.Table, features: datasets.Features) -> dict[str, list[Any]]:
    """The columns of a table in Python, stored images as `{"bytes": b"stored", "path"}`, whatever size they have."""
    images = {name for name, feature in features.items() if _holds_images(feature)}
    others = datasets.Features({name: feature for name, feature in features.items() if name not in images})
    columns = {}
    if others:
        rest = datasets.table.InMemoryTable(table.select(list(others)))
        columns = datasets.Dataset(rest, info=datasets.DatasetInfo(features=others))[:]
    for name in images:
        columns[name] = []
        for chunk in table[name].chunks:  # one by one: put together they may be too many bytes for one array
            if isinstance(features[name], datasets.Image):
                columns[name] += _light_images(chunk)
            else:
                light, lengths = iter(_light_images(chunk.flatten())), pc.list_value_length(chunk).to_pylist()
                columns[name] += [None if n is None else list(itertools.islice(light, n)) for n in lengths]
    return {name: columns[name] for name in features}


def _holds_images(feature):
    return isinstance(getattr(feature, "feature", feature), datasets.Image)


def _light_images(images: pa.StructArray) -> list[dict[str, Any] | None]:
    stored = pc.is_valid(images.field("bytes")).to_pylist()
    paths, there = images.field("path").to_pylist(), images.is_valid().to_pylist()
    return [
        {"bytes": b"stored" if has_bytes else None, "path": path} if valid else None
        for has_bytes, path, valid in zip(stored, paths, there)
    ]


def _conversation_ends(rows: datasets.Dataset, reading: Reading) -> np.ndarray | None:
    """For each row the number of conversations up to its end; `None` where every row holds one."""
    column = caption_column(rows.column_names, reading.columns)
    if column is None or reading.caption_choice == "first":
        return None
    table = rows.select_columns([column]).with_format("arrow")
    feature = rows.features[column]
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        counts = [pc.list_value_length(batch[column]).to_numpy() for batch in table.iter(100_000)]
        counts = np.nan_to_num(np.concatenate(counts).astype(float))
    elif isinstance(feature, datasets.Json):
        values = (batch[column] for batch in rows.select_columns([column]).with_format(None).iter(10_000))
        counts = np.array([len(v) if isinstance(v, list) else 1 for batch in values for v in batch])
    else:
        return None
    # An empty list is one item, which says so.
    return np.cumsum(np.maximum(counts, 1).astype(np.int64))


class MixedDataset(torch.utils.data.Dataset):
    """
    Several data sets as one.

    Without weights it holds each item of each once. With weights an epoch has as many items as all together, of which
    a data set gives its weight's share: a small one is repeated, each time in another order, and of a large one the
    next epoch shows the part that this one left out.

    Args:
        parts: the data sets.
        weights: one for each, or `None`.
        seed: for the orders.
    """

    def __init__(self, parts: list[ConversationDataset], weights: list[float] | None = None, seed: int = 0):
        self.parts, self.seed = parts, seed
        self.weights = weights
        self._epoch = torch.zeros(1, dtype=torch.long).share_memory_()
        total = sum(map(len, parts))
        if weights is None:
            shares = np.array([len(part) for part in parts], dtype=float)
        else:
            shares = total * np.array(weights, dtype=float) / sum(weights)
        self._ends = np.round(np.cumsum(shares)).astype(np.int64)
        # One order a part is kept: a new one is made when a part begins anew.
        self._order = functools.lru_cache(2 * len(parts))(self._make_order)

    def __getstate__(self):
        return {**self.__dict__, "_order": None}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._order = functools.lru_cache(2 * len(self.parts))(self._make_order)

    def _make_order(self, part, cycle):
        return np.random.default_rng([self.seed, part, cycle]).permutation(len(self.parts[part]))

    def __len__(self):
        return int(self._ends[-1])

    def _place(self, index):
        part = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[part - 1]) if part else 0
        number = index - start
        if self.weights is not None:
            cycle, position = divmod(int(self._epoch) * int(self._ends[part] - start) + number, len(self.parts[part]))
            number = int(self._order(part, cycle)[position])
        return part, number

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part, number = self._place(index)
        return self.parts[part][number]

    @property
    def is_encoded(self) -> bool:
        """Whether all parts are encoded."""
        return all(part.is_encoded for part in self.parts)

    @property
    def lengths(self) -> list[int]:
        """Positions of every item of this epoch, where all parts are encoded."""
        lengths = [part.lengths for part in self.parts]
        return [lengths[part][number] for part, number in map(self._place, range(len(self)))]

    @property
    def account(self) -> Account:
        """The parts' accounts together; see `ConversationDataset`."""
        account = Account()
        for part in self.parts:
            account.merge(part.account)
        return account

    def set_epoch(self, epoch: int):
        """Go on to another epoch, of every part as well."""
        self._epoch.fill_(epoch)
        for part in self.parts:
            part.set_epoch(epoch)


class StreamedDataset(torch.utils.data.IterableDataset):
    """
    Conversations of sources that are read from their beginning, without end: each begins anew when it is read through.

    Worker processes share the sources by their files, so none gives an item that another gives. Processes of a
    distributed run each read all and take their part of every batch, as accelerate does with any such data set. The
    items of a source are shuffled within a buffer, and none comes again before all have come.

    Args:
        parts: rows and how they are read, for each source.
        weights: each source's share of the items; equal shares if not given.
        seed: for the order, and for `caption_choice="random"`.
        shuffle_buffer: items among which the next is drawn; 1 keeps the order.
    """

    def __init__(
        self,
        parts: list[tuple[datasets.IterableDataset, Reading]],
        weights: list[float] | None = None,
        seed: int = 0,
        shuffle_buffer: int = SHUFFLE_BUFFER,
    ):
        self.parts = parts
        self.weights = [1.0] * len(parts) if weights is None else list(weights)
        self.seed, self.shuffle_buffer = seed, shuffle_buffer

    @property
    def num_shards(self) -> int:
        """As many workers as this can share the reading."""
        return min(rows.num_shards for rows, _ in self.parts)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        number = worker.id if worker is not None and worker.num_workers > 1 else None
        rng = random.Random(f"{self.seed} {number}")
        streams, weights = [self._endless(*part, number, rng) for part in self.parts], list(self.weights)
        while streams:
            chosen = rng.choices(range(len(streams)), weights)[0]
            item = next(streams[chosen], None)
            if item is None:  # this worker has no file of this source
                del streams[chosen], weights[chosen]
            else:
                yield item

    def _endless(self, rows, reading, worker, rng):
        found = True
        while found:
            found = False
            for item in _shuffled(self._once(rows, reading, worker, rng), self.shuffle_buffer, rng):
                found = True
                yield item

    def _once(self, rows, reading, worker, rng):
        for index, row in enumerate(rows):
            index = row.pop(ROW, index)
            items = reading.items(row, index if worker is None else f"{index} of worker {worker}")
            yield from [rng.choice(items)] if reading.caption_choice == "random" else items


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
