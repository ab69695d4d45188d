"""A conversation becomes ids and labels, once; the images stay references.

How that is done is said by one object, an `Encoder`: collator, encoding ahead, first look and evaluation are given the
same one, so none of them can disagree. What is special: an encoded conversation holds one id for each image, whatever
number of positions the image takes, so no cut can ever split one. `VLMProcessor.expand_images` repeats it when a batch
is made. Labels come from how the sequence was built (see `messages_vlm`): -100 wherever nothing is learned.
"""

import bisect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Required, cast

from ..data_error_vlm import DuetError
from ..image_files_vlm import BadImage, image_size
from ..processing_vlm import VLMProcessor
from ..reading.conversations import Conversation, Dropped
from ..reading.messages import MAX_WEIGHT
from .account import CUT_REASONS, DROP_REASONS, Record


IGNORE = -100
TRUNCATIONS = ("truncate_text", "drop", "keep_last_turns")
SUPERVISE = ("all", "last")

KEPT = ("source", "row", "group", "answers", "choices", "kind", "subset", "id", "notes")
"""What an encoded conversation keeps of the conversation, besides its images."""

Encode = Callable[..., dict[str, Any]]
"""`encode_caption`, `encode_dialogue` or another function of processor, conversation, `max_length` and its options."""


class Encoded(Conversation, total=False):
    """A conversation as ids, one an image, with what evaluation and accounts need; see `encode_dialogue`."""

    input_ids: Required[list[int]]
    labels: Required[list[int]]
    weights: list[float]
    length: int
    cut: str | None


class SampleDropped(DuetError):
    """
    A conversation from which nothing can be learned.

    Attributes:
        reason: one of `DROP_REASONS`.
        detail: what was found, where the reason does not say it all.
        source, row: which conversation it is, where an `Encoder` was given it.
    """

    source: str = ""
    row: int | str | None = None

    def __init__(self, reason: str, detail: str = ""):
        assert reason in DROP_REASONS
        super().__init__(detail or reason)
        self.reason, self.detail = reason, str(self) if detail else ""


def encode_caption(
    processor: VLMProcessor, conversation: dict, max_length: int | None = None, *, truncation: str = "truncate_text"
) -> dict[str, Any]:
    """
    Stage 1: an image and its caption, without roles.

    The sequence is `[bos, where the tokenizer adds one] <image> caption eos`; caption and eos are supervised.
    Where there is one question about images, its answer is the caption, and the question is left out, as LLaVA reads
    its alignment data (https://arxiv.org/abs/2304.08485). A caption has no turns, so `keep_last_turns` drops what is
    too long. See `encode_dialogue` for arguments, result and errors.
    """
    asked = [m for m in conversation["messages"] if m["role"] != "assistant"]
    answers = [m for m in conversation["messages"] if m["role"] == "assistant"]
    images = [part for message in asked for part in message["content"] if part["type"] == "image"]
    said = [m for m in asked if m["role"] == "user"]
    says = any(part["type"] == "text" for message in said for part in message["content"])
    if len(answers) != 1 or len(said) > 1 or (says and not images):
        raise SampleDropped(
            "malformed row",
            f"{place(conversation)}stage 1 learns from images and their captions and found a dialogue; give it a data "
            "set with an image and a caption column, or train on dialogues with train_sft.py.",
        )
    (answer,) = answers
    ids, weights = processor.encode_caption([*images, *answer["content"]], max_length)
    weight = 0.0 if answer.get("train") is False else 1.0 if answer.get("weight") is None else float(answer["weight"])
    weights = [weight * learned for learned in weights]
    _check_weights(conversation, weights)
    sizes = _sizes(processor, ids, image_counts(processor, conversation))
    return _fitted(processor, conversation, ids, weights, sizes, max_length, cut=truncation == "truncate_text")


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
    messages, counts = conversation["messages"], image_counts(processor, conversation)
    if supervise == "last":
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
        messages = [
            message if index == last or message["role"] != "assistant" else {**message, "train": False}
            for index, message in enumerate(messages)
        ]

    def encoded(messages):
        notes: list[str] = []
        options = {"supervise_prompt": supervise_prompt, "max_length": max_length, "notes": notes}
        try:
            ids, weights = processor.encode_messages(messages, **options)
        except ValueError as error:
            if not getattr(error, "is_duet_error", False):  # a checkpoint's own processor has a class of its own
                raise
            raise SampleDropped("the chat template refuses it", f"{place(conversation)}{error}") from error
        _check_weights(conversation, weights)
        return ids, weights, _sizes(processor, ids, counts), notes

    cut = None
    ids, weights, sizes, notes = encoded(messages)
    if truncation == "keep_last_turns" and max_length is not None and sum(sizes) > max_length:
        shorter = list(_shortened(messages))
        # Fewer turns are never longer, so the most that fit are found by halving.
        fit = bisect.bisect_left(shorter, True, key=lambda messages: sum(encoded(messages)[2]) <= max_length)
        if shorter:
            cut = CUT_REASONS[1]
            ids, weights, sizes, notes = encoded(shorter[min(fit, len(shorter) - 1)])
    fitted = _fitted(processor, conversation, ids, weights, sizes, max_length, cut=truncation == "truncate_text")
    return {**fitted, "cut": cut or fitted["cut"], **({"notes": notes} if notes else {})}


