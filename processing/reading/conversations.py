"""A row of a known layout becomes conversations, the training items of both stages.

Which layout a row has is read from its columns, never asked for: `LAYOUTS` declares the known ones, and a new one is a
new entry there with its reader. A conversation is

    {"images": [reference, ...],
     "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "..."}]}, ...],
     "group": row number, "source": name of the data set, "row": row number}

with one `{"type": "image"}` part for every image, in order, where the image stands; images that the row gives no place
open the first user message. A message may have `train` (false: its tokens are not learned) and `weight` (of its tokens
in the loss). Images stay references (see `images.py`). A row that does not hold what its columns promise raises one
line that says where and what is wrong.

A null cell or key is an absent one, and an empty list gives way to another column for the same thing. A number where a
column holds a question, an answer, a caption or another text is the text that Python writes for it. What a row says is
kept as it is: a last user turn without an answer is context; two turns of one role in a row stay two; an empty answer
stays, its end token is what is learned; a message may hold images only. A conversation without any answer is read too,
and dropped where nothing of it can be learned (see `encoding.py`).
"""

import difflib
import functools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, Required, TypedDict

from PIL import Image

from ..data_error_vlm import DuetError
from ..image_files_vlm import resolve_reference


ROLES = ("system", "user", "assistant")
CAPTION_CHOICES = ("all", "first", "random")

MAX_WEIGHT = 1e6
"""How much more than others a message may weigh; far below what a loss in 32 bits overflows at."""

ROW = "__row"
"""The column of each row's number in its split as it is stored, before any of its rows are chosen or held out."""

# Names for the same thing: the first that holds something is read. The last ones of images and captions are what the
# files of a WebDataset sample end in.
IMAGE_COLUMNS = ("images", "image", "jpg", "jpeg", "png", "webp")
CAPTION_COLUMNS = ("caption", "captions", "text", "txt")
CONVERSATION_COLUMNS = ("conversations", "conversation")
SYSTEM_COLUMNS = ("system", "system_prompt")
ANSWER_COLUMNS = ("answer", "multiple_choice_answer", "answers")
_FAMILIES = (IMAGE_COLUMNS, CAPTION_COLUMNS, CONVERSATION_COLUMNS, SYSTEM_COLUMNS, ANSWER_COLUMNS)

# The speakers of `conversations`.
_SPEAKERS = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "bot", "chatgpt", "model"), "assistant"),
}

_NO_PATH = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)

# LLaVA sets a line end between the image and the text; it belongs to neither.
_PLACEHOLDER = re.compile(r"\n?<image>\n?")


class Conversation(TypedDict, total=False):
    """A training item: what is said, the images in it, and what evaluation and accounts have to know of it."""

    images: Required[list[Any]]
    messages: Required[list[dict[str, Any]]]
    group: int | str
    source: str
    row: int | str | None
    answers: list[str]
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


class MalformedRow(DuetError):
    """A row that no conversation can be read from; one line: where it is, what was found, what was expected."""


