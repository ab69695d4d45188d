"""Two backbones become one model, or its shape without memory: tried, checked, described.

`VLMForConditionalGeneration.from_backbones` is the door to `compose`; what only needs to know the shape (how many
tokens an image takes, whether the backbones fit) lays it out on the meta device. What the config does not say of an
encoder is found by running it, so nothing here knows a family. The file travels with every checkpoint.
"""

import os
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .backbones_vlm import (
    BackboneKwargs,
    check_causal,
    check_decoder,
    check_generation,
    check_logits,
    find_image_token_id,
    grow_embeddings,
    load_backbone_config,
    load_language_model,
    load_vision_tower,
    vision_config_of,
)
from .configuration_vlm import VLMConfig, kind_of
from .generation_vlm import savable
from .model_error_vlm import DuetError, in_a_line
from .native_vlm import say_native
from .own_projector_vlm import find_own_projector
from .projector_vlm import select_features
from .vision_vlm import VLMVisionPair, blank_image, leave_out_unused


Model = TypeVar("Model", bound=PreTrainedModel)
Backbone = str | PreTrainedConfig
"""Hub name or folder of a checkpoint, or a config to start from scratch."""


def composed_config(
    vision: Backbone | tuple[Backbone, ...],
    text: Backbone,
    *,
    tokenizer=None,
    image_token: str = "<image>",
    projector_type: str | type[nn.Module] = "mlp",
    vision_kwargs: BackboneKwargs | None = None,
    text_kwargs: BackboneKwargs | None = None,
    **settings,
) -> VLMConfig:
    """
    The config of two backbones that are joined; see `VLMForConditionalGeneration.from_backbones`.

    Args:
        **settings: further fields of `VLMConfig`.

    Raises:
        `DuetError`: a config cannot be loaded or used, with its name and the reason.
    """
    vision_kwargs, text_kwargs = vision_kwargs or {}, text_kwargs or {}
    if "quantization_config" in {**vision_kwargs, **text_kwargs}:
        raise DuetError("backbones are composed whole; save the composed model and load it with quantization_config.")
    encoders = encoders_of(vision)
    if len(encoders) not in (1, 2):
        raise DuetError(f"{len(encoders)} vision encoders were given; expected one, or two side by side.")
    vision_config = vision_config_of(encoders, vision_kwargs)
    text_config = load_backbone_config("language model", text, text_kwargs)
    check_causal(text_config)
    projector_type, projector_file = find_own_projector(projector_type)
    config = VLMConfig(
        vision_config=vision_config,
        text_config=text_config,
        projector_type=projector_type,
        image_token_id=find_image_token_id(text if tokenizer is None else tokenizer, image_token, text_kwargs),
        **settings,
    )
    config._projector_file = projector_file
    return config


def encoders_of(vision: Backbone | tuple[Backbone, ...]) -> tuple[Backbone, ...]:
    """One encoder, or several, as a tuple."""
    return tuple(vision) if isinstance(vision, (list, tuple)) else (vision,)


def compose(
    model_class: type[Model],
    vision: Backbone | tuple[Backbone, Backbone],
    text: Backbone,
    dtype: torch.dtype,
    vision_kwargs: BackboneKwargs,
    text_kwargs: BackboneKwargs,
    **settings,
) -> Model:
    """
    A model of two backbones, tried on a text and an image; see `VLMForConditionalGeneration.from_backbones`.

    Args:
        **settings: what `composed_config` takes.
    """
    config = composed_config(vision, text, vision_kwargs=vision_kwargs, text_kwargs=text_kwargs, **settings)
    config.dtype = dtype
    configs = getattr(config.vision_config, "encoders", (config.vision_config,))
    towers = [load_vision_tower(*pair, dtype, vision_kwargs) for pair in zip(encoders_of(vision), configs)]
    causal_lm = load_language_model(text, config.text_config, dtype, text_kwargs)
    check_decoder(causal_lm)
    generation_config = causal_lm.generation_config
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # the projector is born here, in the precision of the backbones
    try:
        tower = towers[0] if len(towers) == 1 else VLMVisionPair(config.vision_config, *towers)
        model = model_class(config, tower, causal_lm)
    finally:
        torch.set_default_dtype(default_dtype)
    check_logits(model, causal_lm)
    grow_embeddings(model, config.image_token_id)
    generation_config.suppress_tokens = sorted({*(generation_config.suppress_tokens or []), config.image_token_id})
    model.generation_config, _ = savable(generation_config)
    description = describe(model.eval())
    check_generation(model)
    if os.environ.get("RANK", "0") == "0":  # tried in every process, said in one
        print(description)
    return model


