"""Whole runs with the savings and without: seconds, losses and answers that are right, seed by seed.

    python benchmarks/whole_runs.py shapes OUT               # recipes/shapes.yaml, both stages
    python benchmarks/whole_runs.py captions OUT             # its stage 1 with all captions, those of an image together
    python benchmarks/whole_runs.py cifar10 OUT --data DATA  # what cifar10.py wrote into DATA

A run is a process with one thread; with and without take turns. A line of the log is the mean of so many steps that
its loss can be compared.
"""

import argparse
import json
import resource
from pathlib import Path
from typing import Any

import yaml
from stages import HERE, recipe, train


def stages_of(name: str, data: Path | None) -> tuple[dict[str, Any], list[str], dict[str, dict[str, Any]]]:
    """Settings of what is run, its scripts, and what differs: with the savings and without."""
    switched = {"with": {"padding_free": "on"}, "without": {"padding_free": "off"}}
    if name == "cifar10":
        settings = yaml.safe_load((HERE / "cifar10.yaml").read_text())
        for one in (*settings["datasets"], settings["test_dataset"]):
            one.update({key: str((data / one[key]).resolve()) for key in ("path", "image_dir") if key in one})
        return {**settings, "sft": {"output_dir": "sft"}}, ["train_sft.py"], switched
    settings = recipe()
    settings["pretrain"]["output_dir"], settings["sft"]["output_dir"] = "pretrain", "sft"
    settings["sft"]["model"] = "pretrain"
    if name == "captions":
        settings["pretrain"] |= {"caption_choice": "all", "per_device_train_batch_size": 40}  # of eight images
        return settings, ["train_pretrain.py"], {"with": {"share_prefix": "on"}, "without": {"share_prefix": "off"}}
    return settings, ["train_pretrain.py", "train_sft.py"], switched


def cpu_seconds() -> float:
    """CPU time of all processes that have ended."""
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def told(folder: Path) -> list[str]:
    """Of a stage that has run: seconds in its loop, losses from its start to its end, and how it did."""
    results = json.loads((folder / "all_results.json").read_text())
    lines = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    losses = [line["loss"] for line in lines if "loss" in line]
    some = [losses[len(losses) * part // 8] for part in (1, 2, 4, 6)] + losses[-1:]
    means = [f"{value:.1%}" for name, value in results.items() if name.endswith("/mean")]
    return [
        f"{results['train_runtime']:.0f}",
        ", ".join(f"{loss:.3g}" for loss in some),
        f"{results['eval_loss']:.4f}" if "eval_loss" in results else "",
        " and ".join(means),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["shapes", "captions", "cifar10"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    args = parser.parse_args()
    settings, scripts, ways = stages_of(args.what, args.data)
    print("| seed | savings | stage | CPU s | s in the loop | losses | held out | right |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for number, seed in enumerate(args.seeds):
        for way in sorted(ways, reverse=number % 2 == 1):
            folder = args.out / f"{way}-{seed}"
            folder.mkdir(parents=True)
            for script in scripts:
                begun = cpu_seconds()
                train(folder, script, {**settings, **ways[way], "seed": seed})
                stage = "pretrain" if script == "train_pretrain.py" else "sft"
                row = [str(seed), way, stage, f"{cpu_seconds() - begun:.0f}", *told(folder / stage)]
                print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
