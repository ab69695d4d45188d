"""A run stops where it no longer learns: the first loss or gradient that is not finite, or nothing that reaches it."""

import math

import pytest
import torch

from processing.data_error_vlm import DuetError
from tests import tiny
from tests.test_resume import names
from tests.test_trainer import Stream, same, trainer_of, weights
from training_vlm.learning.checkpoints import fault, newest_whole
from training_vlm.learning.tuning import apply_tuning


def items_of(image, count=8):
    """Conversations with a place in a file."""
    found = tiny.ragged_dialogues(image)[:count]
    return [{**item, "source": "talk.jsonl", "row": row} for row, item in enumerate(found)]


class Poison:
    """A loss, or a gradient, that is no number when a row is learned from for the n-th time."""

    def __init__(self, trainer, row, value=math.nan, gradient=False):
        self.trainer, self.row, self.value, self.gradient = trainer, row, value, gradient
        self.compute_loss, trainer.compute_loss = trainer.compute_loss, self

    def __call__(self, model, inputs, *args, **kwargs):
        rows = [record.row for record in inputs["account"].records] if "account" in inputs else []
        loss = self.compute_loss(model, inputs, *args, **kwargs)
        if model.training and self.row in rows:
            if self.gradient:
                loss.register_hook(lambda gradient: gradient * self.value)
            else:
                loss = loss + self.value
        return loss


def run(folders, image, folder, **changes):
    settings = dict(train_sampling_strategy="sequential", save_strategy="steps", save_steps=1, max_steps=4)
    trainer = trainer_of("vit-gpt2", folders, items_of(image), folder, **{**settings, **changes})
    trainer.data_collator.account = True
    return trainer


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_run_stops_at_the_first_step_that_is_not_finite(folders, image, tmp_path, gradient, value, clip):
    """Rows 4 and 5 are the third step; the second is the last good one, and rotation has not taken it."""
    trainer = run(folders, image, tmp_path, save_total_limit=1, max_grad_norm=clip)
    Poison(trainer, 4, value, gradient)
    with pytest.raises(DuetError) as error:
        trainer.train()
    line = str(error.value)
    assert "\n" not in line and "at step 3" in line and ("gradient norm" if gradient else "the loss is") in line
    assert "talk.jsonl, row 4; talk.jsonl, row 5" in line and "row 3" not in line and "checkpoint-2 is the last" in line
    assert names(tmp_path) == ["checkpoint-2"] and fault(tmp_path / "checkpoint-2") is None


def test_of_a_step_of_several_batches_the_rows_of_the_guilty_one_are_named(folders, image, tmp_path):
    trainer = run(folders, image, tmp_path, gradient_accumulation_steps=2)
    Poison(trainer, 6)
    with pytest.raises(DuetError, match="at step 2 .learned there: talk.jsonl, row 6; talk.jsonl, row 7.;"):
        trainer.train()
    assert names(tmp_path) == ["checkpoint-1"]


def test_what_is_logged_of_a_run_is_what_was(folders, image, tmp_path):
    trainer = run(folders, image, tmp_path, max_steps=2)
    trainer.train()
    assert not trainer.args.logging_nan_inf_filter
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("settings", [{"learning_rate": 1e6}, {"learning_rate": 1e25, "max_grad_norm": 0.0}])
def test_a_rate_that_is_far_too_high_saves_nothing_that_is_not_finite(folders, image, tmp_path, settings):
    trainer = run(folders, image, tmp_path, max_steps=40, lr_scheduler_type="constant", **settings)
    try:
        trainer.train()
        trainer.save_model()
    except DuetError as error:
        assert "smaller learning_rate" in str(error)
    else:
        assert settings["learning_rate"] == 1e6  # AdamW moves each weight by a million a step, and may stay finite
    assert "model.safetensors" not in names(tmp_path) or all(w.isfinite().all() for w in weights(trainer).values())


