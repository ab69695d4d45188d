"""Weights that FSDP cuts over processes: where they are cut, that they are, and how such a model is saved whole.

What is special: weights are cut at the blocks of the backbones, found from the modules as a tuning policy finds them.
What the backbones name themselves (`_no_split_modules`) are also parts that a composed model leaves out, and FSDP would
look for them in vain.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import Trainer, TrainerCallback

from modeling_vlm import VLMForConditionalGeneration
from processing.data_error_vlm import DuetError

from .adapters import composed
from .tuning import find_blocks


if TYPE_CHECKING:
    from .trainer import VLMTrainer


_STATES = {"FSDP": "pytorch_model_fsdp*", "DeepSpeed": "global_step*"}
"""What cuts weights, and the files of its own that a run goes on from."""


def cut_at_blocks(trainer: "VLMTrainer") -> None:
    """
    Have FSDP cut the weights at the blocks of the backbones, and see that it does; nothing where it is not asked for.

    Raises:
        DuetError: version 1 of it.
    """
    if not trainer.is_fsdp_enabled:
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise DuetError(
            "fsdp_version is 1, which the libraries are about to remove; set fsdp_version: 2 in the config file of "
            "accelerate (recipes/accelerate/fsdp2.yaml), or version: 2 in --fsdp_config."
        )
    if plugin.auto_wrap_policy is transformer_auto_wrap_policy and plugin.transformer_cls_names_to_wrap is None:
        # What the backbones themselves name are also parts that a composed model has left out.
        plugin.transformer_cls_names_to_wrap = block_names(composed(trainer.model))
    # Nothing is done in place to what the model returns.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    trainer.add_callback(SeesWeightsCut(trainer))


def block_names(model: VLMForConditionalGeneration) -> list[str]:
    """Class names of the blocks of all backbones, found as those are that a policy names."""
    tower = model.model.vision_tower
    backbones = [*getattr(tower, "encoders", (tower,)), model.model.language_model]
    return sorted({type(block).__name__ for backbone in backbones for block in find_blocks(backbone)})


class SeesWeightsCut(TrainerCallback):
    """Stops a run on weights that were to be cut over processes, and are not; they are so whenever a step begins."""

    def __init__(self, trainer: "VLMTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Look at the weights, now that the libraries have prepared them."""
        assert self.trainer.model is not None
        if not any(hasattr(parameter, "placements") for parameter in self.trainer.model.parameters()):
            raise DuetError("FSDP was asked for, and no weight is cut over the processes; leave it out.")

    def on_evaluate(self, args, state, control, **kwargs):
        """Cut again what a forward pass that no backward pass followed has left whole."""
        assert self.trainer.model is not None
        for module in self.trainer.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def check_goes_on(trainer: "VLMTrainer", checkpoint: Path) -> None:
    """
    Refuse a checkpoint whose weights were cut otherwise than those of this run: its states could not be read.

    Raises:
        DuetError: they were.
    """
    wrote = next((kind for kind, files in _STATES.items() if any(checkpoint.glob(files))), None)
    now = "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed" if trainer.is_deepspeed_enabled else None
    if wrote != now:
        raise DuetError(
            f"{checkpoint} is of a run {f'with {wrote}' if wrote else 'of whole weights'}, and this one is "
            f"{f'with {now}' if now else 'of whole weights'}, which cannot read its states; launch it as that was, or "
            f"start anew from its model, --model {checkpoint}."
        )


@contextlib.contextmanager
def saved_whole(trainer: Trainer) -> Iterator[None]:
    """Within, the model is saved whole, whatever FSDP was told of the states that a run goes on from."""
    plugin: Any = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    kept = None if plugin is None else plugin.state_dict_type
    if kept is not None:
        plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        yield
    finally:
        if kept is not None:
            plugin.set_state_dict_type(kept.name)


__all__ = ["SeesWeightsCut", "block_names", "check_goes_on", "cut_at_blocks", "saved_whole"]
