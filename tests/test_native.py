"""What a model of the library can do, the composed one can: attention, precision, loading, compiling, quantisation."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    CompileConfig,
    GPT2Config,
    LlamaConfig,
    SiglipVisionConfig,
    ViTConfig,
)
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_bitsandbytes_available, is_flash_attn_2_available

from modeling_vlm import VLMConfig, VLMForConditionalGeneration, VLMModel
from tests import tiny
from training_vlm.learning.tuning import apply_tuning, find_blocks


SMALL_IMAGES = {"image_size": 16, "patch_size": 8}
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


@pytest.fixture
def model(composed):
    return composed[0]


@pytest.fixture
def folder(model, tmp_path):
    """Where `model` is saved."""
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def inputs_of(model, batch=2, text=5, seed=0):
    """Rows of a word, an image and more words."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    ids = torch.randint(1, 50, (batch, text + config.image_seq_length), generator=generator)
    ids[:, 1 : 1 + config.image_seq_length] = config.image_token_id
    pixels = torch.randn(batch, 3, *config.image_size, generator=generator)
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def dtypes_of(module):
    return {parameter.dtype for parameter in module.parameters()}


# -- attention --------------------------------------------------------------------------------------------------------


def implementations(model):
    """Of the whole, of the tower and of the language model, as their own modules read it."""
    parts = (model, model.model.vision_tower, model.model.language_model)
    return tuple(part.config._attn_implementation for part in parts)


@pytest.fixture
def counted():
    """Implementations `"counted"` and `"counted too"`: sdpa, and how often each was called."""
    calls = {"counted": 0, "counted too": 0}

    def counting(name):
        def attention(*args, **kwargs):
            calls[name] += 1
            return ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)

        return attention

    for name in calls:
        AttentionInterface.register(name, counting(name))
        AttentionMaskInterface.register(name, sdpa_mask)
    return calls


def test_every_layer_of_both_sides_attends_as_it_is_told(model, counted):
    inputs = inputs_of(model)
    expected = logits_of(model, inputs)
    model.set_attn_implementation("counted")
    assert implementations(model) == ("counted",) * 3
    torch.testing.assert_close(logits_of(model, inputs), expected)
    assert counted == {"counted": 6, "counted too": 0}


def test_each_side_attends_as_it_alone_is_told(model, counted):
    inputs = inputs_of(model)
    expected = logits_of(model, inputs)
    model.set_attn_implementation({"vision_config": "counted", "text_config": "counted too"})
    assert implementations(model)[1:] == ("counted", "counted too")
    torch.testing.assert_close(logits_of(model, inputs), expected)
    assert counted == {"counted": 3, "counted too": 3}
    model.set_attn_implementation({"text_config": "eager"})
    assert implementations(model)[1:] == ("counted", "eager")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_folder_is_loaded_with_the_attention_that_is_asked_for(model, folder, implementation):
    again = VLMForConditionalGeneration.from_pretrained(folder, attn_implementation=implementation)
    assert implementations(again) == (implementation,) * 3
    mixed = {"vision_config": "eager", "text_config": implementation}
    again = VLMForConditionalGeneration.from_pretrained(folder, attn_implementation=mixed)
    assert implementations(again)[1:] == ("eager", implementation)
    inputs = inputs_of(model)
    torch.testing.assert_close(logits_of(again, inputs), logits_of(model, inputs), rtol=1e-4, atol=1e-5)


def test_padded_rows_have_the_same_logits_with_eager_and_sdpa(composed, image):
    model, processor = composed
    batch = tiny.collate(processor, tiny.ragged_dialogues(image))
    found = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        found[implementation] = logits_of(model, batch)[batch["attention_mask"].bool()]
    torch.testing.assert_close(found["eager"], found["sdpa"], rtol=1e-4, atol=1e-5)


