"""What a launch gave, against what was asked of it: so many processes, and weights that are cut over them.

What is special: a launcher that cannot do as it was told says nothing. `accelerate launch --cpu` starts one process for
any number, accelerate shards on accelerators alone, and tasks of Slurm or MPI without a launcher know nothing of each
other. So what was asked is read where it was said, on the launcher's own command line too, and a run that would be
another one does not begin.
"""

import argparse
import contextlib
import os
from pathlib import Path
from typing import NamedTuple

import psutil
from accelerate import DistributedType
from accelerate.commands.config import default_config_file, load_config_from_file

from processing.data_error_vlm import DuetError

from .training_arguments import VLMTrainingArguments


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
    from accelerate.commands.launch import launch_command_parser  # here, because it sets up logging

    for process in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            if (argv := launch_arguments(process.cmdline())) is not None:
                return read_launch(launch_command_parser().parse_args(argv))
    return None


def launch_arguments(command: list[str]) -> list[str] | None:
    """What follows `accelerate launch` in a command line; `None` where it is another."""
    for place, word in enumerate(command[:4]):
        name, rest = Path(word).name, command[place + 1 :]
        if name in ("accelerate", "accelerate.commands.accelerate_cli") and rest[:1] == ["launch"]:
            return rest[1:]
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            return rest
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


__all__ = ["Asked", "asked_of_launch", "check_launch", "launch_arguments", "read_launch"]
