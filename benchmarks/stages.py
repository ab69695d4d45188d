"""Both training stages of one setting, one after the other, from scratch and in a folder of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml


HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def train_both(folder: Path, settings: dict[str, Any]) -> dict[str, float]:
    """
    Train as the two scripts do.

    Args:
        folder: for the settings, the output of both stages and their logs.
        settings: of both stages, as a recipe has them.

    Returns:
        The share of test questions answered exactly right, by `subset/kind`.
    """
    folder.mkdir(parents=True)
    train(folder, "train_pretrain.py", settings)
    return train(folder, "train_sft.py", settings)


def train(folder: Path, script: str, settings: dict[str, Any]) -> dict[str, float]:
    """One stage, in a folder that is there; gives the shares that `train_both` does, if anything was asked."""
    section = settings["pretrain" if script == "train_pretrain.py" else "sft"]
    file = folder / f"{section['output_dir']}.yaml"
    file.write_text(yaml.safe_dump(settings))
    command = [sys.executable, ROOT / script, "--config", file.name, "--disable_tqdm", "true"]
    with open(file.with_suffix(".log"), "w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=folder, check=True, stdout=log, stderr=log, env=environment)
    results = folder / section["output_dir"] / "test_results.json"
    found = json.loads(results.read_text()) if results.exists() else {}
    return {name.removeprefix("test_"): value for name, value in found.items()}


def recipe(name: str = "shapes") -> dict[str, Any]:
    """The settings of a recipe."""
    return yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
