"""What of a run goes to the Hub: the files of a model, by name, and nothing that tells of this machine.

No file is pushed because it lies in the output folder: a user's notes, the logs of TensorBoard, which carry the host's
name, and pictures of the data stay here. What a checkpoint says of the data goes without the folders that they lie in.
"""

import json
from collections.abc import Iterable
from concurrent.futures import Future
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx

from modeling_vlm.adapters_vlm import BASE, CONFIG, WEIGHTS
from processing.batching.account import Account
from processing.data_error_vlm import DuetError, in_a_line

from ..private import public_account
from .checkpoints import MANIFEST, SOURCE, sizes_of


CARD, SAMPLES = "README.md", "samples.png"
RESULTS = (
    CARD, "training.png", "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json",
    "test_results.json",
)  # fmt: skip
"""What tells of a model and lies beside it, where it was written."""

_REPLACED = ("model*.safetensors", "model.safetensors.index.json", WEIGHTS, CONFIG, SAMPLES)
"""What an earlier push may have left and this one has not: other weights would be loaded, and consent was withdrawn."""

Files = dict[str, str | bytes]
"""Name in the repository -> a file here, or its content."""


def files_of(folder: Path, names: Iterable[str]) -> Files:
    """Those of some files that are in a folder."""
    return {name: str(folder / name) for name in names if (folder / name).is_file()}


def files_of_checkpoint(checkpoint: Path) -> Files:
    """All that a run needs to go on from a checkpoint, which is whole there too."""
    sizes = sizes_of(checkpoint)
    files = files_of(checkpoint, sizes)
    for name in sizes:
        if fnmatch(name, "data_account_*.json"):
            account = Account.from_state(json.loads((checkpoint / name).read_text(encoding="utf-8")))
            content = json.dumps(public_account(account).state()).encode()
            files[name], sizes[name] = content, len(content)
    return {**files, MANIFEST: json.dumps({"files": sizes}, indent=2).encode()}


def with_base(files: Files, base: Path, repository: str, is_there: bool) -> Files:
    """
    The files of a model; of one with adapters its base too, under `base/`, so that both have one repository.

    Args:
        files: of the model.
        base: where it may lie; an adapter may also be one of a repository's model.
        repository: where both go.
        is_there: whether the base was pushed before.
    """
    if CONFIG not in files:
        return files
    settings = json.loads(Path(str(files[CONFIG])).read_text(encoding="utf-8"))
    if settings["base_model_name_or_path"] != BASE:
        return files
    settings |= {"base_model_name_or_path": repository, "revision": None}
    names = [] if is_there else [name for name in sizes_of(base) if name != SOURCE]
    of_base: Files = {f"{BASE}/{name}": str(base / name) for name in names}
    return {**files, **of_base, CONFIG: json.dumps(settings, indent=2, sort_keys=True).encode()}


_HUB = HfApi()  # one for all, so that pushes in the background come one after another


def push(files: Files, repository: str, message: str, under: str = "", **where: Any) -> CommitInfo:
    """
    Commit files to a model's repository.

    Args:
        under: a folder in the repository; at its top, what an earlier model left goes.
        where: `token` and `revision`.

    Raises:
        DuetError: the Hub refuses it, or cannot be reached.
    """
    operations: list[Any] = [
        CommitOperationAdd(f"{under}/{name}" if under else name, content) for name, content in files.items()
    ]
    try:
        if not under:
            there = _HUB.list_repo_files(repository, **where)
            stale = [name for name in there if any(fnmatch(name, kind) for kind in _REPLACED) and name not in files]
            operations += [CommitOperationDelete(name) for name in stale]
        return _HUB.create_commit(repository, operations, commit_message=message, **where)
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise DuetError(f"the push to {repository} failed: {in_a_line(error, 400)}") from error


def push_in_background(*args: Any, **kwargs: Any) -> Future:
    """`push`, while the run goes on."""
    return _HUB.run_as_future(push, *args, **kwargs)


__all__ = ["CARD", "RESULTS", "SAMPLES", "files_of", "files_of_checkpoint", "push", "push_in_background", "with_base"]
