"""Checkpoints that count when they are whole: written beside, proved by a manifest, then renamed.

What is being written lies in `_unfinished`, a name that no resume, no rotation and no push takes. Its last file is a
manifest of all others and their sizes, those of every process; then it gets its name. A checkpoint without a manifest,
of a Duet that wrote none or of another program, is proved by what can be checked. The newest whole one is resumed from.
Before an older one is removed, another that is whole is on the disk itself, whatever the machine still holds in memory.
Weights come before everything that describes them: a setting or a file that cannot be saved never keeps them off the
disk.
"""

import contextlib
import json
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_model
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import TrainerCallback, TrainerState

from processing.batching.account import Account
from processing.data_error_vlm import DuetError

from .lineage import begun_from, earlier_folders, finish_moving


UNFINISHED = "_unfinished"
MANIFEST = "checkpoint_manifest.json"
STATE = "trainer_state.json"
ORDER = "data_order.json"
_NEW, _MOVED = "_model-new", "_model"  # a model beside the one that it replaces, and what is not moved yet of it
_OPENED = ("config.json", "adapter_config.json")  # what a model is found by
_EDITED = (".py", ".md", ".jinja", "config.json")  # what a person, or an update of the code, may change since
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|adapter_(model|config)\..+")


def numbered(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, the newest first; `checkpoint-best` and the like are none."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(checkpoint.name.rpartition("-")[2])


def fault(checkpoint: Path) -> str | None:
    """Why a checkpoint is not whole, in words, or `None`."""
    if not checkpoint.is_dir():
        return "it is not there"
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return _fault_without_manifest(checkpoint)
    except (OSError, ValueError, TypeError, KeyError):
        return f"{MANIFEST} cannot be read"
    found = sizes_of(checkpoint)
    for name, size in manifest.items():
        if name.endswith(_EDITED):
            continue
        if name not in found:
            return f"{name} is missing"
        if found[name] != size:
            return f"{name} has {found[name]:,} of {size:,} bytes"
    return None


def sizes_of(checkpoint: Path) -> dict[str, int]:
    """The bytes of every file of a checkpoint but its manifest."""
    files = (path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in sorted(files)}


def _fault_without_manifest(checkpoint):
    try:  # what the Trainer writes last
        TrainerState.load_from_json(str(checkpoint / STATE))
    except (OSError, ValueError, TypeError):
        return f"{STATE} is missing or cannot be read"
    return _fault_of_files(checkpoint)


def _fault_of_files(checkpoint):
    for index in checkpoint.glob("*.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, TypeError, KeyError):
            return f"{index.name} cannot be read"
        if missing := sorted(shard for shard in shards if not (checkpoint / shard).is_file()):
            return f"{missing[0]} is missing"
    for path in sorted(checkpoint.rglob("*.safetensors")):
        if _is_torn(path):
            return f"{path.name} is not whole"
    for path in sorted(file for end in ("*.pt", "*.pth", "*.bin") for file in checkpoint.glob(end)):
        if not zipfile.is_zipfile(path):  # its table of contents is its end
            return f"{path.name} is not whole"
    if not any(_holds_weights(path.name) for path in checkpoint.iterdir()):
        return "it holds no weights"
    return None


def _holds_weights(name):
    return name.endswith(".safetensors") or name.startswith(("pytorch_model", "adapter_model", "global_step"))


def is_auto(asked: str | bool | None) -> bool:
    """Whether a run is to go on where there is a checkpoint, and to start where there is none."""
    return str(asked).lower() == "auto"


def find_checkpoint(asked: str | bool | None, folder: Path, say: bool = True) -> Path | None:
    """
    The checkpoint to resume from.

    Args:
        asked: a checkpoint's folder; `True`, `"true"` or `"last"`: the newest whole one in `folder`; `"auto"`: the
            same, where there is one; `None` for none.
        folder: the run's output folder.
        say: which were passed over, and why.

    Returns:
        its folder; `None` where the run is to start anew.

    Raises:
        DuetError: there is none that was asked for, or the one that is named is not whole.
    """
    finish_renaming(folder)
    finish_moving(folder)
    finish_replacing(folder)
    if not asked:
        return None
    if str(asked).lower() not in ("auto", "last", "true"):
        named = _whole(Path(str(asked)), folder)
        return next((own for own in numbered(folder) if own.samefile(named)), named)  # where a link leads
    passed: list[str] = []
    for checkpoint in numbered(folder):
        if (reason := fault(checkpoint)) is None:
            for line in passed if say else ():
                print(f"passed over {line}; {checkpoint.name} is the newest whole checkpoint", flush=True)
            return checkpoint
        passed.append(f"{checkpoint.name}: {reason}")
    begun = begun_from(folder)  # before its own first checkpoint a run has that one
    if begun is not None:
        if (reason := fault(begun)) is None:
            return begun
        passed.append(f"{begun}, from which the run was begun: {reason}")
    if is_auto(asked):
        for line in passed if say else ():
            print(f"passed over {line}; no checkpoint is whole, and the run starts anew", flush=True)
        return None
    raise DuetError(
        f"there is no checkpoint to resume from at {folder}{f' ({passed[0]})' if passed else ''}; expected a folder "
        f"such as {folder / 'checkpoint-500'}; `--resume_from_checkpoint auto` starts anew where there is none."
    )


def _whole(checkpoint: Path, folder: Path) -> Path:
    if (reason := fault(checkpoint)) is None:
        return checkpoint
    raise DuetError(
        f"there is no checkpoint to resume from at {checkpoint}: {reason}; expected a folder such as "
        f"{folder / 'checkpoint-500'}; `--resume_from_checkpoint auto` takes the newest whole one of "
        "--output_dir and starts anew where there is none."
    )


def left_behind(folder: Path, checkpoint: Path | None) -> list[Path]:
    """
    The checkpoints in a run's folder that are none of the run as it is from here on.

    Args:
        checkpoint: from which it goes on, `None` where it begins: then no other is its own. One that is not whole is
            where it would come to again, and gives way to the run's.
    """
    found = numbered(folder)
    if checkpoint is None or not is_own(checkpoint, folder):
        return found
    return [path for path in found if step_of(path) > step_of(checkpoint) and fault(path) is None]


def is_own(checkpoint: Path, folder: Path) -> bool:
    """Whether a checkpoint, which may be a link to where it lies, is one of a run's folder."""
    return any(checkpoint.name == path.name for path in numbered(folder)) and checkpoint.parent.samefile(folder)


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that could be resumed from."""
    return next((checkpoint for checkpoint in numbered(folder) if fault(checkpoint) is None), None)


def seal(checkpoint: Path) -> None:
    """
    Write the manifest, once the files of all processes are there.

    Raises:
        OSError: what was written is not what there is.
    """
    if (reason := _fault_of_files(checkpoint)) is not None:
        raise OSError(f"{checkpoint.name} was written and is not whole: {reason}")
    content = json.dumps({"files": sizes_of(checkpoint)}, indent=2)
    (checkpoint / MANIFEST).write_text(content, encoding="utf-8")


def put_in_place(checkpoint: Path, place: Path) -> None:
    """Give a sealed checkpoint its name; one that has it is replaced."""
    replaced = checkpoint.with_name(f"replaced-{checkpoint.name}")
    if not os.path.lexists(place):
        os.replace(checkpoint, place)
        return
    os.replace(place, replaced)
    os.replace(checkpoint, place)
    flush(place)
    if replaced.is_symlink():
        replaced.unlink()
    shutil.rmtree(replaced, ignore_errors=True)


def finish_renaming(folder: Path) -> None:
    """Finish what a kill between sealing and naming a checkpoint left undone."""
    for checkpoint in numbered(folder / UNFINISHED):
        sealed = (checkpoint / MANIFEST).is_file() and fault(checkpoint) is None
        if sealed and fault(folder / checkpoint.name) is not None:
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                put_in_place(checkpoint, folder / checkpoint.name)


def discard_unfinished(folder: Path) -> None:
    """Remove what a kill left half written."""
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


def surplus(folder: Path, limit: int | None, keep: set[Path], coming: int = 0) -> list[Path]:
    """
    The oldest checkpoints, those that are not whole first, of which `limit` are to be left.

    Args:
        folder: the run's output folder; what is no checkpoint in it stays.
        limit: how many may be left; `None` or 0 for all.
        keep: what stays in any case, as does the newest that is whole.
        coming: how many more there will be.
    """
    found = numbered(folder)
    if not limit or limit < 0:
        return []
    # By time, because a run that went on from an earlier one may find later numbers that are not its own.
    whole = {path: fault(path) is None for path in found}
    oldest_first = sorted(found, key=lambda path: (whole[path], _written_at(path), step_of(path)))
    stays = {path.resolve() for path in [*keep, *[path for path in oldest_first if whole[path]][-1:]]}
    removable = [path for path in oldest_first if path.resolve() not in stays]
    return removable[: max(0, len(found) + coming - limit)]


def rotate(folder: Path, limit: int | None, keep: set[Path], coming: int = 0) -> None:
    """Remove what is too much, see `surplus`; one that stays is on the disk by then."""
    removed = surplus(folder, limit, keep, coming)
    if removed:
        stay = [path for path in numbered(folder) if path not in removed and fault(path) is None]
        newest_first = sorted(stay, key=_written_at, reverse=True)
        for checkpoint in newest_first[:2][-1:]:  # the one before the newest: the machine has written it long since
            flush(checkpoint)
    for checkpoint in removed:
        (folder / UNFINISHED).mkdir(exist_ok=True)
        os.replace(checkpoint, folder / UNFINISHED / f"removed-{checkpoint.name}")  # none is seen half removed
    discard_unfinished(folder)


def flush(folder: Path) -> None:
    """Wait until the files of a folder, and its name, are on the disk itself, where a loss of power leaves them."""
    found = sorted(folder.rglob("*"), key=Path.is_dir)  # files first
    _write_through(*found, folder, folder.parent)


def _write_through(*paths):
    for path in paths:
        with contextlib.suppress(OSError):  # a file system that cannot, such as for folders
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _written_at(checkpoint):
    file = checkpoint / STATE
    return file.stat().st_mtime if file.is_file() else 0


def replace_files(source: Path, target: Path) -> None:
    """
    Put a saved model in the place of an earlier one, whose weights that have no successor go.

    Once the new one has a name beside the old one, it is finished by `finish_replacing` whatever comes between. Until
    all of its files are there, the config is not, without which no model is found: none is half this and half that.
    """
    finish_replacing(target)  # with what came before
    flush(source)
    os.replace(source, target / _NEW)
    finish_replacing(target)
    with contextlib.suppress(OSError):  # something else is being written there
        source.parent.rmdir()


def finish_replacing(folder: Path) -> None:
    """Put a model that was saved whole in the place of an earlier one, also where a kill came between."""
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        if (folder / _NEW).is_dir():
            _write_through(folder)
            _make_way(folder, {path.name for path in (folder / _NEW).iterdir()})
            os.replace(folder / _NEW, folder / _MOVED)
        if (folder / _MOVED).is_dir():
            found = [path for path in (folder / _MOVED).rglob("*") if path.is_file()]
            for path in sorted(found, key=lambda path: path.name in _OPENED):
                place = folder / path.relative_to(folder / _MOVED)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, place)
            _write_through(folder)
            shutil.rmtree(folder / _MOVED)


def _make_way(folder, names):
    gone = [folder / name for name in _OPENED if name in names]
    if any(_holds_weights(name) for name in names):
        gone += [path for path in folder.iterdir() if _WEIGHTS.fullmatch(path.name) and path.name not in names]
    for path in gone:
        path.unlink(missing_ok=True)


def save_weights_at_least(model: nn.Module, folder: Path) -> None:
    """Save the weights where saving all that belongs to a model failed before they were whole."""
    if not any(folder.glob("*.safetensors")) or any(_is_torn(path) for path in folder.glob("*.safetensors")):
        folder.mkdir(parents=True, exist_ok=True)
        save_torch_model(model, folder)


def _is_torn(file):
    try:
        with safe_open(file, framework="pt"):  # compares what the header says with the length of the file
            return False
    except (OSError, SafetensorError):
        return True


class BestCheckpoint(TrainerCallback):
    """Tells a run that goes on where its best checkpoint is, of which a state names the step and no path."""

    def find(self, folder: Path, state: TrainerState) -> str | None:
        """
        The checkpoint of the step that was best, in the run's folder or where the run came from.

        Another may have its number; the best one has logged what the run had logged until then.
        """
        for place in earlier_folders(folder):
            best = place / f"checkpoint-{state.best_global_step}"
            if fault(best) is None and _begins(state.log_history, best):
                return str(best)
        return None

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.best_global_step or state.best_model_checkpoint is not None:
            return
        state.best_model_checkpoint = self.find(Path(args.output_dir), state)
        if state.best_model_checkpoint is None and args.load_best_model_at_end and state.is_world_process_zero:
            print(
                f"the best checkpoint until here, of step {state.best_global_step}, is not there any more: where no "
                "later one is better, the model is that of the last step",
                flush=True,
            )


def _begins(log_history, checkpoint):
    logged = TrainerState.load_from_json(str(checkpoint / STATE)).log_history
    return json.dumps(logged) == json.dumps(log_history[: len(logged)])  # in which what is no number equals itself


def save_account(account: Account, checkpoint: Path, process: int) -> None:
    """Write what a process has counted beside what else it needs to go on."""
    file = checkpoint / f"data_account_{process}.json"
    file.write_text(json.dumps(account.state()), encoding="utf-8")


def load_account(checkpoint: Path) -> Account:
    """What all processes had counted that wrote into a checkpoint."""
    account = Account()
    for file in sorted(checkpoint.glob("data_account_*.json")):
        account.merge(Account.from_state(json.loads(file.read_text(encoding="utf-8"))))
    return account


def save_order(order: dict[str, Any], checkpoint: Path) -> None:
    """Write what the order of the data follows from, so that a run that goes on is told where it is another."""
    (checkpoint / ORDER).write_text(json.dumps(order), encoding="utf-8")


def load_order(checkpoint: Path) -> dict[str, Any]:
    """The same, as far as it was written."""
    file = checkpoint / ORDER
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
