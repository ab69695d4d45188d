"""The composed model: made of its parts and nothing else, saved and loaded whole, refusing what cannot be right."""

import copy
import shutil
import warnings

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    SiglipVisionConfig,
    ViTConfig,
)

from modeling_vlm import (
    VLMConfig,
    VLMForConditionalGeneration,
    VLMModel,
    VLMPreTrainedModel,
    VLMVisionPair,
    VLMVisionPairConfig,
)
from modeling_vlm.backbones_vlm import CACHE
from tests import tiny
from training_vlm.learning.tuning import apply_tuning


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def vit_config(**changes):
    return ViTConfig(**{**SIZES, "image_size": 16, "patch_size": 8, **changes})


def siglip_config(**changes):
    return SiglipVisionConfig(**{**SIZES, "image_size": 16, "patch_size": 8, **changes})


def llama_config(**changes):
    return LlamaConfig(**{**SIZES, "vocab_size": 50, "max_position_embeddings": 64, **changes})


def gpt2_config(**changes):
    return GPT2Config(**{"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24, "vocab_size": 50, **changes})


def from_configs(vision, text, **options):
    torch.manual_seed(0)
    return VLMForConditionalGeneration(VLMConfig(vision_config=vision, text_config=text, **options)).eval()


def some_inputs(model, images=2, text=5, batch=1):
    """Random ids with the placeholders of `images` images in each row, and their pixels."""
    config = model.config
    ids = torch.randint(0, config.image_token_id, (batch, text + images * config.image_seq_length))
    ids[:, 1 : 1 + images * config.image_seq_length] = config.image_token_id
    pixels = torch.randn(batch * images, 3, *config.image_size)
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}


def logits_of(model, inputs, **changes):
    with torch.no_grad():
        return model(**{**inputs, **changes}).logits


# -- composed of its parts --------------------------------------------------------------------------------------------


def test_the_parts_have_the_weights_of_their_checkpoints(pair, folders, composed):
    vision, text = folders(pair)
    model, _ = composed
    theirs = AutoModel.from_pretrained(vision)
    theirs = getattr(theirs, "vision_model", theirs).state_dict()
    ours = model.model.vision_tower.state_dict()
    used = [name for name in ours if "pooler" not in name]  # a classifier's checkpoint has no pooler
    assert used and all(torch.equal(ours[name], theirs[name]) for name in used)
    theirs = AutoModelForCausalLM.from_pretrained(text)
    rows = theirs.config.vocab_size
    ours = model.model.language_model.state_dict()
    for name, tensor in theirs.base_model.state_dict().items():
        assert torch.equal(ours[name][:rows] if ours[name].shape[0] > rows else ours[name], tensor), name
    assert torch.equal(model.lm_head.weight[:rows], theirs.get_output_embeddings().weight)


def test_logits_of_plain_text_are_those_of_the_language_model(pair, folders, composed):
    model, _ = composed
    alone = AutoModelForCausalLM.from_pretrained(folders(pair)[1]).eval()
    ids = torch.randint(0, 60, (2, 30))
    expected = logits_of(alone, {"input_ids": ids})
    found = logits_of(model, {"input_ids": ids})[..., : expected.shape[-1]]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["opt", "gpt_neox"])
