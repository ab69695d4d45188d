"""What a run does with its time: each line of the log is of the steps since the one before, and of nothing else."""

import json

import pytest
import torch

from tests import tiny
from tests.test_guard import items_of
from tests.test_trainer import trainer_of
from training_vlm.learning import meter
from training_vlm.learning.meter import table


FETCH, STEP, EVALUATION, SAVING = 1.0, 3.0, 50.0, 20.0  # seconds that each takes


class Clock:
    """Goes on when something is done."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def slow(self, function, seconds):
        def slowed(*args, **kwargs):
            self.now += seconds
            return function(*args, **kwargs)

        return slowed


@pytest.fixture
def timed(folders, image, tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(meter, "time", clock)

    def made(folder="run", accumulation=1, **changes):
        settings = dict(train_sampling_strategy="sequential", max_steps=4, gradient_accumulation_steps=accumulation)
        trainer = trainer_of(
            "vit-gpt2", folders, items_of(image) * accumulation, tmp_path / folder, **{**settings, **changes}
        )
        trainer.data_collator.account = True
        trainer.data_collator = clock.slow(trainer.data_collator, FETCH)
        compute_loss = trainer.compute_loss
        slow, slow_evaluation = clock.slow(compute_loss, STEP), clock.slow(compute_loss, EVALUATION)
        trainer.compute_loss = lambda model, *args, **kwargs: (slow if model.training else slow_evaluation)(
            model, *args, **kwargs
        )
        trainer._write_model = clock.slow(trainer._write_model, SAVING)
        return trainer

    return made


def lines(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def records_of(trainer, accumulation=1):
    """The records of each step, in order."""
    items, size = trainer.train_dataset, 2 * accumulation
    return [trainer.data_collator(items[first : first + size])["account"] for first in range(0, len(items), size)]


def test_a_line_has_the_rates_and_shares_of_its_steps(timed):
    """accelerate's loader fetches one batch ahead: two before the first step, none before the last."""
    trainer = timed()
    trainer.train()
    waits = (0, FETCH, FETCH, 0)
    for line, wait, account in zip(lines(trainer), waits, records_of(trainer), strict=True):
        supervised, seconds = sum(record.supervised for record in account.records), STEP + wait
        assert line["supervised_tokens_per_second"] == pytest.approx(supervised / seconds, rel=1e-3)
        assert line["samples_per_second"] == pytest.approx(2 / seconds, rel=1e-3)
        assert line["data_wait_share"] == pytest.approx(wait / seconds, rel=1e-3)
        assert line["padding_share"] == pytest.approx(account.padding / account.run, rel=1e-3)
        assert line["supervised_share"] == pytest.approx(supervised / account.run, rel=1e-3)
    assert trainer.meter.seconds["start"] == 2 * FETCH


def test_all_micro_batches_of_a_step_are_counted(timed):
    trainer = timed(accumulation=3)
    trainer.train()
    last = records_of(trainer, 3)[-1]
    supervised = sum(record.supervised for record in last.records)
    seconds = 3 * STEP + 2 * FETCH
    assert lines(trainer)[-1]["supervised_tokens_per_second"] == pytest.approx(supervised / seconds, rel=1e-3)
    assert lines(trainer)[-1]["samples_per_second"] == pytest.approx(6 / seconds, rel=1e-3)


def test_evaluations_and_checkpoints_are_no_training_time(timed):
    plain = timed("plain")
    plain.train()
    busy = timed("busy", eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=2)
    busy.train()
    names = ("supervised_tokens_per_second", "samples_per_second", "data_wait_share")
    assert [[line[name] for name in names] for line in lines(busy)] == [
        [line[name] for name in names] for line in lines(plain)
    ]
    report = busy.meter.report()
    assert report["checkpoint_seconds"] == 2 * SAVING and report["evaluation_seconds"] > 4 * EVALUATION
    assert report["training_seconds"] == plain.meter.report()["training_seconds"]


def test_right_after_resuming_a_line_is_of_the_step_alone(timed):
    """Neither of what was counted before, nor of the time in which the loader passes over it."""
    whole = timed("run", save_strategy="steps", save_steps=2)
    whole.train()
    resumed = timed("again")
    resumed.train(resume_from_checkpoint=str(whole.run_folder / "checkpoint-2"))
    assert lines(resumed)[2]["samples_per_second"] == pytest.approx(2 / STEP, rel=1e-3)
    assert resumed.meter.report()["first_step"] == 3
    assert resumed.meter.report()["samples_per_second"] == pytest.approx(4 / (2 * STEP), rel=1e-3)
    assert resumed.meter.seconds["start"] == 2 * FETCH


def test_the_end_of_a_run_sums_it_up(timed):
    trainer = timed(eval_strategy="steps", eval_steps=2)
    trainer.train()
    report = trainer.meter.report()
    training, waiting = report["training_seconds"], report["data_wait_seconds"]
    supervised = trainer.account.total["supervised"]
    assert (training, waiting) == (4 * STEP, 2 * FETCH)
    assert report["supervised_tokens_per_second"] == pytest.approx(supervised / (training + waiting), rel=1e-3)
    assert report["necessary_flops_per_second"] * (training + waiting) == pytest.approx(report["necessary_flops"])
    shown = table(json.loads(json.dumps(report)))
    for part in ("waiting for data", "evaluation", "supervised tokens and", "samples a second", "TFLOP/s"):
        assert part in shown
    trainer.evaluate()  # after the run
    assert trainer.meter.report() == report


def test_without_accounts_the_time_is_known_and_no_count_is_made_up(folders, image, tmp_path):
    trainer = trainer_of("vit-gpt2", folders, tiny.ragged_dialogues(image), tmp_path, max_steps=2)
    trainer.train()
    assert all("samples_per_second" not in line and "data_wait_share" in line for line in lines(trainer))
    assert "necessary_flops" not in trainer.meter.report() and "training" in table(trainer.meter.report())


def test_no_device_is_asked_for_anything(timed, monkeypatch):
    """Reading a number from a tensor would wait for the device: what is counted comes as numbers of Python."""
    trainer = timed()
    batch = trainer.data_collator(trainer.train_dataset[:2])
    account = batch.pop("account")
    trainer.meter.on_train_begin(trainer.args, trainer.state, trainer.control)
    for name in ("item", "tolist", "cpu", "__bool__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, None)
    trainer.meter.saw(batch, account)
    trainer.meter.log_line()
    assert trainer.meter.counts["samples"] == 2
