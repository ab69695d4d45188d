"""Adapters against whole weights: stage 2 of the same model on the same data, by several policies.

    python benchmarks/lora.py ALIGNED OUT --max_steps 300 --learning_rate 1e-3 \\
        --dataset dialogues.json --image_dir images --config questions.yaml     # what defaults.py made

ALIGNED is a folder of stage 1; OUT gets a folder for each policy; all other arguments are those of train_sft.py. Each
run is a process of its own, on one thread. The table has the share of test questions answered exactly right, what
learned, the most memory that the process had, the size of a checkpoint without and with what only resuming needs, and
the seconds of training.
"""

import argparse
import contextlib
import json
import multiprocessing
import resource
import sys
from pathlib import Path

import torch

import train_sft
from training_vlm.learning.originals import shown_size


POLICIES = {
    "full": ["--tune_text", "full"],
    "last block": ["--tune_text", "last:1"],
    "LoRA": ["--tune_text", "lora"],
    "DoRA": ["--tune_text", "lora", "--use_dora"],
    "QLoRA, 4 bit": ["--tune_text", "lora", "--load_in_4bit"],
    "projector": ["--tune_text", "frozen"],
}
RESUMING = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def run(name: str, how: list[str], model: str, folder: Path, others: list[str]) -> dict:
    """What a run by one policy gave."""
    torch.set_num_threads(1)
    common = ["--model", model, "--output_dir", str(folder), "--disable_tqdm", "true", "--save_strategy", "steps"]
    with open(folder.with_suffix(".log"), "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        train_sft.main([*common, *how, *others])
    checkpoint = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
    said = folder.with_suffix(".log").read_text()
    table = [line.split() for line in said.partition("part ")[2].partition("\n\n")[0].splitlines()[1:]]
    numbers = [[int(word.replace(",", "")) for word in row if word.replace(",", "").isdigit()][:2] for row in table]
    results = json.loads((folder / "all_results.json").read_text())
    return {
        "policy": name,
        "right": next((value for key, value in results.items() if key.endswith("exact_match")), None),
        "learned": sum(trained for _, trained in numbers),
        "of": sum(count for count, _ in numbers),
        "memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "checkpoint": sum(size for file, size in sizes.items() if file not in RESUMING),
        "resumable": sum(sizes.values()),
        "seconds": results["train_runtime"],
        "loss": results["train_loss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("aligned")
    parser.add_argument("out", type=Path)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=["full", "LoRA", "projector"])
    args, others = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    processes, found = multiprocessing.get_context("spawn"), []
    print(f"{'policy':<14}{'right':>8}{'loss':>8}{'learned':>12}{'memory':>11}{'checkpoint':>13}{'whole':>12}{'s':>7}")
    for name in args.policies:
        folder = args.out / name.replace(", ", "-").replace(" ", "-")
        with processes.Pool(1) as pool:
            row = pool.apply(run, (name, POLICIES[name], args.aligned, folder, others))
        found.append(row)
        right = "-" if row["right"] is None else f"{row['right']:.3f}"
        print(
            f"{name:<14}{right:>8}{row['loss']:>8.3f}{row['learned']:>12,}{shown_size(row['memory']):>11}"
            f"{shown_size(row['checkpoint']):>13}{shown_size(row['resumable']):>12}{row['seconds']:>7.0f}",
            flush=True,
        )
    (args.out / "lora.json").write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    sys.exit(main())