def shape_of(model_class: type[Model], config: PreTrainedConfig) -> Model:
    """
    A model without memory or weights, on the meta device; what its config left open is found all the same.

    Raises:
        `DuetError`: the backbones do not fit together.
    """
    with torch.device("meta"):
        return model_class(config)


@torch.no_grad()
def fit_vision_tower(model: PreTrainedModel) -> None:
    """
    Find what the tower's features need, and its prefix tokens: a table of encoders would miss the next one.

    Args:
        model: a `VLMModel` that has its tower; its config and its tower are completed.

    Raises:
        `DuetError`: the encoder cannot take images of this size, or gives other features than one for each patch.
    """
    config, tower = model.config, model.vision_tower
    kind, (height, width) = kind_of(config.vision_config), config.image_size
    rows, columns = config.patch_grid
    image, training = blank_image(tower, config.image_size, views=2), tower.training
    tower.eval()
    try:
        states = model.vision_hidden_states(image)[1]
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, AssertionError) as error:
        reason = in_a_line(error, 200)
        raise DuetError(
            f"the vision encoder ({kind}) cannot take images of {height}x{width} pixels: {reason} Expected an "
            "encoder of images such as ViT, CLIP, SigLIP or DINOv2, and an image_size that it can take."
        ) from error
    shape = tuple(states.shape) if isinstance(states, torch.Tensor) else ()
    if len(shape) != 3 or shape[0] != len(image) or shape[1] < rows * columns:
        raise DuetError(
            f"the vision encoder ({kind}) gives features of shape {shape or type(states).__name__} for "
            f"{len(image)} images of {rows}x{columns} patches; Duet needs one token per patch after the encoder's "
            "prefix tokens."
        )
    if not (states.is_meta or torch.equal(states, model.vision_hidden_states(image)[1])):
        raise DuetError(
            f"the vision encoder ({kind}) gives other features for the same image each time, as one that leaves "
            "out or shuffles patches at random does; choose one such as ViT, CLIP, SigLIP or DINOv2."
        )
    config.num_prefix_tokens = states.shape[1] - rows * columns
    if config.vision_feature_select_strategy == "cls" and config.num_prefix_tokens == 0:
        raise DuetError(
            f'vision_feature_select_strategy="cls" needs a CLS token, and this vision encoder ({kind}) has none; '
            'choose "patch".'
        )
    config.vision_modules_left_out = leave_out_unused(tower, lambda: model.vision_hidden_states(image)[1])
    tower.train(training)


@torch.no_grad()
def count_visual_tokens(model: PreTrainedModel) -> None:
    """
    Find the tokens of a view by projecting two.

    Args:
        model: a `VLMModel` that has all its parts; its config is completed.

    Raises:
        `DuetError`: the projector does not take the features, or gives something else than embeddings.
    """
    config, width = model.config, model.get_input_embeddings().embedding_dim
    states = model.vision_hidden_states(blank_image(model.vision_tower, config.image_size))[1]
    features = select_features(states, config.vision_feature_select_strategy, config.num_prefix_tokens)
    features = features.expand(2, -1, -1)
    try:
        projected = model.multi_modal_projector(features)
    except Exception as error:  # whatever a class of the user's own raises
        reason = in_a_line(error, 200)
        raise DuetError(
            f"the projector {config.projector_type} does not take features of shape {tuple(features.shape)} "
            f"(views, tokens, hidden): {reason}"
        ) from error
    if not isinstance(projected, torch.Tensor) or projected.ndim != 3 or projected.shape[::2] != (2, width):
        found = tuple(projected.shape) if isinstance(projected, torch.Tensor) else type(projected).__name__
        raise DuetError(
            f"the projector {config.projector_type} gives {found} for features of shape {tuple(features.shape)}; "
            f"expected (views, tokens, {width}), {width} being the width of the language model's embeddings."
        )
    if config.image_seq_length not in (None, projected.shape[1]):
        raise DuetError(
            f"the config has image_seq_length={config.image_seq_length}, and this vision encoder "
            f"({config.vision_config.model_type}) gives {projected.shape[1]} visual tokens; leave it out, it is "
            "found."
        )
    config.image_seq_length = projected.shape[1]


