"""What all commands have in common: they are called as the person called them, can show any text, and end in one way.

What is special: `duet-ask` and `python -m inference_vlm.ask` are the same function, and each names itself and
the others as it was called.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any


INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ends, as shells have it."""


def program(module: str) -> str:
    """How a command is run: as `duet-...` where this one was called by such a name, else as the module that it is."""
    if not Path(sys.argv[0]).stem.startswith("duet-"):  # on Windows it ends in .exe
        return f"python -m {module}"
    name = module.rpartition(".")[2].removeprefix("train_")
    return f"duet-{_NAMED_OTHERWISE.get(name, name)}"


_NAMED_OTHERWISE = {"inspect_data": "inspect", "evaluation_vlm": "evaluate"}


def show_any_text() -> None:
    """Have a terminal that cannot show a character of a text show a ? for it, in place of an end of the command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def json_line(value: Any) -> str:
    """JSON in a line whatever reads it: without what some take for the end of one, or a terminal for a command."""
    return _STEERS.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


_STEERS = re.compile("[\x7f-\x9f\u2028\u2029]")  # besides those that JSON never has as they are


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
