"""Both training stages of one setting, one after the other, from scratch and in a folder of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml


ROOT = Path(__file__).resolve().parent.parent


def train_both(folder: Path, settings: dict[str, Any]) -> dict[str, float]:
    """
    Train as the two scripts do.

    Args:
        folder: for the settings, the output of both stages and their log.
        settings: of both stages, as a recipe has them.

    Returns:
        The share of test questions answered exactly right, by `subset/kind`.
    """
    folder.mkdir(parents=True)
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(folder / "log.txt", "w") as log:
        for script in ("train_pretrain.py", "train_sft.py"):
            command = [sys.executable, ROOT / script, "--config", "settings.yaml", "--disable_tqdm", "true"]
            subprocess.run(command, cwd=folder, check=True, stdout=log, stderr=log, env=one_thread)
    found = json.loads((folder / settings["sft"]["output_dir"] / "test_results.json").read_text())
    return {name.removeprefix("test_"): value for name, value in found.items()}


def recipe(name: str = "shapes") -> dict[str, Any]:
    """The settings of a recipe."""
    return yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
