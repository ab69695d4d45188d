"""Checkpoints count when they are whole: killed, torn or at its end, a run goes on as it was."""

import json
import os
import shutil
import signal
import sys
from threading import Event

import pytest
import torch
from huggingface_hub import HfApi
from transformers import GenerationConfig

from modeling_vlm import VLMForConditionalGeneration
from processing.data_error_vlm import DuetError
from tests import tiny
from tests.test_trainer import Stream, same, trainer_of, weights
from training_vlm.learning.checkpoints import (
    MANIFEST,
    UNFINISHED,
    fault,
    find_checkpoint,
    finish_renaming,
    newest_whole,
    numbered,
    sizes_of,
)
from training_vlm.run import prepare
from training_vlm.training_arguments import VLMTrainingArguments


EVERY = dict(save_strategy="steps", save_steps=2, max_steps=6)


@pytest.fixture
def run(folders, image):
    """`run(folder, **settings)` is a Trainer of a tiny pair, which saves at the steps 2, 4 and 6."""
    items = tiny.ragged_dialogues(image)
    return lambda folder, data=None, **changes: trainer_of(
        "vit-gpt2", folders, items if data is None else data(items), folder, **{**EVERY, **changes}
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_checkpoint_ends_with_a_manifest_of_all_its_files(run, tmp_path):
    run(tmp_path, max_steps=2).train()
    assert names(tmp_path) == ["checkpoint-2"]
    checkpoint = tmp_path / "checkpoint-2"
    manifest = json.loads((checkpoint / MANIFEST).read_text())["files"]
    assert sorted([*manifest, MANIFEST]) == names(checkpoint)
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "data_account_0.json"} <= manifest.keys()
    assert all((checkpoint / name).stat().st_size == size for name, size in manifest.items())


def empty(file):
    file.write_bytes(b"")


def halve(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGE = {
    "optimizer.pt": empty, "model.safetensors": halve, "rng_state.pth": halve, "scheduler.pt": os.remove,
    "trainer_state.json": halve,
}  # fmt: skip


@pytest.mark.parametrize("sealed", [True, False])
def test_the_newest_whole_checkpoint_is_taken_and_others_are_named(run, tmp_path, capsys, sealed):
    """Also of those that an earlier Duet wrote, without a manifest."""
    whole = run(tmp_path / "whole")
    whole.train()
    for name, damage in DAMAGE.items():
        if not sealed and name == "scheduler.pt":
            continue  # nothing says that there was one
        folder = tmp_path / name
        shutil.copytree(tmp_path / "whole", folder)
        if not sealed:
            for checkpoint in numbered(folder):
                (checkpoint / MANIFEST).unlink()
        damage(folder / "checkpoint-6" / name)
        (folder / "checkpoint-best").mkdir()
        (folder / "checkpoint-notes.txt").write_text("the fourth was good")
        (folder / "checkpoint-7-old").mkdir()
        (folder / "checkpoint-8").write_text("a file")
        capsys.readouterr()
        assert find_checkpoint("last", folder) == folder / "checkpoint-4"
        line = capsys.readouterr().out
        assert "checkpoint-6" in line and name in line and line.count("\n") == 1
        with pytest.raises(DuetError, match=name) as error:
            find_checkpoint(str(folder / "checkpoint-6"), folder)
        assert "\n" not in str(error.value)
    resumed = run(folder)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed), weights(whole)) and losses(resumed) == losses(whole)
    assert {"checkpoint-best", "checkpoint-notes.txt", "checkpoint-7-old", "checkpoint-8"} <= set(names(folder))


def test_without_a_whole_checkpoint_one_line_says_why(run, tmp_path):
    run(tmp_path, max_steps=2).train()
    with pytest.raises(DuetError, match="no checkpoint to resume from at .*it is not there"):
        run(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    empty(tmp_path / "checkpoint-2" / "optimizer.pt")
    for asked in (True, "last"):
        with pytest.raises(DuetError, match="checkpoint-2: optimizer.pt has 0 of"):
            run(tmp_path).train(resume_from_checkpoint=asked)
    arguments = VLMTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, resume_from_checkpoint="last", report_to=[]
    )
    with pytest.raises(DuetError, match="no checkpoint to resume from"):
        prepare(arguments)


def test_shards_prove_themselves_without_a_manifest(run, tmp_path):
    trainer = run(tmp_path, max_steps=2)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    (checkpoint / MANIFEST).unlink()
    trainer.model.save_pretrained(checkpoint, max_shard_size=100_000)
    (checkpoint / "model.safetensors").unlink()
    shards = sorted(checkpoint.glob("model-*.safetensors"))
    assert len(shards) > 1 and fault(checkpoint) is None
    resumed = run(tmp_path / "resumed", max_steps=2)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert same(weights(resumed), weights(trainer))
    halve(shards[0])
    assert shards[0].name in fault(checkpoint)
    shards[0].unlink()
    assert shards[0].name in fault(checkpoint)


