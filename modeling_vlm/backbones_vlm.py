"""Two backbones as they are loaded, tried and read, so that they can be joined: nothing here knows a family.

Everything here is asked of the loaded modules themselves (which module is the embedding, how many positions were
learned, what the head does), never looked up by a model's name. The file travels with every checkpoint.
"""

import contextlib
import copy
import dataclasses
from typing import TypedDict

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AddedToken,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    ImageProcessingMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .configuration_vlm import VLMVisionPairConfig, own_image_size
from .files_vlm import TEXT_FILES, VISION_FILES, check_files
from .model_error_vlm import DuetError, in_a_line
from .vision_vlm import blank_image, forward_names, run_tower, unused_parameters


_CHOOSE = "choose a decoder such as Llama, Qwen3, Gemma or GPT-2."
CACHE = ({f.name for f in dataclasses.fields(BaseModelOutputWithPast)} & {"cache", "past_key_values"}).pop()
"""What the library calls the keys and values of earlier tokens, in what a model takes and gives: it was renamed."""

_ANY_FAILURE = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError)


class BackboneKwargs(TypedDict, total=False):
    """What each side of `from_backbones` takes for itself; the rest of `from_pretrained`'s arguments pass as well."""

    revision: str
    token: str | bool
    trust_remote_code: bool
    attn_implementation: str


def _from_pretrained(what: str, name: str, loader, **kwargs):
    files, weights = _FILES.get(what, ()), loader is not AutoConfig and loader is not AutoTokenizer
    try:
        return loader.from_pretrained(name, **kwargs)
    except Exception as error:
        check_files(what, name, files, kwargs.get("revision"), weights)  # which can say more of a file than the library
        reason = in_a_line(error)
        if isinstance(error, ImportError):
            raise DuetError(f"the {what} {str(name)!r} needs a package that is not installed: {reason}") from error
        if not isinstance(error, (OSError, ValueError, KeyError)):
            raise
        raise DuetError(
            f"the {what} {str(name)!r} could not be loaded: expected a folder with a config.json or a name on the "
            f"Hugging Face Hub (which needs the network, and a token where the repository is private). {reason}"
        ) from error


_FILES = {
    "vision encoder": VISION_FILES,
    "language model": ("config.json", "generation_config.json"),
    "tokenizer": TEXT_FILES,
}


def load_backbone_config(what: str, backbone: str | PreTrainedConfig, kwargs: BackboneKwargs) -> PreTrainedConfig:
    """
    The config of a Hub name or folder; a config is taken as it is.

    Raises:
        `DuetError`: it cannot be loaded, or brings code of its own.
    """
    config = backbone
    if not isinstance(backbone, PreTrainedConfig):
        config = _from_pretrained(what, backbone, AutoConfig, **_without_attention(kwargs))
    _refuse_own_code(what, config._name_or_path, config)
    if "quantization_config" not in kwargs:
        _refuse_quantised(what, config)
    return config


def _refuse_quantised(what, config):
    settings = getattr(config, "quantization_config", None)
    settings = settings if isinstance(settings, dict) or settings is None else settings.to_dict()
    method = getattr(settings["quant_method"], "value", settings["quant_method"]) if settings else None
    if method not in (None, "mxfp4"):  # which the library turns into numbers that can be learned from
        loads = {4: settings.get("load_in_4bit"), 8: settings.get("load_in_8bit")}
        bits = settings.get("bits") or next((number for number, given in loads.items() if given), None)
        raise DuetError(
            f"the {what}{_named(config)} is saved quantised ({method}{f', {bits} bits' if bits else ''}, as the "
            "quantization_config in its config.json says), and Duet composes models of "
            "weights in float32, bfloat16 or float16; name the repository that it was made from."
        )


