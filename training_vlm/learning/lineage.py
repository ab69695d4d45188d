"""Which checkpoints belong to the run as it is, and where those go that do not.

A run that goes back to an earlier checkpoint, or begins anew where there are some, leaves behind those that it does not
go on with. Before its first step they are moved to a folder of their own, where no resume, no rotation and no push
looks; nothing is removed but what is to be overwritten, and that when there is something better. What is to be moved is
written down first, so a kill between two moves is made good by the next start.
"""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from modeling_vlm.adapters_vlm import BASE, SOURCE


RUN = "_run.json"
"""What is known of the run in a folder: from where outside it was begun, and at which step it came to its end."""
NEW_BASE = "_new_base"
"""A base of adapters that takes the place of `base` when the run begins."""
_MOVES = "_moves.json"
_SET_ASIDE, _OVERWRITTEN = "_set_aside", "_overwritten"


def read_run(folder: Path) -> dict[str, Any] | None:
    """What is known of the run in a folder; `None` where none was begun."""
    try:
        return json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def note_run(folder: Path, **known: Any) -> None:
    """Add to what is known of the run in a folder."""
    before = read_run(folder)
    if before is None or {**before, **known} != before:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / RUN, {**(before or {}), **known})


def leave_behind(folder: Path, checkpoints: list[Path], overwrite: bool) -> Path | None:
    """
    Move checkpoints to where nobody takes them up, and with them a base in whose place another one goes.

    Args:
        overwrite: they are to be removed when there is something better.

    Returns:
        where they are; `None` where there was nothing to move.
    """
    bases = [BASE] * (folder / NEW_BASE).is_dir()
    if not checkpoints and not bases:
        return None
    name = _OVERWRITTEN if overwrite else _SET_ASIDE
    numbers = (int(path.name.rpartition("-")[2]) for path in _folders(folder, name))
    place = folder / f"{name}-{max(numbers, default=0) + 1}"
    _write(folder / _MOVES, {"to": place.name, "checkpoints": [path.name for path in checkpoints] + bases})
    finish_moving(folder)
    return place


def finish_moving(folder: Path) -> None:
    """Move what was to be moved, also where a kill came between."""
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        moves = json.loads((folder / _MOVES).read_text(encoding="utf-8"))
        place = folder / moves["to"]
        place.mkdir(exist_ok=True)
        for name in moves["checkpoints"]:
            if (folder / name).exists() and not (place / name).exists():
                os.replace(folder / name, place / name)
        if (folder / NEW_BASE).is_dir():
            os.replace(folder / NEW_BASE, folder / BASE)
        (folder / _MOVES).unlink()


def remove_overwritten(folder: Path) -> None:
    """Remove what was to be overwritten, now that there is something better; not the base of a model that is there."""
    needed = _told(folder / "config.json", "adapter_base")
    for path in _folders(folder, _OVERWRITTEN):
        keeps = needed is not None and _told(path / BASE / SOURCE, "id") == needed
        for part in [part for part in path.iterdir() if part.name != BASE] if keeps else [path]:
            shutil.rmtree(part, ignore_errors=True)


def _told(file, key):
    try:
        return json.loads(file.read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError):
        return None


def _folders(folder, name):
    return [path for path in folder.glob(f"{name}-*") if re.fullmatch(rf"{name}-\d+", path.name)]


def _write(file: Path, content: Any) -> None:
    beside = file.with_name(f"{file.name}.new")
    with open(beside, "w", encoding="utf-8") as stream:
        json.dump(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(beside, file)


__all__ = ["NEW_BASE", "RUN", "finish_moving", "leave_behind", "note_run", "read_run", "remove_overwritten"]
