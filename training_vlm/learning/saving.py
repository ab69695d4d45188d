"""The Trainer as it saves: whole, or as if nothing had been saved.

A checkpoint is written beside and counts when it is whole. The weights come first: what else of a model cannot be saved
is an error after them. What fails in one process has failed in all. A disk that is full is named as that, and leaves
the last good checkpoint. What was learned before another error is kept as a checkpoint.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from processing.batching.account import Account, BatchAccount
from processing.data_error_vlm import in_a_line

from .checkpoints import (
    STATE,
    UNFINISHED,
    discard_unfinished,
    fault,
    flush,
    put_in_place,
    replace_files,
    rotate,
    save_account,
    save_order,
    save_weights_at_least,
    seal,
    sizes_of,
    surplus,
)
from .disk import DiskFull, full_disk, is_full
from .guard import Guard
from .lineage import overwritten, remove_overwritten
from .meter import SAVING, Meter, spent_on
from .publishing import PublishingTrainer
from .record import save_record
from .sharding import saved_whole
from .stopping import Stop
from .tuning import TuningPlan, make_plan, save_plan


TRAINING_ARGS = "training_args.bin"
OF_A_PROCESS = ("rng_state", "data_account", "optimizer", "scheduler", "scaler")


class LastStep(TrainerCallback):
    """What a checkpoint of the last step is to hold, whatever a next one has begun: what that counted and drew."""

    def __init__(self, trainer: "SavingTrainer"):
        self.trainer = trainer
        self._seen: list[BatchAccount] = []  # of the step that is being made
        self._flos, self._input_tokens = 0.0, 0
        self._draw_again: Callable[[], None] = lambda: None

    def saw(self, account: BatchAccount) -> None:
        """Note a batch of the step that is being made; it counts when the step is."""
        self._seen.append(account)

    def on_train_begin(self, args, state, control, **kwargs):
        """Nothing is begun."""
        self._seen = []

    def on_step_end(self, args, state, control, **kwargs):
        """Count its batches, and note how things are."""
        for account in self._seen:
            self.trainer.account.add_batch(account)
        self._seen, self._draw_again = [], note_randomness()
        self._flos, self._input_tokens = state.total_flos + self.trainer.current_flos, state.num_input_tokens_seen

    def back_to_its_end(self) -> None:
        """Forget what came after it."""
        state = self.trainer.state
        self._seen = []
        self.trainer.current_flos = self._flos - state.total_flos  # type: ignore[assignment]
        state.num_input_tokens_seen = self._input_tokens
        self._draw_again()


def note_randomness() -> Callable[[], None]:
    """Note what is drawn from; what is given has the same drawn again."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = None if kind is None else torch.get_device_module(kind)
    own, numbers, tensors = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    on_device = None if device is None else device.get_rng_state()

    def draw_again():
        random.setstate(own)
        np.random.set_state(numbers)
        torch.random.set_rng_state(tensors)
        if device is not None:
            device.set_rng_state(on_device)

    return draw_again


