"""What cannot be composed is refused when it is composed, in one line that says what was found and what to do."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from modeling_vlm import VLMForConditionalGeneration
from modeling_vlm.backbones_vlm import CACHE
from tests import matrix, tiny
from tests.matrix import GPT, GROUPED, HEADS, IMAGES, SIZES, WINDOW, config_of, encoder_of


WORDS = {**SIZES, "vocab_size": 376, "pad_token_id": 0}
TINY_SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 376, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip
AUDIO = {**SIZES, "conv_dim": [8, 8], "conv_stride": [2, 2], "conv_kernel": [3, 3], "num_feat_extract_layers": 2}
PER_LAYER = {
    **WINDOW, **HEADS, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 376, "hidden_size_per_layer_input": 8,
}  # fmt: skip


def refusal(**options) -> str:
    """The one line that composing raises; what is not given is a ViT and a Llama."""
    chosen = {"vision": encoder_of("ViT"), "text": config_of("Llama", GROUPED), **options}
    with pytest.raises(ValueError) as error:
        VLMForConditionalGeneration.from_backbones(**chosen)
    line = str(error.value)
    assert "\n" not in line and len(line) < 600
    return line


def test_what_the_refused_are_refused_instead_of_composes():
    """Or every test below could pass for a fault of its own making."""
    VLMForConditionalGeneration.from_backbones(encoder_of("ViT"), config_of("Llama", GROUPED))


NO_ENCODERS = {
    "BERT": ("Bert", WORDS, "bert) has no image_size"),
    "Whisper": ("Whisper", TINY_SEQ2SEQ, "whisper) has no image_size"),
    "wav2vec2": ("Wav2Vec2", AUDIO, "wav2vec2) has no image_size"),
    "Llama": ("Llama", GROUPED, "llama) has no image_size"),
    "ResNet": ("ResNet", {}, "resnet) has no image_size"),
    "ConvNeXt": (
        "ConvNext", {"hidden_sizes": [8, 16, 32, 32], "depths": [1, 1, 1, 1], "image_size": 32},
        "convnext) gives features of shape (2, 32, 1, 1) for 2 images of 8x8 patches",
    ),
    "Swin": (
        "Swin", {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "image_size": 32, "patch_size": 4,
                 "window_size": 4},
        "swin) gives features of shape (2, 16, 16) for 2 images of 8x8 patches",
    ),
    "VideoMAE": ("VideoMAE", IMAGES, "videomae) cannot take images of 32x32 pixels"),
    "ViT-MAE": ("ViTMAE", IMAGES, "vit_mae) gives features of shape (2, 5, 32) for 2 images of 4x4 patches"),
    "ViT-MAE that drops nothing": ("ViTMAE", {**IMAGES, "mask_ratio": 0.0}, "other features for the same image each"),
    "BLIP": ("BlipVision", IMAGES, "blip_vision_model) is none that AutoModel builds"),
}  # fmt: skip
"""Name -> class and settings of a config, and what is said."""


@pytest.mark.parametrize("name", NO_ENCODERS)
def test_what_is_no_encoder_of_patches_is_refused(name):
    kind, settings, says = NO_ENCODERS[name]
    line = refusal(vision=config_of(kind, settings))
    assert line.startswith("the vision encoder (") and says in line
    assert "such as ViT" in line or "Duet needs one token per patch" in line


def test_a_folder_that_is_no_encoder_is_named(tmp_path):
    transformers.BertModel(config_of("Bert", WORDS)).save_pretrained(tmp_path)
    assert f"{str(tmp_path)!r} (bert) has no image_size" in refusal(vision=str(tmp_path))


def test_one_of_a_pair_that_is_no_encoder_is_named():
    assert "(bert) has no image_size" in refusal(vision=(encoder_of("ViT"), config_of("Bert", WORDS)))


@pytest.mark.parametrize("number", [0, 3])
def test_other_numbers_of_encoders_than_one_or_two_are_refused(number):
    assert f"{number} vision encoders were given" in refusal(vision=tuple(encoder_of("ViT") for _ in range(number)))


NOT_CAUSAL = "is not causal: what it says after a token depends on the tokens behind it"
NO_LANGUAGE_MODEL = "is no causal language model of texts alone"
NO_DECODER = "does not turn embeddings into states and a cache"
NOT_REPRODUCED = "does more after its head, or before it, than Duet reproduces"
PADDING = "says something else in a padded batch, or with a cache, than alone"
READS_IDS = "reads more of a token than its embedding, and image features are embeddings only"
NO_LANGUAGE_MODELS = {
    "BERT": ("Bert", WORDS, NOT_CAUSAL),
    "RoBERTa": ("Roberta", WORDS, NOT_CAUSAL),
    "T5": ("T5", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}, NO_LANGUAGE_MODEL),
    "BART": ("Bart", TINY_SEQ2SEQ, NO_LANGUAGE_MODEL),
    "Whisper": ("Whisper", TINY_SEQ2SEQ, NO_LANGUAGE_MODEL),
    "LLaVA": ("Llava", {}, NO_LANGUAGE_MODEL),
    "ViT": ("ViT", IMAGES, NO_LANGUAGE_MODEL),
    "GPT": ("OpenAIGPT", {key: value for key, value in GPT.items() if key[-2:] != "id"}, NO_DECODER),
    "RWKV": ("Rwkv", {"vocab_size": 376, "hidden_size": 32, "num_hidden_layers": 2}, NO_DECODER),
    "RecurrentGemma": ("RecurrentGemma", {**WORDS, "num_key_value_heads": 1, "attention_window_size": 8}, NO_DECODER),
    "XLM": ("XLM", {"vocab_size": 376, "emb_dim": 32, "n_layers": 2, "n_heads": 4}, NO_DECODER),
    "XLNet": ("XLNet", {"vocab_size": 376, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}, NOT_CAUSAL),
    "Llama 4 text": (
        "Llama4Text",
        {**GROUPED, **HEADS, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48},
        NO_DECODER,
    ),
    "Gemma 4 text with embeddings for each layer": ("Gemma4Text", {**PER_LAYER, "global_head_dim": 8}, NO_DECODER),
    "ModernBERT's decoder": (
        "ModernBertDecoder",
        {**WORDS, "bos_token_id": 0, "eos_token_id": 0, "cls_token_id": 0, "sep_token_id": 0},
        NOT_REPRODUCED,
    ),
    "BERT as a decoder": ("Bert", {**WORDS, "is_decoder": True}, NOT_REPRODUCED),
    "ELECTRA as a decoder": ("Electra", {**WORDS, "is_decoder": True, "embedding_size": 16}, NOT_REPRODUCED),
}  # fmt: skip
"""Name -> class and settings of a config, and what is said."""


@pytest.mark.parametrize("name", NO_LANGUAGE_MODELS)
def test_what_is_no_language_model_that_can_be_joined_is_refused(name):
    kind, settings, says = NO_LANGUAGE_MODELS[name]
    config = config_of(kind, settings)
    line = refusal(text=config)
    assert line.startswith(f"the language model ({config.model_type}) {says}") and "choose " in line


def test_a_state_space_model_that_takes_padding_for_words_is_refused():
    """Before 5.24 its states have a name that no part of generation knows; since then a padded batch is wrong."""
    config = config_of("Mamba", {"vocab_size": 376, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8})
    line = refusal(text=config, tokenizer=tiny.byte_level_tokenizer())
    assert (NO_DECODER if CACHE == "past_key_values" else PADDING) in line


def test_a_state_space_model_whose_states_are_a_cache_passes_what_the_matrix_checks(tmp_path, monkeypatch):
    settings = {"hidden_size": 32, "num_hidden_layers": 3, "num_heads": 4, "head_dim": 16, "n_groups": 1}
    settings |= {"vocab_size": 376, "state_size": 8, "chunk_size": 8, **matrix.IDS}
    monkeypatch.setitem(matrix.LANGUAGE_MODELS, "Mamba 2", ("Mamba2", settings))
    if CACHE == "past_key_values":
        assert NO_DECODER in refusal(text=config_of("Mamba2", settings))
        return
    logits = matrix.save_language_model("Mamba 2", tmp_path / "text")
    matrix.check_pair("ViT", tmp_path / "text", logits, None, tmp_path / "composed")


def test_the_page_has_every_one_of_these_lines():
    page = matrix.PAGE.read_text(encoding="utf-8")
    lines = [says for *_, says in [*NO_ENCODERS.values(), *NO_LANGUAGE_MODELS.values()]]
    others = [READS_IDS, PADDING, "is smaller than a patch", "positions, and the language model (gpt2) has learned"]
    for says in [*lines, *others]:
        what = says.partition(") ")[2].partition(" (")[0] or says  # without names and shapes
        assert what in page


@pytest.mark.parametrize("name", ["BERT", "T5"])
def test_a_folder_that_is_no_language_model_is_refused(name, tmp_path):
    if name == "BERT":
        transformers.BertForMaskedLM(config_of("Bert", WORDS)).save_pretrained(tmp_path)
    else:
        settings = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 376}
        T5ForConditionalGeneration(T5Config(**settings)).save_pretrained(tmp_path)
    tiny.byte_level_tokenizer().save_pretrained(tmp_path)
    says = {"BERT": NOT_CAUSAL, "T5": f"{str(tmp_path)!r} (t5) {NO_LANGUAGE_MODEL}"}[name]
    assert says in refusal(text=str(tmp_path))


def test_a_trained_model_that_reads_ids_beside_embeddings_is_refused(tmp_path):
    """Gemma 3n as it is born ignores them, so only weights show it."""
    settings = {**PER_LAYER, "laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.0]}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of("Gemma3nText", settings))
    matrix.shake(model)
    model.save_pretrained(tmp_path)
    tiny.byte_level_tokenizer().save_pretrained(tmp_path)
    assert f"(gemma3n_text) {READS_IDS}" in refusal(text=str(tmp_path))


@pytest.mark.parametrize("encoder", matrix.ENCODERS)
def test_an_image_smaller_than_a_patch_is_refused(encoder):
    assert "image_size=[4, 4] is smaller than a patch" in refusal(vision=encoder_of(encoder), image_size=4)


@pytest.mark.parametrize("size", [0, -8, 32.5, "a", [32], [32, 32, 3]])
def test_what_is_no_image_size_is_refused(size):
    assert "expected a whole number of pixels, or height and width" in refusal(image_size=size)


def test_another_image_size_is_refused_where_positions_are_not_interpolated():
    line = refusal(vision=encoder_of("AIMv2"), image_size=48)
    assert "(aimv2_vision_model) cannot take images of 48x48 pixels" in line and "an image_size that it can" in line


def test_both_of_a_pair_are_named_where_they_cannot_take_an_image():
    second = config_of("Aimv2Vision", {**IMAGES, "image_size": 64})
    assert "(vit and aimv2_vision_model) cannot take images" in refusal(vision=(encoder_of("ViT"), second))


def test_more_image_tokens_than_learned_positions_are_refused():
    line = refusal(text=config_of("GPT2", GPT), image_size=96)  # 144 patches, 128 positions
    assert "an image takes 144 positions, and the language model (gpt2) has learned 128" in line
    line = refusal(text=config_of("GPT2", GPT), max_tiles=8)  # 9 views of 16 positions and as many newlines
    assert "an image takes up to 153 positions, and the language model (gpt2) has learned 128" in line


@pytest.mark.parametrize("encoder", ["ViT", "DINOv2 + SigLIP"])
@pytest.mark.parametrize("layer", [0, 2, -4, "last", 1.5])
def test_a_layer_that_is_not_there_is_refused(encoder, layer):
    line = refusal(vision=encoder_of(encoder), vision_feature_layer=layer)
    assert f"vision_feature_layer={layer!r} does not fit a vision encoder of 3 layers" in line


@pytest.mark.parametrize("encoder", ["SigLIP", "SigLIP 2", "AIMv2", "DINOv2 + SigLIP"])
def test_a_cls_token_is_refused_where_there_is_none(encoder):
    line = refusal(vision=encoder_of(encoder), vision_feature_select_strategy="cls")
    assert 'vision_feature_select_strategy="cls" needs a CLS token' in line


@pytest.mark.parametrize(
    "options, says",
    [
        ({"vision_feature_select_strategy": "mean"}, "choose one of cls, patch, full"),
        ({"max_tiles": 0}, "max_tiles=0: expected 1"),
        ({"projector_type": "identity", "vision": config_of("ViT", {**IMAGES, "hidden_size": 64})}, "64 wide"),
        ({"projector_type": "conv"}, "projector_type='conv' is not known; choose one of linear, "),
        ({"projector_type": "own.Projector"}, "projector_type='own.Projector' names no file; give the class to "),
        ({"projector_type": "own.py:Projector"}, "expected FILE.py:CLASS, and there is no such "),
        ({"projector_type": None}, "projector_type=None: expected a name, a class, or FILE.py:CLASS"),
        ({"projector_settings": {"scale": 2}}, "'scale', which mlp does not take; it takes none"),
        ({"projector_type": "resampler", "projector_settings": {"queries": 2}}, "it takes num_queries, depth"),
        ({"projector_type": "resampler", "projector_settings": {"depth": 0}}, "depth=0; expected a whole number"),
        ({"projector_type": "resampler", "projector_settings": [64]}, "[64]: expected names and values, such as"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(options, says):
    assert says in refusal(**options)


@pytest.mark.parametrize("projector", ["pixel_shuffle", "average_pool", "c_abstractor"])
def test_a_projector_that_reads_places_is_refused_where_there_are_none(projector):
    line = refusal(projector_type=projector, projector_settings={"scale": 3})
    assert f"{projector} with scale=3 does not fit the encoder's grid of 4x4 patches" in line
    for strategy in ("full", "cls"):
        line = refusal(projector_type=projector, vision_feature_select_strategy=strategy)
        assert f'needs vision_feature_select_strategy="patch", not {strategy!r}' in line
