"""A conversation becomes ids and labels, once; the images stay references.

What is special: an encoded conversation holds one id for each image, whatever number of positions the image takes, so
no cut can ever split one. `VLMProcessor.expand_images` repeats it when a batch is made. Labels come from how the
sequence was built (see `processing_vlm`): -100 wherever nothing is learned.
"""

import os
import random
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import datasets
import torch

from .conversations import IMAGE_COLUMNS, conversations_from_row, row_images
from .processing_vlm import VLMProcessor


IGNORE = -100

Encode = Callable[[VLMProcessor, dict, int | None], dict[str, Any]]


class SampleDropped(ValueError):
    """A conversation from which nothing could be learned; the message is the reason, the same for every such sample."""


# Every reason for which a conversation can be dropped, in the order of the collator's counters.
DROP_REASONS = (
    "no token of it is supervised",
    "an image does not fit into max_length",
    "no supervised token fits into max_length",
)


def encode_caption(processor: VLMProcessor, conversation: dict, max_length: int | None = None) -> dict[str, Any]:
    """
    Stage 1: an image and its caption, without roles.

    The sequence is `[bos, where the tokenizer adds one] <image> caption eos`; caption and eos are supervised. See
    `encode_dialogue` for what it takes, gives and raises.
    """
    asked = [m for m in conversation["messages"] if m["role"] != "assistant"]
    answers = [m for m in conversation["messages"] if m["role"] == "assistant"]
    if len(answers) != 1 or any(part["type"] != "image" for message in asked for part in message["content"]):
        raise ValueError(
            f"{_place(conversation)}stage 1 learns from images and their captions and found a dialogue; give it a data "
            "set with an image and a caption column, or train on dialogues with train_sft.py."
        )
    content = [part for message in (*asked, *answers) for part in message["content"]]
    return _labelled(processor, *processor.encode_caption(content), max_length)


def encode_dialogue(processor: VLMProcessor, conversation: dict, max_length: int | None = None) -> dict[str, Any]:
    """
    Stage 2: a dialogue as the chat template writes it; every answer and its end token are supervised.

    Args:
        processor: the model's processor.
        conversation: `{"messages": ..., "images": ...}`, see `conversations.py`.
        max_length: positions of the expanded sequence, image tokens included. What does not fit is cut from the end;
            an image is never cut, and what is cut has no end token supervised.

    Returns:
        `input_ids` and `labels`, with one entry an image; `length`, the positions of the expanded sequence.

    Raises:
        SampleDropped: nothing is supervised, or `max_length` leaves out an image or every supervised token.
    """
    try:
        ids, supervised = processor.encode_messages(conversation["messages"])
    except ValueError as error:
        raise ValueError(f"{_place(conversation)}{error}") from error
    return _labelled(processor, ids, supervised, max_length)


def _place(conversation):
    if not conversation.get("source"):
        return ""
    return f"{conversation['source']}, row {conversation.get('row')}: "


def _labelled(processor, ids, supervised, max_length):
    # The first token has nothing before it to be predicted from.
    if not any(supervised[1:]):
        raise SampleDropped(DROP_REASONS[0])
    image_id, per_image = processor.image_token_id, processor.image_seq_length
    length, kept = 0, 0
    for id in ids:
        size = per_image if id == image_id else 1
        if max_length is not None and length + size > max_length:
            break
        length, kept = length + size, kept + 1
    if image_id in ids[kept:]:
        raise SampleDropped(DROP_REASONS[1])
    if not any(supervised[1:kept]):
        raise SampleDropped(DROP_REASONS[2])
    labels = [id if learn else IGNORE for id, learn in zip(ids[:kept], supervised)]
    return {"input_ids": ids[:kept], "labels": labels, "length": length}


class Account(NamedTuple):
    """What came of a data set: conversations kept, positions, supervised tokens, and how many were dropped for what."""

    conversations: int
    tokens: int
    supervised: int
    dropped: dict[str, int]


