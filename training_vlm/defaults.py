"""What a run does of which nothing is said: what learns, at which rate, by which schedule."""

import contextlib
from typing import Any

from modeling_vlm.adapters_vlm import find_adapter

from .learning.lora import sides_in


def fill_in(settings: dict[str, Any]) -> None:
    """
    Say of a stage's settings what learns where nobody did: what starts from scratch, and not what is pretrained.

    A model that is an adapter goes on to learn through it.
    """
    adapted: set[str] = set()
    if settings["model"] is not None and not settings["merge_first"]:
        with contextlib.suppress(OSError, ValueError):  # what is no model is told of later
            adapter = find_adapter(settings["model"], {"revision": settings["model_revision"]})
            adapted = set() if adapter is None else sides_in(adapter)
    for side in ("vision", "text"):
        if settings[f"tune_{side}"] is None:
            starts = "full" if isinstance(settings[f"{side}_model"], dict) else "frozen"
            settings[f"tune_{side}"] = "lora" if side in adapted else starts


__all__ = ["fill_in"]
