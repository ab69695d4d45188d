"""What is odd about one row stays with that row: the column `ODD`, and how a reader goes on behind what it cannot read.

The readers of the `datasets` library end a whole run at the first line that is no UTF-8, the first cell too many or the
first file cut short. Those of `json_reader.py`, `csv_reader.py` and `binary_readers.py` give such a row, or such a file
among several, as a row that holds nothing but `ODD`: why it could not be read, or itself where it only fits no column.
"""

import codecs
import zlib
from collections.abc import Callable, Iterable, Iterator
from tarfile import TarError

import datasets
import pyarrow as pa
from datasets.builder import Key
from huggingface_hub.utils import httpx

from ..data_error_vlm import DuetError
from .conversations import ODD


UNREADABLE = (ValueError, OSError, EOFError, TypeError, KeyError, pa.ArrowException, TarError, zlib.error)
"""What libraries raise for a file, or a part of one, that is not as it should be."""

UNREACHED = (ConnectionError, TimeoutError, httpx.HTTPError)
"""What they raise where it is not the file that is wrong."""

ODD_FEATURE = datasets.Json()


def with_odd(features: datasets.Features) -> datasets.Features:
    """Features with the column `ODD`."""
    return datasets.Features({**features, ODD: ODD_FEATURE})


def without_odd(rows: datasets.Dataset) -> datasets.Dataset:
    """The same rows without the column `ODD` where nothing in them is odd."""
    odd = ODD in rows.column_names and rows.data.column(ODD).null_count < len(rows)
    return rows if odd or ODD not in rows.column_names else rows.remove_columns(ODD)


def odd_column(values: list[str | None]) -> pa.Array:
    """The column `ODD` of a table, from JSON."""
    storage = pa.array(values, ODD_FEATURE.pa_type.storage_type)
    return pa.ExtensionArray.from_storage(ODD_FEATURE.pa_type, storage)


def spared(
    shard: int, file: str, alone: bool, tables: Iterable[pa.Table], odd: Callable[[str], pa.Table]
) -> Iterator[tuple[Key, pa.Table]]:
    """The tables of a file with their keys, and a table more for the file, or the rest of it, that cannot be read.

    Args:
        alone: there is no other file; one of which nothing can be read is then raised for.
        odd: a reason -> a table of one row that says it.
    """
    number = 0
    try:
        for table in tables:
            yield Key(shard, number), table
            number += 1
    except UNREADABLE as error:
        if isinstance(error, UNREACHED) or (alone and not number):
            raise
        what = "the rest of it is not readable" if number else "not readable"
        yield Key(shard, number), odd(f"{base_name(file)}: {what} ({reason(error)})")


def base_name(file: str) -> str:
    """The name of a file, of an archive's member and of an address."""
    return str(file).split("::")[-1].rstrip("/").rsplit("/", 1)[-1]


def is_alone(config: datasets.BuilderConfig) -> bool:
    """Whether a data set is one file."""
    return sum(map(len, (config.data_files or {}).values())) == 1


def reason(error: BaseException) -> str:
    """The first line of what went wrong at the bottom, with its kind where it says nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def without_mark(block: bytes, file: str) -> bytes:
    """The beginning of a text file without the mark of UTF-8.

    Raises:
        DuetError: it is UTF-16.
    """
    if block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DuetError(f"{file}: text in UTF-16; expected UTF-8, convert it with `iconv -f utf-16 -t utf-8`")
    return block.removeprefix(codecs.BOM_UTF8)


def is_unicode(text: str) -> bool:
    """Whether a text can be written in UTF-8, so none that was decoded from something else."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
