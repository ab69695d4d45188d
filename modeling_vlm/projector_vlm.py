"""Projectors: image features -> the language model's embedding space.

A projector is the part that always learns. Each is made of `(config, vision_size, text_size)`, takes the visual tokens
`(views, tokens, vision_size)` and gives `(views, tokens out, text_size)`; how many come out follows from the config. A
class of the user's own keeps the same two promises (`own_projector_vlm.py`). The file travels with every checkpoint.
"""

from collections import OrderedDict

import torch
from torch import nn
from transformers import PreTrainedConfig

from .configuration_vlm import is_own_projector
from .model_error_vlm import DuetError
from .own_projector_vlm import build_own_projector


class Linear(nn.Sequential):
    """One layer, as many tokens as come in (LLaVA, https://arxiv.org/abs/2304.08485)."""

    def __init__(self, config: PreTrainedConfig, vision_size: int, text_size: int):
        super().__init__(OrderedDict(linear_1=nn.Linear(vision_size, text_size)))


class GeluNorm(nn.Sequential):
    """Linear, GELU, LayerNorm; as many tokens as come in."""

    def __init__(self, config: PreTrainedConfig, vision_size: int, text_size: int):
        super().__init__(
            OrderedDict(linear_1=nn.Linear(vision_size, text_size), act=nn.GELU(), norm=nn.LayerNorm(text_size))
        )


class MLP(nn.Sequential):
    """Linear, GELU, Linear; as many tokens as come in (LLaVA-1.5, https://arxiv.org/abs/2310.03744)."""

    def __init__(self, config: PreTrainedConfig, vision_size: int, text_size: int):
        linear_1, linear_2 = nn.Linear(vision_size, text_size), nn.Linear(text_size, text_size)
        super().__init__(OrderedDict(linear_1=linear_1, act=nn.GELU(), linear_2=linear_2))


class Identity(nn.Identity):
    """The encoder's features as they are, for an encoder that is as wide as the language model; nothing to learn."""

    def __init__(self, config: PreTrainedConfig, vision_size: int, text_size: int):
        super().__init__()
        if vision_size != text_size:
            raise DuetError(
                f"projector_type=identity needs features as wide as the language model's embeddings; the vision "
                f"encoder's are {vision_size} wide, the embeddings {text_size}. Choose linear or mlp."
            )


class _OnGrid(nn.Module):
    """What reads patches at their places, as `(views, channels, rows, columns)`."""

    def __init__(self, config: PreTrainedConfig, vision_size: int, text_size: int):
        super().__init__()
        if config.vision_feature_select_strategy != "patch":
            raise DuetError(
                f"projector_type={config.projector_type} reads patches at their places; it needs "
                f'vision_feature_select_strategy="patch", not {config.vision_feature_select_strategy!r}.'
            )
        self.grid, self.scale = config.patch_grid, config.projector_settings["scale"]
        if any(side % self.scale for side in self.grid):
            raise DuetError(
                f"projector_type={config.projector_type} with scale={self.scale} does not fit the encoder's grid of "
                f"{self.grid[0]}x{self.grid[1]} patches; choose a scale that divides both, or another image_size."
            )

    def on_grid(self, features: torch.Tensor) -> torch.Tensor:
        return features.transpose(1, 2).unflatten(2, self.grid)


