"""The Trainer, with what it cannot express for this model: nothing computed in vain, and a loss that weighs tokens.

Thirteen things differ from the stock Trainer. The head is computed at supervised positions only, a part of them at a
time: the same loss and gradients, without the logits of a thousand image positions. The evaluation loss is the mean
over tokens, summed for each text of a row, where the stock loop averages the means of batches, which makes it depend on
the batch size. Label smoothing is the model's, with all that its loss has. Batches may be planned ahead in place of a
number of conversations, and texts of an image learned in one. The accounts of the batches that were trained on are
added up, and go on with a resumed run. A run on a stream resumes at its next sample without decoding those before it.
Grouping by length reads no item, and its order depends on seed and epoch alone. A run stops when its loss is no longer
finite or nothing reaches what learns. Each line of the log says how fast the run is, and how much of it is waiting. A
run that is resumed at its end takes no further step, and one whose data come in another order says so. A run that is
told to stop saves what it has learned. An evaluation changes nothing that is random afterwards, and may ask the model
questions. What is saved is another class's, see `saving.py`, and what goes to the Hub a third one's, `publishing.py`.

Nine of the Trainer's private methods are overridden in the three, each with its reason beside it.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerState
from transformers.trainer_utils import EvalLoopOutput, SaveStrategy, TrainOutput
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from evaluation_vlm.asking import untouched_randomness
from evaluation_vlm.while_training import WhileTraining
from modeling_vlm.loss_vlm import IGNORE, targets_of, token_costs
from processing.batching.account import Account, number_of
from processing.data_error_vlm import DuetError

from .adapters import composed
from .batches import PlannedBatches, PlannedStream
from .checkpoints import (
    STATE,
    BestCheckpoint,
    discard_unfinished,
    fault,
    find_checkpoint,
    is_auto,
    is_own,
    left_behind,
    load_account,
    load_order,
)
from .guard import Guard
from .lineage import leave_behind, note_run, origin, read_run
from .meter import EVALUATION, Meter, spent_on
from .publishing import was_pushed
from .record import check_record
from .sampling import EpochOfData, GroupedOrder, LengthGroupedOrder, change_of_order, order_seed
from .saving import SavingTrainer
from .sharding import check_goes_on
from .stopping import Interrupted, Stop
from .tuning import RatesOfParts, check_plan
from .verify import Verification


logger = logging.get_logger(__name__)


class VLMTrainer(SavingTrainer):
    """`Trainer` for a composed model; takes the same arguments."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.savings = None  # which ones a run makes, see `savings.py`
        self.examine: WhileTraining | None = None  # asks and judges, see `evaluation_vlm`
        self.describe: Callable[[], dict[str, Any]] = dict  # what the run is made of, see `record.py`
        self._only_loss = False
        self._evaluated = None
        self._skip_batches = 0  # where a stream is resumed
        # The model's loss smooths: the stock way knows neither who predicts whom, nor weights, nor a balance loss.
        self.label_smoother = None
        self._is_late = False  # the evaluation that belongs to that step was not come to
        self.is_finished = False  # the run had come to its end before, and nothing of it is left to do
        self.planned: PlannedBatches | PlannedStream | None = None  # in place of a number of conversations
        self.best = BestCheckpoint()
        self.add_callback(self.best)
        self.add_callback(EpochOfData())
        self.guard = Guard(self)
        self.add_callback(self.guard)
        self.meter = Meter(self)
        self.add_callback(self.meter)
        self.rates = RatesOfParts(self)
        self.add_callback(self.rates)
        self.add_callback(Verification(self))
        self.stop = Stop(self)
        self.add_callback(self.stop)
        # It would hide from the log what the guard looks at; the steps that a scaler skips are to be hidden.
        self.args.logging_nan_inf_filter = self.accelerator.scaler is not None

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """
        See `Trainer.create_optimizer`; parts with rates and decays of their own are groups of their own.

        Raises:
            DuetError: the optimizer makes its groups itself.
        """
        opt_model: Any = self.model if model is None else model
        plan = self.declared()
        if self.optimizer is not None or plan.is_stock(self.args):
            return super().create_optimizer(model)
        kind, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, opt_model)
        if not isinstance(kind, type) or not issubclass(kind, torch.optim.Optimizer) or {*kwargs} & _OWN_GROUPS:
            optim, rate = OptimizerNames(self.args.optim).value, f"{self.args.learning_rate:g}"
            raise DuetError(
                f"optim={optim} makes its groups itself, so that no part can have a rate or a decay of its own; give "
                f"all the same, as --learning_rate {rate} --projector_learning_rate {rate}, or choose another optim."
            )
        groups = plan.groups(opt_model, self.get_decay_parameter_names(composed(opt_model)))
        before = self.optimizer_cls_and_kwargs
        self.optimizer_cls_and_kwargs = kind, {**kwargs, "params": groups}
        try:
            return super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = before

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """See `Trainer.compute_loss`; logits are left out where nobody reads them."""
        account = inputs.pop("account", None)
        if account is not None and model.training:
            self.last_step.saw(account)
            self.guard.saw_records(account.records)
            self.meter.saw(inputs, account)
        targets, weights = targets_of(*map(inputs.get, ("labels", "loss_weights", "shift_labels")))
        if targets is not None and self.compute_loss_func is not None:
            if weights is not None:
                raise DuetError("weights of messages cannot be combined with another loss.")
            inputs = {name: value for name, value in inputs.items() if name != "shift_labels"}
        elif targets is not None:
            inputs = dict(inputs)
            if model.training or self._only_loss:
                inputs["skip_logits"] = True
            if model.training:
                inputs["smoothing"] = self.args.label_smoothing_factor
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if targets is not None and not model.training and self._evaluated is not None:
            texts = _rows_of_texts(targets, inputs.get("segments"), account)
            costs = outputs.get("token_costs")
            if costs is None:  # with metrics that read the logits
                costs = token_costs(outputs["logits"], targets, weights).view(targets.shape)
            self._add_evaluated(texts.to(costs.device), targets.to(costs.device) != IGNORE, costs)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        """See `Trainer.training_step`."""
        loss = super().training_step(*args, **kwargs)
        self.guard.saw_loss(loss)
        return loss

    def get_batch_samples(self, epoch_iterator, *args, **kwargs) -> tuple:
        """See `Trainer.get_batch_samples`; the time that is spent waiting for data is measured."""
        return super().get_batch_samples(self.meter.waiting(epoch_iterator), *args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """See `Trainer.prediction_step`."""
        self.stop.between_batches()
        self._only_loss = prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._only_loss = False

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """See `Trainer.evaluate`; a training goes on as it would have without."""
        with untouched_randomness():  # the stock loop's data loader draws from what dropout draws from
            return super().evaluate(*args, **kwargs)

    @spent_on(EVALUATION)
    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """See `Trainer.evaluation_loop`; `eval_loss` is the mean over all supervised tokens of all processes."""
        self._evaluated = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)  # type: ignore[misc]
        assert output.metrics is not None
        (total, tokens), self._evaluated = self._evaluated.tolist(), None
        if f"{metric_key_prefix}_loss" in output.metrics:
            output.metrics[f"{metric_key_prefix}_loss"] = total / max(tokens, 1)
            if not tokens:  # a loss of 0 would be the best that there is
                del output.metrics[f"{metric_key_prefix}_loss"]
                logger.warning("the evaluation gives no loss: nothing in its data could be learned from.")
        if self.examine is not None and metric_key_prefix == "eval":
            with self.stop.between_passes():
                output.metrics.update({f"eval_{name}": value for name, value in self.examine().items()})
        return output

    def gathered_account(self) -> Account:
        """The account of every batch that was trained on, of all processes; every process has to ask."""
        account = Account()
        for state in gather_object([self.account.state()]):
            account.merge(Account.from_state(state))
        return account

    def train(self, resume_from_checkpoint=None, *args, **kwargs) -> TrainOutput:
        """
        See `Trainer.train`; `True` takes the newest whole checkpoint, `"auto"` the same where there is one.

        Raises:
            DuetError: there is no whole checkpoint to resume from, processes found others, or the run cannot go on.
            Stopped: the process was told to stop; what was learned is in a checkpoint.
        """
        checkpoint, self._resumed_at, self._skip_batches, self._is_late = None, 0, 0, False
        self._record = self.describe()
        if resume_from_checkpoint:
            checkpoint = find_checkpoint(resume_from_checkpoint, self.run_folder, self.is_world_process_zero())
        if checkpoint is not None:
            self._go_on_from(checkpoint)
        if self.args.should_save:
            discard_unfinished(self.run_folder)
            self._begin(checkpoint, is_auto(resume_from_checkpoint) or getattr(self.args, "is_restart", False))
        self.accelerator.wait_for_everyone()
        with self.stop.listening():
            try:
                output = super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
            except _Finished:
                assert checkpoint is not None
                loss = _logged_loss(TrainerState.load_from_json(str(checkpoint / STATE)).log_history)
                return TrainOutput(self._resumed_at, loss, {"train_loss": loss})
            except Interrupted:
                if self.state.global_step > self._resumed_at and fault(self._place) is not None:
                    self._save_checkpoint(self.model, trial=None)
                raise self.stop.stopped() from None
        return output._replace(training_loss=output.metrics["train_loss"])

    def note_late(self, is_missing: bool) -> None:
        """Note that the step from which a run goes on is still to be evaluated; where none follows, that is done."""
        self._is_late = is_missing and self.state.global_step == self._resumed_at
        if self._resumed_at >= self.state.max_steps:
            self._evaluate_late()

    def _go_on_from(self, checkpoint):
        check_goes_on(self, checkpoint)
        check_record(self, checkpoint, self._record)
        check_plan(self.declared(), checkpoint)
        state = TrainerState.load_from_json(str(checkpoint / STATE))
        self._resumed_at = state.global_step
        if self.args.world_size > 1 and len(steps := set(gather_object([self._resumed_at]))) > 1:
            raise DuetError(
                f"the processes found checkpoints of the steps {', '.join(map(str, sorted(steps)))}; name one that "
                "all have with --resume_from_checkpoint FOLDER."
            )
        if self.is_world_process_zero():
            print(f"going on from {checkpoint}", flush=True)
            if not any(checkpoint.glob("rng_state*.pth")):
                print(f"{checkpoint} holds the model alone: optimizer, learning rate and random numbers start anew")
        change = change_of_order(load_order(checkpoint), self.order)
        if change and not self.args.ignore_data_skip and self.is_world_process_zero():
            print(change, flush=True)
        self._skip_batches = self._batches_to_skip()
        # One process a disk goes on with what all counted, so that nothing is lost where fewer go on.
        self.account = load_account(checkpoint) if self.args.should_save else Account()

    def _begin(self, checkpoint, is_restart):
        """See that none but this run's checkpoints are taken up from here on."""
        folder, known = self.run_folder, read_run(self.run_folder)
        overwrite = checkpoint is None and getattr(self.args, "overwrite_output_dir", False)  # not of the library
        left = left_behind(folder, checkpoint)
        place = leave_behind(folder, left, overwrite)
        if place is not None and self.is_world_process_zero():
            names = ", ".join(path.name for path in reversed(left)) or "the base"
            then = "and is removed when there is a new checkpoint" if overwrite else "where it stays"
            print(f"{names} of a run that is not gone on with: now in {place}, {then}", flush=True)
        begun: dict[str, Any] = {"from": None} if checkpoint is None else {}
        if checkpoint is not None and not is_own(checkpoint, folder):
            begun = origin(folder, checkpoint)
        if known is not None or begun.get("from") is not None:
            is_same = is_restart and checkpoint is not None and place is None
            ended = {name: (known or {}).get(name) if is_same else None for name in ("finished", "trained")}
            note_run(folder, **ended, **begun)

    def set_initial_training_values(self, *args, **kwargs) -> tuple:
        """See `Trainer.set_initial_training_values`; a run that is at its end has no epoch left to go through."""
        epochs, *others, max_steps = super().set_initial_training_values(*args, **kwargs)
        known = gather_object([read_run(self.run_folder) or {}])[0]
        self.is_finished = known.get("finished") == max_steps and was_pushed(known, self.args)
        if self.is_finished:
            raise _Finished
        if self._resumed_at >= max_steps > 0:
            if self.is_world_process_zero():
                print(
                    f"the checkpoint is of step {self._resumed_at} of {max_steps}: nothing is left to train", flush=True
                )
            epochs = 0
        return epochs, *others, max_steps

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """See `Trainer.log`; a run that took no step has the loss that it logged before, not 0."""
        if "train_loss" in logs and self.state.global_step == self._resumed_at:
            logs["train_loss"] = _logged_loss(self.state.log_history)
        if "train_loss" in logs and isinstance(self.planned, PlannedStream):
            logs.pop("train_samples_per_second", None)  # they would be batches
        if "loss" in logs:
            logs.update(self.rates.rates, **self.meter.log_line())
        super().log(logs, *args, **kwargs)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """See `Trainer.get_train_dataloader`; of a resumed stream, what the loop will skip is not even made."""
        collator, dataset = self.data_collator, self.train_dataset
        if self.planned is not None:
            self.train_dataset = self.planned
        if self._skip_batches and hasattr(collator, "skip_batches"):
            # Another collator, because the evaluation's batches are all wanted.
            self.data_collator = copy.copy(collator)
            self.data_collator.skip_batches = self._skip_batches
        try:
            return self.stop.shield(super().get_train_dataloader())
        finally:
            self.data_collator, self.train_dataset = collator, dataset

    def get_eval_dataloader(self, *args, **kwargs) -> torch.utils.data.DataLoader:
        """See `Trainer.get_eval_dataloader`."""
        return self.stop.shield(super().get_eval_dataloader(*args, **kwargs))

    def num_examples(self, dataloader: torch.utils.data.DataLoader) -> int:
        """See `Trainer.num_examples`; of planned batches the conversations."""
        if isinstance(dataset := getattr(dataloader, "dataset", None), PlannedBatches):
            return dataset.conversations
        return super().num_examples(dataloader)

    def get_total_train_batch_size(self, args) -> int:
        """See `Trainer.get_total_train_batch_size`; of planned batches the mean."""
        batches = super().get_total_train_batch_size(args)
        if isinstance(self.planned, PlannedBatches):
            return round(batches * self.planned.conversations / max(1, len(self.planned)))
        return batches

    def conversations_a_step(self) -> str:
        """How many conversations an optimiser step learns from, for a reader."""
        args = self.args
        a_step = f"{args.gradient_accumulation_steps} x {number_of(args.world_size, 'process', 'processes')}"
        if self.planned is None:
            number = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
            return f"{number_of(number, 'conversation')} a step ({args.per_device_train_batch_size} x {a_step})"
        known, budget = self.planned.conversations is not None, self.planned.budget
        mean = f"about {number_of(self.get_total_train_batch_size(args), 'conversation')} " if known else ""
        images = "" if budget.images is None else f" and {number_of(budget.images, 'image')}"
        return f"{mean}a step (up to {number_of(budget.tokens, 'position')}{images} x {a_step})"

    def _batches_to_skip(self):
        """How many batches the stock loop will throw away before it goes on with a stream."""
        stream = isinstance(self.train_dataset, torch.utils.data.IterableDataset)
        if not stream or hasattr(self.train_dataset, "__len__") or self.args.ignore_data_skip:
            return 0
        # A stream without a length is one epoch of `max_steps`.
        return self._resumed_at % self.args.max_steps * self.args.gradient_accumulation_steps

    def _add_evaluated(self, texts, keep, costs):
        # A sum and a count for each row that was asked for, whether it came into the batch or was dropped: so those
        # repeated to fill the last batch are not counted twice, and all processes have as many.
        sums = torch.zeros(self.args.eval_batch_size, 2, device=costs.device)
        rows, costs = texts[keep].clamp(max=len(sums) - 1), costs[keep].float()
        sums.index_add_(0, rows, torch.stack([costs, torch.ones_like(costs)], dim=1))
        if self.args.world_size > 1:
            sums = self.accelerator.gather_for_metrics(sums)
        self._evaluated += sums.cpu().double().sum(0)

    def _get_train_sampler(self, train_dataset=None):
        # The stock sampler would read every item, images too, to find out how long it is.
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, PlannedBatches):
            return torch.utils.data.SequentialSampler(dataset)  # the plan is an order
        strategy, batch = self.args.train_sampling_strategy, self.args.train_batch_size
        if strategy == "group_by_length" and hasattr(dataset, "lengths"):
            return LengthGroupedOrder(dataset, batch * self.args.gradient_accumulation_steps, order_seed(self.args))
        if strategy == "random" and getattr(self.data_collator, "share_prefix", False) and hasattr(dataset, "groups"):
            return GroupedOrder(dataset, batch, order_seed(self.args))
        return super()._get_train_sampler(train_dataset)

    def _determine_best_metric(self, metrics, trial):
        # The stock method ends the run where there is no such metric, and an evaluation of nothing has none.
        if (name := self.args.metric_for_best_model) and f"eval_{name.removeprefix('eval_')}" not in metrics:
            return False
        return super()._determine_best_metric(metrics, trial)

    def _get_grad_norm(self, model, grad_norm=None):
        # The one place where a step's gradient norm is at hand before the optimiser moves; no callback is given it.
        norm = super()._get_grad_norm(model, grad_norm)
        if hasattr(norm, "full_tensor"):  # of weights that are cut over processes, of which each has its part
            norm = norm.full_tensor()
        self.guard.check(norm)
        return norm

    def _load_rng_state(self, checkpoint):
        # The one place of a resumed run that has the random numbers of where the run before it was.
        super()._load_rng_state(checkpoint)
        self._evaluate_late()

    def _evaluate_late(self):
        if not self._is_late:
            return
        self._is_late = False
        is_best = self._determine_best_metric(self._evaluate(None, None), None)
        if is_best:
            self.state.best_model_checkpoint = self.best.find(self.run_folder, self.state)
        if is_best and self.args.save_strategy == SaveStrategy.BEST:
            self._save_checkpoint(self.model, None)


class _Finished(Exception):
    """The run has come to its end before."""


_OWN_GROUPS = {"params", "model", "optimizer_dict"}
"""Settings by which some optimizers of `Trainer.get_optimizer_cls_and_kwargs` are given what they optimise."""


def _rows_of_texts(targets, segments, account) -> torch.Tensor:
    """For each position of a batch, `(batch, tokens)`, the number of the row that its text was made of; -1 of none."""
    if segments is None:
        texts = torch.arange(len(targets)).unsqueeze(1).expand_as(targets)
    else:
        starts, ends, _, of = torch.tensor(segments).unbind(1)
        texts = of.repeat_interleave(ends - starts).unsqueeze(0)
    if account is None:
        return texts
    rows = [row for record, row in zip(account.records, account.rows) if record.dropped is None]
    return torch.tensor([*rows, -1])[texts.clamp(max=len(rows))]


def _logged_loss(log_history) -> float:
    """The mean of the losses in a log, each of the steps since the one before."""
    logged = [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry]
    steps = [step - before for (step, _), (before, _) in zip(logged, [(0, 0.0), *logged])]
    return sum(n * loss for n, (_, loss) in zip(steps, logged)) / sum(steps) if logged else float("nan")
