"""Which checkpoints belong to the run as it is, and where those go that do not.

A run that goes back to an earlier checkpoint, or begins anew where there are some, leaves behind those that it does not
go on with. Before its first step they are moved to a folder of their own, where no resume, no rotation and no push
looks; nothing is removed but what is to be overwritten, and that when there is something better. What is to be moved is
written down first, so a kill between two moves is made good by the next start. From where a run was begun is written
down as seen from its folder: it is found from any other, and where both were moved together.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from modeling_vlm.adapters_vlm import BASE, SOURCE


RUN = "_run.json"
"""What is known of the run in a folder: where lies what it was begun from, and at which step it came to its end."""
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


def origin(folder: Path, checkpoint: Path) -> dict[str, Any]:
    """What to note of the run in a folder that is begun from a checkpoint that is none of its own."""
    known = (read_run(folder) or {}).get("origins", [])
    run = _seen_from(folder, _run_of(checkpoint))
    return {"from": _seen_from(folder, checkpoint), "origins": known if run in (*known, ".") else [*known, run]}


def begun_from(folder: Path) -> Path | None:
    """The checkpoint that the run in a folder was begun from, if it is none of its own."""
    begun = (read_run(folder) or {}).get("from")
    return None if begun is None else (folder.resolve() / begun).resolve()


def earlier_folders(folder: Path) -> list[Path]:
    """Where checkpoints lie that a run may come of: its own, those it was begun from, and theirs; set aside or not."""
    runs = [folder]
    for run in runs:  # which grows
        origins = [(run.resolve() / name).resolve() for name in (read_run(run) or {}).get("origins", [])]
        runs += [origin for origin in origins if origin not in [known.resolve() for known in runs]]
    return [place for run in runs for place in (run, *_folders(run, _SET_ASIDE), *_folders(run, _OVERWRITTEN))]


def _run_of(checkpoint):
    folder = checkpoint.resolve().parent
    return folder.parent if re.fullmatch(rf"({_SET_ASIDE}|{_OVERWRITTEN})-\d+", folder.name) else folder


def _seen_from(folder, path):
    try:
        return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    except ValueError:  # on another drive
        return str(path.resolve())


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
            if (folder / name).is_symlink():  # which may say where it leads as seen from here
                if not os.path.lexists(place / name):
                    os.symlink((folder / name).resolve(), place / name)
                (folder / name).unlink()
            elif (folder / name).exists() and not (place / name).exists():
                os.replace(folder / name, place / name)
        if (folder / NEW_BASE).is_dir():
            os.replace(folder / NEW_BASE, folder / BASE)
        (folder / _MOVES).unlink()


def overwritten(folder: Path) -> list[Path]:
    """Where checkpoints lie that are to be removed when there is something better."""
    return _folders(folder, _OVERWRITTEN)


def remove_overwritten(folder: Path, keep: Collection[Path] = ()) -> None:
    """Remove them, once that is on the disk; not those that are kept, nor the base of a model that is there."""
    needed, stay = _told(folder / "config.json", "adapter_base"), {path.resolve() for path in keep}
    for path in overwritten(folder):
        stays = needed is not None and _told(path / BASE / SOURCE, "id") == needed
        parts = [part for part in path.iterdir() if part.resolve() not in stay and not (stays and part.name == BASE)]
        for part in parts if stays or any(path.resolve() in kept.parents for kept in stay) else [path]:
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


__all__ = [
    "NEW_BASE", "RUN", "begun_from", "earlier_folders", "finish_moving", "leave_behind", "note_run", "origin",
    "overwritten", "read_run", "remove_overwritten",
]  # fmt: skip
