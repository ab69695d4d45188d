"""What both models of Duet are before they compute anything: how they are loaded, saved and begun.

An adapter's folder loads with its base, and is saved without it; what is quantised is the language model; and weights
that are cut over processes are saved as what they are.
"""

import os
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .adapters_vlm import find_adapter, from_adapter, is_adapted, push_adapter, save_adapter
from .backbones_vlm import CACHE, leave_out_image_parts
from .configuration_vlm import VLMConfig
from .loading_vlm import take_saved_weights
from .own_projector_vlm import trusting
from .projector_vlm import Resampler
from .vision_vlm import VLMVisionPair


logger = logging.get_logger(__name__)

_NOT_OF_ADAPTERS = {"max_shard_size", "token", "safe_serialization", "save_peft_format", "save_original_format"}
"""What saving takes that changes nothing where adapters are saved."""


class VLMPreTrainedModel(PreTrainedModel):
    """Flags that both models share. They are optimistic: each backbone checks and refuses what it cannot do."""

    config_class = VLMConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = [CACHE]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.register_load_state_dict_pre_hook(take_saved_weights)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None = None,
        *args,
        trust_remote_code: bool | None = None,
        quantization_config: QuantizationConfigMixin | dict | None = None,
        merge_adapter: bool = False,
        **kwargs,
    ) -> PreTrainedModel:
        """
        The library's, with care for three things.

        Args:
            pretrained_model_name_or_path: folder or repository of a model, or of an adapter, whose base comes with it.
            trust_remote_code: whether a projector class that comes with the checkpoint may be run.
            quantization_config: where it does not say what is left whole, vision tower, projector and head are, and it
                is saved so; the library would quantise the first two.
            merge_adapter: of an adapter, give a plain model that computes the same.
        """
        if (adapter := find_adapter(pretrained_model_name_or_path, kwargs)) is not None:
            how = {"quantization_config": quantization_config, "trust_remote_code": trust_remote_code}
            return from_adapter(cls, adapter, *args, merge=merge_adapter, **how, **kwargs)
        if quantization_config is not None:
            quantization_config = leave_out_image_parts(quantization_config)
        with trusting(trust_remote_code, **kwargs):
            return super().from_pretrained(
                pretrained_model_name_or_path, *args, quantization_config=quantization_config, **kwargs
            )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        *args,
        **kwargs,
    ):
        """
        See `PreTrainedModel.save_pretrained`; of a model with adapters what it has learned, without its base.

        One whose weights are cut over processes is saved as what it is.
        """
        made, own = type(self), next(kind for kind in type(self).__mro__ if not kind.__module__.startswith("torch."))
        self.__class__ = own  # `fully_shard` makes a class of its own, whose code would be saved in place of this
        if self.config.tie_word_embeddings and state_dict is not None:
            # Weights that were gathered one by one no longer show that they are one.
            tied = self._tied_weights_keys or ()
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        try:
            if not is_adapted(self):
                super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, *args, **kwargs)
            elif is_main_process:
                save_adapter(self, save_directory, state_dict)
                if not push_to_hub and (unheeded := sorted(kwargs.keys() - _NOT_OF_ADAPTERS)):
                    logger.warning(f"not heeded where adapters are saved: {', '.join(unheeded)}.")
                if push_to_hub:
                    repository = kwargs.pop("repo_id", Path(save_directory).name)
                    push_adapter(self, repository, state_dict, **kwargs)
        finally:
            self.__class__ = made

    def push_to_hub(self, repo_id: str, *args, **kwargs):
        """See `PreTrainedModel.push_to_hub`; a model with adapters goes with its base, so that it loads by name."""
        if is_adapted(self):
            return push_adapter(self, repo_id, *args, **kwargs)
        return super().push_to_hub(repo_id, *args, **kwargs)

    def initialize_weights(self):
        # The backbones by the library's own rule: in code that is not its own it passes over modules without tensors,
        # and some of these set buffers of their parts that no checkpoint holds (Falcon-H1).
        for module in self.modules():
            if isinstance(module, PreTrainedModel) and not isinstance(module, (VLMPreTrainedModel, VLMVisionPair)):
                module.initialize_weights()
        super().initialize_weights()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, Resampler):
            init.normal_(module.queries, std=0.02)
        elif isinstance(newline := getattr(module, "image_newline", None), nn.Parameter):
            init.normal_(newline, std=0.02)


__all__ = ["VLMPreTrainedModel"]
