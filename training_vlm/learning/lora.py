"""Adapters of peft in a composed model.

What is special: what gets an adapter is found from the modules that the model has, its linear layers and experts that
lie in one tensor, in the blocks of the backbone whose policy says so; no family is named. LoRA is
https://arxiv.org/abs/2106.09685, on quantised weights https://arxiv.org/abs/2305.14314 (QLoRA), with magnitudes apart
https://arxiv.org/abs/2402.09353 (DoRA).
"""

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from peft import LoraConfig, PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from modeling_vlm.adapters_vlm import PREFIX, WEIGHTS, Adapter, is_adapted, read_config
from processing.data_error_vlm import DuetError, in_a_line

from ..policy import TuningArguments
from .adapters import composed
from .tuning import find_blocks, has_blocks


DROPOUT = 0.05
"""As in LLaVA's and QLoRA's recipes; experts that lie in one tensor have none, as peft cannot drop out before them."""

LINEAR = (nn.Linear, Conv1D)
ALL_LINEAR = "all-linear"
"""Peft's word for every linear layer but the head, outside of blocks too."""
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class AdaptedVLM(PeftModel):
    """A `VLMForConditionalGeneration` with adapters; what it saves loads without this package, base and all."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        *args,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """Save adapters, what learned beside them, config and code; the base is where the adapter's config says."""
        if state_dict is not None:
            state_dict = {name.removeprefix(PREFIX): tensor for name, tensor in state_dict.items()}
        composed(self).save_pretrained(
            save_directory, is_main_process=is_main_process, state_dict=state_dict, push_to_hub=push_to_hub, **kwargs
        )

    def push_to_hub(self, *args, **kwargs) -> Any:
        """See `PreTrainedModel.push_to_hub`."""
        return composed(self).push_to_hub(*args, **kwargs)


class Targets(NamedTuple):
    """What gets an adapter, by full names in a composed model: modules, and parameters that hold many experts."""

    modules: list[str]
    parameters: list[str]


def find_targets(model: nn.Module, sides: list[str], asked: list[str] | None = None) -> Targets:
    """
    What gets an adapter.

    Args:
        model: a composed model.
        sides: the backbones of it that learn through adapters, "vision" and "text".
        asked: as peft takes them: names, whole or their ends; one pattern that whole names match; or "all-linear".
            Every linear layer of the blocks, and experts, if not given. Other backbones' modules are never meant.

    Raises:
        DuetError: there is nothing of such a name.
    """
    meant = _of(model, sides)
    parts = {name: module for name, module in model.named_modules() if any(module is part for part in meant)}
    modules, parameters = [], []
    for name, part in parts.items():
        inside = blocks = [(name, part)]
        if asked is None or has_blocks(part):  # what has three dimensions elsewhere is no expert
            blocks = [(f"{name}.{block}", module) for block, module in _blocks_of(part)]
        if asked is None:
            inside = blocks
        modules += [found for prefix, module in inside for found in _linear(prefix, module)]
        parameters += [found for prefix, module in blocks for found in _experts(prefix, module)]
    if asked is None:
        return Targets(modules, parameters)
    if asked == [ALL_LINEAR]:
        return Targets(modules, [])
    everything = modules + parameters
    if len(asked) == 1 and not any(_is_meant(name, asked) for name in everything):
        asked = _matching(asked[0], everything) or asked
    for name in asked:
        if not any(_is_meant(found, [name]) for found in everything):
            ends = sorted({found.rpartition(".")[2] for found in everything})
            where = " and ".join(_NAMES[side] for side in sides)
            raise DuetError(
                f"lora_target_modules: nothing is called {name} in the {where}; found linear layers {', '.join(ends)}."
            )
    return Targets(*([name for name in names if _is_meant(name, asked)] for names in (modules, parameters)))


def _matching(pattern: str, names: list[str]) -> list[str]:
    try:
        return [name for name in names if re.fullmatch(pattern, name)]
    except re.error:
        return []


_NAMES = {"vision": "vision encoder", "text": "language model"}


def _of(model, sides):
    """The backbones that are meant, of a pair of encoders both."""
    tower = model.model.vision_tower
    parts = {"vision": list(getattr(tower, "encoders", (tower,))), "text": [model.model.language_model]}
    return [part for side in sides for part in parts[side]]


def _blocks_of(backbone):
    blocks = find_blocks(backbone)
    [name] = [name for name, module in backbone.named_modules() if module is blocks]
    return [(f"{name}.{number}", block) for number, block in enumerate(blocks)]


def _is_meant(name, asked):
    return any(name == one or name.endswith(f".{one}") for one in asked)


def _linear(prefix, root) -> Iterator[str]:
    """Linear layers that their parents call; some read the weights alone, where an adapter would be passed over."""
    owners = dict(root.named_modules())
    for name, module in owners.items():
        owner = owners.get(name.rpartition(".")[0])
        state_space = hasattr(owner, "A_log") and name.endswith(("dt_proj", "out_proj"))
        fused = isinstance(owner, nn.MultiheadAttention) or state_space
        if isinstance(module, LINEAR) and not fused:
            yield f"{prefix}.{name}" if name else prefix


def _experts(prefix, root) -> Iterator[str]:
    for name, module in root.named_modules():
        if not isinstance(module, _CONVOLUTIONS):
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3:
                    yield ".".join(filter(None, (prefix, name, own)))


