"""The cells of a row: which hold something, which speak of an image, which are lists written as text, which were read.

What is special: nothing of a row is passed over in silence. Readers take cells out of a `Row`; what is left when they
are done is named in the notes of the row's conversations, and where it speaks of an image and none was read, the row is
refused: a question about a picture is not learned as a text.
"""

import ast
import functools
import json
import os
import re
from collections.abc import Collection, Iterable
from typing import Any

from PIL import Image

from ..data_error_vlm import DuetError


IGNORED = "ignore"
"""What a column is named to say that it is none of the row's content."""

LONGEST_LIST = 1_000_000
"""Characters of a text that may be read as a list."""

_PICTURE_ENDING = re.compile(r"\.(?:jpe?g|jfif|png|webp|gif|bmp|tiff?|avif|heic|ppm)(?:[?#]\S*)?$", re.IGNORECASE)
_PICTURE_NAME = re.compile(
    r"image|img|photo|picture|thumbnail|screenshot|video|(?:^|[^a-z])(?:pics?|jpe?g|png|webp|gif|bmp|tiff?|frames?)s?(?:$|[^a-z])",
    re.IGNORECASE,
)
# What is said about an image is none: a row of text has it too where the rows of a table share their columns.
_MEASURE = re.compile(
    r"width|height|size|ratio|score|rating|similarity|correspondence|hash|sha|md5|(?:min|max)$", re.IGNORECASE
)
_NO_REFERENCE = re.compile(r"video|ids?$", re.IGNORECASE)
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")
# How the bytes of JPEG, PNG, GIF and WebP begin in base 64.
_BASE64 = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR)[A-Za-z0-9+/\s]{40,}")
_LITERAL = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
_SIDE_BY_SIDE = re.compile(rf"({_LITERAL})\s+(?=['\"])")


class MalformedRow(DuetError):
    """A row that no conversation can be read from; one line: where it is, what was found, what was expected."""


class Row:
    """
    The cells of a row under the names that layouts have for them.

    Args:
        cells: name -> value.
        notes: what is known already of what is not read.
        ignored: columns and keys that are said to be no content of the row.
        tags_are_text: whether the row is said to have no image, so that no tag is the place of one.

    Attributes:
        unread: the names of the cells that hold something and that no reader has taken.
    """

    def __init__(
        self,
        cells: dict[str, Any],
        notes: Iterable[str] = (),
        ignored: Collection[str] = (),
        tags_are_text: bool = False,
    ):
        self.cells = cells
        self.ignored = ignored
        self.tags_are_text = tags_are_text
        self.unread = {name: None for name, value in cells.items() if not is_nothing(value)}
        self._notes = dict.fromkeys(notes)
        self._left: list[tuple[str, str, Any]] = []

    def take(self, names: Collection[str]) -> tuple[str, Any]:
        """The first of these cells that holds something, even an empty text; else the first that is there at all."""
        there = [name for name in names if name in self.cells]
        name = next((name for name in there if holds_something(self.cells[name])), there[0] if there else [*names][0])
        self.unread.pop(name, None)
        return name, self.cells.get(name)

    def take_said(self, names: Iterable[str]) -> tuple[str, Any]:
        """The first of these cells that says something, which an empty text does not; "" and null where none does."""
        for name in names:
            if name in self.unread:
                del self.unread[name]
                return name, self.cells[name]
        return "", None

    def note(self, note: str) -> None:
        """Say something of the row that the account counts."""
        self._notes[note] = None

    def leave(self, what: str, key: str, value: Any, fate: str = "is not read") -> None:
        """Say that a key of a part of the row is not read, and check in the end whether it speaks of an image."""
        if key not in self.ignored and not is_nothing(value):
            self._notes[f"the key {key} of {what} {fate}"] = None
            self._left.append((f"the key {key} of {what}", key, value))

    def notes(self, has_images: bool) -> list[str]:
        """
        What is to be said of the row when all readers are done.

        Raises:
            MalformedRow: no image was read though something that is left speaks of one.
        """
        if not has_images and (hint := self.hint()):
            raise malformed(f"no image that can be read, but {hint[0]}", hint[1])
        return [*self._notes, *(f"the column {name} is not read" for name in self.unread)]

    def hint(self) -> tuple[str, str] | None:
        """What that is left speaks of an image, and what to do about it."""
        for name in self.unread:
            value = self.cells[name]
            if speaks_of_image(name, value):
                may_be_one = not _NO_REFERENCE.search(name) and not isinstance(value, (bool, int, float))
                where = f"its column named with --columns image={name}" if may_be_one else "images in a column"
                return (
                    f"{found(value, name)}, which speaks of one",
                    f"{where}, or --columns {name}={IGNORED} for a text",
                )
        for what, key, value in self._left:
            if speaks_of_image(key, value):
                return (
                    f"{found(value, what)}, which speaks of one",
                    f"images in a column or in the parts of a message, or --columns {key}={IGNORED} for a text",
                )
        return None


