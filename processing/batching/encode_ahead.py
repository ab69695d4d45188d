"""A source's conversations, encoded before training: once, in several processes, with no image read or copied.

What is special: the library keeps the result in its cache and names it by the encoder, by how rows are read, and by the
text of this file and of every file that it imports, so another version of the code that labels is another cache.
"""

import ast
import functools
import importlib.util
import inspect
import itertools
import os
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets.fingerprint import Hasher

from ..data_error_vlm import DuetError
from ..image_files_vlm import NamedImage
from ..reading.items import Reading
from .account import BAD_SAMPLE_REASONS, Account, Record
from .encoding import KEPT, Encoder, encode_item


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
        "notes": datasets.List(datasets.Value("string")),
        "group": datasets.Value("int64"),
        "answers": datasets.List(datasets.Value("string")),
        "choices": datasets.List(datasets.Value("string")),
        "kind": datasets.Value("string"),
        "subset": datasets.Value("string"),
        "id": datasets.Value("string"),
    }
)
_NOTHING: dict[str, Any] = {
    **dict.fromkeys(_COLUMNS),
    "input_ids": [],
    "labels": [],
    "weights": [],
    "length": 0,
    "images": [],
}
_OF_ITEMS = ["input_ids", "labels", "weights", "length", "cut", "row", "position", "number", "references"]


def encode_rows(
    rows: datasets.Dataset, reading: Reading, encoder: Encoder, on_bad_sample: str = "skip"
) -> tuple[datasets.Dataset, Account]:
    """
    Every conversation of a source, encoded, and the account of what was kept and dropped.

    Args:
        on_bad_sample: `"error"` raises for the first row that cannot be read, `"skip"` drops and counts it.

    Returns:
        a row a conversation that can be learned from: the fields of `Encoded` that any of them has, but `source`; the
        `position` of its row, its `number` in it, and `references`, its images where they are named, else nulls. Where
        images are tiled, their headers were read for their sizes (and those that are URLs fetched).
    """
    tiled = encoder.processor.max_tiles > 1
    shown = rows if tiled else rows.with_format("arrow")  # stored images stay where they are not asked for
    workers = min(_cores(), len(rows) // 10_000)
    encodings = shown.map(
        _RowEncoder(encoder, reading, on_bad_sample, rows.features),
        with_indices=True,
        batched=True,
        batch_size=100 if tiled else 1_000,  # rows whose images are in memory at once
        remove_columns=rows.column_names,
        features=_COLUMNS,
        num_proc=workers if workers > 1 else None,
        desc=f"Encoding {reading.source}",
    ).with_format(None)
    account, fields = Account(), Record._fields[1:]
    for batch in encodings.select_columns([*fields]).iter(10_000):
        records = zip(*(batch[name] for name in fields))
        account.add(Record._make([reading.source, *told, tuple(notes or ())]) for *told, notes in records)
    if account.named:
        encodings = encodings.filter(_is_kept, input_columns=["dropped"], desc="Dropping")
    # What no row has costs every item something.
    held = [name for name in KEPT if name in _COLUMNS and encodings.data[name].null_count < len(encodings.data)]
    return encodings.select_columns(list(dict.fromkeys([*_OF_ITEMS, *held]))), account


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_kept(reason):
    return reason is None


class _RowEncoder:
    """A batch of rows, as columns or as an Arrow table -> columns of encodings, for `datasets.map`."""

    def __init__(self, encoder: Encoder, reading: Reading, on_bad_sample: str, features: datasets.Features | None):
        self.encoder, self.reading = encoder, reading
        self.on_bad_sample, self.features = on_bad_sample, features
        self.code = code_that_encodes()  # `datasets` finds its cache by what is in here

    def __call__(self, batch, indices):
        columns = without_image_bytes(batch, self.features) if isinstance(batch, pa.Table) else dict(batch)
        encoded = []
        for offset, position in enumerate(indices):
            row = {name: values[offset] for name, values in columns.items()}
            for number, item in enumerate(self.reading.items(row, position)):
                encoding, record = encode_item(item, self.encoder)
                if self.on_bad_sample == "error" and record.dropped in BAD_SAMPLE_REASONS:
                    raise DuetError(record.detail)
                encoding = encoding or _NOTHING
                references = [image if isinstance(image, NamedImage) else None for image in encoding["images"]]
                places = {"position": position, "number": number, "references": references}
                encoded.append({**_NOTHING, **encoding, **record._asdict(), "notes": record.notes or None, **places})
        return {name: [item[name] for item in encoded] for name in _COLUMNS}


@functools.cache
def code_that_encodes() -> str:
    """A name for the text of this module and of all that it imports of this package, directly or not."""
    return Hasher.hash(sorted(imported_texts(__name__).items()))


def imported_texts(name: str) -> dict[str, str]:
    """The text of a module, and of each that it imports from its own package, by their names."""
    texts: dict[str, str] = {}
    waiting = [name]
    while waiting:
        module = importlib.import_module(waiting.pop())
        if module.__name__ in texts:
            continue
        texts[module.__name__] = inspect.getsource(module)
        for node in ast.walk(ast.parse(texts[module.__name__])):
            if isinstance(node, ast.ImportFrom) and node.level:
                name = importlib.util.resolve_name("." * node.level + (node.module or ""), module.__package__ or "")
                is_package = hasattr(importlib.import_module(name), "__path__")
                waiting += [f"{name}.{imported.name}" for imported in node.names] if is_package else [name]
    return texts


def without_image_bytes(table: pa.Table, features: datasets.Features) -> dict[str, list[Any]]:
    """The columns of a table in Python, stored images as `{"bytes": b"stored", "path"}`, whatever size they have.

    The first bytes of a column of plain bytes are left, which say whether it is an image.
    """
    images = {name for name, feature in features.items() if _holds_images(feature)}
    others = datasets.Features({name: feature for name, feature in features.items() if name not in images})
    columns = {}
    if others:
        rest = datasets.table.InMemoryTable(table.select(list(others)))
        columns = datasets.Dataset(rest, info=datasets.DatasetInfo(features=others))[:]
    for name in images:
        columns[name] = []
        for chunk in table[name].chunks:  # one by one: put together they may be too many bytes for one array
            if not isinstance(features[name], (datasets.List, datasets.LargeList)):
                columns[name] += _light_images(chunk)
            else:
                light, lengths = iter(_light_images(chunk.flatten())), pc.list_value_length(chunk).to_pylist()
                columns[name] += [None if n is None else list(itertools.islice(light, n)) for n in lengths]
    return {name: columns[name] for name in features}


def _holds_images(feature):
    kind = getattr(feature, "feature", feature)
    return isinstance(kind, datasets.Image) or kind in (datasets.Value("binary"), datasets.Value("large_binary"))


def _light_images(images: pa.Array) -> list[dict[str, Any] | bytes | None]:
    if not pa.types.is_struct(images.type):
        return pc.binary_slice(images, 0, 16).to_pylist()
    stored = pc.is_valid(images.field("bytes")).to_pylist()
    paths, there = images.field("path").to_pylist(), images.is_valid().to_pylist()
    return [
        {"bytes": b"stored" if has_bytes else None, "path": path} if valid else None
        for has_bytes, path, valid in zip(stored, paths, there)
    ]


__all__ = ["code_that_encodes", "encode_rows", "without_image_bytes"]
