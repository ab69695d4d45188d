"""What a run does of which nothing is said: what learns, how fast, by which schedule; and what is read of an image.

What is special: every figure is a published recipe's, named beside it, and is taken only where the user said nothing of
it; the table before training says what came from where. What fits a language model of billions of weights leaves one of
millions where it was, so rates follow its size.
"""

import contextlib
import copy
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig

from modeling_vlm.adapters_vlm import find_adapter
from modeling_vlm.backbones_vlm import BackboneKwargs, vision_config_of
from modeling_vlm.configuration_vlm import own_image_size
from modeling_vlm.vision_vlm import blank_image, build_vision_tower, forward_names, run_tower, unused_parameters

from .learning.lora import sides_in
from .learning.tuning import EMBEDDINGS, HEAD, PROJECTOR, TEXT, VISION, make_plan
from .stages import PRETRAIN, Stage


if TYPE_CHECKING:
    from .settings import Arguments


class Default(NamedTuple):
    """A value, and whose it is."""

    value: Any
    source: str


# https://github.com/haotian-liu/LLaVA/tree/main/scripts/v1_5
_ALIGNED, _TUNED = "LLaVA-1.5's pretrain.sh", "LLaVA-1.5's finetune.sh"
NEW_PROJECTOR = Default(1e-3, _ALIGNED)
ADAPTERS = Default(2e-4, "LLaVA-1.5's finetune_lora.sh")
PROJECTOR_BESIDE_ADAPTERS = Default(2e-5, "LLaVA-1.5's finetune_lora.sh")

FULL = (
    (1e9, Default(2e-5, _TUNED)),
    (50e6, Default(5e-5, "nanoVLM's lr_language_backbone")),  # https://github.com/huggingface/nanoVLM
    (0, Default(3e-4, "BERT miniatures' highest, arXiv 1908.08962")),  # https://github.com/google-research/bert
)
"""Rates of a pretrained language model that learns, whole or in part, by the number of its weights."""

VISION_BESIDE = (
    (1e9, Default(2e-6, "LLaVA-NeXT's mm_vision_tower_lr")),  # https://github.com/LLaVA-VL/LLaVA-NeXT
    (0, Default(5e-5, "nanoVLM's lr_vision_backbone")),
)
"""Rates of a pretrained encoder that learns, by the number of the language model's weights."""

# Table 1 of https://arxiv.org/abs/2304.01373
PYTHIA = {70e6: 1e-3, 160e6: 6e-4, 410e6: 3e-4, 1e9: 3e-4, 1.4e9: 2e-4, 2.8e9: 1.6e-4, 6.9e9: 1.2e-4}
"""Rates of a language model from scratch, by its size."""

NEW_VISION = Default(1e-3, "How to train your ViT, arXiv 2106.10270")

SCHEDULE = {"lr_scheduler_type": "cosine", "warmup_steps": 0.03}
"""LLaVA-1.5's in both stages."""


def fill_in(stage: Stage, settings: dict[str, Any], sources: dict[str, str]) -> None:
    """
    Say what learns and by which schedule, where nobody did; rates are settled once the model is there.

    Args:
        settings: of all kinds, by name; added to.
        sources: where those that were said come from; added to.
    """
    published, adapted = (_ALIGNED if stage is PRETRAIN else _TUNED), _adapted(settings)
    for side in ("vision", "text"):
        if settings[f"tune_{side}"] is None:
            settings[f"tune_{side}"], source = _word(stage, side, settings, adapted, published)
            sources[f"tune_{side}"] = f"default ({source})"
    if not {"lr_scheduler_type", "lr_scheduler_kwargs"} & sources.keys():
        for name, value in SCHEDULE.items():
            if name not in sources:
                settings[name], sources[name] = value, f"default ({published})"


def _word(stage: Stage, side: str, settings: dict[str, Any], adapted: set[str], published: str) -> Default:
    if isinstance(settings[f"{side}_model"], dict):
        return Default("full", "it starts from scratch")
    if side in adapted:
        return Default("lora", "the adapter of the model")
    if side == "vision" or stage is PRETRAIN:
        return Default("frozen", published)
    if settings["load_in_4bit"] or settings["load_in_8bit"]:
        return Default("lora", "QLoRA, arXiv 2305.14314")
    return Default("full", published)


def _adapted(settings: dict[str, Any]) -> set[str]:
    """The backbones in which a model has adapters that go on to learn."""
    if settings["model"] is not None and not settings["merge_first"]:
        with contextlib.suppress(OSError, ValueError):  # what is no model is told of later
            adapter = find_adapter(settings["model"], {"revision": settings["model_revision"]})
            return set() if adapter is None else sides_in(adapter)
    return set()


