"""Samples of the data as one batch of the collator that trains, taken apart again into pieces that can be read."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from processing import VLMDataCollator
from processing.batching.account import Record, number_of
from processing.batching.encoding import IGNORE, Encoder
from processing.image_files_vlm import load_image


LONGEST_PIECE = 16


class Kind(NamedTuple):
    """What a token is to the model, and how it is shown: plain marks, two shades for a terminal, one for the page."""

    meaning: str
    marks: tuple[str, str]
    shades: tuple[int, int]
    colour: str


KINDS = {
    "image": Kind("the features of an image", ("{", "}"), (117, 117), "#a9d3ff"),
    "prompt": Kind("read, not learned", ("", ""), (254, 251), "#e6e8ec"),
    "supervised": Kind("learned", ("[[", "]]"), (157, 120), "#a5eab4"),
    "padding": Kind("fills up the batch", ("{", "}"), (223, 223), "#ffdfa0"),
}


@dataclass
class Piece:
    """Positions shown as one: a token, tokens whose bytes only decode together, an image, the padding."""

    kind: str
    text: str
    start: int
    ids: list[int]
    labels: list[int]
    weight: float

    @property
    def end(self) -> int:
        """The position after the last."""
        return self.start + len(self.ids)

    @property
    def title(self) -> str:
        """Positions, ids and labels in a line; what is the same for all positions is said once."""
        last = f" to {self.end - 1}" if len(self.ids) > 1 else ""
        same = len(set(self.ids)) == 1 and len(set(self.labels)) == 1
        ids, labels = (values[:1] if same else values for values in (self.ids, self.labels))
        weight = f", weight {self.weight:g}" if self.kind == "supervised" and self.weight != 1 else ""
        return f"position {self.start}{last}, id {_listed(ids)}, label {_listed(labels)}{weight}"


def _listed(numbers):
    return " ".join(map(str, numbers))


class Sample(NamedTuple):
    """A sample of the batch: what became of it, images and tiles by name, and its pieces, none where it was dropped."""

    record: Record
    images: list[tuple[str, Image.Image]]
    pieces: list[Piece]

    @property
    def name(self) -> str:
        """The source and the row."""
        return f"{self.record.source}, row {self.record.row}"

    @property
    def facts(self) -> str:
        """Lengths and numbers in a line, or why the sample was dropped."""
        record = self.record
        if record.dropped is not None:
            return f"dropped: {record.dropped}" + (f" ({record.detail})" if record.detail else "")
        padding = sum(len(piece.ids) for piece in self.pieces if piece.kind == "padding")
        facts = [f"{record.tokens:,} positions"]
        if record.images:
            images = number_of(record.images, "image")
            facts.append(f"{record.image_tokens:,} for {images}")
        facts.append(f"{record.supervised:,} supervised")
        if padding:
            facts.append(f"then {padding:,} of padding")
        if record.cut is not None:
            facts.append(f"cut: {record.cut}")
        return ", ".join(facts)


def read_samples(
    encoder: Encoder,
    items: list[dict[str, Any]],
    sees_images: bool = True,
    pad_to_multiple_of: int | None = None,
) -> list[Sample]:
    """
    Items of a data set as one batch of the collator that trains, taken apart again.

    Args:
        sees_images: show images as the vision encoder gets them, else as they are stored.
    """
    processor = encoder.processor
    collator = VLMDataCollator(encoder, pad_to_multiple_of=pad_to_multiple_of, account=True)
    batch = collator(items)
    encodings = zip(*(batch[name].tolist() for name in ("input_ids", "labels", "attention_mask")))
    weights = itertools.repeat(None)
    if "loss_weights" in batch:  # they lie where a token is predicted, and are shown at the token
        weights = iter(batch["loss_weights"].roll(1, dims=1).tolist())
    grids = batch["image_grids"].tolist() if "image_grids" in batch else [(1, 1)] * len(batch.get("pixel_values", ()))
    pictures = iter(batch.get("pixel_values", ()))
    seen = [list(itertools.islice(pictures, len(_view_names(1, *grid)))) for grid in grids]
    shown = _shown(batch, [processor.tile_tokens(*grid) for grid in grids])
    samples = []
    for item, record in zip(items, batch["account"].records):
        if record.dropped is not None:
            samples.append(Sample(record, [], []))
            continue
        numbers = list(itertools.islice(shown, record.images))
        if sees_images:
            images = [
                (name, _as_image(view, processor.image_processor))
                for place, number in enumerate(numbers, start=1)
                for name, view in zip(_view_names(place, *grids[number]), seen[number])
            ]
        else:
            opened = enumerate(map(load_image, item.get("images") or ()), start=1)
            images = [(f"image {place}", image) for place, image in opened]
        counts = [processor.tile_tokens(*grids[number]) for number in numbers]
        ids, labels, mask = next(encodings)
        samples.append(Sample(record, images, list(pieces_of(processor, counts, ids, labels, mask, next(weights)))))
    return samples


def _shown(batch: dict[str, Any], counts: list[int]) -> Iterator[int]:
    """Which of the batch's images stands at each of its places; an image that is shown twice is there once."""
    if "feature_index" not in batch:
        return iter(range(len(counts)))
    begins = {sum(counts[:number]): number for number in range(len(counts))}
    return (begins[feature] for feature in batch["feature_index"].flatten().tolist() if feature in begins)


