"""What is declared to learn moves, and nothing else does, bit for bit."""

import itertools

import pytest
import torch
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

from modeling_vlm import VLMForConditionalGeneration
from tests import tiny
from training_vlm.learning.tuning import apply_tuning, find_blocks, make_plan


CHOICES = ["frozen", "last:1", "last:2", "full"]
MIXTURE = MixtralConfig(
    vocab_size=420, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, num_local_experts=4, num_experts_per_tok=2,
)  # fmt: skip


@pytest.fixture(params=[*tiny.PAIRS, "siglip-mixtral"])
def composed_of_any(request, folders, tmp_path_factory):
    """A model with GPT-2, with Llama, or with a mixture of experts, and its processor."""
    if request.param in tiny.PAIRS:
        return tiny.compose(*folders(request.param), tiny.PAIRS[request.param][2])
    vision, text = folders("siglip-llama")
    folder = tmp_path_factory.getbasetemp() / "mixtral"
    if not folder.is_dir():
        MixtralForCausalLM(MIXTURE).save_pretrained(folder)
        AutoTokenizer.from_pretrained(text).save_pretrained(folder)
    return tiny.compose(vision, folder, "patch")


def declared(model, vision, text, freeze_embeddings):
    """Written from the names of the two pairs' own modules, on purpose another way than the rule itself."""
    layers = {"vit": "layers", "siglip_vision_model": "encoder.layers", "gpt2": "h"}
    embeddings = "wte" if model.config.text_config.model_type == "gpt2" else "embed_tokens"
    tied = model.config.tie_word_embeddings
    names = set()
    for name, _ in model.named_parameters():
        part = name.removeprefix("model.")
        if part.startswith("multi_modal_projector."):
            names.add(name)
        for prefix, choice in (("vision_tower.", vision), ("language_model.", text)):
            if not part.startswith(prefix) or choice == "frozen":
                continue
            config = model.config.vision_config if prefix == "vision_tower." else model.config.text_config
            blocks = prefix + layers.get(config.model_type, "layers") + "."
            if choice == "full":
                # A classifier's pooler and SigLIP's attention head are no part of the features.
                if ".pooler." not in name and ".head." not in name:
                    names.add(name)
            elif part.startswith(blocks):
                depth = config.num_hidden_layers
                if int(part.removeprefix(blocks).split(".")[0]) >= depth - int(choice.removeprefix("last:")):
                    names.add(name)
        if part == "lm_head.weight" and text == "full" and not tied:
            names.add(name)
    if freeze_embeddings:
        names -= {f"model.language_model.{embeddings}.weight"}
    return names


def one_step(model, batch, optimizer=torch.optim.AdamW):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    stepper = optimizer(learning, lr=0.1, weight_decay=0.0)
    model.train()(**batch).loss.backward()
    assert all(parameter.grad is not None for parameter in learning), "DDP would wait for these for ever"
    stepper.step()
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize("vision, text", itertools.product(CHOICES, CHOICES))
@pytest.mark.parametrize("freeze_embeddings", [False, True])
def test_exactly_the_declared_parameters_move(composed_of_any, image, vision, text, freeze_embeddings):
    model, processor = composed_of_any
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    apply_tuning(model, vision, text, freeze_embeddings)
    moved = one_step(model, tiny.collate(processor, tiny.ragged_dialogues(image)[:3]))
    expected = declared(model, vision, text, freeze_embeddings)
    assert expected >= {n for n, _ in model.named_parameters() if "multi_modal_projector" in n}
    # Attention scores do not change when every key is shifted by one bias, so its gradient is rounding noise or zero.
    still = {name for name in expected - moved if name.endswith(("k_proj.bias", "key.bias"))}
    assert moved == expected - still
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("layer", [-1, -2])
def test_a_tower_read_at_an_inner_layer_learns_no_norm_that_nothing_reads(pair, folders, image, layer):
    model, processor = tiny.compose(*folders(pair), vision_feature_layer=layer)
    apply_tuning(model, "full", "frozen")
    moved = one_step(model, tiny.collate(processor, tiny.ragged_dialogues(image)[:3]))
    assert any("vision_tower" in name for name in moved)
    norm = {"vit-gpt2": "vision_tower.layernorm", "siglip-llama": "vision_tower.post_layernorm"}[pair]
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name for name, _ in model.named_parameters() if norm in name} <= frozen


def test_a_choice_forgets_the_one_before(composed):
    model, _ = composed
    apply_tuning(model, "full", "full")
    apply_tuning(model, "frozen", "last:1")
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learning == declared(model, "frozen", "last:1", False)


def test_backbones_that_are_frozen_keep_their_dropout_off(composed):
    model, _ = composed
    for vision, text in itertools.product(["frozen", "last:1"], ["frozen", "last:1"]):
        apply_tuning(model, vision, text)
        model.train()
        assert model.training and model.model.multi_modal_projector.training
        for choice, backbone in ((vision, model.model.vision_tower), (text, model.model.language_model)):
            assert {module.training for module in backbone.modules()} == {choice != "frozen"}
        model.eval()
        assert not any(module.training for module in model.modules())


def test_frozen_language_models_are_checkpointed_too(composed, image):
    """Gradients pass through them to the projector, so their activations are worth saving."""
    model, processor = composed
    apply_tuning(model, "frozen", "frozen")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    calls = []
    block = find_blocks(model.model.language_model)[0]
    norm = next(module for module in block.modules() if "Norm" in type(module).__name__)
    norm.register_forward_hook(lambda *_: calls.append(1))
    model(**tiny.collate(processor, tiny.ragged_dialogues(image)[:1])).loss.backward()
    assert len(calls) == 2, "the block was not run again in the backward pass"


@pytest.mark.parametrize("side", ["vision", "text"])
@pytest.mark.parametrize("bad", ["last:0", "last:4", "last:", "last", "none", "Full", "", "last:-1", "2"])
def test_another_word_is_refused_in_one_line(composed, side, bad):
    choices = {"vision": "frozen", "text": "frozen", side: bad}
    with pytest.raises(ValueError, match=f"tune_{side}='{bad}'.*last:N with N from 1 to 3") as error:
        apply_tuning(composed[0], **choices)
    assert "\n" not in str(error.value)


def test_blocks_are_found_by_their_number(composed):
    model, _ = composed
    for backbone in (model.model.vision_tower, model.model.language_model):
        assert len(find_blocks(backbone)) == 3


@pytest.mark.parametrize("text", CHOICES)
def test_the_table_counts_every_parameter_once(composed, text):
    model, _ = composed
    apply_tuning(model, "last:1", text)
    parts = make_plan(model, None).components()
    assert (
        sum(part.parameters for part in parts) == model.num_parameters() == sum(p.numel() for p in model.parameters())
    )
    assert sum(part.trained for part in parts) == model.num_parameters(only_trainable=True)
    names = [part.name for part in parts]
    assert ("head" in names) is not model.config.tie_word_embeddings
    assert names[:4] == ["vision encoder", "projector", "token embeddings", "language model"]


def test_what_learns_is_not_written_into_the_checkpoint(composed, tmp_path):
    """A loaded model is whole again; freezing is a setting of a run."""
    model, _ = composed
    apply_tuning(model, "frozen", "frozen")
    model.save_pretrained(tmp_path)
    again = VLMForConditionalGeneration.from_pretrained(tmp_path)
    assert all(parameter.requires_grad for parameter in again.parameters())
