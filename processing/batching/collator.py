"""Rows, conversations or encodings become one batch: images seen, sequences padded, labels beside their tokens.

What is not read yet is read here, and what is not encoded encoded. A label sits at its token's own position in the
expanded sequence, behind everything that the images take up. Who predicts whom is said here and nowhere else:
`shift_labels` hold the token after each position, which the model costs. What is padding is known from lengths, so a
pad token that is also the end token is still learned as the end.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ..data_error_vlm import DuetError
from ..image_files_vlm import BadImage, ImagePolicy
from ..processing_vlm import VLMProcessor
from ..reading.items import SPLIT_TURNS, Reading, is_item, split_item
from .account import BAD_SAMPLE_REASONS, DROP_REASONS, BatchAccount, Record
from .encoding import IGNORE, Encode, Encoder, encode_dialogue, encode_item, place
from .features import FeatureCache
from .images import BatchImages, joined, once
from .packing import Text, pack


logger = logging.get_logger(__name__)

_OF_BATCH = Reading(source="the batch", images=ImagePolicy(own_paths=True))

ON_BAD_SAMPLE = ("skip", "error")
_MAX_WORKERS = 256


class VLMDataCollator:
    """
    Makes a batch for `Trainer` or a `DataLoader`, of rows of any known layout, conversations or encoded ones.

    A row is read as everywhere else, so one with several captions gives several conversations; its image paths are the
    caller's own. `read_rows` reads rows before, where a folder, a prompt or names of columns have to be said. `Trainer`
    has to be told `remove_unused_columns=False`.

    Args:
        processor: the model's processor; or an `Encoder`, which holds one and says the next two.
        max_length: positions a sequence may have, image tokens included; conversations given encoded were cut before.
        encode: how a conversation becomes ids: `encode_dialogue` (stage 2) or `encode_caption` (stage 1).
        pad_to_multiple_of: round the batch's length up.
        on_bad_sample: what happens to a row or an image that cannot be read: `"skip"` leaves the conversation out and
            counts it, `"error"` raises.
        split_turns: `"history"` makes each answer of a row or conversation that is not encoded the last of a sample of
            its own, `"questions"` each question with its answers a sample without the turns before it (see
            `split_item`), so that a batch has more samples than it was given rows.
        padding_free: put all conversations into one row, each seeing only itself; the model has to be Duet's.
        share_prefix: in that row, run once what conversations begin with (see `packing.py`), such as an image.
        account: add the batch's `BatchAccount` under `"account"`, for `VLMTrainer`, which takes it out again.

    Returns (from a call with a list of such, or of lists of such):
        `input_ids`, `attention_mask`, `labels`, each `(batch, tokens)`, padded on the right with labels -100;
        `shift_labels` of the same shape, what each position predicts, and `loss_weights`, what that prediction weighs,
        where a message has a weight; and `pixel_values` `(views, channels, height, width)` where the batch has images,
        each once, with `image_grids` `(images, 2)` where they may be tiled. Where one is shown twice, `feature_index`
        `(batch, tokens)` says which image feature stands at each position, -1 for a token.
        With `padding_free` the batch is 1, `feature_index` is given for any image, and in the place of
        `attention_mask` there are `position_ids` `(1, tokens)` and `segments`, a list of `(start, end, parent, text)`:
        positions from `start` to `end` see themselves, the segment `parent` and what that sees; `text` is the number
        of the conversation that ends there.
        Conversations that cannot be learned from are left out and counted in `dropped`, in worker processes too; a
        batch of nothing else is one pad token with label -100, of which the loss is 0.

    Attributes:
        features (`FeatureCache`): what a frozen encoder makes of each image, for the batch to have `vision_features`
            `(views, tokens, width)` in place of `pixel_values`; `None` where images are opened.

    Raises:
        DuetError: with `on_bad_sample="error"`, a row or an image that cannot be read, by name; or rows of nothing.
    """

    def __init__(
        self,
        processor: VLMProcessor | Encoder,
        max_length: int | None = None,
        encode: Encode = encode_dialogue,
        pad_to_multiple_of: int | None = None,
        on_bad_sample: str = "skip",
        account: bool = False,
        split_turns: str = "none",
        padding_free: bool = False,
        share_prefix: bool = False,
    ):
        for name, value, choices in (
            ("on_bad_sample", on_bad_sample, ON_BAD_SAMPLE), ("split_turns", split_turns, SPLIT_TURNS)
        ):  # fmt: skip
            if value not in choices:
                raise DuetError(f"{name}={value!r}: expected one of {', '.join(choices)}.")
        if share_prefix and not padding_free:
            raise DuetError("share_prefix=True: texts share a beginning in one row; add padding_free=True.")
        self.split_turns = split_turns
        self.padding_free, self.share_prefix = padding_free, share_prefix
        self.encoder = processor if isinstance(processor, Encoder) else Encoder(processor, encode, max_length)
        self.processor = self.encoder.processor
        self.pad_to_multiple_of = pad_to_multiple_of
        self.on_bad_sample = on_bad_sample
        self.account = account
        self.features: FeatureCache | None = None
        self.skip_batches = 0
        self._made = 0  # in this process
        self._said: set[str] = set()
        # One row a worker: each writes its own, in memory that all processes see.
        self._dropped = torch.zeros(_MAX_WORKERS + 1, len(DROP_REASONS), dtype=torch.long).share_memory_()

    @property
    def dropped(self) -> dict[str, int]:
        """
        How many conversations this collator left out, by reason, also of batches that are fetched ahead.

        Counted here too, for whoever has another Trainer and so no account.
        """
        counts = self._dropped.sum(0).tolist()
        return {reason: count for reason, count in zip(DROP_REASONS, counts) if count}

    def __call__(self, rows: Sequence[dict[str, Any] | list[dict[str, Any]]]) -> dict[str, Any]:
        if self._is_skipped():
            return {}
        items, records, rows_of, images = [], [], [], BatchImages(self.processor, self.features)
        flat = [row for part in rows for row in (part if isinstance(part, list) else [part])]
        for number, conversation in self._read(flat):
            item, record = self._opened(conversation, images)
            records.append(record)
            rows_of.append(number)
            if not self.account:
                self._warn(record)
            if item is None:
                self._count(record)
            else:
                items.append(item)
        batch, padding = self._batch(items)
        if self.account:
            batch["account"] = BatchAccount(records, padding, batch["labels"].numel(), rows_of)
        return batch

    def _read(self, rows):
        """The items of the batch, each with the number of its row."""
        for index, row in enumerate(rows):
            for item in self._items_of(row, index):
                yield from ((index, part) for part in split_item(item, self.split_turns))

    def _items_of(self, row, index):
        """The items of a row; one that has no name of its own is called by its place in the batch."""
        if isinstance(row, dict) and not row:
            raise DuetError(
                "the collator was given a row without any column, as Trainer leaves it where it removes what it "
                "does not know; add remove_unused_columns=False to the TrainingArguments."
            )
        is_named = isinstance(row, dict) and row.get("source") and row.get("row") is not None
        if is_item(row):
            yield row if is_named else {**row, "source": _OF_BATCH.source, "row": index}
        elif is_named:
            cells = {name: value for name, value in row.items() if name not in ("source", "row")}
            yield from dataclasses.replace(_OF_BATCH, source=str(row["source"])).items(cells, row["row"])
        else:
            yield from _OF_BATCH.items(row, index)

    def _warn(self, record):
        """Say once of each kind what is wrong with a sample: without an account nobody would know."""
        lines = {note: f"{record.source}: {note}" for note in record.notes}
        if record.dropped is not None:
            lines[record.dropped] = f"left out: {record.detail or place(record._asdict()) + record.dropped}"
        for kind, line in lines.items():
            if kind not in self._said:
                self._said.add(kind)
                logger.warning(line)

    def _opened(self, item, images: BatchImages) -> tuple[dict[str, Any] | None, Record]:
        """An item with ids and what is seen of its images, or `None`; and its record."""
        # The ids of tiled images follow from their sizes, so each is opened (and fetched) before, once.
        seen = None
        try:
            if self.processor.max_tiles > 1:
                seen = [images[reference] for reference in item.get("images") or ()]
                item = {**item, "image_counts": [image.tokens for image in seen]}
            encoded, record = encode_item(item, self.encoder)
            if encoded is not None and seen is None:
                seen = [images[reference] for reference in encoded["images"]]
        except BadImage as error:
            line = f"{place(item)}{error}"
            if self.on_bad_sample == "error":
                raise type(error)(line, error.reason) from error
            return None, Record(item.get("source") or "", item.get("row"), error.reason, line)
        if encoded is None and self.on_bad_sample == "error" and record.dropped in BAD_SAMPLE_REASONS:
            raise DuetError(record.detail)
        return None if encoded is None else {**encoded, "seen": seen}, record

    def _batch(self, items: list[dict[str, Any]]) -> tuple[dict[str, Any], int]:
        """The tensors of items, and how many positions are padding."""
        images, begins = once(image for item in items for image in item["seen"])
        features = iter(begins)
        texts = [self._text(item, features) for item in items]
        batch, weights, index, padding = (self._packed if self.padding_free else self._padded)(texts)
        batch["shift_labels"] = _of_next(batch["labels"], IGNORE)
        if any(item.get("weights") for item in items):
            batch["loss_weights"] = _of_next(weights, 0)
        if images and (self.padding_free or len(images) < len(begins)):
            batch["feature_index"] = index
        return {**batch, **joined(images)}, padding

    def _text(self, item: dict[str, Any], begins: Iterator[int]) -> Text:
        """An item, expanded."""
        seen, rows = item["seen"], [item["labels"]]
        if item.get("weights"):
            rows.append(item["weights"])
        ids, labels, *weights = map(
            np.array,
            self.processor.expand_images(item["input_ids"], *rows, counts=[image.tokens for image in seen]),
        )
        features = np.full(len(ids), -1)
        features[ids == self.processor.image_token_id] = [
            next_one + place for image, next_one in zip(seen, begins) for place in range(image.tokens)
        ]
        return Text(ids, labels, np.array(weights[0] if weights else labels != IGNORE, dtype=np.float32), features)

    def _packed(self, texts: list[Text]):
        row = pack(texts, self.share_prefix, self.processor.tokenizer.pad_token_id, self.pad_to_multiple_of or 1)
        ids, labels, weights, index, positions = (torch.from_numpy(array)[None] for array in row[:5])
        batch = {"input_ids": ids, "labels": labels, "position_ids": positions, "segments": row.segments}
        return batch, weights, index, row.padding

    def _padded(self, texts: list[Text]):
        length, multiple = max([len(text.ids) for text in texts] or [1]), self.pad_to_multiple_of or 1
        shape = max(1, len(texts)), -(-length // multiple) * multiple
        ids = torch.full(shape, self.processor.tokenizer.pad_token_id)
        labels, index = torch.full(shape, IGNORE), torch.full(shape, -1)
        weights, attention = torch.zeros(shape), torch.zeros(shape, dtype=torch.long)
        attention[0, 0] = 1  # also of a batch of nothing
        for row, text in enumerate(texts):
            for tensor, values in zip((ids, labels, weights, index), text):
                tensor[row, : len(values)] = torch.from_numpy(values)
            attention[row, : len(text.ids)] = 1
        batch = {"input_ids": ids, "attention_mask": attention, "labels": labels}
        return batch, weights, index, ids.numel() - sum(len(text.ids) for text in texts)

    def _count(self, record):
        worker = torch.utils.data.get_worker_info()
        row = 0 if worker is None else 1 + worker.id % _MAX_WORKERS
        self._dropped[row, DROP_REASONS.index(record.dropped)] += 1

    def _is_skipped(self) -> bool:
        """Whether this batch is one of `skip_batches` that a resumed run on a stream has no use for."""
        worker = torch.utils.data.get_worker_info()
        number = self._made if worker is None else self._made * worker.num_workers + worker.id
        self._made += 1
        return number < self.skip_batches


def _of_next(values: torch.Tensor, last: int) -> torch.Tensor:
    """At each position of `(batch, tokens)` the value of the next, which it predicts; none follows the last."""
    return torch.cat([values[:, 1:], torch.full_like(values[:, :1], last)], dim=1)
