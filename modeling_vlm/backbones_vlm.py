"""Loading two backbones so that they can be joined: what `from_backbones` needs, and nothing that knows a family.

Everything here is asked of the loaded modules themselves (which module is the embedding, how many positions were
learned, what the head does), never looked up by a model's name. The file travels with every checkpoint.
"""

import contextlib
import copy
from collections.abc import Callable
from typing import TypedDict

import torch
from torch import nn
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging


class BackboneKwargs(TypedDict, total=False):
    """What each side of `from_backbones` takes for itself; the rest of `from_pretrained`'s arguments pass as well."""

    revision: str
    token: str | bool
    trust_remote_code: bool
    attn_implementation: str


def _from_pretrained(what: str, name: str, loader, **kwargs):
    try:
        return loader.from_pretrained(name, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the {what} {str(name)!r} could not be loaded: expected a folder with a config.json or a name on the "
            f"Hugging Face Hub (which needs the network, and a token where the repository is private). {reason}"
        ) from error


def load_backbone_config(what: str, backbone: str | PreTrainedConfig, kwargs: BackboneKwargs) -> PreTrainedConfig:
    """
    The config of a Hub name or folder; a config is taken as it is.

    Raises:
        `ValueError`: it cannot be loaded, or brings code of its own.
    """
    config = backbone
    if not isinstance(backbone, PreTrainedConfig):
        config = _from_pretrained(what, backbone, AutoConfig, **_without_attention(kwargs))
    _refuse_own_code(what, config._name_or_path, config)
    return config


def load_vision_tower(
    backbone: str | PreTrainedConfig, config: PreTrainedConfig, dtype: torch.dtype, kwargs: BackboneKwargs
) -> PreTrainedModel:
    """
    The encoder that `config` describes, with weights where `backbone` names a checkpoint.

    Layers above those of `config` and unused heads are left in the checkpoint without a warning.

    Raises:
        `ValueError`: it cannot be loaded, or weights that its features depend on are missing.
    """
    if isinstance(backbone, PreTrainedConfig):
        return AutoModel.from_config(config, dtype=dtype, **_attention(kwargs))
    tower, info = _load_quietly("vision encoder", backbone, AutoModel, config, dtype, kwargs)
    if missing := set(info["missing_keys"]):
        unused = unused_parameters(tower, lambda image: tower(image, return_dict=True).last_hidden_state)
        _refuse_missing("vision encoder", backbone, missing - {name for name, _ in unused})
    return tower


def load_language_model(
    backbone: str | PreTrainedConfig, config: PreTrainedConfig, dtype: torch.dtype, kwargs: BackboneKwargs
) -> PreTrainedModel:
    """
    The causal language model, with weights where `backbone` names a checkpoint.

    Raises:
        `ValueError`: it cannot be loaded, is no causal language model, or weights are missing.
    """
    if isinstance(backbone, PreTrainedConfig):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **_attention(kwargs))
    model, info = _load_quietly("language model", backbone, AutoModelForCausalLM, config, dtype, kwargs)
    _refuse_missing("language model", backbone, set(info["missing_keys"]))
    return model


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
        raise ValueError(
            f"the {what} {str(name)!r} needs code of its own ({type(loaded).__name__}), which a composed checkpoint "
            "cannot carry; choose a model that transformers itself has, or leave out trust_remote_code where it has it."
        )


def _refuse_missing(what, name, missing):
    if missing:
        raise ValueError(
            f"the {what} {str(name)!r} lacks {len(missing)} of its weights ({', '.join(sorted(missing)[:3])} ...); "
            "expected a complete checkpoint of this architecture."
        )


def _without_attention(kwargs):
    return {key: value for key, value in kwargs.items() if key != "attn_implementation"}


def _attention(kwargs):
    return {key: value for key, value in kwargs.items() if key == "attn_implementation"}


def unused_parameters(
    tower: PreTrainedModel, features: Callable[[torch.Tensor], torch.Tensor]
) -> list[tuple[str, nn.Parameter]]:
    """
    Parameters of a vision tower that its features do not depend on (poolers, heads), found by one backward pass.

    Args:
        tower: the vision encoder.
        features: from `(1, channels, height, width)` pixels to the features that are used.
    """
    names, parameters = zip(*tower.named_parameters())
    asked = [parameter.requires_grad for parameter in parameters]
    tower.requires_grad_(True)
    config = tower.config
    size = config.image_size if isinstance(config.image_size, (list, tuple)) else (config.image_size,) * 2
    image = torch.zeros(1, getattr(config, "num_channels", 3), *size, dtype=tower.dtype, device=tower.device)
    with torch.enable_grad():
        gradients = torch.autograd.grad(features(image).sum(), parameters, allow_unused=True)
    for parameter, requires_grad in zip(parameters, asked):
        parameter.requires_grad_(requires_grad)
    return [(n, p) for n, p, gradient in zip(names, parameters, gradients) if gradient is None]


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


def balance_loss(
    router_logits: tuple[torch.Tensor, ...], config: PreTrainedConfig, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """What a mixture of experts adds so that all of its experts are used (https://arxiv.org/abs/2101.03961, eq. 4)."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func  # which the other families copy

    experts = getattr(config, "num_experts", None) or config.num_local_experts
    mask = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
    return load_balancing_loss_func(router_logits, experts, config.num_experts_per_tok, mask)


@torch.no_grad()
def check_head_is_kept(model: PreTrainedModel, causal_lm: PreTrainedModel):
    """Refuse a language model whose logits the composed model does not reproduce on text."""
    ids = torch.arange(1, 9, device=causal_lm.device).unsqueeze(0) % causal_lm.config.vocab_size
    ids = ids.masked_fill(ids == model.config.image_token_id, 0)
    training = causal_lm.training, model.training
    expected, found = causal_lm.eval()(ids).logits.float(), model.eval()(ids).logits.float()
    causal_lm.train(training[0]), model.train(training[1])
    difference = (expected - found).abs().max() / expected.abs().max().clamp(min=1)
    if not difference <= 1e-3:
        raise ValueError(
            f"the language model ({causal_lm.config.model_type}) does more after its head than Duet reproduces: the "
            f"logits of a plain text differ by {difference:.1e} (relative); choose another language model."
        )


__all__ = []
