"""Which class of the library's own computes exactly what a composed model does, or why none does.

`LlavaForConditionalGeneration` reads `hidden_states[k]` of an encoder, and holds a linear projector as one without an
activation and with an identity behind it; `DeepseekVLForConditionalGeneration` reads the encoder's last output. What a
language model does to its logits goes into the head where it is a factor. Nothing here knows a family: what an encoder
gives is found by running it. The file travels with every checkpoint.
"""

import copy
from typing import NamedTuple

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, DeepseekVLConfig, LlavaConfig, PreTrainedConfig, PreTrainedModel

from .backbones_vlm import scale_logits
from .configuration_vlm import kind_of, own_image_size, pair_of
from .model_error_vlm import DuetError
from .vision_vlm import blank_image, forward_names


LLAVA, DEEPSEEK = "LlavaForConditionalGeneration", "DeepseekVLForConditionalGeneration"

_PLACES = {
    LLAVA: {},
    DEEPSEEK: {
        "model.vision_tower.": "model.vision_model.",
        "model.multi_modal_projector.linear_1.": "model.aligner.linear1.",
        "model.multi_modal_projector.linear_2.": "model.aligner.linear2.",
    },
}
"""Class -> where its weights are that have another name there."""

_PROJECTORS = ("mlp", "linear", "identity")

_HEAD_FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier")
"""Fields of language models' configs that `scale_logits` multiplies or divides by."""


class NativeForm(NamedTuple):
    """A composed model as one of the library's own."""

    architecture: str
    """Name of the class."""
    config: PreTrainedConfig
    select: str
    """What of an encoder's tokens is read, in LLaVA's words: `"full"`, or `"default"`, which is all but the first."""


def native_form(model: PreTrainedModel) -> NativeForm:
    """
    The class of the library's own that computes what a composed model does.

    Args:
        model: a `VLMForConditionalGeneration`, of weights or of shapes alone.

    Raises:
        `DuetError`: there is none, with every reason and the nearest that there is one for.
    """
    if found := misfits(model):
        raise DuetError(f"no class of transformers' own computes what this model does: {'; '.join(found)}.")
    config, after_norm = model.config, _reads_after_norm(model)
    vision_config, text_config = copy.deepcopy(config.vision_config), copy.deepcopy(config.text_config)
    if vision_config.model_type == "siglip_vision_model":  # else it has a pooling head that nothing reads
        vision_config.vision_use_head = False
    for field in _HEAD_FACTORS:
        if getattr(text_config, field, None) is not None:
            setattr(text_config, field, 1.0)
    text_config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(text_config)].__name__]  # which vLLM builds it by
    text_config.tie_word_embeddings = _stays_tied(model)
    shared = {
        "vision_config": vision_config, "text_config": text_config, "dtype": model.dtype,
        "tie_word_embeddings": text_config.tie_word_embeddings,
    }  # fmt: skip
    select = "default" if _leaves_out_first(config) else "full"
    if after_norm:
        return NativeForm(DEEPSEEK, DeepseekVLConfig(image_token_id=config.image_token_id, **shared), select)
    native = LlavaConfig(
        image_token_index=config.image_token_id,
        image_seq_length=config.image_seq_length,
        projector_hidden_act="gelu" if config.projector_type == "mlp" else "linear",
        vision_feature_layer=-1,
        vision_feature_select_strategy=select,
        **shared,
    )
    return NativeForm(LLAVA, native, select)


def native_weights(model: PreTrainedModel, form: NativeForm) -> dict[str, torch.Tensor]:
    """The weights of a composed model under the names that its native form has for them."""
    weights = {}
    for name, tensor in model.state_dict().items():
        for place, other in _PLACES[form.architecture].items():
            name = name.replace(place, other) if name.startswith(place) else name
        weights[name] = tensor
    if form.config.tie_word_embeddings:
        weights.pop("lm_head.weight")
    else:  # a copy in any case: of what is one with the embeddings, none would be saved
        weights["lm_head.weight"] = weights["lm_head.weight"] * _head_factor(model)
    width = form.config.text_config.hidden_size
    missing = {"mlp": (), "linear": ("linear_2",), "identity": ("linear_1", "linear_2")}
    for layer in missing[model.config.projector_type]:
        place, like = f"model.multi_modal_projector.{layer}", weights["model.language_model." + _embedding(model)]
        weights[f"{place}.weight"] = torch.eye(width, dtype=like.dtype, device=like.device)
        weights[f"{place}.bias"] = torch.zeros(width, dtype=like.dtype, device=like.device)
    return weights


