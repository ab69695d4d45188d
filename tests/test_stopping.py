"""A run that is told to stop saves what it has learned, ends with 75, and goes on as if it had never been stopped."""

import multiprocessing
import os
import signal
import threading

import pytest
import torch

import train_pretrain
from modeling_vlm import VLMForConditionalGeneration
from processing.data_error_vlm import DuetError
from tests import tiny
from tests.test_endings import QUICK, backbones, data  # noqa: F401 (fixtures)
from tests.test_resume import losses, names
from tests.test_trainer import same, trainer_of, weights
from training_vlm.learning.checkpoints import fault, numbered
from training_vlm.learning.stopping import STOPPED, Stopped, exiting_when_told
from training_vlm.learning.trainer import VLMTrainer
from training_vlm.training_arguments import VLMTrainingArguments


SETTINGS = dict(eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=4, max_steps=5)


def tell(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def telling(trainer, method, step, number=signal.SIGTERM, times=1):
    """Have the trainer's process told to stop when a method is called while it is at a step."""
    stock = getattr(trainer, method)

    def told(*args, **kwargs):
        nonlocal times
        if trainer.state.global_step == step and times:
            times -= 1
            tell(number)
        return stock(*args, **kwargs)

    setattr(trainer, method, told)


@pytest.fixture
def run(folders, image):
    items = tiny.ragged_dialogues(image)
    return lambda folder, **changes: trainer_of("vit-gpt2", folders, items, folder, **{**SETTINGS, **changes})


def evaluated(trainer):
    return [(entry["step"], entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry]


def stop(trainer, *args):
    with pytest.raises(Stopped) as stopped:
        trainer.train(*args)
    assert stopped.value.code == STOPPED == 75


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    """Weights, losses and evaluations of a run that nobody stops: by steps, and by epochs of four."""
    found = {}

    def get(run, **changes):
        if str(changes) not in found:
            trainer = run(tmp_path_factory.mktemp("whole"), **changes)
            trainer.train()
            found[str(changes)] = weights(trainer), losses(trainer), evaluated(trainer)
        return found[str(changes)]

    return get


MOMENTS = {
    "before the first step": (("get_batch_samples", 0), 1),
    "in a step": (("training_step", 2), 3),
    "in a step that is to be evaluated": (("training_step", 1), 2),
    "in an evaluation": (("prediction_step", 2), 2),
    "in an evaluation that a save was to follow": (("prediction_step", 4), 4),
    "in a save": (("_save_rng_state", 4), 4),
    "twice": (("training_step", 2, signal.SIGUSR1, 2), 3),
    "in the last step": (("training_step", 4), 5),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_was_told_to_stop_goes_on_to_the_same_weights(run, whole, tmp_path, capsys, moment):
    told, step = MOMENTS[moment]
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    trainer = run(tmp_path)
    telling(trainer, *told)
    stop(trainer)
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    said = capsys.readouterr().out
    name = signal.SIGUSR1.name if moment == "twice" else signal.SIGTERM.name
    assert f"stopped by {name} after step {step} of 5" in said and "exit code 75" in said
    saved = [4] * (step == 5) + [step]
    assert names(tmp_path) == [f"checkpoint-{number}" for number in saved]
    assert fault(tmp_path / f"checkpoint-{step}") is None
    resumed = run(tmp_path)
    resumed.train(resume_from_checkpoint="auto")
    expected, lost, judged = whole(run)
    assert same(weights(resumed), expected) and losses(resumed) == lost and evaluated(resumed) == judged


@pytest.mark.parametrize("moment", [("training_step", 3), ("prediction_step", 4), ("_save_rng_state", 4)])
def test_an_epoch_that_was_not_evaluated_is_when_the_run_goes_on(run, whole, tmp_path, moment):
    """Saved by steps, told in the last step of an epoch, in its save, or in its evaluation."""
    settings = dict(eval_strategy="epoch", max_steps=6)
    trainer = run(tmp_path, **settings)
    telling(trainer, *moment)
    stop(trainer)
    assert names(tmp_path) == ["checkpoint-4"]
    resumed = run(tmp_path, **settings)
    resumed.train(resume_from_checkpoint="auto")
    expected, _, judged = whole(run, **settings)
    assert same(weights(resumed), expected) and evaluated(resumed) == judged and len(judged) > 1


def test_an_evaluation_that_asks_questions_is_broken_off(run, tmp_path):
    trainer, asked = run(tmp_path), []
    question = torch.tensor([[5, 6, 7]])

    def examine():
        for _ in range(5):
            asked.append(trainer.model.generate(question, max_new_tokens=1))
            if trainer.state.global_step == 2 and len(asked) == 2:
                tell()
        return {"asked": len(asked)}

    trainer.examine = examine
    stop(trainer)
    assert len(asked) == 2 and names(tmp_path) == ["checkpoint-2"] and not trainer.model._forward_pre_hooks
    assert not evaluated(trainer)


def test_the_best_model_is_the_same_where_its_evaluation_came_late(run, tmp_path):
    """Each next evaluation is worse, or better."""
    best = dict(load_best_model_at_end=True, metric_for_best_model="loss", save_steps=2, max_steps=4)
    for better in (True, False):
        found = []
        for told in ((), ("prediction_step", 2), ("training_step", 1)):
            folder = tmp_path / f"{better} {told}"
            trainer = run(folder, greater_is_better=better, **best)
            if told:
                telling(trainer, *told)
                stop(trainer)
                trainer = run(folder, greater_is_better=better, **best)
            trainer.train("auto")
            found.append((trainer.state.best_global_step, weights(trainer)))
        assert len({step for step, _ in found}) == 1 and all(same(found[0][1], other) for _, other in found)


def test_workers_that_are_told_to_stop_go_on_reading(run, tmp_path):
    """A scheduler tells all processes of a machine; without workers, the step would have no batch."""
    settings = dict(dataloader_num_workers=2, eval_strategy="no", save_strategy="no")
    trainer, told = run(tmp_path / "told", **settings), []
    stock, others = trainer.training_step, {process.pid for process in multiprocessing.active_children()}

    def workers():
        return [process for process in multiprocessing.active_children() if process.pid not in others]

    def training_step(*args, **kwargs):
        # At the other steps one of the two may not have begun.
        for worker in workers() if trainer.state.global_step in (1, 2, 3) else ():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                os.kill(worker.pid, number)
                told.append(worker.pid)
        return stock(*args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    quiet = run(tmp_path / "quiet", **settings)
    quiet.train()
    assert len(set(told)) >= 2 and trainer.state.global_step == 5 and same(weights(trainer), weights(quiet))
    for worker in workers():
        worker.join(10)
    assert not workers()


def test_a_run_outside_of_the_main_thread_is_left_alone(run, tmp_path):
    before, trainer = signal.getsignal(signal.SIGTERM), run(tmp_path, max_steps=1, eval_strategy="no")
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 1 and signal.getsignal(signal.SIGTERM) is before


def test_before_and_after_training_a_process_ends_at_once(capfd):
    reached = []

    @exiting_when_told()
    def work():
        tell(signal.SIGUSR1)
        reached.append("after")

    with pytest.raises(SystemExit) as stopped:
        work()
    assert stopped.value.code == 75 and not reached and "stopped by SIGUSR1" in capfd.readouterr().err


def told_at(monkeypatch, step):
    """Have any run told at a step."""
    stock = VLMTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            tell()
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(VLMTrainer, "training_step", training_step)


def test_one_command_is_started_until_it_is_done(backbones, data, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Stopped, it leaves no model and no card; done, it says so and changes nothing."""
    out = tmp_path / "out"
    command = [*backbones(), *data, *QUICK, "--max_steps", "3", "--resume_from_checkpoint", "auto", "--output_dir"]
    for step in (1, 2):
        with monkeypatch.context() as patch:
            told_at(patch, step - 1)
            with pytest.raises(SystemExit) as stopped:
                train_pretrain.main([*command, str(out)])
        assert stopped.value.code == 75 and not {"model.safetensors", "README.md"} & set(names(out))
        assert numbered(out)[0].name == f"checkpoint-{step}"
    train_pretrain.main([*command, str(out)])
    assert {"model.safetensors", "README.md"} <= set(names(out))
    assert "going on from" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if not path.name.startswith("_")}
    train_pretrain.main([*command, str(out)])
    assert f"the run in {out} has come to its end: nothing is left to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}
    train_pretrain.main([*command, str(tmp_path / "whole")])
    one, other = (VLMForConditionalGeneration.from_pretrained(folder) for folder in (out, tmp_path / "whole"))
    assert same(dict(one.named_parameters()), dict(other.named_parameters()))


def test_the_librarys_own_way_of_stopping_is_refused(tmp_path):
    with pytest.raises(DuetError, match="enable_jit_checkpoint would do nothing: SIGTERM and SIGUSR1"):
        VLMTrainingArguments(output_dir=str(tmp_path), enable_jit_checkpoint=True)