def holds_something(value: Any) -> bool:
    """Whether a cell is not null and no empty list."""
    return value is not None and not (isinstance(value, list) and not value)


def is_nothing(value: Any, depth: int = 3) -> bool:
    """Whether a cell is null, not a number, empty, or a list or a struct of such."""
    if value is None:
        return True
    if isinstance(value, str):
        return not value or value.isspace()
    if isinstance(value, float):
        return value != value
    if isinstance(value, (list, tuple, dict)) and depth:
        return all(is_nothing(item, depth - 1) for item in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, bytes) and not value


# --- what speaks of an image


def speaks_of_image(name: str, value: Any) -> bool:
    """Whether a cell that holds something has the name of an image, or a picture in it."""
    if is_picture(value) or (isinstance(value, list) and any(is_picture(item) for item in value)):
        return True
    return _is_picture_name(name) and value is not False and value != 0


@functools.lru_cache(maxsize=1024)
def _is_picture_name(name: str) -> bool:
    return bool(_PICTURE_NAME.search(name)) and not _MEASURE.search(name)


def is_picture(value: Any) -> bool:
    """Whether a value is an image, its bytes, or a path or URL that ends like one."""
    if isinstance(value, dict):
        return isinstance(value.get("bytes"), bytes) or is_picture(value.get("path")) or is_picture(value.get("url"))
    if isinstance(value, bytes):
        return value.startswith(_MAGIC)
    if isinstance(value, str):
        return (len(value) < 1_000 and _PICTURE_ENDING.search(value) is not None) or is_encoded_picture(value)
    return isinstance(value, (Image.Image, os.PathLike))


def is_encoded_picture(value: str) -> bool:
    """Whether a text is the bytes of a picture in base 64, with or without `data:` before them."""
    return value.startswith("data:image/") or _BASE64.match(value) is not None


# --- lists written as text


def listed(value: Any, kinds: tuple[type, ...] = (str,)) -> Any:
    """
    The list that a text is, as CSV files and data frames write them (JSON, or as Python does); else the value itself.

    A list of other things than `kinds` is a text: the answer "[0.1, 0.5]" is a box.
    """
    if not isinstance(value, str) or len(value) > LONGEST_LIST or not value.lstrip().startswith("["):
        return value
    read = literal(value)
    return read if isinstance(read, list) and read and all(isinstance(item, kinds) for item in read) else value


def literal(text: str) -> Any:
    """What a text says in JSON or in Python; the text itself where it is neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if len(text) > LONGEST_LIST or not text.lstrip().startswith(("[", "{")):
        return text
    try:
        # NumPy writes no commas, and Python would take texts side by side for one.
        return ast.literal_eval(_SIDE_BY_SIDE.sub(r"\1, ", text.strip()))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text


# --- messages about what is wrong


def malformed(found: str, expected: str) -> MalformedRow:
    """What is wrong with a row; where it is, `conversations_from_row` adds."""
    return MalformedRow(" ".join(f"found {found}; expected {expected}".split()))


def found(value: Any, place: str) -> str:
    """A value and where it stands, for a message."""
    return f"{short(value)} as {place}"


def short(value: Any) -> str:
    """A value as it can stand in a line."""
    stored = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(stored, bytes) and stored.startswith(_MAGIC):
        return "an image's bytes"
    try:
        return cut(repr(value[:200] if isinstance(value, (str, bytes)) else value), 80)
    except (ValueError, RecursionError):  # a number of thousands of digits, lists nested a thousand deep
        return f"a {type(value).__name__}"


def cut(text: str, length: int) -> str:
    """The beginning of a text."""
    return text if len(text) <= length else text[: length - 3] + "..."