def test_what_a_person_may_edit_proves_nothing(run, tmp_path):
    run(tmp_path, max_steps=2).train()
    checkpoint = tmp_path / "checkpoint-2"
    for name in ("config.json", "modeling_vlm.py", "chat_template.jinja"):
        (checkpoint / name).write_text((checkpoint / name).read_text() + "\n")
    (checkpoint / "README.md").write_text("mine")
    assert fault(checkpoint) is None


def test_rotation_keeps_the_newest_and_the_best(run, tmp_path):
    """And nothing else that is called checkpoint is touched."""
    (tmp_path / "checkpoint-best").mkdir()
    best_first = dict(
        eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="loss",
        greater_is_better=True,
    )  # fmt: skip
    trainer = run(tmp_path, save_total_limit=2, max_steps=8, **best_first)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / f"checkpoint-{trainer.state.best_global_step}")
    assert names(tmp_path) == sorted({"checkpoint-best", "checkpoint-8", os.path.basename(best)} | (
        {"checkpoint-6"} if best.endswith("checkpoint-8") else set()
    ))  # fmt: skip
    for checkpoint in numbered(tmp_path):
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        # Its step tells which is the best, and no path is in it.
        assert state["best_model_checkpoint"] is None and state["best_global_step"] and fault(checkpoint) is None
    saved = VLMForConditionalGeneration.from_pretrained(best)
    assert same(weights(trainer), {name: parameter.detach() for name, parameter in saved.named_parameters()})


def test_the_end_of_a_run_removes_nothing_that_rotation_keeps(run, tmp_path):
    (tmp_path / "checkpoint-3-of-mine").mkdir()
    best_first = dict(eval_strategy="steps", eval_steps=2, metric_for_best_model="loss", greater_is_better=True)
    trainer = run(tmp_path, save_total_limit=1, max_steps=8, **best_first)
    trainer.train()
    best = os.path.basename(trainer.state.best_model_checkpoint)
    assert names(tmp_path) == sorted({"checkpoint-3-of-mine", "checkpoint-8", best})


def test_rotation_removes_the_oldest(run, tmp_path):
    run(tmp_path, save_total_limit=1).train()
    assert names(tmp_path) == ["checkpoint-6"]


def test_a_checkpoint_of_the_model_alone_resumes_with_its_weights(run, tmp_path, capsys):
    whole = run(tmp_path, save_only_model=True, max_steps=4)
    whole.train()
    checkpoint = tmp_path / "checkpoint-4"
    assert "optimizer.pt" not in names(checkpoint) and fault(checkpoint) is None
    resumed = run(tmp_path, max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed), weights(whole)) and "holds the model alone" in capsys.readouterr().out


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_a_checkpoint_is_pushed_under_its_name_when_it_is_whole(run, tmp_path, monkeypatch, strategy):
    pushed = []

    def create_commit(self, repo_id, operations, **kwargs):
        files = {operation.path_in_repo for operation in operations}
        pushed.append((files, fault(tmp_path / "checkpoint-2"), names(tmp_path)))

    no_hub(monkeypatch, create_commit)
    run(tmp_path, max_steps=2, push_to_hub=True, hub_strategy=strategy, hub_model_id="me/it").train()
    place = {"checkpoint": "last-checkpoint", "all_checkpoints": "checkpoint-2"}.get(strategy)
    (model, *_), *checkpoints = pushed
    assert {"model.safetensors", "config.json", "modeling_vlm.py", "tokenizer.json"} <= model
    assert not [name for name in model if name.startswith(("optimizer", "rng_state", "trainer_state", "training_args"))]
    assert len(checkpoints) == (place is not None)
    for files, *_ in checkpoints:
        assert files == {f"{place}/{name}" for name in [*sizes_of(tmp_path / "checkpoint-2"), MANIFEST]}
    assert all(reason is None and UNFINISHED not in found for _, reason, found in pushed)


def no_hub(monkeypatch, create_commit):
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(HfApi, "list_repo_files", lambda self, repo_id, **kwargs: [])
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **kwargs: type("Repo", (), {"repo_id": name}))


def test_a_push_in_the_background_that_fails_is_said_and_stops_nothing(run, tmp_path, monkeypatch, capsys):
    def create_commit(self, repo_id, operations, **kwargs):
        raise OSError("the line is cut")

    no_hub(monkeypatch, create_commit)
    trainer = run(tmp_path, max_steps=4, push_to_hub=True, hub_model_id="me/it", hub_always_push=True)
    trainer.train()
    assert trainer.state.global_step == 4
    assert capsys.readouterr().out.count("the push to me/it failed: the line is cut") == 2


