"""How fast samples are loaded, and what memory that takes.

    python benchmarks/loading.py throughput     # 640 x 480 JPEG captions, one worker, the variants side by side
    python benchmarks/loading.py memory         # 50,000 samples, resident memory as it goes, as memory.svg

The images are drawn with noise, so that they are as large as photographs are. Variants are interleaved and medians
are reported, with the CPU time of the worker; the figures that were measured stand in results.md.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import datasets
import psutil
import torch
from speed_pairs import photograph
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, ViTConfig

from modeling_vlm import VLMConfig
from processing import VLMDataCollator, VLMProcessor
from processing.batching.dataset import ConversationDataset, Reading, StreamedDataset
from processing.batching.encoding import Encoder, encode_caption


WORDS = "a small red cat sits on the mat beside two large green birds under an old tree near some water".split()


def make_rows(folder: Path, number: int, size: tuple[int, int], images: int) -> Path:
    """A parquet file of captions, whose images repeat after so many."""
    rng = random.Random(0)
    stored = [{"bytes": photograph(rng, size), "path": None} for _ in range(images)]

    def rows():
        for index in range(number):
            yield {"image": stored[index % images], "caption": " ".join(rng.choices(WORDS, k=12))}

    features = datasets.Features(image=datasets.Image(decode=False), caption=datasets.Value("string"))
    made = datasets.Dataset.from_generator(rows, features, cache_dir=str(folder / "made"))
    made.to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def make_processor(side: int = 224) -> VLMProcessor:
    """A processor for images of that many pixels a side, with a small tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [" ".join(WORDS)],
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=["</s>", "<pad>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
    vision = ViTConfig(image_size=side)
    config = VLMConfig(vision_config=vision, image_seq_length=196, image_token_id=len(tokenizer))
    return VLMProcessor.from_backbones(vision, None, config, tokenizer=tokenizer)


def variants(file: Path, folder: Path, processor: VLMProcessor):
    """Name -> function that gives a data set and its collator."""

    def opened(ahead: bool, stream: bool = False, draft: bool = True):
        rows = datasets.load_dataset(
            "parquet", data_files=str(file), split="train", streaming=stream, cache_dir=str(folder / "cache")
        )
        rows = rows.decode(False) if stream else rows.cast_column("image", datasets.Image(decode=False))
        reading = Reading(source="rows")
        if stream:
            dataset = StreamedDataset([(rows, reading)])
        else:
            dataset = ConversationDataset(rows, reading)
        if ahead:
            dataset.encode_ahead(Encoder(processor, encode_caption))
        collator = VLMDataCollator(processor if draft else _WithoutSize(processor), encode=encode_caption)
        return dataset, collator

    return {
        "whole JPEG decoded": lambda: opened(ahead=True, draft=False),
        "reduced JPEG, encoded ahead": lambda: opened(ahead=True),
        "reduced JPEG, encoded when asked for": lambda: opened(ahead=False),
        "reduced JPEG, streamed": lambda: opened(ahead=False, stream=True),
    }


class _WithoutSize:
    """A processor whose image processor does not say which size it makes, so that files are decoded whole."""

    def __init__(self, processor):
        self._processor = processor

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._processor, name)

    @property
    def image_processor(self):
        processor = self._processor.image_processor

        def call(*args, **kwargs):
            return processor(*args, **kwargs)

        return call


def throughput(folder: Path, number: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(samples a second of wall time, of CPU time) in each round, for each variant."""
    file = make_rows(folder, number, (640, 480), images=64)
    measured: dict[str, list[tuple[float, float]]] = {}
    prepared = {name: make() for name, make in variants(file, folder, make_processor()).items()}
    for _ in range(rounds):
        for name, (dataset, collator) in prepared.items():
            loader = DataLoader(dataset, batch_size=32, num_workers=1, collate_fn=collator)
            batches, seen, cpu = iter(loader), 0, 0.0
            next(batches)
            worker = psutil.Process().children()[-1]
            start, start_cpu = time.perf_counter(), sum(worker.cpu_times()[:2])
            while seen < number - 64:
                seen += len(next(batches)["input_ids"])
            cpu = sum(worker.cpu_times()[:2]) - start_cpu
            measured.setdefault(name, []).append((seen / (time.perf_counter() - start), seen / cpu))
            del batches
    return measured


def memory(folder: Path, number: int) -> list[tuple[int, float]]:
    """(samples so far, MiB that this process and its worker hold of their own) while all are loaded."""
    file = make_rows(folder, number, (128, 96), images=256)
    dataset, collator = variants(file, folder, make_processor(64))["reduced JPEG, encoded when asked for"]()
    loader = DataLoader(dataset, batch_size=50, num_workers=1, collate_fn=collator, shuffle=True)
    curve, seen = [], 0
    for batch in loader:
        seen += len(batch["input_ids"])
        if seen % 1000 == 0:
            processes = [psutil.Process(), *psutil.Process().children()]
            curve.append((seen, sum(own_memory(process.pid) for process in processes) / 2**20))
    return curve


def own_memory(pid: int | str) -> int:
    """Bytes that a Linux process holds; what it maps of the data's file is the system's to drop, and not counted."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def draw(curve: list[tuple[int, float]], file: Path) -> None:
    """A line of memory over samples, as SVG."""
    width, height, margin = 640, 300, 50
    most = max(value for _, value in curve) * 1.25
    across, up = (width - 2 * margin) / curve[-1][0], (height - 2 * margin) / most
    points = " ".join(f"{margin + x * across:.1f},{height - margin - y * up:.1f}" for x, y in curve)
    texts = [
        (margin, 24, f"memory while {curve[-1][0]:,} samples are loaded"),
        (margin, height - 18, "0"),
        (width - margin - 60, height - 18, f"{curve[-1][0]:,} samples"),
        (4, margin + 4, f"{most:,.0f}"),
        (4, margin + 20, "MiB"),
        (4, height - margin, "0"),
    ]
    labels = "".join(f'<text x="{x}" y="{y}">{text}</text>' for x, y, text in texts)
    file.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="13"><rect width="100%" height="100%" fill="white"/>{labels}'
        f'<path d="M{margin},{margin} V{height - margin} H{width - margin}" stroke="#999" fill="none"/>'
        f'<polyline points="{points}" fill="none" stroke="#1f6fb5" stroke-width="2"/></svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["throughput", "memory"])
    parser.add_argument("--number", type=int, help="samples; 1,000 or 50,000")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the plot")
    args = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("HF_DATASETS_CACHE", folder)
        if args.what == "throughput":
            measured = throughput(Path(folder), args.number or 1_000, args.rounds)
            for name, rounds in measured.items():
                wall, cpu = (statistics.median(values) for values in zip(*rounds))
                print(f"{name:<40}{wall:>8.0f} samples/s{cpu:>8.0f} samples/s of CPU   {json.dumps(rounds)[:90]}")
        else:
            curve = memory(Path(folder), args.number or 50_000)
            draw(curve, args.out / "memory.svg")
            print(f"{curve[0][1]:.0f} MiB after {curve[0][0]:,} samples, {curve[-1][1]:.0f} after {curve[-1][0]:,}")
            print(f"at most {max(value for _, value in curve):.0f} MiB, at least {min(v for _, v in curve):.0f} MiB")


if __name__ == "__main__":
    main()
