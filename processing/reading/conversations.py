"""A row of a known layout becomes conversations, the training items of both stages.

Which layout a row has is read from its columns, never asked for (see `layouts`). A conversation is

    {"images": [reference, ...],
     "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "..."}]}, ...],
     "group": row number, "source": name of the data set, "row": row number}

with one `{"type": "image"}` part for every image, in order, where the image stands; images that the row gives no place
open the first user message. A message may have `train` (false: its tokens are not learned) and `weight` (of its tokens
in the loss). Images stay references (see `image_files_vlm`). A row that does not hold what its columns promise, or that
speaks of an image of which none can be read, raises one line that says where and what is wrong.

A null cell or key is an absent one, and an empty list gives way to another column for the same thing. A number where a
column holds a question, an answer, a caption or another text is the text that Python writes for it. What a row says is
kept as it is: a last user turn without an answer is context; two turns of one role in a row stay two; an empty answer
stays, its end token is what is learned; a message may hold images only. A conversation without any answer is read too,
and dropped where nothing of it can be learned (see `encoding`). What is not read is named in `notes`.
"""

import functools
from collections.abc import Collection
from typing import Any, NotRequired, Required, TypedDict, cast

from ..data_error_vlm import DuetError, printable
from ..image_files_vlm import NO_FOLDER, ImagePolicy, resolve_reference
from .cells import IGNORED, MalformedRow, Row, cut, holds_something, is_nothing, malformed
from .layouts import (
    CAPTION_COLUMNS,
    CHOICE_ANSWERS,
    ID_COLUMNS,
    IMAGE_COLUMNS,
    LAYOUTS,
    NAMES,
    Wanted,
    captions_of,
    find_layout,
    fitting,
    is_numbered_image,
    relatives,
    with_numbered_images,
)


CAPTION_CHOICES = ("all", "first", "random")

ROW = "__row"
"""The column of each row's number in its split as it is stored, before any of its rows are chosen or held out."""

ODD = "__odd"
"""The column of what is odd about a row: why it could not be read (a text), or all of a row that fits no column."""


class Conversation(TypedDict, total=False):
    """A training item: what is said, the images in it, and what evaluation and accounts have to know of it."""

    images: Required[list[Any]]
    messages: Required[list[dict[str, Any]]]
    group: int | str
    source: str
    row: int | str | None
    answers: list[str]
    choices: list[str]
    kind: str
    subset: str
    id: str
    notes: list[str]


class Dropped(TypedDict):
    """An item in the place of a row, or of a part of one, that no conversation can be made of: why, and the detail."""

    source: str
    row: int | str | None
    dropped: tuple[str, str]
    notes: NotRequired[list[str]]


def conversations_from_row(
    row: dict[str, Any],
    *,
    prompt: str = "",
    caption_choice: str = "all",
    choice_answer: str = "letter",
    source: str = "",
    index: int | str = 0,
    columns: dict[str, str] | None = None,
    images: ImagePolicy = NO_FOLDER,
) -> list[Conversation | Dropped]:
    """The conversations that a row holds: one, or one for each caption of an image.

    Args:
        row: the row as the `datasets` library returns it (absent values are null).
        prompt: the question that a caption answers; empty for stage 1, where a caption stands alone.
        caption_choice: "all" captions of an image, or only the "first". "random" gives all of them, in one `group`:
            which one is learned is chosen anew in each epoch, so it cannot be chosen here.
        choice_answer: what answers a multiple choice, the "letter" of the right option or its "text".
        source: the data set's name, for messages and accounts.
        index: the row's number in it.
        columns: a name of `LAYOUTS`, or image_1, image_2, ... -> the data set's column for it, where that has names of
            its own. A column goes by that name alone, and what is named here is preferred to what is recognised. A
            column of the data set -> "ignore" says that it is none of the row's content (`image`: that tags in the row
            are text).
        images: where image references may lead.

    Returns:
        conversations; a caption of several that is none has a `Dropped` in its place where all are asked for.

    Raises:
        MalformedRow: the layout is unknown, or the row does not keep to it.
        DuetError: `caption_choice`, `choice_answer` or a name in `columns` is none that is known.
    """
    if caption_choice not in CAPTION_CHOICES:
        raise DuetError(f"caption_choice is {caption_choice!r}; expected one of {', '.join(CAPTION_CHOICES)}")
    if choice_answer not in CHOICE_ANSWERS:
        raise DuetError(f"choice_answer is {choice_answer!r}; expected one of {', '.join(CHOICE_ANSWERS)}")
    columns = columns or {}
    where = f"{source}, row {index}" if source else f"row {index}"
    row = whole_row(row)
    try:
        if row.get(ODD) is not None:
            raise MalformedRow(str(row[ODD]))
        named = _renamed(*_with_json(row), columns)
        known: dict[str, Any] = _known(named)
        read = find_layout(named, columns).read(named, Wanted(prompt, choice_answer))
        _check_count(read, row, columns)
        notes = list(map(printable, named.notes(any(item.get("images") for item in read))))
        if caption_choice != "all" and any("dropped" in item for item in read):
            read = [item for item in read if "dropped" not in item]
            notes.append("a caption beside it is none")
        if caption_choice == "first":
            read = read[:1]
        for item in read:
            if "dropped" not in item:
                item["images"] = [_resolved(image, images) for image in item["images"]]
    except MalformedRow as error:
        raise MalformedRow(f"{where}: {error}") from None
    known = {**known, "notes": notes} if notes else known
    return [
        Dropped(source=source, row=index, dropped=("malformed row", f"{where}: {item['dropped']}"))
        if "dropped" in item
        else cast(Conversation, {**item, "group": index, "source": source, "row": index, **known})
        for item in read
    ]


