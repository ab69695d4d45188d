"""The files of a checkpoint as people have them: pointers in place of files, halves of files, missing shards.

They are looked at before anything is loaded, and again where loading fails, so that the line names the file and the
remedy where the libraries speak of headers and keys. No weight is read. The file travels with every checkpoint.
"""

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from .model_error_vlm import DuetError


VISION_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")
TEXT_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""In the order in which the library looks for them."""

_POINTER = b"version https://git-lfs"


def check_files(what: str, name: str | Path, names: Iterable[str], revision: str | None = None, weights: bool = True):
    """
    See that the files that will be read of a folder, or of what was fetched from the Hub, are whole.

    Args:
        what: what the folder is, for the message.
        names: files that are read where they are there.
        weights: whether weights are read, which have to be there.

    Raises:
        `DuetError`: a file is a git-lfs pointer, empty, cut short or missing.
    """
    folder = _folder_of(str(name), revision)
    if folder is None:
        return
    found = next((folder / file for file in WEIGHTS if (folder / file).is_file()), None)
    if weights and found is None and Path(name).is_dir() and (folder / "config.json").is_file():
        raise DuetError(f"the {what} {str(name)!r} has no weights: expected a {WEIGHTS[0]} in it; fetch them.")
    read = [folder / file for file in names if (folder / file).is_file()]
    if weights and found is not None:
        read.append(found)
    for file in read:
        check_file(what, name, file)
    if weights and found is not None and found.suffix == ".json":
        shards = sorted(set(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise DuetError(
                f"the {what} {str(name)!r} lacks {len(missing)} of the {len(shards)} files of its weights, such as "
                f"{missing[0]}; fetch them."
            )
        for shard in shards:
            check_file(what, name, folder / shard)


def _folder_of(name, revision):
    if Path(name).is_dir():
        return Path(name)
    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # no name that the Hub could have
        return None
    return Path(config).parent if isinstance(config, str) else None


def check_file(what: str, name: str | Path, file: Path) -> None:
    """
    See that a file of the folder or repository `name` is whole.

    Raises:
        `DuetError`: it is not.
    """
    if wrong := _wrong_with(file):
        raise DuetError(f"the {what} {str(name)!r} cannot be read: {file} {wrong}.")


def _wrong_with(file: Path) -> str | None:
    size = file.stat().st_size
    with open(file, "rb") as stream:
        head = stream.read(64)
        if not size:
            return "is empty; fetch it again"
        if head.startswith(_POINTER):
            return f"is a git-lfs pointer and not the file itself; run `git lfs pull` in {file.parent}"
        if file.suffix == ".json":
            try:
                settings = json.loads(head + stream.read())
            except ValueError:
                return "is no JSON, as if it were cut short; fetch it again"
            if not isinstance(settings, dict):
                return "holds no settings by name; fetch it again"
        elif file.suffix == ".safetensors":
            length = int.from_bytes(head[:8], "little")
            if length > size - 8:
                return "is no safetensors file, or cut short; fetch it again"
            stream.seek(8)
            try:
                entries = json.loads(stream.read(length))
                entries.pop("__metadata__", None)
                end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
            except (ValueError, TypeError, KeyError, AttributeError):
                return "is no safetensors file; fetch it again"
            if 8 + length + end != size:
                return f"is cut short: it has {size:,} of {8 + length + end:,} bytes; fetch it again"
        elif head.startswith(b"PK") and not zipfile.is_zipfile(file):  # what `torch.save` writes
            return "is cut short; fetch it again"
    return None


__all__ = ["TEXT_FILES", "VISION_FILES", "check_file", "check_files"]
