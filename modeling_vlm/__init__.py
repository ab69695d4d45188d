"""The Duet model: what a checkpoint ships."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)

from .configuration_vlm import VLMConfig, VLMVisionPairConfig
from .model_error_vlm import DuetError
from .modeling_vlm import VLMForConditionalGeneration, VLMModel, VLMPreTrainedModel
from .vision_vlm import VLMVisionPair


# Registered for the Auto classes, so that where this package is imported no code of a checkpoint is run.
AutoConfig.register(VLMConfig.model_type, VLMConfig)
for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM):
    auto_class.register(VLMConfig, VLMForConditionalGeneration)

# Registered for saving: these classes have their source files copied into every folder they are saved to.
VLMConfig.register_for_auto_class()
VLMModel.register_for_auto_class("AutoModel")
VLMForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = [
    "DuetError",
    "VLMConfig",
    "VLMForConditionalGeneration",
    "VLMModel",
    "VLMPreTrainedModel",
    "VLMVisionPair",
    "VLMVisionPairConfig",
]
