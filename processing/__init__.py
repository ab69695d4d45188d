"""From data to batches: sources, conversations, encoding, collator, and the processor that travels with a model."""

from typing import TYPE_CHECKING

from .batching.collator import VLMDataCollator
from .data_error_vlm import DuetError
from .processing_vlm import VLMProcessor


if TYPE_CHECKING:
    from .reading.read_rows import read_rows

# Registered classes have their source files copied into every folder they are saved to.
VLMProcessor.register_for_auto_class()


def __getattr__(name: str):
    if name != "read_rows":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # It alone needs the package datasets, which a machine that trains on conversations in hand may not have.
    from .reading.read_rows import read_rows

    return read_rows


__all__ = ["DuetError", "VLMDataCollator", "VLMProcessor", "read_rows"]
