"""What the pages that stand alone have in common: how they begin, and texts and pictures as parts of them.

Whatever a person, a data set or a model wrote stands there as text, and a page fetches nothing.
"""

import base64
import html
import io

from PIL import Image

from processing.data_error_vlm import JOINERS


HEAD = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
"""
"""The beginning of a page, up to its title."""


def shown_text(text: str) -> str:
    """A text as text, without what would turn or hide its neighbours; what joins letters and emoji stays."""
    return html.escape("".join(c if c.isprintable() or c in f"\n{JOINERS}" else " " for c in text))


def picture_uri(picture: Image.Image, side: int, exact: int, quality: int) -> str:
    """
    A picture as a `data:` URI.

    Args:
        side: pixels of its longer side at the most.
        exact: pixels of the longer side up to which it keeps each pixel as it is, as a PNG.
        quality: of the JPEG that a larger one becomes.
    """
    picture = picture.copy()
    picture.thumbnail((side, side))
    content = io.BytesIO()
    kind, options = ("PNG", {}) if max(picture.size) <= exact else ("JPEG", {"quality": quality})
    picture.save(content, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode('ascii')}"


__all__ = ["HEAD", "picture_uri", "shown_text"]
