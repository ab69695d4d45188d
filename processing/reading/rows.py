"""What is done to the rows of any source, streamed or not: numbered, kept undecoded, held out, limited.

What is special: none of it copies or decodes what is stored. Only how a table is read changes, or which of its rows.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import datasets
import numpy as np
import pyarrow as pa
from datasets.fingerprint import Hasher
from PIL import Image

from ..data_error_vlm import DuetError
from .conversations import ODD, ROW


HELD_OUT_ROWS = 1_000
"""How many rows are held out at most: evaluation is to be short, and nobody knows how long a stream is."""

STORED_IMAGE = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
"""How an image is stored, and so what is left of its column's type where a file does not say that it is one."""

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset
Splits = dict[str, Callable[[], Rows]]
"""Split name -> what opens it."""


def hold_out(rows: Rows, share: float, seed: int = 0, at_least: int = 0) -> tuple[Rows, Rows | None]:
    """Divide rows into some to learn from and some to evaluate on, the same ones in every run.

    A random `share` of a `Dataset` is held out, without copying anything. A stream has no length and no order that
    workers or a shuffling would keep: about one row in `round(1 / share)` is held out, chosen by a hash of its content.
    At most `HELD_OUT_ROWS` are evaluated on (what more of a stream is held out is in neither part). No row is ever in
    both parts, whatever is done to them later.

    Args:
        rows: what `open_source` gave.
        share: the share to hold out.
        seed: another one chooses other rows.
        at_least: so many rows are held out where the share makes fewer, but never all (1 where an evaluation was asked
            for). For a stream 1 or more means one at least: its first rows are looked at for it.

    Returns:
        the rows to learn from and those to evaluate on, `None` where there are none.

    Raises:
        DuetError: `share` is none.
    """
    if not 0 <= share < 1:
        raise DuetError(f"the share of rows to hold out is {share}; expected a number from 0 to below 1, e.g. 0.05")
    if isinstance(rows, datasets.IterableDataset):
        if not share and not at_least:
            return rows, None
        every = max(round(1 / share), 2) if share else HELD_OUT_ROWS
        if at_least:
            every = _often_enough(rows, every, seed)
        choice = {"every": every, "seed": seed}
        held_out = rows.filter(_is_held_out, fn_kwargs=choice).take(HELD_OUT_ROWS)
        return rows.filter(_is_learned, fn_kwargs=choice), held_out
    count = min(max(int(len(rows) * share), min(at_least, len(rows) - 1)), HELD_OUT_ROWS)
    if not count:
        return rows, None
    order = np.random.default_rng(seed).permutation(len(rows))
    # In their own order, in which they are read fastest; the Trainer shuffles what it learns from.
    return rows.select(np.sort(order[:-count])), rows.select(np.sort(order[-count:]))


def _often_enough(rows: datasets.IterableDataset, every: int, seed: int) -> int:
    """`every`, or what is next to it with which some of the first rows are held out and some are not."""
    first = [_number(row, seed) for row in rows.take(HELD_OUT_ROWS)]
    candidates = [every, *(every >> halved for halved in range(1, every.bit_length() - 1)), 3, 5, 7, 11, 13]
    return next((n for n in candidates if len({number % n == 0 for number in first}) == 2), every)


def _is_held_out(row: dict[str, Any], every: int, seed: int) -> bool:
    return _number(row, seed) % every == 0


def _number(row: dict[str, Any], seed: int) -> int:
    """A number that follows from what a row holds, and is as good as drawn."""
    digest = hashlib.blake2b(str(seed).encode(), digest_size=8)
    _add_to(digest, row)
    return int.from_bytes(digest.digest(), "big")


def _is_learned(row: dict[str, Any], every: int, seed: int) -> bool:
    return not _is_held_out(row, every, seed)


def _add_to(digest: hashlib.blake2b, value: Any) -> None:
    """Add the content of a row to a hash: everything but where it came from."""
    if isinstance(value, dict):
        stored = value.get("bytes") is not None  # an image, whose path is then only a name
        for key in sorted(value):
            if not (key.startswith("__") and (key != ODD or value[key] is None)) and not (stored and key == "path"):
                _add_to(digest, key)
                _add_to(digest, value[key])
    elif isinstance(value, list):
        for item in value:
            _add_to(digest, item)
    elif isinstance(value, Image.Image):
        digest.update(value.tobytes())
    else:
        digest.update(value if isinstance(value, bytes) else repr(value).encode())


