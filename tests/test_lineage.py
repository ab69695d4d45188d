"""One command is safe to start again, what a run does not go on with is not taken up again, and nothing is lost."""

import contextlib
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

import train_pretrain
from processing.data_error_vlm import DuetError
from tests import tiny
from tests.test_endings import QUICK, backbones, data  # noqa: F401 (fixtures)
from tests.test_resume import EVERY, empty, names
from tests.test_trainer import same, trainer_of, weights
from training_vlm.learning.checkpoints import (
    MANIFEST,
    UNFINISHED,
    fault,
    find_checkpoint,
    is_own,
    left_behind,
    numbered,
    put_in_place,
)
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
    note_run(tmp_path, pushed=f"me/{tmp_path.name}")
    with pytest.raises(SystemExit):
        prepared(tmp_path, resume_from_checkpoint="auto", push_to_hub=True)


def test_auto_does_not_train_again_what_was_trained(backbones, data, tmp_path, monkeypatch, capsys):  # noqa: F811
    out = tmp_path / "out"
    command = [*backbones(), *data, *QUICK, "--save_strategy", "no", "--output_dir", str(out)]
    command += ["--resume_from_checkpoint", "auto"]

    def broken(*args, **kwargs):
        raise RuntimeError("the disk of the card")

    with monkeypatch.context() as patch:
        patch.setattr("training_vlm.learning.trainer.VLMTrainer.create_model_card", broken)
        with pytest.raises(SystemExit):
            train_pretrain.main(command)
    model = (out / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit) as refused:
        train_pretrain.main(command)
    assert refused.value.code == 1 and "has made all its steps" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == model
    train_pretrain.main([*command[:-2], "--overwrite_output_dir"])
    assert read_run(out)["finished"]


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


def test_a_run_begun_from_a_checkpoint_of_another_folder_begins_there_again(run, tmp_path, capsys, monkeypatch):
    """Until it has one of its own."""
    first, second = tmp_path / "first", tmp_path / "second"
    whole = run(first)
    whole.train()
    run(second, max_steps=3, save_strategy="no").train(str(first / "checkpoint-2"))
    assert read_run(second)["from"] == "../first/checkpoint-2"
    with monkeypatch.context() as patch:
        patch.chdir(second)
        assert find_checkpoint("auto", Path(".")) == first / "checkpoint-2"
    assert find_checkpoint("auto", second) == first / "checkpoint-2"
    resumed = run(second)
    resumed.train("auto")
    assert same(weights(resumed), weights(whole)) and find_checkpoint("auto", second) == second / "checkpoint-6"
    shutil.rmtree(first)
    assert find_checkpoint("auto", second) == second / "checkpoint-6"
    for checkpoint in numbered(second):
        empty(checkpoint / "model.safetensors")
    capsys.readouterr()
    assert find_checkpoint("auto", second) is None
    last = capsys.readouterr().out.splitlines()[-1]
    assert "first/checkpoint-2, from which the run was begun: it is not there" in last and "starts anew" in last
    with pytest.raises(DuetError, match="no checkpoint to resume from at .*second .*auto` starts anew"):
        find_checkpoint("last", second)


class Worse(TrainerCallback):
    """Each evaluation is worse than the one before; and the run breaks after a step."""

    def __init__(self, until=None):
        self.until = until

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_loss"] = float(state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.until:
            raise RuntimeError("it broke on purpose")


JUDGED = dict(eval_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True)


@pytest.fixture
def judged(run):
    """`judged(folder, asked, until)` trains, until it breaks after a step; its best step is always the first."""

    def trained(folder, asked=None, until=None, **changes):
        trainer = run(folder, **{**JUDGED, **changes})
        trainer.add_callback(Worse(until))
        with contextlib.nullcontext() if until is None else pytest.raises(RuntimeError, match="on purpose"):
            trainer.train(asked)
        return trainer

    return trained


def same_files(one, other):
    return same(*(load_file(folder / "model.safetensors") for folder in (one, other)))


def test_the_best_checkpoint_is_found_where_it_lies_however_often_a_run_goes_on(judged, tmp_path):
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    judged(first, until=3)
    best = shutil.copytree(first / "checkpoint-1", tmp_path / "best")
    judged(second, str(first / "checkpoint-2"), until=3)
    judged(second, "auto", until=4)
    judged(third, str(second / "checkpoint-4"), until=5)
    judged(first, str(first / "checkpoint-1"), until=2)  # what came after it is set aside
    for folder, asked in ((second, "auto"), (third, "auto"), (first, str(first / "_set_aside-1" / "checkpoint-3"))):
        ended = judged(folder, asked)
        assert ended.state.best_global_step == 1 and ended.state.global_step == 6
        assert Path(ended.state.best_model_checkpoint).parts[-1] == "checkpoint-1"
        ended.save_model()
        assert same_files(folder, best) and not same_files(folder, folder / "checkpoint-6")
        assert str(tmp_path) not in (folder / "_run.json").read_text()


