"""What of a run goes to the Hub: the files of a model, by name, and nothing that tells of this machine.

No file is pushed because it lies in the output folder: a user's notes, the logs of TensorBoard, which carry the host's
name, and pictures of the data stay here. What a checkpoint says of the data goes without the folders that they lie in.
"""

import json
from collections.abc import Iterable
from concurrent.futures import Future
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from modeling_vlm.adapters_vlm import BASE, CONFIG, SOURCE, WEIGHTS
from processing.batching.account import Account
from processing.data_error_vlm import DuetError, in_a_line

from ..private import public_account
from .checkpoints import MANIFEST, sizes_of


CARD, CURVE, SAMPLES = "README.md", "training.png", "samples.png"
RESULTS = (
    CARD, CURVE, "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json",
    "test_results.json",
)  # fmt: skip
"""What tells of a model and lies beside it, where it was written."""

_REPLACED = (
    "model*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*", WEIGHTS, "*config.json", "*_vlm.py",
    "chat_template*", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", *RESULTS,
    SAMPLES,
)  # fmt: skip
"""What an earlier push may have left and this one has not: it would be loaded, or tell of another run, or consent was
withdrawn. Other files, such as a licence, are a user's own."""

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
        under: a folder in the repository. What an earlier push left there, or of an earlier model at the top, goes.
        where: `token` and `revision`.

    Raises:
        DuetError: the Hub refuses it, or cannot be reached.
    """
    operations: list[Any] = [
        CommitOperationAdd(f"{under}/{name}" if under else name, content) for name, content in files.items()
    ]
    try:
        there = _HUB.list_repo_files(repository, **where)
        operations += [CommitOperationDelete(name) for name in _stale(there, files, under)]
        return _HUB.create_commit(repository, operations, commit_message=message, **where)
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise DuetError(f"the push to {repository} failed: {in_a_line(error, 400)}") from error


def _stale(there: list[str], files: Files, under: str) -> list[str]:
    """What of a repository's files a push takes the place of without bringing another of the name."""
    folders = {under} if under else {BASE for name in files if name.startswith(f"{BASE}/")}
    pushed = {f"{under}/{name}" if under else name for name in files}

    def is_replaced(name):
        folder, inside, _ = name.partition("/")
        return folder in folders if inside else not under and any(fnmatch(name, kind) for kind in _REPLACED)

    return [name for name in there if name not in pushed and is_replaced(name)]


def push_in_background(*args: Any, **kwargs: Any) -> Future:
    """`push`, while the run goes on."""
    return _HUB.run_as_future(push, *args, **kwargs)


def was_pushed(known: dict[str, Any], args: TrainingArguments) -> bool:
    """Whether the end of a run is where its settings have it pushed, by what is known of it."""
    name = args.hub_model_id or Path(args.output_dir or "").absolute().name
    asked, pushed = f"{name}@{args.hub_revision}" if args.hub_revision else name, known.get("pushed")
    return not args.push_to_hub or pushed is not None and (pushed == asked or pushed.partition("/")[2] == asked)


