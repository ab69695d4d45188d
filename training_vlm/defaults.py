"""What a run does of which nothing is said: what learns, at which rate, by which schedule."""

from typing import Any


def fill_in(settings: dict[str, Any]) -> None:
    """Say of a stage's settings what learns where nobody did: what starts from scratch, and not what is pretrained."""
    for side in ("vision", "text"):
        if settings[f"tune_{side}"] is None:
            settings[f"tune_{side}"] = "full" if isinstance(settings[f"{side}_model"], dict) else "frozen"


__all__ = ["fill_in"]