def test_half_precision_that_overflows_stops(folders, image, tmp_path):
    trainer = run(folders, image, tmp_path, learning_rate=1.0, max_steps=30, lr_scheduler_type="constant")
    trainer.model.to(torch.float16)
    with pytest.raises(DuetError, match="float32"):
        trainer.train()
    good = newest_whole(tmp_path)
    assert good is None or fault(good) is None


def test_weights_that_are_not_finite_are_never_saved(folders, image, tmp_path):
    """The loss was finite: what learns was not used, or the optimiser broke it."""
    trainer = run(folders, image, tmp_path, max_steps=2, save_strategy="no")
    trainer.train()
    trainer.save_model()
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        trainer.model.lm_head.weight[7, 3] = math.inf
    with pytest.raises(DuetError, match="no longer finite after step 2 .*weight"):
        trainer.save_model()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    trainer.args.save_strategy = "steps"
    with pytest.raises(DuetError, match="no longer finite"):
        trainer._save_checkpoint(trainer.model, None)
    assert not any(name.startswith("checkpoint") for name in names(tmp_path))


@pytest.mark.parametrize("skipped", [5, 40])
def test_steps_that_a_scaler_skips_are_none_and_twenty_in_a_row_stop(folders, image, tmp_path, skipped):
    """As fp16 does on a GPU: scaled losses overflow until the scale has been halved so many times."""
    trainer = run(folders, image, tmp_path, max_steps=30, save_strategy="no")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (120 + skipped // 10), growth_interval=1000)
    trainer.accelerator.scaler = scaler
    trainer.accelerator.unscale_gradients = lambda: scaler.unscale_(trainer.optimizer.optimizer)
    compute = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: compute(*args, **kwargs) * 2.0**skipped
    if skipped < 20:
        trainer.train()
        assert trainer.state.global_step == 30 and scaler.get_scale() < 2.0**120
    else:
        with pytest.raises(DuetError, match="skipped 20 steps in a row at step 20"):
            trainer.train()
        assert scaler.get_scale() == 2.0**105  # halved at each of nineteen


# Nothing reaches what learns.


def talk(image, pictures, count):
    return [
        tiny.dialogue("what is it?", "a cat", *([image(n)] if n in pictures else [])) for n in range(count)
    ]  # fmt: skip


def projector_only(folders, items, folder, **settings):
    trainer = trainer_of(
        "vit-gpt2", folders, items, folder, train_sampling_strategy="sequential", per_device_train_batch_size=1,
        **settings,
    )  # fmt: skip
    apply_tuning(trainer.model, "frozen", "frozen")
    return trainer


@pytest.mark.parametrize(
    "settings, step", [({"max_steps": 3}, 3), ({"max_steps": 50}, 6), ({"max_steps": -1, "num_train_epochs": 4}, 6)]
)
def test_a_run_in_which_nothing_reaches_what_learns_stops(folders, image, tmp_path, settings, step):
    """At its end, or after an epoch, whichever comes first."""
    trainer = projector_only(folders, talk(image, (), 6), tmp_path, **settings)
    with pytest.raises(DuetError, match=rf"reached what learns \(projector\) in the first {step} steps") as error:
        trainer.train()
    assert "\n" not in str(error.value)


def test_a_stream_in_which_nothing_reaches_what_learns_stops(folders, image, tmp_path, monkeypatch):
    monkeypatch.setattr("training_vlm.learning.guard.CONVERSATIONS", 25)
    trainer = projector_only(folders, Stream(talk(image, (), 6)), tmp_path, max_steps=100)
    with pytest.raises(DuetError, match="in the first 25 steps"):
        trainer.train()


def test_batches_of_text_alone_are_no_reason_to_stop(folders, image, tmp_path):
    trainer = projector_only(folders, talk(image, (5,), 6), tmp_path, max_steps=6)
    before = weights(trainer)
    trainer.train()
    assert not same(weights(trainer), before)


def test_where_the_language_model_learns_text_is_enough(folders, image, tmp_path):
    trainer = trainer_of("vit-gpt2", folders, talk(image, (), 6), tmp_path, max_steps=3)
    trainer.train()
    assert trainer.state.global_step == 3
