"""Messages, turns and their parts as a conversation has them, each image in its place.

What is special: a message is read in whatever words it comes (`role` and `content` or `from` and `value`, `human` or
`USER`, parts or a text), and a tag in what is asked (`<image>`, `<image 1>`, `<|image_1|>`, `<img>a.png</img>`) is the
place of an image where there are as many as images. An answer holds no image: a tag in it is text.
"""

import math
import os
import re
from collections.abc import Callable
from typing import Any

from PIL import Image

from .cells import Row, found, is_encoded_picture, is_nothing, is_picture, malformed, short, speaks_of_image


ROLES = ("system", "user", "assistant")

MAX_WEIGHT = 1e6
"""How much more than others a message may weigh; far below what a loss in 32 bits overflows at."""

# Who speaks, in any case of letters.
_SPEAKERS = {
    "system": "system",
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "bot", "chatgpt", "model", "ai"), "assistant"),
    "developer": "system",
}

_REFERENCES = {"image", "path", "url", "base64"}

# LLaVA sets a line end between the image and the text; it belongs to neither.
_TAG = re.compile(
    r"\n?<image>\n?|<(?:image[ _-]?(?P<number>\d+)|\|image_(?P<numbered>\d+)\||\|image(?:_pad)?\||image_placeholder"
    r"|ImageHere|img>(?P<path>[^<>\n]{1,2000})</img)>"
)
_LIKE_A_TAG = re.compile(r"<\|?[Ii]m")


# --- messages


def read_messages(row: Row, given: list[Any], kind: str, place: str = "") -> list[dict[str, Any]]:
    """
    Messages with their contents as parts and without null keys; an image that a part carries is its `reference`.

    Args:
        row: what is told of the keys that are not read.
        given: the messages as the row has them.
        kind: "message", of which further keys are left to the chat template, or "turn", of which they are not read.
        place: what to call them in a message about what is wrong.
    """
    return [_message(row, message, kind, f"{place or kind} {number}") for number, message in enumerate(given)]


