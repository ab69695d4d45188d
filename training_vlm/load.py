"""Model and processor of a run: an earlier stage's folder, or two backbones composed; checked to fit each other.

What is no model of Duet's, or does not belong together, is known here, before data are encoded and hours pass.
"""

from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from modeling_vlm import VLMConfig, VLMForConditionalGeneration
from processing import VLMProcessor
from processing.data_error_vlm import DuetError
from processing.tokenizer import train_tokenizer

from .arguments import DataArguments, ModelArguments, backbone_of
from .data import Data, training_texts
from .learning.tuning import apply_tuning
from .stages import Stage


def load_model(
    stage: Stage, model_args: ModelArguments, data_args: DataArguments, data: Data
) -> tuple[VLMForConditionalGeneration, VLMProcessor]:
    """
    The model and its processor: an earlier stage's folder, or two backbones composed.

    Raises:
        ValueError: neither or both are named, a checkpoint of another kind, or parts that do not fit together.
    """
    dtype = getattr(torch, model_args.dtype, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise DuetError(f"dtype={model_args.dtype!r}: expected float32, bfloat16 or float16.")
    if model_args.model is not None:
        check_composed(model_args)
        model, processor = _load_composed(model_args, dtype)
        starts = {"vision": "frozen", "text": "frozen"}
    elif model_args.vision_model is not None and model_args.text_model is not None:
        model, processor = _compose(stage, model_args, data_args, data, dtype)
        scratch = {side: isinstance(getattr(model_args, f"{side}_model"), dict) for side in ("vision", "text")}
        starts = {side: "full" if scratch[side] else "frozen" for side in scratch}
    else:
        raise DuetError(
            "no model is named; add --model FOLDER (a composed model) or --vision_model NAME and --text_model NAME."
        )
    check_fit(model, processor)
    processor.update_generation_config(model.generation_config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        # What the Trainer would do, with a warning: say in the config what the tokenizer says.
        if (value := getattr(processor.tokenizer, name)) is not None:
            setattr(model.config.text_config, name, value)
            if name == "bos_token_id":
                model.generation_config.bos_token_id = value
    apply_tuning(
        model,
        model_args.tune_vision or starts["vision"],
        model_args.tune_text or starts["text"],
        model_args.freeze_embeddings,
    )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise DuetError(
            f"nothing would learn: both backbones are frozen, and the projector {model.config.projector_type} has "
            "no parameters; add --tune_text or --tune_vision, or choose another projector_type."
        )
    return model, processor


def check_composed(model_args: ModelArguments) -> None:
    """
    Refuse a `model` that is not there, or is none of Duet's, before anything large is read.

    Raises:
        ValueError: what it is, or that there is none.
    """
    name = model_args.model
    if others := model_args.composing_settings():
        raise DuetError(f"model and {others[0]} are both given, and {name} is composed already; leave out one of them.")
    if not Path(name).exists() and (Path(name).is_absolute() or name.count("/") != 1):
        raise DuetError(
            f"there is no model in {name}; expected the output folder of stage 1: run "
            f"`python train_pretrain.py --output_dir {name} ...` first."
        )
    try:
        settings, _ = PreTrainedConfig.get_config_dict(name, revision=model_args.model_revision)
    except (OSError, ValueError) as error:
        raise DuetError(f"the model {name!r} could not be loaded: {' '.join(str(error).split())[:300]}") from error
    if settings.get("model_type") != VLMConfig.model_type:
        raise DuetError(
            f"{name} is a {settings.get('model_type')} checkpoint; expected a model composed by Duet (the output "
            "folder of train_pretrain.py). Backbones go into --vision_model and --text_model."
        )


def _load_composed(model_args, dtype):
    name = model_args.model
    attention = {f"{side}_config": getattr(model_args, f"{side}_attn_implementation") for side in ("vision", "text")}
    model = VLMForConditionalGeneration.from_pretrained(
        name,
        revision=model_args.model_revision,
        dtype=dtype,
        attn_implementation=attention,
        trust_remote_code=Path(name).is_dir() or model_args.trust_remote_code,
    )
    processor = VLMProcessor.from_pretrained(name, revision=model_args.model_revision)
    if model_args.chat_template is not None:
        processor.set_chat_template(model_args.chat_template)
    return model, processor


def _compose(stage, model_args, data_args, data, dtype):
    vision, text = model_args.vision_models(), backbone_of("text_model", model_args.text_model)
    tokenizer = model_args.tokenizer
    if tokenizer is None and isinstance(text, PreTrainedConfig):
        tokenizer = tokenizer_from_scratch(stage, data_args, data, text)
        text.pad_token_id, text.bos_token_id = tokenizer.pad_token_id, None
        text.eos_token_id = tokenizer.eos_token_id
    shared = {
        "tokenizer": tokenizer,
        "image_token": model_args.image_token,
        "vision_kwargs": model_args.backbone_kwargs("vision"),
        "text_kwargs": model_args.backbone_kwargs("text"),
    }
    model = VLMForConditionalGeneration.from_backbones(vision, text, dtype=dtype, **model_args.composition(), **shared)
    processor = VLMProcessor.from_backbones(
        vision,
        text,
        model.config,
        chat_template=model_args.chat_template,
        image_mode=model_args.image_mode,
        **shared,
    )
    return model, processor


def tokenizer_from_scratch(
    stage: Stage, data_args: DataArguments, data: Data, text_config: PreTrainedConfig
) -> PreTrainedTokenizerBase:
    """The tokenizer of a language model from scratch, trained on the texts; one entry is left for the image token."""
    limit = getattr(text_config, "max_position_embeddings", None) or int(1e30)
    return train_tokenizer(training_texts(stage, data_args, data), text_config.vocab_size - 1, limit)


def check_fit(model: VLMForConditionalGeneration, processor: VLMProcessor) -> None:
    """
    Refuse a processor that does not belong to the model.

    Raises:
        ValueError: what differs, on both sides.
    """
    config = model.config
    for what, ours, theirs in (
        ("image_token_id", config.image_token_id, processor.image_token_id),
        ("image_seq_length", config.image_seq_length, processor.image_seq_length),
        ("max_tiles", config.max_tiles, processor.max_tiles),
        ("image_size", tuple(config.image_size), processor.view_size),
    ):
        if ours != theirs:
            raise DuetError(
                f"processor and model do not belong together: {what} is {theirs} in the processor and {ours} in the "
                "model; use the processor that was saved with the model."
            )
    if len(processor.tokenizer) > model.get_input_embeddings().num_embeddings:
        raise DuetError(
            f"processor and model do not belong together: the tokenizer has {len(processor.tokenizer)} entries, the "
            f"language model {model.get_input_embeddings().num_embeddings} embeddings; use the processor saved with it."
        )


def choose_max_length(model: VLMForConditionalGeneration, asked: int | None) -> int:
    """
    Positions a training sequence may have: those asked for, else all that the language model has.

    Raises:
        ValueError: more than were learned, or not even room for an image and a token.
    """
    learned = model.model.max_positions
    limit = learned or getattr(model.config.text_config, "max_position_embeddings", None) or 1 << 20
    if asked is not None and learned is not None and asked > learned:
        raise DuetError(
            f"max_length={asked} is more than the {learned} positions that the language model "
            f"({model.config.text_config.model_type}) has learned; set max_length to {learned} or less."
        )
    chosen = limit if asked is None else asked
    if chosen <= model.config.tile_tokens():
        raise DuetError(
            f"max_length={chosen} leaves no room for text beside an image of {model.config.tile_tokens()} tokens; set "
            "a larger max_length, or choose fewer visual tokens (projector_type: resampler, or "
            "vision_feature_select_strategy: cls)."
        )
    return chosen


__all__ = ["check_composed", "check_fit", "choose_max_length", "load_model", "tokenizer_from_scratch"]