def load_vision_tower(
    backbone: str | PreTrainedConfig, config: PreTrainedConfig, dtype: torch.dtype, kwargs: BackboneKwargs
) -> PreTrainedModel:
    """
    The encoder that `config` describes, with weights where `backbone` names a checkpoint.

    Layers above those of `config` and unused heads are left in the checkpoint without a warning.

    Raises:
        `DuetError`: it cannot be loaded, or weights that its features depend on are missing.
    """
    if type(config) not in MODEL_MAPPING:
        raise DuetError(
            f"the vision encoder{_named(config)} ({config.model_type}) is none that AutoModel builds by itself; choose "
            "one such as ViT, CLIP, SigLIP or DINOv2."
        )
    if isinstance(backbone, PreTrainedConfig):
        return AutoModel.from_config(config, dtype=dtype, **_attention(kwargs))
    tower, info = _load_quietly("vision encoder", backbone, AutoModel, config, dtype, kwargs)
    if info["missing_keys"]:  # not every vision half knows by what name it is called in the whole (AIMv2)
        kwargs = {**kwargs, "key_mapping": {r"^vision_model\.": ""}}
        other, found = _load_quietly("vision encoder", backbone, AutoModel, config, dtype, kwargs)
        if len(found["missing_keys"]) < len(info["missing_keys"]):
            tower, info = other, found
    if missing := set(info["missing_keys"]):
        image, takes = blank_image(tower, own_image_size(tower.config)), forward_names(tower)
        unused = unused_parameters(tower, lambda: run_tower(tower, takes, image).last_hidden_state)
        _refuse_missing("vision encoder", backbone, missing - unused)
    return tower


def check_causal(config: PreTrainedConfig):
    """
    See that a config is a causal language model's.

    Raises:
        `DuetError`: it is not.
    """
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if not known or hasattr(config, "vision_config") or getattr(config, "is_encoder_decoder", False):
        raise DuetError(
            f"the language model{_named(config)} ({config.model_type}) is no causal language model of texts alone; "
            f"{_CHOOSE}"
        )


def load_language_model(
    backbone: str | PreTrainedConfig, config: PreTrainedConfig, dtype: torch.dtype, kwargs: BackboneKwargs
) -> PreTrainedModel:
    """
    The causal language model, with weights where `backbone` names a checkpoint.

    Raises:
        `DuetError`: it cannot be loaded, or weights are missing.
    """
    if isinstance(backbone, PreTrainedConfig):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **_attention(kwargs))
    model, info = _load_quietly("language model", backbone, AutoModelForCausalLM, config, dtype, kwargs)
    _refuse_missing("language model", backbone, set(info["missing_keys"]))
    return model


def _named(config):
    return f" {str(config._name_or_path)!r}" if config._name_or_path else ""


def _load_quietly(what, name, auto_class, config, dtype, kwargs):
    with _silenced():  # the library's report on weights is replaced by a check of those that matter
        model, info = _from_pretrained(
            what, name, auto_class, config=config, dtype=dtype, output_loading_info=True, **kwargs
        )
    _refuse_own_code(what, name, model)
    return model, info


def _refuse_own_code(what, name, loaded):
    # A saved folder carries Duet's files only, so it could not be loaded again.
    if type(loaded).__module__.startswith("transformers_modules."):
        raise DuetError(
            f"the {what} {str(name)!r} needs code of its own ({type(loaded).__name__}), which a composed checkpoint "
            "cannot carry; choose a model that transformers itself has, or leave out trust_remote_code where it has it."
        )


def _refuse_missing(what, name, missing):
    if missing:
        raise DuetError(
            f"the {what} {str(name)!r} lacks {len(missing)} of its weights ({', '.join(sorted(missing)[:3])} ...); "
            "expected a complete checkpoint of this architecture, under the names that the library gives it."
        )


def _without_attention(kwargs):
    return {key: value for key, value in kwargs.items() if key != "attn_implementation"}


def _attention(kwargs):
    return {key: value for key, value in kwargs.items() if key == "attn_implementation"}


def vision_config_of(encoders: tuple[str | PreTrainedConfig, ...], kwargs: BackboneKwargs) -> PreTrainedConfig:
    """
    The config of one encoder, or of two side by side; of a composite checkpoint it is that of its vision half.

    Raises:
        `DuetError`: one cannot be loaded, or is no encoder of images.
    """
    configs = [load_backbone_config("vision encoder", encoder, kwargs) for encoder in encoders]
    configs = [getattr(config, "vision_config", config) for config in configs]
    for config in configs:
        own_image_size(config)  # which no other model has
    if len(configs) == 1:
        return configs[0]
    means, deviations = zip(*(_normalisation(encoder, kwargs) for encoder in encoders))
    return VLMVisionPairConfig(
        first_config=configs[0], second_config=configs[1], image_mean=list(means), image_std=list(deviations)
    )