def _shortened(messages: list[dict]) -> Iterator[list[dict]]:
    """The messages without their first turn, without the first two, and so on."""
    while (left := without_first_turn(messages)) is not None:
        yield (messages := left)


class Encoder:
    """
    How conversations become ids and labels, everywhere in a run.

    It travels to workers, and `datasets` names its caches by what it is made of.

    Args:
        processor: the model's processor.
        encode: `encode_dialogue` (stage 2) or `encode_caption` (stage 1).
        max_length: positions a sequence may have, image tokens included.
        **options: of `encode`, such as `truncation`.
    """

    def __init__(
        self,
        processor: VLMProcessor,
        encode: Encode = encode_dialogue,
        max_length: int | None = None,
        **options: Any,
    ):
        self.processor, self.encode, self.max_length, self.options = processor, encode, max_length, options

    def __call__(self, conversation: Conversation) -> Encoded:
        """
        A conversation, encoded; its images stay what they are.

        Raises:
            SampleDropped: nothing can be learned from it, and why.
        """
        try:
            encoded = self.encode(self.processor, conversation, self.max_length, **self.options)
        except RecursionError as error:
            line = f"{place(conversation)}a message is nested too deeply to be read; expected texts and parts"
            raise _named(SampleDropped("malformed row", line), conversation) from error
        except SampleDropped as error:
            _named(error, conversation)
            raise
        kept: dict[str, Any] = {name: v for name, v in conversation.items() if name in KEPT and v is not None}
        if notes := [*kept.get("notes", ()), *encoded.get("notes", ())]:
            kept["notes"] = notes
        return cast(Encoded, {**encoded, **kept, "images": conversation.get("images") or []})


def _named(error: SampleDropped, conversation: Conversation) -> SampleDropped:
    error.source, error.row = conversation.get("source") or "", conversation.get("row")
    return error


def encode_item(
    item: Conversation | Dropped | Encoded | dict[str, Any], encoder: Encoder
) -> tuple[Encoded | None, Record]:
    """An item of a data set, encoded (or `None`, where it is dropped), and the record of what became of it."""
    item = cast(dict[str, Any], item)
    told: dict[str, Any] = {"source": item.get("source") or "", "row": item.get("row")}
    told["notes"] = tuple(item.get("notes") or ())
    if "dropped" in item:
        reason, detail = item["dropped"]
        return None, Record(dropped=reason, detail=detail, **told)
    if "input_ids" not in item:
        try:
            item = cast(dict[str, Any], encoder(cast(Conversation, item)))
        except SampleDropped as error:
            return None, Record(dropped=error.reason, detail=error.detail, **told)
    processor, images = encoder.processor, item.get("images") or []
    ids, labels = item["input_ids"], item["labels"]
    shown = ids.count(processor.image_token_id)
    if shown != len(images):
        raise DuetError(
            f"{place(item)}a conversation with {shown} image parts and {len(images)} images was found; expected one "
            "image for each part, in the order of the parts."
        )
    told["notes"] = tuple(item.get("notes") or ())
    length = item["length"] if "length" in item else len(ids) + shown * (processor.image_seq_length - 1)
    record = Record(
        cut=item.get("cut"),
        images=shown,
        tokens=length,
        image_tokens=length - len(ids) + shown,
        supervised=sum(label != IGNORE for label in labels[1:]),
        **told,
    )
    return cast(Encoded, {**item, "images": images}), record


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


def place(conversation: Mapping[str, Any]) -> str:
    """Where a conversation comes from, as the beginning of a message."""
    if not conversation.get("source"):
        return ""
    return f"{conversation['source']}, row {conversation.get('row')}: "


def image_counts(processor: VLMProcessor, conversation: Mapping[str, Any]) -> list[int] | None:
    """
    Positions that each image of a conversation takes, `None` where all take as many.

    Raises:
        SampleDropped: that depends on the size of an image that cannot be read.
    """
    if processor.max_tiles == 1:
        return None
    if "image_counts" in conversation:  # of images that were opened already
        return conversation["image_counts"]
    try:
        return [processor.image_tokens(*image_size(image)) for image in conversation.get("images") or ()]
    except BadImage as error:
        raise SampleDropped(error.reason, f"{place(conversation)}{error}") from error


def _check_weights(conversation, weights):
    """Refuse what the loss, in 32 bits, could not be weighed by; what was read from a row was checked there."""
    if not all(0 <= weight <= MAX_WEIGHT for weight in set(weights)):
        line = f"{place(conversation)}found a message's weight of {max(weights)}; expected 0 to {MAX_WEIGHT:,.0f}"
        raise SampleDropped("malformed row", line)


def _sizes(processor, ids, counts):
    """Positions that each id takes."""
    counts = itertools.chain(counts or (), itertools.repeat(processor.image_seq_length))
    return [next(counts) if id == processor.image_token_id else 1 for id in ids]


def _fitted(processor, conversation, ids, weights, sizes, max_length, cut):
    # The first token has nothing before it to be predicted from.
    if not any(weights[1:]):
        raise SampleDropped("no token of it is supervised")
    length, kept = sum(sizes), len(ids)
    if max_length is not None and length > max_length:
        if not cut:
            raise SampleDropped("longer than max_length", f"{place(conversation)}more than {max_length} positions")
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
