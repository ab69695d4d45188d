"""How fast training is on one GPU, beside LLaVA with the plain Trainer: eight minutes, one JSON and one table.

    python benchmarks/gpu.py --out FOLDER                  # one GPU, bf16
    python benchmarks/gpu.py --out FOLDER --device cpu     # a tiny pair, to see that it runs

A SigLIP-so400m-like encoder (729 tokens an image) and a Qwen2.5-like language model of 0.5 or 1.5 B with random
weights. Each runner is given the most texts at a time that have room, up to a whole step; the rest is accumulated. The
attentions that are installed are tried one by one. Needs torch, transformers, accelerate and Pillow, and no network.
"""

import argparse
import copy
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from speed_pairs import SPECIAL, Pair, Task, compose, encode_rows, make_rows, necessary, pairs
from speed_report import commit, machine
from speed_runners import PaddingCollator, Rows, last_blocks, settings
from transformers import (
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import is_flash_attn_2_available

from processing import VLMDataCollator
from training_vlm.learning.originals import hold_frozen
from training_vlm.learning.trainer import VLMTrainer
from training_vlm.learning.tuning import apply_tuning


LANGUAGE_MODELS = {
    "0.5": {
        "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "intermediate_size": 4864,
    },
    "1.5": {
        "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
        "intermediate_size": 8960,
    },
}  # fmt: skip
"""Qwen2.5's, by billions of parameters."""

TOLERANCE = 1e-2
"""Of the first loss, relative: bf16 rounds to 8 bits, each runner elsewhere."""

WARM, MEASURED = 2, 4
"""Steps of each runner: the first is the check."""


def large_pair(billions: str) -> Pair:
    """The pair that fills a GPU."""
    vision = SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384,
        patch_size=14, vision_use_head=False,
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=151936, max_position_embeddings=32768, tie_word_embeddings=True, use_sliding_window=False,
        **LANGUAGE_MODELS[billions],
    )  # fmt: skip
    return Pair(vision, text, "full", -1)


class Clock(TrainerCallback):
    """Seconds, loss and gradient norm of each step, and the memory that the device held at the most."""

    def __init__(self, device: str):
        self.device, self.steps = device, []

    def on_train_begin(self, *args, **kwargs):
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.begun = self._now()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            now = self._now()
            self.steps.append(
                {"seconds": now - self.begun, "loss": float(logs["loss"]), "norm": float(logs["grad_norm"])}
            )
            self.begun = now

    @property
    def memory(self) -> float:
        """MiB of the device, at the most."""
        return torch.cuda.max_memory_allocated() / 2**20 if self.device == "cuda" else float("nan")

    def _now(self):
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


@dataclass
class Setting:
    """A case's data and models, for the functions that make Trainers."""

    task: Task
    folder: Path
    device: str
    workers: int
    duet: Any
    processor: Any
    llava: Any
    state: dict[str, torch.Tensor]

    def arguments(self, texts: int) -> TrainingArguments:
        """What every Trainer is told; so many texts at a time."""
        told = settings(self.task, self.folder, "bf16") | {
            "per_device_train_batch_size": texts,
            "gradient_accumulation_steps": self.task.batch // texts,
            "dataloader_num_workers": self.workers,
            "use_cpu": self.device == "cpu",
        }
        return TrainingArguments(**told)


class Shown(Rows):
    """The same as Duet's collator takes them: ids and labels, and the image as a list."""

    def __getitem__(self, index):
        row = super().__getitem__(index)
        return {"input_ids": row["input_ids"], "labels": row["labels"], "images": [row["image"]]}


def llava(attention: str) -> Callable[..., Trainer]:
    """LLaVA with the plain Trainer and the ordinary collator."""

    def trainer(at: Setting, texts: int, clock: Clock) -> Trainer:
        model = at.llava.to(at.device)
        model.load_state_dict(at.state, strict=False)
        model.set_attn_implementation(attention)
        blocks = model.model.language_model.layers
        last_blocks(model, blocks, model.model.multi_modal_projector, at.task.learning)
        config, images = model.config, at.processor.image_processor
        collator = PaddingCollator(
            images, config.image_token_id, config.text_config.pad_token_id, config.image_seq_length
        )
        return Trainer(
            model=model, args=at.arguments(texts), data_collator=collator, train_dataset=Rows(at.folder),
            callbacks=[clock],
        )  # fmt: skip

    return trainer


