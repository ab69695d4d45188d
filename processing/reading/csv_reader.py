"""CSV files as tables in which every cell is text, row by row where something in them is wrong or odd.

What is special: a quote that is opened and not closed costs its own line, not the file.
"""

import csv
import gzip
import io
import json
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
from datasets.packaged_modules.csv.csv import Csv
from datasets.utils.file_utils import xopen

from ..data_error_vlm import DuetError
from .cells import cut, is_picture
from .conversations import ODD
from .odd import UNREADABLE, base_name, is_alone, is_unicode, odd_column, spared, without_mark


BLOCK = 8 << 20
"""How many bytes go to Arrow at once; no row may be longer there."""

CSV_ROWS = 10_000
"""How many rows of a file that Arrow refuses make a table."""


class CsvReader(Csv):
    """CSV files with a header, every cell as text where they lie on this machine."""

    def _generate_tables(self, base_files, files_iterables):
        if self.config.features is None:  # files on the Hub are read as the library reads them
            yield from super()._generate_tables(base_files, files_iterables)
            return
        for shard, files in enumerate(files_iterables):
            for file in files:
                yield from spared(shard, file, is_alone(self.config), self._tables(file), self._odd_row)

    def _odd_row(self, why: str) -> pa.Table:
        return csv_table([why], [], self.info.features)

    def _tables(self, file: str) -> Iterator[pa.Table]:
        """The tables of a file as Arrow reads it, and from where that finds something wrong on row by row."""
        features, held, done = self.info.features, None, 0
        header, rows = csv_rows(file, self.config.sep)
        try:
            for table in _arrow_tables(file, self.config.sep, header, features):
                if held is not None:
                    yield held
                    done += len(held)
                held = table
            # A quote that is not closed swallows all lines to the end, in the last row.
            last = [] if held is None else [held[name][-1].as_py() or "" for name in features if name != ODD]
            if not any("\n" in cell for cell in last):
                if held is not None:
                    yield held
                return
        except UNREADABLE:
            if held is not None:
                yield held
                done += len(held)
        batch = []
        for row in islice(rows, done, None):
            batch.append(row)
            if len(batch) == CSV_ROWS:
                yield csv_table(batch, header, features)
                batch = []
        if batch:
            yield csv_table(batch, header, features)


def _arrow_tables(file: str, sep: str, header: list[str], features: datasets.Features) -> Iterator[pa.Table]:
    """The tables of a file in which Arrow finds nothing wrong."""
    types = {name: pa.string() for name in header}
    with _open(file) as opened:
        batches = pacsv.open_csv(
            opened,
            pacsv.ReadOptions(block_size=BLOCK),
            pacsv.ParseOptions(delimiter=sep, newlines_in_values=True),
            pacsv.ConvertOptions(
                column_types=types, null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=True
            ),
        )
        if batches.schema.names != header or not set(header) <= features.keys() - {ODD}:
            raise ValueError("names that are not as they stand there, or of no column")
        for batch in batches:
            if any(pc.any(pc.match_substring(column, "\0")).as_py() for column in batch.columns):
                raise ValueError("a NUL byte")
            columns = dict(zip(header, batch.columns)) | {ODD: odd_column([None] * len(batch))}
            arrays = [columns.get(name, pa.nulls(len(batch), pa.string())) for name in features]
            yield pa.Table.from_arrays(arrays, schema=features.arrow_schema)


def csv_table(rows: list[list[str] | str], header: list[str], features: datasets.Features) -> pa.Table:
    """Cells, and reasons why there are none, as a table; cells of columns that it has not are odd."""
    odd: list[str | None] = [None] * len(rows)
    unknown = [number for number, name in enumerate(header) if name not in features]
    for number, row in enumerate(rows):
        if isinstance(row, str):
            odd[number], rows[number] = json.dumps(row), [""] * len(header)
        elif unknown and any(row[place] for place in unknown):
            odd[number], rows[number] = json.dumps(dict(zip(header, row))), [""] * len(header)
    columns = dict(zip(header, zip(*rows)))
    nothing = [None] * len(rows)
    arrays = [
        odd_column(odd)
        if name == ODD
        else pa.array([cell or None for cell in columns[name]] if name in columns else nothing, pa.string())
        for name in features
    ]
    return pa.Table.from_arrays(arrays, schema=features.arrow_schema)