def test_other_language_models_need_no_line_of_their_own(family):
    """Their embeddings, blocks and heads have other names than those of the two pairs."""
    text = {
        "opt": OPTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24, vocab_size=50,
            max_position_embeddings=32, word_embed_proj_dim=16,
        ),
        "gpt_neox": GPTNeoXConfig(**SIZES, vocab_size=50, max_position_embeddings=32),
    }[family]  # fmt: skip
    model = VLMForConditionalGeneration.from_backbones(vit_config(), text)
    apply_tuning(model, "last:1", "last:1")
    inputs = some_inputs(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.model.max_positions == (32 if family == "opt" else None)


def test_configs_compose_as_folders_do():
    model = VLMForConditionalGeneration.from_backbones(vit_config(), llama_config(), projector_type="linear")
    assert model.config.image_seq_length == 4 and model.config.num_prefix_tokens == 1
    assert model.config.image_token_id == 49
    assert torch.isfinite(logits_of(model, some_inputs(model))).all()


def test_a_folder_and_a_config_compose_together(folders):
    vision, _ = folders("vit-gpt2")
    model = VLMForConditionalGeneration.from_backbones(vision, llama_config())
    assert torch.isfinite(logits_of(model, some_inputs(model))).all()


def test_an_image_changes_what_follows_it_and_nothing_before(composed, image):
    model, processor = composed
    before = model.config.image_seq_length
    texts = [processor.image_token + "the cat"]
    one, other = (processor(images=[image(seed)], text=texts, return_tensors="pt") for seed in (0, 1))
    first, second = logits_of(model, one), logits_of(model, other)
    start = (one["input_ids"][0] == model.config.image_token_id).nonzero()[0].item()
    assert torch.equal(first[:, :start], second[:, :start])
    assert not torch.allclose(first[:, start + before :], second[:, start + before :])


def test_features_stand_in_the_order_of_their_images(composed, image):
    """The second image's features go to the second image's tokens, in the right row."""
    model, processor = composed
    batch = tiny.collate(processor, [tiny.dialogue("a", "b", image(1), image(2)), tiny.dialogue("a", "b", image(3))])
    with torch.no_grad():
        put = model(**batch).image_hidden_states
        alone = [model.get_image_features(pixels[None]).pooler_output[0] for pixels in batch["pixel_values"]]
    torch.testing.assert_close(put, torch.cat(alone), rtol=1e-5, atol=1e-6)
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    embeds[batch["input_ids"] == model.config.image_token_id] = torch.cat(alone)
    with torch.no_grad():
        expected = model.model.language_model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])
        expected = model.lm_head(expected.last_hidden_state)
    torch.testing.assert_close(logits_of(model, batch), expected, rtol=1e-5, atol=1e-5)


# -- configs are shared -----------------------------------------------------------------------------------------------


def test_configs_are_shared_with_the_parts(composed, tmp_path):
    model, _ = composed
    model.save_pretrained(tmp_path)
    for one in (model, VLMForConditionalGeneration.from_pretrained(tmp_path)):
        assert one.config is one.model.config
        assert one.config.text_config is one.model.language_model.config
        assert one.config.vision_config is one.model.vision_tower.config
        assert one.config.get_text_config() is one.config.text_config


def test_the_callers_configs_are_taken_not_copied():
    vision, text = vit_config(), llama_config()
    model = VLMForConditionalGeneration.from_backbones(vision, text)
    assert model.config.vision_config is vision and model.config.text_config is text


def test_a_tower_is_cut_without_touching_the_callers_config():
    vision = vit_config(num_hidden_layers=4)
    model = VLMForConditionalGeneration.from_backbones(vision, llama_config(), vision_feature_layer=-2)
    assert vision.num_hidden_layers == 4
    assert model.config.vision_config.num_hidden_layers == 3 and model.config.vision_num_hidden_layers == 4