def test_flex_attention_is_set_where_the_backbones_have_it_and_refused_where_one_has_not(pair, model, folder):
    if pair == "siglip-llama":
        model.set_attn_implementation("flex_attention")
        assert implementations(model) == ("flex_attention",) * 3
        again = VLMForConditionalGeneration.from_pretrained(folder, attn_implementation="flex_attention")
        assert implementations(again) == ("flex_attention",) * 3
        return
    with pytest.raises(ValueError, match="GPT2.* does not support .*flex_attention"):
        model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="GPT2.* does not support .*flex_attention"):
        VLMForConditionalGeneration.from_pretrained(folder, attn_implementation="flex_attention")
    model.set_attn_implementation({"vision_config": "flex_attention"})
    assert implementations(model)[1] == "flex_attention" and implementations(model)[2] != "flex_attention"


@pytest.mark.skipif(is_flash_attn_2_available(), reason="tells what happens without the package")
def test_flash_attention_lacks_only_its_package(model, folder):
    """The library asks whether the classes can before it asks whether the package is there."""
    inputs = inputs_of(model)
    expected = logits_of(model, inputs)
    with pytest.raises(ImportError, match="FlashAttention2"):
        model.set_attn_implementation("flash_attention_2")
    with pytest.raises(ImportError, match="FlashAttention2"):
        VLMForConditionalGeneration.from_pretrained(folder, attn_implementation="flash_attention_2")
    assert torch.equal(logits_of(model, inputs), expected)


def test_an_unknown_attention_is_refused(model):
    with pytest.raises(ValueError, match="nonsense"):
        model.set_attn_implementation("nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        model.set_attn_implementation({"vision_config": "nonsense"})


@pytest.mark.slow
def test_flex_attention_gives_the_logits_of_sdpa(folders, image, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, processor = tiny.compose(*folders("siglip-llama"))
    batch = tiny.collate(processor, tiny.ragged_dialogues(image))
    kept = batch["attention_mask"].bool()
    expected = logits_of(model, batch)[kept]
    model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(logits_of(model, batch)[kept], expected, rtol=1e-4, atol=1e-5)


# -- what is returned -------------------------------------------------------------------------------------------------


def test_hidden_states_and_attentions_are_the_language_models_with_the_image_in_them(model):
    model.set_attn_implementation("eager")
    inputs = inputs_of(model)
    rows, tokens = inputs["input_ids"].shape
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
        headless = model.model(**inputs, output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(rows, tokens, 32)] * 4
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(rows, 4, tokens, tokens)] * 3
    for weights in outputs.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(rows, 4, tokens))
        assert not weights.triu(1).any()
    torch.testing.assert_close(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    # GPT-2 adds its positions to what it is given.
    if model.config.text_config.model_type == "llama":
        put = outputs.hidden_states[0][inputs["input_ids"] == model.config.image_token_id]
        assert torch.equal(put, outputs.image_hidden_states)
    for ours, theirs in zip(headless.hidden_states + headless.attentions, outputs.hidden_states + outputs.attentions):
        assert torch.equal(ours, theirs)


def test_generation_returns_hidden_states_and_attentions(model):
    model.set_attn_implementation("eager")
    inputs = inputs_of(model)
    rows, tokens = inputs["input_ids"].shape
    asked = {"return_dict_in_generate": True, "output_hidden_states": True, "output_attentions": True}
    outputs = model.generate(**inputs, **GREEDY, **asked, output_logits=True)
    assert len(outputs.hidden_states) == len(outputs.attentions) == len(outputs.logits) == 5
    assert [tuple(states.shape) for states in outputs.hidden_states[0]] == [(rows, tokens, 32)] * 4
    assert [tuple(weights.shape) for weights in outputs.attentions[1]] == [(rows, 4, 1, tokens + 1)] * 3


@pytest.mark.parametrize("headless", [True, False])
@pytest.mark.parametrize("layer", [None, -2])
def test_image_features_come_with_what_the_tower_is_asked_for(pair, folders, layer, headless):
    model, _ = tiny.compose(*folders(pair), vision_feature_layer=layer)
    model.set_attn_implementation("eager")
    tower, pixels = model.model.vision_tower, torch.randn(2, 3, 32, 32)
    depth, tokens = (3, 2)[layer is not None], 17 if pair == "vit-gpt2" else 16
    features = (model.model if headless else model).get_image_features
    with torch.no_grad():
        plain = features(pixels)
        asked = features(pixels, output_hidden_states=True, output_attentions=True)
        theirs = tower(pixels, output_hidden_states=True, output_attentions=True)
        as_tuple = features(pixels, return_dict=False)
    assert [tuple(states.shape) for states in asked.hidden_states] == [(2, tokens, 32)] * (depth + 1)
    assert [tuple(weights.shape) for weights in asked.attentions] == [(2, 4, tokens, tokens)] * depth
    assert plain.attentions is None and (plain.hidden_states is None or layer is not None)
    for found, expected in zip(asked.hidden_states + asked.attentions, theirs.hidden_states + theirs.attentions):
        assert torch.equal(found, expected)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], plain.last_hidden_state)
    for one, other, third in zip(plain.pooler_output, asked.pooler_output, as_tuple[1]):
        assert torch.equal(one, other) and torch.equal(one, third)


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_takes_embeddings_or_encoded_images_in_place_of_ids_and_pixels(model, beams):
    inputs = inputs_of(model)
    expected = model.generate(**inputs, **GREEDY, num_beams=beams)[:, inputs["input_ids"].shape[1] :]
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    others = {"pixel_values": inputs["pixel_values"], "attention_mask": inputs["attention_mask"]}
    assert torch.equal(model.generate(inputs_embeds=embeds, **others, **GREEDY, num_beams=beams), expected)