class EncodedDataset(torch.utils.data.Dataset):
    """
    Conversations, encoded once, with the images of their rows.

    An item is what `encode` gave and `images`, the references of its row; nothing is decoded here. With
    `caption_choice="random"` an item is an image, and which of its captions it shows depends on seed, epoch and index
    alone, so that a resumed run sees what an uninterrupted one does.
    """

    def __init__(self, rows: datasets.Dataset, encodings: datasets.Dataset, account: Account, seed: int | None = None):
        self.images = rows.select_columns([name for name in rows.column_names if name in IMAGE_COLUMNS])
        self.encodings = encodings
        self.account = account
        self.seed = seed
        self.epoch = 0
        self.groups = None
        if seed is not None:
            groups: dict[int, list[int]] = {}
            for index, row in enumerate(encodings["row"]):
                groups.setdefault(row, []).append(index)
            self.groups = list(groups.values())

    def __len__(self):
        return len(self.encodings) if self.groups is None else len(self.groups)

    def __getitem__(self, index):
        if self.groups is not None:
            index = random.Random(f"{self.seed} {self.epoch} {index}").choice(self.groups[index])
        item = self.encodings[index]
        row = item.pop("row")
        return {**item, "images": row_images(self.images[row]) if self.images.column_names else []}

    @property
    def lengths(self) -> list[int]:
        """Positions of every item, for batches of like lengths; of an image with several captions the first's."""
        lengths = self.encodings["length"][:]
        return lengths if self.groups is None else [lengths[group[0]] for group in self.groups]

    def set_epoch(self, epoch: int):
        """Choose captions anew (`caption_choice="random"`)."""
        self.epoch = epoch


def encode_rows(
    rows: datasets.Dataset,
    processor: VLMProcessor,
    encode: Encode,
    *,
    prompt: str = "",
    caption_choice: str = "all",
    max_length: int | None = None,
    source: str = "",
    seed: int = 0,
) -> EncodedDataset:
    """
    Encode every conversation of a data set, in several processes where it is large.

    Args:
        rows: what `sources.load_rows` gave.
        encode: `encode_caption` or `encode_dialogue`.
        prompt, caption_choice, source: see `conversations_from_row`.
        seed: for `caption_choice="random"`.

    Raises:
        ValueError: a row that cannot be read, or nothing that could be learned.
    """
    encoder = _RowEncoder(processor, encode, prompt, caption_choice, max_length, source)
    workers = min(os.cpu_count() or 1, len(rows) // 10_000)
    encodings = rows.with_format(None).map(
        encoder,
        with_indices=True,
        batched=True,
        remove_columns=rows.column_names,
        features=_COLUMNS,
        num_proc=workers if workers > 1 else None,
        desc=f"Encoding {source}",
    )
    dropped = Counter(reason for reason in encodings["dropped"] if reason)
    supervised, tokens = sum(encodings["supervised"]), sum(encodings["length"])
    if dropped:
        encodings = encodings.filter(_is_kept, input_columns=["dropped"], desc="Dropping")
    if not len(encodings):
        reasons = "; ".join(f"{reason} ({count:,} samples)" for reason, count in dropped.items()) or "it has no rows"
        raise ValueError(f"{source}: there is nothing to learn from: {reasons}.")
    account = Account(len(encodings), tokens, supervised, dict(dropped))
    encodings = encodings.select_columns(["input_ids", "labels", "length", "row"])
    return EncodedDataset(rows, encodings, account, seed if caption_choice == "random" else None)


def _is_kept(reason):
    return reason is None


# Declared, because a first batch without a drop, or of nothing else, would let `datasets` infer null columns.
_COLUMNS = datasets.Features(
    {
        "input_ids": datasets.Sequence(datasets.Value("int64")),
        "labels": datasets.Sequence(datasets.Value("int64")),
        "length": datasets.Value("int64"),
        "dropped": datasets.Value("string"),
        "supervised": datasets.Value("int64"),
        "row": datasets.Value("int64"),
    }
)


class _RowEncoder:
    """A batch of rows -> columns of encodings, for `datasets.map`."""

    def __init__(self, processor, encode, prompt, caption_choice, max_length, source):
        self.processor = processor
        self.encode = encode
        self.reading = {"prompt": prompt, "caption_choice": caption_choice, "source": source}
        self.max_length = max_length

    def __call__(self, columns, indices):
        encoded = []
        for position, index in enumerate(indices):
            row = {name: values[position] for name, values in columns.items()}
            for conversation in conversations_from_row(row, index=index, **self.reading):
                try:
                    item = {**self.encode(self.processor, conversation, self.max_length), "dropped": None}
                    item["supervised"] = sum(label != IGNORE for label in item["labels"][1:])
                except SampleDropped as reason:
                    item = {"input_ids": [], "labels": [], "length": 0, "dropped": str(reason), "supervised": 0}
                encoded.append({**item, "row": index})
        return {name: [item[name] for item in encoded] for name in _COLUMNS}
