"""A row of a known layout becomes conversations, the training items of both stages.

Which layout a row has is read from its columns, never asked for: `LAYOUTS` declares the known ones, and a new one is a
new line there with its reader. A conversation is

    {"images": [reference, ...],
     "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "..."}]}, ...],
     "group": row number, "source": name of the data set, "row": row number}

with one `{"type": "image"}` part for every image, in order, where the image stands. Images stay references
(see `images.py`). A row that does not hold what its columns promise raises one line that says where and what is wrong.
"""

import os
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from PIL import Image


ROLES = ("system", "user", "assistant")
IMAGE_COLUMNS = ("images", "image")
CAPTION_COLUMNS = ("caption", "captions", "text")
CAPTION_CHOICES = ("all", "first", "random")


def conversations_from_row(
    row: dict[str, Any], *, prompt: str = "", caption_choice: str = "all", source: str = "", index: int = 0
) -> list[dict[str, Any]]:
    """The conversations that a row holds: one, or one for each caption of an image.

    Args:
        row: the row as the `datasets` library returns it (absent values are null).
        prompt: the question that a caption answers; empty for stage 1, where a caption stands alone.
        caption_choice: "all" captions of an image, or only the "first". "random" gives all of them, in one `group`:
            which one is learned is chosen anew in each epoch, so it cannot be chosen here.
        source: the data set's name, for messages and accounts.
        index: the row's number in it.

    Raises:
        ValueError: the layout is unknown, or the row does not keep to it.
    """
    if caption_choice not in CAPTION_CHOICES:
        raise ValueError(f"caption_choice is {caption_choice!r}; expected one of {', '.join(CAPTION_CHOICES)}")
    try:
        layout = find_layout(row)
        conversations = layout.read(row, prompt)
    except _Malformed as error:
        place = f"{source}, row {index}" if source else f"row {index}"
        raise ValueError(f"{place}: {error}") from None
    if caption_choice == "first":
        conversations = conversations[:1]
    return [{**conversation, "group": index, "source": source, "row": index} for conversation in conversations]


def _read_messages(row: dict[str, Any], prompt: str) -> list[dict[str, Any]]:
    """`messages` as chat models take them; images without a part of their own open the first user message."""
    images = row_images(row)
    if not isinstance(row["messages"], list) or not row["messages"]:
        raise _Malformed(_found(row["messages"], "messages"), "a list of messages")
    messages = [_message(message, f"message {number}") for number, message in enumerate(row["messages"])]
    image_parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
    if images and not image_parts:
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise _Malformed(f"{len(images)} image(s) and no user message", "a user message to put them into")
        first["content"][:0] = [{"type": "image"} for _ in images]
    if image_parts and len(image_parts) != len(images):
        raise _Malformed(
            f"{len(image_parts)} image part(s) in the messages but {len(images)} image(s) in the row",
            'one {"type": "image"} part for each image, or none at all',
        )
    for number, part in enumerate(image_parts):
        if (index := part.pop("index", number)) != number:
            raise _Malformed(f"image part {number} with index {index!r}", "the images in the order of their parts")
    return [{"images": images, "messages": messages}]


def _read_captions(row: dict[str, Any], prompt: str) -> list[dict[str, Any]]:
    """An image and what is said of it; each caption is the answer of its own conversation."""
    images = row_images(row)
    if not images:
        raise _Malformed("no image", "an image for the caption")
    column = _first_present(row, CAPTION_COLUMNS)
    captions = row[column] if isinstance(row[column], list) else [row[column]]
    if not captions:
        raise _Malformed(f"an empty list in {column}", "at least one caption")
    for caption in captions:
        if not isinstance(caption, str) or not caption.strip():
            raise _Malformed(_found(caption, column), "a text, or a list of texts")
    question = [{"type": "text", "text": prompt}] if prompt else []
    return [
        {
            "images": list(images),
            "messages": [
                {"role": "user", "content": [{"type": "image"} for _ in images] + question},
                # Captions come with stray spaces and line ends (COCO's do), and a model would learn to say them.
                {"role": "assistant", "content": [{"type": "text", "text": caption.strip()}]},
            ],
        }
        for caption in captions
    ]


