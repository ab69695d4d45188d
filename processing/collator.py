"""Encoded conversations become one batch: images decoded, sequences padded, labels beside their tokens.

A label sits at its token's own position in the expanded sequence, behind everything that the images take up; the model
shifts. What is padding is known from lengths, so a pad token that is also the end token is still learned as the end.
"""

from typing import Any

import torch

from .encoding import DROP_REASONS, IGNORE, Encode, SampleDropped, encode_dialogue
from .images import load_image
from .processing_vlm import VLMProcessor


_MAX_WORKERS = 256


class VLMDataCollator:
    """
    Makes a batch of conversations for `Trainer` or a `DataLoader`.

    Args:
        processor: the model's processor.
        max_length: positions a sequence may have, image tokens included; conversations given encoded were cut before.
        encode: how a conversation becomes ids: `encode_dialogue` (stage 2) or `encode_caption` (stage 1).
        pad_to_multiple_of: round the batch's length up.

    Returns (from a call with a list of conversations, encoded or not):
        `input_ids`, `attention_mask`, `labels`, each `(batch, tokens)`, padded on the right with labels -100, and
        `pixel_values` `(images, channels, height, width)` where the batch has images. Conversations that cannot be
        learned from are left out and counted in `dropped`, in worker processes too; a batch of nothing else is one
        pad token with label -100, of which the loss is 0.

    Raises:
        ValueError, FileNotFoundError: an image that cannot be read, by name.
    """

    def __init__(
        self,
        processor: VLMProcessor,
        max_length: int | None = None,
        encode: Encode = encode_dialogue,
        pad_to_multiple_of: int | None = None,
    ):
        self.processor = processor
        self.max_length = max_length
        self.encode = encode
        self.pad_to_multiple_of = pad_to_multiple_of
        # One row a worker: each writes its own, in memory that all processes see.
        self._dropped = torch.zeros(_MAX_WORKERS + 1, len(DROP_REASONS), dtype=torch.long).share_memory_()

    @property
    def dropped(self) -> dict[str, int]:
        """How many conversations this collator left out, by reason."""
        counts = self._dropped.sum(0).tolist()
        return {reason: count for reason, count in zip(DROP_REASONS, counts) if count}

    def __call__(self, conversations: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        items = [item for item in map(self._encoded, conversations) if item is not None]
        images = [load_image(reference) for item in items for reference in item["images"]]
        rows = [self.processor.expand_images(item["input_ids"], item["labels"]) for item in items]
        rows = rows or [([self.processor.tokenizer.pad_token_id], [IGNORE])]
        length = max(len(ids) for ids, _ in rows)
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = {
            "input_ids": torch.full((len(rows), length), self.processor.tokenizer.pad_token_id),
            "attention_mask": torch.zeros(len(rows), length, dtype=torch.long),
            "labels": torch.full((len(rows), length), IGNORE),
        }
        for index, (ids, labels) in enumerate(rows):
            batch["input_ids"][index, : len(ids)] = torch.tensor(ids)
            batch["attention_mask"][index, : len(ids)] = 1
            batch["labels"][index, : len(ids)] = torch.tensor(labels)
        if images:
            batch["pixel_values"] = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        return batch

    def _encoded(self, conversation):
        item, images = conversation, conversation.get("images") or []
        if "input_ids" not in item:
            try:
                item = self.encode(self.processor, conversation, self.max_length)
            except SampleDropped as reason:
                worker = torch.utils.data.get_worker_info()
                row = 0 if worker is None else 1 + worker.id % _MAX_WORKERS
                self._dropped[row, DROP_REASONS.index(str(reason))] += 1
                return None
        parts = item["input_ids"].count(self.processor.image_token_id)
        if parts != len(images):
            raise ValueError(
                f"a conversation with {parts} image parts and {len(images)} images was found; expected one image for "
                "each part, in the order of the parts."
            )
        return {**item, "images": images}
