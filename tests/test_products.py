"""Attention by matrix products is the attention that it stands for, in outputs and in gradients, where it is taken."""

import pytest
import torch
from torch import nn
from transformers import AttentionInterface

from modeling_vlm import attention_vlm, products_vlm
from modeling_vlm.products_vlm import attend_by_products, by_products_where_faster
from tests.segments import forest, model_of, off, step


MODULE = nn.Module()  # which the library asks for its number of key groups
MODULE.num_key_value_groups, MODULE.is_causal = 3, True


def drawn(queries, keys, width=8, dtype=torch.float64, batch=2):
    torch.manual_seed(0)
    sizes = ((6, queries, width), (2, keys, width), (2, keys, width))
    return [torch.randn(batch, *size, dtype=dtype).requires_grad_() for size in sizes]


def outcome(attend, inputs, mask, **options):
    output = attend(MODULE, *inputs, mask, dropout=0.0, scaling=0.3, **options)[0]
    torch.manual_seed(1)
    return output, *torch.autograd.grad(output, inputs, torch.randn_like(output))


def mask_of(queries, keys):
    return (torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries)[None, None]


@pytest.mark.parametrize(
    "queries, keys, masked, causal",
    [(7, 7, False, True), (7, 7, False, False), (5, 9, True, False), (1, 4, True, False), (6, 6, False, True)],
)
@pytest.mark.parametrize("block", [3, 128])
def test_products_give_what_the_fused_attention_gives(queries, keys, masked, causal, block, monkeypatch):
    monkeypatch.setattr(products_vlm, "BLOCK", block)
    inputs, mask = drawn(queries, keys), mask_of(queries, keys) if masked else None
    found = outcome(attend_by_products, inputs, mask, is_causal=causal)
    expected = outcome(AttentionInterface()["sdpa"], inputs, mask, is_causal=causal)
    for one, other in zip(found, expected):
        assert one.shape == other.shape and torch.allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Gemma 3 text", "Mistral", "OPT"])
def test_a_row_by_products_has_the_loss_and_gradients_of_the_padded_batch(name, monkeypatch):
    monkeypatch.setattr(products_vlm, "BLOCK", 5)
    calls = []

    def always(fused):
        return lambda *args, **kwargs: calls.append(1) or attend_by_products(*args, **kwargs)

    monkeypatch.setattr(attention_vlm, "by_products_where_faster", always)
    model = model_of(name, "sdpa")
    batches = forest(model, torch.Generator().manual_seed(0))
    loss, gradients = step(model, batches.padded)
    assert not calls
    found, again = step(model, batches.packed)
    assert calls and abs(found - loss) <= 1e-5 * loss
    assert off(again, gradients) <= 1e-5


@pytest.mark.parametrize(
    "dtype, keys, dropout, autocast, products",
    [
        (torch.bfloat16, 9, 0.0, True, True),
        (torch.bfloat16, 9, 0.0, False, False),
        (torch.float32, 9, 0.0, True, True),
        (torch.float32, 9, 0.0, False, False),
        (torch.float64, 9, 0.0, True, False),
        (torch.bfloat16, 12, 0.0, True, False),
        (torch.bfloat16, 9, 0.1, True, False),
    ],
)
def test_products_are_taken_where_texts_are_of_a_moderate_length_under_autocast(
    dtype, keys, dropout, autocast, products, monkeypatch
):
    monkeypatch.setattr(products_vlm, "LONGEST", 10)
    taken = []
    attend = by_products_where_faster(lambda *args, **kwargs: taken.append("fused") or (None, None))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        attend(nn.Module(), *drawn(3, keys, dtype=dtype), mask_of(3, keys), dropout=dropout)
    assert (taken == []) == products


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_a_row_that_is_learned_under_autocast_goes_by_products(name, monkeypatch):
    types = []

    def seen(module, query, key, value, mask, **kwargs):
        types.append({query.dtype, key.dtype, value.dtype})
        return attend_by_products(module, query, key, value, mask, **kwargs)

    monkeypatch.setattr(products_vlm, "attend_by_products", seen)
    model = model_of(name, "sdpa")
    batches = forest(model, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        loss, found = (step(model, batch)[0] for batch in (batches.padded, batches.packed))
    assert types and all(found == {torch.bfloat16} for found in types)
    assert found == pytest.approx(loss, rel=1e-2)


def test_a_row_that_is_only_evaluated_does_not_go_by_products(monkeypatch):
    monkeypatch.setattr(products_vlm, "attend_by_products", None)
    model = model_of("Llama", "sdpa")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert model(**forest(model, torch.Generator().manual_seed(0)).packed).loss.isfinite()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_frozen_layer_that_runs_again_for_gradients_attends_as_it_did(reentrant):
    model = model_of("Llama", "sdpa")
    model.model.language_model.requires_grad_(False)
    packed = forest(model, torch.Generator().manual_seed(0)).packed
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = step(model.train(), packed)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        found, again = step(model.train(), packed)
    assert found == loss and torch.equal(again, gradients)


def test_in_bfloat16_the_gradients_are_as_near_as_those_of_the_fused_attention():
    inputs, mask = drawn(20, 60, dtype=torch.float32), mask_of(20, 60)
    exact = outcome(AttentionInterface()["sdpa"], inputs, mask)
    small = [whole.detach().bfloat16().requires_grad_() for whole in inputs]
    for fused, own, true in zip(
        outcome(AttentionInterface()["sdpa"], small, mask), outcome(attend_by_products, small, mask), exact
    ):
        assert (own.float() - true).norm() <= 2 * (fused.float() - true).norm()
