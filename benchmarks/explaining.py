"""Whether maps of what an answer hangs on are right, on the built-in data set, where the truth is known.

    python benchmarks/explaining.py outputs/shapes/sft --grids 4 8 8+1 16+2

Test questions about one object are asked; a hit is an answer whose strongest patch has its centre in the box of the
object asked for. Chance is the share of patches of which that holds. A grid is its patches a side, and behind a + how
many patches on every side are hidden with each.
"""

import argparse
import math
import statistics
import time
from collections import defaultdict
from typing import NamedTuple

from speed_report import commit, machine

from inference_vlm.answering import Answerer
from inference_vlm.explain import Explanation, explain
from processing import shapes


class Found(NamedTuple):
    """Of one explanation: whether its strongest patch hits, the chance of that, the area, and whether all is right."""

    hits: bool
    chance: float
    area: float
    beats: bool
    right: bool


def judged(found: Explanation, item: shapes.Scene, turn: shapes.Turn) -> Found:
    """An explanation beside the truth."""
    boxes = [item.boxes(found.pictures[0].width)[number] for number in item.asked_for(turn)]

    def lies_on(patch):
        x, y = (patch.box[0] + patch.box[2]) / 2, (patch.box[1] + patch.box[3]) / 2
        return any(left <= x <= right and top <= y <= bottom for left, top, right, bottom in boxes)

    chance = sum(map(lies_on, found.patches)) / len(found.patches)
    beats = min(found.deletion.areas) > 0
    return Found(lies_on(found.strongest), chance, found.deletion.area, beats, found.answer == turn.answer)


def line(name: str, found: list[Found]) -> str:
    """A row of the table: shares with twice their standard error."""
    hits, chance = statistics.fmean(of.hits for of in found), statistics.fmean(of.chance for of in found)
    error = 2 * math.sqrt(hits * (1 - hits) / len(found))
    areas = [of.area for of in found]
    spread = 2 * statistics.pstdev(areas) / math.sqrt(len(areas))
    beats = statistics.fmean(of.beats for of in found)
    return (
        f"| {name} | {len(found)} | {hits:.1%} ± {error:.1%} | {chance:.1%} | {statistics.fmean(areas):.2f} ± "
        f"{spread:.2f} | {beats:.0%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a model that was trained on the built-in data set")
    parser.add_argument("--questions", type=int, default=300, help="of the test split, all kinds in equal shares")
    parser.add_argument("--grids", nargs="+", default=["4", "8", "8+1", "16+2"])
    parser.add_argument("--seeds", type=int, default=3, help="random orders of the deletion")
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=32)
    args = parser.parse_args()
    answerer = Answerer.load(args.model)
    print(f"{machine()} ({commit()}), {args.questions} questions, {args.seeds} random orders")
    head = "| grid | answers | strongest patch on the object | chance | area, nats | above every random order |"
    for grid in args.grids:
        side, _, around = grid.partition("+")
        started, kinds = time.perf_counter(), defaultdict(list)
        for item, turn in shapes.questions("test", args.questions):
            if not item.asked_for(turn):
                continue
            picture = item.draw(args.image_size)
            parts = [{"type": "image", "image": picture}, {"type": "text", "text": turn.question}]
            found = explain(
                answerer, answerer.read([{"role": "user", "content": parts}]), turn.question, max_new_tokens=16,
                grid=(int(side), int(side)), around=int(around or 0), batch_size=args.batch_size, seeds=args.seeds,
            )  # fmt: skip
            kinds[turn.kind].append(judged(found, item, turn))
        everything = [of for found in kinds.values() for of in found]
        print(f"\n{head}\n|---|---|---|---|---|---|", flush=True)
        rows = {"all": everything, "right answers": [of for of in everything if of.right], **kinds}
        rows["wrong answers"] = [of for of in everything if not of.right]
        for name, found in rows.items():
            if found:
                print(line(f"{grid}, {name}", found), flush=True)
        print(f"\n{(time.perf_counter() - started) / len(everything):.2f} s an answer")


if __name__ == "__main__":
    main()