def check_room(config: PreTrainedConfig, learned: int | None) -> None:
    """
    See that an image leaves room for text.

    Args:
        learned: how many positions the language model has learned, `None` for any number.

    Raises:
        `DuetError`: it does not.
    """
    most = config.tile_tokens(config.max_tiles, 1)
    if learned is not None and most >= learned:
        raise DuetError(
            f"an image takes {'up to ' if config.max_tiles > 1 else ''}{most} positions, and the language model "
            f"({config.text_config.model_type}) has learned {learned}: no text would fit. Choose fewer "
            'visual tokens: a smaller image_size, projector_type="resampler", fewer max_tiles, or '
            'vision_feature_select_strategy="cls".'
        )


def check_positions(model: PreTrainedModel, tokens: int, position_ids: torch.Tensor | None, cache) -> None:
    """
    See that a sequence has learned positions.

    Args:
        model: `VLMModel`, of learned positions.
        tokens: positions of the sequence, those in the cache not counted.
        position_ids: where they are, if they do not stand one behind the other. On a GPU, which would have to be waited
            for, they are read only where there are more positions than learned ones.

    Raises:
        `DuetError`: it has more.
    """
    past = cache.get_seq_length() if cache is not None else 0
    if not isinstance(past, int):
        return
    positions = past + tokens
    if position_ids is not None and not position_ids.is_meta:
        at_hand = position_ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if at_hand or positions > model.max_positions:  # padding on the left takes none
            positions = int(position_ids.max()) + 1
    if positions > model.max_positions:
        raise DuetError(
            f"the sequence has {positions} positions (image tokens included) and the language model "
            f"({model.config.text_config.model_type}) has learned {model.max_positions}; shorten the text, or set a "
            "smaller max_length in training and max_new_tokens in generation."
        )


@torch.no_grad()
def describe(model: PreTrainedModel) -> str:
    """
    Run one image through a composed model, and say in one line what it is made of.

    Raises:
        `DuetError`: what comes out is not finite.
    """
    config, base = model.config, model.model
    image = blank_image(base.vision_tower, config.image_size)
    ids = torch.full((1, config.tile_tokens() + 1), config.image_token_id, device=model.device)
    ids[0, -1] = 0
    logits = model(input_ids=ids, pixel_values=image).logits
    if not logits.isfinite().all():
        raise DuetError("the composed model gives infinite or undefined logits for an image; use another dtype.")

    height, width = config.image_size
    rows, columns = config.patch_grid
    tiles = f", up to {config.max_tiles} tiles more" if config.max_tiles > 1 else ""
    return (
        f"{kind_of(config.vision_config)} ({height}x{width} pixels, {rows}x{columns} patches after "
        f"{config.num_prefix_tokens} prefix tokens, {config.vision_config.hidden_size} wide; "
        f"{_parameters(base.vision_tower)}) -> {config.projector_type} ({config.image_seq_length} tokens an "
        f"image{tiles}; {_parameters(base.multi_modal_projector)}) -> {config.text_config.model_type} "
        f"({model.get_input_embeddings().embedding_dim} wide, {logits.shape[-1]} entries, "
        f"{base.max_positions or 'any number of'} positions; {_parameters(base.language_model)}); {say_native(model)}"
    )


def _parameters(module):
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in module.parameters()}
    number = sum(parameter.numel() for parameter in module.parameters())
    return ", ".join([f"{number:,} parameters", *sorted(dtypes)])


__all__ = [
    "check_positions",
    "check_room",
    "compose",
    "composed_config",
    "count_visual_tokens",
    "describe",
    "fit_vision_tower",
    "shape_of",
]
