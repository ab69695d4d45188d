"""Vision towers: any encoder run on plain pixels, two of them side by side, and what of one its features do not need.

Nothing here knows a family by its name: what an encoder takes is read off its `forward`, and which parts are unused is
found by a backward pass. The file travels with every checkpoint.
"""

import inspect
from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, ModelOutput
from transformers.utils import can_return_tuple

from .configuration_vlm import VLMVisionPairConfig, own_image_size, pair_of, patch_grid_of


def build_vision_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """The encoder that a config describes, with weights yet to be learned or loaded."""
    if config.model_type == VLMVisionPairConfig.model_type:
        return VLMVisionPair(config)
    return AutoModel.from_config(config)


def forward_names(tower: PreTrainedModel) -> frozenset[str]:
    """Names of what an encoder's `forward` takes; to be asked once, when a model is built."""
    return frozenset(inspect.signature(tower.forward).parameters)


def run_tower(tower: PreTrainedModel, takes: frozenset[str], pixel_values: torch.Tensor, **kwargs) -> ModelOutput:
    """
    Run an encoder on images of any size that it can take.

    Args:
        takes: `forward_names` of the tower.
        pixel_values (`torch.Tensor` of shape `(views, channels, height, width)`): normalised pixels, of any dtype.
        **kwargs: passed on.
    """
    config, size = tower.config, tuple(pixel_values.shape[-2:])
    pixel_values = pixel_values.to(tower.dtype)  # some encoders do so themselves
    if "spatial_shapes" in takes:  # it takes patches with their grid (SigLIP 2), here all of one size
        patches = _patches(pixel_values, *pair_of(config.patch_size))
        grid = torch.tensor([patch_grid_of(config, size)] * len(patches))
        mask = torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device)
        kwargs.update(pixel_attention_mask=mask, spatial_shapes=grid)
        pixel_values = patches
    elif "interpolate_pos_encoding" in takes and size != own_image_size(config):
        kwargs["interpolate_pos_encoding"] = True
    return tower(pixel_values, return_dict=True, **kwargs)


def _patches(pixel_values, height, width):
    """`(views, patches, height * width * channels)`, of each patch the pixels row by row and their channels inside."""
    rows, columns = pixel_values.shape[-2] // height, pixel_values.shape[-1] // width
    pixel_values = pixel_values[..., : rows * height, : columns * width]
    pixels = pixel_values.unflatten(3, (columns, width)).unflatten(2, (rows, height))  # views, C, rows, h, columns, w
    return pixels.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