def test_a_checkpoint_that_is_being_pushed_is_not_removed(run, tmp_path, monkeypatch):
    going_on = Event()
    no_hub(monkeypatch, lambda self, repo_id, operations, **kwargs: going_on.wait(60))
    trainer = run(tmp_path, max_steps=6, push_to_hub=True, hub_model_id="me/it", save_total_limit=1)
    monkeypatch.setattr(trainer, "_finish_current_push", lambda: None)
    trainer.train()
    going_on.set()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-6"]


# What is left to do at the end.


@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": 6},
        {"max_steps": 4},
        {"max_steps": -1, "num_train_epochs": 1.5},
        {"max_steps": -1, "num_train_epochs": 1},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_run_resumed_at_its_end_takes_no_further_step(run, tmp_path, capsys, settings, stream):
    """Six steps are one epoch and a half."""
    if stream and settings["max_steps"] < 0:
        return  # a stream has no epochs
    data = Stream if stream else None
    whole = run(tmp_path / "run", data)
    whole.train()
    for _ in range(2):
        resumed = run(tmp_path / "run", data, eval_strategy="no", **settings)
        done = resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 6 == done.global_step
        assert same(weights(resumed), weights(whole))
        assert done.training_loss == pytest.approx(sum(losses(whole)) / 6) == done.metrics["train_loss"]
        assert "nothing is left to train" in capsys.readouterr().out
    assert names(tmp_path / "run") == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_a_run_resumed_at_its_end_still_takes_the_best_model(run, tmp_path):
    settings = dict(
        eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="loss",
        greater_is_better=True,
    )  # fmt: skip
    whole = run(tmp_path, **settings)
    whole.train()
    resumed = run(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed), weights(whole)) and resumed.evaluate()["eval_loss"] > 0


# Saving that nothing can stop.


def contradictory():
    return GenerationConfig(do_sample=False, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05)


@pytest.mark.parametrize("own", [contradictory, lambda: GenerationConfig(temperature=0.9)])
def test_generation_settings_that_contradict_each_other_do_not_stop_a_checkpoint(run, tmp_path, own):
    trainer = run(tmp_path, max_steps=2)
    config = trainer.model.generation_config = own()
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "checkpoint-2", tmp_path / "final"):
        saved = VLMForConditionalGeneration.from_pretrained(folder)
        assert same(weights(trainer), {name: parameter.detach() for name, parameter in saved.named_parameters()})
        saved.save_pretrained(tmp_path / "again")
        assert saved.generation_config.repetition_penalty == config.repetition_penalty