# -- images that do not fit their tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("given", ["ids", "embeddings"])
@pytest.mark.parametrize("images", [1, 3])
def test_generation_refuses_too_few_and_too_many_images(model, images, given, beams):
    """With beams as well, where the library hands the features of each prompt to each of its beams."""
    inputs = {**inputs_of(model), "pixel_values": torch.randn(images, 3, 32, 32)}
    if given == "embeddings":
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model.generate(**inputs, **GREEDY, num_beams=beams)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_refuses_tokens_without_images_and_images_without_tokens(model, beams):
    inputs = inputs_of(model)
    pixels = inputs.pop("pixel_values")
    with pytest.raises(ValueError, match="Image features and image tokens do not match, .*features: 0"):
        model.generate(**inputs, **GREEDY, num_beams=beams)
    words = {name: value[:, -3:] for name, value in inputs.items()}
    with pytest.raises(ValueError, match="Image features and image tokens do not match, tokens: 0"):
        model.generate(**words, pixel_values=pixels, **GREEDY, num_beams=beams)


# -- activation checkpointing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("vision, text", [("full", "frozen"), ("last:1", "last:1")])
def test_the_blocks_of_a_learning_tower_are_checkpointed(model, vision, text, reentrant):
    """Run again in the backward pass, with the gradients they have without, and with nothing else to be set."""
    apply_tuning(model, vision, text)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    inputs = inputs_of(model)
    calls = []
    norm = next(m for m in find_blocks(model.model.vision_tower)[-1].modules() if isinstance(m, torch.nn.LayerNorm))
    norm.register_forward_hook(lambda *_: calls.append(1))

    def step():
        model.zero_grad()
        model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = step()
    assert len(calls) == 1
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = step()
    assert len(calls) == 3 and found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)
    model.gradient_checkpointing_disable()
    step()
    assert len(calls) == 4


# -- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"device_map": "cpu"}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}])
def test_a_folder_is_loaded_without_a_second_copy(model, folder, how):
    """Built without memory and then filled: every parameter and buffer is there, and the logits are the same."""
    again, info = VLMForConditionalGeneration.from_pretrained(folder, **how, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert {tensor.device.type for tensor in again.state_dict(keep_vars=True).values()} == {"cpu"}
    assert {buffer.device.type for buffer in again.buffers()} <= {"cpu"}
    inputs = inputs_of(model)
    assert torch.equal(logits_of(again, inputs), logits_of(model, inputs))


def test_parts_may_stay_on_disk(model, folder, tmp_path):
    """Their weights are read when they are needed, in the forward pass and in generation."""
    places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "disk", "model.language_model": "disk"}
    places["lm_head"] = "disk" if model.config.tie_word_embeddings else "cpu"
    inputs = inputs_of(model)
    again = VLMForConditionalGeneration.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "disk")
    assert {p.device.type for p in again.model.language_model.parameters()} == {"meta"}
    assert torch.equal(logits_of(again, inputs), logits_of(model, inputs))
    assert torch.equal(again.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))


