"""After the first step that counts, what was declared has changed and nothing else has; what is wrong is caught."""

import functools
import itertools
from types import SimpleNamespace

import pytest
import torch

from processing import DuetError
from tests import tiny
from tests.test_plan import planned
from tests.test_resume import names
from tests.test_tuning import composed_of_any  # noqa: F401
from training_vlm.learning.lora import adapt
from training_vlm.learning.tuning import make_plan
from training_vlm.learning.verify import Verification, checksums
from training_vlm.policy import TuningArguments


class Steps:
    """Steps of an optimizer with the check around them, as the loop of the Trainer has them."""

    def __init__(self, model, tuning, batch, optimizer=torch.optim.AdamW):
        self.model, self.batch = model.train(), batch
        self.plan = make_plan(model, tuning)
        self.plan.apply(model)
        self.accelerator = SimpleNamespace(optimizer_step_was_skipped=False)
        self.args, self.state = SimpleNamespace(world_size=1), SimpleNamespace(global_step=0)
        self.guard = SimpleNamespace(stopped=False)
        self.declared = lambda: self.plan
        self.learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = optimizer(self.learning, lr=1e-3)
        self.check = Verification(self)
        self.told = dict(model=model, optimizer=self.optimizer)
        self.check.on_train_begin(self.args, self.state, None)

    def step(self, rate=1e-3, skipped=False, between=lambda: None):
        self.check.on_step_begin(self.args, self.state, None, **self.told)
        self.optimizer.param_groups[0]["lr"] = rate
        self.accelerator.optimizer_step_was_skipped = skipped
        self.model(**self.batch).loss.backward()
        if not skipped:
            self.optimizer.step()
        between()
        self.check.on_optimizer_step(self.args, self.state, None, **self.told)
        self.optimizer.zero_grad()
        self.state.global_step += 1


WORDS = ["frozen", "last:1", "full"]
POLICIES = [TuningArguments(vision, "full", text) for vision, text in itertools.product(WORDS, WORDS)]
POLICIES += [TuningArguments("frozen", "frozen", "full"), TuningArguments("last:1", "frozen", "frozen")]
SAID = [f"{policy.tune_vision}, {policy.tune_projector}, {policy.tune_text}" for policy in POLICIES]


def first(names, *parts):
    return sorted(name for name in names if any(part in name for part in parts))[0]


def without(steps, parameter):
    """Take a parameter from the optimizer."""
    group = steps.optimizer.param_groups[0]
    group["params"] = [other for other in group["params"] if other is not parameter]


def caught(model, tuning, batch, says, mutate=lambda steps: None, **told):
    steps = Steps(model, tuning, batch)
    mutate(steps)
    with pytest.raises(DuetError) as error:
        steps.step(**told)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert steps.guard.stopped, "what was learned would be rescued"


@pytest.mark.parametrize("tuning", POLICIES, ids=SAID)
def test_the_declared_step_passes_and_each_mutant_of_it_is_caught(composed_of_any, image, tuning):  # noqa: F811
    model, processor = composed_of_any
    batch = tiny.collate(processor, tiny.ragged_dialogues(image)[:3])
    good = Steps(model, tuning, batch)
    good.step()
    good.step()
    assert good.check._done and not good.guard.stopped

    parameters, declared = dict(model.named_parameters()), good.plan.learning
    others = sorted(parameters.keys() - declared)
    one, *_, last = sorted(name for name in declared if parameters[name].dim() > 1) * 2
    told = model, tuning, batch
    caught(*told, f"{one} was declared to learn, was reached", lambda steps: without(steps, parameters[one]))
    caught(*told, f"{last} was declared to learn and is frozen", lambda _: parameters[last].requires_grad_(False))
    for name in others[:1] + others[-1:]:
        changed = f"{name} was not declared to learn and has changed"
        caught(*told, changed, between=functools.partial(flip, parameters[name]))
        learns = functools.partial(parameters[name].requires_grad_, True)
        caught(*told, f"{name} learns and was not declared to", lambda _, learns=learns: learns())
    wrong = TuningArguments(tuning.tune_text, tuning.tune_projector, tuning.tune_vision)
    if tuning.tune_text != tuning.tune_vision:
        caught(*told, "not what was declared", lambda _: make_plan(model, wrong).apply(model))


