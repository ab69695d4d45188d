"""A picture of what a model answers: images with question, expected and generated answer, and score.

What no font of this machine can write, the page in HTML beside the picture shows: a browser has the fonts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, features

from processing.data_error_vlm import JOINERS

from .files import replace_image
from .fonts import Fonts


IMAGE_SIDE, TEXT_WIDTH, LINE, MARGIN = 168, 320, 18, 12
COLUMNS = 2
# A text that runs away would make a picture of any height.
MOST_LINES = 24
_INK, _FAINT, _LINE = "#1c2430", "#5b6675", "#dfe3e9"
_COLOURS = {"good": ("#0b7a3e", "#e3f5ea"), "mid": ("#8a5a00", "#fdf1d8"), "bad": ("#b3261e", "#fcebea")}


class Shown(NamedTuple):
    """
    A question as it is shown.

    Args:
        image: the last that was asked about, where there is one.
        asked: the question.
        expected: every right answer.
        answer: what the model said.
        score: of the answer, where a metric gives one.
        written: the score as it is written.
        mark: `good`, `mid` or `bad`.
        kind: what the question is counted under.
    """

    image: Image.Image | None
    asked: str
    expected: tuple[str, ...]
    answer: str
    score: float | None = None
    written: str = ""
    mark: str = "mid"
    kind: str = "all"


class Drawn(NamedTuple):
    """A picture, and whether no font of this machine has some of its characters."""

    picture: Image.Image
    lacks: bool


def draw_gallery(shown: Sequence[Shown], file: Path) -> Drawn:
    """
    Write a picture of questions and answers.

    Args:
        shown: what to show, in order; one at least.
        file: the picture, a PNG, which is replaced whole.
    """
    fonts = Fonts()
    cells = [_cell(one, fonts) for one in shown]
    rows = [cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)]
    heights = [max(cell.height for cell in row) for row in rows]
    sheet = Image.new("RGB", ((IMAGE_SIDE + TEXT_WIDTH) * COLUMNS, sum(heights)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        for column, cell in enumerate(row):
            sheet.paste(cell, (column * (IMAGE_SIDE + TEXT_WIDTH), sum(heights[:number])))
        if number:
            pen.line([(MARGIN, sum(heights[:number])), (sheet.width - MARGIN, sum(heights[:number]))], fill=_LINE)
    replace_image(sheet, file)
    return Drawn(sheet, bool(fonts.missing))


def _texts(shown: Shown) -> list[tuple[str, str]]:
    """What is written beside an image, each with its colour."""
    said = _COLOURS[shown.mark][0] if shown.score is not None else _INK
    asked = [(shown.asked, _INK)] if shown.asked else []
    expected = shown.expected[0] if shown.expected else ""
    return [*asked, (f"expected: {expected}", _FAINT), (f"generated: {shown.answer}", said)]


def _cell(shown: Shown, fonts: Fonts) -> Image.Image:
    lines: list[tuple[str, str]] = []
    kept = f"\n{JOINERS}" if features.check("raqm") else "\n"  # without it each would be drawn, as a box
    for text, colour in _texts(shown):
        text = "".join(c if c.isprintable() or c in kept else " " for c in text)
        wrapped = fonts.wrap(text[: 100 * MOST_LINES], TEXT_WIDTH - 3 * MARGIN)
        lines += [(line, colour) for line in wrapped[:MOST_LINES]]
        if len(wrapped) > MOST_LINES:
            lines.append(("...", colour))
    badge = LINE + MARGIN // 2 if shown.score is not None else 0
    size = (IMAGE_SIDE + TEXT_WIDTH, max(IMAGE_SIDE, LINE * len(lines) + badge) + 2 * MARGIN)
    cell = Image.new("RGB", size, "white")
    if shown.image is not None:
        cell.paste(_thumbnail(shown.image), (MARGIN, MARGIN))
    pen = ImageDraw.Draw(cell)
    left = IMAGE_SIDE + 2 * MARGIN
    for number, (line, colour) in enumerate(lines):
        fonts.draw(pen, (left, MARGIN + number * LINE), line, colour)
    if badge:
        ink, ground = _COLOURS[shown.mark]
        top = MARGIN + LINE * len(lines) + MARGIN // 2
        box = (left, top, left + fonts.width(shown.written) + 16, top + LINE)
        pen.rounded_rectangle(box, radius=LINE // 2, fill=ground)
        fonts.draw(pen, (left + 8, top + 1), shown.written, ink)
    return cell


def _thumbnail(image: Image.Image) -> Image.Image:
    """As wide as there is room for, each pixel a square; of a tall image the top."""
    top = image.crop((0, 0, image.width, min(image.height, image.width)))
    return top.resize((IMAGE_SIDE, max(1, round(top.height * IMAGE_SIDE / top.width))), _smooth(image))


def _smooth(image):
    """Pixels of a tiny picture stay squares."""
    return Image.Resampling.NEAREST if max(image.size) < 128 else Image.Resampling.LANCZOS


__all__ = ["Drawn", "Shown", "draw_gallery"]