def test_a_folder_in_shards_is_the_same_model(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3 and (tmp_path / "model.safetensors.index.json").exists()
    inputs = inputs_of(model)
    again, info = VLMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits_of(again, inputs), logits_of(model, inputs))
    headless = VLMModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(headless(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_folder_is_loaded_in_half_precision(model, folder, tmp_path, dtype):
    """Every part of it, pictures in full precision are taken as they are, and the folder it is saved to says so."""
    inputs = inputs_of(model)
    half = VLMForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    assert dtypes_of(half) == {dtype} == {half.dtype}
    parts = (half.config, half.config.vision_config, half.config.text_config)
    assert {part.dtype for part in parts} == {dtype}
    found = logits_of(half, inputs)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), logits_of(model, inputs), rtol=0.05, atol=0.02)
    assert half.generate(**inputs, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + 5
    loss = half.train()(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad.dtype == dtype for p in half.model.multi_modal_projector.parameters())
    half.save_pretrained(tmp_path / "half")
    for named in ({}, {"dtype": "auto"}):
        again = VLMForConditionalGeneration.from_pretrained(tmp_path / "half", **named).eval()
        assert dtypes_of(again) == {dtype}
        assert torch.equal(logits_of(again, inputs), found)
    assert dtypes_of(VLMModel.from_pretrained(tmp_path / "half", dtype="auto")) == {dtype}


def test_the_headless_model_is_built_without_memory(model):
    with torch.device("meta"):
        headless = VLMModel(VLMConfig.from_dict(model.config.to_dict()))
    assert {p.device.type for p in headless.parameters()} == {"meta"}
    assert headless.state_dict().keys() == model.model.state_dict().keys()


def test_embeddings_and_head_can_be_exchanged(model):
    embeddings, head = torch.nn.Embedding(40, 32), torch.nn.Linear(32, 40, bias=False)
    for one in (model, model.model):
        one.set_input_embeddings(embeddings)
        assert model.get_input_embeddings() is one.get_input_embeddings() is embeddings
        assert model.model.language_model.get_input_embeddings() is embeddings
        embeddings = torch.nn.Embedding(40, 32)
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is model.lm_head is head
    assert logits_of(model, {"input_ids": torch.arange(9)[None]}).shape == (1, 9, 40)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("headless", [True, False])
def test_embeddings_of_both_classes_can_be_resized_and_saved(headless, tied, tmp_path):
    """With names of modules and fields that differ from Llama's, larger and then smaller."""
    torch.manual_seed(0)
    config = VLMConfig(
        vision_config=ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, **SMALL_IMAGES
        ),
        text_config=GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=60, tie_word_embeddings=tied),
        image_token_id=40,
    )
    kind = VLMModel if headless else VLMForConditionalGeneration
    model = kind(config).eval()
    inputs = inputs_of(model)
    inputs["input_ids"][:, -4:] %= 40

    def outputs(model):
        with torch.no_grad():
            return model(**inputs)[0]

    before = outputs(model)
    for size in (71, 50):
        model.resize_token_embeddings(size)
        assert model.get_input_embeddings().num_embeddings == model.config.text_config.vocab_size == size
        after = outputs(model)
        if headless:
            assert torch.equal(after, before)
        else:
            assert model.lm_head.weight.shape[0] == after.shape[-1] == size
            assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
            torch.testing.assert_close(after[..., :50], before[..., :50])
        model.save_pretrained(tmp_path / str(size))
        again, info = kind.from_pretrained(tmp_path / str(size), output_loading_info=True)
        assert not info["missing_keys"] and not info["mismatched_keys"]
        assert torch.equal(outputs(again), after)


