"""The built-in data set as a source: scenes that are drawn when they are looked at, as captions or as dialogues."""

import dataclasses
import json
from functools import partial

import datasets

from .. import shapes
from ..data_error_vlm import DuetError
from .rows import Rows, Splits


DRAWN_ROWS = {"train": 20_000, "validation": 500, "test": 2_000}
DRAWN_SIZE = 64


def drawn_splits(name: str | None) -> Splits:
    """The built-in data set: `captions` of scenes, or `dialogues` about them (in the test split single questions)."""
    read = {"captions": _drawn_captions, "dialogues": _drawn_dialogues}.get(name or "captions")
    if read is None:
        raise DuetError(f"shapes: no configuration {name!r}; expected captions or dialogues in --dataset_name")
    return {split: partial(read, split, count) for split, count in DRAWN_ROWS.items()}


def _drawn_captions(split: str, count: int) -> datasets.Dataset:
    scenes = [shapes.scene(split, index) for index in range(count)]
    return _drawn(scenes, {"caption": [scene.captions() for scene in scenes]})


def _drawn_dialogues(split: str, count: int) -> datasets.Dataset:
    if split != "test":
        scenes = [shapes.scene(split, index) for index in range(count)]
        return _drawn(scenes, {"messages": [_turns(scene.dialogue()) for scene in scenes]})
    asked = shapes.questions(split, count)
    scenes, turns = [scene for scene, _ in asked], [turn for _, turn in asked]
    columns: dict[str, list] = {
        "messages": [_turns([turn]) for turn in turns],
        "kind": [turn.kind for turn in turns],
        "subset": ["unseen pairs" if turn.unseen else "seen pairs" for turn in turns],
    }
    return _drawn(scenes, columns)


def _turns(turns: list[shapes.Turn]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in (("user", turn.question), ("assistant", turn.answer))
    ]


def _drawn(scenes: list[shapes.Scene], columns: dict[str, list]) -> datasets.Dataset:
    images = [{"bytes": json.dumps(dataclasses.asdict(scene)).encode(), "path": None} for scene in scenes]
    return datasets.Dataset.from_dict({"image": images, **columns}).cast_column("image", datasets.Image(decode=False))


def with_drawings(rows: Rows) -> Rows:
    """The same rows with images, drawn when they are looked at; what is stored of one is only what is in it."""
    if isinstance(rows, datasets.IterableDataset):
        return rows.map(_draw, batched=True, batch_size=1)
    return rows.with_transform(_draw)


def _draw(batch: dict[str, list]) -> dict[str, list]:
    if "image" not in batch:
        return batch
    return {**batch, "image": [_scene(image["bytes"]).draw(DRAWN_SIZE) for image in batch["image"]]}


def _scene(description: bytes) -> shapes.Scene:
    fields = json.loads(description)
    return shapes.Scene(**{**fields, "objects": tuple(shapes.Object(**thing) for thing in fields["objects"])})
