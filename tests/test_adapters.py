"""Adapters of peft in a composed model: what is adapted, what else learns, what is saved and loads again."""

import torch
from peft import LoraConfig, get_peft_model

from tests import tiny
from training_vlm.learning.adapters import composed


def test_the_composed_model_is_found_behind_adapters_and_a_compiler(folders):
    model, _ = tiny.compose(*folders("vit-gpt2"), "cls")
    assert composed(model) is model
    assert composed(torch.compile(model)) is model
    adapted = get_peft_model(model, LoraConfig(target_modules=["c_attn"]))
    assert composed(adapted) is model
    assert composed(torch.compile(adapted)) is model
