"""The base of a run with adapters, on disk: written once, told by what it was made of, kept while adapters need it.

What is special: a base that is the same as the one that lies there is that one, so the adapters of an earlier run still
load; another one waits beside it until the first step, when the old one goes where the old checkpoints go. What it was
made of is told by settings that change weights and by how weights begin, and not by names: models may lie elsewhere.
"""

import contextlib
import filecmp
import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

from accelerate import PartialState
from safetensors import safe_open

from modeling_vlm.adapters_vlm import BASE, CONFIG, SOURCE, base_of
from processing.data_error_vlm import DuetError, in_a_line

from .learning.checkpoints import UNFINISHED, fault, put_in_place, seal, sizes_of
from .learning.lineage import NEW_BASE
from .settings import Arguments


_NAMES = ("model", "vision_model", "second_vision_model", "text_model", "tokenizer", "chat_template", "projector_type")
_NO_WEIGHTS = ("_token", "_attn_implementation", "trust_remote_code")
_VALUES = 64  # of each tensor
_END = 1 << 20  # bytes; what `torch.save` writes ends in the checksums of all tensors


def base_begun_with(arguments: Arguments) -> Path | None:
    """The base of the checkpoint that a run goes on from, in its own output folder or elsewhere on this disk."""
    checkpoint = arguments.training.resume_from_checkpoint
    if checkpoint is None or not Path(checkpoint, CONFIG).is_file():
        return None
    with contextlib.suppress(DuetError, ValueError):  # it has none any more, and is made anew
        base = Path(base_of(str(checkpoint), {})[0])
        return base if fault(base) is None else None
    return None


def made_of(base: Path) -> dict[str, str]:
    """The `id` of a base, which its adapters know, and the `sha256` of what it was made of."""
    return json.loads((base / SOURCE).read_text(encoding="utf-8"))


def source_of(arguments: Arguments) -> str:
    """What the base of a run is made of, as a hash: names may be private."""
    told = {name: value for name, value in asdict(arguments.model).items() if not name.endswith(_NO_WEIGHTS)}
    told |= {name: _beginning(told[name]) for name in _NAMES}
    told["merge_first"] = arguments.tuning.merge_first
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _beginning(value: Any) -> Any:
    """What a setting names, where it lies here: a file, a class in one, or how the weights of a folder begin."""
    if not isinstance(value, str):
        return value
    file, _, kind = value.rpartition(":")
    if Path(file).is_file():
        return f"{_digest_of(Path(file))}:{kind}"
    return _digest_of(Path(value)) if Path(value).exists() else value


def _digest_of(path: Path) -> str:
    found = hashlib.sha256()
    if path.is_file():
        found.update(path.read_bytes())
        return found.hexdigest()
    for name in ("tokenizer.json", CONFIG):
        if (path / name).is_file():
            found.update((path / name).read_bytes())
    whole = sorted(path.glob("*.safetensors"))
    for file in whole:
        with safe_open(file, framework="pt") as weights:
            for name in sorted(weights.keys()):
                part = weights.get_slice(name)
                values = part[:1] if part.get_shape() else weights.get_tensor(name)
                found.update(f"{name} {part.get_shape()} {part.get_dtype()}".encode())
                found.update(values.flatten()[:_VALUES].float().numpy().tobytes())
    for file in [] if whole else sorted(path.glob("*.bin")):
        with open(file, "rb") as stream:
            stream.seek(max(0, file.stat().st_size - _END))
            found.update(stream.read())
    if (path / CONFIG).is_file() and Path(base := base_of(str(path), {})[0]).is_dir():
        found.update(_digest_of(Path(base)).encode())
    return found.hexdigest()


def discard_new_base(arguments: Arguments) -> None:
    """Remove a base that waits for a run which never began."""
    if PartialState().is_main_process:
        shutil.rmtree(Path(arguments.training.output_dir or "", NEW_BASE), ignore_errors=True)


def write_base(model: Any, processor: Any, arguments: Arguments) -> Path:
    """
    Write the base of a run where it is not there, once on each disk.

    Args:
        model: whole.
        processor: that belongs to it.

    Returns:
        its folder: `base` of the output folder; where another one lies there, `_new_base`, until the run begins.

    Raises:
        DuetError: it cannot be written.
    """
    out, state = Path(arguments.training.output_dir or ""), PartialState()
    source, begun = source_of(arguments), base_begun_with(arguments)
    for first in (True, False):  # the others write where disks are not shared
        writes = state.is_main_process if first else state.is_local_main_process and not state.is_main_process
        if first:
            is_there = begun is not None and begun.resolve() == (out / BASE).resolve()
        else:
            is_there = any(fault(out / name) is None and made_of(out / name)["sha256"] == source for name in _PLACES)
        if writes and not is_there:
            beside = out / UNFINISHED / BASE
            known = uuid4().hex if begun is None else made_of(begun)["id"]
            try:
                model.save_pretrained(beside)
                processor.save_pretrained(beside)
                _tell(beside, known, source)
            except OSError as error:
                raise DuetError(f"the base cannot be written to {out / BASE}: {in_a_line(error)}") from error
            seal(beside)
            _settle(beside, out, source, keep=arguments.training.should_save)
        state.wait_for_everyone()
    return out / (NEW_BASE if (out / NEW_BASE).is_dir() else BASE)


_PLACES = (NEW_BASE, BASE)


def _settle(beside: Path, out: Path, source: str, keep: bool) -> None:
    """Have what was written be the base that lies there, if it is the same, or wait, if adapters need that one."""
    place = out / BASE
    if fault(place) is not None:
        put_in_place(beside, place)
    elif _is_same(beside, place):
        _tell(place, made_of(place)["id"], source)
        shutil.rmtree(beside)
    else:
        put_in_place(beside, out / NEW_BASE if keep else place)


def _is_same(one: Path, other: Path) -> bool:
    files = [{name: size for name, size in sizes_of(base).items() if name != SOURCE} for base in (one, other)]
    return files[0] == files[1] and all(filecmp.cmp(one / name, other / name, shallow=False) for name in files[0])


def _tell(base: Path, known: str, source: str) -> None:
    beside = base / f"{SOURCE}.new"
    beside.write_text(json.dumps({"id": known, "sha256": source}), encoding="utf-8")
    beside.replace(base / SOURCE)


__all__ = ["base_begun_with", "discard_new_base", "made_of", "source_of", "write_base"]
