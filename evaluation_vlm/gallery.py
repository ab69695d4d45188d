"""A picture of what a trained model answers: images with question, expected and generated answer.

What no font of this machine can write, a page in HTML beside the picture shows: a browser has the fonts.
"""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from .fonts import Fonts


IMAGE_SIDE, TEXT_WIDTH, LINE, MARGIN = 168, 300, 17, 8
COLUMNS = 2
# A text that runs away would make a picture of any height.
MOST_LINES = 24


class Shown(NamedTuple):
    """A question as it is shown: its image where it has one, what was asked, expected and answered."""

    image: Image.Image | None
    asked: str
    expected: str
    answer: str
    right: bool


def draw_gallery(shown: Sequence[Shown], file: Path) -> Path | None:
    """
    Write a picture of questions and answers.

    Args:
        shown: what to show, in order.
        file: the picture, a PNG.

    Returns:
        The page that was written beside it, under the same name with `.html`, because some characters are in no font of
        this machine; `None` where the picture shows all.
    """
    fonts = Fonts()
    cells = [_cell(one, fonts) for one in shown]
    rows = [cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)]
    heights = [max(cell.height for cell in row) for row in rows]
    sheet = Image.new("RGB", ((IMAGE_SIDE + TEXT_WIDTH) * COLUMNS, sum(heights)), "white")
    for number, row in enumerate(rows):
        for column, cell in enumerate(row):
            sheet.paste(cell, (column * (IMAGE_SIDE + TEXT_WIDTH), sum(heights[:number])))
    sheet.save(file)
    page = file.with_suffix(".html")
    if not fonts.missing:
        page.unlink(missing_ok=True)  # an earlier run's
        return None
    page.write_text(_page(shown), encoding="utf-8")
    return page


def _texts(shown: Shown) -> list[tuple[str, str]]:
    """What is written beside an image, each with its colour."""
    return [
        (shown.asked, "black"),
        (f"expected: {shown.expected}", "dimgray"),
        (f"generated: {shown.answer}", "darkgreen" if shown.right else "firebrick"),
    ]


def _cell(shown: Shown, fonts: Fonts) -> Image.Image:
    lines = []
    for text, colour in _texts(shown):
        text = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
        wrapped = fonts.wrap(text[: 100 * MOST_LINES], TEXT_WIDTH - 3 * MARGIN)
        lines += [(line, colour) for line in wrapped[:MOST_LINES]]
        if len(wrapped) > MOST_LINES:
            lines.append(("...", colour))
    size = (IMAGE_SIDE + TEXT_WIDTH, max(IMAGE_SIDE, LINE * len(lines)) + 2 * MARGIN)
    cell = Image.new("RGB", size, "white")
    if shown.image is not None:
        cell.paste(_thumbnail(shown.image), (MARGIN, MARGIN))
    pen = ImageDraw.Draw(cell)
    for number, (line, colour) in enumerate(lines):
        fonts.draw(pen, (IMAGE_SIDE + 2 * MARGIN, MARGIN + number * LINE), line, colour)
    return cell


def _thumbnail(image: Image.Image) -> Image.Image:
    """As wide as there is room for, each pixel a square; of a tall image the top."""
    top = image.crop((0, 0, image.width, min(image.height, image.width)))
    return top.resize((IMAGE_SIDE, max(1, round(top.height * IMAGE_SIDE / top.width))), Image.Resampling.NEAREST)


def _page(shown: Sequence[Shown]) -> str:
    sections = []
    for one in shown:
        picture = ""
        if one.image is not None:
            content = io.BytesIO()
            _thumbnail(one.image).save(content, "PNG")
            uri = base64.b64encode(content.getvalue()).decode("ascii")
            picture = f'<img src="data:image/png;base64,{uri}" alt="">'
        lines = "".join(f'<p style="color: {colour}">{html.escape(text)}</p>' for text, colour in _texts(one))
        sections.append(f"<section>{picture}<div>{lines}</div></section>")
    return _PAGE.format(sections="\n".join(sections))


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Questions and answers</title>
<style>
body {{ margin: 24px; font: 15px/1.4 system-ui, sans-serif; display: flex; flex-wrap: wrap; gap: 16px; }}
section {{ display: flex; gap: 12px; width: 480px; }}
img {{ width: 168px; height: max-content; image-rendering: pixelated; }}
p {{ margin: 0 0 6px; overflow-wrap: anywhere; white-space: pre-wrap; }}
</style>
</head>
<body>
{sections}
</body>
</html>
"""

__all__ = ["Shown", "draw_gallery"]