class PublishingTrainer(Trainer):
    """`Trainer`, whose pushes hold what belongs to the model, loads by name, and tells of nothing else."""

    def __init__(self, *args, **kwargs):
        self.card: Any = None  # what makes the model card, see `model_card.py`
        self._beside: Path | None = None  # where a checkpoint is being written
        self._model_files: list[str] = []  # what the last save of the model wrote
        self._pushed: list[tuple[Path, Future]] = []  # the checkpoints whose push may still go on
        self._base_on_its_way: set[Future] = set()  # pushes that have the base of adapters with them
        self._base_is_there = False  # in the repository, beside the adapters that need it
        super().__init__(*args, **kwargs)

    @property
    def run_folder(self) -> Path:
        """Where checkpoints and the trained model are written."""
        assert self.args.output_dir is not None  # where none is given, the library has a name
        return Path(self.args.output_dir)

    @property
    def repository(self) -> str:
        """The name on the Hub that is pushed to, once the repository is there."""
        return cast(str, self.hub_model_id)

    @property
    def pushed_to(self) -> str | None:
        """Where pushes go, with the branch where it is not the first; `None` where nothing is pushed."""
        revision = self.args.hub_revision
        return f"{self.hub_model_id}@{revision}" if self.hub_model_id and revision else self.hub_model_id

    def create_model_card(self, *args, **kwargs) -> None:
        """Write the model card: the run's own where there is one, for `push_to_hub` too."""
        if self.card is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            (self.run_folder / CARD).write_text(self.card.text(), encoding="utf-8")

    def init_hf_repo(self, *args, **kwargs) -> None:
        """See `Trainer.init_hf_repo`; the branch that is pushed to is made where there is none."""
        super().init_hf_repo(*args, **kwargs)
        branch = self.args.hub_revision
        if branch and not branch.startswith("refs/") and self.is_world_process_zero():
            HfApi().create_branch(self.repository, branch=branch, token=self.args.hub_token, exist_ok=True)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """
        See `Trainer.push_to_hub`; what belongs to the model goes, and nothing else that lies in the output folder.

        Raises:
            DuetError: the Hub refuses it, or cannot be reached.
        """
        if self.hub_model_id is None:
            if private is not None:  # which not every release's `init_hf_repo` takes itself
                self.args.hub_private_repo = private
            self.init_hf_repo(token=self.args.hub_token if token is None else token)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        return self.push_saved(commit_message, blocking, token, revision, **kwargs)

    def push_saved(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs,
    ):
        """
        Push the model as it was saved, with all that belongs to it; one process does, and meets no other in it.

        Raises:
            DuetError: the Hub refuses it, or cannot be reached.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        kwargs.setdefault("model_name", self.repository.rpartition("/")[2])
        self.create_model_card(**kwargs)
        self._finish_current_push()
        beside = [*RESULTS, SAMPLES] if getattr(self.card, "shows_samples", False) else RESULTS
        files = self._with_base(files_of(self.run_folder, [*self._model_files, *beside]))
        where: dict[str, Any] = {"token": token, "revision": revision or self.args.hub_revision}
        how = push if blocking else push_in_background
        return how(files, self.repository, commit_message or "End of training", **where)

    def _push_from_checkpoint(self, checkpoint_folder):
        # The stock method leaves out the model's code, and pushes whatever lies in the output folder. A push goes on in
        # the background, so it has to wait until the checkpoint has its name.
        strategy, place = self.args.hub_strategy, Path(checkpoint_folder)
        if self._beside is not None or strategy == HubStrategy.END or not self.is_world_process_zero():
            return
        if not self.args.hub_always_push and not all(job.done() for _, job in self._pushed):
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._say_of_pushes()
        where: dict[str, Any] = {"token": self.args.hub_token, "revision": self.args.hub_revision}
        message = f"Training in progress, step {self.state.global_step}"
        files = self._with_base(files_of(place, self._model_files))
        if self.card is not None:
            try:
                files[CARD] = self.card.text().encode()
                # As they are now: the next evaluation may draw them anew before the push is through.
                files |= {name: (self.run_folder / name).read_bytes() for name in self.card.pictures()}
            except Exception as error:  # the run is worth more than its card
                print(f"the card of step {self.state.global_step} could not be made: {error}", flush=True)
        pushes = [(files, message, "")]
        if strategy != HubStrategy.EVERY_SAVE:
            under = place.name if strategy == HubStrategy.ALL_CHECKPOINTS else "last-checkpoint"
            pushes.append((files_of_checkpoint(place), f"{message}, checkpoint", under))
        for content, told, under in pushes:
            job = push_in_background(content, self.repository, told, under, **where)
            self._pushed.append((place, job))
            if any(name.startswith(f"{BASE}/") for name in content):
                self._base_on_its_way.add(job)
        self.push_in_progress = PushInProgress([job for _, job in self._pushed])

    def _with_base(self, files):
        return with_base(files, self.run_folder / BASE, self.repository, self._base_is_there)

    def _finish_current_push(self):
        # The stock method waits, and says nothing of a push that failed. In a run of several processes the others would
        # wait for the one that does, at most for as long as their group lets them: there is time when it is done.
        if self.is_in_train and self.args.world_size > 1:
            return
        super()._finish_current_push()
        self._say_of_pushes()

    def _say_of_pushes(self):
        """Say which pushes failed; remember those that go on."""
        done = [job for _, job in self._pushed if job.done()]
        self._pushed = [(place, job) for place, job in self._pushed if job not in done]
        failed = [job.exception() for job in done]
        self._base_is_there |= any(job in self._base_on_its_way and job.exception() is None for job in done)
        for error in filter(None, failed):
            print(f"checkpoints: {error}", flush=True)


__all__ = ["CARD", "CURVE", "RESULTS", "SAMPLES", "PublishingTrainer", "files_of_checkpoint", "was_pushed"]
