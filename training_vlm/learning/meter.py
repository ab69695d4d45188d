"""What a run does with its time: tokens and samples a second, padding, waiting for data, operations achieved.

Time is told apart by what it is spent on. Until the first batch is there (workers start; a resumed run passes over what
it has learned) nothing is trained yet, an evaluation and a checkpoint are their own, and the time between asking the
loader for a batch and having it is waiting. What is left is training, and rates are of training and waiting. Counts
come with the batches, as numbers of Python: no device is asked for anything, and processes meet where a log line is
written, as the stock loop does there for the loss.
"""

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from transformers import TrainerCallback
from transformers.utils import logging

from processing.batching.account import BatchAccount
from processing.data_error_vlm import in_a_line

from ..flops import Costs, Work, costs_of, windows_of, work_of
from .adapters import composed


if TYPE_CHECKING:
    from .trainer import VLMTrainer

logger = logging.get_logger(__name__)

TRAINING, WAITING, EVALUATION, SAVING, STARTING = "training", "data_wait", "evaluation", "checkpoint", "start"
NAMES = {
    TRAINING: "training",
    WAITING: "waiting for data",
    EVALUATION: "evaluation",
    SAVING: "checkpoints",
    STARTING: "until the first batch",
}


def spent_on(what: str):
    """The time of a method of a `VLMTrainer` is that of an evaluation or a checkpoint."""

    def decorate(method):
        @functools.wraps(method)
        def timed(trainer, *args, **kwargs):
            with trainer.meter.aside(what):
                return method(trainer, *args, **kwargs)

        return timed

    return decorate


class Meter(TrainerCallback):
    """Counts what a `VLMTrainer` does, which tells it of batches, evaluations and checkpoints."""

    def __init__(self, trainer: "VLMTrainer"):
        self.trainer = trainer
        self._state: str | None = None  # what time is spent on now
        self._reset()

    def _reset(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.work = Work()
        self._logged: Counter[str] = Counter()
        self._since = 0.0
        self._began = 0  # step

    def _turn_to(self, state: str | None) -> str | None:
        """Go on with something else; gives what was done before."""
        now, before = time.perf_counter(), self._state
        if before is not None:
            self.seconds[before] += now - self._since  # type: ignore[assignment]  # typeshed counts whole ones alone
        self._state, self._since = state, now
        return before

    def on_train_begin(self, args, state, control, **kwargs):
        self._reset()
        self._began, self._windows = state.global_step, windows_of(composed(self.trainer.model).config.text_config)
        self._turn_to(STARTING)

    def on_train_end(self, args, state, control, **kwargs):
        self._turn_to(None)

    @contextlib.contextmanager
    def aside(self, what: str) -> Iterator[None]:
        """Within it the time is that of an evaluation or a checkpoint, where a run is going on."""
        before = self._turn_to(what if self._state is not None else None)
        try:
            yield
        finally:
            self._turn_to(before)

    def waiting(self, batches: Iterator) -> Iterator:
        """The same batches; the time until each is there is told apart."""
        while True:
            if self._state == TRAINING:
                self._turn_to(WAITING)
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._turn_to(TRAINING)
            yield batch

    def saw(self, batch: dict[str, Any], account: BatchAccount) -> None:
        """Count a micro-batch that is learned from."""
        learned = [record for record in account.records if record.dropped is None]
        predicted = sum(record.supervised for record in learned)
        self.counts.update(
            supervised=predicted, samples=len(learned), padding=account.padding, positions=account.run,
        )  # fmt: skip
        self.work.add(work_of(batch, [record.tokens for record in learned], predicted, self._windows))

    def log_line(self) -> dict[str, float]:
        """What a line of the log says of the time since the one before; every process has to ask."""
        self._turn_to(self._state)
        total = Counter(self.counts)
        total.update({name: self.seconds[name] for name in (TRAINING, WAITING)})
        new = Counter(total)
        new.subtract(self._logged)
        self._logged = total
        return _figures(self._together(new), self.trainer.args.world_size)

    def _together(self, counts: Counter) -> Counter:
        """Counts of all processes, added up."""
        if self.trainer.args.world_size == 1:
            return counts
        return sum(map(Counter, gather_object([dict(counts)])), Counter())

    def report(self) -> dict[str, Any]:
        """
        What the run did with its time, for `train_results.json`; every process has to ask.

        Seconds are those of the main process, counts those of all.
        """
        counts, work = self._together(self.counts + self._times()), self.work
        if self.trainer.args.world_size > 1:
            work = Work()
            for other in gather_object([self.work]):
                work.add(other)
        report: dict[str, Any] = {
            "first_step": self._began + 1,
            **{f"{name}_seconds": round(self.seconds[name], 2) for name in NAMES},
            **_figures(counts, self.trainer.args.world_size),
        }
        costs = self._costs() if self.trainer.is_world_process_zero() and work.positions else None
        if costs is not None:
            needed, seconds = costs.of(work), self.seconds[TRAINING] + self.seconds[WAITING]
            report["necessary_flops"] = needed
            report["necessary_flops_per_second"] = round(needed / max(1e-9, seconds))
        return report

    def _times(self) -> Counter:
        return Counter({name: self.seconds[name] for name in (TRAINING, WAITING)})

    def _costs(self) -> Costs | None:
        trainer = self.trainer
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # no process has whole weights
            return None
        try:
            return costs_of(composed(trainer.model))
        except Exception as error:  # such as code of a projector that asks for values
            logger.warning(f"what a step has to compute is not known of this model: {in_a_line(error, 200)}")
            return None


def _figures(counts: Counter, processes: int) -> dict[str, float]:
    """Rates and shares, as far as anything was counted; the seconds of all processes were spent side by side."""
    seconds = counts[TRAINING] + counts[WAITING]
    found = {}
    if counts["positions"] and seconds > 0:
        found = {
            "supervised_tokens_per_second": counts["supervised"] * processes / seconds,
            "samples_per_second": counts["samples"] * processes / seconds,
            "padding_share": counts["padding"] / counts["positions"],
            "supervised_share": counts["supervised"] / counts["positions"],
        }
    if seconds > 0:
        found["data_wait_share"] = counts[WAITING] / seconds
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def table(report: dict[str, Any]) -> str:
    """The report in lines for a terminal."""
    seconds = {shown: report[f"{name}_seconds"] for name, shown in NAMES.items()}
    whole = sum(seconds.values()) or 1.0
    lines = [f"{'time':<24}{'seconds':>12}{'share':>9}"]
    lines += [f"{name:<24}{spent:>12,.1f}{spent / whole:>9.1%}" for name, spent in seconds.items() if spent]
    if "samples_per_second" in report:
        lines.append(
            f"\n{report['supervised_tokens_per_second']:,.4g} supervised tokens and "
            f"{report['samples_per_second']:,.4g} samples a second; {report['supervised_share']:.1%} of the positions "
            f"that were run are supervised, {report['padding_share']:.1%} padding"
        )
    if "necessary_flops" in report:
        lines.append(
            f"{report['necessary_flops'] / 1e12:,.4g} TFLOP had to be computed: "
            f"{report['necessary_flops_per_second'] / 1e12:,.3g} TFLOP/s"
        )
    return "\n".join(lines)


__all__ = ["EVALUATION", "SAVING", "Meter", "spent_on", "table"]
