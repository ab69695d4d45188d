"""A model proves that it keeps the texts of a row apart, and one that does not is told from it, by trying alone."""

import copy

import pytest
import torch
from transformers import AttentionMaskInterface

from modeling_vlm import attention_vlm
from tests import matrix
from tests.segments import model_of
from training_vlm.learning.probe import WINDOW, why_not_packed


def untouched(name, **settings):
    """As it is made from its config: so small that attention hardly matters."""
    return matrix.compose("SigLIP", matrix.config_of(*matrix.LANGUAGE_MODELS[name]), None).to(**settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Gemma 2", "Gemma 3 text", "Mixtral", "gpt-oss", "Falcon"])
def test_a_model_that_keeps_texts_apart_proves_it(name, dtype):
    assert why_not_packed(model_of(name, dtype=dtype)) is None
    assert why_not_packed(untouched(name, dtype=dtype)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["LFM2", "Jamba", "Qwen3.5 text"])
def test_a_model_that_mixes_tokens_otherwise_than_by_attention_does_not(name, dtype):
    assert "see each other" in why_not_packed(model_of(name, dtype=dtype))
    assert "see each other" in why_not_packed(untouched(name, dtype=dtype))


@pytest.mark.parametrize("name", ["BLOOM", "GPT-Neo", "MPT"])
def test_a_model_whose_own_attention_takes_no_row_of_any_length_does_not(name):
    assert "cannot be run" in why_not_packed(untouched(name))


def test_a_window_that_is_not_kept_is_found_however_long_it_is(monkeypatch):
    model = model_of("Mistral", sliding_window=4096)
    assert why_not_packed(model) is None
    assert model.config.text_config.sliding_window == 4096 > WINDOW
    made = attention_vlm.SegmentMask.__init__
    monkeypatch.setattr(attention_vlm.SegmentMask, "__init__", lambda self, row, _, *rest: made(self, row, None, *rest))
    assert "are not what they are alone" in why_not_packed(model)


def test_a_model_that_counts_positions_by_itself_may_be_packed_but_shares_no_prefix(monkeypatch):
    model = model_of("Llama")
    rotary = model.model.language_model.rotary_emb
    monkeypatch.setattr(
        rotary, "forward", lambda x, position_ids, of=rotary.forward: of(x, torch.arange(x.shape[1])[None])
    )
    assert why_not_packed(model, share_prefix=False) is None
    assert "behind a shared prefix" in why_not_packed(model)


def test_a_mask_that_is_left_out_is_found(monkeypatch):
    model = model_of("Llama")
    monkeypatch.setattr(attention_vlm.Row, "sees", lambda self, f, q, k: f(q, q, q, k) & torch.ones_like(q > k))
    monkeypatch.setitem(attention_vlm.CALL, "cpu", 10**9)
    assert "see each other" in why_not_packed(model)


def test_a_model_without_attention_proves_nothing():
    model = model_of("Llama")
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()
    assert "do not see each other even where they may" in why_not_packed(model)


def test_a_model_of_numbers_that_are_not_finite_proves_nothing():
    model = model_of("Llama")
    with torch.no_grad():
        model.model.language_model.norm.weight.fill_(torch.nan)
    assert "not finite" in why_not_packed(model)


@pytest.mark.parametrize("name", ["GPT-2", "Gemma 3 text", "MPT"])
def test_the_model_and_the_random_numbers_are_left_as_they_were(name):
    model = model_of(name)
    model.model.multi_modal_projector.eval()
    modes = [module.training for module in model.modules()]
    config, state = copy.deepcopy(model.config.to_dict()), torch.get_rng_state()
    attention = str(model.model.language_model.config._attn_implementation)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    why_not_packed(model)
    assert modes == [module.training for module in model.modules()]
    assert model.config.to_dict() == config
    assert str(model.model.language_model.config._attn_implementation) == attention
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert not any(p.grad is not None for p in model.parameters())


def test_under_autocast_it_is_found_too():
    with torch.autocast("cpu", torch.bfloat16):
        assert why_not_packed(model_of("Llama")) is None
        assert "see each other" in why_not_packed(model_of("LFM2"))


def test_frozen_weights_of_another_type_and_adapters_change_nothing():
    peft = pytest.importorskip("peft")
    model = model_of("Llama")
    model.model.language_model.layers.to(torch.bfloat16)
    for name in ("input_layernorm", "post_attention_layernorm"):
        for layer in model.model.language_model.layers:
            getattr(layer, name).float()
    assert why_not_packed(model) is None
    for name, modules in (("GPT-2", ["c_attn"]), ("Llama", ["embed_tokens", "q_proj"])):
        adapted = peft.get_peft_model(model_of(name), peft.LoraConfig(target_modules=modules))
        assert why_not_packed(adapted) is None


def test_learned_positions_that_are_few_are_enough():
    assert why_not_packed(model_of("GPT-2", n_positions=20)) is None


@pytest.mark.parametrize("how", ["empty", "meta", "zeros", "marked"])
def test_weights_that_are_elsewhere_until_training_starts_are_a_reason(how):
    model = model_of("Llama")
    weight = model.get_input_embeddings().weight
    if how == "marked":
        weight.ds_id = 0
    else:
        weight.data = torch.empty(0) if how == "empty" else torch.zeros_like(weight)
    model = model.to("meta") if how == "meta" else model
    device = "meta" if how == "meta" else "cpu"
    assert why_not_packed(model) == (
        f"the language model (llama) cannot be tried on {device}, where it is before training starts without its "
        "weights (DeepSpeed's stage 3, or FSDP, has them elsewhere)"
    )


@pytest.mark.parametrize(
    "where, found",
    [
        ("model.language_model.norm.forward", "(llama) cannot be tried on cpu, where it is before training starts"),
        ("model.get_input_embeddings", "(llama) cannot be tried on cpu, where it is before training starts"),
    ],
)
def test_a_model_that_cannot_be_run_at_all_is_a_reason_and_no_stack_trace(where, found, monkeypatch):
    def flash_attention_needs_a_gpu(*args, **kwargs):
        raise RuntimeError("FlashAttention only supports CUDA\ntensors")

    model = model_of("Llama")
    owner, _, name = where.rpartition(".")
    monkeypatch.setattr(model.get_submodule(owner), name, flash_attention_needs_a_gpu)
    reason = why_not_packed(model)
    assert found in reason and reason.endswith(" (RuntimeError: FlashAttention only supports CUDA tensors)")


def test_what_a_library_says_of_a_row_stands_behind_a_plain_clause():
    reason = why_not_packed(untouched("BLOOM"))
    clause = "texts in one row cannot be run in the language model (bloom), whose code takes none (ValueError: "
    assert reason.startswith(clause) and "\n" not in reason


def test_an_attention_that_is_not_known_is_a_reason():
    from transformers import AttentionInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("own", AttentionInterface()["sdpa"])
    AttentionMaskInterface.register("own", sdpa_mask)
    assert "how the attention 'own' reads a mask" in why_not_packed(model_of("Llama", "own"))