def test_a_config_survives_saving_and_loading(composed, tmp_path):
    def plain(config):
        config = config.to_dict()
        for one in (config, config["text_config"], config["vision_config"]):
            for name in ("transformers_version", "_name_or_path", "architectures", "dtype"):
                one.pop(name, None)
        return config

    model, _ = composed
    model.save_pretrained(tmp_path)
    assert plain(VLMConfig.from_pretrained(tmp_path)) == plain(model.config)
    changed = VLMConfig.from_pretrained(tmp_path)
    changed.text_config.vocab_size += 1
    assert plain(changed) != plain(model.config)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"projector_type": "conv"}, "linear, gelu_norm, mlp"),
        ({"vision_feature_select_strategy": "mean"}, "cls, patch, full"),
        ({"vision_feature_layer": 3}, "vision_feature_layer"),
        ({"vision_feature_layer": -9}, "vision_feature_layer"),
        ({"text_config": {"model_type": "nothing"}}, "nothing"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_one_line(options, says):
    with pytest.raises(ValueError, match=says) as error:
        VLMConfig(**{"vision_config": vit_config(), "text_config": llama_config(), **options})
    assert "\n" not in str(error.value)


# -- visual tokens ----------------------------------------------------------------------------------------------------


def test_a_number_of_visual_tokens_that_is_given_is_checked():
    assert from_configs(vit_config(), llama_config(), image_seq_length=4).config.num_prefix_tokens == 1
    with pytest.raises(ValueError, match="image_seq_length=5.*gives 4"):
        from_configs(vit_config(), llama_config(), image_seq_length=5)


@pytest.mark.parametrize("strategy, tokens", [("cls", 1), ("patch", 4), ("full", 5)])
def test_visual_tokens_of_an_encoder_with_cls(strategy, tokens):
    model = from_configs(vit_config(), llama_config(), vision_feature_select_strategy=strategy)
    assert model.config.image_seq_length == tokens
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        features = model.get_image_features(pixels).pooler_output
        states = model.model.vision_tower(pixels).last_hidden_state
        wanted = {"cls": states[:, :1], "patch": states[:, 1:], "full": states}[strategy]
        expected = model.model.multi_modal_projector(wanted)
    assert [tuple(f.shape) for f in features] == [(tokens, 16)] * 2
    torch.testing.assert_close(features, expected)


@pytest.mark.parametrize("strategy", ["patch", "full"])
def test_an_encoder_without_cls_keeps_every_patch(strategy):
    model = from_configs(siglip_config(), llama_config(), vision_feature_select_strategy=strategy)
    assert model.config.num_prefix_tokens == 0 and model.config.image_seq_length == 4


def test_cls_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match='needs a CLS token.*siglip_vision_model.*choose "patch"') as error:
        from_configs(siglip_config(), llama_config(), vision_feature_select_strategy="cls")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layer", [-1, -2, -3])
def test_an_inner_layer_is_the_full_towers_hidden_state(layer, pair, folders, tmp_path):
    vision, text = folders(pair)
    model = VLMForConditionalGeneration.from_backbones(vision, text, vision_feature_layer=layer)
    full = AutoModel.from_pretrained(vision).eval()
    full = getattr(full, "vision_model", full)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = full(pixels, output_hidden_states=True).hidden_states[layer]
        assert torch.equal(model.model.vision_hidden_states(pixels)[1], expected)
    # No layer above it was built, and a saved folder builds the same tower again.
    assert model.config.vision_config.num_hidden_layers == 3 + layer + 1
    model.save_pretrained(tmp_path)
    again = VLMForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.vision_config.num_hidden_layers == 3 + layer + 1
    with torch.no_grad():
        assert torch.equal(again.model.vision_hidden_states(pixels)[1], expected)


# -- the image token and the embeddings -------------------------------------------------------------------------------


def test_a_new_row_is_the_mean_of_the_others(folders):
    vision, text = folders("vit-gpt2")
    before = AutoModelForCausalLM.from_pretrained(text).get_input_embeddings().weight
    model, processor = tiny.compose(vision, text)
    rows = model.get_input_embeddings().weight
    assert len(rows) == len(before) + 1 == processor.image_token_id + 1 == model.config.text_config.vocab_size
    assert torch.equal(rows[:-1], before)
    torch.testing.assert_close(rows[-1], before.mean(0))


def test_embeddings_keep_their_size_where_the_image_token_fits(folders):
    vision, text = folders("siglip-llama")
    model, processor = tiny.compose(vision, text)
    assert len(processor.tokenizer) < model.get_input_embeddings().num_embeddings == 256
    assert model.lm_head.out_features == model.config.text_config.vocab_size == 256


def test_an_image_token_that_is_there_is_used(folders, tmp_path):
    """Its id is the tokenizer's; nothing grows."""
    vision, text = folders("vit-gpt2")
    shutil.copytree(text, tmp_path / "text")
    tokenizer = AutoTokenizer.from_pretrained(text)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(tmp_path / "text")
    language_model = AutoModelForCausalLM.from_pretrained(text)
    language_model.resize_token_embeddings(len(tokenizer) + 3)
    language_model.save_pretrained(tmp_path / "text")
    model, processor = tiny.compose(vision, tmp_path / "text")
    assert model.config.image_token_id == processor.image_token_id == len(tokenizer) - 1
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) + 3


