"""The loss without its logits: the same to rounding, whatever the head is, and never whole."""

import pytest
import torch
from torch import nn

from modeling_vlm import DuetError, loss_vlm
from modeling_vlm.loss_vlm import IGNORE
from tests.segments import forest, model_of, off


HEADS = ["Llama", "GPT-2", "Phi", "Granite", "Cohere", "Gemma 2", "Mixtral"]
"""Of its own; tied; with a bias; scaled; tied and scaled; behind a soft cap; beside a balance loss."""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setitem(loss_vlm.LOGITS_AT_A_TIME, "cpu", 5 * 376)


def setting(name="Llama", **settings):
    model = model_of(name, **settings)
    batch = forest(model, torch.Generator().manual_seed(0)).padded
    return model, batch


def step(model, batch, **kwargs):
    model.zero_grad()
    outputs = model(**batch, **kwargs)
    outputs.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return outputs, gradients


def assert_the_same(model, batch, most=1e-5, **kwargs):
    expected, gradients = step(model, batch, **kwargs)
    found, again = step(model, batch, skip_logits=True, **kwargs)
    assert found.logits is None
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=most)
    assert again.keys() == gradients.keys()
    flat, others = (torch.cat([one[name].flatten() for name in gradients]) for one in (gradients, again))
    assert off(others, flat) <= most


@pytest.mark.parametrize("name", HEADS)
def test_loss_and_gradients_are_those_with_the_logits(name):
    settings = {"output_router_logits": True, "router_aux_loss_coef": 0.5} if name == "Mixtral" else {}
    assert_the_same(*setting(name, **settings))


@pytest.mark.parametrize(
    "smoothing, weighted, count", [(0.1, False, None), (0.0, True, 7), (0.2, True, torch.tensor(90))]
)
def test_smoothing_weights_and_the_count_of_the_step_are_the_same(smoothing, weighted, count):
    model, batch = setting()
    if weighted:
        batch["loss_weights"] = torch.rand(batch["labels"].shape)
    assert_the_same(model, batch, smoothing=smoothing, num_items_in_batch=count)


@pytest.mark.parametrize("learns", ["the head alone", "all but the head"])
def test_what_does_not_learn_has_no_gradient(learns):
    model, batch = setting()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("lm_head") == (learns == "the head alone"))
    assert_the_same(model, batch)


def test_under_autocast_it_is_within_the_rounding_of_its_type():
    model, batch = setting()
    with torch.autocast("cpu", torch.bfloat16):
        assert_the_same(model, batch, most=1e-2)


def test_gradients_too_small_for_float16_are_not_lost():
    """A large vocabulary and a long step, as a scaler meets them: it multiplies the loss, not the parts."""
    model, batch = setting()
    with torch.autocast("cpu", torch.float16):
        _, gradients = step(model, batch)
        model.zero_grad()
        (model(**batch, num_items_in_batch=10**9, skip_logits=True).loss * 1e9).backward()
    share = (batch["shift_labels"] != IGNORE).sum()
    assert off(model.lm_head.weight.grad.flatten() / share, gradients["lm_head.weight"].flatten()) <= 1e-2


@pytest.mark.slow
def test_a_compiled_model_learns_the_same():
    model, batch = setting()
    expected, gradients = step(model, batch)
    torch._dynamo.reset()
    found, again = step(torch.compile(model, backend="eager"), batch, skip_logits=True)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    again = {name.removeprefix("_orig_mod."): gradient for name, gradient in again.items()}
    assert off(*(torch.cat([one[name].flatten() for name in gradients]) for one in (again, gradients))) <= 1e-5


def test_the_loss_may_be_multiplied_before_its_gradients():
    model, batch = setting()
    _, expected = step(model, batch)
    model.zero_grad()
    (model(**batch, skip_logits=True).loss * 3).backward()
    torch.testing.assert_close(model.lm_head.weight.grad, 3 * expected["lm_head.weight"], rtol=1e-4, atol=1e-7)


def test_an_adapter_on_the_head_learns_the_same():
    peft = pytest.importorskip("peft")
    model, batch = setting()
    config = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    assert_the_same(model, batch)
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.grad is not None} == {"default"}


def scaled(head):
    """An observer that changes what it sees."""
    head.register_forward_hook(lambda module, inputs, logits: logits * 2)


def scaled_before(head):
    head.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))


def gathered(head):
    """As DeepSpeed's stage 3: the weight is there while the head is called, and for its gradient."""
    whole, nothing = head.weight.data.clone(), torch.empty(0)

    def holds(data):
        def hold(module, *_):
            module.weight.data = data

        return hold

    head.weight.ds_id = 0
    head.register_forward_pre_hook(holds(whole))
    head.register_forward_hook(holds(nothing))
    head.register_full_backward_pre_hook(holds(whole))
    head.weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "data", nothing))
    head.weight.data = nothing


def dispatched(head):
    """As a layer whose weights accelerate keeps elsewhere."""
    accelerate = pytest.importorskip("accelerate")
    hook = accelerate.hooks.ModelHook()
    hook.post_forward = lambda module, logits: logits * 2
    accelerate.hooks.add_hook_to_module(head, hook)


