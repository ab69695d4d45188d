"""Model and processor of a run: an earlier stage's folder, or two backbones composed; checked to fit each other.

What is no model of Duet's, or does not belong together, is known here, before data are encoded and hours pass.
"""

import json
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from inference_vlm.export import hindrance
from inference_vlm.program import program
from modeling_vlm import VLMConfig, VLMForConditionalGeneration
from modeling_vlm.adapters_vlm import CONFIG, WEIGHTS, base_of
from modeling_vlm.backbones_vlm import find_image_token_id, load_backbone_config
from modeling_vlm.files_vlm import TEXT_FILES, VISION_FILES, check_files
from modeling_vlm.native_vlm import misfits
from processing import VLMProcessor
from processing.data_error_vlm import DuetError, in_a_line
from processing.tokenizer import train_tokenizer

from .adapting import adapter_named, begun_with, check_adapters, settle_adapter, with_adapters
from .arguments import DataArguments, ModelArguments, backbone_of
from .data import Data, training_texts
from .defaults import settle_rates
from .learning.adapters import composed
from .learning.tuning import make_plan
from .settings import Arguments
from .stages import Stage


def load_model(stage: Stage, arguments: Arguments, data: Data) -> tuple[VLMForConditionalGeneration, VLMProcessor]:
    """
    The model and its processor: an earlier stage's folder, or two backbones composed.

    Raises:
        DuetError: neither or both are named, a checkpoint of another kind, or parts that do not fit together.
    """
    check_named(arguments.model)
    dtype, adapter = weights_dtype(arguments.model), settle_adapter(arguments)
    check_adapters(arguments)
    model_args = begun_with(arguments)
    if model_args.model is not None:
        model, processor = _load_composed(model_args, dtype, arguments.tuning.merge_first)
    else:
        model, processor = _compose(stage, model_args, arguments.data, data, dtype)
    check_fit(model, processor)
    processor.update_generation_config(model.generation_config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        # What the Trainer would do, with a warning: say in the config what the tokenizer says.
        if (value := getattr(processor.tokenizer, name)) is not None:
            setattr(model.config.text_config, name, value)
            if name == "bos_token_id":
                model.generation_config.bos_token_id = value
    model = with_adapters(model, processor, arguments, adapter)
    choose_what_learns(stage, model, arguments)
    return model, processor


def weights_dtype(model_args: ModelArguments) -> torch.dtype:
    """
    The numbers of a model's weights, where one is named.

    Raises:
        DuetError: numbers that are none of weights.
    """
    dtype = getattr(torch, model_args.dtype, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise DuetError(f"dtype={model_args.dtype!r}: expected float32, bfloat16 or float16.")
    return dtype


def check_named(model_args: ModelArguments, sees: bool = True) -> None:
    """
    See that a model is named.

    Args:
        sees: whether it needs its vision encoder.

    Raises:
        DuetError: none is, or only one of its backbones.
    """
    backbones = [model_args.text_model, *[model_args.vision_model] * sees]
    if model_args.model is not None or None not in backbones:
        return
    vision = "" if sees else ", the first where images are to be shown as the model sees them"
    raise DuetError(
        "no model is named; add --model FOLDER (a composed model) or --vision_model NAME and --text_model NAME"
        f"{vision}."
    )


def choose_what_learns(stage: Stage, model: VLMForConditionalGeneration, arguments: Arguments) -> None:
    """
    Have learn what is declared, at published rates where none are said.

    Raises:
        DuetError: nothing would learn, or something is said that cannot be.
    """
    settle_rates(stage, model, arguments)
    plan = make_plan(model, arguments.tuning, arguments.training)
    plan.apply(model)
    if not plan.learning:
        projector = "is frozen" if arguments.tuning.tune_projector == "frozen" else "has no parameters"
        raise DuetError(
            f"nothing would learn: both backbones are frozen, and the projector {model.config.projector_type} "
            f"{projector}; add --tune_text or --tune_vision, or choose another projector_type."
        )


def check_model(model_args: ModelArguments) -> None:
    """
    Refuse a model that cannot be loaded, before data are read; nothing large is read for it.

    Raises:
        DuetError: which file, package or setting it is, or that there is no such model.
    """
    if model_args.model is not None:
        return check_composed(model_args)
    sides: dict[str, tuple[str, tuple[str, ...]]] = {
        "vision_model": ("vision encoder", VISION_FILES),
        "second_vision_model": ("vision encoder", VISION_FILES),
        "text_model": ("language model", TEXT_FILES if model_args.tokenizer is None else TEXT_FILES[:1]),
    }
    for option, (what, files) in sides.items():
        name = getattr(model_args, option)
        if isinstance(name, str):
            kwargs = model_args.backbone_kwargs("text" if option == "text_model" else "vision")
            load_backbone_config(what, name, kwargs)
            check_files(what, name, files, kwargs.get("revision"))
            there = [file for file in files[1:] if Path(name, file).is_file()]
            if what == "vision encoder" and Path(name).is_dir() and not there:
                raise DuetError(
                    f"the vision encoder {name!r} has no image processor: expected a preprocessor_config.json beside "
                    "its weights; fetch it."
                )
    tokenizer = model_args.tokenizer or model_args.text_model
    if isinstance(tokenizer, str):
        find_image_token_id(tokenizer, model_args.image_token, model_args.backbone_kwargs("text"))


def check_composed(model_args: ModelArguments, weights: bool = True) -> None:
    """
    Refuse a `model` that is not there, is not whole, or is none of Duet's.

    Args:
        weights: whether its weights are needed.

    Raises:
        DuetError: what it is, or that there is none.
    """
    name = model_args.model
    assert name is not None
    if others := model_args.composing_settings():
        raise DuetError(f"model and {others[0]} are both given, and {name} is composed already; leave out one of them.")
    if Path(name).exists():
        _check_folder(Path(name), weights)
    elif Path(name).is_absolute() or name.count("/") != 1:
        raise DuetError(f"there is no model in {name}; {_run_stage_1(name)}")
    try:
        settings, _ = PreTrainedConfig.get_config_dict(name, revision=model_args.model_revision)
    except (OSError, ValueError) as error:
        reason = in_a_line(error)
        if Path(name).exists() or _causes(error, GatedRepoError, RevisionNotFoundError):
            raise DuetError(f"the model {name!r} could not be loaded: {reason}") from error
        hub = "knows no such name" if _causes(error, RepositoryNotFoundError) else "could not be asked"
        raise DuetError(
            f"there is no model in {name}: no such folder is here, and the Hugging Face Hub {hub}; {_run_stage_1(name)}"
        ) from error
    if settings.get("model_type") != VLMConfig.model_type:
        raise DuetError(
            f"{name} is a {settings.get('model_type')} checkpoint; expected a model composed by Duet (the output "
            "folder of stage 1, train_pretrain). Backbones go into --vision_model and --text_model."
        )


def _check_folder(folder: Path, weights: bool) -> None:
    if not folder.is_dir():
        raise DuetError(f"{folder} is a file; expected the folder of a model, such as the output folder of stage 1.")
    if not (folder / "config.json").is_file():
        found = [path.name for path in folder.glob("checkpoint-*") if (path / "config.json").is_file()]
        checkpoints = sorted(found, key=lambda name: (len(name), name))  # as numbers
        if checkpoints:
            raise DuetError(
                f"{folder} holds {', '.join(checkpoints[:3])} of a run that has not come to its end, and no model; "
                f"go on with it, `{program('train_pretrain')} --output_dir {folder} --resume_from_checkpoint auto "
                f"...`, or take a checkpoint, --model {folder / checkpoints[-1]}."
            )
        state = "holds no config.json" if any(folder.iterdir()) else "is empty"
        raise DuetError(f"there is no model in {folder}, which {state}; {_run_stage_1(folder)}")
    if (folder / CONFIG).is_file():  # an adapter's weights, and those of its base, which has to be there
        check_files("adapter", folder, [CONFIG, WEIGHTS], weights=False)
        base, hub = base_of(str(folder), {})
        check_files("base", base, [*TEXT_FILES, *VISION_FILES], hub.get("revision"), weights)
        weights = False
    for file in ("processor_config.json", "tokenizer_config.json", "tokenizer.json"):
        if not (folder / file).is_file() and _is_composed(folder):
            raise DuetError(f"the model in {folder} is not whole: it has no {file}; take all files that stage 1 saved.")
    check_files("model", folder, [*TEXT_FILES, *VISION_FILES], weights=weights)


def _is_composed(folder):
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return settings.get("model_type") == VLMConfig.model_type
    except (ValueError, AttributeError):  # which `check_files` names
        return False


def _run_stage_1(name):
    return (
        f"expected the output folder of stage 1: run `{program('train_pretrain')} --output_dir {name} ...` first, or "
        "name the folder that it wrote."
    )


def _causes(error: BaseException | None, *kinds: type[BaseException]) -> bool:
    """Whether an error, or one that led to it, is of these kinds."""
    while error is not None and not isinstance(error, kinds):
        error = error.__cause__ or error.__context__
    return error is not None


def _load_composed(model_args, dtype, merge):
    """A composed model, or the base of an adapter, whole."""
    name, revision = model_args.model, {"revision": model_args.model_revision}
    adapter = None if merge else adapter_named(model_args)
    if adapter is not None:
        name, revision = adapter.base, adapter.base_hub
    attention = {f"{side}_config": getattr(model_args, f"{side}_attn_implementation") for side in ("vision", "text")}
    model = VLMForConditionalGeneration.from_pretrained(
        name,
        **revision,
        dtype=dtype,
        attn_implementation=attention,
        merge_adapter=merge,
        trust_remote_code=Path(name).is_dir() or model_args.trust_remote_code,
    )
    return model, saved_processor(model_args)


def saved_processor(model_args: ModelArguments) -> VLMProcessor:
    """The processor of `model`, with another chat template where one is named."""
    processor = VLMProcessor.from_pretrained(model_args.model, revision=model_args.model_revision)
    if model_args.chat_template is not None:
        processor.set_chat_template(model_args.chat_template)
    return processor


def _compose(stage, model_args, data_args, data, dtype):
    vision, text = model_args.vision_models(), backbone_of("text_model", model_args.text_model)
    tokenizer = model_args.tokenizer
    if tokenizer is None and isinstance(text, PreTrainedConfig):
        tokenizer = tokenizer_from_scratch(stage, data_args, data, text)
        text.pad_token_id, text.bos_token_id = tokenizer.pad_token_id, None
        text.eos_token_id = tokenizer.eos_token_id
    shared = model_args.joining_kwargs(tokenizer)
    model = VLMForConditionalGeneration.from_backbones(vision, text, dtype=dtype, **model_args.composition(), **shared)
    processor = new_processor(model_args, vision, text, model.config, shared)
    if PartialState().is_main_process and not misfits(model) and (reason := hindrance(model, processor)):
        print(f"yet not exported natively: {reason}")  # which the model alone could not know
    return model, processor


def new_processor(
    model_args: ModelArguments, vision: Any, text: Any, config: VLMConfig, shared: dict[str, Any]
) -> VLMProcessor:
    """
    The processor of two backbones that are joined.

    Args:
        vision, text: as the model was given them.
        config: the model's.
        shared: `ModelArguments.joining_kwargs`.
    """
    template, mode = model_args.chat_template, model_args.image_mode
    return VLMProcessor.from_backbones(vision, text, config, chat_template=template, image_mode=mode, **shared)


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
        DuetError: what differs, on both sides.
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
    rows = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if len(processor.tokenizer) > rows:
        raise DuetError(
            f"processor and model do not belong together: the tokenizer has {len(processor.tokenizer)} entries, the "
            f"language model {rows} embeddings; use the processor saved with it."
        )


def choose_max_length(model: VLMForConditionalGeneration, asked: int | None) -> int:
    """
    Positions a training sequence may have: those asked for, else all that the language model has.

    Raises:
        DuetError: more than were learned, or not even room for an image and a token.
    """
    model = composed(model)
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


__all__ = [
    "check_composed", "check_fit", "check_model", "check_named", "choose_max_length", "choose_what_learns",
    "load_model", "new_processor", "saved_processor", "tokenizer_from_scratch", "weights_dtype",
]  # fmt: skip
