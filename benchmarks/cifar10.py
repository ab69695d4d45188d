"""CIFAR-10 as dialogues in two layouts, to train on from scratch: LLaVA's JSON, and the texts of the_cauldron.

    python benchmarks/cifar10.py PHOTOGRAPHS OUT    # PHOTOGRAPHS holds train*.parquet and test*.parquet (image, label)
    cd OUT && python .../train_sft.py --config cifar10.yaml

Of the training photographs one half goes into each layout. Each is asked about in three turns: what it shows, if
that is an animal or a vehicle, and if there is some class, half of the time the right one. Every test photograph is
asked about once; the kinds take turns.
"""

import argparse
import json
import random
from pathlib import Path

import datasets


NAMES = ["airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
VEHICLES = {"airplane", "car", "ship", "truck"}
KINDS = ("class", "group", "exists")


def turn(kind: str, name: str, rng: random.Random) -> tuple[str, str]:
    """A question of a kind about a photograph of a class, and its answer."""
    if kind == "class":
        return "What does the picture show?", f"a {name}"
    if kind == "group":
        return "Is it an animal or a vehicle?", "a vehicle" if name in VEHICLES else "an animal"
    asked = name if rng.random() < 0.5 else rng.choice([other for other in NAMES if other != name])
    return f"Is there a {asked}?", "yes" if asked == name else "no"


def turns(label: int, rng: random.Random) -> list[tuple[str, str]]:
    """All kinds of questions, in any order."""
    return [turn(kind, NAMES[label], rng) for kind in rng.sample(KINDS, len(KINDS))]


def llava(number: int, said: list[tuple[str, str]], **more) -> dict:
    """A row as LLaVA's JSON has it."""
    said = [(f"<image>\n{said[0][0]}", said[0][1]), *said[1:]]
    values = [{"from": speaker, "value": text} for pair in said for speaker, text in zip(("human", "gpt"), pair)]
    return {"id": str(number), "image": f"{number}.jpg", "conversations": values, **more}


def write_llava(rows, conversations: list[dict], file: Path, images: Path) -> None:
    """The rows' images into a folder, the conversations about them into a JSON list."""
    images.mkdir(parents=True, exist_ok=True)
    for row, conversation in zip(rows, conversations):
        (images / conversation["image"]).write_bytes(row["image"]["bytes"])
    file.write_text(json.dumps(conversations))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photographs", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    files = {split: str(args.photographs / f"{split}*.parquet") for split in ("train", "test")}
    found = datasets.load_dataset("parquet", data_files=files).cast_column("image", datasets.Image(decode=False))
    rng = random.Random(0)
    train, test = found["train"].shuffle(seed=0), found["test"]

    half = len(train) // 2
    first, second = train.select(range(half)), train.select(range(half, len(train)))
    said = [llava(number, turns(row["label"], rng)) for number, row in enumerate(first)]
    write_llava(first, said, args.out / "llava.json", args.out / "images")

    pairs = [[{"user": q, "assistant": a, "source": "cifar10"} for q, a in turns(row["label"], rng)] for row in second]
    cauldron = datasets.Dataset.from_dict({"images": [[image] for image in second["image"]], "texts": pairs})
    cauldron = cauldron.cast_column("images", datasets.List(datasets.Image(decode=False)))
    cauldron.to_parquet(args.out / "cauldron.parquet")

    asked = []
    for number, row in enumerate(test):
        kind = KINDS[number % len(KINDS)]
        more = {"kind": kind, "subset": "test photographs"}
        asked.append(llava(number, [turn(kind, NAMES[row["label"]], rng)], **more))
    write_llava(test, asked, args.out / "questions.json", args.out / "test_images")
    (args.out / "cifar10.yaml").write_text((Path(__file__).parent / "cifar10.yaml").read_text())
    print(f"{len(said):,} dialogues in llava.json, {len(pairs):,} in cauldron.parquet, {len(asked):,} questions")


if __name__ == "__main__":
    main()
