"""What a launch gave, against what was asked of it: so many processes, and weights that are cut over them.

What is special: a launcher that cannot do as it was told says nothing. `accelerate launch --cpu` starts one process for
any number, accelerate shards on accelerators alone, and tasks of Slurm or MPI without a launcher know nothing of each
other. So what was asked is read where it was said, on the launcher's own command line too, and a run that would be
another one does not begin. Weights are cut at the blocks of the backbones, which are found from their modules.
"""

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
from accelerate import DistributedType
from accelerate.commands.config import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from modeling_vlm import VLMForConditionalGeneration
from processing.batching.account import number_of
from processing.data_error_vlm import DuetError

from .arguments import VLMTrainingArguments
from .learning.tuning import find_blocks


if TYPE_CHECKING:
    from .learning.trainer import VLMTrainer

COUNTS = {
    "WORLD_SIZE": "the environment (WORLD_SIZE)",
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
}
"""Where the number of processes of a run is said, and by whom."""

SHARDING = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}
"""What cuts weights over processes, and where `accelerate launch` says that it was asked for."""


class Asked(NamedTuple):
    """What a launch was asked for: processes and who was told so, and what is to cut the weights, if anything."""

    processes: int
    of: str
    sharding: str | None


def check_launch(args: VLMTrainingArguments) -> None:
    """
    Refuse a launch that gave less than it was asked for.

    Raises:
        DuetError: fewer processes, or weights that will not be cut over them.
    """
    asked, given = asked_of_launch(args), args.world_size
    if asked.processes > given:
        raise DuetError(
            f"{asked.of} was asked for {asked.processes} processes, and this one knows of "
            f"{'no other' if given == 1 else given}: a step would learn from fewer conversations; start them with "
            f"`torchrun --nproc_per_node {asked.processes}` (several machines: docs/machines.md), or ask for {given}."
        )
    if asked.sharding is None:
        return
    if args.device.type == "cpu":
        raise DuetError(
            f"{asked.sharding} was asked for, and accelerate cuts weights over accelerators alone, of which there is "
            "none here: every process would hold the whole model; leave it out."
        )
    if args.distributed_state.distributed_type == DistributedType.NO:
        raise DuetError(
            f"{asked.sharding} was asked for, and this process was not started by a launcher: it would hold the whole "
            "model; start it with `accelerate launch` or `torchrun` (docs/machines.md), or leave it out."
        )


def asked_of_launch(args: VLMTrainingArguments) -> Asked:
    """What the environment, the options and the command line of `accelerate launch` ask for."""
    processes, of = 1, ""
    for name, who in COUNTS.items():
        if (value := os.environ.get(name, "")).isdigit() and int(value) > processes:
            processes, of = int(value), who
    named = {"FSDP": args.fsdp, "DeepSpeed": args.deepspeed}
    sharding = [name for name, at in SHARDING.items() if named[name] or os.environ.get(at, "").lower() == "true"]
    if (launched := _of_accelerate()) is not None:
        if launched.processes > processes:
            processes, of = launched.processes, launched.of
        sharding += [launched.sharding] if launched.sharding else []
    return Asked(processes, of, sharding[0] if sharding else None)


def _of_accelerate() -> Asked | None:
    """What the `accelerate launch` was told that started this process, where one did."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:  # it sets this in any case
        return None
    for process in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            if (argv := launch_arguments(process.cmdline())) is not None:
                return read_launch(launch_command_parser().parse_args(argv))
    return None


def launch_arguments(command: list[str]) -> list[str] | None:
    """What follows `accelerate launch` in a command line; `None` where it is another."""
    for place, word in enumerate(command[:4]):
        name = Path(word).name
        if name in ("accelerate", "accelerate.commands.accelerate_cli") and command[place + 1 : place + 2] == ["launch"]:
            return command[place + 2 :]
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            return command[place + 1 :]
    return None


def read_launch(told: argparse.Namespace) -> Asked:
    """What its arguments ask of `accelerate launch`, with those of its config file, which it reads as it does."""
    processes, kind = told.num_processes, None
    if told.config_file is not None or (Path(default_config_file).is_file() and not told.cpu):
        config = load_config_from_file(told.config_file)
        processes = getattr(config, "num_processes", 1) if processes is None else processes
        kind = config.distributed_type
    sharding = None
    if told.use_fsdp or kind == DistributedType.FSDP:
        sharding = "FSDP"
    elif told.use_deepspeed or kind == DistributedType.DEEPSPEED:
        sharding = "DeepSpeed"
    return Asked(processes or 1, "accelerate launch", sharding)


def cut_at_blocks(trainer: "VLMTrainer") -> None:
    """
    Have FSDP cut the weights at the blocks of the backbones, and see that it does; nothing where it is not asked for.

    Raises:
        DuetError: version 1 of it.
    """
    if not trainer.is_fsdp_enabled:
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise DuetError(
            "fsdp_version is 1, which the libraries are about to remove; set fsdp_version: 2 in the config file of "
            "accelerate (recipes/accelerate/fsdp2.yaml), or version: 2 in --fsdp_config."
        )
    if plugin.auto_wrap_policy is transformer_auto_wrap_policy and plugin.transformer_cls_names_to_wrap is None:
        # What the backbones themselves name are also parts that a composed model has left out.
        plugin.transformer_cls_names_to_wrap = block_names(composed_of(trainer.model))
    # Nothing is done in place to what the model returns.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    trainer.add_callback(SeesWeightsCut(trainer))


def block_names(model: VLMForConditionalGeneration) -> list[str]:
    """Class names of the blocks of all backbones, found as those are that a policy names."""
    backbones = [*encoders_of(model), model.model.language_model]
    return sorted({type(block).__name__ for backbone in backbones for block in find_blocks(backbone)})


class SeesWeightsCut(TrainerCallback):
    """Stops a run on weights that were to be cut over processes, and are not."""

    def __init__(self, trainer: "VLMTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Look at the weights, now that the libraries have prepared them."""
        assert self.trainer.model is not None
        if not any(hasattr(parameter, "placements") for parameter in self.trainer.model.parameters()):
            raise DuetError("FSDP was asked for, and no weight is cut over the processes; leave it out.")


@contextlib.contextmanager
def saved_whole(trainer: "VLMTrainer") -> Iterator[None]:
    """Within, the model is saved whole, whatever FSDP was told of the states that a run goes on from."""
    plugin: Any = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    kept = None if plugin is None else plugin.state_dict_type
    if kept is not None:
        plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        yield
    finally:
        if kept is not None:
            plugin.set_state_dict_type(kept.name)
