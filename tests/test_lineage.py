"""One command is safe to start again, what a run does not go on with is not taken up again, and nothing is lost."""

import os
import shutil

import pytest

import train_pretrain
from processing.data_error_vlm import DuetError
from tests import tiny
from tests.test_endings import QUICK, backbones, data  # noqa: F401 (fixtures)
from tests.test_resume import EVERY, empty, names
from tests.test_trainer import same, trainer_of, weights
from training_vlm.learning.checkpoints import MANIFEST, fault, find_checkpoint, numbered
from training_vlm.learning.lineage import leave_behind, note_run, read_run
from training_vlm.run import prepare
from training_vlm.training_arguments import VLMTrainingArguments


@pytest.fixture
def run(folders, image):
    items = tiny.ragged_dialogues(image)
    return lambda folder, **changes: trainer_of("vit-gpt2", folders, items, folder, **{**EVERY, **changes})


def a_checkpoint(place):
    place.mkdir(parents=True)
    (place / "model.safetensors").write_bytes(b"weights")
    (place / MANIFEST).write_text('{"files": {"model.safetensors": 7}}')
    return place


@pytest.fixture
def checkpoints(tmp_path):
    """A folder with three whole checkpoints."""
    for step in (2, 4, 6):
        a_checkpoint(tmp_path / f"checkpoint-{step}")
    return tmp_path


def prepared(folder, **settings):
    arguments = VLMTrainingArguments(output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], **settings)
    prepare(arguments)
    return arguments


# -- where there is something, and where there is nothing ------------------------------------------------------------


def test_auto_goes_on_where_there_is_something_whole_and_starts_where_there_is_nothing(checkpoints, tmp_path):
    assert find_checkpoint("auto", tmp_path) == tmp_path / "checkpoint-6"
    empty(tmp_path / "checkpoint-6" / "model.safetensors")
    assert find_checkpoint("auto", tmp_path) == tmp_path / "checkpoint-4"
    for step in (2, 4):
        empty(tmp_path / f"checkpoint-{step}" / "model.safetensors")
    assert find_checkpoint("auto", tmp_path) is None
    for folder in (tmp_path, tmp_path / "nothing", tmp_path / "logs"):
        if folder.name == "logs":  # what a scheduler writes there is no run
            folder.mkdir()
            (folder / "slurm-1.out").write_text("started")
        prepared(folder, resume_from_checkpoint="auto")
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "logs"]


def test_no_message_sends_a_user_to_what_sends_back(checkpoints, tmp_path):
    """What each names is tried: it is not refused for the same folder."""
    with pytest.raises(DuetError, match="resume_from_checkpoint auto to go on from checkpoint-6"):
        prepared(tmp_path)
    for step in (2, 4, 6):
        empty(tmp_path / f"checkpoint-{step}" / "model.safetensors")
    with pytest.raises(DuetError) as nothing:
        prepared(tmp_path)
    assert "overwrite_output_dir" in str(nothing.value) and "resume" not in str(nothing.value)
    with pytest.raises(DuetError, match="there is no checkpoint .*resume_from_checkpoint auto` starts anew"):
        prepared(tmp_path, resume_from_checkpoint="last")
    prepared(tmp_path, resume_from_checkpoint="auto")
    prepared(tmp_path, overwrite_output_dir=True)


def test_auto_does_not_write_over_a_model_of_another_run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DuetError, match="holds a model, and nothing says that this run wrote it"):
        prepared(tmp_path, resume_from_checkpoint="auto")
    note_run(tmp_path)  # as a run does that was begun here
    prepared(tmp_path, resume_from_checkpoint="auto")


def test_auto_does_not_train_again_what_is_done_and_kept_no_checkpoint(tmp_path, capsys):
    note_run(tmp_path, finished=6)
    with pytest.raises(SystemExit) as done:
        prepared(tmp_path, resume_from_checkpoint="auto")
    assert not done.value.code and "has come to its end, step 6" in capsys.readouterr().out
    with pytest.raises(DuetError, match="push_to_hub: the run in .* has come to its end"):
        prepared(tmp_path, resume_from_checkpoint="auto", push_to_hub=True)
    note_run(tmp_path, pushed="me/it")
    with pytest.raises(SystemExit):
        prepared(tmp_path, resume_from_checkpoint="auto", push_to_hub=True)


def test_a_run_without_a_whole_checkpoint_starts_anew_and_keeps_what_is_there(run, tmp_path, capsys):
    run(tmp_path, max_steps=2).train()
    empty(tmp_path / "checkpoint-2" / "optimizer.pt")
    run(tmp_path, max_steps=2).train("auto")
    said = capsys.readouterr().out
    assert "passed over checkpoint-2: optimizer.pt" in said and "now in" in said
    assert names(tmp_path) == ["_set_aside-1", "checkpoint-2"] and fault(tmp_path / "checkpoint-2") is None
    assert names(tmp_path / "_set_aside-1") == ["checkpoint-2"]


# -- back to an earlier one ------------------------------------------------------------------------------------------


