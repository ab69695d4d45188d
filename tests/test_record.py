"""A checkpoint of another model or of other data is refused in one line, before anything is trained."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import train_pretrain
import train_sft
from tests.test_batches import QUICK, backbones, dialogues  # noqa: F401 (fixtures)
from training_vlm.learning.checkpoints import MANIFEST
from training_vlm.learning.record import RECORD


@pytest.fixture(scope="module")
def begun(folders, dialogues, tmp_path_factory):  # noqa: F811
    """A run of one step, and the arguments that began it."""
    folder = tmp_path_factory.mktemp("begun")
    vision, text = folders("siglip-llama")
    shutil.copytree(vision, folder / "vision")
    shutil.copytree(text, folder / "text")
    named = ["--vision_model", str(folder / "vision"), "--text_model", str(folder / "text")]
    command = [*named, *dialogues, *QUICK]
    train_sft.main([*command, "--max_steps", "1", "--output_dir", str(folder / "out")])
    return folder, command


def refused(capsys, command, out, module=train_sft):
    """What a run that goes on from another's checkpoint says."""
    checkpoint = out / "checkpoint-1"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        module.main([*command, "--resume_from_checkpoint", "auto", "--output_dir", str(out)])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 1 and line.startswith(f"error: {checkpoint} is of another run: ")
    assert before == {path: path.stat().st_mtime_ns for path in before} and f"--model {checkpoint}" in line
    return line


def edited(source, target, names):
    """A copy of a backbone with the first values of some weights changed."""
    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    for name, tensor in weights.items():
        if names in name:
            tensor.flatten()[0] += 1
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


@pytest.mark.parametrize("side", ["vision", "text"])
def test_another_backbone_of_the_same_shape_is_refused(begun, capsys, tmp_path, side):
    folder, command = begun
    other = edited(folder / side, tmp_path / side, "layers.0")
    command = [other if argument == str(folder / side) else argument for argument in command]
    name = {"vision": "vision encoder", "text": "language model"}[side]
    assert f"it began with another {name}" in refused(capsys, command, folder / "out")


def test_the_same_backbones_and_data_elsewhere_are_no_others(begun, dialogues, tmp_path):  # noqa: F811
    """Names are no part of what a run is."""
    folder, command = begun
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    data = Path(shutil.copytree(Path(dialogues[1]).parent, tmp_path / "data"))
    places = {str(folder): str(moved), str(Path(dialogues[1]).parent): str(data)}
    for before, after in places.items():
        command = [argument.replace(before, after) for argument in command]
    train_sft.main([*command, "--max_steps", "2", "--resume_from_checkpoint", "auto", "--output_dir", f"{moved}/out"])
    record = (moved / "out" / "checkpoint-2" / RECORD).read_text()
    assert json.loads(record) == json.loads((folder / "out" / "checkpoint-1" / RECORD).read_text())
    assert str(tmp_path) not in record and str(folder) not in record


def test_a_model_of_another_shape_is_refused(begun, capsys, folders, tmp_path):
    """Also by a checkpoint that says nothing of its run."""
    folder, command = begun
    shutil.copytree(folder / "out", tmp_path / "out")
    (tmp_path / "out" / "checkpoint-1" / RECORD).unlink()
    (tmp_path / "out" / "checkpoint-1" / MANIFEST).unlink()
    line = refused(capsys, [*command, "--text_model", str(folders("vit-gpt2")[1])], tmp_path / "out")
    assert "is of the shape [" in line and ", and this run's of [" in line


def test_other_data_are_refused_unless_that_is_said(begun, capsys, tmp_path, dialogues):  # noqa: F811
    folder, command = begun
    rows = Path(dialogues[1]).read_text().replace("what is it?", "what is that?")
    (tmp_path / "rows.jsonl").write_text(rows)
    command = [str(tmp_path / "rows.jsonl") if argument == dialogues[1] else argument for argument in command]
    line = refused(capsys, command, folder / "out")
    assert "its data began with another row" in line and "--ignore_data_skip" in line
    shutil.copytree(folder / "out", tmp_path / "out")
    going_on = ["--resume_from_checkpoint", "auto", "--ignore_data_skip", "--max_steps", "2"]
    train_sft.main([*command, *going_on, "--output_dir", str(tmp_path / "out")])
    assert (tmp_path / "out" / "checkpoint-2").is_dir()


def test_other_data_of_a_stream_are_refused_too(begun, capsys, tmp_path, dialogues):  # noqa: F811
    _, command = begun
    command = [*command, "--streaming", "--max_steps", "1"]
    train_sft.main([*command, "--output_dir", str(tmp_path / "out")])
    rows = Path(dialogues[1]).read_text().replace("what is it?", "what is that?")
    (tmp_path / "rows.jsonl").write_text(rows)
    others = [str(tmp_path / "rows.jsonl") if argument == dialogues[1] else argument for argument in command]
    assert "its data began with another row" in refused(capsys, others, tmp_path / "out")


def test_another_stage_is_refused(begun, capsys):
    folder, command = begun
    line = refused(capsys, command, folder / "out", train_pretrain)
    assert "it learned dialogues, and this run learns captions" in line
