"""What every command does first: it is called as the person called it, and can show any text.

What is special: `duet-ask` and `python -m inference_vlm.ask` are the same function, and each names itself in its usage.
"""

import sys
from pathlib import Path


def program(module: str) -> str:
    """The name of a command that is installed as `duet-...` and can be run as a module too."""
    name = Path(sys.argv[0]).stem  # on Windows it ends in .exe
    return name if name.startswith("duet-") else f"python -m {module}"


def show_any_text() -> None:
    """Have a terminal that cannot show a character of a text show a ? for it, in place of an end of the command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
