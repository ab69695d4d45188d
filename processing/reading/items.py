"""Rows become items: conversations, and in the place of what cannot be read the reason why.

An item goes through a run as it is: read, encoded (see `batching/encoding`) or dropped. What is special: whoever is
given rows or items tells them apart with `is_item`, so that a row is read once, wherever it first comes in.
"""

import dataclasses
import itertools
from collections.abc import Collection, Mapping
from typing import Any, cast

from ..image_files_vlm import NO_FOLDER, ImagePolicy
from .cells import MalformedRow
from .conversations import ROW, Conversation, Dropped, caption_column, caption_count, conversations_from_row, whole_row
from .messages import ROLES


SPLIT_TURNS = ("none", "history", "questions")


@dataclasses.dataclass(frozen=True)
class Reading:
    """
    How the rows of a source are read; the fields but the last are those of `conversations_from_row`.

    Args:
        split_turns: what of a dialogue becomes a conversation of its own, see `split_item`.
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
        return [part for item in read for part in split_item(item, self.split_turns)]

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


def split_item(item: Conversation | Dropped, split_turns: str) -> list[Conversation | Dropped]:
    """
    A dialogue as conversations of which each is learned by itself.

    Args:
        item: one that is dropped, encoded or without an answer to learn stays as it is.
        split_turns: `"none"` leaves it whole. `"history"` makes of each answer that is to be learned the conversation
            up to it, in which the earlier answers are only context: its prompt is then what generation would be given,
            whatever the chat template makes of earlier answers or of the last question. `"questions"` makes of each
            question with its answers a conversation without the turns before it, with the system messages and the
            images that were shown so far.
    """
    if split_turns == "none" or "dropped" in item or "input_ids" in item:
        return [item]
    conversation = cast(Conversation, item)
    parts = list((_each_answer_last if split_turns == "history" else _each_question_alone)(conversation))
    return [cast(Conversation, {**_known_of(conversation, part is parts[-1]), **part}) for part in parts] or [item]


def _known_of(conversation: Conversation, is_last: bool) -> dict[str, Any]:
    """What is known of a part: all right answers, and what is said of their question, are about the last question."""
    of_question = () if is_last or "answers" not in conversation else ("answers", "choices", "kind", "id")
    return {name: value for name, value in conversation.items() if name not in of_question}


def _is_learned(message):
    return message["role"] == "assistant" and message.get("train") is not False and message.get("weight") != 0


def _each_answer_last(conversation):
    messages, images = conversation["messages"], conversation.get("images", [])
    earlier: list[dict[str, Any]] = []
    shown = 0
    for message in messages:
        shown += _images_in(message)
        if _is_learned(message):
            yield {"messages": [*earlier, message], "images": images[:shown]}
        earlier.append({**message, "train": False} if message["role"] == "assistant" else message)


def _each_question_alone(conversation):
    """A question is all that the user says in a row; what is said before the first is one without a question."""
    messages, images = conversation["messages"], conversation.get("images", [])
    ends = list(itertools.accumulate(map(_images_in, messages)))
    if ends[-1:] != [len(images)]:  # which is told of the whole
        return
    shown = [(m, images[end - _images_in(m) : end]) for m, end in zip(messages, ends)]
    systems, earlier, turn, before = [], [], [], None
    for message, its_images in [*shown, ({"role": "user"}, [])]:
        if message["role"] == "user" and before != "user":
            if any(_is_learned(said) for said, _ in turn):
                said_last = max(place for place, (said, _) in enumerate(turn) if said["role"] == "assistant")
                part = [*systems, *_with_images(turn[: said_last + 1], earlier)]
                yield {"messages": [said for said, _ in part], "images": [one for _, those in part for one in those]}
            systems += [(said, those) for said, those in turn if said["role"] == "system"]
            earlier += [one for said, those in turn if said["role"] != "system" for one in those]
            turn = []
        turn.append((message, its_images))
        before = before if message["role"] == "system" else message["role"]


def _with_images(turn, images):
    """A turn whose question begins with images."""
    asked = next((place for place, (message, _) in enumerate(turn) if message["role"] == "user"), None)
    if asked is None or not images:
        return turn
    question, its_images = turn[asked]
    question = {**question, "content": [*({"type": "image"} for _ in images), *question["content"]]}
    return [*turn[:asked], (question, [*images, *its_images]), *turn[asked + 1 :]]


def _images_in(message):
    return sum(part["type"] == "image" for part in message["content"])


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


__all__ = ["SPLIT_TURNS", "Reading", "is_item", "split_item"]
