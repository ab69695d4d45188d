"""Any encoder with any language model, on tiny random ones: the same text logits, a loss, a cache, and a folder.

Every language model is composed with a ViT and every encoder with a Llama, because neither knows of the other.
"""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from modeling_vlm import VLMConfig, VLMForConditionalGeneration
from tests import tiny


SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
IMAGES = {**SIZES, "image_size": 32, "patch_size": 8}
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
WORDS = {**SIZES, **IDS, "vocab_size": 376, "max_position_embeddings": 128}
GROUPED = {**WORDS, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
NO_WIDTH = {key: value for key, value in IMAGES.items() if key != "intermediate_size"}

LANGUAGE_MODELS = {
    "gpt2": ("GPT2", dict(vocab_size=376, n_embd=32, n_layer=3, n_head=4, n_positions=128, **IDS)),
    "opt": ("OPT", {**WORDS, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt_neox": ("GPTNeoX", WORDS),
    "llama": ("Llama", GROUPED),
    "llama, tied": ("Llama", {**GROUPED, "tie_word_embeddings": True}),
    "mistral": ("Mistral", GROUPED),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 8}),
    "gemma": ("Gemma", {**GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2", {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 1.0}),
    "gemma3": ("Gemma3Text", {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "phi": ("Phi", WORDS),
    "phi3": ("Phi3", GROUPED),
    "smollm3": ("SmolLM3", GROUPED),
    "granite": ("Granite", {**GROUPED, "logits_scaling": 4.0, "embedding_multiplier": 3.0}),
    "olmo2": ("Olmo2", GROUPED),
    "olmoe": ("Olmoe", {**GROUPED, **EXPERTS}),
    "qwen3_moe": ("Qwen3Moe", {**GROUPED, **EXPERTS, "head_dim": 8, "moe_intermediate_size": 32}),
}
"""Name -> class and settings of a language model's config."""

ENCODERS = {
    "vit": ("ViT", IMAGES, 1),
    "deit": ("DeiT", IMAGES, 2),
    "beit": ("Beit", IMAGES, 1),
    "clip": ("CLIPVision", IMAGES, 1),
    "siglip": ("SiglipVision", IMAGES, 0),
    "dinov2": ("Dinov2", NO_WIDTH, 1),
    "dinov2 with registers": ("Dinov2WithRegisters", {**NO_WIDTH, "num_register_tokens": 4}, 5),
    "dinov3": ("DINOv3ViT", {**IMAGES, "num_register_tokens": 4}, 5),
    "aimv2": ("Aimv2Vision", IMAGES, 0),
}
"""Name -> class and settings of an encoder's config, and its tokens before the patches."""


def config_of(kind, settings):
    return getattr(transformers, f"{kind}Config")(**settings)


def inputs_of(model, seed=0):
    """Two rows of an image and seven words, and labels for the words."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.full((2, model.config.image_seq_length), model.config.image_token_id)
    ids = torch.cat([image, torch.randint(1, 300, (2, 7), generator=generator)], 1)
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    labels = ids.masked_fill(ids == model.config.image_token_id, -100)
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids), "labels": labels}


def check(model, folder) -> None:
    """A loss with gradients in the projector, the cache that changes nothing, a batch of two ones, a folder."""
    inputs = inputs_of(model)
    loss = model.train()(**inputs).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.model.multi_modal_projector.parameters())
    model.eval()
    del inputs["labels"]
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        written = model.generate(**inputs, **settings)
        assert torch.equal(written, model.generate(**inputs, **settings, use_cache=False))
        for row in range(2):
            alone = {name: value[row : row + 1] for name, value in inputs.items()}
            assert torch.equal(written[row : row + 1], model.generate(**alone, **settings))
        model.save_pretrained(folder)
        again = VLMForConditionalGeneration.from_pretrained(folder)
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_every_language_model_keeps_its_text_logits(name, tmp_path):
    torch.manual_seed(0)
    causal_lm = AutoModelForCausalLM.from_config(config_of(*LANGUAGE_MODELS[name])).eval()
    with torch.no_grad():
        for parameter in causal_lm.parameters():  # biases and norms are born as zeros and ones, which hide mistakes
            parameter.add_(torch.randn_like(parameter) * 0.05)
    causal_lm.save_pretrained(tmp_path / "text")
    tiny.byte_level_tokenizer().save_pretrained(tmp_path / "text")
    model = VLMForConditionalGeneration.from_backbones(config_of(*ENCODERS["vit"][:2]), str(tmp_path / "text"))
    ids = inputs_of(model)["input_ids"][:, model.config.image_seq_length :]
    with torch.no_grad():
        expected = causal_lm(ids).logits
        found = model(input_ids=ids).logits[..., : expected.shape[-1]]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    check(model, tmp_path / "composed")


@pytest.mark.parametrize("name", ["olmoe", "qwen3_moe"])
def test_the_router_loss_of_a_mixture_of_experts_is_kept(name):
    torch.manual_seed(0)
    kind, settings = LANGUAGE_MODELS[name]
    causal_lm = AutoModelForCausalLM.from_config(config_of(kind, {**settings, "output_router_logits": True}))
    config = VLMConfig(vision_config=config_of(*ENCODERS["vit"][:2]), text_config=causal_lm.config)
    model = VLMForConditionalGeneration(config, None, causal_lm)
    ids = torch.randint(1, 300, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    for training in (False, True):
        expected = causal_lm.train(training)(ids, attention_mask=mask, labels=labels)
        found = model.train(training)(input_ids=ids, attention_mask=mask, labels=labels)
        torch.testing.assert_close(found.aux_loss, expected.aux_loss)
        torch.testing.assert_close(found.loss, expected.loss)
        assert found.aux_loss > 0
    model(**inputs_of(model)).loss.backward()
    routers = [parameter for name, parameter in model.named_parameters() if name.endswith("gate.weight")]
    assert routers and all(parameter.grad is not None for parameter in routers)


@pytest.mark.parametrize("layer", [None, -2])
@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_gives_its_patches(name, layer, tmp_path):
    torch.manual_seed(0)
    kind, settings, prefix = ENCODERS[name]
    text = config_of(*LANGUAGE_MODELS["llama"])
    model = VLMForConditionalGeneration.from_backbones(config_of(kind, settings), text, vision_feature_layer=layer)
    assert (model.config.num_prefix_tokens, model.config.image_seq_length) == (prefix, 16)
    check(model, tmp_path / "composed")