def conversations_from_row(
    row: dict[str, Any],
    *,
    prompt: str = "",
    caption_choice: str = "all",
    source: str = "",
    index: int = 0,
    columns: dict[str, str] | None = None,
    image_dir: Path | str | None = None,
    allow_urls: bool = False,
    own_paths: bool = False,
) -> list[dict[str, Any]]:
    """The conversations that a row holds: one, or one for each caption of an image.

    Args:
        row: the row as the `datasets` library returns it (absent values are null).
        prompt: the question that a caption answers; empty for stage 1, where a caption stands alone.
        caption_choice: "all" captions of an image, or only the "first". "random" gives all of them, in one `group`:
            which one is learned is chosen anew in each epoch, so it cannot be chosen here.
        source: the data set's name, for messages and accounts.
        index: the row's number in it.
        columns: a name of `LAYOUTS` -> the data set's column for it, where the data set has names of its own. A column
            goes by that name alone, and what is named here is preferred to what is recognised.
        image_dir, allow_urls: where image references may lead, see `images.resolve_reference`.
        own_paths: whether the row is the caller's own, so that without a folder its paths may lead anywhere, relative
            ones from the working directory.

    Raises:
        MalformedRow: the layout is unknown, or the row does not keep to it.
        ValueError: `caption_choice` or a name in `columns` is none that is known.
    """
    if caption_choice not in CAPTION_CHOICES:
        raise DuetError(f"caption_choice is {caption_choice!r}; expected one of {', '.join(CAPTION_CHOICES)}")
    columns = columns or {}
    try:
        named = _renamed(_with_json(row), columns)
        conversations = find_layout(named, columns).read(named, prompt)
        _check_count(conversations, row, columns)
        if caption_choice == "first":
            conversations = conversations[:1]
        for conversation in conversations:
            images = conversation["images"]
            conversation["images"] = [_resolved(image, image_dir, allow_urls, own_paths) for image in images]
    except MalformedRow as error:
        place = f"{source}, row {index}" if source else f"row {index}"
        raise MalformedRow(f"{place}: {error}") from None
    return [{**conversation, "group": index, "source": source, "row": index} for conversation in conversations]


def caption_column(column_names: Collection[str], columns: dict[str, str] | None = None) -> str | None:
    """The column that says how many conversations a row gives: one for each element of its list, else one.

    An empty list is as none at all. None where every row gives one, whatever it holds. It follows from the names alone,
    and `conversations_from_row` refuses a row that would not keep to it. For `columns` and what is raised see there.
    """
    columns = columns or {}
    named = _column_of_each_name(column_names, columns)
    layout = _fitting(named, columns)
    return named[_first_present(named, CAPTION_COLUMNS)] if layout and layout.read is _read_captions else None


# --- the layouts


def _read_messages(row: dict[str, Any], prompt: str) -> list[dict[str, Any]]:
    """`messages` as chat models take them."""
    return [_conversation(_messages(_items(row, "messages"), "message"), row_images(row))]


def _read_completion(row: dict[str, Any], prompt: str) -> list[dict[str, Any]]:
    """TRL's `prompt` and `completion`, texts or lists of messages; what is learned is the completion."""
    given, learned = (
        [_said(role, row[column], column)]
        if isinstance(row[column], (str, int, float))
        else _messages(_items(row, column, "a text or a list of messages"), f"{column} message")
        for column, role in (("prompt", "user"), ("completion", "assistant"))
    )
    for message in given:
        if message["role"] == "assistant":
            message.setdefault("train", False)
    return [_conversation(given + learned, row_images(row))]


def _read_conversations(row: dict[str, Any], prompt: str) -> list[dict[str, Any]]:
    """
    LLaVA's and ShareGPT's turns of `from` and `value`, or of `role` and `content`.

    In a row with images each `<image>` of a user or system turn is an image's place (an answer holds no image); in a
    row without, it is text. A `system` column opens the conversation, unless that has a system turn of its own.
    """
    images = row_images(row)
    turns = _items(row, _first_present(row, CONVERSATION_COLUMNS), "a list of turns")
    messages = [_turn(turn, f"turn {number}") for number, turn in enumerate(turns)]
    system = next((row[name] for name in SYSTEM_COLUMNS if row.get(name) not in (None, "")), None)
    if system is not None and all(message["role"] != "system" for message in messages):
        messages.insert(0, _said("system", system, "system"))
    if images:
        asked = [message for message in messages if message["role"] != "assistant"]
        places = sum(len(_PLACEHOLDER.findall(part.get("text", ""))) for m in asked for part in m["content"])
        if places and places != len(images):
            raise _malformed(
                f"{places} <image> in the turns but {len(images)} image(s) in the row",
                "one <image> for each image, or none at all",
            )
        for message in asked:
            message["content"] = [piece for part in message["content"] for piece in _pieces(part)]
    return [_conversation(messages, images)]