class VLMVisionPair(PreTrainedModel):
    """
    Two encoders that see the same image, their features of one place one behind the other (as in Prismatic,
    https://arxiv.org/abs/2402.07865, and Eyes Wide Shut, https://arxiv.org/abs/2401.06209).

    The second is given the image in its own normalisation, and in the size at which it has as many patches as the
    first. Prefix tokens have no place and are left out.

    Args:
        config (`VLMVisionPairConfig`): both encoders.
        first, second (`PreTrainedModel`, *optional*): loaded encoders; built from the config if missing.
    """

    config_class = VLMVisionPairConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(
        self,
        config: PreTrainedConfig,
        first: PreTrainedModel | None = None,
        second: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        # The dtype that this is built in: the library sets that of the configs in `VLMConfig`, and none deeper.
        dtype = torch.get_default_dtype()
        self.first = AutoModel.from_config(config.first_config, dtype=dtype) if first is None else first
        self.second = AutoModel.from_config(config.second_config, dtype=dtype) if second is None else second
        config.first_config, config.second_config = self.first.config, self.second.config
        self._takes = [forward_names(encoder) for encoder in self.encoders]
        self.post_init()

    @property
    def encoders(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        """Both encoders."""
        return self.first, self.second

    def get_input_embeddings(self) -> nn.Module:
        return self.first.get_input_embeddings()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool | None = None, **kwargs
    ) -> BaseModelOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(views, channels, height, width)`): normalised for the first encoder.
            output_hidden_states (`bool`): also the states before each encoder's final norm, as the one hidden state.

        Returns:
            `BaseModelOutput` of features `(views, patches, hidden of the first + hidden of the second)`.
        """
        kwargs["output_hidden_states"] = output_hidden_states
        rows, columns = patch_grid_of(self.first.config, pixel_values.shape[-2:])
        outputs = [
            run_tower(encoder, takes, pixels, **kwargs)
            for encoder, takes, pixels in zip(
                self.encoders, self._takes, (pixel_values, self._pixels_of_second(pixel_values.float(), rows, columns))
            )
        ]

        def joined(states):
            return torch.cat([part[:, part.shape[1] - rows * columns :] for part in states], dim=-1)

        return BaseModelOutput(
            last_hidden_state=joined([output.last_hidden_state for output in outputs]),
            hidden_states=(joined([o.hidden_states[-1] for o in outputs]),) if output_hidden_states else None,
        )

    def _pixels_of_second(self, pixel_values, rows, columns):
        if self.config.image_mean is not None:
            first_mean, second_mean = pixel_values.new_tensor(self.config.image_mean)[..., None, None]
            first_std, second_std = pixel_values.new_tensor(self.config.image_std)[..., None, None]
            pixel_values = (pixel_values * first_std + first_mean - second_mean) / second_std
        height, width = pair_of(self.first.config.patch_size)
        pixel_values = pixel_values[..., : rows * height, : columns * width]  # all that the first has patches of
        height, width = pair_of(self.second.config.patch_size)
        size = (rows * height, columns * width)
        if size != tuple(pixel_values.shape[-2:]):
            pixel_values = nn.functional.interpolate(pixel_values, size, mode="bilinear", antialias=True)
        return pixel_values


class _LeftOut(nn.Module):
    """Stands where a part of an encoder was that nothing reads."""

    def forward(self, states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return states


def blank_image(tower: PreTrainedModel, size: tuple[int, int], views: int = 1) -> torch.Tensor:
    """Images of noise, `(views, channels, height, width)`, for an encoder to be tried on."""
    weight = next(tower.parameters())
    channels = getattr(getattr(tower, "first", tower).config, "num_channels", 3)
    noise = torch.randn(views, channels, *size, generator=torch.Generator().manual_seed(0))
    return noise.to(weight.device, weight.dtype)


_MARKS = ("ds_id", "_hp_mapping")
"""What DeepSpeed leaves at a parameter: in its third stage, in the first and second."""


def runs_in_step(module: nn.Module) -> bool:
    """
    Whether all processes have to call a module, and alike: it gathers weights that are cut (FSDP2, ZeRO's third stage),
    or sums gradients in the order in which they come (ZeRO's others), whosever they are.
    """
    gathers = any(hasattr(part, "unshard") for part in module.modules())
    return gathers or any(hasattr(parameter, mark) for parameter in module.parameters() for mark in _MARKS)


def unused_parameters(tower: PreTrainedModel, features: Callable[[], torch.Tensor]) -> set[str]:
    """Names of a tower's parameters that its features do not depend on, found by one backward pass."""
    names, parameters = zip(*tower.named_parameters())
    asked = [parameter.requires_grad for parameter in parameters]
    tower.requires_grad_(True)
    with torch.enable_grad():
        gradients = torch.autograd.grad(features().float().sum(), parameters, allow_unused=True)
    for parameter, requires_grad in zip(parameters, asked):
        parameter.requires_grad_(requires_grad)
    return {name for name, gradient in zip(names, gradients) if gradient is None}


def leave_out_unused(tower: PreTrainedModel, features: Callable[[], torch.Tensor]) -> list[str]:
    """
    Take out of a tower what its features do not depend on (poolers, heads, norms above the layer that is read).

    Args:
        features: gives the features of some image.

    Returns:
        `list[str]`: what was left out, for `leave_out`.
    """
    unused, names = unused_parameters(tower, features), []
    with torch.no_grad():
        expected = features()
    for name, module in list(tower.named_modules()):
        own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters()]
        if not name or not own or not unused.issuperset(own) or not _still_there(tower, name):
            continue
        leave_out(tower, [name])
        if _same(features, expected):
            names.append(name)
            unused.difference_update(own)
        else:  # its module is looked into by another: only its parameters go
            tower.set_submodule(name, module)
    leave_out(tower, sorted(unused))
    return names + sorted(unused)


def leave_out(tower: nn.Module, names: list[str]) -> None:
    """Take parts out of an encoder, by name; a lone parameter stays as a buffer, because its module may look for it."""
    for name in names:
        parent_name, _, child = name.rpartition(".")
        if not _still_there(tower, parent_name):  # named otherwise in this version of the library
            continue
        parent = tower.get_submodule(parent_name)
        if child in parent._parameters:
            parent.register_buffer(child, parent._parameters.pop(child).detach())
        elif child in parent._modules:
            tower.set_submodule(name, _LeftOut())


def _still_there(tower, name):
    try:
        return tower.get_submodule(name) is not None
    except AttributeError:
        return False


@torch.no_grad()
def _same(features, expected):
    try:
        found = features()
    except Exception:  # whatever a module does with a part that is not there
        return False
    return found.is_meta or torch.equal(found, expected)


__all__ = [
    "VLMVisionPair",
    "blank_image",
    "build_vision_tower",
    "forward_names",
    "leave_out",
    "leave_out_unused",
    "run_tower",
    "runs_in_step",
    "unused_parameters",
]
