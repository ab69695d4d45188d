"""How fast training is, each saving switched on in turn, beside what others do on the same pairs with the same texts.

    python benchmarks/train_speed.py --all                            # every case; results.md, ladder.svg, one JSON
    python benchmarks/train_speed.py --shape S --stage 1 --captions 5 --precision bf16 --runners llava,duet
    python benchmarks/train_speed.py --shape small                    # a quick look

Each runner is a process of its own with one thread, all wait, and one at a time takes one step, so that whatever else
the machine does meets all alike; what is compared are ratios within a round. The first step is a check: all start from
the same weights with the same batch, so their losses and the norms of their gradients have to agree.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speed_pairs import Task, make_and_tell
from speed_report import draw_ladder, table, write_results
from speed_runners import LADDER, RUNNERS, start


HERE = Path(__file__).parent
TOLERANCES = {"fp32": (1e-5, 1e-4), "bf16": (2e-3, 5e-2)}
"""Of a loss and of a gradient norm, relative to the first runner's; bf16 rounds to 8 bits, each runner elsewhere."""


@dataclass(frozen=True)
class Case:
    """
    What is measured in one go.

    Args:
        shape, stage, captions: see `Task`.
        images: of a step in fp32 and in bf16, where more are done in the time.
        runners: names, the one that the others are compared with first.
    """

    shape: str
    stage: int
    captions: int
    images: dict[str, int]
    runners: tuple[str, ...]

    def title(self, precision: str) -> str:
        """The case in words."""
        what = "dialogues" if self.stage == 2 else f"{self.captions} caption{'s' * (self.captions > 1)} an image"
        return f"{self.shape}, stage {self.stage}, {what}, {precision}"


