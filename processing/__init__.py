"""From data to batches: sources, conversations, encoding, collator, and the processor that travels with a model."""

from .batching.collator import VLMDataCollator
from .data_error_vlm import DuetError
from .processing_vlm import VLMProcessor
from .reading.read_rows import read_rows


# Registered classes have their source files copied into every folder they are saved to.
VLMProcessor.register_for_auto_class()

__all__ = ["DuetError", "VLMDataCollator", "VLMProcessor", "read_rows"]
