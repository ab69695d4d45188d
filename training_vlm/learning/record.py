"""What a run is made of, written into its checkpoints: one of another model or of other data is not gone on with.

Nothing of it is a name or a path, which may be private, and may be others for the same thing: models and data are told
by a digest of how they begin. What learns of a model is another file's, see `tuning.py`.
"""

import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from processing.data_error_vlm import DuetError

from .adapters import composed
from .tuning import EMBEDDINGS, HEAD, PROJECTOR, TEXT, VISION


if TYPE_CHECKING:
    from ..arguments import ModelArguments
    from .trainer import VLMTrainer

RECORD = "run.json"
_SIDES = {"vision": (VISION,), "text": (TEXT, EMBEDDINGS, HEAD)}
_VALUES = 64  # of each parameter
_BROUGHT = (".lora_", ".modules_to_save.", ".original_module.")  # parts of the names of what adapters add


def record_of(trainer: "VLMTrainer", model_args: "ModelArguments") -> dict[str, Any]:
    """What a run is made of, as far as it goes on with the same; to be asked before it trains."""
    encode = trainer.data_collator.encoder.encode.__name__  # type: ignore[union-attr]
    found: dict[str, Any] = {"learns": f"{encode.removeprefix('encode_')}s", "data": list(_data(trainer.train_dataset))}
    if trainer.plan is None:
        return found
    scratch = {part for side in _SIDES for part in _SIDES[side] if isinstance(_named(model_args, side), dict)}
    drawn = scratch | ({PROJECTOR} if model_args.model is None else set())
    state = composed(trainer.model).state_dict()  # in which weights that memory holds otherwise are whole
    found["model"] = {
        p.name: _weights(state.get(name) for name in p.parameters if not _brought(name)) for p in trainer.plan.parts
    }
    found["model"] = {name: digest for name, digest in found["model"].items() if name not in drawn}
    return found


def _named(model_args, side):
    return getattr(model_args, f"{side}_model")


def _brought(name):
    return any(part in name for part in _BROUGHT)


def _weights(tensors: Iterable[torch.Tensor | None]) -> int:
    digest = 0
    for tensor in tensors:
        if tensor is not None and tensor.is_floating_point():
            values = tensor.detach().flatten()[:_VALUES].float().cpu().numpy()
            digest = zlib.crc32(values.tobytes(), digest)
    return digest


def _data(dataset) -> Iterator[int]:
    """A digest of the first row of each source, its images left out."""
    for source in getattr(dataset, "sources", [dataset]):
        rows = source[0] if isinstance(source, tuple) else getattr(source, "rows", None)  # of a stream, or not
        if rows is not None and not hasattr(rows, "__len__"):  # a stream
            row: Any = next(iter(rows.take(1)), None)
        else:
            row = rows.with_format(None)[0] if rows is not None and len(rows) else None
        yield zlib.crc32("\0".join(_texts(row)).encode())


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict) and "bytes" not in value:
        yield from (text for part in value.values() for text in _texts(part))
    elif isinstance(value, (list, tuple)):
        yield from (text for part in value for text in _texts(part))


def save_record(record: dict[str, Any], checkpoint: Path) -> None:
    """Write what a run is made of beside its weights."""
    (checkpoint / RECORD).write_text(json.dumps(record), encoding="utf-8")


def check_record(trainer: "VLMTrainer", checkpoint: Path, now: dict[str, Any]) -> None:
    """
    Refuse to go on from a checkpoint of another run, before anything is trained.

    Args:
        now: what this run is made of.

    Raises:
        DuetError: what is another, and how it was.
    """
    file = checkpoint / RECORD
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    data = "" if trainer.args.ignore_data_skip else _change_of_data(before, now)
    changes = [*_changes(before, now), *_other_weights(trainer, checkpoint)]
    if not changes and not data:
        return
    told = "; ".join(filter(None, [*changes, data]))
    anyway = "" if changes else " --ignore_data_skip goes on with other data, from their beginning."
    raise DuetError(
        f"{checkpoint} is of another run: {told}. Go on with what it began with, or begin a new run with its weights, "
        f"--model {checkpoint}.{anyway}"
    )


def _changes(before, now) -> Iterator[str]:
    if "learns" in before and before["learns"] != now.get("learns"):
        yield f"it learned {before['learns']}, and this run learns {now.get('learns')}"
    models = now.get("model", {})
    if others := [name for name, digest in before.get("model", {}).items() if models.get(name, digest) != digest]:
        yield f"it began with another {' and another '.join(others)}"


def _change_of_data(before, now):
    data = before.get("data", [])
    return "its data began with another row" if data and now.get("data") not in (None, data) else ""


def _other_weights(trainer, checkpoint) -> Iterator[str]:
    own: dict[str, torch.Tensor] | None = None
    for file in sorted(checkpoint.glob("model*.safetensors")):
        own = composed(trainer.model).state_dict() if own is None else own
        with safe_open(file, framework="pt") as saved:
            for name in saved.keys():
                shape = list(saved.get_slice(name).get_shape())
                # A name that is not here may be another of the library's for the same weights.
                if name in own and list(own[name].shape) != shape:
                    yield f"its {name} is of the shape {shape}, and this run's of {list(own[name].shape)}"
                    return


__all__ = ["RECORD", "check_record", "record_of", "save_record"]
