"""A layout of data of one's own: boxes of a detection data set become questions, answers and captions.

    python examples/own_layout.py boxes.json --out rows
    python -m training_vlm.inspect_data rows/dialogues.jsonl --image_dir images --model outputs/aligned
    python train_sft.py --model outputs/aligned --dataset rows/dialogues.jsonl --image_dir images \\
        --output_dir outputs/mine

`boxes.json` is `{"street.jpg": [{"label": "car", "box": [x, y, width, height]}, ...], ...}`, as no reader of Duet knows
it. Whatever a row is, it is a dozen lines to one that Duet knows (docs/data.md): `images` and `messages` is the widest.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any


def dialogue(file: str, boxes: list[dict[str, Any]]) -> dict[str, Any]:
    """How many there are of each kind, and which of two kinds is further to the left."""
    asked = [(f"How many of these are there: {label}?", str(count)) for label, count in _counted(boxes)]
    once = sorted((box for box in boxes if dict(_counted(boxes))[box["label"]] == 1), key=lambda box: box["box"][0])
    if len(once) > 1:
        first, last = once[0]["label"], once[-1]["label"]
        asked.append((f"Which is further to the left, {' or '.join(sorted([first, last]))}?", first))
    messages = [{"role": role, "content": text} for pair in asked for role, text in zip(("user", "assistant"), pair)]
    return {"images": [file], "messages": messages}


def caption(file: str, boxes: list[dict[str, Any]]) -> dict[str, Any]:
    """What is there, in one sentence for stage 1."""
    return {"image": file, "caption": ", ".join(f"{count} x {label}" for label, count in _counted(boxes)) + "."}


def _counted(boxes):
    return sorted(Counter(box["label"] for box in boxes).items())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("boxes", type=Path, help="the JSON file")
    parser.add_argument("--out", type=Path, default=Path("rows"), help="folder for dialogues.jsonl and captions.jsonl")
    args = parser.parse_args(argv)
    pictures = json.loads(args.boxes.read_text(encoding="utf-8"))
    args.out.mkdir(parents=True, exist_ok=True)
    for name, row_of in (("dialogues", dialogue), ("captions", caption)):
        rows = [row_of(file, boxes) for file, boxes in pictures.items() if boxes]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (args.out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{args.out / name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