def _message(row: Row, given: Any, kind: str, place: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        keys = "role and content" if kind == "message" else "from and value"
        raise malformed(found(given, place), f"a {kind} with {keys}")
    message = without_nulls(given)
    speaker = message.pop("role") if "role" in message else message.pop("from", None)
    content = message.pop("content") if "content" in message else message.pop("value", None)
    role = _SPEAKERS.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if role is None:
        raise malformed(f"role {short(speaker)} in {place}", f"one of {', '.join(_SPEAKERS)}")
    if "loss" in message and "train" not in message:  # as ms-swift says it
        message["train"] = _truth(message.pop("loss"), f"loss of {place}")
    read: dict[str, Any] = {"role": role, "content": _parts(row, content, place)}
    if "train" in message:
        read["train"] = _truth(message.pop("train"), f"train of {place}")
    if "weight" in message:
        weight = read["weight"] = message.pop("weight")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= MAX_WEIGHT:
            raise malformed(found(weight, f"weight of {place}"), f"a number, at least 0 and at most {MAX_WEIGHT:,.0f}")
    for key, value in message.items():
        row.leave(f"a {kind}", key, value, "is left to the chat template" if kind == "message" else "is not read")
    return {**message, **read} if kind == "message" else read


def _truth(value: Any, place: str) -> bool:
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        raise malformed(found(value, place), "true or false")
    return bool(value)


def said(role: str, content: Any, place: str) -> dict[str, Any]:
    """A message of one text."""
    return {"role": role, "content": [{"type": "text", "text": as_text(content, place)}]}


def as_text(value: Any, place: str, expected: str = "a text") -> str:
    """A text, or a number as Python writes it; one that is not finite stands for a value that is missing."""
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            value = str(value)
    except (OverflowError, ValueError):
        pass  # a number of thousands of digits, which the message cannot write either
    if not isinstance(value, str):
        raise malformed(found(value, place), expected)
    return value


def _parts(row: Row, content: Any, place: str) -> list[dict[str, Any]]:
    if isinstance(content, dict):
        content = [content]
    if isinstance(content, list):
        return [_part(row, part, place) for part in content]
    text = as_text(content, f"content of {place}", "a text or a list of parts")
    return [{"type": "text", "text": text}]


def _part(row: Row, part: Any, place: str) -> dict[str, Any]:
    """A part without null keys; the image that an image part carries, in whatever form, is its `reference`."""
    given = without_nulls(part) if isinstance(part, dict) else {}
    kind = given.pop("type", None)
    if kind is None and len(given) == 1:  # as Qwen writes them
        kind = next(iter(given))
    if kind == "text" and isinstance(given.get("text"), (str, int, float)):
        for key, value in given.items():
            if key != "text":
                row.leave("a part", key, value)
        return {"type": "text", "text": as_text(given["text"], f"text of {place}")}
    index = {"index": given.pop("index")} if "index" in given else {}
    if kind == "image_url":  # as OpenAI's API takes it
        url = given.pop("image_url", None)
        if isinstance(url, dict):
            given, url = {**given, **url}, url.get("url")
        for key, value in given.items():
            if key != "url":
                row.leave("an image part", key, value)
        given = {"url": url}
    elif kind == "image":  # what else a part says (Qwen's min_pixels) costs no image
        for key in [key for key, value in given.items() if key not in _REFERENCES and _is_setting(key, value)]:
            row.leave("an image part", key, given.pop(key))
    if kind not in ("image", "image_url") or len(given) > 1 or not given.keys() <= _REFERENCES:
        raise malformed(
            f"a part {short(part)} in {place}",
            '{"type": "text", "text": ...} or {"type": "image"}, the image in the part or in the images column',
        )
    if not given:
        return {"type": "image", **index}
    ((key, reference),) = given.items()
    if key == "base64" and isinstance(reference, str) and not reference.startswith("data:"):
        reference = f"data:image/*;base64,{reference}"
    return {"type": "image", **index, "reference": as_reference(reference, f"image in {place}")}


def _is_setting(key: str, value: Any) -> bool:
    """Whether what an image part says beside its image is neither a text nor an image."""
    return (
        key != "text" and isinstance(value, (bool, int, float, str)) and not speaks_of_image(key, value) or value == ""
    )


def without_nulls(mapping: dict[str, Any]) -> dict[str, Any]:
    """`datasets` gives every struct in a column the same keys and fills them with null."""
    return {key: value for key, value in mapping.items() if value is not None}


# --- images and their places


def as_reference(image: Any, place: str) -> Any:
    """An image reference as `image_files_vlm` takes it; see there."""
    if isinstance(image, (bytes, bytearray)):
        return {"bytes": bytes(image), "path": None}
    if isinstance(image, str) and not image.startswith("data:") and is_encoded_picture(image):
        return f"data:image/*;base64,{''.join(image.split())}"
    content, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (None, image)
    if isinstance(image, Image.Image) or isinstance(content, bytes):
        return image
    if content is not None or not isinstance(path, (str, os.PathLike)) or is_nothing(path):
        raise malformed(found(image, place), "an image: its path, or its bytes")
    return image


def conversation(row: Row, messages: list[dict[str, Any]], images: list[Any], places: bool = False) -> dict[str, Any]:
    """
    Messages and the images of their parts and tags; images without a place open the first user message.

    Args:
        row: what is told of tags that are text.
        messages: as `read_messages` gives them.
        images: the references of the row, apart from its messages.
        places: whether a tag speaks of an image also where the row has none. LLaVA's does where it begins or ends what
            is asked: inside a sentence it may be a word.
    """
    parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
    if any(_LIKE_A_TAG.search(part.get("text", "")) for message in messages for part in message["content"]):
        if not parts:
            images = _put_into_places(row, messages, images, places)
            parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
        _note_tags(row, messages)
    own = [part.pop("reference") for part in parts if "reference" in part]
    if own and (images or len(own) != len(parts)):
        raise malformed(
            f"{len(own)} image part(s) with an image, {len(parts) - len(own)} without, and {len(images)} image(s) "
            "in a column",
            "all images in the parts, or all in the column",
        )
    images = images or own
    if images and not parts:
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise malformed(f"{len(images)} image(s) and no user message", "a user message to put them into")
        first["content"][:0] = [{"type": "image"} for _ in images]
    if parts and len(parts) != len(images):
        raise malformed(
            f"{len(parts)} image part(s) in the messages but {len(images)} image(s) in the row",
            'one {"type": "image"} part for each image, or none at all',
        )
    for number, part in enumerate(parts):
        if (index := part.pop("index", number)) != number:
            raise malformed(f"image part {number} with index {short(index)}", "images in the order of their parts")
    return {"images": images, "messages": messages}


def _put_into_places(row: Row, messages: list[dict[str, Any]], images: list[Any], places: bool) -> list[Any]:
    """Put parts in the places of tags, and give the images in the order of their parts."""
    asked = [message for message in messages if message["role"] != "assistant"]
    texts = [part["text"] for message in asked for part in message["content"]]
    tags = [tag for text in texts for tag in _TAG.finditer(text)]
    if not tags or row.tags_are_text:
        return images
    if not images:
        if all(tag["path"] and is_picture(tag["path"]) for tag in tags):
            _split(asked, lambda tag: {"type": "image", "reference": tag["path"]})
        elif places and (tag := next(filter(None, map(_tag_at_an_end, texts)), None)):
            hint, remedy = row.hint(), "an image column, or --columns image=ignore where the tag is text"
            raise malformed(f"{tag} in the turns but no image in the row", hint[1] if hint else remedy)
        return images
    numbers = [_number(tag) for tag in tags]
    known = [number for number in numbers if number is not None]
    order = [*dict.fromkeys(known)] if len(known) == len(tags) else [*range(len(tags))]
    if len(order) != len(images):
        tag = tags[0][0].strip()
        raise malformed(
            f"{len(order)} {tag} in the turns but {len(images)} image(s) in the row",
            f"one {tag} for each image, or none at all",
        )
    spoken_of: set[int] = set()

    def part_of(tag):
        """An image may be spoken of again: its first tag is its place."""
        number = _number(tag) if None not in numbers else len(spoken_of)
        is_first = number not in spoken_of
        spoken_of.add(number)
        return {"type": "image"} if is_first else None

    _split(asked, part_of)
    ranks = {number: rank for rank, number in enumerate(sorted(order))}
    return [images[ranks[number]] for number in order]


def _number(tag: re.Match) -> int | None:
    number = tag["number"] or tag["numbered"]
    return int(number) if number else None


def _tag_at_an_end(text: str) -> str | None:
    """The tag that a text begins or ends with."""
    text = text.strip()
    tags = [*_TAG.finditer(text)]
    return next((tag[0] for tag in tags if tag.start() == 0 or tag.end() == len(text)), None)


def _split(messages: list[dict[str, Any]], part_of: Callable[[re.Match], dict[str, Any] | None]) -> None:
    """Put in place of each tag the part that it stands for, where it stands for one."""
    for message in messages:
        content = []
        for part in message["content"]:
            pieces, begin, text = [], 0, part["text"]
            for tag in _TAG.finditer(text):
                if image := part_of(tag):
                    pieces += [*_text_parts(text[begin : tag.start()]), image]
                    begin = tag.end()
                    opens = all(piece["type"] == "image" for piece in pieces) and "<image>" not in tag[0]
                    begin += opens and text.startswith("\n", begin)  # the end of its own line
            content += [*pieces, *_text_parts(text[begin:])] if pieces else [part]
        message["content"] = content


def _text_parts(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}] if text else []


def _note_tags(row: Row, messages: list[dict[str, Any]]) -> None:
    for message in messages:
        for part in message["content"]:
            if part["type"] == "text" and (tag := _TAG.search(part["text"])):
                name = "<img>" if tag["path"] else re.sub(r"\d+", "1", tag[0].strip())
                row.note(f"{name} stands as text")
