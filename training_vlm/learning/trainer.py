"""The Trainer, with what it cannot express for this model: nothing computed in vain, and a loss that weighs tokens.

Six things differ from the stock Trainer. The head is computed at supervised positions only: the same loss and
gradients, without the logits of a thousand image positions. The evaluation loss is the mean over tokens, where the
stock loop averages the means of batches, which makes it depend on the batch size. Label smoothing is the model's, with
all that its loss has. The accounts of the batches that were trained on are added up, and go on with a resumed run. A
run on a stream resumes at its next sample without decoding those before it. Grouping by length reads no item, and its
order depends on seed and epoch alone.
"""

import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import EvalLoopOutput, get_last_checkpoint
from transformers.utils import logging

from modeling_vlm.loss_vlm import IGNORE, targets_of, token_costs
from processing.batching.account import Account
from processing.data_error_vlm import DuetError


logger = logging.get_logger(__name__)


class VLMTrainer(Trainer):
    """`Trainer` for a composed model; takes the same arguments."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.card = None  # what writes the model card, once there is something to say
        self.account = Account()  # of this process
        self._only_loss = False
        self._evaluated = None
        self._evaluated_nothing = False
        self._skip_batches = 0  # of a resumed stream
        # The model's loss smooths: the stock way knows neither who predicts whom, nor weights, nor a balance loss.
        self.label_smoother = None
        self.add_callback(_EpochOfData())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """See `Trainer.compute_loss`; logits are left out where nobody reads them."""
        account = inputs.pop("account", None)
        if account is not None and model.training:
            self.account.add_batch(account)
        targets, weights = targets_of(*map(inputs.get, ("labels", "loss_weights", "shift_labels")))
        if targets is not None and self.compute_loss_func is not None:
            if weights is not None:
                raise DuetError("weights of messages cannot be combined with another loss.")
            inputs = {name: value for name, value in inputs.items() if name != "shift_labels"}
        elif targets is not None:
            inputs = dict(inputs)
            if model.training or self._only_loss:
                inputs["logits_to_keep"] = targets != IGNORE
            if model.training:
                inputs["smoothing"] = self.args.label_smoothing_factor
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if targets is not None and not model.training and self._evaluated is not None:
            self._add_evaluated(targets, weights, outputs["logits"])
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        self._only_loss = prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._only_loss = False

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """See `Trainer.evaluation_loop`; `eval_loss` is the mean over all supervised tokens of all processes."""
        self._evaluated = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        (total, tokens), self._evaluated = self._evaluated.tolist(), None
        if f"{metric_key_prefix}_loss" in output.metrics:
            output.metrics[f"{metric_key_prefix}_loss"] = total / max(tokens, 1)
            self._evaluated_nothing = not tokens
            if self._evaluated_nothing:  # a loss of 0 would be the best that there is
                del output.metrics[f"{metric_key_prefix}_loss"]
                logger.warning("the evaluation gives no loss: nothing in its data could be learned from.")
        return output

    def _determine_best_metric(self, metrics, trial):
        # The stock method ends the run where there is no such metric, and an evaluation of nothing has none.
        if self._evaluated_nothing:
            return False
        return super()._determine_best_metric(metrics, trial)

    def gathered_account(self) -> Account:
        """The account of every batch that was trained on, of all processes; every process has to ask."""
        account = Account()
        for state in gather_object([self.account.state()]):
            account.merge(Account.from_state(state))
        return account

    def train(self, resume_from_checkpoint=None, **kwargs):
        """See `Trainer.train`."""
        self._skip_batches = self._batches_to_skip(resume_from_checkpoint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """See `Trainer.get_train_dataloader`; of a resumed stream, what the loop will skip is not even made."""
        collator = self.data_collator
        if self._skip_batches and hasattr(collator, "skip_batches"):
            # Another collator, because the evaluation's batches are all wanted.
            self.data_collator = copy.copy(collator)
            self.data_collator.skip_batches = self._skip_batches
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def _batches_to_skip(self, checkpoint):
        """How many batches the stock loop will throw away before it goes on with a stream."""
        stream = isinstance(self.train_dataset, torch.utils.data.IterableDataset)
        if not stream or hasattr(self.train_dataset, "__len__") or self.args.ignore_data_skip:
            return 0
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        if not checkpoint:
            return 0
        state = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json")))
        # A stream without a length is one epoch of `max_steps`.
        return state.global_step % self.args.max_steps * self.args.gradient_accumulation_steps

    def _save_rng_state(self, output_dir):
        # What each process has to find again when it resumes lies beside its random states.
        super()._save_rng_state(output_dir)
        file = Path(output_dir, f"data_account_{self.args.process_index}.json")
        file.write_text(json.dumps(self.account.state()), encoding="utf-8")
        if self.args.process_index == 0:
            for other, number in _account_files(output_dir):
                if number >= self.args.world_size:  # of an earlier run of more processes, saved here at the same step
                    other.unlink()

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        # One process goes on with what all counted, so that nothing is lost where fewer go on than were stopped.
        self.account = Account()
        if self.args.process_index == 0:
            for file, _ in _account_files(checkpoint):
                self.account.merge(Account.from_state(json.loads(file.read_text(encoding="utf-8"))))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """See `Trainer.save_model`; the output folder itself holds what it held until the new model is whole."""
        folder = Path(self.args.output_dir)
        if output_dir is not None and Path(output_dir) != folder:
            return super().save_model(output_dir, _internal_call)
        beside = folder / "_saving"
        super().save_model(str(beside), _internal_call=True)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            move_model(beside, folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(self, *args, **kwargs) -> None:
        """Write the model card: the run's own where there is one, for `push_to_hub` too."""
        if self.card is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            self.card()

    def _get_train_sampler(self, train_dataset=None):
        # The stock sampler would read every item, images too, to find out how long it is.
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(dataset, "lengths"):
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGroupedOrder(dataset, batch, seed)

    def _add_evaluated(self, targets, weights, logits):
        keep = targets != IGNORE
        if logits.ndim == 3:
            logits = logits[keep]
        costs = token_costs(logits, targets[keep], None if weights is None else weights[keep])
        # A sum and a count for each row, so that rows repeated to fill the last batch are not counted twice.
        sums = torch.zeros(len(targets), 2, device=logits.device)
        sums[:, 0].index_add_(0, keep.nonzero()[:, 0], costs)
        sums[:, 1] = keep.sum(1)
        self._evaluated += self.accelerator.gather_for_metrics(sums).cpu().double().sum(0)


