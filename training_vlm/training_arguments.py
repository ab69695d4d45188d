"""What can be set about a training: `TrainingArguments`, with defaults that fit images and follow the hardware.

What the libraries would refuse when the data are read or the steps are done is refused here, and so is what nothing
would read.
"""

import json
import os
import sys
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations

from processing.data_error_vlm import DuetError, in_a_line


@dataclass
class VLMTrainingArguments(TrainingArguments):
    """`TrainingArguments`, with defaults that fit images and follow the hardware."""

    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Train into an output folder that holds something already; its checkpoints are removed when there "
            "is a new one."
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "auto: go on from the newest whole checkpoint of output_dir, and start where there is none; last: "
            "the same, refused where there is none; or a checkpoint's folder."
        },
    )
    card_samples: bool | None = field(
        default=None,
        metadata={
            "help": "Show samples of the data, their pictures and texts, in the model card, and push them with it. If "
            "not given, those of the built-in data set alone."
        },
    )
    is_restart: bool = field(default=False, init=False)  # whether --resume_from_checkpoint says auto
    # The collator reads columns that the model does not take.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: the collator reads images."})
    # None until the hardware has been asked.
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Autocast to bfloat16; on where the hardware has it, unless fp16 is chosen."}
    )
    dataloader_num_workers: int | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Processes that decode images; from the number of cores if not given."}
    )
    dataloader_pin_memory: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Pinned memory; on where there is an accelerator to copy to."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every that many steps, or that share of them."})

    def __post_init__(self):
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()  # said aloud: autocast there wants to know
        accelerator = not self.use_cpu
        if self.bf16 is None:
            self.bf16 = not self.fp16 and (torch.cuda.is_bf16_supported() if accelerator else _cpu_has_bf16())
        if self.dataloader_pin_memory is None:
            self.dataloader_pin_memory = accelerator
        if self.dataloader_num_workers is None:
            # Without an accelerator the model itself wants the cores.
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            self.dataloader_num_workers = min(8, cores // processes) if accelerator else min(2, cores // processes // 2)
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # whatever learns has a gradient, of 0 where nothing reaches it
        self._refuse_what_cannot_be()
        try:
            super().__post_init__()
        except PackageNotFoundError as error:  # which deepspeed's is, with a message about metadata
            package = "deepspeed" if self.deepspeed else str(error.name)
            raise DuetError(
                f"an option needs the package {package}, which is not installed here; install it (`pip install "
                f"{package}`), or leave that option out."
            ) from error
        except (ValueError, ImportError, RuntimeError, OSError, TypeError) as error:
            raise DuetError(f"a training option is refused by transformers: {in_a_line(error, 400)}") from error
        # `pixel_values` runs over images, not conversations, so batches are made whole in every process.
        for name in ("dispatch_batches", "split_batches"):
            if getattr(self.accelerator_config, name):
                raise DuetError(f"accelerator_config has {name}: a batch with several images a row is not cut by row.")
        self.accelerator_config.dispatch_batches = False
        self._refuse_what_the_trainer_would()

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """See `TrainingArguments.get_warmup_steps`; less than a step is none, which would be a step of rate 0."""
        if self.warmup_steps * num_training_steps < 1:
            return 0
        return super().get_warmup_steps(num_training_steps)

    def _refuse_what_cannot_be(self):
        defaults = {f.name: f.default for f in fields(TrainingArguments)}
        for name, value in ((name, getattr(self, name)) for name in defaults):
            if isinstance(value, str) and value.startswith("{"):
                try:
                    json.loads(value)
                except ValueError as error:
                    raise DuetError(f"{name}={value!r} is no JSON: {error}.") from error
        for name, why in _WITHOUT_EFFECT.items():
            if name in defaults and getattr(self, name) not in (defaults[name], None, [], False):
                raise DuetError(f"{name} would do nothing: {why}; leave it out.")
        for name, (least, most) in _BOUNDS.items():
            if (value := getattr(self, name)) is not None and not least <= value <= most:
                upto = "or more" if most == sys.float_info.max else f"to {most:g}"
                raise DuetError(f"{name}={value}: expected {least:g} {upto}.")
        if self.dataloader_persistent_workers and not self.dataloader_num_workers:
            raise DuetError("dataloader_persistent_workers keeps workers, and dataloader_num_workers is 0; raise that.")
        if self.remove_unused_columns:
            raise DuetError("remove_unused_columns must stay false: the collator reads images and text from the data.")

    def _refuse_what_the_trainer_would(self):
        """Packages and the schedule, which the Trainer would look at when the data are read and the model is loaded."""
        known = get_available_reporting_integrations()
        some = torch.optim.SGD([torch.zeros(1)], lr=self.learning_rate)  # which some schedules compare theirs with
        steps = {"num_warmup_steps": 0, "num_training_steps": 10}
        try:
            get_scheduler(self.lr_scheduler_type, some, **steps, scheduler_specific_kwargs=self.lr_scheduler_kwargs)
        except (ValueError, TypeError) as error:
            settings = (
                f"lr_scheduler_type={self.lr_scheduler_type.value}, lr_scheduler_kwargs={self.lr_scheduler_kwargs}"
            )
            raise DuetError(f"{settings}: {in_a_line(error, 400)}") from error
        for name in self.report_to:
            if name not in known:
                raise DuetError(
                    f"report_to names {name}, whose package is not installed here; install it (`pip install {name}`), "
                    f"or choose {' or '.join([*known, 'none'])}."
                )
        try:
            Trainer.get_optimizer_cls_and_kwargs(self)
        except (ImportError, ValueError) as error:  # others need the model, which is not there yet
            if isinstance(error, ImportError) or "install" in str(error):
                raise DuetError(f"optim={self.optim.value}: {in_a_line(error, 400)}") from error


_BOUNDS = {
    "per_device_train_batch_size": (1, sys.float_info.max),
    "per_device_eval_batch_size": (1, sys.float_info.max),
    "gradient_accumulation_steps": (1, sys.float_info.max),
    "dataloader_num_workers": (0, sys.float_info.max),
    "learning_rate": (0, sys.float_info.max),
    "weight_decay": (0, sys.float_info.max),
    "max_grad_norm": (0, sys.float_info.max),
    "label_smoothing_factor": (0, 1),
}
"""Numbers that the libraries would refuse, or read as something else, when the data are read or the steps are done."""

_WITHOUT_EFFECT = {
    "use_liger_kernel": "its kernels are chosen by the name of a model, and leave a composed one as it is",
    "liger_kernel_config": "its kernels are chosen by the name of a model, and leave a composed one as it is",
    "enable_jit_checkpoint": "SIGTERM and SIGUSR1 have a checkpoint saved anyway, and end the run with 75",
    "do_predict": "questions of --test_split are answered after every training",
    "include_for_metrics": "answers are judged by what --metrics names, which sees the answers alone",
    "batch_eval_metrics": "answers are judged by what --metrics names, which sees the answers alone",
    "label_names": "the labels are those of the answers",
    "length_column_name": "the length of a sample is known from its tokens",
}
"""Options of `TrainingArguments` that nothing reads here, and why."""


def precision_of(args: TrainingArguments) -> str:
    """The numbers that a step is computed in."""
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"


def _cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 itself; torch before 2.12 cannot tell."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


__all__ = ["VLMTrainingArguments", "precision_of"]