def _read_pairs(row: dict[str, Any], prompt: str) -> list[dict[str, Any]]:
    """The `texts` of the_cauldron and FineVision: pairs of what the user and the assistant say."""
    messages = []
    for number, pair in enumerate(_items(row, "texts", "a list of pairs of user and assistant")):
        if not isinstance(pair, dict):
            raise _malformed(_found(pair, f"texts {number}"), "a pair of user and assistant")
        messages += [_said(role, pair.get(role), f"{role} of texts {number}") for role in ("user", "assistant")]
    return [_conversation(messages, row_images(row))]


def _read_question(row: dict[str, Any], prompt: str) -> list[dict[str, Any]]:
    """
    A question and its answer; of several answers (VQAv2, TextVQA) the one most often given, the first among equals.

    VQAv2's own choice among its answers, `multiple_choice_answer`, goes before ours.
    """
    column = _first_present(row, ANSWER_COLUMNS)
    answers = row.get(column)
    if isinstance(answers, dict):  # a list of structs, as `datasets` stores it where it was declared as a sequence
        answers = answers.get("answer")
    if not isinstance(answers, list):
        answers = [answers]
    if not answers:
        raise _malformed(f"an empty list in {column}", "at least one answer")
    counts = Counter(_text(answer.get("answer") if isinstance(answer, dict) else answer, column) for answer in answers)
    answer = max(counts, key=counts.__getitem__)  # the first, as a Counter keeps the order in which they came
    messages = [_said("user", row["question"], "question"), _said("assistant", answer, column)]
    return [_conversation(messages, row_images(row))]


def _read_captions(row: dict[str, Any], prompt: str) -> list[dict[str, Any]]:
    """An image and what is said of it; each caption is the answer of its own conversation."""
    images = row_images(row)
    if not images:
        raise _malformed("no image", "an image for the caption")
    column = _first_present(row, CAPTION_COLUMNS)
    captions = row[column] if isinstance(row[column], list) else [row[column]]
    if not captions:
        raise _malformed(f"an empty list in {column}", "at least one caption")
    captions = [_text(caption, column, "a text, or a list of texts") for caption in captions]
    for caption in captions:
        if not caption.strip():
            raise _malformed(_found(caption, column), "a text, or a list of texts")
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
    needs: tuple[tuple[str, ...], ...]
    """The columns that make it: one of each family."""
    read: Callable[[dict[str, Any], str], list[dict[str, Any]]]
    """Row and prompt -> conversations."""

    def fits(self, names: Collection[str]) -> bool:
        """Whether these names are enough."""
        return all(any(name in names for name in family) for family in self.needs)

    def is_named(self, names: Collection[str]) -> bool:
        """Whether one of these names is what this layout differs from others by."""
        return any(name in family for name in names for family in self.needs if family is not IMAGE_COLUMNS)

    def likeness(self, names: Iterable[str]) -> tuple[int, float]:
        """How near these names come to what it needs: how much of it they are, and how alike the rest is, up to 1."""
        closest = [
            max(difflib.SequenceMatcher(None, name.lower(), wanted).ratio() for name in names for wanted in family)
            for family in self.needs
        ]
        return closest.count(1.0), sum(closest) / len(closest)


# The first that fits is taken. Captions come last: `text` is a name that a column of any data set may have.
LAYOUTS = (
    Layout("messages [+ images or image]", (("messages",),), _read_messages),
    Layout("prompt + completion [+ images or image]", (("prompt",), ("completion",)), _read_completion),
    Layout("conversations [+ system, image or images]", (CONVERSATION_COLUMNS,), _read_conversations),
    Layout("texts (user and assistant) [+ images]", (("texts",),), _read_pairs),
    Layout("question + answer or answers [+ image]", (("question",), ANSWER_COLUMNS), _read_question),
    Layout("image + caption, captions or text", (IMAGE_COLUMNS, CAPTION_COLUMNS), _read_captions),
)