class LengthGroupedOrder(torch.utils.data.Sampler):
    """
    Every item once an epoch, those of like lengths beside each other.

    The order depends on seed and epoch alone: all processes have the same one, and a resumed run goes on with it. The
    lengths are read for each epoch, as a weighted mix shows other items in the next.

    Args:
        dataset: has `lengths`, the positions of every item, and `set_epoch` where they change.
        batch_size: items that should be of like lengths.
        seed: for the order.
    """

    def __init__(self, dataset: torch.utils.data.Dataset, batch_size: int, seed: int = 0):
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        drawn = random.Random(f"{self.seed} {self.epoch}").getrandbits(63)
        generator = torch.Generator().manual_seed(drawn)
        return iter(get_length_grouped_indices(self.dataset.lengths, self.batch_size, generator=generator))

    def set_epoch(self, epoch: int) -> None:
        """Go on to another epoch, with the data set."""
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


def move_model(source: Path, folder: Path) -> None:
    """Move a saved model into a folder: its weights first, its config, without which none is found there, last."""
    old = {path.name for path in folder.glob("model*.safetensors*")}
    new = sorted(source.iterdir(), key=lambda path: (path.name == "config.json", ".safetensors" not in path.name))
    for path in new:
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    for name in old - {path.name for path in new}:  # shards of a model that was there before
        (folder / name).unlink()
    source.rmdir()


def _account_files(checkpoint):
    """The accounts in a checkpoint, and of which process each is."""
    files = Path(checkpoint).glob("data_account_*.json")
    return sorted(((file, int(file.stem.rpartition("_")[2])) for file in files), key=lambda found: found[1])


class _EpochOfData(TrainerCallback):
    """
    Tells data set and sampler which epoch it is, in every process.

    accelerate's loader tells the sampler only, and not even that where a run of several processes resumes: there the
    sampler lies behind more layers than it looks through.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        batches = getattr(train_dataloader, "batch_sampler", None)
        while hasattr(batches, "batch_sampler"):
            batches = batches.batch_sampler
        for part in (getattr(train_dataloader, "dataset", None), getattr(batches, "sampler", None)):
            if hasattr(part, "set_epoch"):
                part.set_epoch(int(state.epoch or 0))
