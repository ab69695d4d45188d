"""Checkpoints of earlier versions go on loading, with the same ids, pixels and logits.

Each folder in `checkpoints/` holds what some version saved, and what its processor and its model gave then. To add one:

    python -m tests.test_checkpoints NAME
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, LlamaConfig, SiglipVisionConfig, ViTConfig

from modeling_vlm import VLMForConditionalGeneration
from processing import VLMProcessor
from tests import tiny


FOLDER = Path(__file__).parent / "checkpoints"
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
CHECKPOINTS = sorted(path.parent for path in FOLDER.glob("*/*/config.json"))


def inputs_of(processor):
    """A conversation about two drawn images, and one without any."""
    colours = Image.linear_gradient("L").resize((50, 40))
    images = [Image.merge("RGB", [colours, colours.rotate(90), colours.rotate(180)]), Image.new("RGB", (30, 70), "red")]
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": "what is it?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "a cat"}]
    return processor.apply_chat_template(
        [messages, [{"role": "user", "content": "is it blue"}]], tokenize=True, return_dict=True, return_tensors="pt"
    )


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_checkpoint_of_an_earlier_version_loads_and_says_what_it_said(folder):
    model, info = VLMForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    inputs = inputs_of(VLMProcessor.from_pretrained(folder))
    expected = load_file(folder / "expected.safetensors")
    assert inputs.keys() == expected.keys() - {"logits"}
    for name, values in inputs.items():
        torch.testing.assert_close(values, expected[name])
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected["logits"], rtol=1e-5, atol=1e-5)


def test_there_is_a_checkpoint_of_each_kind():
    assert {path.name for path in CHECKPOINTS} >= {"plain", "tiled"}


def main(name: str) -> None:
    """Save a plain checkpoint, and one of two encoders with tiles, of this version."""
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    words = {"vocab_size": 400, **ids}
    vit = ViTConfig(image_size=32, patch_size=8, **SIZES)
    siglip = SiglipVisionConfig(image_size=32, patch_size=16, **SIZES)
    gpt2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=256, **words)
    llama = LlamaConfig(max_position_embeddings=512, **SIZES, **words)
    kinds = {
        "plain": (vit, gpt2, {"projector_type": "mlp", "vision_feature_layer": -2}),
        "tiled": ((vit, siglip), llama, {"projector_type": "c_abstractor", "max_tiles": 4}),
    }
    for kind, (vision, text, settings) in kinds.items():
        torch.manual_seed(0)
        tokenizer = tiny.byte_level_tokenizer()
        model = VLMForConditionalGeneration.from_backbones(vision, text, tokenizer=tokenizer, **settings)
        with torch.no_grad():
            for parameter in model.parameters():  # zeros and ones hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.05)
        processor = VLMProcessor.from_backbones(
            vision, text, model.config, tokenizer=tokenizer, image_mode="pad" if kind == "tiled" else None
        )
        folder = FOLDER / name / kind
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        inputs = inputs_of(processor)
        with torch.no_grad():
            tensors = {**inputs, "logits": model(**inputs).logits}
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "expected.safetensors")
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(json.dumps({"folder": str(folder), "bytes": size}))


if __name__ == "__main__":
    main(sys.argv[1])
