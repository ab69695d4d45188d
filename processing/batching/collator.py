"""Rows, conversations or encodings become one batch: images seen, sequences padded, labels beside their tokens.

What is not read yet is read here, and what is not encoded encoded. A label sits at its token's own position in the
expanded sequence, behind everything that the images take up. Who predicts whom is said here and nowhere else:
`shift_labels` hold the token after each position, which the model costs. What is padding is known from lengths, so a
pad token that is also the end token is still learned as the end.
"""

import dataclasses
from typing import Any

import torch
from transformers.utils import logging

from ..data_error_vlm import DuetError
from ..image_files_vlm import BadImage, ImagePolicy, load_image
from ..processing_vlm import VLMProcessor
from ..reading.items import SPLIT_TURNS, Reading, each_answer_last, is_item
from .account import BAD_SAMPLE_REASONS, DROP_REASONS, BatchAccount, Record
from .encoding import IGNORE, Encode, Encoder, encode_dialogue, encode_item, place


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
            its own (see `each_answer_last`), so that a batch has more samples than it was given rows.
        account: add the batch's `BatchAccount` under `"account"`, for `VLMTrainer`, which takes it out again.

    Returns (from a call with a list of such):
        `input_ids`, `attention_mask`, `labels`, each `(batch, tokens)`, padded on the right with labels -100;
        `shift_labels` of the same shape, what each position predicts, and `loss_weights`, what that prediction weighs,
        where a message has a weight; and `pixel_values` `(views, channels, height, width)` where the batch has images,
        with `image_grids` `(images, 2)` where they may be tiled. Conversations that cannot be learned from are left out
        and counted in `dropped`, in worker processes too; a batch of nothing else is one pad token with label -100, of
        which the loss is 0.

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
    ):
        for name, value, choices in (
            ("on_bad_sample", on_bad_sample, ON_BAD_SAMPLE), ("split_turns", split_turns, SPLIT_TURNS)
        ):  # fmt: skip
            if value not in choices:
                raise DuetError(f"{name}={value!r}: expected one of {', '.join(choices)}.")
        self.split_turns = split_turns
        self.encoder = processor if isinstance(processor, Encoder) else Encoder(processor, encode, max_length)
        self.processor = self.encoder.processor
        self.pad_to_multiple_of = pad_to_multiple_of
        self.on_bad_sample = on_bad_sample
        self.account = account
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

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        if self._is_skipped():
            return {}
        items, records = [], []
        read = self._read(rows)
        if self.split_turns != "none":
            read = (part for item in read for part in ([item] if "input_ids" in item else each_answer_last(item)))
        for conversation in read:
            item, record = self._opened(conversation)
            records.append(record)
            if not self.account:
                self._warn(record)
            if item is None:
                self._count(record)
            else:
                items.append(item)
        batch: dict[str, Any] = self._padded(items)
        batch["shift_labels"] = _of_next(batch["labels"], IGNORE)
        if any(item.get("weights") for item in items):
            batch["loss_weights"] = _of_next(self._weights(items, batch["labels"]), 0)
        views = [view for item in items for view in item["views"]]
        for name in views[0] if views else ():
            batch[name] = torch.cat([view[name] for view in views])
        if self.account:
            padding = batch["labels"].numel() - sum(record.tokens for record in records)
            batch["account"] = BatchAccount(records, padding)
        return batch

    def _read(self, rows):
        """The items of the batch; what has no name of its own is called by its place in it."""
        for index, row in enumerate(rows):
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

    def _opened(self, item) -> tuple[dict[str, Any] | None, Record]:
        """An item with ids and what is seen of its images, or `None`; and its record."""
        # The ids of tiled images follow from their sizes, so each is opened (and fetched) before, once.
        seen = None
        try:
            if self.processor.max_tiles > 1:
                seen = self._seen(item)
            encoded, record = encode_item({**item, **(seen or {})}, self.encoder)
            opened = None if encoded is None else {**encoded, **(seen or self._seen(encoded))}
        except BadImage as error:
            line = f"{place(item)}{error}"
            if self.on_bad_sample == "error":
                raise type(error)(line, error.reason) from error
            return None, Record(item.get("source") or "", item.get("row"), error.reason, line)
        if opened is None and self.on_bad_sample == "error" and record.dropped in BAD_SAMPLE_REASONS:
            raise DuetError(record.detail)
        return opened, record

    def _seen(self, item):
        """What the encoder sees of an item's images, one by one: only one is in memory as large as it is stored."""
        views, counts = [], []
        for reference in item.get("images") or ():
            image = load_image(reference, size=self._image_size)
            counts.append(self.processor.image_tokens(image.height, image.width))
            views.append(self.processor.process_images([image]))
        return {"views": views, "image_counts": counts}

    @property
    def _image_size(self):
        """The least height and width that the image processor needs, so that large files are decoded no larger."""
        if self.processor.max_tiles > 1:  # the grid follows from the size that the file has
            return None
        size = dict(getattr(self.processor.image_processor, "size", None) or {})
        sides = size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge"))
        return sides if None not in sides else None

    def _padded(self, items) -> dict[str, torch.Tensor]:
        pad = self.processor.tokenizer.pad_token_id
        rows = [self._expanded(item, item["input_ids"], item["labels"]) for item in items] or [([pad], [IGNORE])]
        length = max(len(ids) for ids, _ in rows)
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = {
            "input_ids": torch.full((len(rows), length), pad),
            "attention_mask": torch.zeros(len(rows), length, dtype=torch.long),
            "labels": torch.full((len(rows), length), IGNORE),
        }
        for index, (ids, labels) in enumerate(rows):
            batch["input_ids"][index, : len(ids)] = torch.tensor(ids)
            batch["attention_mask"][index, : len(ids)] = 1
            batch["labels"][index, : len(ids)] = torch.tensor(labels)
        return batch

    def _weights(self, items, labels) -> torch.Tensor:
        loss_weights = (labels != IGNORE).float()
        for index, item in enumerate(items):
            if item.get("weights"):
                _, weights = self._expanded(item, item["input_ids"], item["weights"])
                loss_weights[index, : len(weights)] = torch.tensor(weights)
        return loss_weights

    def _expanded(self, item, *rows):
        return self.processor.expand_images(*rows, counts=item["image_counts"])

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