def limited(rows: Rows | None, limit: int | None, seed: int | None = None) -> Rows | None:
    """That many rows, chosen by the seed; the first ones where rows are streamed or no seed is given."""
    if rows is None or limit is None:
        return rows
    if isinstance(rows, datasets.IterableDataset):
        return rows.take(limit)
    if limit >= len(rows):
        return rows
    return (rows if seed is None else rows.shuffle(seed=seed)).select(range(limit))


def numbered(rows: Rows) -> Rows:
    """The same rows with the column `ROW`, copying nothing."""
    if isinstance(rows, datasets.IterableDataset):
        features = rows.features and datasets.Features({**rows.features, ROW: datasets.Value("int64")})
        return rows.map(_row_number, with_indices=True, features=features)
    if ROW in rows.column_names:
        rows = rows.remove_columns(ROW)
    # The fingerprint is given, as the numbers follow from the rows: nothing has to be hashed.
    return rows.add_column(ROW, np.arange(len(rows)), new_fingerprint=Hasher.hash([rows._fingerprint, ROW]))


def _row_number(row: dict[str, Any], number: int) -> dict[str, int]:
    return {ROW: number}


def joined(parts: list[Rows]) -> Rows:
    """Rows one behind another."""
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def undecoded(rows: Rows) -> Rows:
    """The same rows with every image, in lists too, given as {"bytes", "path"}, and every class as its name."""

    def of_type(feature: Any) -> Any:
        # With the keys in another order it is another type, and every image would be copied.
        if isinstance(feature, datasets.Image) or feature == STORED_IMAGE and [*feature] == [*STORED_IMAGE]:
            return datasets.Image(decode=False)
        if isinstance(feature, datasets.ClassLabel):
            return datasets.Value("string")
        if isinstance(feature, (datasets.List, datasets.LargeList)):
            return dataclasses.replace(feature, feature=of_type(feature.feature))
        if isinstance(feature, dict):
            return {key: of_type(value) for key, value in feature.items()}
        return feature

    if rows.features is None:  # streamed text, which holds no images
        return rows
    features = datasets.Features(of_type(dict(rows.features)))
    classes = {name: one for name, one in rows.features.items() if _has_classes(one)}
    if isinstance(rows, datasets.IterableDataset):
        rows = rows.decode(False)  # images on the Hub may be set to be decoded ahead, by threads
        if classes:
            named = datasets.Features({**rows.features, **{name: features[name] for name in classes}})
            rows = rows.map(_with_names, fn_kwargs={"classes": classes}, features=named)
        return rows.cast(features)
    # Only the reading changes, not what is stored: `cast` would copy every image of a list column.
    info = rows.info.copy()
    info.features = features
    table, kinds = rows.data, features.arrow_schema
    for name, feature in classes.items():
        names = pa.array([_named(value, feature) for value in table.column(name).to_pylist()], kinds.field(name).type)
        table = table.set_column(table.column_names.index(name), name, names)
    table = table.replace_schema_metadata(kinds.metadata)
    # Of rows that were chosen (`select`, `shuffle`, `train_test_split`) the table is that of all, beside their numbers.
    return datasets.Dataset(table, info=info, split=rows.split, indices_table=rows._indices)


def _has_classes(feature: Any) -> bool:
    return any(isinstance(leaf, datasets.ClassLabel) for leaf in leaves(feature))


def _named(value: Any, feature: Any) -> Any:
    """A value of a column with the names of its classes in place of their numbers."""
    if value is None:
        return None
    if isinstance(feature, datasets.ClassLabel):
        return feature.int2str(value) if value >= 0 else None  # -1 where a test's labels are kept back
    if isinstance(feature, dict):
        return {key: _named(value[key], inner) for key, inner in feature.items()}
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return [_named(one, feature.feature) for one in value]
    return value


def _with_names(row: dict[str, Any], classes: dict[str, Any]) -> dict[str, Any]:
    return {name: _named(row[name], feature) for name, feature in classes.items()}


def leaves(feature: Any) -> Iterator[Any]:
    """The features at the bottom of a column's feature: in its lists and structs, or itself."""
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        yield from leaves(feature.feature)
    elif isinstance(feature, dict):
        for inner in feature.values():
            yield from leaves(inner)
    else:
        yield feature