@pytest.mark.parametrize("part", ["config", "processor", "code"])
def test_weights_are_saved_whatever_else_cannot_be(run, tmp_path, monkeypatch, part):
    trainer = run(tmp_path, max_steps=2)

    def broken(*args, **kwargs):
        raise TypeError(f"the {part} cannot be saved")

    if part == "code":
        monkeypatch.setattr("transformers.modeling_utils.custom_object_save", broken)
    else:
        saved = trainer.model.config if part == "config" else trainer.processing_class
        monkeypatch.setattr(type(saved), "save_pretrained", broken)
    with pytest.raises(TypeError, match=part):
        trainer.train()
    assert fault(tmp_path / "checkpoint-2") is None
    with pytest.raises(TypeError, match=part):
        trainer.save_model(str(tmp_path / "final"))
    monkeypatch.undo()
    resumed = run(tmp_path / "resumed", max_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(weights(resumed), weights(trainer)) and "model.safetensors" in names(tmp_path / "final")


def test_a_saved_model_replaces_an_earlier_one_of_more_files(run, tmp_path):
    trainer = run(tmp_path, max_steps=2, save_strategy="no")
    trainer.model.save_pretrained(tmp_path, max_shard_size=100_000)
    (tmp_path / "model_of_mine.safetensors").write_bytes(b"mine")
    trainer.train()
    trainer.save_model()
    assert not any("-of-" in name or "index" in name or name == UNFINISHED for name in names(tmp_path))
    assert "model_of_mine.safetensors" in names(tmp_path)
    saved = VLMForConditionalGeneration.from_pretrained(tmp_path)
    assert same(weights(trainer), {name: parameter.detach() for name, parameter in saved.named_parameters()})


# Killed.


def killed_at(trainer, moment, folder):
    """Train in a process of its own, which is killed at a touch of a file: by its number, or what is said of it."""
    process = os.fork()
    if not process:
        touches = 0

        def touch(event, path):
            nonlocal touches
            touches += 1
            return touches == moment if isinstance(moment, int) else moment in f"{event} {path}"

        def on_event(event, arguments):
            writes = event == "open" and isinstance(arguments[1], str) and set("wax+") & set(arguments[1])
            removes = event == "os.remove" and arguments[1] != -1  # one by one, of a folder that is removed
            if writes or event in ("os.rename", "os.mkdir", "os.rmdir", "shutil.rmtree"):
                removes = str(folder) in str(arguments[0])
            if removes and touch(event, arguments[0]):
                os.kill(os.getpid(), signal.SIGKILL)

        save = torch.save

        def save_half(content, file, *args, **kwargs):  # torch writes without Python's knowledge
            save(content, file, *args, **kwargs)
            if touch("torch.save", file):
                os.truncate(file, os.path.getsize(file) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            torch.set_num_threads(1)
            torch.save = save_half
            sys.addaudithook(on_event)
            trainer.train()
            trainer.save_model()
        finally:
            os._exit(0)
    return os.waitpid(process, 0)[1] == signal.SIGKILL


def check_a_kill(run, folder, whole, moment, last=None):
    """What is there after a kill is whole or not taken, and the run goes on to the same weights."""
    settings = dict(save_total_limit=2)
    if not killed_at(run(folder, **settings), moment, folder):
        return False
    torch.manual_seed(1234)
    resumed = run(folder, **settings)
    finish_renaming(folder)
    found = newest_whole(folder)
    assert last is None or found.name == f"checkpoint-{last}"
    resumed.train(resume_from_checkpoint=found is not None)
    assert same(weights(resumed), whole) and resumed.state.global_step == 6
    resumed.save_model()
    assert UNFINISHED not in names(folder) and all(fault(checkpoint) is None for checkpoint in numbered(folder))
    saved = VLMForConditionalGeneration.from_pretrained(folder)
    assert same(whole, {name: parameter.detach() for name, parameter in saved.named_parameters()})
    return True


@pytest.fixture
def whole(run, tmp_path):
    trainer = run(tmp_path / "whole")
    trainer.train()
    return weights(trainer)


@pytest.mark.parametrize(
    "moment, last",
    [
        ("open {}/_unfinished/checkpoint-4/tokenizer_config.json", 2),
        ("torch.save {}/_unfinished/checkpoint-4/optimizer.pt", 2),
        ("open {}/_unfinished/checkpoint-4/checkpoint_manifest.json", 2),
        ("os.rename {}/_unfinished/checkpoint-4", 4),
        ("os.remove model.safetensors", 6),
        ("os.rename {}/_unfinished/model", 6),
        ("os.rename {}/_model/config.json", 6),
    ],
)
def test_a_kill_while_saving_loses_nothing(run, tmp_path, whole, capsys, moment, last):
    """In the middle of a file, before and after the manifest, in a rotation, at the end; what is whole is resumed."""
    assert check_a_kill(run, tmp_path / "run", whole, moment.format(tmp_path / "run"), last)


@pytest.mark.slow
def test_a_kill_at_any_touch_of_a_file_loses_nothing(run, tmp_path, whole):
    moment = 1
    while check_a_kill(run, tmp_path / f"run {moment}", whole, moment):
        shutil.rmtree(tmp_path / f"run {moment}")
        moment += 1
    assert moment > 100


def broken_in(trainer, calls):
    """Break in the middle of a step, once so many batches were run."""
    stock, seen = trainer.training_step, []

    def step(*args, **kwargs):
        loss = stock(*args, **kwargs)
        if seen.append(loss) or len(seen) == calls:
            raise RuntimeError("in the middle of a step")
        return loss

    trainer.training_step = step
    return trainer


@pytest.mark.parametrize("torn", [False, True])
def test_a_run_goes_on_from_what_was_rescued_as_one_that_did_not_fail(run, tmp_path, torn):
    """Also where half a checkpoint of the same step lies there."""

    def made(folder):
        trainer = run(folder, gradient_accumulation_steps=2, include_num_input_tokens_seen="all", save_steps=5)
        trainer.data_collator.account = True
        return trainer

    whole = made(tmp_path / "whole")
    whole.train()
    out = tmp_path / "out"
    failed = broken_in(made(out), calls=2 * 3 + 1)
    breaks = failed.training_step

    def step(*args, **kwargs):
        if torn and failed.state.global_step == 3:
            shutil.copytree(tmp_path / "whole" / "checkpoint-5", out / "checkpoint-3")
            halve(out / "checkpoint-3" / "model.safetensors")
        return breaks(*args, **kwargs)

    failed.training_step = step
    with pytest.raises(RuntimeError, match="in the middle"):
        failed.train()
    assert failed.rescue() == out / "checkpoint-3" and fault(out / "checkpoint-3") is None
    assert failed.rescue() is None  # it is there
    resumed = made(out)
    resumed.train("auto")
    assert same(weights(resumed), weights(whole)) and losses(resumed) == losses(whole)
    assert resumed.account.state() == whole.account.state() and whole.account.total["learned from"]
    for name in ("total_flos", "num_input_tokens_seen"):
        assert getattr(resumed.state, name) == getattr(whole.state, name) > 0
