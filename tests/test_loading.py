"""Weights of a saved folder go into a model that exists: by the stock Trainer, or by `load_state_dict`."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, Trainer, TrainingArguments, ViTConfig
from transformers.trainer_utils import load_sharded_checkpoint

from modeling_vlm import VLMConfig, VLMForConditionalGeneration
from processing import VLMDataCollator
from tests import tiny


SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
VIT = ViTConfig(image_size=32, patch_size=8, **SIZES)
MIXTRAL = MixtralConfig(
    vocab_size=64, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128,
    **SIZES,
)  # fmt: skip


def mixture(seed):
    torch.manual_seed(seed)
    config = VLMConfig(vision_config=VIT.to_dict(), text_config=MIXTRAL.to_dict(), image_token_id=63)
    return VLMForConditionalGeneration(config)


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_saved_file_goes_into_a_model_that_exists(tmp_path):
    """Of a ViT's layers the Hub has other names; of a mixture's experts it has each apart."""
    saved, other = mixture(0), mixture(1)
    saved.save_pretrained(tmp_path)
    file = load_file(tmp_path / "model.safetensors")
    assert not file.keys() <= other.state_dict().keys()
    parameters = list(other.parameters())
    found = other.load_state_dict(file)  # strict
    assert not found.missing_keys and not found.unexpected_keys and same(weights(other), weights(saved))
    assert all(one is two for one, two in zip(parameters, other.parameters()))  # those that an optimiser may hold


def test_names_of_the_modules_are_left_as_they_are():
    saved, other = mixture(0), mixture(1)
    other.load_state_dict(saved.state_dict())
    assert same(weights(other), weights(saved))
    with pytest.raises(RuntimeError, match="nobody.weight"):
        other.load_state_dict({**saved.state_dict(), "nobody.weight": torch.zeros(1)})


@pytest.mark.parametrize("size", [pytest.param(20_000, marks=pytest.mark.slow), 60_000])
def test_shards_are_read_one_by_one(tmp_path, size):
    """The experts of a layer may lie in two of them."""
    saved, other = mixture(0), mixture(1)
    saved.save_pretrained(tmp_path, max_shard_size=size)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len({file for name, file in index.items() if "experts" in name and "layers.0" in name}) > 1
    load_sharded_checkpoint(other, tmp_path, strict=False)
    assert same(weights(other), weights(saved)) and "_waiting_weights" not in other.__dict__


def test_a_model_inside_another_module_takes_a_saved_file(tmp_path):
    saved, inner = mixture(0), mixture(1)
    saved.save_pretrained(tmp_path)
    file = load_file(tmp_path / "model.safetensors")
    torch.nn.Sequential(inner).load_state_dict({f"0.{name}": tensor for name, tensor in file.items()})
    assert same(weights(inner), weights(saved))


def test_a_copy_of_a_model_is_loaded_for_itself(tmp_path):
    saved, first = mixture(0), mixture(1)
    saved.save_pretrained(tmp_path)
    second, before = copy.deepcopy(first), weights(first)
    second.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert same(weights(second), weights(saved)) and same(weights(first), before)


def trainer_of(pair, folders, items, folder, seed=0, lora=False, **settings):
    model, processor = tiny.compose(*folders(pair), tiny.PAIRS[pair][2])
    if lora:
        torch.manual_seed(seed)
        model = get_peft_model(model, LoraConfig(target_modules=["c_attn", "q_proj"], r=2))
    elif seed:
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, learning_rate=1e-2, max_steps=4,
        per_device_train_batch_size=2, remove_unused_columns=False, save_strategy="steps", save_steps=2,
        logging_steps=1, **settings,
    )  # fmt: skip
    return Trainer(
        model=model, args=arguments, processing_class=processor, data_collator=VLMDataCollator(processor),
        train_dataset=items, eval_dataset=items,
    )  # fmt: skip


@pytest.mark.parametrize("lora", [False, True])
def test_the_stock_trainer_resumes_bit_for_bit(pair, folders, image, tmp_path, caplog, lora):
    """The tower learns too; another process would start with other weights."""
    items = tiny.ragged_dialogues(image)
    whole = trainer_of(pair, folders, items, tmp_path / "whole", lora=lora)
    whole.train()
    resumed = trainer_of(pair, folders, items, tmp_path / "resumed", seed=5, lora=lora)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same(weights(resumed.model), weights(whole.model))
    assert "missing keys" not in caplog.text and "unexpected keys" not in caplog.text


def test_the_stock_trainer_takes_the_best_model_bit_for_bit(pair, folders, image, tmp_path):
    """The one with the highest loss here, so that it is not the last."""
    items = tiny.ragged_dialogues(image)
    trainer = trainer_of(
        pair, folders, items, tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = VLMForConditionalGeneration.from_pretrained(trainer.state.best_model_checkpoint)
    assert same(weights(trainer.model), weights(best))


def test_weights_in_another_dtype_are_cast(tmp_path):
    saved, other = mixture(0), mixture(1)
    saved.save_pretrained(tmp_path)
    file = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(file, tmp_path / "half.safetensors")
    other.load_state_dict(load_file(tmp_path / "half.safetensors"))
    assert same(weights(other), {name: tensor.to(torch.bfloat16).float() for name, tensor in weights(saved).items()})
