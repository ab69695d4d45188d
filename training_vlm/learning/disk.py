"""A disk that is full is told as that: some libraries only say that a position in a file is not what they expected."""

import errno
import os
import shutil
from pathlib import Path

from processing.data_error_vlm import DuetError

from .checkpoints import UNFINISHED, newest_whole, sizes_of
from .originals import shown_size


_FULL = (errno.ENOSPC, errno.EDQUOT)
_PROBE = 1 << 20  # bytes


class DiskFull(DuetError):
    """What was to be saved has no room; nothing of it is left."""


def is_full(folder: Path, error: BaseException) -> bool:
    """
    Whether an error came of a disk, or a share of it, that is full.

    Args:
        folder: what was written is still in it.
    """
    if isinstance(error, DiskFull):
        return True
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return True
        if any(f"os error {number}" in str(cause) for number in _FULL):  # as libraries in Rust say it
            return True
        cause = cause.__cause__ or cause.__context__
    probe = folder / f"_probe-{os.getpid()}"
    try:
        probe.write_bytes(bytes(_PROBE))
    except OSError as found:
        return found.errno in _FULL
    finally:
        probe.unlink(missing_ok=True)
    return False


def full_disk(folder: Path, what: str, limit: int | None) -> str:
    """
    What a person should know of it, in a line.

    Args:
        folder: the run's output folder.
        what: could not be written.
        limit: `save_total_limit`.
    """
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.is_dir())
    good = newest_whole(folder)
    needs = "" if good is None else f" (that one takes {shown_size(sum(sizes_of(good).values()))})"
    left = "no checkpoint was saved before" if good is None else f"{good} is the last good checkpoint{needs}"
    free = shown_size(shutil.disk_usage(there).free + sum(sizes_of(folder / UNFINISHED).values()))
    fewer = "" if limit else ", or have fewer checkpoints kept with --save_total_limit"
    return (
        f"the disk of {folder} is full ({free} are free): {what} could not be saved, "
        f"nothing of it is left, and {left}. Make room{fewer}, and go on with --resume_from_checkpoint auto."
    )


__all__ = ["DiskFull", "full_disk", "is_full"]
