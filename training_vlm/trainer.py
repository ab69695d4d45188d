"""The Trainer, with what it cannot express for this model: nothing computed in vain, and a loss that weighs tokens.

Six things differ from the stock Trainer. The head is computed at supervised positions only: the same loss and
gradients, without the logits of a thousand image positions. The evaluation loss is the mean over tokens, where the
stock loop averages the means of batches, which makes it depend on the batch size. Label smoothing shifts the labels,
which the stock one does only for the classes that it knows by name. A checkpoint is read as any saved folder is. The
accounts of the batches that were trained on are added up, and go on with a resumed run. A run on a stream resumes at
its next sample without decoding those before it.
"""

import functools
import json
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput

from processing.account import Account


class VLMTrainer(Trainer):
    """`Trainer` for a composed model; takes the same arguments."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.card = None  # what writes the model card, once there is something to say
        self.account = Account()  # of this process
        self._only_loss = False
        self._evaluated = None
        if self.label_smoother is not None and self.compute_loss_func is None:
            self.compute_loss_func = functools.partial(smoothed_loss, epsilon=self.label_smoother.epsilon)
        self.add_callback(_EpochOfDataset())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """See `Trainer.compute_loss`; logits are left out where nobody reads them."""
        account = inputs.pop("account", None)
        if account is not None and model.training:
            self.account.add_batch(account)
        labels, loss_weights = inputs.get("labels"), inputs.get("loss_weights")
        if loss_weights is not None and self.compute_loss_func is not None:
            raise ValueError("weights of messages cannot be combined with label_smoothing_factor or another loss.")
        if labels is not None and self.compute_loss_func is None and (model.training or self._only_loss):
            inputs = {**inputs, "logits_to_keep": supervised_positions(labels)}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if labels is not None and not model.training and self._evaluated is not None:
            self._add_evaluated(labels, outputs["logits"], loss_weights)
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
        return output

    def gathered_account(self) -> Account:
        """The account of every batch that was trained on, of all processes; every process has to ask."""
        account = Account()
        for state in gather_object([self.account.state()]):
            account.merge(Account.from_state(state))
        return account

    def train(self, resume_from_checkpoint=None, **kwargs):
        """See `Trainer.train`."""
        if resume_from_checkpoint and isinstance(self.train_dataset, torch.utils.data.IterableDataset):
            # The stock loop would make every batch again to throw it away.
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint, "trainer_state.json")))
            self.data_collator.skip_batches = state.global_step * self.args.gradient_accumulation_steps
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _save_rng_state(self, output_dir):
        # What each process has to find again when it resumes lies beside its random states.
        super()._save_rng_state(output_dir)
        self._account_file(output_dir).write_text(json.dumps(self.account.state()), encoding="utf-8")

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and (file := self._account_file(checkpoint)).is_file():
            self.account = Account.from_state(json.loads(file.read_text(encoding="utf-8")))

    def _account_file(self, checkpoint):
        return Path(checkpoint, f"data_account_{self.args.process_index}.json")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        # A saved file has the Hub's names of the weights (of a ViT, for one), which only `from_pretrained` translates;
        # the stock method would leave such weights as they are (https://github.com/huggingface/transformers/issues/43701).
        model = self.model if model is None else model
        if not isinstance(model, PreTrainedModel) or self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        model.load_state_dict(type(model).from_pretrained(resume_from_checkpoint).state_dict())

    def _load_best_model(self):
        if not isinstance(self.model, PreTrainedModel) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_best_model()
        self._load_from_checkpoint(self.state.best_model_checkpoint)

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
        return LengthGroupedSampler(batch, lengths=dataset.lengths)

    def _add_evaluated(self, labels, logits, loss_weights):
        keep = supervised_positions(labels)
        if logits.ndim == 3:
            logits = logits[keep]
        targets = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        losses = nn.functional.cross_entropy(logits.float(), targets[keep], reduction="none")
        if loss_weights is not None:
            losses = losses * nn.functional.pad(loss_weights, (0, 1))[:, 1:][keep]
        # A sum and a count for each row, so that rows repeated to fill the last batch are not counted twice.
        sums = torch.zeros(len(labels), 2, device=logits.device)
        sums[:, 0].index_add_(0, keep.nonzero()[:, 0], losses)
        sums[:, 1] = keep.sum(1)
        self._evaluated += self.accelerator.gather_for_metrics(sums).cpu().double().sum(0)


def supervised_positions(labels: torch.Tensor) -> torch.Tensor:
    """The positions of `(batch, tokens)` that predict a supervised token, as a bool mask for `logits_to_keep`."""
    return nn.functional.pad(labels, (0, 1), value=-100)[:, 1:] != -100


def smoothed_loss(
    outputs: dict[str, torch.Tensor],
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | None = None,
    *,
    epsilon: float,
) -> torch.Tensor:
    """The token-weighted loss with label smoothing (https://arxiv.org/abs/1512.00567), as a `compute_loss_func`."""
    targets = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    total = nn.functional.cross_entropy(
        outputs["logits"].float().flatten(0, 1), targets.flatten(), reduction="sum", label_smoothing=epsilon
    )
    count = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)


class _EpochOfDataset(TrainerCallback):
    """Tells a data set that shows other captions in each epoch which epoch it is, in every process."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        dataset = getattr(train_dataloader, "dataset", None)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(int(state.epoch or 0))
