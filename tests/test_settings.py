"""Settings that cannot be are one line, before anything is read; what is set is what is used."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import yaml
from transformers import TrainingArguments

from processing import DuetError
from training_vlm.run import prepare
from training_vlm.settings import RECIPES, parse_arguments
from training_vlm.stages import PRETRAIN, SFT
from training_vlm.training_arguments import VLMTrainingArguments


ROOT = Path(__file__).parents[1]


def refusal(*argv: str) -> str:
    """The one line that these settings are refused with."""
    with pytest.raises(DuetError) as error:
        parse_arguments(PRETRAIN, ["--dataset", "shapes", "--output_dir", "out", "--use_cpu", *argv])
    line = str(error.value)
    assert "\n" not in line and len(line) < 1200
    return line


VALUES = {
    "--learning_rate": ("abc", "invalid float value: 'abc'"),
    "--max_steps": ("1.5", "invalid int value: '1.5'"),
    "--bf16": ("maybe", "got maybe"),
    "--optim": ("adamm", "invalid choice: 'adamm'"),
    "--lr_scheduler_type": ("sine", "invalid choice: 'sine'"),
    "--lr_scheduler_kwargs": ("{bad", "is no JSON"),
    "--logging_steps": ("1.5", "must be an integer"),
    "--max_samples": ("many", "invalid int value: 'many'"),
    "--max_eval_samples": ("0", "expected 1 or more"),
    "--max_test_samples": ("-1", "expected 1 or more"),
    "--sample_seed": ("-1", "expected 0 or more"),
    "--caption_choice": ("best", "expected one of all, first, random"),
    "--per_device_train_batch_size": ("0", "expected 1 or more"),
    "--per_device_eval_batch_size": ("0", "expected 1 or more"),
    "--gradient_accumulation_steps": ("0", "expected 1 or more"),
    "--dataloader_num_workers": ("-1", "expected 0 or more"),
    "--learning_rate=nan": ("", "learning_rate=nan: expected 0 or more"),
    "--label_smoothing_factor": ("1.5", "expected 0 to 1"),
    "--lr_scheduler_type=cosine_with_min_lr": ("", "min_lr"),
    "--metric_for_best_model": ("accuracy", "--predict_with_generate"),
    "--metrics": ("guess", "expected exact_match"),
    "--max_eval_questions": ("5", "--predict_with_generate"),
    "--early_stopping_patience": ("3", "eval_strategy"),
    "--early_stopping_threshold": ("0.1", "early_stopping_patience"),
    "--accelerator_config": ('{"dispatch_batches": true}', "dispatch_batches"),
}


@pytest.mark.parametrize("option", VALUES)
def test_a_value_that_an_option_cannot_have_is_one_line(option):
    value, says = VALUES[option]
    line = refusal(option, *[value] * bool(value))
    assert says in line and option.lstrip("-") in line


@pytest.mark.parametrize(
    "options",
    [
        ("--fp16", "True", "--bf16", "True"), ("--load_best_model_at_end", "True"), ("--warmup_steps", "-3"),
        ("--dataloader_persistent_workers", "True", "--dataloader_num_workers", "0"),
    ],
)  # fmt: skip
def test_settings_that_exclude_each_other_are_one_line(options):
    refusal(*options)


MISSING = {
    ("--report_to", "tensorboard"): "pip install tensorboard",
    ("--report_to", "wandb"): "pip install wandb",
    ("--deepspeed", "config.json"): "pip install deepspeed",
    ("--optim", "galore_adamw"): "galore_torch",
    ("--optim", "grokadamw"): "pip install grokadamw",
    ("--optim", "adamw_anyprecision"): "torchdistx",
}


@pytest.mark.parametrize("options", MISSING, ids=" ".join)
def test_a_package_that_is_missing_is_named_before_anything_is_read(options):
    assert MISSING[options] in refusal(*options)


@pytest.mark.parametrize(
    "options",
    [
        ("--use_liger_kernel", "True"), ("--do_predict",), ("--batch_eval_metrics", "True"),
        ("--include_for_metrics", "inputs"), ("--label_names", "labels"), ("--length_column_name", "size"),
        ("--remove_unused_columns", "True"),
    ],
    ids=lambda options: options[0],
)  # fmt: skip
def test_an_option_that_would_do_nothing_is_refused(options):
    assert options[0].lstrip("-") in refusal(*options)


KINDS = [
    ("learning_rate", [1e-3], "a number"),
    ("learning_rate", True, "a number"),
    ("max_steps", 1.5, "a whole number"),
    ("max_steps", True, "a whole number"),
    ("max_samples", {"a": 1}, "a whole number"),
    ("image_dir", 5, "a text"),
    ("dataset", ["a", "b"], "a text"),
]


@pytest.mark.parametrize("name, value, wanted", KINDS, ids=str)
def test_a_value_of_the_wrong_kind_in_a_yaml_is_one_line(name, value, wanted, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"dataset": "shapes", name: value}))
    line = refusal("--config", str(file))
    assert f"has {name}: {value!r}; expected {wanted}" in line and str(file) in line


@pytest.mark.parametrize("content", [b"learning_rate: [1", b"caf\xe9: 1", b"- a\n- b"])
def test_what_is_no_yaml_of_settings_is_one_line(content, tmp_path):
    (tmp_path / "run.yaml").write_bytes(content)
    assert "run.yaml" in refusal("--config", str(tmp_path / "run.yaml"))


def test_numbers_of_a_yaml_are_read_as_on_the_command_line(tmp_path):
    (tmp_path / "run.yaml").write_text("dataset: shapes\nlearning_rate: 1e-3\nwarmup_steps: 3\nsft: {max_steps: 7}\n")
    given = ["--config", str(tmp_path / "run.yaml"), "--output_dir", "out", "--use_cpu"]
    *_, training_args = parse_arguments(SFT, given)
    assert (training_args.learning_rate, training_args.warmup_steps, training_args.max_steps) == (1e-3, 3, 7)
    *_, training_args = parse_arguments(PRETRAIN, [*given, "--learning_rate", "2e-3"])
    assert (training_args.learning_rate, training_args.max_steps) == (2e-3, -1)


def test_every_option_without_effect_is_one_that_the_library_has():
    """Should the library drop one, its line here is dead and goes."""
    from training_vlm.training_arguments import _WITHOUT_EFFECT

    assert _WITHOUT_EFFECT.keys() <= set(TrainingArguments.__dataclass_fields__)
    assert VLMTrainingArguments(output_dir="out", use_cpu=True).use_liger_kernel is False


def test_a_script_says_one_line_and_nothing_else(tmp_path):
    """No usage, no stack trace, and no word of a library that is imported on the way."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, str(ROOT / "train_pretrain.py"), "--learning_rate", "abc"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr == (
        "error: argument --learning_rate/--learning-rate: invalid float value: 'abc'; --help lists all options.\n"
    )


def test_what_is_no_mistake_of_a_person_keeps_its_stack_trace(tmp_path):
    broken = "import training_vlm.run as run\n@run.one_line_errors\ndef main(): raise ValueError('ours')\nmain()\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", broken], env=environment, capture_output=True, text=True)
    assert run.returncode == 1 and "Traceback" in run.stderr and "ValueError: ours" in run.stderr


def test_files_of_a_pattern_that_the_shell_resolved_are_told_to_stand_in_quotes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1.tar").touch()
    assert "'1.tar'; a pattern of files stands in quotes" in refusal("--dataset", "0.tar", "1.tar")


def test_recipes_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for recipe in RECIPES.glob("*.yaml"):
        parse_arguments(SFT, ["--config", recipe.stem, "--output_dir", "out", "--use_cpu", "--bf16", "False"])


@pytest.mark.parametrize("hidden", [True, False])
def test_bars_of_the_data_are_drawn_where_those_of_training_are(tmp_path, hidden):
    datasets.enable_progress_bars()
    try:
        prepare(VLMTrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, disable_tqdm=hidden))
        assert datasets.are_progress_bars_disabled() == hidden
    finally:
        datasets.disable_progress_bars()