# -- compiling and exporting ------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler(tmp_path, monkeypatch):
    """Nothing compiled before, nothing kept afterwards."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_the_forward_pass_is_one_graph_for_any_number_of_images(model, fresh_compiler):
    """The second size makes it a graph for every size; text alone has its own."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for batch, text in ((2, 5), (3, 7), (5, 6)):
        inputs = inputs_of(model, batch, text)
        torch.testing.assert_close(logits_of(compiled, inputs), logits_of(model, inputs))
    assert len(graphs) == 2
    words = {"input_ids": torch.randint(1, 50, (2, 7))}
    torch.testing.assert_close(logits_of(compiled, words), logits_of(model, words))
    assert len(graphs) == 3


def test_generation_with_a_static_cache_compiles(model, fresh_compiler):
    inputs = inputs_of(model)
    compiling = CompileConfig(fullgraph=True, backend="eager")
    compiling._compile_all_devices = True  # the library compiles for accelerators only
    calls = []
    model.get_compiled_call = lambda config, get=model.get_compiled_call: calls.append(1) or get(config)
    found = model.generate(**inputs, **GREEDY, cache_implementation="static", compile_config=compiling)
    assert calls and torch.equal(found, model.generate(**inputs, **GREEDY))


@pytest.mark.slow
def test_the_compiled_model_gives_the_same_logits_loss_and_gradients(model, fresh_compiler):
    inputs = inputs_of(model)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(logits_of(compiled, inputs), logits_of(model, inputs), rtol=1e-4, atol=1e-5)
    found = {}
    for one in (model, compiled):
        model.zero_grad()
        one(**inputs, labels=inputs["input_ids"]).loss.backward()
        found[one] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found[model].keys() == found[compiled].keys()
    for name, gradient in found[model].items():
        torch.testing.assert_close(found[compiled][name], gradient, rtol=1e-3, atol=1e-5)