@torch.no_grad()
def flip(parameter):
    """The last bit of one number."""
    flat = parameter.data.view(-1)
    flat[-1] = torch.nextafter(flat[-1], torch.tensor(9e9))


TEXT = TuningArguments(tune_text="full")


def steps_of(composed, image, tuning=TEXT, **settings):
    model, processor = composed
    return Steps(model, tuning, tiny.collate(processor, tiny.ragged_dialogues(image)[:3]), **settings)


def test_a_step_of_rate_0_or_one_that_a_scaler_skips_is_not_the_first(composed, image):
    steps = steps_of(composed, image)
    steps.step(rate=0.0)
    steps.step(skipped=True)
    assert not steps.check._done
    with pytest.raises(DuetError, match="at step 3.*was not declared to learn and has changed"):
        steps.step(between=lambda: flip(next(steps.model.model.vision_tower.parameters())))


def test_what_changes_while_the_rate_is_0_is_found_at_the_first_step(composed, image):
    steps = steps_of(composed, image)
    steps.step(rate=0.0, between=lambda: flip(next(steps.model.model.vision_tower.parameters())))
    with pytest.raises(DuetError, match="at step 2.*vision_tower"):
        steps.step()


def test_a_norm_of_ones_may_stand_still_as_long_as_the_rate_is_too_small_to_show(composed, image):
    steps = steps_of(composed, image)
    norms = [p for p in steps.learning if p.dim() == 1 and bool((p == 1).all())]
    for rate in (1e-9, 2e-9, 3e-9):
        steps.step(rate)
        assert not steps.check._done
    assert norms and all(bool((norm == 1).all()) for norm in norms)
    steps.step(1e-3)
    steps.step(1e-3)
    assert steps.check._done


def test_a_norm_that_no_optimizer_moves_is_caught_when_the_rate_has_grown(composed, image):
    steps = steps_of(composed, image)
    without(steps, next(p for p in steps.learning if p.dim() == 1 and bool((p == 1).all())))
    steps.step(1e-9)
    with pytest.raises(DuetError, match="was declared to learn, was reached by a gradient and has not changed"):
        steps.step(1e-3)


