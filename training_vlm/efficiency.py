"""What a run may leave out because it cannot change the result: the settings of every saving.

What is special: a saving that is left to itself (`auto`) is made where it changes nothing and is worth it, which the
model at hand and the data say (see `learning/savings.py`); what was asked for by name is made or refused.
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import TrainingArguments

from processing.data_error_vlm import DuetError

from .arguments import DataArguments
from .training_arguments import VLMTrainingArguments


FROZEN_DTYPES = ("auto", "bfloat16", "float16")
CHOICES = ("auto", "on", "off")
LEAST_IMAGES = 8
"""Images of an optimiser step below which texts of one image would make steps too much alike."""
AMPLE_IMAGES = 32
"""Images of an optimiser step from which it teaches about as much as one with an image a text (docs/speed.md)."""


@dataclass
class EfficiencyArguments:
    """What is saved of a step's work; losses and gradients stay what they are."""

    padding_free: str = field(
        default="auto",
        metadata={
            "help": "Put the conversations of a batch into one row, without padding, each seeing only itself: auto, "
            "where the model proves that it can; on, which refuses one that cannot; or off."
        },
    )
    share_prefix: str = field(
        default="auto",
        metadata={
            "help": "Run once what several texts of an image begin with, and learn them in one batch: auto, where rows "
            f"have several and a step holds {LEAST_IMAGES} images or more; on, or off."
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Positions of a batch, in one process, in place of a number of conversations; padding counts, and "
            "a shared prefix once."
        },
    )
    max_images_per_batch: int | None = field(
        default=None, metadata={"help": "With max_tokens_per_batch: different images of a batch, too."}
    )

    cache_vision_features: Path | None = field(
        default=None,
        metadata={
            "help": "Folder of caches of a frozen vision encoder's features: computed once, before the first step, and "
            "read in place of the images in every epoch and every run."
        },
    )
    frozen_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Hold the frozen weights that autocast casts anyway (of linear layers and convolutions) in its "
            "type: bfloat16 (with --bf16), float16 (with --fp16), or auto, whichever it is. What is saved stays as it "
            "was."
        },
    )

    def __post_init__(self):
        for name in ("padding_free", "share_prefix"):
            value = getattr(self, name)
            if isinstance(value, bool):  # what yaml makes of a bare on or off
                setattr(self, name, "on" if value else "off")
            elif value not in CHOICES:
                raise DuetError(f"{name}={value!r}: expected one of {', '.join(CHOICES)}.")
        for name in ("max_tokens_per_batch", "max_images_per_batch"):
            if (limit := getattr(self, name)) is not None and limit < 1:
                raise DuetError(f"{name}={limit}: expected 1 or more.")
        if self.max_images_per_batch is not None and self.max_tokens_per_batch is None:
            raise DuetError("max_images_per_batch limits what max_tokens_per_batch plans; add --max_tokens_per_batch.")
        if self.frozen_dtype not in (None, *FROZEN_DTYPES):
            raise DuetError(f"frozen_dtype={self.frozen_dtype!r}: expected one of {', '.join(FROZEN_DTYPES)}.")
        if self.share_prefix == "on" and self.padding_free == "off":
            raise DuetError("share_prefix=on: texts share a prefix in one row; leave out --padding_free off.")

    def settle(self, data_args: DataArguments, training_args: VLMTrainingArguments) -> None:
        """
        Make these settings and the others agree.

        Raises:
            DuetError: they exclude each other.
        """
        strategy = training_args.train_sampling_strategy
        if self.share_prefix == "on" and strategy not in ("random", "sequential"):
            raise DuetError(f"share_prefix=on and train_sampling_strategy={strategy} each want an order of their own.")
        if self.max_tokens_per_batch is None:
            return
        if strategy != "random":
            raise DuetError(
                f"max_tokens_per_batch plans the batches itself; leave out --train_sampling_strategy {strategy}."
            )
        if data_args.encode_ahead is False:
            raise DuetError(
                "max_tokens_per_batch plans from lengths, which encoding ahead tells; leave out --encode_ahead false."
            )
        if training_args.auto_find_batch_size:
            raise DuetError(
                "auto_find_batch_size halves a number of conversations, and max_tokens_per_batch takes its place; "
                "lower that, and leave out --auto_find_batch_size."
            )
        if not data_args.streaming:
            data_args.encode_ahead = True
        number, default = training_args.per_device_train_batch_size, TrainingArguments.per_device_train_batch_size
        if number != default and training_args.process_index == 0:
            print(f"max_tokens_per_batch takes the place of per_device_train_batch_size={number}")
        training_args.per_device_train_batch_size = 1  # a planned batch is one item of the loader
