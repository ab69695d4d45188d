"""A fresh process in which this package cannot be imported, as on the machine of a user who loads a checkpoint."""

import os
import subprocess
import sys
from pathlib import Path


WITHOUT_PACKAGE = '''
import importlib.abc, sys

OURS = {"modeling_vlm", "processing", "training_vlm", "inference_vlm", "evaluation_vlm", "tests"}


class Absent(importlib.abc.MetaPathFinder):
    """The package is not installed here, even where the environment has an editable install of it."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OURS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
importable = []
for name in sorted(OURS):
    try:
        __import__(name)
        importable.append(name)
    except ModuleNotFoundError:
        pass
'''


def run_without_package(source: str, work: Path, *arguments: str) -> str:
    """
    Run a script that starts without this package and finds in `importable` what of it could be imported all the same.

    Args:
        source: the script, whose `sys.argv` is `[..., work, *arguments]`.
        work: where it is written to; it runs in an empty folder beside it, with a home of its own and no network.

    Returns:
        `str`: what it wrote to stdout and stderr.
    """
    script, elsewhere = work / "child.py", work / "elsewhere"
    script.write_text(WITHOUT_PACKAGE + source)
    elsewhere.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON"))}
    environment |= {"HF_HOME": str(elsewhere / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", str(script), str(work), *arguments]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr
