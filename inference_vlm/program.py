"""What all commands have in common: they are called as the person called them, can show any text, and end in one way.

What is special: `duet-ask` and `python -m inference_vlm.ask` are the same function, and each names itself in its usage.
"""

import os
import sys
from pathlib import Path


INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ends, as shells have it."""


def program(module: str) -> str:
    """The name of a command that is installed as `duet-...` and can be run as a module too."""
    name = Path(sys.argv[0]).stem  # on Windows it ends in .exe
    return name if name.startswith("duet-") else f"python -m {module}"


def show_any_text() -> None:
    """Have a terminal that cannot show a character of a text show a ? for it, in place of an end of the command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def ended_by(error: BaseException) -> int:
    """
    The exit code of a command that Ctrl-C ends, or a person's mistake, said in one line on stderr.

    Raises:
        BaseException: what was given, where it is a mistake of our own, or `DUET_TRACEBACK` asks where it was found.
    """
    if isinstance(error, KeyboardInterrupt):
        print(file=sys.stderr)
        return INTERRUPTED
    if not getattr(error, "is_duet_error", False) or os.environ.get("DUET_TRACEBACK"):
        raise error
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 1