def sides_in(adapter: Adapter) -> set[str]:
    """
    The backbones that an adapter on disk or on the Hub is in, "vision" and "text".

    Raises:
        DuetError: it is not whole.
    """
    folder = Path(adapter.name)
    try:
        file = folder / WEIGHTS if folder.is_dir() else hf_hub_download(adapter.name, WEIGHTS, **adapter.hub)
        with safe_open(file, framework="pt") as weights:
            names = [name for name in weights.keys() if ".lora_" in name]  # noqa: SIM118
    except Exception as error:  # of the library of the format, of the disk, or of the Hub
        raise DuetError(f"the adapter in {adapter.name} is not whole: {WEIGHTS}: {in_a_line(error, 200)}") from error
    places = {"vision": "model.vision_tower.", "text": "model.language_model."}
    return {side for side, place in places.items() if any(name.startswith(PREFIX + place) for name in names)}


def adapt(model: nn.Module, tuning: TuningArguments, sides: list[str], base: str, revision: str | None) -> AdaptedVLM:
    """
    Put new adapters into a model, which do nothing yet.

    Args:
        model: a composed model.
        tuning: settings of the adapters.
        sides: the backbones that learn through them, "vision" and "text".
        base, revision: how a saved adapter names the model.

    Raises:
        DuetError: a setting that peft or the model cannot have.
    """
    targets = find_targets(model, sides, tuning.lora_target_modules)
    if targets.parameters and (tuning.lora_dropout or tuning.use_dora):
        option = "use_dora" if tuning.use_dora else f"lora_dropout={tuning.lora_dropout:g}"
        raise DuetError(
            f"{option} cannot be: the experts ({targets.parameters[0]}) lie in one tensor, which peft adapts without "
            "it; leave it out, or name other modules with --lora_target_modules."
        )
    dropout = tuning.lora_dropout
    if dropout is None:
        dropout = 0.0 if targets.parameters else DROPOUT
    config = LoraConfig(
        r=tuning.lora_r,
        lora_alpha=tuning.lora_alpha,
        lora_dropout=dropout,
        target_modules=targets.modules,
        target_parameters=targets.parameters or None,
        use_dora=tuning.use_dora,
        use_rslora=tuning.use_rslora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        revision=revision,
    )
    return wrap(model, config)


def load_adapters(
    model: nn.Module, adapter: Adapter, base: str, base_revision: str | None, targets: Targets | None = None
) -> AdaptedVLM:
    """
    Put the adapters of an earlier run into their base, to go on with them.

    Args:
        model: the base.
        adapter: where they lie.
        base, base_revision: how a saved adapter will name the base.
        targets: what is said to be adapted.

    Raises:
        DuetError: the adapter is another model's, or in other modules than is said.
    """
    folder, hub = adapter.name, adapter.hub
    config = config_of(adapter)
    config.inference_mode, config.base_model_name_or_path, config.revision = False, base, base_revision
    adapted = wrap(model, config)
    check_targets(adapted, targets, folder)
    weights = load_peft_weights(folder, device="cpu", **hub)
    try:
        set_peft_model_state_dict(adapted, weights)
    except (RuntimeError, KeyError) as error:
        raise DuetError(f"the adapter in {folder} does not fit its base: {in_a_line(error, 300)}") from error
    composed(model)._learned_beside = {name.removeprefix(PREFIX) for name in weights if ".lora_" not in name}
    return adapted


def config_of(adapter: Adapter) -> LoraConfig:
    """
    Peft's config of an adapter on disk or on the Hub.

    Raises:
        DuetError: it is another method's than LoRA, or cannot be read.
    """
    config = read_config(adapter)
    if not isinstance(config, LoraConfig):
        raise DuetError(
            f"the adapter in {adapter.name} is of another method, {getattr(config.peft_type, 'value', None)}; a run "
            "goes on with LoRA alone. Add --merge_first to go on without it, or name an adapter of LoRA."
        )
    return config


def check_targets(adapted: AdaptedVLM, targets: Targets | None, folder: str) -> None:
    """
    Refuse an adapter that is in other modules than is said.

    Args:
        targets: what is said, found before there were adapters; `None` where nothing is.

    Raises:
        DuetError: one of them that it lacks, or has more.
    """
    if targets is None:
        return
    tuner: Any = adapted.base_model
    found = {*tuner.targeted_module_names, *(name.removeprefix(PREFIX) for name in tuner.targeted_parameter_names)}
    if others := sorted(found.symmetric_difference([*targets.modules, *targets.parameters])):
        state = "is not in" if others[0] not in found else "is also in"
        raise DuetError(
            f"lora_target_modules: the adapter in {folder} {state} {others[0]}; leave it out, or add --merge_first "
            "to go on without it."
        )


def wrap(model: nn.Module, config: PeftConfig) -> AdaptedVLM:
    """
    Put adapters into a model as a config of peft has them.

    Raises:
        DuetError: it has some already, or peft cannot.
    """
    if is_adapted(model):
        raise DuetError("the model has adapters already; add --merge_first to go on without them.")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fan_in_fan_out")  # peft corrects it for each layer, and says so for each
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            return AdaptedVLM(model, config)
    except (ValueError, TypeError, ImportError) as error:
        raise DuetError(f"peft cannot adapt this model so: {in_a_line(error, 300)}") from error


__all__ = [
    "AdaptedVLM", "Targets", "adapt", "check_targets", "config_of", "find_targets", "load_adapters", "sides_in", "wrap",
]  # fmt: skip
