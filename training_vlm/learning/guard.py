"""A run stops where it no longer learns: at the first step that is not finite, or when nothing reaches what learns.

The stock loop logs a loss that is not a number as the mean of those before it, and goes on to save what came of it.
Here each step's losses and gradient norm are looked at before the optimiser moves, in one transfer from the device,
where the stock loop's filter of the log (which is off with this) takes one for every micro-batch. All processes come to
the same verdict, so all stop; in the same transfer each hears what signal another got.
"""

from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from processing.batching.account import Record
from processing.data_error_vlm import DuetError

from .checkpoints import newest_whole


if TYPE_CHECKING:
    from .trainer import VLMTrainer

SKIPPED_AT_MOST = 20  # steps in a row, by the scaler of fp16
ROWS_NAMED = 8
# Nothing may reach what learns for so many steps and conversations: most of a mix may be text.
STEPS, CONVERSATIONS = 20, 1000


class Guard(TrainerCallback):
    """Looks at every step of a `VLMTrainer`, which tells it of its micro-batches."""

    def __init__(self, trainer: "VLMTrainer"):
        self.trainer = trainer
        self.stopped = False  # for what it saw, so that what was learned last may be worth nothing
        self._losses: list[torch.Tensor] = []
        self._records: list[list[Record]] = []
        self._skipped = self._began = 0
        self._reached = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._losses, self._records, self._skipped, self._began = [], [], 0, state.global_step
        self._reached = self.stopped = False

    def saw_records(self, records: list[Record]) -> None:
        """Note what a micro-batch holds."""
        self._records.append(records)

    def saw_loss(self, loss: torch.Tensor) -> None:
        """Note the loss of a micro-batch."""
        self._losses.append(loss)

    def check(self, norm: torch.Tensor | float | None) -> None:
        """
        Look at a step before the optimiser makes it; every process has to.

        Args:
            norm: that of the gradients of all processes, where one is computed.

        Raises:
            DuetError: its losses or `norm` are not finite.
        """
        losses, self._losses = self._losses, []
        records, self._records = self._records, []
        device = losses[0].device
        norm = torch.as_tensor(1.0 if norm is None else norm, device=device, dtype=torch.float32)
        told = torch.as_tensor(self.trainer.stop.heard, device=device, dtype=torch.float32)
        seen = torch.stack([*(loss.float() for loss in losses), norm, told])[None]
        if self.trainer.args.world_size > 1:
            seen = self.trainer.accelerator.gather(seen)
        seen = seen.cpu()
        if self.trainer.args.world_size > 1:  # one process knows by itself
            self.trainer.stop.all_heard(int(seen[:, -1].max()))
        seen = seen[:, :-1]
        finite = seen.isfinite()
        self._reached = self._reached or bool((seen[:, -1] != 0).any())
        scaler = self.trainer.accelerator.scaler
        if scaler is not None and scaler.is_enabled() and not finite[:, -1].all():
            self._skipped += 1  # the scaler does not make this step
            if self._skipped < SKIPPED_AT_MOST:
                return
            self._stop(f"the scaler of fp16 has skipped {SKIPPED_AT_MOST} steps in a row", records)
        self._skipped = 0
        if not finite.all():
            if finite[:, :-1].all():
                self._stop(f"the gradient norm is {seen[0, -1].item()}", records)
            torn = (~finite[self.trainer.args.process_index, :-1]).tolist()
            value = seen[:, :-1][~finite[:, :-1]][0].item()
            self._stop(f"the loss is {value}", [found for found, bad in zip(records, torn) if bad])

    def _stop(self, what, records):
        self.stopped = True
        trainer, args = self.trainer, self.trainer.args
        rows = [f"{record.source}, row {record.row}" for found in records for record in found if not record.dropped]
        if args.world_size > 1:
            rows = gather_object(rows)
        rows = list(dict.fromkeys(rows))
        named = "; ".join(rows[:ROWS_NAMED]) + (f" and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else "")
        raise DuetError(
            f"{what} at step {trainer.state.global_step + 1}{f' (learned there: {named})' if named else ''}; nothing "
            f"was saved of it, and {self._last_good()}, or look at these rows."
        )

    def _last_good(self):
        """What there is to go on from, and with what."""
        rate = self.trainer.args.learning_rate
        remedy = f"Choose a smaller learning_rate (it is {rate:g}) or float32"
        if (good := newest_whole(self.trainer.run_folder)) is None:
            return f"no checkpoint was saved before. {remedy}"
        # A resumed run keeps its rate.
        return f"{good} is the last good checkpoint. {remedy} in a new run from its model, --model {good}"

    def check_weights(self) -> None:
        """
        Refuse to save weights that are not finite.

        Raises:
            DuetError: they are not, with the name of the first.
        """
        trainer = self.trainer
        assert trainer.model is not None
        learned = [(name, p.detach()) for name, p in trainer.model.named_parameters() if p.requires_grad]
        local = [(name, p.to_local() if hasattr(p, "to_local") else p) for name, p in learned]
        finite = torch.stack([p.isfinite().all() for _, p in local]) if local else torch.ones(1, dtype=torch.bool)
        torn = (~finite).nonzero().flatten().tolist()
        found = [local[index][0] for index in torn[:1]]
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # each process has a part
            found = gather_object(found)
        if found:
            self.stopped = True
            raise DuetError(
                f"the weights are no longer finite after step {trainer.state.global_step} ({found[0]}); they are not "
                f"saved, and {self._last_good()}."
            )

    def on_step_end(self, args, state, control, **kwargs):
        """Stop where nothing has reached what learns; text alone in some batches is no reason."""
        steps = state.global_step - self._began
        shown = steps * self.trainer.get_total_train_batch_size(args)
        at_end = state.global_step >= state.max_steps and not self._began
        if not self._reached and (at_end or (steps >= STEPS and shown >= CONVERSATIONS)):
            self._stop_unreached(state)

    def on_epoch_end(self, args, state, control, **kwargs):
        """A whole epoch is all that there is."""
        if not self._reached and not self._began and state.global_step:
            self._stop_unreached(state)

    def _stop_unreached(self, state) -> None:
        self.stopped = True
        parts = ", ".join(part.name for part in self.trainer.declared().parts if part.learning)
        raise DuetError(
            f"no sample has reached what learns ({parts}) in the first {state.global_step - self._began} steps: every "
            "gradient was 0. A projector or an encoder learns from images alone, and a sample only from what is "
            "supervised; give it such data, or let another part learn (--tune_text full)."
        )
