"""The Trainer, with what it cannot express for this model: nothing computed in vain, and a loss that weighs tokens.

Four things differ from the stock Trainer. The head is computed at supervised positions only: the same loss and
gradients, without the logits of a thousand image positions. The evaluation loss is the mean over tokens, where the
stock loop averages the means of batches, which makes it depend on the batch size. Label smoothing shifts the labels,
which the stock one does only for the classes that it knows by name. A checkpoint is read as any saved folder is.
"""

import functools

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput


class VLMTrainer(Trainer):
    """`Trainer` for a composed model; takes the same arguments."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.card = None  # what writes the model card, once there is something to say
        self._only_loss = False
        self._evaluated = None
        if self.label_smoother is not None and self.compute_loss_func is None:
            self.compute_loss_func = functools.partial(smoothed_loss, epsilon=self.label_smoother.epsilon)
        self.add_callback(_EpochOfDataset())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """See `Trainer.compute_loss`; logits are left out where nobody reads them."""
        labels = inputs.get("labels")
        if labels is not None and self.compute_loss_func is None and (model.training or self._only_loss):
            inputs = {**inputs, "logits_to_keep": supervised_positions(labels)}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if labels is not None and not model.training and self._evaluated is not None:
            self._add_evaluated(labels, outputs["logits"])
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

    def _add_evaluated(self, labels, logits):
        keep = supervised_positions(labels)
        if logits.ndim == 3:
            logits = logits[keep]
        targets = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        losses = nn.functional.cross_entropy(logits.float(), targets[keep], reduction="none")
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
