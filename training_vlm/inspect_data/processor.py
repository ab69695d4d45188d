"""The processor of the model that would train, without its weights."""

from pathlib import Path

from transformers import ViTConfig

from modeling_vlm import VLMConfig, VLMForConditionalGeneration
from modeling_vlm.compose_vlm import composed_config, shape_of
from modeling_vlm.own_projector_vlm import trusting
from processing import VLMProcessor

from ..arguments import DataArguments, ModelArguments, backbone_of
from ..data import Data
from ..load import (
    check_composed,
    check_fit,
    check_named,
    choose_max_length,
    new_processor,
    saved_processor,
    tokenizer_from_scratch,
)
from ..stages import Stage


def load_processor(
    stage: Stage, model_args: ModelArguments, data_args: DataArguments, data: Data
) -> tuple[VLMProcessor, int]:
    """
    The processor of the model that would train, and how many positions a sequence of it may have.

    Raises:
        DuetError: no model is named, or what is named cannot be loaded.
    """
    model, processor = lay_out(stage, model_args, data_args, data)
    return processor, choose_max_length(model, data_args.max_length)


def lay_out(
    stage: Stage, model_args: ModelArguments, data_args: DataArguments, data: Data
) -> tuple[VLMForConditionalGeneration, VLMProcessor]:
    """
    The model that would train, without memory, on the meta device, and its processor.

    The model tells how many tokens an image takes. Without a vision encoder an image is one token.

    Raises:
        DuetError: no model is named, or what is named cannot be loaded.
    """
    check_named(model_args, sees=False)
    if model_args.model is not None:
        check_composed(model_args, weights=False)
        name, revision = model_args.model, model_args.model_revision
        with trusting(Path(name).is_dir() or model_args.trust_remote_code, revision=revision):
            model = shape_of(VLMForConditionalGeneration, VLMConfig.from_pretrained(name, revision=revision))
        processor = saved_processor(model_args)
        check_fit(model, processor)
    else:
        model, processor = _compose(stage, model_args, data_args, data)
    return model, processor


def _compose(stage, model_args, data_args, data):
    text = backbone_of("text_model", model_args.text_model)
    if model_args.vision_model is None:
        vision, settings = ViTConfig(), {"num_prefix_tokens": 0, "image_seq_length": 1, "vision_modules_left_out": []}
    else:
        vision, settings = model_args.vision_models(), model_args.composition()
    tokenizer = model_args.tokenizer
    if tokenizer is None and not isinstance(text, str):
        tokenizer = tokenizer_from_scratch(stage, data_args, data, text)
    shared = model_args.joining_kwargs(tokenizer)
    model = shape_of(VLMForConditionalGeneration, composed_config(vision, text, **shared, **settings))
    return model, new_processor(model_args, vision, text, model.config, shared)