def test_what_no_gradient_reaches_may_stay(composed, image):
    """Text alone reaches no projector."""
    model, processor = composed
    batch = tiny.collate(processor, [tiny.ragged_dialogues(image)[3]])
    steps = Steps(model, TuningArguments(tune_vision="last:1", tune_text="full"), batch, optimizer=torch.optim.SGD)
    steps.step()
    steps.step()
    assert steps.check._done


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int8])
def test_a_checksum_changes_with_any_bit_and_with_the_order_of_numbers(dtype):
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 3, 7, 8, 9, 1000, 300_001):
        numbers = torch.randint(-100, 100, (count,), generator=generator).to(dtype)
        (before,) = checksums([numbers])
        assert [before] == checksums([numbers.clone()])
        for place in {0, count // 2, count - 1}:
            for bit in range(8 * numbers.element_size()):
                changed = numbers.clone()
                changed.view(torch.uint8)[place * numbers.element_size() + bit // 8] ^= 1 << bit % 8
                assert checksums([changed]) != [before]
        if count > 2 and not torch.equal(numbers.flip(0), numbers):
            assert checksums([numbers.flip(0)]) != [before]
    same_step = torch.ones(4096, dtype=dtype)
    assert len({checksums([same_step])[0], checksums([same_step + 1])[0]}) == 2
    assert checksums([torch.ones(8, 6, dtype=dtype).t()]) == checksums([torch.ones(6, 8, dtype=dtype)])


def test_a_checksum_reads_weights_that_lie_askew():
    """Views into a file or a flat buffer begin anywhere."""
    raw = torch.arange(4096, dtype=torch.uint8).repeat(2)
    for shift in (1, 2, 4):
        askew = raw[shift : shift + 1024]
        assert checksums([askew]) == checksums([askew.clone()])


def test_a_run_that_is_not_as_declared_stops_before_anything_is_saved(folders, image, tmp_path):
    """Warm-up, accumulated steps and a save at each step; the rate is 0 at the first, so the second counts."""
    trainer = planned(
        folders, tiny.ragged_dialogues(image), tmp_path, TuningArguments(tune_text="last:1"), warmup_steps=3,
        gradient_accumulation_steps=2, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    decoy = trainer.model.model.vision_tower.get_parameter("embeddings.cls_token")
    trainer.create_optimizer().add_param_group({"params": [decoy], "lr": 1e-3})
    decoy.grad = torch.ones_like(decoy)
    trainer.model.zero_grad = lambda *args, **kwargs: None
    with pytest.raises(DuetError, match="at step 2.*embeddings.cls_token was not declared"):
        trainer.train()
    assert names(tmp_path) == ["checkpoint-1"]
    assert trainer.rescue() is None


def test_a_run_as_declared_is_verified_with_warm_up_and_goes_on(folders, image, tmp_path, pair):
    trainer = planned(
        folders, tiny.ragged_dialogues(image), tmp_path, TuningArguments("last:1", "full", "full"), pair,
        warmup_steps=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    check = next(one for one in trainer.callback_handler.callbacks if isinstance(one, Verification))
    trainer.train()
    assert check._done and trainer.state.global_step == 6


ADAPTED = {
    "language model": TuningArguments(tune_text="lora"),
    "language model, DoRA": TuningArguments(tune_text="lora", use_dora=True),
    "encoder": TuningArguments(tune_vision="lora"),
    "both, no projector": TuningArguments("lora", "frozen", "lora"),
    "language model, last block of the encoder": TuningArguments("last:1", "full", "lora"),
    "encoder, whole language model": TuningArguments("lora", "full", "full"),
}


@pytest.mark.parametrize("which", ADAPTED)
def test_of_adapters_their_b_moves_and_what_they_stand_on_does_not(composed_of_any, image, which):  # noqa: F811
    (model, processor), tuning = composed_of_any, ADAPTED[which]
    sides = [side for side in ("vision", "text") if getattr(tuning, f"tune_{side}") == "lora"]
    if tuning.use_dora and model.config.text_config.model_type == "mixtral":
        tuning = TuningArguments(tune_text="lora", use_rslora=True)  # peft has no DoRA of experts in one tensor
    own = {name for name, _ in model.named_parameters()}
    adapted = adapt(model, tuning, sides, "base", None)
    batch = tiny.collate(processor, tiny.ragged_dialogues(image)[:3])
    steps = Steps(adapted, tuning, batch, functools.partial(torch.optim.AdamW, weight_decay=0.0))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    steps.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    backs = {name for name in before if "lora_B" in name}
    tuned = [place for side, place in (("vision", "vision_tower"), ("text", "language_model")) if side in sides]
    assert backs and all(any(place in name for name in backs) for place in tuned)
    assert backs <= moved <= steps.plan.learning and not any("lora_A" in name for name in moved)
    assert not {name.replace(".base_layer", "") for name in moved if any(place in name for place in tuned)} & own
    steps.step()
    assert steps.check._done and not steps.guard.stopped

    one = min(name for name in backs if stands_on(name) in before)
    for says, mutate, between in (
        ("was declared to learn, was reached", lambda steps: without(steps, model.get_parameter(one)), None),
        ("was not declared to learn and has changed", None, lambda: flip(model.get_parameter(stands_on(one)))),
    ):
        steps = Steps(adapted, tuning, batch)
        if mutate is not None:
            mutate(steps)
        with pytest.raises(DuetError, match=says):
            steps.step(between=between or (lambda: None))


def stands_on(name):
    """The weight that an adapter is added to."""
    return f"{name.partition('.lora_')[0]}.base_layer.weight"
