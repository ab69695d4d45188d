"""Generation in every mode: what comes back has its shape, and another way to the same tokens writes the same."""

import pytest
import torch
from transformers import CompileConfig

from modeling_vlm.backbones_vlm import CACHE
from tests import test_generation
from tests.test_generation import encode, prompts


lively = test_generation.lively

MODES = {
    "greedy": {},
    "sample": {"do_sample": True, "num_return_sequences": 2},
    "beam": {"num_beams": 3, "num_return_sequences": 2},
    "beam sample": {"num_beams": 3, "num_return_sequences": 2, "do_sample": True},
}


def write(model, inputs, tokens=6, **options):
    """What is generated when nothing ends early: `tokens` new ones in each row, with their scores."""
    torch.manual_seed(0)
    settings = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True, "output_scores": True}
    return model.generate(**inputs, **{**settings, "max_new_tokens": tokens, **options})


def new_tokens(written, inputs):
    return written.sequences[:, inputs["input_ids"].shape[1] :]


def assert_same(found, expected, **tolerance):
    """Tokens and the scores that they were chosen by."""
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(one, other, **{"rtol": 1e-4, "atol": 1e-4, **tolerance})


def embed(model, inputs, images=True):
    """`inputs_embeds` of a prompt, with its images in place or their placeholders only."""
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        if images:
            features = model.get_image_features(inputs["pixel_values"]).pooler_output
            embeds[inputs["input_ids"] == model.config.image_token_id] = torch.cat(tuple(features))
    return embeds


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_what_is_asked_for_comes_back_for_every_step(lively, image, mode, use_cache):
    model, processor = lively
    model.set_attn_implementation("eager")
    inputs = encode(processor, prompts(image)[:3])
    asked = {"output_logits": True, "output_hidden_states": True, "output_attentions": True}
    found = write(model, inputs, use_cache=use_cache, **asked, **MODES[mode])
    batch, length = inputs["input_ids"].shape
    config, beams = model.config.text_config, MODES[mode].get("num_beams", 1)
    returned = batch * MODES[mode].get("num_return_sequences", 1)
    rows = batch * beams if beams > 1 else returned
    assert found.sequences.shape == (returned, length + 6)
    assert torch.equal(found.sequences[:, :length], inputs["input_ids"].repeat_interleave(returned // batch, 0))
    assert (found.get(CACHE) is not None) is use_cache
    if beams > 1:
        assert found.sequences_scores.shape == (returned,) and found.beam_indices.shape[0] == returned
    for name in ("scores", "logits", "hidden_states", "attentions"):
        assert len(getattr(found, name)) == 6, name
    for step in range(6):
        tokens = 1 if step and use_cache else length + step
        assert found.scores[step].shape == found.logits[step].shape == (rows, config.vocab_size)
        states, attentions = found.hidden_states[step], found.attentions[step]
        assert len(states) == config.num_hidden_layers + 1 and len(attentions) == config.num_hidden_layers
        assert all(one.shape == (rows, tokens, config.hidden_size) for one in states)
        assert all(one.shape == (rows, config.num_attention_heads, tokens, length + step) for one in attentions)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "sample"])
def test_a_static_cache_scores_as_a_growing_one(lively, image, options):
    model, processor = lively
    inputs = encode(processor, prompts(image))
    expected = write(model, inputs, **options)
    assert_same(write(model, inputs, cache_implementation="static", disable_compile=True, **options), expected)


def test_a_step_compiles_in_one_graph(lively, image):
    model, processor = lively
    inputs = encode(processor, prompts(image)[:2])
    expected = write(model, inputs, cache_implementation="static", disable_compile=True)
    compiled = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert_same(write(model, inputs, cache_implementation="static", compile_config=compiled), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "no cache"])
@pytest.mark.parametrize("images", ["in place", "pixel_values", "none"])
def test_embeddings_write_what_ids_write(lively, image, images, options):
    model, processor = lively
    asked = prompts(image)
    inputs = encode(processor, asked[1:2] if images == "none" else [asked[0], asked[3]])
    expected = write(model, inputs, **options)
    given = {"inputs_embeds": embed(model, inputs, images == "in place"), "attention_mask": inputs["attention_mask"]}
    if images == "pixel_values":
        given["pixel_values"] = inputs["pixel_values"]
    found = write(model, given, **options)
    assert torch.equal(found.sequences, new_tokens(expected, inputs))
    # With the ids beside them the prompt comes back as well, and the embeddings are what is read.
    both = write(model, {**given, "input_ids": inputs["input_ids"]}, **options)
    assert torch.equal(both.sequences, expected.sequences)


def test_generation_goes_on_from_a_cache(lively, image):
    """Of several rows, padded on the left, of which some have images: 3 tokens and then 3 are 6."""
    model, processor = lively
    inputs = encode(processor, prompts(image))
    whole, first = write(model, inputs), write(model, inputs, tokens=3)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
    rest = {"input_ids": first.sequences, "attention_mask": mask, CACHE: first[CACHE]}
    second = write(model, rest, tokens=3)
    assert torch.equal(second.sequences, whole.sequences)
    for one, other in zip((*first.scores, *second.scores), whole.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_more_padding_on_the_left_changes_no_score(lively, image):
    model, processor = lively
    inputs = encode(processor, prompts(image))
    expected = write(model, inputs)
    pad = model.generation_config.pad_token_id
    padded = {
        **inputs,
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (9, 0), value=pad),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (9, 0), value=0),
    }
    found = write(model, padded)
    found.sequences = found.sequences[:, 9:]
    assert_same(found, expected)


def test_logits_of_all_positions_write_what_those_of_the_last_write(lively, image):
    model, processor = lively
    inputs = encode(processor, prompts(image))
    expected = write(model, inputs)
    assert_same(write(model, inputs, logits_to_keep=0), expected)
    kept = []
    model.lm_head.register_forward_hook(lambda module, states, logits: kept.append(logits.shape[1]))
    write(model, inputs)
    assert set(kept) == {1}


@pytest.mark.parametrize("mode", MODES)
def test_images_encoded_beforehand_are_written_about_alike(lively, image, mode):
    model, processor = lively
    inputs = encode(processor, prompts(image))
    expected = write(model, inputs, **MODES[mode])
    pixels = inputs.pop("pixel_values")
    encoded = {"image": model.get_image_features(pixels)}
    assert_same(write(model, {**inputs, "mm_encoder_outputs": encoded}, **MODES[mode]), expected)


@pytest.mark.parametrize("mode", MODES)
def test_the_encoder_sees_each_image_once(lively, image, mode):
    """Neither every beam nor every step encodes it again."""
    model, processor = lively
    inputs = encode(processor, prompts(image))
    if not hasattr(model, "_supports_mm_encoder_outputs"):
        pytest.skip("this release of transformers encodes images in forward only")
    seen = []
    model.model.vision_tower.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    write(model, inputs, **MODES[mode])
    assert seen == [len(inputs["pixel_values"])]


@pytest.mark.parametrize("options", [{}, {"do_sample": True}], ids=["greedy", "sample"])
@pytest.mark.parametrize("helper", ["assistant", "prompt lookup"])
def test_a_helper_that_proposes_tokens_changes_none(lively, image, helper, options):
    """With images, of which the library gives an assistant none: what it proposes is only proposed."""
    model, processor = lively
    inputs = encode(processor, prompts(image)[2:3])
    helping = {"assistant_model": model} if helper == "assistant" else {"prompt_lookup_num_tokens": 3}
    found = write(model, inputs, **helping, **options)
    assert new_tokens(found, inputs).shape == (1, 6)
    if not options:
        assert_same(found, write(model, inputs))