def whole_row(row: dict[str, Any]) -> dict[str, Any]:
    """The row, taken out of the column `ODD` where it stands in there."""
    if not isinstance(row.get(ODD), dict):
        return row
    return {**row[ODD], ROW: row[ROW]} if ROW in row else row[ODD]


def caption_column(column_names: Collection[str], columns: dict[str, str] | None = None) -> str | None:
    """The column that says how many conversations a row gives, by `caption_count` of its cell.

    None where every row gives one, whatever it holds. It follows from the names alone, and `conversations_from_row`
    refuses a row that would not keep to it. For `columns` and what is raised see there.
    """
    return _caption_column(tuple(column_names), tuple((columns or {}).items()))


@functools.lru_cache(maxsize=256)
def _caption_column(column_names: tuple[str, ...], pairs: tuple[tuple[str, str], ...]) -> str | None:
    columns = dict(pairs)
    if "json" in column_names:  # what it holds, only a row says
        columns = {name: column for name, column in columns.items() if column in (*column_names, IGNORED)}
    named = _renamed({name: name for name in column_names}, [], columns)
    layout = fitting(named.cells, columns)
    return named.take(CAPTION_COLUMNS)[1] if layout is LAYOUTS[-1] else None


def caption_count(cell: Any) -> int:
    """How many conversations a row gives whose captions are this cell: one for each, and one where there is none."""
    return max(1, len(captions_of(cell)))


def _check_count(read: list[dict[str, Any]], row: dict[str, Any], columns: dict[str, str]) -> None:
    """Refuse a row with another number of conversations than the names of its columns promise."""
    column = caption_column(row, columns)
    promised = 1 if column is None else caption_count(row.get(column))
    if len(read) != promised:
        raise malformed(
            f"{len(read)} captions in a row whose columns may be another layout, too",
            "one caption a row there, or such rows in a file of their own with the captions in the column caption",
        )


# --- the columns of a row


def _with_json(row: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The row and what the `json` of its WebDataset sample adds to it; what the row has already, it keeps."""
    if not isinstance(row.get("json"), dict):
        return row, []
    taken = relatives(name for name, value in row.items() if holds_something(value))
    cells = {name: value for name, value in row.items() if name != "json"}
    doubled = [name for name, value in row["json"].items() if name in taken and holds_something(value)]
    added = {name: value for name, value in row["json"].items() if name not in taken}
    return {**cells, **added}, [f"the key {name} of json is not read" for name in doubled]


def _renamed(row: dict[str, Any], notes: list[str], columns: dict[str, str]) -> Row:
    """
    The row with each column of `columns` under its name there alone.

    Columns that begin with two underscores are none of its content (`__key__` in a WebDataset, `ROW`).
    """
    ignored = {name for name, column in columns.items() if column == IGNORED}
    columns = {name: column for name, column in columns.items() if name not in ignored}
    numbered = [name for name in columns if is_numbered_image(name)]
    if unknown := [name for name in columns if name not in NAMES and name not in numbered]:
        raise DuetError(f"columns has {unknown[0]!r}; expected one of {', '.join(sorted(NAMES))}")
    if missing := [column for column in columns.values() if column not in row]:
        names = ", ".join(str(name) for name in row if not str(name).startswith("__")) or "(none)"
        raise malformed(f"columns {cut(names, 300)}", f"the column {missing[0]!r} that was given")
    left_out = relatives([*columns, *(IMAGE_COLUMNS if numbered else ())]) | set(columns.values())
    kept = {
        name: value
        for name, value in row.items()
        if name not in left_out and name not in ignored and not str(name).startswith("__")
    }
    if columns:
        passed = [name for name in row if name in left_out and name not in columns.values()]
        notes = [*notes, *(f"the column {name} is not read" for name in passed if not is_nothing(row[name]))]
    cells = {**kept, **{name: row[column] for name, column in columns.items()}}
    if columns.keys().isdisjoint(IMAGE_COLUMNS):
        cells = with_numbered_images(cells)
    return Row(cells, notes, ignored, tags_are_text=not ignored.isdisjoint(IMAGE_COLUMNS))


def _known(row: Row) -> dict[str, str]:
    """What a row says of itself, for evaluation: its kind, its subset, and its own id."""
    known = {}
    for key, names in (("kind", ("kind",)), ("subset", ("subset",)), ("id", ID_COLUMNS)):
        column, value = row.take_said(names)
        if column:
            known[key] = str(value)
    return known


# --- images


def _resolved(image: Any, images: ImagePolicy) -> Any:
    try:
        return resolve_reference(image, images)
    except ValueError as error:
        raise MalformedRow(" ".join(str(error).split())) from None