def test_what_a_run_went_back_from_is_not_taken_up_again_and_not_removed(run, tmp_path, capsys):
    first = run(tmp_path)
    first.train()
    old = weights(first)
    run(tmp_path, label_smoothing_factor=0.1, max_steps=3, save_strategy="no").train(str(tmp_path / "checkpoint-2"))
    line = next(line for line in capsys.readouterr().out.splitlines() if "now in" in line)
    assert line.startswith("checkpoint-4, checkpoint-6 of a run that is not gone on with") and "where it stays" in line
    assert names(tmp_path) == ["_set_aside-1", "checkpoint-2"]
    assert all(fault(path) is None for path in numbered(tmp_path / "_set_aside-1"))
    for asked in ("auto", "last", True):
        assert find_checkpoint(asked, tmp_path) == tmp_path / "checkpoint-2"
    again = run(tmp_path, save_total_limit=1, label_smoothing_factor=0.1)
    again.train("auto")
    assert names(tmp_path) == ["_set_aside-1", "checkpoint-6"] and not same(weights(again), old)
    assert names(tmp_path / "_set_aside-1") == ["checkpoint-4", "checkpoint-6"]
    run(tmp_path).train(str(tmp_path / "_set_aside-1" / "checkpoint-4"))  # by name they can be
    assert names(tmp_path) == ["_run.json", "_set_aside-1", "_set_aside-2", "checkpoint-6"]


@pytest.mark.parametrize("moved", [0, 1, 2, 3])
def test_a_kill_while_going_back_is_made_good(checkpoints, tmp_path, monkeypatch, moved):
    replace, count = os.replace, 0

    def killed(*paths):
        nonlocal count
        if "checkpoint" in str(paths[0]):
            count += 1
            if count > moved:
                raise KeyboardInterrupt
        return replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        if moved < 3:
            with pytest.raises(KeyboardInterrupt):
                leave_behind(tmp_path, numbered(tmp_path)[:2] + numbered(tmp_path)[2:], overwrite=False)
    if moved == 3:
        leave_behind(tmp_path, numbered(tmp_path), overwrite=False)
    assert find_checkpoint("auto", tmp_path) is None
    assert names(tmp_path) == ["_set_aside-1"]
    assert names(tmp_path / "_set_aside-1") == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_a_run_begun_from_a_checkpoint_of_another_folder_begins_there_again(run, tmp_path):
    """Until it has one of its own."""
    first, second = tmp_path / "first", tmp_path / "second"
    whole = run(first)
    whole.train()
    run(second, max_steps=3, save_strategy="no").train(str(first / "checkpoint-2"))
    assert read_run(second)["from"] == str(first / "checkpoint-2")
    assert find_checkpoint("auto", second) == first / "checkpoint-2"
    resumed = run(second)
    resumed.train("auto")
    assert same(weights(resumed), weights(whole)) and find_checkpoint("auto", second) == second / "checkpoint-6"
    shutil.rmtree(first)
    for checkpoint in numbered(second):
        shutil.rmtree(checkpoint)
    with pytest.raises(DuetError, match="no checkpoint to resume from at .*first/checkpoint-2: it is not there"):
        find_checkpoint("auto", second)


# -- overwritten -----------------------------------------------------------------------------------------------------


def test_what_is_overwritten_is_removed_when_there_is_something_better(run, tmp_path):
    run(tmp_path).train()
    trainer, seen = run(tmp_path, overwrite_output_dir=True, max_steps=2), []
    stock = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: seen.append(names(tmp_path)) or stock(*args, **kwargs)
    trainer.train()
    assert seen == [["_overwritten-1"]] * 2 and names(tmp_path) == ["checkpoint-2"]


def test_what_is_overwritten_outlives_a_run_that_fails(backbones, data, tmp_path, monkeypatch):  # noqa: F811
    """And is not what the next one goes on from."""
    out = tmp_path / "out"
    command = [*backbones(), *data, *QUICK, "--save_strategy", "steps", "--save_steps", "1", "--output_dir", str(out)]
    train_pretrain.main(command)
    model = (out / "model.safetensors").read_bytes()

    def broken(*args, **kwargs):
        raise RuntimeError("in the first step")

    with monkeypatch.context() as patch:
        patch.setattr(train_pretrain, "load_data", broken)
        with pytest.raises(RuntimeError):
            train_pretrain.main([*command, "--overwrite_output_dir"])
    assert {"checkpoint-1", "checkpoint-2"} <= set(names(out))
    with monkeypatch.context() as patch:
        patch.setattr("training_vlm.learning.trainer.VLMTrainer.training_step", broken)
        with pytest.raises(RuntimeError):
            train_pretrain.main([*command, "--overwrite_output_dir"])
    assert (out / "model.safetensors").read_bytes() == model
    assert names(out / "_overwritten-1") == ["checkpoint-1", "checkpoint-2"]
    assert find_checkpoint("auto", out) is None
    train_pretrain.main([*command, "--resume_from_checkpoint", "auto", "--learning_rate", "0.1"])
    assert not (out / "_overwritten-1").exists() and numbered(out)[0].name == "checkpoint-2"
    assert (out / "model.safetensors").read_bytes() != model