def processes() -> Any:
    """Where processes come from: forked from one that has imported what all need and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_vlm.run", "speed_runners", "transformers.models.llava.modeling_llava"])
    return context


class Runners:
    """The processes of a case: started together, stepped one at a time."""

    def __init__(self, names: tuple[str, ...], task: Task, folder: Path, precision: str):
        context = processes()
        self.folder, self.processes, self.ready = folder, {}, {}
        for name in names:
            here, there = context.Pipe()
            arguments = (there, name, task, folder, precision, folder / f"{name}.log")
            process = context.Process(target=start, args=arguments, daemon=True)
            process.start()
            there.close()
            self.processes[name] = process, here
        for name in names:
            self.ready[name] = self._told(name)

    def step(self, name: str) -> dict[str, float]:
        """One step of one runner, and what it cost."""
        self.processes[name][1].send(True)
        return self._told(name)

    def stop(self) -> None:
        """End all."""
        for _, connection in self.processes.values():
            with contextlib.suppress(OSError):  # of one that has ended
                connection.send(False)
        for process, _ in self.processes.values():
            process.join(20)
            process.kill()

    def _told(self, name):
        try:
            told = self.processes[name][1].recv()
        except EOFError:
            told = {"failed": (self.folder / f"{name}.log").read_text()[-3000:]}
        if "failed" in told:
            self.stop()
            sys.exit(f"error: the runner {name} failed:\n{told['failed']}")
        return told


def made(task: Task, folder: Path) -> dict[str, Any]:
    """`make`, in a process of its own, so that this one stays small."""
    here, there = processes().Pipe()
    process = processes().Process(target=make_and_tell, args=(there, task, folder))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        sys.exit("error: what is to be trained could not be made; the reason stands above")
    finally:
        process.join()


def measure(case: Case, precision: str, rounds: int, folder: Path, images: int | None = None) -> dict[str, Any]:
    """
    A case: the check, then so many rounds.

    Returns:
        the case in words, what each runner told of each step, and the numbers of its texts.
    """
    # Two steps more than are taken: a Trainer loads a batch ahead.
    task = Task(case.shape, case.stage, case.captions, images or case.images[precision], rounds + 3)
    begun = time.perf_counter()
    numbers = made(task, folder)
    runners = Runners((*case.runners, "gemm"), task, folder, precision)
    steps: dict[str, list[dict[str, float]]] = {name: [runners.step(name)] for name in runners.processes}
    for number in range(rounds):
        names = list(steps)
        for name in names[number % len(names) :] + names[: number % len(names)]:  # none is always behind the same
            steps[name].append(runners.step(name))
    runners.stop()
    return {
        "case": case.title(precision), "precision": precision, "shape": case.shape, "stage": case.stage,
        "batch": task.batch, "images": task.images, "runners": list(case.runners), "ready": runners.ready,
        "steps": steps, **numbers, "seconds": time.perf_counter() - begun,
    }  # fmt: skip


def disagreements(measured: dict[str, Any]) -> list[str]:
    """What the first step shows to differ between runners that have to agree, as lines."""
    loss_at_most, norm_at_most = TOLERANCES[measured["precision"]]
    first, *others = measured["runners"]
    expected, lines = measured["steps"][first][0], []
    for name in others:
        found = measured["steps"][name][0]
        for what, at_most in (("loss", loss_at_most), ("norm", norm_at_most)):
            off = abs(found[what] / expected[what] - 1)
            if not off <= at_most:
                lines.append(
                    f"{measured['case']}: {what} of {name} is {found[what]:.7g} and of {first} {expected[what]:.7g}, "
                    f"off by {off:.1e}; expected {at_most:.0e} at most"
                )
    return lines


SAVED = tuple(LADDER)
CASES = [
    Case("G", 1, 5, {"fp32": 3, "bf16": 6}, ("plain", "plain, padded to 128", *SAVED)),
    Case("S", 1, 5, {"fp32": 2, "bf16": 3}, ("llava", *SAVED)),
    # By itself, as it would take more than 24 GiB beside the others.
    Case("S", 1, 5, {"fp32": 2, "bf16": 3}, ("llava", "trl", "duet, shared prefix")),
    Case("S", 1, 1, {"fp32": 3, "bf16": 6}, ("llava", *SAVED)),
    Case("S", 2, 1, {"fp32": 4, "bf16": 4}, ("llava", *SAVED)),
]
"""Those of `--all`, each in both precisions."""

OTHERS = [
    Case("small", 1, 5, {"fp32": 4, "bf16": 4}, ("llava", *SAVED)),
    Case("small", 2, 1, {"fp32": 6, "bf16": 6}, ("llava", *SAVED)),
    Case("G", 2, 1, {"fp32": 6, "bf16": 6}, ("plain", *SAVED)),
]


def chosen(args: argparse.Namespace) -> list[tuple[Case, str]]:
    """The cases that are asked for, with their precisions; no runner twice that does the same in a case."""
    cases = CASES
    if not args.all:
        cases = [case for case in CASES + OTHERS if (case.shape, case.stage) == (args.shape, args.stage)]
        cases = [next((case for case in cases if case.captions == args.captions), cases[0])]
        cases = [replace(case, captions=args.captions if case.stage == 1 else 1) for case in cases]
    asked = args.runners.split(";") if args.runners else None
    found = []
    for case in cases:
        for precision in ("fp32", "bf16") if args.precision is None else (args.precision,):
            names = asked or [name for name in case.runners if not without_effect(name, case, precision)]
            found.append((replace(case, runners=tuple(names)), precision))
    return found


def without_effect(name: str, case: Case, precision: str) -> bool:
    """Whether a rung of the ladder is the one before it."""
    if name == "duet, frozen in bf16":
        return precision == "fp32"
    return case.captions == 1 and name in ("duet, images once", "duet, shared prefix")


def main(argv: list[str] | None = None) -> int:
    """Measure what is asked for; 1 where runners disagree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every case; writes results.md and ladder.svg")
    parser.add_argument("--shape", choices=["G", "S", "small"], default="small")
    parser.add_argument("--stage", type=int, choices=[1, 2], default=1)
    parser.add_argument("--captions", type=int, default=5, help="of an image, in stage 1")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="both if not given")
    parser.add_argument(
        "--runners", help="by name, with ; between, the one to compare with first: " + "; ".join(RUNNERS)
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, help="of a step, instead of what the case has")
    parser.add_argument("--json", type=Path, help="file for everything that was measured")
    parser.add_argument("--go-on", action="store_true", help="leave out the cases that the JSON has already")
    args = parser.parse_args(argv)
    if args.go_on and not (args.json and args.json.is_file()):
        parser.error("--go-on needs --json with the file of an earlier run")
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    measured: list[dict[str, Any]] = json.loads(args.json.read_text()) if args.go_on else []
    there = {(one["case"], tuple(one["runners"])) for one in measured}
    cases = [one for one in chosen(args) if (one[0].title(one[1]), one[0].runners) not in there]
    wrong = [line for one in measured for line in disagreements(one)]
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("HF_DATASETS_CACHE", folder)
        for number, (case, precision) in enumerate(cases):
            measured.append(measure(case, precision, args.rounds, Path(folder) / str(number), args.images))
            print(table(measured[-1]), f"\n({measured[-1]['seconds']:.0f} s)\n", flush=True)
            wrong += disagreements(measured[-1])
            if args.json:
                args.json.write_text(json.dumps(measured))
    if wrong:
        print("\n".join(["the runners do not compute the same:", *wrong]), file=sys.stderr)
        return 1
    if args.all:
        write_results(measured, "python benchmarks/train_speed.py --all", time.strftime("%Y-%m-%d"))
        draw_ladder(measured, HERE / "ladder.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
