"""JSON files as tables, row by row where something in them is wrong or odd.

A block of lines goes to Arrow as it is, which is fast. Where Arrow refuses it, each line is looked at: one that is no
UTF-8, no JSON or no object is a row that says so, and one that does not fit the columns of the first block (another
key, a list where there was a text) is kept whole in the column `ODD`. A field that is a text in one row and a list in
another is a column of JSON from its top, in which every text stays the text it is.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.json as paj
from datasets.packaged_modules.json.json import FullReadDisallowed, Json
from datasets.utils.file_utils import xopen
from datasets.utils.json import get_json_field_paths_from_feature, json_encode_field, ujson_loads

from ..data_error_vlm import DuetError
from .conversations import ODD
from .odd import UNREADABLE, base_name, is_alone, is_unicode, odd_column, reason, spared, with_odd, without_mark
from .rows import leaves


BLOCK = 10 << 20
"""How many bytes of JSON lines go to Arrow at once, as in the library's own reader."""

DEEPEST = 100
"""How deep a row may be nested; Arrow's and other parsers die of some ten thousand levels."""

DEEPEST_TYPE = 32
"""How many levels a column's type may have; Arrow hands on no more than 64, and what has more is kept as JSON."""

_ODD_NUMBER = re.compile(r"\d{19}|NaN|Infinity")
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]')
_TOKEN_OF_TEXT = re.compile(_TOKEN.pattern.decode())
_NEXT_ENTRY = re.compile(r"\s*(?:,\s*[\[{]|\])")


class JsonReader(Json):
    """JSON lines, or a file that is one list."""

    def _split_generators(self, dl_manager):
        self.config.parse_agent_traces = False  # rows, whatever they are about
        splits = super()._split_generators(dl_manager)
        if self.info.features is not None:
            self.info.features = with_odd(self.info.features)
        return splits

    def _generate_tables(self, base_files, files_iterables, original_files, allow_full_read=True):
        infers, waiting = self.info.features is None, []
        for shard, files in enumerate(files_iterables):
            for file in files:
                tables = self._tables(file, allow_full_read)
                for key, table in spared(shard, file, is_alone(self.config), tables, self._odd_row):
                    if table.column_names == [ODD] and infers:  # of which no columns follow
                        waiting.append(table)
                        continue
                    infers = False
                    yield key, pa.concat_tables([*waiting, table], promote_options="default")
                    waiting = []
        if waiting:
            raise DuetError(json.loads(waiting[0][ODD][0].as_py()))

    def _odd_row(self, why: str) -> pa.Table:
        table = pa.table({ODD: odd_column([json.dumps(why)])})
        return table if self.info.features is None else self._cast_table(table)

    def _tables(self, file: str, allow_full_read: bool) -> Iterator[pa.Table]:
        name, line, block = base_name(file), 1, b""
        with xopen(file, "rb", download_config=self._download_config()) as opened:
            blocks = _blocks(opened)
            for block in blocks:
                if line == 1:
                    block = without_mark(block, file)
                    if _is_list(block):
                        if not allow_full_read:
                            raise FullReadDisallowed
                        block += b"".join(blocks)
                        rows = _rows_of_list(block, name)
                        yield self._table_of_rows(rows)
                        return
                table = self._table_as_it_is(block)
                if table is None:
                    rows = _rows_of_lines(block, name, line)
                    if line == 1 and rows and not any(isinstance(row, dict) for row in rows):
                        if not allow_full_read:
                            raise FullReadDisallowed
                        # One object over several lines; or nothing that can be read, which raises.
                        yield from self._tables_of_object(file)
                        return
                    table = self._table_of_rows(rows)
                if len(table):
                    yield table
                line += block.count(b"\n")
            if not block:
                raise DuetError(f"{name}: an empty file")

    def _download_config(self) -> datasets.DownloadConfig:
        return datasets.DownloadConfig(token=self.token, storage_options=self.storage_options)

    def _tables_of_object(self, file: str) -> Iterator[pa.Table]:
        for _, table in super()._generate_tables([file], [[file]], [file]):
            yield _with_odd_column(table)

    def _table_as_it_is(self, block: bytes) -> pa.Table | None:
        """The table of a block that needs nothing else, `None` of another."""
        features = self.info.features
        if _may_be_deep(block) or features is not None and any(path != [ODD] for path in _json_paths(features)):
            return None
        try:
            if features is None:
                parsed = _parsed(block, None)
                deep = any(_has_levels(field.type, DEEPEST_TYPE) for field in parsed.schema)
                return None if deep else _with_odd_column(parsed)
            table = self._fitting(block, features)
        except (*UNREADABLE, RecursionError):
            return None
        return table if table[ODD].null_count == len(table) else None  # else a name of our own is in it

    def _fitting(self, block: bytes, features: datasets.Features) -> pa.Table:
        """JSON lines as a table of these columns, which all of them fit."""
        simple = (datasets.Value, datasets.Json)
        if all(isinstance(leaf, simple) for feature in features.values() for leaf in leaves(feature)):
            return _fitting(block, features)
        return self._cast_table(_parsed(block, None))

    def _table_of_rows(self, rows: list[dict[str, Any] | str]) -> pa.Table:
        """The table of rows and of reasons why there is none."""
        features = self.info.features
        if features is None:
            table = self._table_as_it_is("\n".join(json.dumps(row) for row in rows if isinstance(row, dict)).encode())
            if table is None:
                return table_of_rows(rows)
            features = datasets.Features.from_arrow_schema(table.schema)
        lines = [_encoded(row, features) for row in rows]
        return pa.concat_tables(self._fitted(lines, rows, features))

    def _fitted(self, lines: list[bytes], rows: list[dict | str], features: datasets.Features) -> list[pa.Table]:
        """Lines as tables; a row that does not fit the columns is itself in the column `ODD`."""
        try:
            return [self._fitting(b"\n".join(lines), features)]
        except UNREADABLE:
            if len(lines) == 1:
                return [self._fitting(_encoded({ODD: rows[0]}, features), features)]
        half = len(lines) // 2
        return [*self._fitted(lines[:half], rows[:half], features), *self._fitted(lines[half:], rows[half:], features)]


