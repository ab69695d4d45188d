"""What a step has to compute is what torch counts when the whole step runs, for any model and whatever learns of it."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen3Config,
    SiglipVisionConfig,
    ViTConfig,
)

from modeling_vlm import VLMConfig, VLMForConditionalGeneration
from modeling_vlm.compose_vlm import shape_of
from training_vlm.flops import Work, costs_of, windows_of, work_of
from training_vlm.learning.tuning import apply_tuning
from training_vlm.weightless import blank, weightless


SMALL = {"hidden_size": 768, "num_hidden_layers": 3, "num_attention_heads": 12, "intermediate_size": 2048}
GROUPED = {**SMALL, "num_key_value_heads": 4, "vocab_size": 5000}
VIT = ViTConfig(image_size=64, **SMALL)
SIGLIP = SiglipVisionConfig(image_size=64, patch_size=16, **SMALL)
TEXT = {
    "gpt2": GPT2Config(n_layer=4),
    "llama": LlamaConfig(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=64),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=8, num_experts_per_tok=2),
}
LENGTHS, TOKENS = (90, 61, 33), 90


def composed(text, vision=SIGLIP, experts="eager"):
    config = VLMConfig(
        vision_config=copy.deepcopy(vision), text_config=copy.deepcopy(text), image_token_id=text.vocab_size - 1
    )
    config.vision_config._attn_implementation = config.text_config._attn_implementation = "eager"
    config.text_config._experts_implementation = experts
    return shape_of(VLMForConditionalGeneration, config)


def counted(model, supervised):
    """What torch counts in one padded step, and what that step's batch holds."""
    image, rows = model.config.image_seq_length, len(LENGTHS)
    ids = torch.full((rows, TOKENS), 3)
    ids[:, :image] = model.config.image_token_id
    targets = torch.full((rows, TOKENS), -100)
    targets[:, TOKENS - supervised :] = 5
    with weightless(model), FlopCounterMode(display=False) as counter:
        loss = model.train()(
            input_ids=ids, pixel_values=blank(rows, 3, *model.config.image_size),
            attention_mask=torch.ones_like(ids), labels=targets, shift_labels=targets, logits_to_keep=targets != -100,
        ).loss  # fmt: skip
        loss.backward()
    dense = Work(rows, rows, rows * TOKENS, rows * supervised)
    dense.pairs.update({window: rows * TOKENS**2 for window in set(windows_of(model.config.text_config))})
    return counter.get_total_flops(), dense


@pytest.mark.parametrize("tuning", [("frozen", "frozen"), ("frozen", "last:2"), ("last:1", "full"), ("full", "full")])
@pytest.mark.parametrize("family", TEXT)
def test_the_operations_of_a_step_are_those_that_torch_counts(family, tuning):
    model = composed(TEXT[family], vision=VIT if family == "gpt2" else SIGLIP)
    apply_tuning(model, *tuning)
    needed, dense = counted(model, supervised=20)
    assert costs_of(model).of(dense) == pytest.approx(needed, rel=0.02)


def test_nothing_is_counted_below_what_learns():
    """Neither weight gradients of what is frozen, nor gradients that would reach nothing that learns."""
    model = composed(TEXT["llama"], vision=VIT)
    model.requires_grad_(False)
    model.model.language_model.layers[-1].requires_grad_(True)
    needed, dense = counted(model, supervised=20)
    costs = costs_of(model)
    assert costs.of(dense) == pytest.approx(needed, rel=0.02)
    model.requires_grad_(True)
    whole = costs_of(model)
    assert costs.position < 0.6 * whole.position and costs.encoding < 0.4 * whole.encoding


HAS_GROUPED = hasattr(torch.ops.aten, "_grouped_mm")


@pytest.mark.parametrize(
    "experts",
    ["eager", pytest.param("grouped_mm", marks=pytest.mark.skipif(not HAS_GROUPED, reason="needs a newer torch"))],
)
def test_a_mixture_costs_what_its_active_experts_do(experts):
    one, two = (
        costs_of(composed(MixtralConfig(**GROUPED, num_local_experts=8, num_experts_per_tok=active), experts=experts))
        for active in (1, 2)
    )
    expert = 6 * 3 * GROUPED["hidden_size"] * GROUPED["intermediate_size"] * GROUPED["num_hidden_layers"]
    assert two.position - one.position == pytest.approx(expert, rel=0.01)


def test_counting_leaves_the_model_as_it_is():
    model = composed(TEXT["gpt2"], vision=VIT).train()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    costs_of(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert [module.training for module in model.modules()] == modes
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.text_config._attn_implementation == "eager"


def seen(segments, window):
    """Pairs by brute force: a query sees keys of its own segment and of ancestors, up to itself, within the window."""
    total = 0
    for place, (start, end, parent, text) in enumerate(segments):
        if text < 0 and all(other[2] != place for other in segments):
            continue
        before, above = 0, parent
        while above >= 0:
            before += segments[above][1] - segments[above][0]
            above = segments[above][2]
        for own in range(end - start):
            total += min(before + own + 1, window or before + own + 1)
    return total


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(-1, 5)), min_size=1, max_size=8), st.integers(1, 12))
def test_pairs_are_those_that_see_each_other(parts, window):
    segments, end = [], 0
    for place, (length, parent) in enumerate(parts):
        segments.append((end, end + length, min(parent, place - 1), place))
        end += length
    segments.append((end, end + 3, -1, -1))  # padding
    work = work_of({"segments": segments}, (), 4, (None, window))
    assert work.positions == end and work.predicted == 4
    assert work.pairs[None] == seen(segments, None) and work.pairs[window] == seen(segments, window)


def test_a_padded_batch_costs_what_its_conversations_do():
    work = work_of({"pixel_values": torch.zeros(2, 3, 4, 4)}, (7, 3), 4, (None,))
    assert (work.encoded, work.projected, work.positions, work.pairs[None]) == (2, 2, 10, 28 + 6)
    cached = work_of({"vision_features": torch.zeros(2, 5, 4)}, (7, 3), 4, (None,))
    assert (cached.encoded, cached.projected) == (0, 2)


def test_windows_are_those_of_the_layers():
    assert windows_of(MistralConfig(sliding_window=5)) == (5,)
    assert windows_of(LlamaConfig()) == (None,)
    layers = ["sliding_attention", "full_attention"]
    mixed = Qwen3Config(num_hidden_layers=2, sliding_window=9, layer_types=layers, use_sliding_window=True)
    assert windows_of(mixed) == (9, None)
