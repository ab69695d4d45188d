"""What a command is called in its own usage: as the person called it, `duet-ask` or `python -m inference_vlm.ask`."""

import sys
from pathlib import Path


def program(module: str) -> str:
    """The name of a command that is installed as `duet-...` and can be run as a module too."""
    name = Path(sys.argv[0]).stem  # on Windows it ends in .exe
    return name if name.startswith("duet-") else f"python -m {module}"