def _normalisation(vision: str | PreTrainedConfig, kwargs: BackboneKwargs) -> tuple[list[float], list[float]]:
    # An encoder that starts from scratch is given pixels from -1 to 1.
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    if not isinstance(vision, PreTrainedConfig):
        try:
            settings, _ = ImageProcessingMixin.get_image_processor_dict(vision, **_without_attention(kwargs))
        except (OSError, ValueError) as error:
            reason = in_a_line(error)
            raise DuetError(f"the vision encoder {str(vision)!r} has no image processor: {reason}") from error
    if settings.get("do_normalize") is False:
        return [0.0] * 3, [1.0] * 3
    if not {"image_mean", "image_std"} <= settings.keys():
        raise DuetError(
            f"the image processor of {str(vision)!r} does not say how pixels are normalised; expected image_mean and "
            "image_std in its preprocessor_config.json, to give each of two encoders its own."
        )
    return list(settings["image_mean"]), list(settings["image_std"])


def find_image_token_id(tokenizer, image_token: str, kwargs: BackboneKwargs) -> int | None:
    """The id that `image_token` has, or would get, in a tokenizer; `None` where only a config is known."""
    if isinstance(tokenizer, PreTrainedConfig):
        return None
    if isinstance(tokenizer, str) or not hasattr(tokenizer, "convert_tokens_to_ids"):
        tokenizer = _from_pretrained("tokenizer", tokenizer, AutoTokenizer, **_without_attention(kwargs))
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(AddedToken(image_token, special=True, normalized=False), special_tokens=True)
    return tokenizer.convert_tokens_to_ids(image_token)


@torch.no_grad()
def grow_embeddings(model: PreTrainedModel, image_token_id: int):
    """Make room for the image token where there is none; a new row is the mean of the others."""
    rows = model.get_input_embeddings().num_embeddings
    if image_token_id < rows:
        return
    with _silenced():
        model.resize_token_embeddings(image_token_id + 1, mean_resizing=False)
    head = model.get_output_embeddings()
    for tensor in (model.get_input_embeddings().weight, head.weight, head.bias):
        if tensor is not None:
            tensor[rows:] = tensor[:rows].mean(0)


@contextlib.contextmanager
def _silenced():
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def leave_out_image_parts(quantization_config: QuantizationConfigMixin | dict) -> QuantizationConfigMixin:
    """Where a quantisation does not say what is left whole: vision tower, projector and head."""
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    quantization_config = copy.deepcopy(quantization_config)
    # Names are matched from their beginning, and each of the two classes may load what the other saved.
    parts = [f"{prefix}{part}" for prefix in ("", "model.") for part in ("vision_tower", "multi_modal_projector")]
    for field in ("llm_int8_skip_modules", "modules_to_not_convert"):  # bitsandbytes' word and that of the others
        if getattr(quantization_config, field, parts) is None:
            setattr(quantization_config, field, [*parts, "lm_head"])
    return quantization_config


def learned_positions(language_model: PreTrainedModel) -> int | None:
    """How many positions the language model has learned an embedding for; `None` for relative positions."""
    limit = getattr(language_model.config, "max_position_embeddings", None)
    tokens = language_model.get_input_embeddings()
    for module in language_model.modules():
        # Some families keep a few rows before the first position, so a table may be a little longer than the limit.
        if isinstance(module, nn.Embedding) and module is not tokens and limit is not None:
            if limit <= module.num_embeddings <= limit + 8:
                return limit
    return None


def scale_logits(logits: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """What a language model does to its logits after the linear head, as its config declares it."""
    if getattr(config, "logit_scale", None) is not None:
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None) is not None:
        logits = logits / config.logits_scaling
    if getattr(config, "lm_head_multiplier", None) is not None:
        logits = logits * config.lm_head_multiplier
    if getattr(config, "final_logit_softcapping", None) is not None:
        logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
    return logits


