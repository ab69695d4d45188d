"""A folder that a command writes has its name once all of it is there."""

import contextlib
import glob
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

from processing.data_error_vlm import DuetError, in_a_line


_BESIDE = "{}.unfinished-{}"
_STALE_SECONDS = 24 * 3600


def check_free(out: Path) -> None:
    """
    See that a folder can be written, and nothing is lost by it.

    Raises:
        DuetError: it is a file, or holds something, or nothing can be written where it is to lie.
    """
    if out.exists() and not out.is_dir():
        raise DuetError(f"{out} is a file; name a folder.")
    if out.exists() and any(out.iterdir()):
        raise DuetError(f"{out} holds something already; name another folder.")
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        found = "cannot be written into" if above.is_dir() else "is a file"
        raise DuetError(f"{out} cannot be made: {above} {found}; name another folder.")


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """
    A folder to write into, which gets the name of `out` when the block ends, and is removed where it fails.

    It is of this process alone; what killed processes left is removed once it is a day old.

    Raises:
        DuetError: it cannot be written.
    """
    place = out.resolve()  # which has a name, as "." has none
    beside = place.with_name(_BESIDE.format(place.name, uuid4().hex[:8]))
    try:
        for left in place.parent.glob(_BESIDE.format(glob.escape(place.name), "*")):
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        yield beside
        with contextlib.suppress(FileNotFoundError):
            place.rmdir()
        os.replace(beside, place)
    except (OSError, SafetensorError) as error:  # the latter of a full disk, too
        raise DuetError(f"{out} could not be written: {in_a_line(error)}.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


__all__ = ["check_free", "whole_folder"]