def duet(attention: str, *savings: str, frozen: str | None = None) -> Callable[..., Trainer]:
    """Duet with some of its collator's savings, its frozen weights held in bf16 or not."""

    def trainer(at: Setting, texts: int, clock: Clock) -> Trainer:
        model = copy.deepcopy(at.duet).to(at.device)
        model.load_state_dict(at.state)
        model.set_attn_implementation({"text_config": attention, "vision_config": "sdpa"})
        blocks = at.task.learning or model.config.text_config.num_hidden_layers
        apply_tuning(model, "frozen", f"last:{blocks}")
        arguments = at.arguments(texts)
        collator = VLMDataCollator(at.processor, account=True, **dict.fromkeys(savings, True))
        return VLMTrainer(
            model=model, args=arguments, data_collator=collator, train_dataset=Shown(at.folder),
            processing_class=at.processor, callbacks=[clock, hold_frozen(model, frozen, arguments)],
        )  # fmt: skip

    return trainer


def installed(device: str) -> list[str]:
    """The attentions that can be tried; flex attention, which is compiled for each length anew, last."""
    flash = ["flash_attention_2"] if device == "cuda" and is_flash_attn_2_available() else []
    return [*flash, "sdpa", *(["flex_attention"] if device == "cuda" else [])]


def runners(stage: int, attentions: list[str]) -> dict[str, Callable[..., Trainer]]:
    """Name -> what makes its Trainer; the one to compare with first."""
    savings = ("padding_free", "share_prefix")[: 2 if stage == 1 else 1]
    found = {f"llava, {attention}": llava(attention) for attention in attentions if attention != "flex_attention"}
    found["duet, nothing saved, sdpa"] = duet("sdpa")
    for attention in attentions:
        found[f"duet, {attention}"] = duet(attention, *savings)
        found[f"duet, frozen in bf16, {attention}"] = duet(attention, *savings, frozen="auto")
    return found


def run(make: Callable[..., Trainer], at: Setting) -> dict[str, Any]:
    """All steps of a runner, with the most texts at a time that have room."""
    images = at.task.images
    while True:
        clock, trainer = Clock(at.device), None
        texts = images * at.task.batch // at.task.images
        try:
            trainer = make(at, texts, clock)
            trainer.train()
            return {"texts": texts, "steps": clock.steps, "memory": clock.memory}
        except torch.OutOfMemoryError:
            if images == 1:
                raise
            images //= 2
        finally:
            del trainer
            at.llava.zero_grad()
            at.llava.cpu()
            gc.collect()
            if at.device == "cuda":
                torch.cuda.empty_cache()


def gemm_peak(device: str) -> float:
    """FLOP a second of square matrices in bf16, at the most."""
    size, best = (8192, 0.0) if device == "cuda" else (512, 0.0)
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(6):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 20 * size**3 / (time.perf_counter() - start))
    return best


