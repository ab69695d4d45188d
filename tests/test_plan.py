"""One plan says what learns and how fast; optimizer and log follow it, and what nothing would read is refused."""

from dataclasses import replace

import pytest
import torch
from transformers import TrainingArguments

from modeling_vlm import VLMForConditionalGeneration
from processing import DuetError
from tests import tiny
from tests.test_trainer import SETTINGS, same, trainer_of, weights
from training_vlm.learning.tuning import make_plan
from training_vlm.policy import TuningArguments


RATES = TuningArguments(
    tune_vision="last:1", tune_text="full", vision_learning_rate=1e-5, projector_learning_rate=3e-3,
    projector_weight_decay=0.2,
)  # fmt: skip


def planned(folders, items, folder, tuning, pair="vit-gpt2", **changes):
    """A Trainer whose model learns as declared."""
    trainer = trainer_of(pair, folders, items, folder, **changes)
    trainer.plan = make_plan(trainer.model, tuning, trainer.args)
    trainer.plan.apply(trainer.model)
    return trainer


def test_every_part_has_its_own_rate_and_decay(folders, image, tmp_path, pair):
    trainer = planned(folders, tiny.ragged_dialogues(image), tmp_path, RATES, pair, weight_decay=0.1)
    decaying = set(trainer.get_decay_parameter_names(trainer.model))
    group_of = {id(p): group for group in trainer.create_optimizer().param_groups for p in group["params"]}
    wanted = {"vision_tower": (1e-5, 0.1), "multi_modal_projector": (3e-3, 0.2)}
    for name, parameter in trainer.model.named_parameters():
        group = group_of.pop(id(parameter), None)
        assert (group is not None) is parameter.requires_grad
        if group is not None:
            rate, decay = next((said for part, said in wanted.items() if part in name), (1e-3, 0.1))
            assert group["lr"] == rate and group["weight_decay"] == (decay if name in decaying else 0)
    assert not group_of


def test_the_log_has_every_rate_of_the_step_that_was_made(folders, image, tmp_path):
    """A schedule scales all of them alike."""
    trainer = planned(folders, tiny.ragged_dialogues(image), tmp_path, RATES, warmup_steps=2)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["learning_rate"] for entry in logs[:3]] == [0, 5e-4, 1e-3]
    for entry in logs:
        assert entry["vision_learning_rate"] == pytest.approx(entry["learning_rate"] * 1e-2)
        assert entry["projector_learning_rate"] == pytest.approx(entry["learning_rate"] * 3)


def test_the_rate_of_the_run_written_for_each_part_is_the_same_run(folders, image, tmp_path):
    """Nothing but the order of groups could differ, and sums in a step do not cross them."""
    items, runs = tiny.ragged_dialogues(image), []
    for own in ({}, dict(vision_learning_rate=1e-3, projector_learning_rate=1e-3, projector_weight_decay=0.0)):
        trainer = planned(folders, items, tmp_path, TuningArguments("last:1", None, "full", **own))
        trainer.train()
        runs.append(weights(trainer))
        assert not [name for entry in trainer.state.log_history for name in entry if name.endswith("r_learning_rate")]
    assert same(*runs)


def test_a_part_with_another_rate_moves_with_that_rate(folders, image, tmp_path):
    """Of SGD a step is the rate times the gradient."""
    items, moved = tiny.ragged_dialogues(image), {}
    for rate in (1e-3, 4e-3):
        tuning = TuningArguments(tune_text="full", projector_learning_rate=rate)
        settings = dict(dropout=0.0, optim="sgd", max_steps=1, lr_scheduler_type="constant", max_grad_norm=0)
        trainer = planned(folders, items, tmp_path, tuning, **settings)
        before = weights(trainer)
        trainer.train()
        moved[rate] = {name: after - before[name] for name, after in weights(trainer).items()}
    for name, step in moved[1e-3].items():
        factor = 4 if "projector" in name else 1
        torch.testing.assert_close(moved[4e-3][name], factor * step, rtol=2e-2, atol=1e-7)


def test_a_pair_of_encoders_learns_in_both(folders):
    vision, text = folders("vit-gpt2")
    model = VLMForConditionalGeneration.from_backbones((vision, vision), text)
    for word, blocks in (("last:1", 1), ("last:2", 2)):
        part = make_plan(model, TuningArguments(tune_vision=word)).parts[0]
        for which in ("first", "second"):
            encoder = f"model.vision_tower.{which}."
            learning = {name.removeprefix(encoder).split(".")[1] for name in part.learning if name.startswith(encoder)}
            assert learning == {str(block) for block in range(3 - blocks, 3)}