def test_a_composed_model_suppresses_its_image_token(pair, folders):
    """Already before a processor has had its say."""
    model = VLMForConditionalGeneration.from_backbones(*map(str, folders(pair)))
    assert model.generation_config.suppress_tokens == [model.config.image_token_id]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("text", [gpt2_config, llama_config])
def test_heads_are_tied_after_loading_as_before(text, tied, tmp_path):
    model = from_configs(vit_config(), text(tie_word_embeddings=tied))
    inputs = some_inputs(model)
    expected = logits_of(model, inputs)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied
    again = VLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    for one in (model, again):
        assert (one.lm_head.weight is one.get_input_embeddings().weight) is tied
        assert one.config.tie_word_embeddings is one.config.text_config.tie_word_embeddings is tied
    assert torch.equal(logits_of(again, inputs), expected)


@pytest.mark.parametrize("text", [gpt2_config, llama_config])
def test_a_config_may_be_untied_after_it_was_made(text, tmp_path):
    config = VLMConfig(vision_config=vit_config(), text_config=text(tie_word_embeddings=True))
    config.tie_word_embeddings = False
    model = VLMForConditionalGeneration(config)
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again, info = VLMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and torch.equal(again.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_can_be_resized(tied, tmp_path):
    model = from_configs(vit_config(), llama_config(tie_word_embeddings=tied))
    inputs = some_inputs(model)
    before = logits_of(model, inputs)
    model.resize_token_embeddings(53, pad_to_multiple_of=8)
    assert model.config.text_config.vocab_size == model.lm_head.out_features == 56
    torch.testing.assert_close(logits_of(model, inputs)[..., :50], before)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    model.save_pretrained(tmp_path)
    again = VLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(again, inputs), logits_of(model, inputs))


# -- projectors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, layers",
    [("linear", ["Linear"]), ("gelu_norm", ["Linear", "GELU", "LayerNorm"]), ("mlp", ["Linear", "GELU", "Linear"])],
)
def test_a_projector_has_the_layers_of_its_name(kind, layers, tmp_path):
    model = from_configs(vit_config(), llama_config(hidden_size=24, num_attention_heads=3), projector_type=kind)
    projector = model.model.multi_modal_projector
    assert [type(layer).__name__ for layer in projector] == layers
    assert projector(torch.randn(2, 4, 16)).shape == (2, 4, 24)
    model.save_pretrained(tmp_path)
    again = VLMForConditionalGeneration.from_pretrained(tmp_path)
    for name, tensor in projector.state_dict().items():
        assert torch.equal(again.model.multi_modal_projector.state_dict()[name], tensor)


# -- settings of each side --------------------------------------------------------------------------------------------


def test_each_side_keeps_its_attention_implementation(pair, folders):
    vision, text = folders(pair)
    sides = {"vision_kwargs": {"attn_implementation": "eager"}, "text_kwargs": {"attn_implementation": "sdpa"}}
    model = VLMForConditionalGeneration.from_backbones(vision, text, **sides)
    assert model.config.vision_config._attn_implementation == "eager"
    assert model.config.text_config._attn_implementation == "sdpa"
    configs = AutoConfig.from_pretrained(vision), AutoConfig.from_pretrained(text)
    model = VLMForConditionalGeneration.from_backbones(*configs, **sides)
    assert model.model.vision_tower.config._attn_implementation == "eager"
    assert model.model.language_model.config._attn_implementation == "sdpa"


def test_attention_implementations_are_chosen_when_loading(composed, tmp_path):
    model, _ = composed
    inputs = some_inputs(model)
    model.save_pretrained(tmp_path)
    sides = {"vision_config": "eager", "text_config": "eager"}
    again = VLMForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=sides).eval()
    assert again.model.vision_tower.config._attn_implementation == "eager"
    assert again.model.language_model.config._attn_implementation == "eager"
    torch.testing.assert_close(logits_of(again, inputs), logits_of(model, inputs), rtol=1e-4, atol=1e-5)