class PixelShuffle(_OnGrid):
    """
    Each square of `scale` x `scale` patches becomes one token that holds them all: space to depth, then one layer.

    Source: https://arxiv.org/abs/1609.05158 the other way round, as in Idefics3 (https://arxiv.org/abs/2408.12637).
    """

    def __init__(self, config: PreTrainedConfig, vision_size: int, text_size: int):
        super().__init__(config, vision_size, text_size)
        self.linear = nn.Linear(vision_size * self.scale**2, text_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        squares = nn.functional.pixel_unshuffle(self.on_grid(features), self.scale)
        return self.linear(squares.flatten(2).transpose(1, 2))


class AveragePool(_OnGrid):
    """Each square of `scale` x `scale` patches becomes their mean, then an MLP (DeCo, https://arxiv.org/abs/2405.20985)."""

    def __init__(self, config: PreTrainedConfig, vision_size: int, text_size: int):
        super().__init__(config, vision_size, text_size)
        self.mlp = MLP(config, vision_size, text_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        means = nn.functional.avg_pool2d(self.on_grid(features), self.scale)
        return self.mlp(means.flatten(2).transpose(1, 2))


class CAbstractor(_OnGrid):
    """
    Convolutions, an average over squares of `scale` x `scale`, convolutions: `depth` residual blocks before and after.

    Source: Honeybee (https://arxiv.org/abs/2312.06742), with blocks of 1x1, 3x3 and 1x1 convolutions.
    """

    def __init__(self, config: PreTrainedConfig, vision_size: int, text_size: int):
        super().__init__(config, vision_size, text_size)
        depth = config.projector_settings["depth"]
        self.enter = nn.Conv2d(vision_size, text_size, 1)
        self.before = nn.Sequential(*(_ResidualBlock(text_size) for _ in range(depth)))
        self.after = nn.Sequential(*(_ResidualBlock(text_size) for _ in range(depth)))
        self.readout = MLP(config, text_size, text_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        patches = self.before(self.enter(self.on_grid(features)))
        squares = self.after(nn.functional.avg_pool2d(patches, self.scale))
        return self.readout(squares.flatten(2).transpose(1, 2))


class _ResidualBlock(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        inner = max(1, size // 4)
        self.layers = nn.Sequential(
            nn.GroupNorm(1, size), nn.Conv2d(size, inner, 1), nn.GELU(), nn.Conv2d(inner, inner, 3, padding=1),
            nn.GELU(), nn.Conv2d(inner, size, 1),
        )  # fmt: skip

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return patches + self.layers(patches)


class Resampler(nn.Module):
    """
    `num_queries` learned queries read the visual tokens by cross attention, in `depth` blocks.

    Source: Flamingo's Perceiver resampler (https://arxiv.org/abs/2204.14198); of depth 1 as in Qwen-VL
    (https://arxiv.org/abs/2308.12966).
    """

    def __init__(self, config: PreTrainedConfig, vision_size: int, text_size: int):
        super().__init__()
        settings = config.projector_settings
        self.queries = nn.Parameter(torch.empty(settings["num_queries"], text_size))
        self.linear = nn.Linear(vision_size, text_size)
        self.norm = nn.LayerNorm(text_size)
        self.blocks = nn.ModuleList(_CrossAttentionBlock(config, text_size) for _ in range(settings["depth"]))
        self.final_norm = nn.LayerNorm(text_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(self.linear(features))
        queries = self.queries.expand(len(features), -1, -1)
        for block in self.blocks:
            queries = block(queries, tokens)
        return self.final_norm(queries)


class _CrossAttentionBlock(nn.Module):
    def __init__(self, config: PreTrainedConfig, size: int):
        super().__init__()
        self.heads = next(heads for heads in range(max(1, size // 64), 0, -1) if size % heads == 0)
        self.norm = nn.LayerNorm(size)
        self.query, self.key, self.value = (nn.Linear(size, size) for _ in range(3))
        self.output = nn.Linear(size, size)
        self.mlp_norm = nn.LayerNorm(size)
        self.mlp = MLP(config, size, size)

    def forward(self, queries: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        normed = self.norm(queries)
        heads = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(normed), self.key(tokens), self.value(tokens))
        )
        read = nn.functional.scaled_dot_product_attention(*heads)
        queries = queries + self.output(read.transpose(1, 2).flatten(2))
        return queries + self.mlp(self.mlp_norm(queries))


PROJECTORS = {
    "linear": Linear,
    "gelu_norm": GeluNorm,
    "mlp": MLP,
    "identity": Identity,
    "pixel_shuffle": PixelShuffle,
    "average_pool": AveragePool,
    "resampler": Resampler,
    "c_abstractor": CAbstractor,
}
"""Name -> class of each projector."""


def build_projector(config: PreTrainedConfig, vision_size: int, text_size: int) -> nn.Module:
    """
    The projector that `config.projector_type` names.

    Args:
        vision_size: width of the encoder's features.
        text_size: width of the language model's embeddings.

    Raises:
        `DuetError`: it does not fit the encoder, or is a class that cannot be loaded.
    """
    if not is_own_projector(config.projector_type):
        return PROJECTORS[config.projector_type](config, vision_size, text_size)
    return build_own_projector(config, vision_size, text_size)


def select_features(hidden_states: torch.Tensor, strategy: str, num_prefix_tokens: int) -> torch.Tensor:
    """
    The visual tokens of `(views, tokens, hidden)`: the CLS token, the patches or everything.

    The encoder's prefix tokens come first (CLS leading), so `patch` drops exactly `num_prefix_tokens` of them: none
    for an encoder without CLS token (SigLIP), several for one with registers.
    """
    if strategy == "cls":
        return hidden_states[:, :1]
    return hidden_states[:, num_prefix_tokens:] if strategy == "patch" else hidden_states


__all__ = ["PROJECTORS", "Resampler", "build_projector", "select_features"]
