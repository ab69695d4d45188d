"""Tiles on and off, where detail decides: the built-in scenes drawn twice as large, with objects a third of their size.

    python benchmarks/tiles.py OUT [--scenes 12000] [--steps 700 1300 1500]

Both runs see the same pictures of 128 pixels with an encoder for 64, both stages from scratch as in
recipes/shapes.yaml. Without tiles a picture is seen reduced to a half; with `max_tiles` 4 in four tiles beside that.
"""

import argparse
import io
from pathlib import Path

import datasets
from stages import recipe, train, train_both

from processing import shapes
from processing.tokenizer import train_tokenizer


IMAGE_SIZE, OBJECT_SCALE = 128, 0.35


def drawn(scene: shapes.Scene) -> dict:
    """The picture as a file in a row."""
    file = io.BytesIO()
    scene.draw(IMAGE_SIZE, OBJECT_SCALE).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def messages(turns: list[shapes.Turn]) -> list[dict]:
    """Questions and answers in turn."""
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in (("user", turn.question), ("assistant", turn.answer))
    ]


def write(file: Path, pictures: list[dict], **columns) -> None:
    """A parquet file of pictures and what belongs to each."""
    rows = datasets.Dataset.from_dict({"image": pictures, **columns})
    rows.cast_column("image", datasets.Image(decode=False)).to_parquet(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--scenes", type=int, default=12_000)
    parser.add_argument(
        "--steps", type=int, nargs=3, default=(700, 1300, 1500), help="of stage 1 and of two rounds of stage 2"
    )
    parser.add_argument("--tiles", type=int, nargs="+", default=(1, 4))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    tokenizer = args.out / "tokenizer"
    data = {name: str((args.out / f"{name}.parquet").resolve()) for name in ("captions", "dialogues", "questions")}
    if not Path(data["questions"]).exists():
        scenes = [shapes.scene("train", index) for index in range(args.scenes)]
        pictures = [drawn(scene) for scene in scenes]
        write(data["captions"], pictures, caption=[scene.captions() for scene in scenes])
        write(data["dialogues"], pictures, messages=[messages(scene.dialogue()) for scene in scenes])
        dialogues = [scene.dialogue() for scene in scenes]
        words = [text for scene in scenes for text in scene.captions()]
        words += [text for dialogue in dialogues for turn in dialogue for text in (turn.question, turn.answer)]
        train_tokenizer([f" {text}" for text in words], 511, 512).save_pretrained(tokenizer)
        asked, turns = zip(*shapes.questions("test", 2_000))
        write(
            data["questions"],
            [drawn(scene) for scene in asked],
            messages=[messages([turn]) for turn in turns],
            kind=[turn.kind for turn in turns],
            subset=["unseen pairs" if turn.unseen else "seen pairs" for turn in turns],
        )

    settings = recipe()
    del settings["dataset"], settings["eval_split"]
    del settings["pretrain"]["dataset_name"], settings["sft"]["dataset_name"], settings["sft"]["test_split"]
    del settings["pretrain"]["tokenizer_dataset_name"]
    settings["pretrain"] |= {
        "dataset": data["captions"], "tokenizer": str(tokenizer.resolve()), "max_steps": args.steps[0],
        "output_dir": "pretrain",
    }  # fmt: skip
    settings["sft"] |= {
        "dataset": data["dialogues"], "test_dataset": {"path": data["questions"]}, "max_steps": args.steps[1],
        "output_dir": "sft", "model": "pretrain",
    }  # fmt: skip
    for tiles in args.tiles:
        settings["pretrain"]["max_tiles"] = tiles
        folder = args.out / f"tiles-{tiles}"
        again = {"model": "sft", "output_dir": "sft-2", "max_steps": args.steps[2], "seed": 43}
        for shares in (
            train_both(folder, settings),
            train(folder, "train_sft.py", {**settings, "sft": {**settings["sft"], **again}}),
        ):
            print(tiles, {name: round(share, 3) for name, share in shares.items()}, flush=True)


if __name__ == "__main__":
    main()