@pytest.mark.parametrize("hooked", [scaled, scaled_before, gathered, dispatched])
def test_what_hooks_of_the_head_do_is_done(hooked):
    model, batch = setting()
    plain, _ = step(model, batch)
    hooked(model.lm_head)
    assert_the_same(model, batch, smoothing=0.1)
    changed = model(**batch, skip_logits=True).loss - plain.loss
    assert changed.abs() < 1e-5 if hooked is gathered else changed.abs() > 1e-3


def test_a_hook_below_an_adapter_of_the_head_is_not_passed_over():
    peft = pytest.importorskip("peft")
    model, batch = setting()
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    scaled(model.base_model.lm_head.base_layer)
    calls = []
    model.base_model.lm_head.base_layer.register_forward_hook(lambda *_: calls.append(1))
    assert_the_same(model, batch)
    assert len(calls) == 2  # once without the logits too: hooks may wait for other processes, which have other parts


@pytest.mark.parametrize("gathers", ["an empty weight", "a flat one", "a mark of DeepSpeed"])
def test_a_weight_that_is_gathered_for_a_call_is_read_by_a_call_alone(gathers):
    head = nn.Linear(4, 6)
    assert not loss_vlm._acts_when_called(head)
    if gathers == "a mark of DeepSpeed":
        head.weight.ds_id = 0
    else:
        head.weight.data = torch.empty(0 if gathers == "an empty weight" else 24)
    assert loss_vlm._acts_when_called(head)


def kept(shape, form):
    if form == "a mask":
        return torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    return 3 if form == "the last" else torch.tensor([8, 2, 5])


@pytest.mark.parametrize("form", ["the last", "positions", "a mask"])
def test_the_loss_is_that_of_the_kept_positions(form):
    model, batch = setting()
    batch["loss_weights"] = torch.rand(batch["labels"].shape)
    keep = kept(batch["labels"].shape, form)
    assert_the_same(model, batch, logits_to_keep=keep)
    found = model(**batch, logits_to_keep=keep, skip_logits=True)
    whole = model(**batch, skip_logits=True)
    assert abs(found.loss - whole.loss) > 1e-4
    torch.testing.assert_close(found.token_costs, loss_vlm.keep_positions(whole.token_costs, keep))


def test_a_second_backward_is_refused_in_a_line():
    model, batch = setting()
    loss = model(**batch, skip_logits=True).loss
    loss.backward(retain_graph=True)
    with pytest.raises(DuetError, match="a backward has taken them; leave it out") as error:
        loss.backward()
    assert "\n" not in str(error.value)


def test_gradients_of_the_gradients_are_refused_and_those_of_the_loss_are_still_there():
    model, batch = setting()
    loss = model(**batch, skip_logits=True).loss
    with pytest.raises(DuetError, match="they have no graph, as create_graph wants; leave it out"):
        loss.backward(create_graph=True)
    loss.backward()
    assert model.lm_head.weight.grad.any()


def test_a_batch_without_anything_supervised_has_loss_zero_and_gradients_of_zero():
    model, batch = setting()
    batch["shift_labels"].fill_(IGNORE)
    outputs, gradients = step(model, batch, skip_logits=True)
    assert outputs.loss.item() == 0 and gradients and not any(one.any() for one in gradients.values())


def test_the_costs_are_those_of_each_position():
    model, batch = setting()
    batch["loss_weights"] = torch.rand(batch["labels"].shape)
    with torch.no_grad():
        logits = model(**batch).logits
        outputs = model.eval()(**batch, skip_logits=True)
    targets, weights = batch["shift_labels"], batch["loss_weights"]
    expected = loss_vlm.token_costs(logits, targets, weights).view_as(targets)
    assert expected.any()
    torch.testing.assert_close(outputs.token_costs, expected)
    count = (targets != IGNORE).sum()
    torch.testing.assert_close(outputs.loss, expected.sum() / count)


def test_the_logits_are_never_there_whole(monkeypatch):
    model, batch = setting("GPT-2")
    made, linear = [], nn.functional.linear

    def spy(inputs, weight, bias=None):
        logits = linear(inputs, weight, bias)
        if weight.shape[0] == model.lm_head.weight.shape[0]:
            made.append(len(logits.flatten(0, -2)))
        return logits

    monkeypatch.setattr(nn.functional, "linear", spy)
    step(model, batch, skip_logits=True)
    assert sum(made) == (batch["shift_labels"] != IGNORE).sum() > 4 * max(made)


def test_no_loss_is_asked_for_without_labels():
    model, batch = setting()
    with pytest.raises(DuetError, match="skip_logits leaves the loss, which needs labels"):
        model(input_ids=batch["input_ids"][4:], skip_logits=True)


def test_a_mixture_counts_a_prefix_as_often_as_texts_read_it():
    model = model_of("Mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
    batches = forest(model, torch.Generator().manual_seed(0))
    expected, gradients = step(model, batches.padded)
    found, again = step(model, batches.packed, skip_logits=True)
    assert expected.aux_loss.item() > 0
    torch.testing.assert_close(found.aux_loss, expected.aux_loss)
    assert off(*(torch.cat([one[name].flatten() for name in gradients]) for one in (again, gradients))) <= 1e-5
    once = [(start, end, -1, 0) for start, end, *_ in batches.segments]
    assert abs(model(**{**batches.packed, "segments": once}).aux_loss - expected.aux_loss) > 1e-4
