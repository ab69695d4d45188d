"""Adapters on a language model in 4 or 8 bit: what is whole, what learns, what is saved, and what it merges to."""

import contextlib
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel
from transformers.utils import is_bitsandbytes_available

import train_sft
from inference_vlm.merge import main as merge
from modeling_vlm import VLMForConditionalGeneration
from processing import VLMProcessor
from tests import tiny
from training_vlm.learning.lora import AdaptedVLM
from training_vlm.learning.trainer import VLMTrainer


pytestmark = pytest.mark.skipif(not is_bitsandbytes_available(), reason="needs bitsandbytes")
QUICK = [
    "--use_cpu", "--bf16", "False", "--per_device_train_batch_size", "4", "--max_new_tokens", "3",
    "--dataloader_num_workers", "0", "--disable_tqdm", "True", "--logging_steps", "1", "--learning_rate", "0.01",
    "--max_steps", "2", "--save_steps", "1", "--tune_text", "lora",
]  # fmt: skip


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Wide enough for blocks of 64: an encoder, and language models of linear layers and of GPT-2's kind."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    tokenizer = tiny.with_chatml(tiny.unigram_tokenizer())
    gpt2 = GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=256, vocab_size=256, bos_token_id=1, eos_token_id=2)
    for name, model in (("llama", tiny.wide_llama()), ("gpt2", GPT2LMHeadModel(gpt2))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    tiny.save_siglip(folder / "vision")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.save_numbered_pictures(tmp_path_factory.mktemp("data"), 8)


@contextlib.contextmanager
def watched(monkeypatch):
    """The models that Trainers train within."""
    models, made = [], VLMTrainer.__init__

    def init(trainer, *args, **kwargs):
        models.append(kwargs["model"])
        made(trainer, *args, **kwargs)

    monkeypatch.setattr(VLMTrainer, "__init__", init)
    yield models


def quantised_parts(model):
    return {
        n for n, m in model.named_modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt") and "lora" not in n
    }


@pytest.mark.parametrize(
    "bits, kind", [("4bit", "llama"), pytest.param("8bit", "llama", marks=pytest.mark.slow), ("4bit", "gpt2")]
)
def test_the_language_model_alone_is_in_few_bits_and_all_else_is_whole(
    backbones, source, tmp_path, bits, kind, monkeypatch, capsys
):
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    named = ["--vision_model", str(backbones / "vision"), "--text_model", str(backbones / kind)]
    with watched(monkeypatch) as models:
        train_sft.main(source + QUICK + named + [f"--load_in_{bits}", "--output_dir", str(tmp_path / "run")])
    [model] = models
    assert isinstance(model, AdaptedVLM)
    found = quantised_parts(model)
    assert found and all(".language_model." in name for name in found)
    run = tmp_path / "run"
    base = load_file(run / "base" / "model.safetensors")
    assert {tensor.dtype for tensor in base.values()} == {torch.float32}  # in whole precision, and of all parts
    assert "quantization_config" not in json.loads((run / "base" / "config.json").read_text())
    names = {name.removeprefix("base_model.model.") for name in load_file(run / "adapter_model.safetensors")}
    assert {name for name in names if "lora_" not in name} == {
        name for name in base if name.startswith("model.multi_modal_projector.")
    }
    # What the folder loads to is what was trained, few bits and all; and so is what it merges to.
    inputs = tiny.collate(VLMProcessor.from_pretrained(run), [tiny.dialogue("what is it?", "a cat", picture())])
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    for folder in (run / "checkpoint-1", run):
        loaded = VLMForConditionalGeneration.from_pretrained(folder)
        assert quantised_parts(loaded) == {name.removeprefix("base_model.model.") for name in found}
    with torch.no_grad():
        expected = loaded.eval()(**inputs).logits
        torch.testing.assert_close(expected, model.eval()(**inputs).logits, rtol=1e-5, atol=1e-5)
    capsys.readouterr()
    assert merge([str(run), str(tmp_path / "merged")]) == 0
    assert "which was held in few bits, is dequantised" in capsys.readouterr().out
    merged = VLMForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert not quantised_parts(merged) and not hasattr(merged.config, "quantization_config")
    if bits == "8bit":  # whose layers round what they are given, too
        asked = BitsAndBytesConfig(load_in_8bit=True)
        base = VLMForConditionalGeneration.from_pretrained(run / "base", quantization_config=asked)
        adapted = PeftModel.from_pretrained(base.dequantize(), run)
        with torch.no_grad():
            expected = adapted(**inputs).logits
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


def picture():
    return Image.fromarray(np.random.default_rng(5).integers(0, 256, (30, 40, 3), dtype=np.uint8))


@pytest.mark.parametrize("asked", [["--tune_text", "full"], ["--tune_text", "frozen"]])
def test_few_bits_without_adapters_are_refused(backbones, source, tmp_path, capsys, asked):
    named = ["--vision_model", str(backbones / "vision"), "--text_model", str(backbones / "llama"), "--load_in_4bit"]
    with pytest.raises(SystemExit):
        train_sft.main(source + QUICK[:-2] + named + ["--output_dir", str(tmp_path / "run"), *asked])
    assert "weights in few bits cannot learn" in capsys.readouterr().err
    assert not Path(tmp_path / "run").exists()
