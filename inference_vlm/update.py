"""Give a folder that an earlier Duet saved the code of today's.

    python -m inference_vlm.update outputs/shapes/sft
    python -m inference_vlm.update me/my-model --out my-model

A saved folder carries the code that it was saved with, so a change in the library that breaks this code breaks the
folder. What is special: nothing of the folder is run or imported, so it works where its code no longer loads; weights
are not touched; and what is written lies beside the old files until all of it is there, so that a run that was killed
is repeated and done. A projector of the user's own stays as it is.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from transformers.dynamic_module_utils import get_relative_import_files

from processing.data_error_vlm import DuetError, NotFound, in_a_line

from .program import ended_by, program, show_any_text


ROOT = Path(__file__).parents[1]
CONFIG = "config.json"
MODEL_TYPE = "duet_vlm"
_BESIDE = ".{}.new"


def shipped_code() -> dict[str, bytes]:
    """What a save puts beside the weights: name -> content of every file that model and processor reach."""
    entries = (ROOT / "modeling_vlm" / "modeling_vlm.py", ROOT / "processing" / "processing_vlm.py")
    files = {file for entry in entries for file in (entry, *map(Path, get_relative_import_files(entry)))}
    return {file.name: file.read_bytes() for file in sorted(files)}


def version_of(code: dict[str, bytes]) -> str:
    """The version that the code itself says it is."""
    found = re.search(rb'^DUET_VERSION = "(.+)"$', code["configuration_vlm.py"], re.MULTILINE)
    assert found is not None
    return found[1].decode()


def update(folder: str | Path) -> list[str]:
    """
    Bring the code in a saved folder, in the checkpoints inside, and in the base of adapters, up to date.

    Returns:
        `list[str]`: what was done with each, a line.

    Raises:
        DuetError: Duet saved nothing there, or a newer one did, or it cannot be written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotFound(f"there is no folder {folder}; expected one that Duet saved, or a name on the Hub with --out.")
    places = [folder, folder / "base", *sorted(path for path in folder.glob("checkpoint-*") if path.is_dir())]
    saved = {place: config for place in places if (config := _read_config(place)) is not None}
    if not saved:
        raise DuetError(_no_duet(folder, folder / CONFIG))
    code = shipped_code()
    for place, config in saved.items():  # all are looked at before one is changed
        _refuse_newer(place, config, version_of(code))
    done = []
    for place, config in saved.items():
        try:
            done.append(f"{place}: {_update_one(place, config, code)}")
        except OSError as error:  # no right to write, no space
            raise DuetError(
                f"{place} could not be updated: {error}; its weights are as they were, so run it again."
            ) from error
    return done


def _no_duet(name, file):
    found = "no config.json"
    if file.is_file():
        found = f"a config.json with model_type {_settings(file).get('model_type')!r}"
    return f"{name} is no model composed by Duet: found {found}; expected one with model_type {MODEL_TYPE!r}."


def _settings(file) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DuetError(f"{file} cannot be read as JSON: {error}; expected the config of a saved model.") from error
    return settings if isinstance(settings, dict) else {}


def _read_config(folder) -> dict[str, Any] | None:
    file = folder / CONFIG
    settings = _settings(file) if file.is_file() else {}
    return settings if settings.get("model_type") == MODEL_TYPE else None


def _refuse_newer(place, config, version):
    found = config.get("duet_version")
    if found is not None and _numbers(found) > _numbers(version):
        raise DuetError(
            f"{place} was saved by Duet {found}, which is newer than this one, {version}; update Duet first."
        )


def _numbers(version):
    return [int(number) for number in re.findall(r"\d+", str(version))]


def _update_one(folder, config, code) -> str:
    version, before = version_of(code), config.get("duet_version")
    for left in folder.glob(_BESIDE.format("*")):  # by a run that was killed
        left.unlink()
    there = {file.name: file for file in folder.glob("*_vlm.py")}
    changed = {
        name: content for name, content in code.items() if name not in there or there[name].read_bytes() != content
    }
    stale = sorted(there.keys() - code.keys())
    if not changed and not stale and before == version:
        return f"up to date, with the code of Duet {version}."
    settings = json.dumps({**config, "duet_version": version}, indent=2, sort_keys=True) + "\n"
    # The config is last: what it says of the code is then true.
    _replace(folder, {**changed, CONFIG: settings.encode()}, stale)
    files = f"{len(changed)} of its {len(code)} files written"
    gone = f", {', '.join(stale)} removed" if stale else ""
    return f"now has the code of Duet {version} (before: {before or 'a version without a number'}; {files}{gone})."


def _replace(folder, files, stale):
    for name, content in files.items():
        with open(folder / _BESIDE.format(name), "wb") as beside:
            beside.write(content)
            beside.flush()
            os.fsync(beside.fileno())
    *code, last = files
    for name in code:
        os.replace(folder / _BESIDE.format(name), folder / name)
    for name in stale:
        (folder / name).unlink()
    os.replace(folder / _BESIDE.format(last), folder / last)


def download(name: str, out: Path, revision: str | None = None) -> Path:
    """
    A model of the Hub in a folder, which may hold a part of it from a download that was stopped.

    Raises:
        DuetError: the Hub has no such model, it is none of Duet's, or the folder holds something else.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / ".cache" / "huggingface").is_dir():
        raise DuetError(f"the folder {out} holds something already; name another with --out.")
    try:
        config = Path(hf_hub_download(name, CONFIG, revision=revision))
        if _settings(config).get("model_type") != MODEL_TYPE:
            raise DuetError(_no_duet(name, config))
        return Path(snapshot_download(name, revision=revision, local_dir=out))
    except DuetError:
        raise
    except (OSError, ValueError) as error:
        reason = in_a_line(error)
        raise DuetError(
            f"{name!r} is no folder here and could not be had from the Hugging Face Hub (which needs the network, and "
            f"a token where the repository is private): {reason}"
        ) from error


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 where there is nothing to update."""
    parser = argparse.ArgumentParser(prog=program("inference_vlm.update"), description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder that Duet saved, or the name of one on the Hub")
    parser.add_argument("--out", type=Path, help="the folder that a model on the Hub is downloaded to")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    args = parser.parse_args(argv)
    show_any_text()
    try:
        folder = Path(args.model)
        if args.out is not None and folder.exists():
            raise DuetError(f"{folder} is a folder here and is updated in place; leave out --out, or copy it first.")
        if args.out is not None:
            folder = download(args.model, args.out, args.revision)
        print("\n".join(update(folder)))
    except (Exception, KeyboardInterrupt) as error:
        return ended_by(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