def features_of(rows: Iterable[dict[str, Any]]) -> datasets.Features:
    """The columns of rows, each of one simple type, a list of texts, or JSON."""
    kinds: dict[str, set[str]] = {}
    for row in rows:
        for name, value in row.items():
            kinds.setdefault(name, set()).add(_kind(value))
    types = {
        frozenset({"str"}): datasets.Value("string"),
        frozenset({"int"}): datasets.Value("int64"),
        frozenset({"float"}): datasets.Value("float64"),
        frozenset({"bool"}): datasets.Value("bool"),
        frozenset({"list of str"}): datasets.List(datasets.Value("string")),
        frozenset(): datasets.Value("null"),
    }
    columns = {name: types.get(frozenset(found - {"null"}), datasets.Json()) for name, found in kinds.items()}
    return with_odd(datasets.Features(columns))


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list) and value and all(item is None or isinstance(item, str) for item in value):
        return "list of str"
    kind = type(value).__name__
    return "json" if kind == "int" and not -(2**63) <= value < 2**63 else kind


def table_of_rows(rows: list[dict[str, Any] | str]) -> pa.Table:
    """The table of rows and of reasons why there is none, with the columns that all of them need."""
    features = features_of(row for row in rows if isinstance(row, dict))
    return _fitting(b"\n".join(_encoded(row, features) for row in rows), features)


def json_rows(file: str) -> Iterator[dict[str, Any] | str]:
    """The rows of a file of JSON lines, and what is wrong with those that are none."""
    name, line = base_name(file), 1
    with xopen(file, "rb") as opened:
        for block in _blocks(opened):
            yield from _rows_of_lines(without_mark(block, file), name, line)
            line += block.count(b"\n")


