"""A judgement as files: every prediction for a program, and a page of some of them for a person."""

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from processing.image_files_vlm import image_name

from .files import replace_text
from .gallery import Shown
from .gallery_page import write_page
from .judgement import Judgement
from .showing import Wording, chosen, shown_of


PREDICTIONS, PAGE = "predictions.jsonl", "samples.html"


def write_predictions(judgement: Judgement, wording: Wording, folder: Path, step: int | None = None) -> None:
    """Write a line of JSON for every prediction: what was asked, expected and generated, and every score."""
    replace_text("".join(_lines(judgement, wording, step)), folder / PREDICTIONS)


def _lines(judgement: Judgement, wording: Wording, step: int | None) -> Iterator[str]:
    for number, (question, said, likelihoods) in enumerate(judgement.predictions):
        each = {name: scores.each[number] for name, scores in judgement.scores.items() if scores.each is not None}
        line: dict[str, Any] = {
            "step": step,
            "id": question.id,
            "source": last_part(question.source),
            "row": question.row,
            "subset": question.subset,
            "kind": question.kind,
            "images": [last_part(image_name(reference)) for reference in question.prompt.images],
            "question": wording(question),
            "expected": question.references,
            "generated": said,
            "scores": {name: score for name, score in each.items() if score is not None},
        }
        if likelihoods is not None:  # JSON knows no infinity
            line["choices"] = {
                choice: value if math.isfinite(value) else None for choice, value in zip(question.choices, likelihoods)
            }
        yield json.dumps({name: value for name, value in line.items() if value is not None}, ensure_ascii=False) + "\n"


def last_part(name: str) -> str:
    """What a file, a folder or an address ends in, without where it lies or what gives access: it may be passed on."""
    if "://" in name:
        host, _, path = re.split(r"[?#]", name)[0].rpartition("://")[2].rstrip("/").partition("/")
        return path.rpartition("/")[2] or host.rpartition("@")[2]
    is_place = os.path.isabs(name) or os.path.exists(os.path.expanduser(name))
    return Path(os.path.abspath(name)).name if is_place else name


def write_gallery(judgement: Judgement, wording: Wording, folder: Path, title: str, about: str) -> list[Shown]:
    """
    Write a page of predictions, those of the lowest scores first.

    Args:
        title: of the page.
        about: what was judged, before the number of questions.

    Returns:
        what the page shows.
    """
    shown = shown_of(judgement, chosen(judgement), wording)
    number = len(judgement.predictions)
    of_all = "" if len(shown) == number else f" Shown are {len(shown):,}: the lowest, and others evenly."
    subtitle = f"{about} · {number:,} {'question' if number == 1 else 'questions'}.{of_all}"
    values = {
        metric.name.replace("_", " "): f"{judgement.values[metric.name]:{metric.shown}}" for metric in judgement.metrics
    }
    notes = "".join(f" {name.replace('_', ' ')}: {note}." for name, note in judgement.notes.items())
    replace_text(write_page(title, subtitle + notes, values, shown), folder / PAGE)
    return shown


__all__ = ["PAGE", "PREDICTIONS", "last_part", "write_gallery", "write_predictions"]
