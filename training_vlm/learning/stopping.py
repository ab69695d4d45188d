"""A run that is told to stop saves what it has learned and ends with 75: whoever started it may start it again.

Slurm, spot machines and other schedulers send SIGTERM or SIGUSR1 some seconds before they take the machine away. While
a run trains, the signal is noted, and the step that is being made ends with a checkpoint; an evaluation is broken off,
and made up for when the run goes on. Before and after training there is nothing to save: the process ends at once.
Processes of one run agree on the step in what the guard gathers anyway. Workers that read data are told by nobody: a
signal to all processes of a machine must not take the batches from under a step.
"""

import atexit
import contextlib
import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import DefaultFlowCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .adapters import composed


if TYPE_CHECKING:
    from .trainer import VLMTrainer

STOPPED = 75
"""The exit code of a run that was told to stop: `EX_TEMPFAIL`, try again."""
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Stopped(SystemExit):
    """Raised where a run ends because it was told to."""

    def __init__(self):
        super().__init__(STOPPED)


class Interrupted(BaseException):
    """An evaluation during training is broken off."""


@contextlib.contextmanager
def exiting_when_told() -> Iterator[None]:
    """Have this process end at once with `STOPPED` when it is told to stop, as long as nothing better is arranged."""

    def exit_at_once(number, frame):
        # Not `print`, which may be what is interrupted.
        os.write(2, f"{_told(number)} while nothing was being learned (exit code {STOPPED})\n".encode())
        raise Stopped

    with _handling(exit_at_once):
        yield


def _told(number):
    return f"stopped by {signal.Signals(number).name}"


@contextlib.contextmanager
def _handling(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Give signals to `handler`; in the main thread, which alone may, and not in processes that it starts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def handle(number, frame):
        if os.getpid() == process:
            handler(number, frame)
        else:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, signal.SIG_DFL if former is None else former)


class Stop(TrainerCallback):
    """Ends a `VLMTrainer`'s run where one of its processes was told to."""

    def __init__(self, trainer: "VLMTrainer"):
        self.trainer = trainer
        self.heard = 0  # the signal that this process got, by number
        self._agreed = 0  # the signal that all know of
        self.is_moving = False  # the weights are between two steps

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals in the block; one that nothing came of goes to whoever heard them before."""
        self.heard, self._agreed, self.is_moving = 0, 0, False

        def note(number, frame):
            self.heard = self.heard or number

        with _handling(note):
            yield
        if self.heard:
            signal.raise_signal(self.heard)

    def all_heard(self, number: int) -> None:
        """Note the signal that a process of this run got, 0 for none; every process has to at the same step."""
        self._agreed = self._agreed or number

    def agree(self) -> bool:
        """Whether any process was told to stop; every process has to ask."""
        heard = self.heard
        if self.trainer.args.world_size > 1:
            accelerator = self.trainer.accelerator
            heard = int(accelerator.gather(torch.tensor([heard], device=accelerator.device)).max())
        self.all_heard(heard)
        return bool(self._agreed)

    def between_batches(self) -> None:
        """
        Break off an evaluation during training, where that was told; every process has to ask.

        Raises:
            Interrupted: it was.
        """
        if self.trainer.is_in_train and self.agree():
            raise Interrupted

    @contextlib.contextmanager
    def between_passes(self) -> Iterator[None]:
        """
        See `between_batches`: before the block, and in one process before each pass of the model in it.

        Several may ask the model a different number of times, so they go through the block together.
        """
        self.between_batches()
        with contextlib.ExitStack() as stack:
            if self.trainer.args.world_size == 1:
                hook = composed(self.trainer.model).register_forward_pre_hook(lambda *_: self.between_batches())
                stack.callback(hook.remove)
            yield

    def on_train_begin(self, args, state, control, **kwargs):
        """See whether the run before came to its last evaluation."""
        self.trainer.note_late(is_evaluation_missing(args, state))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """From here on the weights are those of no step."""
        self.is_moving = True

    def on_step_end(self, args, state, control, **kwargs):
        """Have a step that is the last for now logged and saved; what would be evaluated is when the run goes on."""
        self.is_moving = False
        if args.world_size == 1:
            self.all_heard(self.heard)
        if self._agreed:
            control.should_log = control.should_save = True
            control.should_evaluate = False

    def on_save(self, args, state, control, **kwargs):
        """End the run; also where it was told during a regular save."""
        if self.agree():
            raise self.stopped()

    def stopped(self) -> Stopped:
        """What ends the run, once it has said so."""
        trainer = self.trainer
        if trainer.is_world_process_zero():
            state = trainer.state
            print(
                f"{_told(self._agreed)} after step {state.global_step} of {state.max_steps}; start it again with "
                f"--resume_from_checkpoint auto (exit code {STOPPED})",
                flush=True,
            )
        return Stopped()

    def shield(self, loader: torch.utils.data.DataLoader) -> torch.utils.data.DataLoader:
        """Have the workers of a loader told by nobody but this process."""
        prepare = getattr(loader, "worker_init_fn", None)
        if getattr(loader, "num_workers", 0) and getattr(prepare, "func", None) is not _shielded:
            for made in (loader, getattr(loader, "base_dataloader", loader)):  # what accelerate made, and what it reads
                made.worker_init_fn = functools.partial(_shielded, prepare, _closing())
        return loader


def is_evaluation_missing(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether a run that goes on from a checkpoint has to evaluate first, because it ended before it could."""
    flow, control = DefaultFlowCallback(), TrainerControl()
    if not state.global_step:
        return False
    flow.on_step_end(args, state, control)
    if float(state.epoch or 0).is_integer():
        flow.on_epoch_end(args, state, control)
    logged = [entry for entry in state.log_history if entry.get("step") == state.global_step]
    return control.should_evaluate and not any(name.startswith("eval_") for entry in logged for name in entry)


@functools.cache
def _closing() -> torch.Tensor:
    """Not 0 when this process is about to end, and then ends its workers; shared with them."""
    closing = torch.zeros(1, dtype=torch.uint8).share_memory_()
    atexit.register(closing.fill_, 1)
    return closing


def _shielded(prepare, closing, worker):
    """Start a worker that is not ended by the signals that tell a run to stop."""
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0) if closing.item() else None)
    for number in _SIGNALS[1:]:
        signal.signal(number, signal.SIG_IGN)
    if prepare is not None:
        prepare(worker)


__all__ = ["STOPPED", "Interrupted", "Stop", "Stopped", "exiting_when_told", "is_evaluation_missing"]