def settle_rates(stage: Stage, model: nn.Module, arguments: "Arguments") -> None:
    """Give what learns the rates of published recipes, where `learning_rate` was not said."""
    tuning, training, sources = arguments.tuning, arguments.training, arguments.tuning.sources
    composed_now = arguments.model.model is None
    if sources is None:
        return
    if composed_now and "vision_feature_layer" not in sources:
        sources["vision_feature_layer"] = "default (what LLaVA reads, where it could)"
    if "learning_rate" in sources:
        return
    plan = make_plan(model, tuning, training)
    parts = {part.name: part for part in plan.parts}
    weights = sum(part.parameters for part in plan.components() if part.name in (TEXT, EMBEDDINGS))
    anew = {side: isinstance(getattr(arguments.model, f"{side}_model"), dict) for side in ("vision", "text")}
    found: dict[str, Default] = {}
    if any(parts[name].learning for name in (TEXT, EMBEDDINGS, HEAD)):
        found["learning_rate"] = rate_of_language_model(parts[TEXT].policy, weights, anew["text"])
    if parts[PROJECTOR].learning:
        text = found.get("learning_rate")
        if text is None or (not anew["text"] and (stage is PRETRAIN or composed_now)):
            found["projector_learning_rate"] = NEW_PROJECTOR
        else:
            found["projector_learning_rate"] = PROJECTOR_BESIDE_ADAPTERS if parts[TEXT].policy == "lora" else text
    if parts[VISION].learning:
        pretrained = ADAPTERS if parts[VISION].policy == "lora" else _by_size(VISION_BESIDE, weights)
        found["vision_learning_rate"] = NEW_VISION if anew["vision"] else pretrained
        if anew["vision"] and anew["text"]:
            found["vision_learning_rate"] = found["learning_rate"]
    found = {name: rate for name, rate in found.items() if name not in sources}
    if not found:  # all that learns has its own
        return
    first = found.pop("learning_rate", None) or found[next(iter(found))]
    training.learning_rate, sources["learning_rate"] = first.value, f"default ({first.source})"
    for name, rate in found.items():
        if rate.value != first.value:
            setattr(tuning, name, rate.value)
            sources[name] = f"default ({rate.source})"


def rate_of_language_model(word: str, weights: float, anew: bool) -> Default:
    """
    The rate of a language model that learns by a policy's word.

    Args:
        weights: how many it has.
        anew: whether it starts from scratch.
    """
    if anew:
        size = min(PYTHIA, key=lambda known: abs(math.log(known / max(1, weights))))
        return Default(PYTHIA[size], "Pythia's nearest in size, arXiv 2304.01373")
    return ADAPTERS if word == "lora" else _by_size(FULL, weights)


def _by_size(table, weights: float) -> Default:
    return next(default for least, default in table if weights >= least)


def default_layer(vision: Any, kwargs: BackboneKwargs, strategy: str) -> int | None:
    """
    The layer of an encoder that other programs can read as well, as `vision_feature_layer` of `VLMConfig`.

    LLaVA's `hidden_states[-2]` where a norm lies behind the last layer of a pretrained encoder whose patches are read:
    native LLaVA has no name for what comes out of that norm. The final output where there is none, or nothing could be
    read elsewhere anyway: of a CLS token, of two encoders, of one that starts from scratch.
    """
    if not isinstance(vision, str) or strategy == "cls":
        return None
    config = copy.deepcopy(vision_config_of((vision,), kwargs))
    return -2 if config.num_hidden_layers > 1 and _has_last_norm(config) else None


def _has_last_norm(config: PreTrainedConfig) -> bool:
    """Whether the final output depends on weights that the last layer's does not."""
    with torch.device("meta"):
        tower = build_vision_tower(config).eval()
    image, takes = blank_image(tower, own_image_size(config)), forward_names(tower)

    def outputs():
        return run_tower(tower, takes, image, output_hidden_states=True)

    try:
        without = unused_parameters(tower, lambda: outputs().hidden_states[-1])
        return bool(without - unused_parameters(tower, lambda: outputs().last_hidden_state))
    except Exception:  # what such an encoder cannot do is said where the model is composed
        return False


_DECIDED = (
    "tune_vision", "tune_projector", "tune_text", "freeze_embeddings", "lora_r", "lora_alpha", "lora_dropout",
    "lora_target_modules", "use_dora", "use_rslora", "load_in_4bit", "load_in_8bit", "merge_first", "learning_rate",
    "vision_learning_rate", "projector_learning_rate", "weight_decay", "vision_weight_decay", "projector_weight_decay",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "vision_feature_layer",
)  # fmt: skip


def decided(arguments: "Arguments", config: PreTrainedConfig) -> list[str]:
    """
    What decides how a run learns, and where each came from, in lines for a reader.

    Args:
        config: the model's.
    """
    lines: dict[str, list[str]] = {}
    for name in _DECIDED:
        if (source := (arguments.tuning.sources or {}).get(name)) is None:
            continue
        holders = (arguments.tuning, arguments.training, config)
        value = next(getattr(holder, name) for holder in holders if hasattr(holder, name))
        shown = f"{value:g}" if isinstance(value, float) else getattr(value, "value", value)
        lines.setdefault(source, []).append(f"{name} {'last' if shown is None else shown}")
    return [f"{source}: {', '.join(found)}" for source, found in lines.items()]


__all__ = ["decided", "default_layer", "fill_in", "rate_of_language_model", "settle_rates"]