def test_every_weight_has_the_precision_that_was_asked_for(pair, folders, tmp_path):
    model = VLMForConditionalGeneration.from_backbones(*folders(pair), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
    model.save_pretrained(tmp_path)
    assert VLMForConditionalGeneration.from_pretrained(tmp_path).dtype == torch.bfloat16
    again = VLMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in again.parameters()} == {torch.float32}


# -- what cannot be right is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens, features", [(1, 2), (2, 1), (0, 1), (1, 0)])
def test_image_tokens_and_features_must_match(composed, tokens, features):
    model, _ = composed
    inputs = some_inputs(model, images=tokens)
    del inputs["pixel_values"]
    per_image = model.config.image_seq_length
    says = f"do not match, tokens: {tokens * per_image}, features: {features * per_image}"
    if features:
        inputs["pixel_values"] = torch.randn(features, 3, 32, 32)
        with pytest.raises(ValueError, match=says):
            model(**inputs)
    with pytest.raises(ValueError, match=says):
        model.generate(**inputs, max_new_tokens=2)
    with pytest.raises(ValueError, match=says):
        model.train()(**inputs)


def test_neither_or_both_of_ids_and_embeddings_are_refused(composed):
    model, _ = composed
    ids = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="exactly one"):
        model(input_ids=ids, inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="exactly one"):
        model()


