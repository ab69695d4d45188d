"""Files that are replaced whole: whoever reads one finds what was there before or all of what is there now."""

import os
from collections.abc import Callable
from pathlib import Path

from PIL import Image


def replace_file(file: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file beside, and give it its name when it is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        write(beside)
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def replace_text(text: str, file: Path) -> None:
    """Put a text in the place of a file."""
    replace_file(file, lambda beside: beside.write_text(text, encoding="utf-8"))


def replace_image(image: Image.Image, file: Path) -> None:
    """Put a picture, a PNG, in the place of a file."""
    replace_file(file, lambda beside: image.save(beside, "PNG"))


__all__ = ["replace_file", "replace_image", "replace_text"]