class Layout(NamedTuple):
    """A known arrangement of columns."""

    description: str
    """The columns, in words, for the message about an unknown layout."""
    fits: Callable[[Collection[str]], bool]
    """Whether a row with these columns (those that are not null) has this layout."""
    read: Callable[[dict[str, Any], str], list[dict[str, Any]]]
    """Row and prompt -> conversations."""


# The first that fits is taken.
LAYOUTS = (
    Layout(
        "messages [+ images or image]",
        lambda columns: "messages" in columns,
        _read_messages,
    ),
    Layout(
        "image + caption, captions or text",
        lambda columns: _any(IMAGE_COLUMNS, columns) and _any(CAPTION_COLUMNS, columns),
        _read_captions,
    ),
)


def find_layout(row: dict[str, Any]) -> Layout:
    """The layout of a row.

    Raises:
        ValueError: no known layout has these columns.
    """
    # A null cell is an absent one; but where that leaves nothing known, the columns' names tell what was meant.
    present = [column for column, value in row.items() if value is not None]
    for columns in (present, list(row)):
        for layout in LAYOUTS:
            if layout.fits(columns):
                return layout
    known = "; ".join(layout.description for layout in LAYOUTS)
    columns = ", ".join(map(str, row)) or "(none)"
    raise _Malformed(f"columns {_cut(columns, 300)}", f"one of the known layouts: {known}")


class _Malformed(ValueError):
    """What is wrong with a row; where it is, the caller adds."""

    def __init__(self, found: str, expected: str):
        super().__init__(" ".join(f"found {found}; expected {expected}".split()))


def _message(message: Any, place: str) -> dict[str, Any]:
    """A message with its content as parts and without null keys."""
    if not isinstance(message, dict):
        raise _Malformed(_found(message, place), "a message with role and content")
    message = _without_nulls(message)
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise _Malformed(f"role {role!r} in {place}", f"one of {', '.join(ROLES)}")
    if not isinstance(message.get("train", True), bool):
        raise _Malformed(_found(message["train"], f"train of {place}"), "true or false")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise _Malformed(_found(content, f"content of {place}"), "a text or a list of parts")
    return {**message, "content": [_part(part, place) for part in content]}


def _part(part: Any, place: str) -> dict[str, str]:
    if isinstance(part, dict):
        part = _without_nulls(part)
        if part.get("type") == "image" and part.keys() <= {"type", "index"}:
            return part
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            return {"type": "text", "text": part["text"]}
    found = f"a part {_short(part)} in {place}"
    raise _Malformed(found, '{"type": "text", "text": ...} or {"type": "image"}, the image itself in the images column')


def row_images(row: dict[str, Any]) -> list[Any]:
    """The image references of a row, in order; none where its image columns are absent or null."""
    column = _first_present(row, IMAGE_COLUMNS)
    value = row.get(column)
    images = list(value) if isinstance(value, list) else [] if value is None else [value]
    for image in images:
        stored = isinstance(image, dict) and (image.get("bytes") is not None or image.get("path"))
        if not stored and not (isinstance(image, (str, os.PathLike, Image.Image)) and image):
            raise _Malformed(_found(image, column), "an image: its path, or its bytes")
    return images


def _first_present(row: dict[str, Any], columns: tuple[str, ...]) -> str:
    """The first of these columns that holds something, else the first that the row has at all."""
    there = [column for column in columns if column in row]
    return next((column for column in there if row[column] is not None), there[0] if there else columns[0])


def _any(columns: tuple[str, ...], present: Collection[str]) -> bool:
    return any(column in present for column in columns)


def _without_nulls(mapping: dict[str, Any]) -> dict[str, Any]:
    """`datasets` gives every struct in a column the same keys and fills them with null."""
    return {key: value for key, value in mapping.items() if value is not None}


def _found(value: Any, place: str) -> str:
    return f"{_short(value)} as {place}"


def _short(value: Any) -> str:
    return _cut(repr(value), 80)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
