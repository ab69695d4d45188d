"""A launch that gave less than it was asked for is refused; what is written for launchers is read as it is meant."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from accelerate.commands.launch import launch_command_parser

from training_vlm import machines
from training_vlm.settings import RECIPES, parse_arguments
from training_vlm.stages import SFT
from training_vlm.training_arguments import VLMTrainingArguments


ROOT = Path(__file__).parents[1]
LAUNCHES = sorted((RECIPES / "accelerate").glob("*.yaml"))


# -- what a launch gave -----------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(tmp_path):
    """Those of a run in this process, on its CPU; `arguments(fsdp=True)` asks for more."""
    return lambda **changes: VLMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], **changes)


@pytest.fixture
def started_by(monkeypatch):
    """`started_by(*command)`: the process whose child this one would be."""

    def start(*command):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        parent = psutil.Process()
        monkeypatch.setattr(parent, "cmdline", lambda: list(command), raising=False)
        shell = psutil.Process()
        monkeypatch.setattr(shell, "cmdline", lambda: ["bash", "run.sh"], raising=False)
        monkeypatch.setattr(psutil.Process, "parents", lambda self: [shell, parent])

    return start


def test_a_run_without_a_launcher_is_let_in(arguments, monkeypatch):
    for name in (*machines.COUNTS, *machines.SHARDING.values(), "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    assert machines.check_launch(arguments()) is None


@pytest.mark.parametrize("name", machines.COUNTS)
def test_processes_that_do_not_know_of_each_other_are_refused(arguments, monkeypatch, name):
    args = arguments()
    monkeypatch.setenv(name, "4")
    with pytest.raises(
        ValueError, match="was asked for 4 processes, and this one knows of no other: .*torchrun"
    ) as said:
        machines.check_launch(args)
    assert machines.COUNTS[name] in str(said.value)
    monkeypatch.setenv(name, "1")
    assert machines.check_launch(args) is None


PARENTS = [
    ["python", "/usr/bin/accelerate", "launch"],
    ["/usr/bin/accelerate-launch"],
    ["python", "-m", "accelerate.commands.launch"],
    ["python", "-u", "-m", "accelerate.commands.accelerate_cli", "launch"],
]


@pytest.mark.parametrize("parent", PARENTS, ids=lambda parent: parent[-1])
def test_accelerate_launch_that_started_fewer_processes_than_it_was_asked_for_is_refused(
    arguments, started_by, parent, tmp_path
):
    args = arguments()
    started_by(*parent, "--cpu", "--num_processes", "2", "train_sft.py", "--num_processes", "9")
    with pytest.raises(ValueError, match="accelerate launch was asked for 2 processes, and this one knows of no other"):
        machines.check_launch(args)
    (tmp_path / "two.yaml").write_text("distributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 3\n")
    started_by(*parent, f"--config_file={tmp_path / 'two.yaml'}", "-m", "train_sft")
    with pytest.raises(ValueError, match="accelerate launch was asked for 3 processes"):
        machines.check_launch(args)
    started_by(*parent, "--cpu", "--num-processes", "1", "train_sft.py")
    assert machines.check_launch(args) is None


def test_weights_that_would_not_be_cut_over_processes_are_refused(arguments, started_by, monkeypatch):
    expected = "was asked for, and accelerate cuts weights over accelerators alone, of which there is none here"
    args, with_option = arguments(), arguments(fsdp=True)
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    with pytest.raises(ValueError, match=f"FSDP {expected}"):
        machines.check_launch(with_option)
    for file, kind in (("fsdp2", "FSDP"), ("zero3", "DeepSpeed")):
        started_by("accelerate", "launch", "--config_file", str(RECIPES / "accelerate" / f"{file}.yaml"), "--cpu",
                   "--num_processes", "1", "train_sft.py")  # fmt: skip
        with pytest.raises(ValueError, match=f"{kind} {expected}"):
            machines.check_launch(args)
    started_by("accelerate", "launch", "--cpu", "--num_processes", "1", "train_sft.py")
    for kind, name in machines.SHARDING.items():
        with monkeypatch.context() as patch:
            patch.setenv(name, "true")
            with pytest.raises(ValueError, match=f"{kind} {expected}"):
                machines.check_launch(args)


def test_accelerate_itself_starts_one_process_on_a_cpu_and_the_script_says_so(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(ROOT / "train_sft.py"), "--output_dir", "out", "--model", "none"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode != 0
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "accelerate launch was asked for 2 processes, and this one knows of no other" in line
    assert "torchrun --nproc_per_node 2" in line


# -- how many machines ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", LAUNCHES, ids=lambda file: file.stem)
def test_accelerate_reads_what_is_written_for_it_as_it_is_meant(file, monkeypatch):
    """Through its own parser, its own config classes and its own environment of a launch."""
    from accelerate.commands.launch import _validate_launch_command
    from accelerate.utils import (
        DeepSpeedPlugin,
        FullyShardedDataParallelPlugin,
        prepare_deepspeed_cmd_env,
        prepare_multi_gpu_env,
    )

    nodes = 2 if "two_machines" in file.stem else 1
    kind = {"f": "FSDP", "z": "DeepSpeed"}.get(file.stem[0])
    told = launch_command_parser().parse_args(
        ["--config_file", str(file), "--main_process_port", "0", "train_sft.py", "--model", "aligned"]
    )
    assert machines.read_launch(told) == (8 * nodes, "accelerate launch", kind)
    told, config, _ = _validate_launch_command(told)
    assert (told.num_machines, told.training_script_args) == (nodes, ["--model", "aligned"])
    if kind == "DeepSpeed":
        told.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)
        command, environment = prepare_deepspeed_cmd_env(told)
        assert command is None  # torchrun's own, where DeepSpeed's would want SSH
    else:
        environment = prepare_multi_gpu_env(told)
    assert told.nproc_per_node == "8" and int(getattr(told, "nnodes", 1)) == nodes
    for name, value in environment.items():
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.setenv(name, value)
    assert [name for name, at in machines.SHARDING.items() if os.environ.get(at) == "true"] == ([kind] if kind else [])
    if kind == "FSDP":
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.auto_wrap_policy is not None and plugin.reshard_after_forward
        assert plugin.transformer_cls_names_to_wrap is None and not plugin.cpu_ram_efficient_loading
        assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    if kind == "DeepSpeed":
        cut = DeepSpeedPlugin().deepspeed_config
        assert cut["gradient_accumulation_steps"] == cut["gradient_clipping"] == "auto"
        assert cut["zero_optimization"]["stage"] == int(file.stem[4])
        assert cut["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] == (file.stem[4] == "3")


def test_each_of_them_is_named_with_its_command_and_no_other_is():
    names = {file.name for file in LAUNCHES}
    for page in ("README.md", "docs/machines.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert set(re.findall(r"accelerate/([a-z0-9_]+\.yaml)", text)) == names, page
    said = (ROOT / "docs" / "machines.md").read_text(encoding="utf-8")
    for file in LAUNCHES:
        own = file.read_text(encoding="utf-8")
        assert f"--config_file recipes/accelerate/{file.name}" in own
        assert f"--config_file recipes/accelerate/{file.name}" in said
        assert ("not run" in own) == file.name.startswith("zero")


def test_the_options_that_are_documented_are_read():
    """A bare `--fsdp`, which is neither true nor false to the library's parser."""
    said = (ROOT / "docs" / "machines.md").read_text(encoding="utf-8")
    found = re.findall(r"train_sft\.py (--[^`]*) \.\.\.", said)
    assert found
    for options in found:
        argv = [*shlex.split(options), "--model", "aligned", "--output_dir", "out", "--use_cpu"]
        training_args = parse_arguments(SFT, argv).training
        assert training_args.fsdp is True and training_args.fsdp_plugin_args["fsdp_version"] == 2