def measure(pair: Pair, task: Task, folder: Path, device: str, attentions: list[str], until: float) -> dict[str, Any]:
    """A case: every runner that there is time for."""
    folder.mkdir()
    model, processor = compose(pair, folder, device)
    rows, _ = make_rows(task, folder, pair.text.vocab_size - len(SPECIAL), pair.vision.image_size)
    encoded = encode_rows(task, rows, folder, processor)
    (folder / "encoded.json").write_text(json.dumps(encoded))
    apply_tuning(model, "frozen", f"last:{task.learning or pair.text.num_hidden_layers}")
    flops = necessary(model, processor, encoded, task.batch)
    config = LlavaForConditionalGeneration.config_class.from_pretrained(folder / "llava")
    workers = 0 if device == "cpu" else min(8, os.cpu_count() or 1)
    with torch.device(device):
        other = LlavaForConditionalGeneration(config).cpu()
    at = Setting(task, folder, device, workers, model, processor, other, model.state_dict())
    what = "5 captions an image" if task.stage == 1 else "dialogues"
    told: dict[str, Any] = {"case": f"stage {task.stage}, {what}", "batch": task.batch, "images": task.images}
    told |= {"flops": flops, "peak": gemm_peak(device), "runners": {}, "left out": {}}
    for name, make in runners(task.stage, attentions).items():
        if time.monotonic() > until:
            told["left out"][name] = "no time was left"
            continue
        try:
            told["runners"][name] = run(make, at)
        except Exception as error:  # one that this machine's libraries cannot run leaves the others
            told["left out"][name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(name, told["left out"].get(name, "done"), file=sys.stderr, flush=True)
    return told


def table(told: dict[str, Any]) -> str:
    """A case as a markdown table."""
    lines = [
        f"{told['case']}: {told['batch']} texts of {told['images']} images a step, GEMM peak "
        f"{told['peak'] / 1e12:.1f} TFLOP/s",
        "",
        "| runner | times as fast | ms a sample | use of the peak | texts at a time | memory, MiB | first loss |",
        "|---|---|---|---|---|---|---|",
    ]
    first = None
    for name, found in told["runners"].items():
        seconds = statistics.median(step["seconds"] for step in found["steps"][WARM:])
        first = first or seconds
        flops = statistics.median(step["whole"] for step in told["flops"][WARM : WARM + MEASURED])
        lines.append(
            f"| {name} | **{first / seconds:.2f}** | {seconds / told['batch'] * 1e3:.2f} "
            f"| {flops / seconds / told['peak']:.0%} | {found['texts']} | {found['memory']:,.0f} "
            f"| {found['steps'][0]['loss']:.5f} |"
        )
    return "\n".join([*lines, *(f"\n{name} is left out: {why}" for name, why in told["left out"].items())])


def disagreements(told: dict[str, Any]) -> list[str]:
    """Runners whose first loss is not the first one's, as lines."""
    losses = {name: found["steps"][0]["loss"] for name, found in told["runners"].items()}
    expected = next(iter(losses.values()), None)
    return [
        f"{told['case']}: the first loss of {name} is {loss:.6f}; expected {expected:.6f}"
        for name, loss in losses.items()
        if not abs(loss / expected - 1) <= TOLERANCE
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure both stages; 1 where runners disagree or one to compare with could not run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.md")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--billions", choices=list(LANGUAGE_MODELS), default="0.5", help="of the language model")
    parser.add_argument("--images", type=int, help="of a step; 64 on a GPU")
    parser.add_argument("--attentions", nargs="+", help="the ones to try; without it all that are installed")
    parser.add_argument("--minutes", type=float, default=7, help="after which no further runner begins")
    args = parser.parse_args(argv)
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    args.out.mkdir(parents=True, exist_ok=True)
    until, cases = time.monotonic() + args.minutes * 60, []
    attentions = args.attentions or installed(args.device)
    with tempfile.TemporaryDirectory() as folder:
        for stage in (1, 2):
            images = args.images or (64 if args.device == "cuda" else 2)
            task = Task("gpu", stage, 5 if stage == 1 else 1, images, WARM + MEASURED)
            pair = large_pair(args.billions) if args.device == "cuda" else pairs()["small"]
            half = until - (until - time.monotonic()) / 2 if stage == 1 else until
            cases.append(measure(pair, task, Path(folder) / str(stage), args.device, attentions, half))
    card = torch.cuda.get_device_name() if args.device == "cuda" else "no GPU"
    head = f"`python benchmarks/gpu.py`, {card}, {machine()}, {commit()}"
    text = "\n\n".join([head, *map(table, cases)]) + "\n"
    (args.out / "gpu.json").write_text(json.dumps({"machine": head, "cases": cases}))
    (args.out / "gpu.md").write_text(text)
    print(text)
    wrong = [line for case in cases for line in disagreements(case)]
    wrong += [f"{case['case']}: nothing to compare with" for case in cases if not case["runners"]]
    print("\n".join(wrong), file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