def say_native(model: PreTrainedModel) -> str:
    """In a few words, whether a composed model has a native form."""
    if found := misfits(model):
        return f"not exported natively: {'; '.join(found)}"
    return f"exported natively as {native_form(model).architecture}"


def misfits(model: PreTrainedModel) -> list[str]:
    """Every reason for which there is no native form, each with the nearest that has one; nothing where it fits."""
    return [*_of_the_image(model), *_of_the_text(model)]


def _of_the_image(model):
    config, found = model.config, []
    kind, strategy = kind_of(config.vision_config), config.vision_feature_select_strategy
    takes = forward_names(model.model.vision_tower)
    if hasattr(config.vision_config, "encoders"):
        return ["two vision encoders stand side by side (one can be exported)"]
    if config.max_tiles > 1:
        found.append("images are cut into tiles as no such class does (--max_tiles 1 can be exported)")
    if config.projector_type not in _PROJECTORS:
        found.append(f"projector_type={config.projector_type} has no counterpart (mlp can be exported)")
    if strategy == "cls" or (strategy == "patch" and config.num_prefix_tokens > 1):
        others = f"all but the first {config.num_prefix_tokens} tokens of the encoder's are"
        what = "the CLS token alone of the encoder's is" if strategy == "cls" else others
        found.append(f"{what} read (--vision_feature_select_strategy full can be exported)")
    if len(set(pair_of(config.vision_config.patch_size))) > 1:
        found.append(f"the encoder's patches are not square ({kind}; one of square patches can be exported)")
    if "spatial_shapes" in takes:
        return [*found, f"the encoder ({kind}) is given patches that Duet cuts (SigLIP in its place can be exported)"]
    if "interpolate_pos_encoding" in takes and tuple(config.image_size) != own_image_size(config.vision_config):
        found.append(
            f"the encoder's positions are interpolated to an image_size of {config.image_size[0]}x"
            f"{config.image_size[1]} (its own, {own_image_size(config.vision_config)[0]}, can be exported)"
        )
    if (config.projector_type in ("linear", "identity") or _leaves_out_first(config)) and _reads_after_norm(model):
        found.append(
            "the features are read after the encoder's last norm (read hidden_states[-2] with --vision_feature_layer "
            "-2 and it can be exported)"
        )
    return found


def _of_the_text(model):
    config, head, found = model.config.text_config, model.lm_head, []
    kind, embeddings = config.model_type, model.get_input_embeddings()
    other = "another language model, such as Llama or Qwen, can be exported"
    if head.bias is not None:
        found.append(f"the language model's head ({kind}) has a bias ({other})")
    if getattr(config, "final_logit_softcapping", None) is not None:
        found.append(f"the language model ({kind}) caps its logits ({other})")
    if embeddings.embedding_dim != config.hidden_size or head.in_features != config.hidden_size:
        found.append(
            f"the language model's embeddings ({kind}, {embeddings.embedding_dim}) are not as wide as its states, "
            f"{config.hidden_size} ({other})"
        )
    if not embeddings.num_embeddings == head.out_features == config.vocab_size:
        found.append(f"the language model ({kind}) has other numbers of embeddings and of logits ({other})")
    return found


@torch.no_grad()
def _reads_after_norm(model):
    """Whether the features are something else than the last of the encoder's hidden states."""
    if model.config.vision_feature_layer is not None:
        return False
    image = blank_image(model.model.vision_tower, model.config.image_size)
    outputs, states = model.model.vision_hidden_states(image, output_hidden_states=True)
    return outputs.hidden_states[-1] is not states


def _leaves_out_first(config):
    return config.vision_feature_select_strategy == "patch" and config.num_prefix_tokens == 1


def _embedding(model):
    embeddings = model.get_input_embeddings()
    names = (name for name, module in model.model.language_model.named_modules() if module is embeddings)
    return next(names) + ".weight"


def _head_factor(model):
    return float(scale_logits(torch.ones((), dtype=torch.float64), model.config.text_config))


def _stays_tied(model):
    return (
        bool(model.config.tie_word_embeddings)
        and _embedding(model) == "embed_tokens.weight"
        and _head_factor(model) == 1
    )


__all__ = ["NativeForm", "misfits", "native_form", "native_weights", "say_native"]
