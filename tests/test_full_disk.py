"""A full disk is one clear error, and the last good checkpoint stays."""

import errno
import subprocess

import pytest

from modeling_vlm import VLMForConditionalGeneration
from processing.data_error_vlm import DuetError
from tests import tiny
from tests.test_lineage import a_checkpoint
from tests.test_resume import EVERY, losses, names
from tests.test_trainer import same, trainer_of, weights
from training_vlm.learning.checkpoints import fault, numbered, rotate
from training_vlm.learning.disk import DiskFull, full_disk


@pytest.fixture
def run(folders, image):
    items = tiny.ragged_dialogues(image)
    return lambda folder, **changes: trainer_of("vit-gpt2", folders, items, folder, **{**EVERY, **changes})


@pytest.fixture
def disk(tmp_path):
    """`disk(bytes)` is a folder on a disk of that size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mounted(size):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip("a small disk can be mounted by root alone")
        return folder

    yield mounted
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def size(folder):
    """In pages, as a disk counts."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def checkpoint_size(run, tmp_path):
    run(tmp_path / "one", max_steps=2).train()
    return size(tmp_path / "one" / "checkpoint-2")


@pytest.mark.parametrize("share", [1.1, 1.5, 1.9])
def test_a_full_disk_is_one_line_and_the_last_good_checkpoint_stays(run, disk, tmp_path, checkpoint_size, share):
    """In the middle of the weights, of the optimizer, or of what follows."""
    folder = disk(int(share * checkpoint_size))
    with pytest.raises(DiskFull) as full:
        run(folder).train()
    line = str(full.value)
    assert "\n" not in line and line.startswith(f"the disk of {folder} is full (")
    assert f"checkpoint-4 could not be saved, nothing of it is left, and {folder / 'checkpoint-2'} is the last" in line
    assert "--save_total_limit" in line and "--resume_from_checkpoint auto" in line
    assert names(folder) == ["checkpoint-2"] and fault(folder / "checkpoint-2") is None
    subprocess.run(["mount", "-o", "remount,size=1g", str(folder)], check=True)
    resumed = run(folder)
    resumed.train("auto")
    whole = run(tmp_path / "whole")
    whole.train()
    assert same(weights(resumed), weights(whole)) and losses(resumed) == losses(whole)


def test_room_is_made_by_what_would_be_removed_anyway(run, disk, checkpoint_size):
    """There is never room for three."""
    folder = disk(int(2.5 * checkpoint_size))
    run(folder, save_total_limit=2).train()
    assert names(folder) == ["checkpoint-4", "checkpoint-6"] and all(fault(path) is None for path in numbered(folder))


def test_the_only_checkpoint_is_not_removed_to_make_room(run, disk, checkpoint_size):
    folder = disk(int(1.5 * checkpoint_size))
    with pytest.raises(DiskFull):
        run(folder, save_total_limit=1).train()
    assert names(folder) == ["checkpoint-2"] and fault(folder / "checkpoint-2") is None


def test_a_model_that_finds_no_room_leaves_the_one_before(run, disk):
    trainer = run(disk("1g"), save_strategy="no", max_steps=2)
    trainer.save_model()
    before = weights(trainer)
    trainer.train()
    folder = trainer.run_folder
    subprocess.run(["mount", "-o", f"remount,size={int(1.3 * size(folder))}", str(folder)], check=True)
    with pytest.raises(DiskFull, match="model could not be saved.* no checkpoint was saved before"):
        trainer.save_model()
    saved = dict(VLMForConditionalGeneration.from_pretrained(folder).named_parameters())
    assert same(before, saved) and not same(before, weights(trainer)) and "_unfinished" not in names(folder)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_or_quota_is_told_wherever_it_is_met(run, tmp_path, monkeypatch, number):
    """Without a disk that is full."""

    def full(*args, **kwargs):
        raise OSError(number, "no room")

    trainer = run(tmp_path)
    monkeypatch.setattr(trainer, "_save_rng_state", lambda *args: trainer.state.global_step == 4 and full())
    with pytest.raises(DiskFull, match="checkpoint-4 could not be saved"):
        trainer.train()
    assert names(tmp_path) == ["checkpoint-2"]


def test_another_failure_is_no_full_disk_and_leaves_nothing_half_written(run, tmp_path, monkeypatch):
    def broken(*args):
        raise PermissionError(errno.EACCES, "not yours")

    trainer = run(tmp_path)
    monkeypatch.setattr(trainer, "_save_rng_state", broken)
    with pytest.raises(PermissionError, match="not yours"):
        trainer.train()
    assert names(tmp_path) == []


def test_what_was_written_and_is_not_whole_does_not_cost_the_checkpoint_before(run, tmp_path, monkeypatch):
    """As where a network's disk takes everything and keeps half of it."""
    trainer = run(tmp_path, save_total_limit=1)
    stock = trainer._save_rng_state

    def halved(folder):
        stock(folder)
        if trainer.state.global_step == 4:
            file = trainer.run_folder / "_unfinished" / "checkpoint-4" / "model.safetensors"
            file.write_bytes(file.read_bytes()[:1000])

    trainer._save_rng_state = halved
    with pytest.raises(OSError, match="checkpoint-4 was written and is not whole: model.safetensors is not whole"):
        trainer.train()
    assert names(tmp_path) == ["checkpoint-2"] and fault(tmp_path / "checkpoint-2") is None


def test_rotation_never_removes_the_only_whole_checkpoint(run, tmp_path):
    run(tmp_path).train()
    for step in (4, 6):
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"")
    rotate(tmp_path, 1, {tmp_path / "checkpoint-6"})
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-6"] and fault(tmp_path / "checkpoint-2") is None


def test_an_error_of_a_full_disk_is_a_persons_to_mend():
    assert DiskFull("x").is_duet_error and issubclass(DiskFull, DuetError)


def test_the_disk_that_is_named_is_that_of_the_run_whatever_its_folder_is_called(tmp_path):
    folder = tmp_path / "_out"
    assert full_disk(folder, "checkpoint-4", 2).startswith(f"the disk of {folder} is full (")
    a_checkpoint(folder / "checkpoint-2")
    assert f"and {folder / 'checkpoint-2'} is the last good checkpoint" in full_disk(folder, "checkpoint-4", 2)
