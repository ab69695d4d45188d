"""What a run learns that names models and data only: both stages on CIFAR-10, from small backbones made for it.

    python benchmarks/defaults.py PHOTOGRAPHS OUT                   # holds train*.parquet and test*.parquet
    python benchmarks/defaults.py PHOTOGRAPHS OUT --code CHECKOUT   # the same data and backbones, another Duet

The encoder is a ViT that has learned the ten classes, the language model a Llama that has learned to write about them
in sentences, and has seen no question. Stage 1 is given captions, stage 2 is the command that stage 1 prints, with the
data in the place of its capitals. The share of 300 questions about other photographs answered exactly right is
printed by the run itself.
"""

import argparse
import json
import random
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import torch
from cifar10 import KINDS, NAMES, VEHICLES, llava, turn, turns, write_llava
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from processing.tokenizer import train_tokenizer


CAPTIONS, DIALOGUES, QUESTIONS = 2000, 4000, 300
EPOCHS, BATCH = 6, 64  # of the encoder
WRITTEN = 400  # steps of the language model


def caption(name: str, rng: random.Random) -> str:
    """A sentence about a class."""
    kind = "a vehicle" if name in VEHICLES else "an animal"
    return rng.choice(
        [f"a photo of a {name}, which is {kind}.", f"there is a {name}. it is {kind}.", f"a small {name}"]
    )


def make_encoder(rows, folder: Path) -> None:
    """A classifier whose patches all have a part in the answer."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=384,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=len(NAMES), initializer_range=0.1,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    pixels = torch.cat([processor(row["image"], return_tensors="pt").pixel_values for row in rows])
    labels = torch.tensor(rows["label"])
    steps = EPOCHS * len(pixels) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps + 1)
    for step in range(steps):
        if step % (len(pixels) // BATCH) == 0:
            order = torch.randperm(len(pixels))
        chosen = order[(step * BATCH) % (len(pixels) - BATCH) :][:BATCH]
        images = pixels[chosen]
        images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
        states = model.vit(images).last_hidden_state
        loss = nn.functional.cross_entropy(model.classifier(states[:, 1:].mean(1)), labels[chosen])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 200 == 0:
            print(f"encoder, step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def make_language_model(texts: list[str], folder: Path) -> None:
    """A model that writes such sentences."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(texts, 399, 256)
    config = LlamaConfig(
        vocab_size=400, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=384, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(WRITTEN):
        chosen = [text + tokenizer.eos_token for text in random.Random(step).sample(texts, 32)]
        batch = tokenizer(chosen, padding=True, return_tensors="pt")
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"language model: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make(photographs: Path, out: Path) -> None:
    """Data and backbones, each half of the photographs for one of the two."""
    files = {split: str(photographs / f"{split}*.parquet") for split in ("train", "test")}
    found = datasets.load_dataset("parquet", data_files=files)
    rng, train = random.Random(0), found["train"].shuffle(seed=0)
    half = len(train) // 2
    raw = train.cast_column("image", datasets.Image(decode=False))
    captioned, asked = raw.select(range(CAPTIONS)), raw.select(range(half, half + DIALOGUES))
    images = out / "images"
    images.mkdir(parents=True)
    rows = []
    for number, row in enumerate(captioned):
        (images / f"caption-{number}.jpg").write_bytes(row["image"]["bytes"])
        rows.append({"image": f"caption-{number}.jpg", "caption": caption(NAMES[row["label"]], rng)})
    (out / "captions.json").write_text(json.dumps(rows))
    said = [llava(number, turns(row["label"], rng)) for number, row in enumerate(asked)]
    write_llava(asked, said, out / "dialogues.json", images)
    test = found["test"].cast_column("image", datasets.Image(decode=False)).select(range(QUESTIONS))
    questions = []
    for number, row in enumerate(test):
        kind = KINDS[number % len(KINDS)]
        questions.append(llava(number, [turn(kind, NAMES[row["label"]], rng)], kind=kind, subset="test photographs"))
    write_llava(test, questions, out / "questions.json", out / "test_images")
    place = {"path": str((out / "questions.json").resolve()), "image_dir": str((out / "test_images").resolve())}
    (out / "questions.yaml").write_text(json.dumps({"sft": {"test_dataset": place}}))
    make_encoder(train.select(range(half)), out / "encoder")
    texts = [caption(rng.choice(NAMES), rng) for _ in range(3000)]
    make_language_model(texts, out / "language_model")


def run(code: Path, out: Path, words: list[str]) -> str:
    """One command with the Duet of a checkout; what it prints."""
    print(shlex.join(["python", *words]), flush=True)
    words = [str(code / words[0]), *words[1:], "--config", str(out / "questions.yaml")]
    found = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=out)
    print(found.stdout[-4000:], flush=True)
    if found.returncode:
        raise SystemExit(found.stderr[-2000:])
    return found.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photographs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--code", type=Path, default=Path(__file__).parents[1])
    args = parser.parse_args()
    args.out = args.out.resolve()
    torch.set_num_threads(1)
    if not (args.out / "language_model").is_dir():
        make(args.photographs, args.out)
    folder = f"{args.code.resolve().name}-1"
    data = ["--image_dir", "images"]
    backbones = ["--vision_model", "encoder", "--text_model", "language_model"]
    said = run(args.code.resolve(), args.out, [
        "train_pretrain.py", *backbones, "--dataset", "captions.json", *data, "--output_dir", folder,
    ])  # fmt: skip
    command = next(line.strip() for line in said.splitlines() if "train_sft.py" in line)
    command = command.replace("DIALOGUES", "dialogues.json").replace("FOLDER", f"{folder[:-2]}-2")
    run(args.code.resolve(), args.out, [*shlex.split(command)[1:], *data])


if __name__ == "__main__":
    main()