_NAMES = {name for layout in LAYOUTS for family in layout.needs for name in family} | {*IMAGE_COLUMNS, *SYSTEM_COLUMNS}


def find_layout(row: dict[str, Any], preferred: Collection[str] = ()) -> Layout:
    """The layout of a row, where two fit one with a `preferred` column.

    Raises:
        MalformedRow: no known layout has these columns.
    """
    # An empty cell is an absent one; but where that leaves nothing known, the columns' names tell what was meant.
    present = [name for name, value in row.items() if _holds_something(value)]
    layout = _fitting(present, preferred) or _fitting(row, preferred)
    if layout is None:
        names = tuple(str(name) for name in row)
        raise _malformed(
            f"columns {_cut(', '.join(names) or '(none)', 300)}",
            f"a known layout, such as {_nearest(names)}; other names for these are given as columns",
        )
    return layout


@functools.lru_cache(maxsize=64)  # comparing takes milliseconds, and what one row lacks, all of its data set do
def _nearest(names: tuple[str, ...]) -> str:
    """The three layouts that these names come nearest to, in words."""
    nearest = sorted(LAYOUTS, key=lambda layout: layout.likeness(names or ("",)), reverse=True)[:3]
    return "; ".join(layout.description for layout in nearest)


def _fitting(names: Collection[str], preferred: Collection[str]) -> Layout | None:
    fitting = [layout for layout in LAYOUTS if layout.fits(names)]
    return next((layout for layout in fitting if layout.is_named(preferred)), fitting[0] if fitting else None)


def _check_count(conversations: list[dict[str, Any]], row: dict[str, Any], columns: dict[str, str]) -> None:
    """Refuse a row with another number of conversations than the names of its columns promise."""
    captions = row.get(caption_column(row, columns))
    promised = len(captions) if isinstance(captions, list) and captions else 1
    if len(conversations) != promised:
        raise _malformed(
            f"{len(conversations)} conversation(s) where the columns promise {promised}",
            "several captions in a column of their own, named as caption in columns where there are other layouts too",
        )


# --- the columns of a row


def _with_json(row: dict[str, Any]) -> dict[str, Any]:
    """The row and what the `json` of its WebDataset sample adds to it; what the row has already, it keeps."""
    if not isinstance(row.get("json"), dict):
        return row
    taken = _relatives(name for name, value in row.items() if _holds_something(value))
    return {**row, **{name: value for name, value in row["json"].items() if name not in taken}}