@pytest.mark.parametrize("where", ["forward", "positions", "generate"])
def test_more_positions_than_were_learned_are_refused_in_one_line(where):
    model = from_configs(vit_config(), gpt2_config())
    assert model.model.max_positions == 24
    ids = torch.randint(0, 40, (1, 25))
    with pytest.raises(ValueError, match="25 positions.*gpt2.*learned 24") as error:
        if where == "forward":
            model(input_ids=ids)
        elif where == "positions":
            model(input_ids=ids, position_ids=torch.arange(25)[None])
        else:
            model.generate(input_ids=ids[:, :20], max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert "\n" not in str(error.value)
    # As many as there are, with padding before them, are fine: padding takes no position.
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), ids[:, :24]], 1)
    mask = torch.cat([torch.zeros(1, 6, dtype=torch.long), torch.ones(1, 24, dtype=torch.long)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = logits_of(model, {"input_ids": padded}, attention_mask=mask, position_ids=positions)[:, 6:]
    torch.testing.assert_close(found, logits_of(model, {"input_ids": ids[:, :24]}), rtol=1e-4, atol=1e-5)


def test_relative_positions_have_no_limit():
    assert from_configs(vit_config(), llama_config()).model.max_positions is None


@pytest.mark.parametrize("side", ["vision", "text"])
@pytest.mark.parametrize("fault", ["missing", "wrong kind", "no weights", "lacking weights"])
def test_a_bad_backbone_folder_is_named_in_one_line(side, fault, folders, tmp_path):
    vision, text = folders("siglip-llama")
    good = {"vision": vision, "text": text}
    bad = tmp_path / "bad"
    if fault == "wrong kind":
        shutil.copytree(good["text" if side == "vision" else "vision"], bad)
        if side == "text":
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(text / name, bad)
    elif fault != "missing":
        shutil.copytree(good[side], bad)
        (bad / "model.safetensors").unlink()
        if fault == "lacking weights":
            auto = AutoModel if side == "vision" else AutoModelForCausalLM
            whole = auto.from_pretrained(good[side])
            state = {k: v for k, v in whole.state_dict().items() if ".layers.1." not in k}
            whole.save_pretrained(bad, state_dict=state)
    with pytest.raises(ValueError, match=str(bad)) as error:
        VLMForConditionalGeneration.from_backbones(**{"vision": str(vision), "text": str(text), side: str(bad)})
    assert "\n" not in str(error.value)
    assert {"vision": "vision encoder", "text": "language model"}[side] in str(error.value) or "tokenizer" in str(
        error.value
    )


def test_a_head_that_is_not_reproduced_is_refused(folders, monkeypatch):
    """A language model that does something to its logits which the composed model does not know of."""
    vision, text = folders("siglip-llama")
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def doubled(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        outputs.logits = outputs.logits * 2
        return outputs

    monkeypatch.setattr(LlamaForCausalLM, "forward", doubled)
    with pytest.raises(ValueError, match="does more after its head"):
        VLMForConditionalGeneration.from_backbones(str(vision), str(text))


# -- building and loading ---------------------------------------------------------------------------------------------


def test_a_saved_model_loads_with_the_same_logits(composed, tmp_path, image):
    model, processor = composed
    batch = tiny.collate(processor, tiny.ragged_dialogues(image))
    expected = logits_of(model, batch)
    model.save_pretrained(tmp_path)
    again, info = VLMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not again.training
    assert torch.equal(logits_of(again, batch), expected)
    assert again.generation_config.suppress_tokens == model.generation_config.suppress_tokens


def test_the_headless_model_loads_from_the_same_folder(composed, tmp_path, image):
    model, processor = composed
    model.save_pretrained(tmp_path)
    headless, info = VLMModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and set(info["unexpected_keys"]) <= {"lm_head.weight"}
    batch = tiny.collate(processor, [tiny.dialogue("a", "b", image())])
    batch.pop("labels")
    with torch.no_grad():
        states = headless(**batch).last_hidden_state
    torch.testing.assert_close(model.lm_head(states).detach(), logits_of(model, batch))


def test_a_model_can_be_built_on_the_meta_device(composed):
    config = copy.deepcopy(composed[0].config)
    counted = config.image_seq_length, config.num_prefix_tokens
    config.image_seq_length = config.num_prefix_tokens = None
    with torch.device("meta"):
        model = VLMForConditionalGeneration(config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert (config.image_seq_length, config.num_prefix_tokens) == counted


def test_a_missing_projector_is_initialised(composed, tmp_path):
    model, _ = composed
    state = {k: v for k, v in model.state_dict().items() if "multi_modal_projector" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    again = VLMForConditionalGeneration.from_pretrained(tmp_path)
    assert 0.01 < again.model.multi_modal_projector.linear_1.weight.std() < 0.03


# -- the forward pass -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("text", ["frozen", "full"])
def test_gradient_checkpointing_changes_nothing(composed, image, reentrant, text):
    model, processor = composed
    apply_tuning(model, "last:2", text)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = tiny.collate(processor, tiny.ragged_dialogues(image)[:3])

    def step():
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    loss, gradients = step()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    found, again = step()
    assert torch.equal(found, loss) and again.keys() == gradients.keys()
    for name in gradients:
        torch.testing.assert_close(again[name], gradients[name], rtol=1e-5, atol=1e-7)


def test_embeddings_in_place_of_ids_give_the_same(composed, image):
    model, processor = composed
    batch = tiny.collate(processor, tiny.ragged_dialogues(image))
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    inputs = {key: value for key, value in batch.items() if key != "input_ids"}
    torch.testing.assert_close(logits_of(model, inputs, inputs_embeds=embeds), logits_of(model, batch))


def test_images_may_be_encoded_beforehand(composed, image):
    model, processor = composed
    batch = tiny.collate(processor, tiny.ragged_dialogues(image))
    expected = logits_of(model, batch)
    with torch.no_grad():
        encoded = model.get_image_features(batch.pop("pixel_values"))
    assert torch.equal(logits_of(model, batch, mm_encoder_outputs={"image": encoded}), expected)
    with pytest.raises(ValueError, match="both"):
        model(**batch, pixel_values=torch.zeros(1, 3, 32, 32), mm_encoder_outputs={"image": encoded})


def test_logits_are_computed_where_they_are_kept(composed, image):
    model, processor = composed
    batch = tiny.collate(processor, tiny.ragged_dialogues(image)[:2])
    everything = logits_of(model, batch)
    assert torch.equal(logits_of(model, batch, logits_to_keep=3), everything[:, -3:])
    positions = torch.tensor([0, 4, 5])
    assert torch.equal(logits_of(model, batch, logits_to_keep=positions), everything[:, positions])
    mask = torch.rand(batch["input_ids"].shape) < 0.3
    torch.testing.assert_close(logits_of(model, batch, logits_to_keep=mask), everything[mask])


def test_a_cache_is_kept_in_generation_and_not_in_training(composed):
    model, _ = composed
    inputs = some_inputs(model, images=1)
    assert model(**inputs)[CACHE] is not None
    assert model(**inputs, labels=inputs["input_ids"]).get(CACHE) is None
    assert model.train()(**inputs).get(CACHE) is None


def test_outputs_come_as_a_tuple_when_asked(composed):
    model, _ = composed
    inputs = some_inputs(model, images=1)
    with torch.no_grad():
        outputs = model(**inputs, labels=inputs["input_ids"], return_dict=False)
    assert isinstance(outputs, tuple) and outputs[0].ndim == 0 and outputs[1].ndim == 3


@pytest.mark.parametrize("layer", [None, -1])
def test_hidden_states_of_the_encoder_come_when_asked(layer):
    """Those that the features are read from are not kept for nothing."""
    model = from_configs(vit_config(), llama_config(), vision_feature_layer=layer)
    pixels = torch.randn(2, 3, 16, 16)
    assert model.get_image_features(pixels).hidden_states is None
    assert len(model.get_image_features(pixels, output_hidden_states=True).hidden_states) == 3


def test_hidden_states_and_attentions_come_when_asked(composed):
    model, _ = composed
    model.set_attn_implementation("eager")
    outputs = model(**some_inputs(model, images=1), output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 4 and len(outputs.attentions) == 3


@pytest.mark.parametrize("counts_as_own", [True, False])
def test_what_no_checkpoint_holds_is_initialised_whichever_code_counts_as_the_library_s(monkeypatch, counts_as_own):
    """As its own tests ask for: by the classes of this package with `is_custom_code` false too, without an end else."""
    if not counts_as_own:
        for kind in (VLMPreTrainedModel, VLMVisionPair):
            monkeypatch.setattr(kind, "is_custom_code", classmethod(lambda cls: False))
    for vision in (vit_config(), VLMVisionPairConfig(first_config=vit_config(), second_config=siglip_config())):
        config = VLMConfig(vision_config=vision, text_config=llama_config(), projector_type="resampler", max_tiles=2)
        model = VLMForConditionalGeneration.from_pretrained(None, config=config, state_dict={})
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        assert model.model.image_newline.std() > 0 and model.model.multi_modal_projector.queries.std() > 0
        assert (model.model.language_model.norm.weight == 1).all()
        assert model(**some_inputs_of_tiles(model)).logits.isfinite().all()


def some_inputs_of_tiles(model):
    """A text about one image that is not cut."""
    config = model.config
    ids = torch.randint(0, config.image_token_id, (1, 5 + config.tile_tokens()))
    ids[:, 1 : 1 + config.tile_tokens()] = config.image_token_id
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, *config.image_size)}


def test_nothing_of_ours_uses_what_the_library_says_will_go(composed, image, tmp_path):
    """Compose, train, write, save and load under a library that turns its announcements into errors."""
    model, processor = composed
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        batch = tiny.collate(processor, tiny.ragged_dialogues(image))
        model.train()(**batch).loss.backward()
        prompt = {name: batch[name][:1] for name in ("input_ids", "attention_mask")}
        prompt["pixel_values"] = batch["pixel_values"][:1]
        for options in ({}, {"num_beams": 2}, {"use_cache": False}, {"do_sample": True, "num_return_sequences": 2}):
            model.eval().generate(**prompt, max_new_tokens=2, **options)
        model(**prompt, use_cache=True, output_hidden_states=True, output_attentions=True)
        model.save_pretrained(tmp_path)
        VLMForConditionalGeneration.from_pretrained(tmp_path)