def test_another_checkpoint_of_the_best_ones_number_is_not_taken_for_it_and_its_loss_is_said(judged, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    judged(first, until=2)
    judged(second, str(first / "checkpoint-2"), until=3)
    judged(tmp_path / "other", until=1, seed=7)
    shutil.rmtree(first / "checkpoint-1")
    shutil.copytree(tmp_path / "other" / "checkpoint-1", first / "checkpoint-1")
    capsys.readouterr()
    last = judged(second, "auto")
    assert "the best checkpoint until here, of step 1, is not there any more" in capsys.readouterr().out
    last.save_model()
    assert last.state.best_model_checkpoint is None and same_files(second, second / "checkpoint-6")


def test_the_best_checkpoint_of_what_was_overwritten_outlives_a_run_that_goes_on_from_there(judged, tmp_path):
    folder = tmp_path / "run"
    judged(folder, until=2)
    best = shutil.copytree(folder / "checkpoint-1", tmp_path / "best")
    leave_behind(folder, numbered(folder), overwrite=True)  # as a run does that is killed in its first step
    judged(folder, str(folder / "_overwritten-1" / "checkpoint-2"), until=3)
    assert names(folder / "_overwritten-1") == ["checkpoint-1"]
    ended = judged(folder, "auto")
    ended.save_model()
    assert ended.state.best_global_step == 1 and same_files(folder, best)


# -- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", ["a checkpoint", "the folder", "from outside", "from outside to a link"])
def test_a_checkpoint_behind_a_link_is_not_moved_away_under_its_own_resume(checkpoints, tmp_path, link):
    folder, asked, away = tmp_path / "out", tmp_path / "out" / "checkpoint-4", tmp_path / "away"
    folder.mkdir()
    for step in (2, 4, 6):
        (tmp_path / f"checkpoint-{step}").rename(folder / f"checkpoint-{step}")
    if "outside" not in link or "to a link" in link:
        away.mkdir()
        (folder / "checkpoint-4").rename(away / "the fourth")
        asked.symlink_to(Path("..", "away", "the fourth"))
    if link == "the folder":
        (tmp_path / "linked").symlink_to("out")
        folder = tmp_path / "linked"
    if "outside" in link:
        (tmp_path / "latest").symlink_to(asked)
        asked = tmp_path / "latest"
    found = find_checkpoint(str(asked), folder)
    assert found == folder / "checkpoint-4" and is_own(found, folder)
    assert [path.name for path in left_behind(folder, found)] == ["checkpoint-6"]
    place = leave_behind(folder, numbered(folder), overwrite=False)
    assert fault(place / "checkpoint-4") is None and names(folder) == ["_set_aside-1"]


def test_a_checkpoint_of_a_name_of_its_own_is_gone_on_from(checkpoints, tmp_path):
    kept = shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "the good one")
    found = find_checkpoint(str(kept), tmp_path)
    assert found == kept and left_behind(tmp_path, found) == numbered(tmp_path)


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


@pytest.fixture
def removed(monkeypatch):
    """What is removed, and which files were on the disk by then."""
    written, found, fsync, rmtree = set(), [], os.fsync, shutil.rmtree

    def noted(path, *args, **kwargs):
        found.append((Path(path).name, set(written)))
        return rmtree(path, *args, **kwargs)

    monkeypatch.setattr(os, "fsync", lambda number: written.add(os.fstat(number).st_ino) or fsync(number))
    monkeypatch.setattr(shutil, "rmtree", noted)
    return found


def inodes(folder):
    return {path.stat().st_ino for path in [folder, *folder.rglob("*")]}


def test_what_is_better_is_on_the_disk_before_what_is_overwritten_is_removed(run, tmp_path, removed):
    run(tmp_path).train()
    run(tmp_path, overwrite_output_dir=True, max_steps=2).train()
    [written] = [written for name, written in removed if name == "_overwritten-1"]
    assert inodes(tmp_path / "checkpoint-2") <= written
    run(tmp_path, overwrite_output_dir=True, save_strategy="no", max_steps=1).train()
    trainer = run(tmp_path, overwrite_output_dir=True, save_strategy="no", max_steps=1)
    trainer.save_model()
    written = [written for name, written in removed if name == "_overwritten-1"][-1]
    assert {(tmp_path / name).stat().st_ino for name in trainer._model_files} | {tmp_path.stat().st_ino} <= written


def test_a_checkpoint_that_takes_anothers_place_is_on_the_disk_before_that_is_removed(checkpoints, tmp_path, removed):
    new = a_checkpoint(tmp_path / UNFINISHED / "checkpoint-4")
    put_in_place(new, tmp_path / "checkpoint-4")
    [(name, written)] = removed
    assert name == "replaced-checkpoint-4" and inodes(tmp_path / "checkpoint-4") <= written