def _view_names(place: int, rows: int, columns: int) -> list[str]:
    """What the views of an image are called, in their order."""
    tiles = [f"row {row}, column {column}" for row in range(1, rows + 1) for column in range(1, columns + 1)]
    return [f"image {place}", *(f"image {place}, tile in {tile}" for tile in tiles if len(tiles) > 1)]


def _as_image(pixels_CHW: torch.Tensor, image_processor) -> Image.Image:
    """What the vision encoder is given, its normalisation undone."""
    values = pixels_CHW.float()
    if getattr(image_processor, "do_normalize", False):
        mean, std = (torch.tensor(getattr(image_processor, f"image_{name}")).view(-1, 1, 1) for name in ("mean", "std"))
        values = values * std + mean
    if getattr(image_processor, "do_rescale", False):
        values = values / image_processor.rescale_factor
    pixels_HWC = values.round().clamp(0, 255).byte().permute(1, 2, 0)
    return Image.fromarray(pixels_HWC.numpy())


def pieces_of(processor, counts, ids, labels, mask, weights) -> Iterator[Piece]:
    """
    A row of a batch in pieces that can be read.

    Args:
        counts: positions of each image of it.
    """
    counts = iter(counts)
    kinds = [
        "padding" if not there else "image" if id == processor.image_token_id
        else "prompt" if label == IGNORE else "supervised"
        for id, label, there in zip(ids, labels, mask)
    ]  # fmt: skip
    before = start = 0
    of_image = next(counts, 0)
    for end in range(1, len(ids) + 1):
        kind = kinds[start]
        if kind == "image":
            text, whole = processor.image_token, end - start == of_image
            of_image = next(counts, 0) if whole else of_image
        elif kind == "padding":
            text, whole = "padding", end == len(ids)
        else:
            text = _text_of(processor.tokenizer, ids[before:start], ids[start:end])
            # A character whose bytes are not all there yet is decoded as this one.
            whole = not text.endswith("\ufffd") or end == len(ids) or kinds[end] != kind or end - start == LONGEST_PIECE
        if whole:
            yield Piece(kind, text, start, ids[start:end], labels[start:end], weights[start] if weights else 1.0)
            before, start = start, end


def _text_of(tokenizer: PreTrainedTokenizerBase, before: list[int], ids: list[int]) -> str:
    """The text of ids behind others: decoded alone, many tokenizers leave out the blank at their beginning."""

    def decoded(ids: list[int]) -> str:  # of one sequence, and so one text
        return cast(str, tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    left, both = decoded(before), decoded(before + ids)
    return both[len(left) :] if both.startswith(left) else decoded(ids)


def _visible(text: str) -> str:
    """Blanks, tabs and ends of lines as characters; whatever else would act on a terminal, as its escape."""
    shown = {" ": "·", "\t": "→", "\n": "↵\n"}
    return "".join(shown.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)


def counted(piece: Piece) -> str:
    """The text of a piece, and behind it of how many positions an image or the padding is."""
    many = len(piece.ids) > 1 and piece.kind in ("image", "padding")
    return _visible(piece.text) + (f" x {len(piece.ids)}" if many else "")


def runs_of(pieces: list[Piece]) -> Iterable[tuple[str, str, list[Piece]]]:
    """Neighbours of one kind and weight; the weight as a mark, empty where it is 1. Each image is a run of its own."""
    for (kind, weight, _), run in itertools.groupby(
        pieces, lambda p: (p.kind, p.weight, p.start if p.kind == "image" else None)
    ):
        yield kind, f"×{weight:g}" if kind == "supervised" and weight != 1 else "", list(run)