SAID = {
    "vision_learning_rate=0.001: nothing of the vision encoder learns": dict(vision_learning_rate=1e-3),
    "projector_weight_decay=0.1: nothing of the projector learns": dict(
        tune_projector="frozen", tune_text="full", projector_weight_decay=0.1
    ),
    "projector_learning_rate=0: the projector would not learn": dict(projector_learning_rate=0.0),
    "tune_projector='last:1': expected full or frozen": dict(tune_projector="last:1"),
    "tune_vision='last:7': expected frozen, full, lora, or last:N with N from 1 to 3": dict(tune_vision="last:7"),
}


@pytest.mark.parametrize("says", SAID)
def test_a_policy_of_what_is_not_there_or_does_not_learn_is_one_line(composed, says):
    with pytest.raises(DuetError) as error:
        make_plan(composed[0], TuningArguments(**SAID[says]), TrainingArguments(use_cpu=True))
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "said, says",
    [
        (dict(load_in_4bit=True, load_in_8bit=True), "both given"),
        (dict(vision_learning_rate=float("nan")), "vision_learning_rate=nan: expected 0 or more"),
        (dict(lora_r=0), "lora_r=0: expected 1 or more"),
        (dict(lora_alpha=-1), "lora_alpha=-1: expected more than 0"),
        (dict(lora_dropout=1.0), "lora_dropout=1.0: expected 0 or more, and less than 1"),
        (dict(lora_r=8), "lora_r is about adapters"),
        (dict(use_dora=True, tune_text="full"), "use_dora is about adapters"),
    ],
)
def test_a_setting_that_cannot_be_or_does_nothing_is_one_line(said, says):
    with pytest.raises(DuetError) as error:
        TuningArguments(**said)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_an_optimizer_with_groups_of_its_own_takes_no_rates_of_parts(folders, image, tmp_path):
    trainer = planned(folders, tiny.ragged_dialogues(image), tmp_path, RATES)
    trainer.optimizer_cls_and_kwargs = torch.optim.SGD, {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0}
    with pytest.raises(DuetError, match="makes its groups itself"):
        trainer.create_optimizer()


def test_a_frozen_projector_leaves_the_others_to_learn(folders, image, tmp_path):
    tuning = TuningArguments(tune_projector="frozen", tune_text="last:1")
    trainer = planned(folders, tiny.ragged_dialogues(image), tmp_path, tuning, max_steps=2)
    before = weights(trainer)
    trainer.train()
    moved = {name for name, after in weights(trainer).items() if not torch.equal(after, before[name])}
    assert moved and all(".h.2." in name for name in moved)


def test_the_rate_of_a_run_is_that_of_what_has_none_of_its_own(composed):
    args = TrainingArguments(**{**SETTINGS, "output_dir": "out", "weight_decay": 0.3, "remove_unused_columns": False})
    found = {part.name: part for part in make_plan(composed[0], RATES, args).components()}
    assert (found["language model"].learning_rate, found["language model"].weight_decay) == (1e-3, 0.3)
    assert (found["vision encoder"].learning_rate, found["vision encoder"].policy) == (1e-5, "last:1")
    assert found["token embeddings"].policy == "full" and found["projector"].weight_decay == 0.2


OTHERS = {
    "the policy last:1, and here it has last:2": dict(tune_vision="last:2"),
    "the token embeddings had the policy full, and here it has frozen": dict(tune_text="last:1"),
    "the projector had the rate 0.003, and here it has 0.001": dict(projector_learning_rate=None),
    "the projector had the decay 0.2, and here it has 0.0": dict(projector_weight_decay=None),
}


def test_a_run_goes_on_with_its_own_policy_alone(folders, image, tmp_path):
    items, settings = tiny.ragged_dialogues(image), dict(save_strategy="steps", save_steps=2, max_steps=4)
    whole = planned(folders, items, tmp_path, RATES, **settings)
    whole.train()
    checkpoint = str(tmp_path / "checkpoint-2")
    for says, changed in OTHERS.items():
        trainer = planned(folders, items, tmp_path / "other", replace(RATES, **changed), **settings)
        with pytest.raises(DuetError) as error:
            trainer.train(resume_from_checkpoint=checkpoint)
        assert says in str(error.value) and "--model" in str(error.value) and "\n" not in str(error.value)
    again = planned(folders, items, tmp_path / "again", RATES, **settings)
    again.train(resume_from_checkpoint=checkpoint)
    assert same(weights(again), weights(whole))
