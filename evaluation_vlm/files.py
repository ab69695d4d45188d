"""Files that are replaced whole: whoever reads one finds what was there before or all of what is there now."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from processing.data_error_vlm import DuetError, in_a_line


def make_folder(folder: Path) -> None:
    """
    Make a folder that files can be written into.

    Raises:
        DuetError: it cannot be made, or nothing can be written there.
    """
    with _said(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def replace_file(file: Path, write: Callable[[Path], object]) -> None:
    """
    Have `write` make a file beside, and give it its name when it is whole.

    Raises:
        DuetError: it cannot be written.
    """
    with _said(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            write(beside)
            os.replace(beside, file)
        finally:
            with contextlib.suppress(OSError):  # which would hide why
                beside.unlink(missing_ok=True)


@contextlib.contextmanager
def _said(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DuetError(f"{where} cannot be written: {in_a_line(error)}; name another folder, or make room.") from error


def replace_text(text: str, file: Path) -> None:
    """Put a text in the place of a file."""
    replace_file(file, lambda beside: beside.write_text(text, encoding="utf-8"))


def replace_image(image: Image.Image, file: Path) -> None:
    """Put a picture, a PNG, in the place of a file."""
    replace_file(file, lambda beside: image.save(beside, "PNG"))


__all__ = ["make_folder", "replace_file", "replace_image", "replace_text"]
