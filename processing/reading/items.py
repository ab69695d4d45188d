"""Rows become items: conversations, and in the place of what cannot be read the reason why.

An item goes through a run as it is: read, encoded (see `batching/encoding`) or dropped. What is special: whoever is
given rows or items tells them apart with `is_item`, so that a row is read once, wherever it first comes in.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, cast

from ..image_files_vlm import NO_FOLDER, ImagePolicy
from .cells import MalformedRow
from .conversations import ROW, Conversation, Dropped, caption_column, caption_count, conversations_from_row, whole_row
from .messages import ROLES


SPLIT_TURNS = ("none", "history")


@dataclasses.dataclass(frozen=True)
class Reading:
    """
    How the rows of a source are read; the fields but the last are those of `conversations_from_row`.

    Args:
        split_turns: `"history"` makes each answer the last of a conversation of its own, see `each_answer_last`.
    """

    source: str = ""
    prompt: str = ""
    caption_choice: str = "all"
    choice_answer: str = "letter"
    columns: dict[str, str] | None = None
    images: ImagePolicy = NO_FOLDER
    split_turns: str = "none"

    def conversations(self, row: dict[str, Any], index: int | str) -> list[Conversation | Dropped]:
        """The conversations of a row, named by the number that its source gave it; see `conversations_from_row`."""
        options = {name: value for name, value in vars(self).items() if name != "split_turns"}
        read = conversations_from_row(row, index=row.get(ROW, index), **options)
        return read if self.split_turns == "none" else [part for item in read for part in each_answer_last(item)]

    def draws(self, column_names: Collection[str]) -> bool:
        """Whether one conversation of a row is drawn for each epoch: one of its captions, never one of its turns."""
        splits = self.split_turns != "none" and caption_column(column_names, self.columns) is None
        return self.caption_choice == "random" and not splits

    def items(self, row: Mapping[str, Any], index: int | str) -> list[Conversation | Dropped]:
        """The same; a row that cannot be read gives the reason, as often as it would have given conversations."""
        if not isinstance(row, Mapping):
            line = f"{self.source}, row {index}: found a {type(row).__name__}; expected a mapping of columns to values"
            return [self._dropped(index, line)]
        row = whole_row(dict(row))
        index = row.get(ROW, index)
        try:
            return self.conversations(row, index)
        except MalformedRow as error:
            column = caption_column(row, self.columns) if self.caption_choice == "all" else None
            count = 1 if column is None else caption_count(row.get(column))
            return [self._dropped(index, str(error))] * count
        except RecursionError:
            line = f"{self.source}, row {index}: found values nested too deeply to be read; expected texts and parts"
            return [self._dropped(index, line)]

    def _dropped(self, index: int | str, line: str) -> Dropped:
        return {"source": self.source, "row": index, "dropped": ("malformed row", line)}


def each_answer_last(item: Conversation | Dropped) -> list[Conversation | Dropped]:
    """
    For each answer that is to be learned the conversation up to it, in which the earlier answers are only context.

    Its prompt is then what generation would be given, whatever the chat template makes of earlier answers or of the
    last question. A conversation without such an answer stays as it is.
    """
    if "dropped" in item:
        return [item]
    split: list[Conversation | Dropped] = []
    conversation = cast(Conversation, item)
    messages, images = conversation["messages"], conversation.get("images", [])
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or message.get("train") is False or message.get("weight") == 0:
            continue
        earlier = [{**m, "train": False} if m["role"] == "assistant" else m for m in messages[:index]]
        shown = sum(part["type"] == "image" for m in messages[: index + 1] for part in m["content"])
        split.append({**conversation, "messages": [*earlier, message], "images": images[:shown]})
    return split or [item]


def is_item(row: Any) -> bool:
    """Whether something is an item already, so that nothing is left to be read in it; else it is a row."""
    if not isinstance(row, dict):
        return False
    if isinstance(row.get("dropped"), tuple) or row.keys() >= {"input_ids", "labels"}:
        return True
    if not _OF_CONVERSATIONS >= row.keys() >= {"messages"}:
        return False
    if row.keys() >= {"images", "group", "source", "row"}:
        return True
    messages, images = row["messages"], row.get("images", [])
    return (
        isinstance(messages, list)
        and isinstance(images, list)
        and all(map(_is_read, messages))
        and sum(part["type"] == "image" for message in messages for part in message["content"]) == len(images)
    )


_OF_CONVERSATIONS = Conversation.__annotations__.keys()


def _is_read(message: Any) -> bool:
    """Whether a message is as `conversations_from_row` gives it: with parts, of which no image holds its own."""
    return (
        isinstance(message, dict)
        and message.keys() <= {"role", "content", "train", "weight"}
        and message.get("role") in ROLES
        and isinstance(message.get("content"), list)
        and all(_is_plain(part) for part in message["content"])
    )


def _is_plain(part: Any) -> bool:
    if not isinstance(part, dict) or part.get("type") != "text":
        return part == {"type": "image"}
    return len(part) == 2 and isinstance(part.get("text"), str)


__all__ = ["SPLIT_TURNS", "Reading", "each_answer_last", "is_item"]
