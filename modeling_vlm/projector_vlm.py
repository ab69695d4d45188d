"""Projectors: image features -> the language model's embedding space.

A projector is the part that always learns. Each takes `(images, tokens, vision hidden)` and gives
`(images, tokens, text hidden)`; the file travels with every checkpoint.
"""

from collections import OrderedDict

import torch
from torch import nn
from transformers import PreTrainedConfig


def build_projector(config: PreTrainedConfig) -> nn.Sequential:
    """
    The projector that `config.projector_type` names.

    `linear` is LLaVA's single layer, `gelu_norm` is Linear, GELU, LayerNorm, and `mlp` is LLaVA-1.5's Linear, GELU,
    Linear. All map `config.vision_config.hidden_size` features to `config.text_config.hidden_size`.
    """
    vision_size, text_size = config.vision_config.hidden_size, config.text_config.hidden_size
    projector = nn.Sequential(OrderedDict(linear_1=nn.Linear(vision_size, text_size)))
    if config.projector_type != "linear":
        projector.add_module("act", nn.GELU())
    if config.projector_type == "gelu_norm":
        projector.add_module("norm", nn.LayerNorm(text_size))
    if config.projector_type == "mlp":
        projector.add_module("linear_2", nn.Linear(text_size, text_size))
    return projector


def select_features(hidden_states: torch.Tensor, strategy: str, num_prefix_tokens: int) -> torch.Tensor:
    """
    The visual tokens of `(images, tokens, hidden)`: the CLS token, the patches or everything.

    The encoder's prefix tokens come first (CLS leading), so `patch` drops exactly `num_prefix_tokens` of them: none
    for an encoder without CLS token (SigLIP), several for one with registers.
    """
    if strategy == "cls":
        return hidden_states[:, :1]
    return hidden_states[:, num_prefix_tokens:] if strategy == "patch" else hidden_states


__all__ = ["build_projector", "select_features"]