def _renamed(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """
    The row with each column of `columns` under its name there alone.

    Columns that begin with two underscores are none of its content (`__key__` in a WebDataset, `ROW`).
    """
    if unknown := [name for name in columns if name not in _NAMES]:
        raise DuetError(f"columns has {unknown[0]!r}; expected one of {', '.join(sorted(_NAMES))}")
    if missing := [column for column in columns.values() if column not in row]:
        names = ", ".join(str(name) for name in row if not str(name).startswith("__")) or "(none)"
        raise _malformed(f"columns {_cut(names, 300)}", f"the column {missing[0]!r} that was given")
    left_out = _relatives(columns) | set(columns.values())
    kept = {name: row[name] for name in row if name not in left_out and not str(name).startswith("__")}
    return {**kept, **{name: row[column] for name, column in columns.items()}}


def _column_of_each_name(column_names: Collection[str], columns: dict[str, str]) -> dict[str, str]:
    """The names that a row's columns go by -> the data set's columns."""
    if "json" in column_names:  # what it holds, only a row says
        columns = {name: column for name, column in columns.items() if column in column_names}
    return _renamed({name: name for name in column_names}, columns)


def _relatives(names: Iterable[str]) -> set[str]:
    """These names and all that mean the same as one of them."""
    names = set(names)
    return names.union(*(family for family in _FAMILIES if not names.isdisjoint(family)))


def _first_present(row: dict[str, Any], columns: tuple[str, ...]) -> str:
    """The first of these columns that holds something, else the first that the row has at all."""
    there = [column for column in columns if column in row]
    return next((column for column in there if _holds_something(row[column])), there[0] if there else columns[0])


def _holds_something(value: Any) -> bool:
    return value is not None and not (isinstance(value, list) and not value)


def _items(row: dict[str, Any], column: str, expected: str = "a list of messages") -> list[Any]:
    """The elements of a column that holds a list, or the JSON of one, which parquet files often have instead."""
    value = row[column]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            pass  # the message shows the text itself
    if not isinstance(value, list) or not value:
        raise _malformed(_found(row[column], column), expected)
    return value


# --- images


def row_images(row: dict[str, Any]) -> list[Any]:
    """The image references of a row, in order, as they stand there; none where its image columns are absent or null."""
    column = _first_present(row, IMAGE_COLUMNS)
    value = row.get(column)
    images = list(value) if isinstance(value, list) else [] if value is None else [value]
    for image in images:
        _check_reference(image, column)
    return images


def _check_reference(image: Any, place: str) -> None:
    content, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (None, image)
    if isinstance(image, Image.Image) or isinstance(content, bytes):
        return
    if content is not None or not isinstance(path, (str, os.PathLike)) or path == "":
        raise _malformed(_found(image, place), "an image: its path, or its bytes")


def _resolved(image: Any, image_dir: Path | str | None, allow_urls: bool, own_paths: bool) -> Any:
    path = image.get("path") if isinstance(image, dict) and image.get("bytes") is None else image
    if own_paths and image_dir is None and isinstance(path, (str, os.PathLike)) and not _NO_PATH.match(str(path)):
        image = os.path.realpath(path)
        image_dir = os.path.dirname(image)
    try:
        return resolve_reference(image, image_dir, allow_urls)
    except ValueError as error:
        raise MalformedRow(" ".join(str(error).split())) from None


def _conversation(messages: list[dict[str, Any]], images: list[Any]) -> dict[str, Any]:
    """Messages and the images of their parts; images without a part open the first user message."""
    parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
    own = [part.pop("reference") for part in parts if "reference" in part]
    if own and (images or len(own) != len(parts)):
        raise _malformed(
            f"{len(own)} image part(s) with an image, {len(parts) - len(own)} without, and {len(images)} image(s) "
            "in a column",
            "all images in the parts, or all in the column",
        )
    images = images or own
    if images and not parts:
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise _malformed(f"{len(images)} image(s) and no user message", "a user message to put them into")
        first["content"][:0] = [{"type": "image"} for _ in images]
    if parts and len(parts) != len(images):
        raise _malformed(
            f"{len(parts)} image part(s) in the messages but {len(images)} image(s) in the row",
            'one {"type": "image"} part for each image, or none at all',
        )
    for number, part in enumerate(parts):
        if (index := part.pop("index", number)) != number:
            raise _malformed(f"image part {number} with index {_short(index)}", "images in the order of their parts")
    return {"images": images, "messages": messages}


# --- messages and their parts


def _messages(messages: list[Any], place: str) -> list[dict[str, Any]]:
    return [_message(message, f"{place} {number}") for number, message in enumerate(messages)]


def _message(message: Any, place: str) -> dict[str, Any]:
    """A message with its content as parts and without null keys."""
    if not isinstance(message, dict):
        raise _malformed(_found(message, place), "a message with role and content")
    message = _without_nulls(message)
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise _malformed(f"role {_short(role)} in {place}", f"one of {', '.join(ROLES)}")
    if not isinstance(message.get("train", True), bool):
        raise _malformed(_found(message["train"], f"train of {place}"), "true or false")
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= MAX_WEIGHT:
        raise _malformed(_found(weight, f"weight of {place}"), f"a number, at least 0 and at most {MAX_WEIGHT:,.0f}")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise _malformed(_found(content, f"content of {place}"), "a text or a list of parts")
    return {**message, "content": [_part(part, place) for part in content]}


def _turn(turn: Any, place: str) -> dict[str, Any]:
    """A turn of `conversations` as a message."""
    if not isinstance(turn, dict):
        raise _malformed(_found(turn, place), "a turn with from and value")
    turn = _without_nulls(turn)
    speaker = turn.get("from", turn.get("role"))
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise _malformed(f"role {_short(speaker)} in {place}", f"one of {', '.join(_SPEAKERS)}")
    message = {"role": _SPEAKERS[speaker], "content": turn.get("value", turn.get("content"))}
    return _message({**message, "train": turn.get("train"), "weight": turn.get("weight")}, place)


def _said(role: str, text: Any, place: str) -> dict[str, Any]:
    """A message of one text."""
    return {"role": role, "content": [{"type": "text", "text": _text(text, place)}]}


def _text(value: Any, place: str, expected: str = "a text") -> str:
    """A text, or a number as Python writes it; one that is not finite stands for a value that is missing."""
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            value = str(value)
    except (OverflowError, ValueError):
        pass  # a number of thousands of digits, which the message cannot write either
    if not isinstance(value, str):
        raise _malformed(_found(value, place), expected)
    return value


def _part(part: Any, place: str) -> dict[str, Any]:
    """A part without null keys; the image that an image part carries, in whatever form, is its `reference`."""
    given = _without_nulls(part) if isinstance(part, dict) else {}
    kind = given.pop("type", None)
    if kind == "text" and isinstance(given.get("text"), str):
        return {"type": "text", "text": given["text"]}
    index = {"index": given.pop("index")} if "index" in given else {}
    if kind == "image_url" and isinstance(given.get("image_url"), dict):  # as OpenAI's API takes it
        given = {"url": given["image_url"].get("url")}
    elif kind == "image_url":
        given = {"url": given.get("image_url")}
    if kind not in ("image", "image_url") or len(given) > 1 or not given.keys() <= {"image", "path", "url", "base64"}:
        raise _malformed(
            f"a part {_short(part)} in {place}",
            '{"type": "text", "text": ...} or {"type": "image"}, the image in the part or in the images column',
        )
    if not given:
        return {"type": "image", **index}
    ((key, reference),) = given.items()
    _check_reference(reference, f"image in {place}")
    if key == "base64" and isinstance(reference, str) and not reference.startswith("data:"):
        reference = f"data:image/*;base64,{reference}"
    return {"type": "image", **index, "reference": reference}


def _pieces(part: dict[str, Any]) -> list[dict[str, Any]]:
    """A part as the parts that it is with its `<image>` read as places of images."""
    if part["type"] != "text":
        return [part]
    first, *others = _PLACEHOLDER.split(part["text"])
    pieces = [{"type": "text", "text": first}] if first or not others else []
    for text in others:
        pieces += [{"type": "image"}, {"type": "text", "text": text}] if text else [{"type": "image"}]
    return pieces


def _without_nulls(mapping: dict[str, Any]) -> dict[str, Any]:
    """`datasets` gives every struct in a column the same keys and fills them with null."""
    return {key: value for key, value in mapping.items() if value is not None}


# --- messages about what is wrong


def _malformed(found: str, expected: str) -> MalformedRow:
    """What is wrong with a row; where it is, `conversations_from_row` adds."""
    return MalformedRow(" ".join(f"found {found}; expected {expected}".split()))


def _found(value: Any, place: str) -> str:
    return f"{_short(value)} as {place}"


def _short(value: Any) -> str:
    try:
        return _cut(repr(value), 80)
    except (ValueError, RecursionError):  # a number of thousands of digits, lists nested a thousand deep
        return f"a {type(value).__name__}"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
