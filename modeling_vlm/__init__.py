"""The Duet model: what a checkpoint ships."""

from .configuration_vlm import VLMConfig
from .modeling_vlm import VLMForConditionalGeneration, VLMModel, VLMPreTrainedModel


# Registered classes have their source files copied into every folder they are saved to.
VLMConfig.register_for_auto_class()
VLMModel.register_for_auto_class("AutoModel")
VLMForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["VLMConfig", "VLMForConditionalGeneration", "VLMModel", "VLMPreTrainedModel"]
