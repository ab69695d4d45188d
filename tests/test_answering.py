"""Many prompts are answered as each would be alone, with every image encoded once, and the model stays as it was."""

import pytest
import torch
from PIL import Image
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from inference_vlm import encoded_images
from inference_vlm.answering import Prompt, answer, greedy
from inference_vlm.encoded_images import EncodedImages
from modeling_vlm.generation_vlm import VLMGenerationMixin
from processing.data_error_vlm import DuetError
from tests import tiny


@pytest.fixture
def asked(composed, image):
    """Prompts about four images, in no order: one image, two, one twice, none; each asked in several ways."""
    model, processor = composed
    torch.manual_seed(5)
    for parameter in model.parameters():  # an answer that depends on what is seen
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    pictures = [image(seed) for seed in range(4)]
    texts = ["what is it?", "how many objects are there in the picture?", "describe the image."]
    shown = [[0], [1], [0], [], [2, 0], [3], [1], [2], [0, 0], [1, 2]]
    prompts = []
    for number, numbers in enumerate(shown):
        content = [{"type": "image"} for _ in numbers] + [{"type": "text", "text": texts[number % 3]}]
        ids = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        tokens = processor.tokenizer(ids, add_special_tokens=False)["input_ids"]
        prompts.append(Prompt(tokens, [pictures[n] for n in numbers]))
    return model, processor, prompts, greedy(model, processor, 5)


def seen_by(model):
    """How many images the encoder is given in each call."""
    seen = []
    model.model.vision_tower.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    return seen


def alone(model, processor, prompt, config):
    """The answer to one prompt from its pixels, by the library alone."""
    images = prompt.images
    (row,) = processor.expand_images(prompt.ids, counts=[processor.image_tokens(i.height, i.width) for i in images])
    inputs = {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
    inputs |= dict(processor.process_images(images)) if images else {}
    written = model.generate(**inputs, generation_config=config)
    return processor.tokenizer.decode(written[0, len(row) :], skip_special_tokens=True).strip()


def test_every_prompt_is_answered_as_it_would_be_alone_and_every_image_encoded_once(asked):
    model, processor, prompts, config = asked
    expected = [alone(model.eval(), processor, prompt, config) for prompt in prompts]
    assert len(set(expected)) > 3
    seen = seen_by(model)
    for batch_size in (1, 3, 16):
        seen.clear()
        assert answer(model, processor, prompts, batch_size, config) == expected
        assert sum(seen) == 4


def test_images_of_equal_bytes_are_one_image(asked, tmp_path):
    model, processor, prompts, config = asked
    prompts[0].images[0].save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    same = [Prompt(prompts[0].ids, [{"bytes": bytes(bytearray(content)), "path": None}]) for _ in range(5)]
    seen = seen_by(model)
    assert len(set(answer(model, processor, same, 2, config))) == 1
    assert sum(seen) == 1


def test_beams_see_the_features_of_their_prompt(asked):
    model, processor, prompts, config = asked
    config.num_beams = 3
    expected = [alone(model.eval(), processor, prompt, config) for prompt in prompts]
    assert answer(model, processor, prompts, 16, config) == expected


def test_the_model_its_mode_and_its_settings_are_as_they_were(asked):
    model, processor, prompts, config = asked
    own, random = model.generation_config, torch.random.get_rng_state()
    before = own.to_dict()
    model.train()
    answer(model, processor, prompts, 4, config)
    assert model.training and model.generation_config is own and own.to_dict() == before
    model.eval()
    answer(model, processor, prompts, 4, config)
    assert not model.training and torch.equal(torch.random.get_rng_state(), random)

    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    model.train().get_image_features = fails
    with pytest.raises(RuntimeError):
        answer(model, processor, prompts, 4, config)
    assert model.training and model.generation_config is own


def test_an_image_that_cannot_be_read_costs_its_prompts_alone_and_is_tried_once(asked, tmp_path, capsys, monkeypatch):
    model, processor, prompts, config = asked
    expected = answer(model, processor, prompts, 4, config)
    tried, real = [], encoded_images.load_image
    monkeypatch.setattr(encoded_images, "load_image", lambda image: tried.append(image) or real(image))
    gone = str(tmp_path / "gone.png")
    with_gone = [*prompts, prompts[0]._replace(images=[gone]), prompts[1]._replace(images=[gone])]
    assert answer(model, processor, with_gone, 4, config) == [*expected, None, None]
    assert tried.count(gone) == 1 and capsys.readouterr().out.count("a question is left out") == 2


def test_what_is_held_does_not_grow_with_the_number_of_prompts(asked, monkeypatch):
    model, processor, prompts, config = asked
    held = []
    give_up = EncodedImages.give_up
    monkeypatch.setattr(EncodedImages, "give_up", lambda self: (held.append(len(self._kept)), give_up(self))[1])
    many = [Prompt(prompts[0].ids, [Image.new("RGB", (40, 28), (n, 0, 0))]) for n in range(60)]
    answer(model, processor, [*many, *many], 2, config)  # the second about each comes long after the first
    assert max(held) <= 16

    features = model.get_image_features(processor.process_images([prompts[0].images[0]])["pixel_values"])
    monkeypatch.setattr(encoded_images, "KEPT_BYTES", 2 * features.pooler_output.nbytes)
    held.clear()
    seen = seen_by(model)
    pairs = [Prompt([*prompts[4].ids], [many[n].images[0], many[-n].images[0]]) for n in range(1, 29)]
    answer(model, processor, [*many[:30], *pairs], 1, config)
    assert max(held) <= 4 and sum(seen) >= 57  # those given up are encoded anew


def test_features_are_given_with_the_prompt_alone(asked):
    """Whatever transformers makes of them: with a cache and without."""
    model, processor, prompts, config = asked
    (row,) = processor.expand_images(prompts[0].ids, counts=[processor.image_seq_length])
    pixels = processor.process_images(prompts[0].images)["pixel_values"]
    features = list(model.eval().get_image_features(pixels).pooler_output)
    expected = model.generate(torch.tensor([row]), pixel_values=pixels, generation_config=config)
    for options in ({}, {"use_cache": False}, {"num_beams": 2}):
        given = {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)}}
        written = model.generate(torch.tensor([row]), **given, generation_config=config, **options)
        assert torch.equal(written, expected) or "num_beams" in options


def test_code_of_an_earlier_duet_is_refused_where_transformers_needs_todays(asked, monkeypatch):
    model, processor, prompts, config = asked
    monkeypatch.delattr(VLMGenerationMixin, "prepare_inputs_for_generation")
    monkeypatch.delattr(GenerationMixin, "_expand_multimodal_outputs", raising=False)
    with pytest.raises(DuetError, match="inference_vlm.update"):
        answer(model, processor, prompts, 2, config)


def test_tiled_images_are_encoded_once(folders, image):
    model, processor = tiny.compose(*folders("siglip-llama"), max_tiles=4)
    large, small = image(1, size=(64, 64)), image(2, size=(20, 20))
    ids = processor.tokenizer("what is it?")["input_ids"]
    token = processor.image_token_id
    prompts = [Prompt([token, *ids], [large]), Prompt([token, token, *ids], [small, large]), Prompt([token], [large])]
    config = greedy(model, processor, 4)
    expected = [alone(model.eval(), processor, prompt, config) for prompt in prompts]
    seen = seen_by(model)
    assert answer(model, processor, prompts, 2, config) == expected
    assert sum(seen) == 5 + 1
