"""A projector of one's own: what each square of patches is on the whole beside what is strongest in it, then a layer.

    python train_pretrain.py --config shapes --projector_type examples/own_projector.py:MeanAndMax \\
        --projector_settings scale=2 --output_dir outputs/mean_and_max

This file travels with the checkpoints, so it imports nothing but what is installed where they are loaded; the promises
that a projector keeps are in docs/projectors.md. Four patches become one token: a step costs less, and detail is lost.
"""

import torch
from torch import nn


class MeanAndMax(nn.Module):
    def __init__(self, config, vision_size: int, text_size: int):
        super().__init__()
        self.grid = config.patch_grid  # rows and columns
        self.scale = config.projector_settings.get("scale", 2)
        self.linear = nn.Linear(2 * vision_size, text_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(views, tokens, vision_size)` -> `(views, fewer tokens, text_size)`."""
        patches = features.transpose(1, 2).unflatten(2, self.grid)
        mean = nn.functional.avg_pool2d(patches, self.scale)
        strongest = nn.functional.max_pool2d(patches, self.scale)
        return self.linear(torch.cat([mean, strongest], dim=1).flatten(2).transpose(1, 2))