class SavingTrainer(PublishingTrainer):
    """`Trainer`, whose checkpoints count when they are whole, and say what they are of."""

    guard: Guard
    meter: Meter
    stop: Stop

    def __init__(self, *args, **kwargs):
        self.plan: TuningPlan | None = None  # what was declared to learn; `None` where the parameters alone say it
        self.account = Account()  # what this process has seen
        self.order: dict[str, Any] = {}  # what the order of the data follows from, see `sampling.py`
        self._record: dict[str, Any] = {}  # what the run is made of, see `record.py`
        self._resumed_at = 0  # step
        self._save_error: Exception | None = None  # of what is not the weights
        self._torn: Exception | None = None  # of the weights
        super().__init__(*args, **kwargs)
        self.last_step = LastStep(self)
        self.add_callback(self.last_step)

    def declared(self) -> TuningPlan:
        """What learns, each part with its rate and decay."""
        return make_plan(cast(Any, self.model), None, self.args) if self.plan is None else self.plan

    @spent_on(SAVING)
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        See `Trainer.save_model`; files are written beside and then moved, so that a kill leaves old or new ones.

        What cannot be saved of a model's settings is reported after its weights are on the disk.

        Raises:
            DuetError: the weights are not finite, or the disk is full.
        """
        self._torn = None
        if self._beside is not None:  # a checkpoint, which `_save_checkpoint` puts in its place
            try:
                self._save_error = self._write_model(output_dir)
            except Exception as failure:  # all processes come to where they hear of it
                self._torn = failure
            return
        self.guard.check_weights()
        folder = self.run_folder if output_dir is None else Path(output_dir)
        beside = folder / UNFINISHED / "model"
        try:
            error = self._write_model(beside)
        except Exception as failure:  # of the weights themselves
            error = self._torn = failure
        if error is not None and is_full(folder, error):
            full = DiskFull(full_disk(folder, "the model", self.args.save_total_limit))
            discard_unfinished(folder)
            raise full from error
        if self._torn is not None:
            raise self._torn
        if self.is_deepspeed_enabled:  # each process may write a part
            self.accelerator.wait_for_everyone()
        if self.args.should_save:
            replace_files(beside, folder)
            if folder == self.run_folder:
                remove_overwritten(folder, self._kept())
        if error is not None:
            raise error
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def save_state(self) -> None:
        """See `Trainer.save_state`; the best checkpoint has its name and not its path."""
        if self.is_world_process_zero():
            best = self.state.best_model_checkpoint
            public = replace(self.state, best_model_checkpoint=best and Path(best).name)
            public.save_to_json(str(self.run_folder / STATE))

    def rescue(self) -> Path | None:
        """
        Write a checkpoint of the last step that was made, where there is none yet, before an error ends the run.

        Returns:
            its folder; `None` where nothing new was learned, or where other processes would have to write theirs too.
        """
        step, place = self.state.global_step, self._place
        is_good = not (self.guard.stopped or self.stop.is_moving)
        if self.args.world_size > 1 or not is_good or step <= self._resumed_at or fault(place) is None:
            return None
        self.last_step.back_to_its_end()
        self._save_checkpoint(self.model, trial=None)
        return place

    @property
    def _place(self):
        return self.run_folder / f"checkpoint-{self.state.global_step}"

    def _write_model(self, folder) -> Exception | None:
        model = self.accelerator.unwrap_model(self.model)
        try:
            with saved_whole(self):
                super().save_model(str(folder), _internal_call=True)
        except Exception as error:  # whatever else than weights could not be saved
            if self.args.should_save and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
                save_weights_at_least(model, Path(folder))
            return error
        finally:
            if self.args.should_save:
                # A pickle of paths, host and token, which nothing here or in the library reads.
                Path(folder, TRAINING_ARGS).unlink(missing_ok=True)
                # Other processes may be writing what is theirs of a checkpoint there.
                self._model_files = [name for name in sizes_of(Path(folder)) if not name.startswith(OF_A_PROCESS)]
        return None

    @spent_on(SAVING)
    def _save_checkpoint(self, model, trial):
        # The stock method writes in place, where a kill leaves half a checkpoint for the next resume to take.
        self.guard.check_weights()
        run_folder = Path(self._get_output_dir(trial))
        place = run_folder / f"checkpoint-{self.state.global_step}"
        error = self._write_checkpoint(model, trial, place)
        if isinstance(error, DiskFull) and self._make_room(run_folder):
            error = self._write_checkpoint(model, trial, place)
        if error is not None:
            raise error
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(place))
        if self.args.should_save:
            if overwritten(run_folder):
                flush(place)
            remove_overwritten(run_folder, self._kept())
            rotate(run_folder, self.args.save_total_limit, self._kept())
        if self._save_error is not None:
            error, self._save_error = self._save_error, None
            raise error

    def _write_checkpoint(self, model, trial, place) -> Exception | None:
        """Write a checkpoint beside and put it in its place; what failed in any process, and then it leaves nothing."""
        run_folder, error = place.parent, None
        self._beside, self._torn = run_folder / UNFINISHED, None
        beside = self._beside / place.name
        try:
            super()._save_checkpoint(model, trial)
            beside.mkdir(parents=True, exist_ok=True)  # another process may not have come to it
            save_account(self.account, beside, self.args.process_index)
        except Exception as failure:
            error = failure
        self._beside = None
        best = run_folder / f"checkpoint-{self.state.best_global_step}"
        if best == place or best.is_dir():
            self.state.best_model_checkpoint = str(best)
        error = self._failed_anywhere(self._torn or error, place)
        if error is None and self.args.should_save:
            try:
                save_order(self.order, beside)
                save_plan(self.declared(), beside)
                save_record(self._record, beside)
                # Which is the best follows from its step, and its path tells of this machine.
                replace(self.state, best_model_checkpoint=None).save_to_json(str(beside / STATE))
                seal(beside)
                put_in_place(beside, place)
            except OSError as failure:
                error = failure
        error = self._failed_anywhere(error, place)
        if self.args.should_save:
            discard_unfinished(run_folder)
        return error

    def _kept(self):
        best = self.state.best_model_checkpoint
        return {self._place, *([] if best is None else [Path(best)]), *(folder for folder, _ in self._pushed)}

    def _failed_anywhere(self, error, place):
        """The error of this process, or that another has one; a full disk is named as such by all."""
        if error is None and self._save_error is not None and is_full(place.parent, self._save_error):
            error = self._save_error
        if error is not None and not isinstance(error, DiskFull) and is_full(place.parent, error):
            error = DiskFull(full_disk(place.parent, place.name, self.args.save_total_limit))
        if self.args.world_size == 1:
            return error
        found = gather_object([None if error is None else (isinstance(error, DiskFull), in_a_line(error, 400))])
        failed = next(filter(None, found), None)
        if failed is None or error is not None:
            return error
        is_disk, line = failed
        return DiskFull(line) if is_disk else RuntimeError(f"another process could not save {place.name}: {line}")

    def _make_room(self, run_folder):
        """Remove already what is too much when the checkpoint is there, if a whole one stays; whether there was any."""
        there, limit = [], self.args.save_total_limit
        if self.args.should_save:
            there = surplus(run_folder, limit, self._kept(), coming=1)
            rotate(run_folder, limit, self._kept(), coming=1)
        return any(gather_object([bool(there)]))

    def _get_output_dir(self, trial):
        # The stock `_save_checkpoint` asks for the run's folder here, and makes the checkpoint's in it.
        folder = super()._get_output_dir(trial)
        return folder if self._beside is None else str(self._beside)

    def _finalize_training(self, *args, **kwargs):
        # The stock method removes whatever is named like a checkpoint but the best one, where one may be left.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