def csv_header(file: str, sep: str = ",") -> list[str]:
    """
    The names of a CSV file's columns.

    Raises:
        DuetError: the first line is no header.
    """
    names = csv_rows(file, sep)[0]
    if pictures := [name for name in names if is_picture(name)]:
        raise DuetError(
            f"{file}: its first line is no header, as {cut(pictures[0], 100)} stands in it; expected the names of the "
            "columns, such as image,caption"
        )
    return names


def csv_separator(file: str, sep: str = ",") -> str:
    """What stands between the cells of a CSV file: `sep`, or where its header has none, what spreadsheets write."""
    with _open(file) as opened:
        first = without_mark(opened.readline(), file).decode(errors="replace")
    return sep if sep in first else max((sep, ";", "\t"), key=first.count)


def csv_rows(file: str, sep: str = ",") -> tuple[list[str], Iterator[list[str] | str]]:
    """The names of a CSV file's columns, and its rows: as many cells each, or what is wrong with them.

    Raises:
        DuetError: the first line is no header.
    """
    csv.field_size_limit(2**31 - 1)  # a cell may hold an image
    with _open(file) as opened:
        without_mark(opened.read(4), file)
    records, name = _records(file, sep), base_name(file)
    first = next(records, None)
    if first is None or not first.is_whole or not is_unicode("".join(first.cells)):
        raise DuetError(f"{file}: its first line is no header in UTF-8; expected the names of the columns")
    line = io.StringIO()
    csv.writer(line).writerow(first.cells)
    header = list(map(str, pd.read_csv(io.StringIO(line.getvalue()), nrows=0).columns))
    return header, (_cells(record, header, name) for record in records)


class _Record(NamedTuple):
    """What stands between two line ends of a CSV file that are in no quotes."""

    line: int
    cells: list[str]
    is_whole: bool
    """Whether its quotes are closed."""


def _open(file: str) -> Any:
    return gzip.open(file) if file.endswith(".gz") and "::" not in file else xopen(file, "rb")


def _cells(record: _Record, header: list[str], name: str) -> list[str] | str:
    where, cells = f"line {record.line} of {name}", record.cells
    spare = len(cells) - len(header)
    if not record.is_whole:
        return f"{where}: a quote that is opened is not closed"
    if spare > 0 and any(cells[len(header) :]):
        return f"{where}: {len(cells)} cells where the header names {len(header)} columns"
    if any(_NUL in cell for cell in cells):
        return f"{where}: a NUL byte"
    if not is_unicode("".join(cells)):
        return f"{where}: a text that is no UTF-8; save the file as UTF-8"
    return cells[: len(header)] if spare > 0 else cells + [""] * -spare


_NUL = "\udc00"
"""What stands for a NUL byte, at which some versions of Python's reader stop; no decoder gives it."""


def _records(file: str, sep: str) -> Iterator[_Record]:
    """The records of a CSV file, without lines that hold nothing.

    One over several lines that is no good may have swallowed its neighbours: its first line is left alone then.
    """
    number, width = 1, None
    again: deque[str] = deque()
    with _open(file) as opened:
        text = io.TextIOWrapper(opened, encoding="utf-8-sig", errors="surrogateescape", newline="")
        while True:
            taken: list[str] = []
            ended: list[bool] = []

            def lines(taken=taken, ended=ended) -> Iterator[str]:
                while line := again.popleft() if again else text.readline():
                    taken.append(line)
                    yield line.replace("\0", _NUL)
                ended.append(True)

            for cells in csv.reader(lines(), delimiter=sep):
                if len(taken) > 1 and (ended or len(cells) != (width or len(cells))):
                    again.extendleft(reversed(taken[1:]))
                    yield _Record(number, [], is_whole=False)
                    number += 1
                    break
                if "".join(taken).strip():
                    width = width or len(cells)
                    yield _Record(number, cells, is_whole=not ended)
                number += len(taken)
                taken.clear()
            else:
                return
