"""What a processor is made of: the backbones' own tokenizer and image processor, made to fit each other.

The file travels with every checkpoint.
"""

import re
from typing import Any

import transformers
from PIL import Image
from tokenizers import processors
from transformers import AddedToken, BaseImageProcessor, PreTrainedConfig, PreTrainedTokenizerBase

from .data_error_vlm import DuetError


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, image_token: str) -> None:
    """
    Give a language model's tokenizer an image token, a pad token, and nothing at the end of a prompt.

    Raises:
        `DuetError`: it uses the image token for something else, or has no end.
    """
    known = tokenizer.get_vocab().get(image_token)
    token = None if known is None else tokenizer.added_tokens_decoder.get(known)
    if known is not None and not (token is not None and token.special):
        raise DuetError(
            f"the tokenizer already uses {image_token!r} (id {known}) for something that is no special token; choose "
            "another image_token."
        )
    tokenizer.add_tokens(AddedToken(image_token, special=True, normalized=False), special_tokens=True)
    if tokenizer.eos_token_id is None:
        raise DuetError(f"{type(tokenizer).__name__} has no eos token, so a model could not learn to stop; add one.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is known from lengths, so the two may share an id
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    special = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(special)) if special[i : i + len(plain)] == plain)
    if len(special) > start + len(plain):
        names = tokenizer.convert_ids_to_tokens(special[:start])
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=[f"{name}:0" for name in names] + ["$A:0"], special_tokens=list(zip(names, special[:start]))
        )
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"


def load_image_processor(
    vision: str | PreTrainedConfig, model_config: PreTrainedConfig, options: dict[str, Any]
) -> BaseImageProcessor:
    """
    The encoder's own image processor in its Pillow form, made to give images of the size the encoder takes.

    Args:
        vision: the encoder's Hub name or folder, or its config where it starts from scratch.
        model_config: the composed model's config.
        options: what `from_pretrained` takes.

    Raises:
        `DuetError`: it cannot be read, or gives images of another size.
    """
    height, width = model_config.image_size
    size = {"height": height, "width": width}
    if isinstance(vision, PreTrainedConfig):
        half = [0.5, 0.5, 0.5]
        return transformers.ViTImageProcessorPil(size=size, image_mean=half, image_std=half)
    try:
        settings, _ = transformers.ImageProcessingMixin.get_image_processor_dict(vision, **options)
    except (OSError, ValueError) as error:
        raise DuetError(
            f"the vision encoder {str(vision)!r} has no image processor that can be read: expected a "
            f"preprocessor_config.json beside its weights; fetch it. {' '.join(str(error).split())[:200]}"
        ) from error
    name = settings.get("image_processor_type") or settings.get("feature_extractor_type", "")
    name = re.sub("(Fast|Pil)$", "", name.replace("FeatureExtractor", "ImageProcessor")) + "Pil"
    if hasattr(transformers, name):
        processor = getattr(transformers, name).from_pretrained(vision, **options)
    else:  # it has no Pillow form (DINOv3): one that does the same
        kind = "CLIPImageProcessorPil" if settings.get("do_center_crop") else "ViTImageProcessorPil"
        processor = _of_settings(kind, settings)
    if hasattr(processor, "max_num_patches"):  # it cuts patches itself (SigLIP 2), which is left to the model here
        return _of_settings("ViTImageProcessorPil", {**settings, "size": size})
    probe = Image.new("RGB", (width + 7, height + 3))
    for change in ({}, _scaled(processor, height, width), {"size": size}, {"size": size, "crop_size": size}):
        for key, value in change.items():
            setattr(processor, key, value)
        pixels = processor(probe, return_tensors="pt")["pixel_values"]
        if tuple(pixels.shape[-2:]) == (height, width):
            return processor
    raise DuetError(
        f"the image processor of {str(vision)!r} does not give images of {height}x{width} pixels, the size that the "
        "vision encoder takes."
    )


def in_pillow(processor: Any) -> Any:
    """
    An image processor of the library in its Pillow form, which `load_image_processor` gives; others as they are.

    Where torchvision is installed the library reads a saved one in another form, which resizes to other pixels.
    """
    kind = type(processor)
    pillow = getattr(transformers, kind.__name__.removesuffix("Fast") + "Pil", None)
    if pillow is None or getattr(transformers, kind.__name__, None) is not kind:
        return processor
    return pillow.from_dict(processor.to_dict())


def _of_settings(kind, settings):
    names = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor")
    names += ("do_normalize", "image_mean", "image_std")
    return getattr(transformers, kind)(**{n: settings[n] for n in names if settings.get(n) is not None})


def _scaled(processor, height, width):
    """What has a processor that scales the shorter side and crops the middle do so for another size."""
    edge, crop = dict(processor.size or {}).get("shortest_edge"), dict(getattr(processor, "crop_size", None) or {})
    if not edge or not getattr(processor, "do_center_crop", False) or not {"height", "width"} <= crop.keys():
        return {}
    scale = max(height / crop["height"], width / crop["width"])
    return {"size": {"shortest_edge": round(edge * scale)}, "crop_size": {"height": height, "width": width}}


__all__ = ["in_pillow", "load_image_processor", "prepare_tokenizer"]