def test_an_exported_forward_pass_gives_the_same_logits_at_every_size(model):
    size = torch.export.Dim.AUTO
    shapes = {"input_ids": {0: size, 1: size}, "pixel_values": {0: size}, "attention_mask": {0: size, 1: size}}
    exported = torch.export.export(
        model, (), {**inputs_of(model), "use_cache": False}, strict=False, dynamic_shapes={**shapes, "use_cache": None}
    ).module()
    for batch, text in ((2, 5), (3, 8), (1, 6)):
        inputs = inputs_of(model, batch, text, seed=1)
        expected = logits_of(model, inputs)
        torch.testing.assert_close(exported(**inputs, use_cache=False).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_librarys_exporter_takes_the_model(model):
    from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

    inputs = inputs_of(model)
    expected = logits_of(model, inputs)
    exported = DynamoExporter().export(model, dict(inputs), config=DynamoConfig())
    # A program at first, an object around it later.
    run = exported if callable(exported) and not hasattr(exported, "module") else exported.module()
    torch.testing.assert_close(run(**inputs).logits, expected, rtol=1e-5, atol=1e-6)


# -- quantisation -----------------------------------------------------------------------------------------------------


quantised = pytest.mark.skipif(not is_bitsandbytes_available(), reason="needs bitsandbytes")
BITS = {4: {"load_in_4bit": True}, 8: {"load_in_8bit": True}}
WIDE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
"""Four bits are kept in blocks of 64, so tests/tiny.py's are too small."""


@pytest.fixture
def wide(pair, tmp_path):
    """A model of each pair's families, and its folder."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of what it casts, once a layer
    torch.manual_seed(0)
    if pair == "vit-gpt2":
        vision = ViTConfig(**WIDE, **SMALL_IMAGES)
        text = GPT2Config(
            n_embd=64, n_layer=2, n_head=2, vocab_size=60, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
    else:
        vision = SiglipVisionConfig(**WIDE, **SMALL_IMAGES)
        text = LlamaConfig(**WIDE, vocab_size=60, tie_word_embeddings=False, pad_token_id=0)
    model = VLMForConditionalGeneration(VLMConfig(vision_config=vision, text_config=text)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "wide")
    return model, tmp_path / "wide"


def quantised_parts(model):
    """Names of the layers that bitsandbytes has replaced."""
    return {name for name, module in model.named_modules() if type(module).__module__.startswith("bitsandbytes")}


def linear_parts(model, within):
    names = {name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")}
    return {name for name in names if name.startswith(within)}


def is_whole(part, original):
    theirs = original.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in part.state_dict().items())


@quantised
@pytest.mark.parametrize("bits", BITS)
def test_quantised_loading_leaves_image_parts_and_head_whole(wide, bits):
    model, folder = wide
    asked = BitsAndBytesConfig(**BITS[bits])
    expected = linear_parts(model, "model.language_model.")
    assert expected
    for one, config in (
        (VLMForConditionalGeneration, asked),
        (VLMForConditionalGeneration, asked.to_dict()),
        (AutoModelForImageTextToText, asked),
    ):
        found = one.from_pretrained(folder, quantization_config=config)
        assert quantised_parts(found) == expected
        assert is_whole(found.model.vision_tower, model.model.vision_tower)
        assert is_whole(found.model.multi_modal_projector, model.model.multi_modal_projector)
        assert torch.equal(found.lm_head.weight, model.lm_head.weight)
    assert asked.llm_int8_skip_modules is None  # the caller's object is the caller's
    headless = VLMModel.from_pretrained(folder, quantization_config=asked)
    assert quantised_parts(headless) == {name.removeprefix("model.") for name in expected}
    inputs = inputs_of(model)
    likeness = torch.cosine_similarity(logits_of(found, inputs), logits_of(model, inputs), dim=-1)
    assert likeness.min() > {4: 0.8, 8: 0.99}[bits]
    written = found.generate(**inputs, **GREEDY)
    assert written.shape[1] == inputs["input_ids"].shape[1] + 5


@quantised
def test_what_is_left_out_of_quantisation_can_be_said(wide):
    model, folder = wide
    asked = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["model.language_model", "lm_head"])
    found = VLMForConditionalGeneration.from_pretrained(folder, quantization_config=asked)
    image_parts = linear_parts(model, "model.vision_tower.") | linear_parts(model, "model.multi_modal_projector.")
    # All but SigLIP's pooling head, which is a module of torch's own.
    assert quantised_parts(found) == {name for name in image_parts if "head.attention" not in name}


@quantised
@pytest.mark.parametrize("bits", BITS)
def test_a_quantised_model_is_saved_and_loaded(wide, bits, tmp_path):
    """Without saying anything again, by both classes."""
    model, folder = wide
    inputs = inputs_of(model)
    found = VLMForConditionalGeneration.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**BITS[bits]))
    found.save_pretrained(tmp_path / "saved")  # before it runs: on some CPUs that rounds the scales of four bits
    again = VLMForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert quantised_parts(again) == quantised_parts(found) == linear_parts(model, "model.language_model.")
    assert is_whole(again.model.vision_tower, model.model.vision_tower)
    expected = logits_of(found, inputs)
    assert torch.equal(logits_of(again, inputs), expected)
    assert torch.equal(again.generate(**inputs, **GREEDY), found.generate(**inputs, **GREEDY))
    headless = VLMModel.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(found.lm_head(headless(**inputs).last_hidden_state), expected)


@quantised
def test_adapters_and_the_projector_learn_on_four_bits(wide, tmp_path):
    """QLoRA (https://arxiv.org/abs/2305.14314): a step that moves them and nothing else."""
    model, folder = wide
    inputs = inputs_of(model)
    asked = BitsAndBytesConfig(load_in_4bit=True)
    base = VLMForConditionalGeneration.from_pretrained(folder, quantization_config=asked)
    base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted = get_peft_model(
        base,
        LoraConfig(
            r=2, target_modules=r".*language_model.*\.(c_attn|q_proj)", modules_to_save=["multi_modal_projector"]
        ),
    )
    before = {name: tensor.clone() for name, tensor in adapted.named_parameters()}
    learning = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    stepper = torch.optim.SGD(learning, lr=1.0)
    losses = []
    for _ in range(2):  # an adapter's first half moves once its second is no longer zero
        stepper.zero_grad()
        loss = adapted.train()(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        stepper.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    moved = {name for name, tensor in adapted.named_parameters() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if "lora_" in name or "modules_to_save" in name}
    assert any("multi_modal_projector" in name for name in moved) and any("lora_A" in name for name in moved)
