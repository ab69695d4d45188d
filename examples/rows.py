"""The data of the examples, in the columns that TRL reads: rows of a user's, or questions about the built-in shapes.

A user's rows are named as for Duet's own scripts: a file, a folder or a data set of the Hub, and where its images are.
"""

from typing import Any

from datasets import Dataset, Image, List

from processing import read_rows
from processing.reading.sources import open_source
from processing.shapes import Scene, Turn, questions


SIZE = 64  # pixels of a drawn image, as the built-in recipe learns them


def dialogues(name: str | None, image_dir: str | None, number: int = 256) -> list[dict[str, Any]]:
    """Conversations, each `images` and `messages`, from rows of any layout that Duet reads."""
    if name is None:
        drawn = [(scene, turn, [*_asked(turn), _said("assistant", turn.answer)]) for scene, turn in _drawn(number)]
        return read_rows([{"image": scene.draw(SIZE), "messages": messages} for scene, _, messages in drawn])
    source = open_source(name, image_dir=image_dir)
    return read_rows(source.rows, image_dir=source.image_dir, source=source.name)


def for_trl(conversations: list[dict[str, Any]]) -> Dataset:
    """Conversations as a data set of `images` and `messages`."""
    return _pictured(Dataset.from_list([{key: row[key] for key in ("images", "messages")} for row in conversations]))


def preferences(name: str | None, image_dir: str | None, number: int = 256) -> Dataset:
    """Rows of `images`, `prompt`, `chosen` and `rejected`; of the shapes an answer, and another to a like question."""
    if name is not None:
        return _rows(name, image_dir)
    answers: dict[str, list[str]] = {}
    for _, turn in _drawn(number):
        answers.setdefault(turn.kind, []).append(turn.answer)
    rows = []
    for scene, turn in _drawn(number):
        wrong = next((answer for answer in answers[turn.kind] if answer != turn.answer), None)
        if wrong is not None:
            chosen, rejected = ([_said("assistant", answer)] for answer in (turn.answer, wrong))
            rows.append({"images": [scene.draw(SIZE)], "prompt": _asked(turn), "chosen": chosen, "rejected": rejected})
    return Dataset.from_list(rows)


def tasks(name: str | None, image_dir: str | None, number: int = 256) -> Dataset:
    """Rows of `images`, `prompt` and `answer`, the one that is rewarded."""
    if name is not None:
        return _rows(name, image_dir)
    return Dataset.from_list(
        [
            {"images": [scene.draw(SIZE)], "prompt": _asked(turn), "answer": turn.answer}
            for scene, turn in _drawn(number)
        ]
    )


def _drawn(number: int) -> list[tuple[Scene, Turn]]:
    return questions("train", number)


def _asked(turn: Turn) -> list[dict[str, str]]:
    return [_said("user", turn.question)]


def _said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _rows(name, image_dir):
    source = open_source(name, image_dir=image_dir)

    def pictured(row):
        pictures = row["images"] if "images" in row else [row["image"]] if "image" in row else []
        folder = source.image_dir
        return {"images": [str(folder / one) if isinstance(one, str) else one for one in pictures or []]}

    return _pictured(source.rows.map(pictured))


def _pictured(rows: Dataset) -> Dataset:
    return rows.cast_column("images", List(Image()))