def _rows_of_lines(block: bytes, name: str, line: int) -> list[dict[str, Any] | str]:
    rows = [_row(text, f"line {line + number} of {name}") for number, text in enumerate(block.split(b"\n"))]
    return [row for row in rows if row is not None]


def _fitting(block: bytes, features: datasets.Features) -> pa.Table:
    """JSON lines as a table of these columns, which all of them fit."""
    columns = [(name, _stored_as(kind.type)) for name, kind in zip(features, features.arrow_schema)]
    return _parsed(block, pa.schema(columns)).select(list(features)).cast(features.arrow_schema)


def _parsed(block: bytes, schema: pa.Schema | None) -> pa.Table:
    """JSON lines as a table: of the schema, or of what columns they have, in which a text is never taken for a date."""
    parse = None
    if schema is not None:
        parse = paj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error")
    try:
        table = paj.read_json(io.BytesIO(block), paj.ReadOptions(block_size=1 << 20), parse)
    except pa.ArrowInvalid as error:  # a row larger than that, or types that only all of it shows
        if "straddling" not in str(error) and "JSON conversion to" not in str(error):
            raise
        table = paj.read_json(io.BytesIO(block), paj.ReadOptions(block_size=len(block) + 1), parse)
    if schema is None and (texts := _without_dates(table.schema)) != table.schema:
        return _parsed(block, texts)
    table.validate(full=True)  # whether texts are UTF-8
    return table


def _without_dates(schema: pa.Schema) -> pa.Schema:
    def of_type(kind: pa.DataType) -> pa.DataType:
        if pa.types.is_timestamp(kind):
            return pa.string()
        if pa.types.is_list(kind):
            return pa.list_(of_type(kind.value_type))
        if pa.types.is_struct(kind):
            return pa.struct([(field.name, of_type(field.type)) for field in kind.fields])
        return kind

    return pa.schema([(field.name, of_type(field.type)) for field in schema])


def _stored_as(kind: pa.DataType) -> pa.DataType:
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def _json_paths(features: datasets.Features) -> list[list[Any]]:
    """Where JSON stands in columns."""
    return get_json_field_paths_from_feature(features)


def _encoded(row: dict[str, Any] | str, features: datasets.Features) -> bytes:
    """A row as a line in which JSON columns are texts; a reason in its column."""
    if isinstance(row, str):
        cells: dict[str, Any] = {ODD: row}
    else:
        cells = {name: value for name, value in row.items() if value is not None or name in features}
    for path in _json_paths(features):
        if len(path) > 1:
            cells = json_encode_field(cells, path)
        elif cells.get(path[0]) is not None:
            cells[path[0]] = json.dumps(cells[path[0]])
    return json.dumps(cells).encode()


def _blocks(file: Any) -> Iterator[bytes]:
    """A file in blocks of whole lines; where it breaks off, what came before."""
    read, parts, size = getattr(file, "read1", file.read), [], 0
    try:
        while part := read(min(BLOCK, 1 << 20)):
            parts.append(part)
            size += len(part)
            if size >= BLOCK and b"\n" in part:
                whole = b"".join(parts)
                end = whole.rindex(b"\n") + 1
                yield whole[:end]
                parts, size = [whole[end:]], len(whole) - end
    except UNREADABLE:
        if size:
            yield b"".join(parts)
        raise
    if size:
        yield b"".join(parts)


def _is_list(block: bytes) -> bool:
    """Whether a file that begins so is one list, and not lines of which the first is a list."""
    first, _, rest = block.lstrip().partition(b"\n")
    if not first.startswith(b"["):
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return True
    return not rest.strip()


