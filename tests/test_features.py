"""Features of a frozen tower, computed once and read from a cache; weights that lie on disk while others learn."""

import pytest
import torch

from tests import tiny


TILED = {"max_tiles": 4}


@pytest.fixture(params=["vit-gpt2", "siglip-llama", "tiles", "two encoders", "layer -2"])
def seeing(request, folders):
    """`(model, processor)` of each way in which images become features."""
    vit, gpt2 = folders("vit-gpt2")
    siglip, llama = folders("siglip-llama")
    if request.param == "two encoders":
        return compose_two(vit, siglip, llama)
    if request.param in tiny.PAIRS:
        return tiny.compose(*folders(request.param), tiny.PAIRS[request.param][2])
    return tiny.compose(vit, llama, **(TILED if request.param == "tiles" else {"vision_feature_layer": -2}))


def compose_two(first, second, text):
    """A model with two encoders side by side, and its processor."""
    torch.manual_seed(0)
    vision = str(first), str(second)
    model = tiny.VLMForConditionalGeneration.from_backbones(vision, str(text))
    return model, tiny.VLMProcessor.from_backbones(vision, str(text), model.config)


def test_features_of_the_tower_stand_in_for_pixels(seeing, image):
    model, processor = seeing
    batch = tiny.collate(processor, tiny.ragged_dialogues(image)[:5])
    model.eval()  # GPT-2 has dropout
    expected = model(**batch)
    expected.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with torch.no_grad():
        _, features = model.model.encode_views(batch.pop("pixel_values"))
    found = model(**batch, vision_features=features)
    found.loss.backward()
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    for name, parameter in model.named_parameters():
        if "vision_tower" in name:
            assert parameter.grad is None or not parameter.grad.any()
        elif parameter.grad is not None:
            assert torch.equal(parameter.grad, gradients[name]), name


def test_pixels_and_features_are_not_both_taken(composed, image):
    model, processor = composed
    batch = tiny.collate(processor, tiny.ragged_dialogues(image)[:1])
    with pytest.raises(ValueError, match="both pixel_values and vision_features"):
        model(**batch, vision_features=torch.zeros(1, 1, 32))
