"""Which savings a run makes, and what it does not make of them and why: in one line each.

What is special: nothing here changes a loss or a gradient. The model proves that it can go without padding; the data
say whether texts share a prefix, and whether a step of such texts still sees images enough.
"""

from typing import NamedTuple

import torch
from accelerate.utils import gather_object

from processing.batching.packing import Text
from processing.data_error_vlm import DuetError

from ..efficiency import LEAST_IMAGES, EfficiencyArguments
from ..survey import SURVEYED, some_items
from .batches import Budget, PlannedBatches, PlannedStream
from .probe import why_not_packed
from .sampling import order_seed
from .trainer import VLMTrainer


class Savings(NamedTuple):
    """What was decided."""

    padding_free: bool
    share_prefix: bool
    why_not: tuple[str, ...]

    def report(self) -> str:
        """In lines, for a terminal."""
        made = ["no padding" if self.padding_free else "batches padded"]
        made += ["what texts of an image begin with run once"] * self.share_prefix
        return "\n".join([f"{', '.join(made)}, each image of a batch encoded once", *self.why_not])


def choose_savings(asked: EfficiencyArguments, trainer: VLMTrainer) -> Savings:
    """
    What the model and the data of a run let it leave out; every process has to ask.

    Raises:
        DuetError: something was asked for by name, and cannot be.
    """
    why_padded = None if asked.padding_free == "off" else _why_padded(trainer)
    if why_padded and "on" in (asked.padding_free, asked.share_prefix):
        name = "padding_free" if asked.padding_free == "on" else "share_prefix"
        raise DuetError(f"{name}=on: {why_padded}; leave it out, and batches are padded.")
    if why_padded or asked.padding_free == "off":
        return Savings(False, False, (f"padded because {why_padded}",) if why_padded else ())
    why_apart = None if asked.share_prefix != "auto" else _why_apart(asked, trainer)
    share = asked.share_prefix == "on" or (asked.share_prefix == "auto" and why_apart is None)
    return Savings(True, share, (why_apart,) if why_apart else ())


def _why_padded(trainer):
    """In a clause, why batches cannot go without padding; the same in every process."""
    reasons = gather_object([_why_padded_here(trainer)])
    return next((reason for reason in reasons if reason), None)


def _why_padded_here(trainer):
    if trainer.args.torch_compile:
        return "torch_compile would compile anew for every batch"
    return why_not_packed(trainer.accelerator.unwrap_model(trainer.model))


def _why_apart(asked, trainer):
    """In a line, why prefixes are not shared although they could be."""
    dataset, args = trainer.train_dataset, trainer.args
    if args.train_sampling_strategy not in ("random", "sequential"):
        return f"prefixes are not shared: train_sampling_strategy={args.train_sampling_strategy} orders by something else"
    texts, rows = _texts_and_rows(dataset)
    if texts == rows:
        return "prefixes are not shared: each row has one text"
    a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if asked.max_tokens_per_batch is not None:
        ...
    images = a_step * rows / texts
    if images < LEAST_IMAGES:
        return (
            f"prefixes are not shared: with {texts / rows:.1f} texts a row, a step of {a_step} would hold {images:.0f} "
            f"images, fewer than {LEAST_IMAGES}; --share_prefix on does it all the same"
        )
    return None
