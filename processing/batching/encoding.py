"""A conversation becomes ids and labels, once; the images stay references.

What is special: an encoded conversation holds one id for each image, whatever number of positions the image takes, so
no cut can ever split one. `VLMProcessor.expand_images` repeats it when a batch is made. Labels come from how the
sequence was built (see `messages_vlm`): -100 wherever nothing is learned.
"""

import itertools
from collections.abc import Callable
from typing import Any

from ..data_error_vlm import DuetError
from ..image_files_vlm import BadImage, image_size
from ..processing_vlm import VLMProcessor
from .account import CUT_REASONS, DROP_REASONS


IGNORE = -100
TRUNCATIONS = ("truncate_text", "drop", "keep_last_turns")
SUPERVISE = ("all", "last")

Encode = Callable[[VLMProcessor, dict, int | None], dict[str, Any]]


class SampleDropped(DuetError):
    """A conversation from which nothing can be learned: its reason, one of `DROP_REASONS`, and what was found."""

    def __init__(self, reason: str, detail: str = ""):
        assert reason in DROP_REASONS
        super().__init__(detail or reason)
        self.reason, self.detail = reason, detail


def encode_caption(
    processor: VLMProcessor, conversation: dict, max_length: int | None = None, *, truncation: str = "truncate_text"
) -> dict[str, Any]:
    """
    Stage 1: an image and its caption, without roles.

    The sequence is `[bos, where the tokenizer adds one] <image> caption eos`; caption and eos are supervised. Of one
    question about images and its answer the answer is the caption, and the question is left out, as LLaVA reads its
    alignment data (https://arxiv.org/abs/2304.08485). A caption has no turns, so `keep_last_turns` drops what is too
    long. See `encode_dialogue` for arguments, result and errors.
    """
    asked = [m for m in conversation["messages"] if m["role"] != "assistant"]
    answers = [m for m in conversation["messages"] if m["role"] == "assistant"]
    images = [part for message in asked for part in message["content"] if part["type"] == "image"]
    says = any(part["type"] == "text" for message in asked for part in message["content"])
    if len(answers) != 1 or len(asked) > 1 or (says and not images):
        raise SampleDropped(
            "malformed row",
            f"{place(conversation)}stage 1 learns from images and their captions and found a dialogue; give it a data "
            "set with an image and a caption column, or train on dialogues with train_sft.py.",
        )
    (answer,) = answers
    ids, weights = processor.encode_caption([*images, *answer["content"]])
    weight = 0.0 if answer.get("train") is False else 1.0 if answer.get("weight") is None else float(answer["weight"])
    weights = [weight * learned for learned in weights]
    sizes = _sizes(processor, ids, image_counts(processor, conversation))
    return _fitted(processor, ids, weights, sizes, max_length, cut=truncation == "truncate_text")


def encode_dialogue(
    processor: VLMProcessor,
    conversation: dict,
    max_length: int | None = None,
    *,
    truncation: str = "truncate_text",
    supervise: str = "all",
    supervise_prompt: bool = False,
) -> dict[str, Any]:
    """
    Stage 2: a dialogue as the chat template writes it; every answer and its end token are supervised.

    Args:
        processor: the model's processor.
        conversation: `{"messages": ..., "images": ...}`, see `conversations.py`.
        max_length: positions of the expanded sequence, image tokens included.
        truncation: what happens to a longer one. `"truncate_text"` cuts text from its end, never an image, and what is
            cut has no end token supervised; `"keep_last_turns"` leaves out the first turns, one by one, and keeps the
            system message and every image, which moves to the first turn that is left; `"drop"` drops it.
        supervise: `"all"` answers, or only the `"last"`.
        supervise_prompt: learn everything but the images: system and user messages and what the template writes, too.

    Returns:
        `input_ids` and `labels`, with one entry an image; `weights`, the weight of each label in the loss, where a
        message says one; `length`, the positions of the expanded sequence; `cut`, one of `CUT_REASONS` or `None`.

    Raises:
        SampleDropped: nothing is supervised, `max_length` leaves no room, or the chat template refuses the messages.
    """
    messages, cut, counts = conversation["messages"], None, image_counts(processor, conversation)
    if supervise == "last":
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
        messages = [
            message if index == last or message["role"] != "assistant" else {**message, "train": False}
            for index, message in enumerate(messages)
        ]
    while True:
        try:
            ids, weights = processor.encode_messages(messages, supervise_prompt=supervise_prompt)
        except ValueError as error:
            raise SampleDropped("the chat template refuses it", f"{place(conversation)}{error}") from error
        shorter, sizes = None, _sizes(processor, ids, counts)
        if truncation == "keep_last_turns" and max_length is not None and sum(sizes) > max_length:
            shorter = without_first_turn(messages)
        if shorter is None:
            fitted = _fitted(processor, ids, weights, sizes, max_length, cut=truncation == "truncate_text")
            return {**fitted, "cut": cut or fitted["cut"]}
        messages, cut = shorter, CUT_REASONS[1]


def without_first_turn(messages: list[dict]) -> list[dict] | None:
    """
    Messages without their first question and what follows up to the next one; `None` where there is but one turn.

    System messages before it stay, and its images move to the beginning of the next question.
    """
    start = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    roles = [message["role"] for message in messages]
    nexts = [i for i in range(start + 1, len(messages)) if roles[i] == "user" and roles[i - 1] != "user"]
    if not nexts or "assistant" not in roles[nexts[0] :]:
        return None
    images = [part for m in messages[start : nexts[0]] for part in m["content"] if part["type"] == "image"]
    question = messages[nexts[0]]
    return [
        *messages[:start],
        {**question, "content": [*images, *question["content"]]},
        *messages[nexts[0] + 1 :],
    ]


def place(conversation: dict) -> str:
    """Where a conversation comes from, as the beginning of a message."""
    if not conversation.get("source"):
        return ""
    return f"{conversation['source']}, row {conversation.get('row')}: "


def image_counts(processor: VLMProcessor, conversation: dict) -> list[int] | None:
    """
    Positions that each image of a conversation takes, `None` where all take as many.

    Raises:
        SampleDropped: that depends on the size of an image that cannot be read.
    """
    if processor.max_tiles == 1:
        return None
    try:
        return [processor.image_tokens(*image_size(image)) for image in conversation.get("images") or ()]
    except BadImage as error:
        raise SampleDropped(error.reason, f"{place(conversation)}{error}") from error


def _sizes(processor, ids, counts):
    """Positions that each id takes."""
    counts = itertools.chain(counts or (), itertools.repeat(processor.image_seq_length))
    return [next(counts) if id == processor.image_token_id else 1 for id in ids]


def _fitted(processor, ids, weights, sizes, max_length, cut):
    # The first token has nothing before it to be predicted from.
    if not any(weights[1:]):
        raise SampleDropped("no token of it is supervised")
    length, kept = sum(sizes), len(ids)
    if max_length is not None and length > max_length:
        if not cut:
            raise SampleDropped("longer than max_length", f"{length} positions")
        while length > max_length:
            kept -= 1
            length -= sizes[kept]
        if processor.image_token_id in ids[kept:]:
            raise SampleDropped("an image does not fit into max_length")
        if not any(weights[1:kept]):
            raise SampleDropped("no supervised token fits into max_length")
    weights = [0.0, *weights[1:kept]]
    return {
        "input_ids": ids[:kept],
        "labels": [id if weight else IGNORE for id, weight in zip(ids[:kept], weights)],
        "weights": weights if set(weights) - {0.0, 1.0} else [],
        "length": length,
        "cut": CUT_REASONS[0] if kept < len(ids) else None,
    }