@torch.no_grad()
def check_decoder(causal_lm: PreTrainedModel):
    """
    Try the language model alone on a text, given as ids and as their embeddings.

    Raises:
        `DuetError`: it is not causal, needs the ids themselves, or is built otherwise than a decoder with a cache.
    """
    kind, training = causal_lm.config.model_type, causal_lm.training
    ids = _some_ids(causal_lm)
    other = ids.clone()
    other[0, -1] = 0
    tolerance = 1e-4 if causal_lm.dtype == torch.float32 else 3e-2
    causal_lm.eval()
    expected, before = (causal_lm(tokens).logits.float() for tokens in (ids, other))
    if not _difference(expected[:, :-1], before[:, :-1]) <= tolerance:
        raise DuetError(
            f"the language model ({kind}) is not causal: what it says after a token depends on the tokens behind it; "
            f"{_CHOOSE}"
        )
    try:
        embeds = causal_lm.base_model.get_input_embeddings()(ids)
        both = torch.cat([embeds, 0.9 * embeds])  # those of tokens, and of no tokens as image features are
        states = causal_lm.base_model(inputs_embeds=both, use_cache=True, return_dict=True)
        for name in ("last_hidden_state", CACHE):
            if states.get(name) is None:
                raise DuetError(f"its output has no {name}.")
        found = causal_lm(inputs_embeds=embeds).logits.float()
    except _ANY_FAILURE as error:  # whatever a model does that expects something else
        reason = in_a_line(error, 200)
        raise DuetError(
            f"the language model ({kind}) does not turn embeddings into states and a cache, as a decoder does: "
            f"{reason} Please {_CHOOSE}"
        ) from error
    causal_lm.train(training)
    if not _difference(expected, found) <= tolerance:
        raise DuetError(
            f"the language model ({kind}) reads more of a token than its embedding, and image features are embeddings "
            f"only: logits of the same text differ by {_difference(expected, found):.1e} (relative); {_CHOOSE}"
        )


@torch.no_grad()
def check_logits(model: PreTrainedModel, causal_lm: PreTrainedModel):
    """
    Try the composed model on a text.

    Raises:
        `DuetError`: it does not reproduce the logits of its language model.
    """
    kind, training = causal_lm.config.model_type, (causal_lm.training, model.training)
    ids = _some_ids(causal_lm)
    ids = ids.masked_fill(ids == model.config.image_token_id, 0)
    expected = causal_lm.eval()(ids).logits.float()
    try:
        found = model.eval()(ids).logits.float()
        reason = f"the logits of a plain text differ by {_difference(expected, found):.1e} (relative)"
    except RuntimeError as error:
        found, reason = None, in_a_line(error, 200)
    causal_lm.train(training[0]), model.train(training[1])
    if found is None or not _difference(expected, found) <= 1e-3:
        raise DuetError(
            f"the language model ({kind}) does more after its head, or before it, than Duet reproduces: {reason}; "
            "choose another language model."
        )


@torch.no_grad()
def check_generation(model: PreTrainedModel):
    """
    Try two steps of generation with a cache, behind padding as in a batch, against the same text alone and whole.

    Raises:
        `DuetError`: padding or the cache change what is said.
    """
    ids = _some_ids(model)
    ids = ids.masked_fill(ids == model.config.image_token_id, 0)
    padding = 3
    if model.model.max_positions is not None and model.model.max_positions < ids.shape[1] + padding + 2:
        return
    padded, mask = nn.functional.pad(ids, (padding, 0)), nn.functional.pad(torch.ones_like(ids), (padding, 0))
    settings = GenerationConfig(
        max_new_tokens=2, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    training, own = model.training, model.generation_config
    model.eval().generation_config = settings  # what is not said, `generate` takes from the model's own
    try:
        found = model.generate(padded, attention_mask=mask)
        whole = model(found.sequences[:, padding:]).logits[:, -3:-1].float()
    finally:
        model.train(training).generation_config = own
    difference = _difference(whole, torch.stack(found.logits, 1).float())
    kind = model.config.text_config.model_type
    if not difference <= (1e-2 if model.dtype == torch.float32 else 1e-1):
        raise DuetError(
            f"the language model ({kind}) says something else in a padded batch, or with a cache, than alone: logits "
            f"differ by {difference:.1e} (relative); {_CHOOSE}"
        )


def _some_ids(causal_lm):
    return torch.arange(1, 9, device=causal_lm.device).unsqueeze(0) % causal_lm.config.get_text_config().vocab_size


def _difference(one, two):
    return (one - two).abs().max() / one.abs().max().clamp(min=1e-6)