def _rows_of_list(content: bytes, name: str) -> list[dict[str, Any] | str]:
    """The rows of a file that is one list, and what is wrong with those that are none."""
    text = content.decode("utf-8", "surrogateescape")
    decoder, place = json.JSONDecoder(), text.index("[") + 1
    rows: list[dict[str, Any] | str] = []
    while True:
        while place < len(text) and text[place] in " \t\r\n,":
            place += 1
        if text.startswith("]", place):
            break
        where = f"entry {len(rows)} of {name}"
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            behind = _behind_entry(text, place)
            what = reason(error) if text[place:].strip() else "the file ends before it"
            which = where if behind else f"{where} and all behind it"
            rows.append(f"{which}: not readable as JSON ({what})")
            if not behind:
                break
            place = behind
            continue
        entry = text[place:end]
        deep = _is_too_deep(entry.encode("utf-8", "surrogateescape"))
        rows.append(f"{where}: nested more than {DEEPEST} deep" if deep else _checked(value, entry, where))
        place = end
    texts = [row for row in rows if isinstance(row, _Text)]
    return [{"text": row.text} for row in texts] if len(texts) == len(rows) else rows


def _behind_entry(text: str, place: int) -> int | None:
    """Where an entry of a list ends by its brackets; `None` where neither another one nor the list's end follows."""
    depth = 0
    for token in _TOKEN_OF_TEXT.finditer(text, place) if text.startswith(("{", "["), place) else ():
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if not depth:
            return token.end() if _NEXT_ENTRY.match(text, token.end()) else None
    return None


class _Text(str):
    """Why an entry is no row, where it is a text; a list of nothing else is a column of texts."""

    text: str


def _row(line: bytes, where: str) -> dict[str, Any] | str | None:
    """The row of a line, what is wrong with it, or `None` where there is nothing in it."""
    if not line.strip():
        return None
    if _is_too_deep(line):
        return f"{where}: nested more than {DEEPEST} deep"
    try:
        text = line.decode("utf-8")
        return _checked(json.loads(text), text, where)
    except UnicodeDecodeError as error:
        return f"{where}: the byte 0x{line[error.start]:02x} at {error.start} is no UTF-8"
    except (ValueError, RecursionError) as error:
        return f"{where}: not readable as JSON ({reason(error)})"


def _checked(value: Any, text: str, where: str) -> dict[str, Any] | str:
    """A row that is an object of texts in Unicode, else what is wrong with it."""
    if not isinstance(value, dict):
        short = text if len(text) <= 60 else f"{text[:57]}..."
        why = _Text(f"{where}: found {short!r}; expected an object")
        why.text = value
        return why if isinstance(value, str) and is_unicode(value) else str(why)
    if not is_unicode(text) or "\\u" in text and not is_unicode(json.dumps(value, ensure_ascii=False)):
        return f"{where}: a text that is no UTF-8"
    if any(name.startswith("__") for name in value):  # names of our own
        value = {name: kept for name, kept in value.items() if name != ODD}
    if _ODD_NUMBER.search(text):
        try:
            ujson_loads(json.dumps(value))  # which reads it back
        except (ValueError, OverflowError) as error:
            return f"{where}: not readable as JSON ({reason(error)})"
    return value


def _may_be_deep(block: bytes) -> bool:
    return any(
        len(line) > 4_000 and line.count(b"[") + line.count(b"{") > 1_000 and _is_too_deep(line)
        for line in block.split(b"\n")
    )


def _has_levels(kind: pa.DataType, number: int) -> bool:
    """Whether a type is nested that deep."""
    return not number or any(_has_levels(kind.field(index).type, number - 1) for index in range(kind.num_fields))


def _is_too_deep(line: bytes) -> bool:
    """Whether a line is nested too deeply, looked at only where it could be, and only up to there."""
    if line.count(b"[") + line.count(b"{") <= DEEPEST:
        return False
    depth = 0
    for token in _TOKEN.finditer(line):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token[0], 0)
        if depth > DEEPEST:
            return True
    return False


def _with_odd_column(table: pa.Table) -> pa.Table:
    if ODD in table.column_names:  # a name of our own
        table = table.drop_columns(ODD)
    return table.append_column(ODD, odd_column([None] * len(table)))
