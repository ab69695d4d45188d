"""Who trains: each in a process of its own, step by step as the one who measures hands them out.

A runner computes nothing between two steps, and one step is what lies between two of its Trainer's log lines: a batch
loaded and decoded, forward, backward, clipping, optimiser, and whatever else its Trainer does.
"""

import gc
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from speed_pairs import Task
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, Trainer, TrainerCallback, TrainingArguments, set_seed


RATE = 1e-4
STATUS = Path("/proc/self/status")


class Pace(TrainerCallback):
    """
    Waits for leave before each step and tells what the one before cost.

    Args:
        connection: to the one who measures; it sends `True` for a step and anything else for the end.
    """

    def __init__(self, connection: Connection):
        self.connection = connection

    def on_train_begin(self, *args, **kwargs):
        gc.collect()
        if STATUS.exists():
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of memory begins here
        self.before = resident("VmRSS")
        self._wait({"ready": True, "before": self.before})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.stepped(float(logs["loss"]), float(logs["grad_norm"]))

    def stepped(self, loss: float, norm: float) -> None:
        """A step is done."""
        cpu, wall, peak = cpu_seconds() - self.cpu, time.perf_counter() - self.wall, resident("VmHWM")
        told = {"cpu": cpu, "wall": wall, "loss": loss, "norm": norm, "over": peak - self.before, "peak": peak}
        self._wait(told)

    def _wait(self, told):
        self.connection.send(told)
        if self.connection.recv() is not True:
            sys.exit()
        self.cpu, self.wall = cpu_seconds(), time.perf_counter()


def cpu_seconds() -> float:
    """CPU time of this process, all its threads and the children that it waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def resident(line: str) -> float:
    """MiB of memory, by a line of Linux's account of this process; not a number elsewhere."""
    if not STATUS.exists():
        return float("nan")
    return next(int(text.split()[1]) / 1024 for text in STATUS.read_text().splitlines() if text.startswith(line))


def last_blocks(model: nn.Module, blocks: nn.ModuleList, projector: nn.Module, number: int | None) -> None:
    """Freeze all but the projector and that many blocks at the end, all of them without a number."""
    model.requires_grad_(False)
    for module in (projector, *blocks[-(number or len(blocks)) :]):
        module.requires_grad_(True)


class Rows(torch.utils.data.Dataset):
    """What `encode_rows` encoded."""

    def __init__(self, folder: Path):
        self.rows = json.loads((folder / "encoded.json").read_text())

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class PaddingCollator:
    """
    The ordinary collator: every text's image opened and encoded, as many image tokens as it takes, padded.

    Args:
        images: the image processor.
        image_id, pad_id: of the vocabulary.
        positions: of an image.
        length: of every row; that of the longest if not given.
    """

    def __init__(self, images: Any, image_id: int, pad_id: int, positions: int, length: int | None = None):
        self.images, self.image_id, self.pad_id = images, image_id, pad_id
        self.positions, self.length = positions, length

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [Image.open(row["image"]).convert("RGB") for row in rows]
        pixels = self.images(images=images, return_tensors="pt")["pixel_values"]
        expanded = []
        for row in rows:
            at, many = row["input_ids"].index(self.image_id), [self.image_id] * self.positions
            ids = row["input_ids"][:at] + many + row["input_ids"][at + 1 :]
            expanded.append((ids, row["labels"][:at] + [-100] * self.positions + row["labels"][at + 1 :]))
        length = self.length or max(len(ids) for ids, _ in expanded)
        batch = {
            "input_ids": torch.full((len(rows), length), self.pad_id),
            "attention_mask": torch.zeros(len(rows), length, dtype=torch.long),
            "labels": torch.full((len(rows), length), -100),
        }
        for index, (ids, labels) in enumerate(expanded):
            batch["input_ids"][index, : len(ids)] = torch.tensor(ids)
            batch["attention_mask"][index, : len(ids)] = 1
            batch["labels"][index, : len(ids)] = torch.tensor(labels)
        return {**batch, "pixel_values": pixels}


def collator_of(config, folder: Path, length: int | None = None) -> PaddingCollator:
    """The ordinary collator of a composed model's folder."""
    images = AutoImageProcessor.from_pretrained(folder / "model", backend="pil")
    return PaddingCollator(
        images, config.image_token_id, config.text_config.pad_token_id, config.image_seq_length, length
    )


def settings(task: Task, folder: Path, precision: str) -> dict[str, Any]:
    """What every Trainer is told."""
    return {
        "output_dir": str(folder / f"out{os.getpid()}"),
        "per_device_train_batch_size": task.batch,
        "train_sampling_strategy": "sequential",
        "max_steps": task.steps,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "bf16": precision == "bf16",
        "use_cpu": True,
        "dataloader_num_workers": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


def run_duet(
    task: Task,
    folder: Path,
    precision: str,
    pace: Pace,
    arguments: tuple[str, ...] = (),
    rows: str = "together",
) -> None:
    """Duet, as its training scripts tell the story, on a file of rows."""
    from training_vlm.data import encode_data, load_data
    from training_vlm.load import choose_max_length, load_model
    from training_vlm.run import build_trainer, prepare
    from training_vlm.settings import parse_arguments
    from training_vlm.stages import PRETRAIN, SFT

    told = {
        **settings(task, folder, precision), "model": folder / "model", "dataset": folder / f"{rows}.jsonl",
        "image_dir": folder, "eval_share": 0,
        "tune_text": f"last:{task.learning or _blocks(folder)}",
    }  # fmt: skip
    told.pop("report_to")
    words = [str(word) for name, value in told.items() for word in (f"--{name}", value)]
    words += [word.replace("CACHE", str(folder / "cache")) for word in arguments]
    stage = PRETRAIN if task.stage == 1 else SFT
    found = parse_arguments(stage, [*words, "--report_to", "none"])
    prepare(found.training)
    data = load_data(stage, found.data, found.training)
    model, processor = load_model(stage, found, data)
    encoder = stage.encoder(processor, found.data, choose_max_length(model, found.data.max_length))
    train, evaluation = encode_data(data, encoder, found.data, found.training)
    trainer = build_trainer(found, model, encoder, train, evaluation)
    trainer.add_callback(pace)
    trainer.train()


def run_llava(task: Task, folder: Path, precision: str, pace: Pace) -> None:
    """transformers' LLaVA with the plain Trainer and the ordinary collator."""
    model, collator = _llava(task, folder)
    args = TrainingArguments(**settings(task, folder, precision))
    Trainer(
        model=model, args=args, data_collator=collator, train_dataset=Rows(folder), callbacks=[pace]
    ).train()  # fmt: skip


def run_trl(task: Task, folder: Path, precision: str, pace: Pace) -> None:
    """TRL's SFTTrainer on that LLaVA, with the ordinary collator; its loss is TRL's own."""
    from datasets import Dataset
    from transformers import AutoTokenizer, LlavaProcessor
    from trl import SFTConfig, SFTTrainer

    model, collator = _llava(task, folder)
    processor = LlavaProcessor(collator.images, AutoTokenizer.from_pretrained(folder / "model"), patch_size=16)
    args = SFTConfig(
        **settings(task, folder, precision), max_length=None, gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    SFTTrainer(
        model=model, args=args, data_collator=collator, train_dataset=Dataset.from_list(Rows(folder).rows),
        processing_class=processor, callbacks=[pace],
    ).train()  # fmt: skip


def _llava(task, folder):
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder / "llava", dtype=torch.float32)
    blocks = model.model.language_model.layers
    last_blocks(model, blocks, model.model.multi_modal_projector, task.learning)
    return model, collator_of(model.config, folder)


def run_plain(task: Task, folder: Path, precision: str, pace: Pace, captions_to: int = 64) -> None:
    """The plain recipe: frozen ViT, its CLS token before the text, padded to a fixed length, logits everywhere."""
    config = AutoConfig.from_pretrained(folder / "model", trust_remote_code=True)
    model = PlainRecipe(config, folder)
    blocks = model.text.transformer.h
    last_blocks(model, blocks, model.projector, task.learning)
    length = captions_to if task.stage == 1 else 512 if task.shape == "S" else 384
    loader = torch.utils.data.DataLoader(
        Rows(folder), batch_size=task.batch, collate_fn=collator_of(config, folder, length)
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    model.train()
    pace.on_train_begin()
    for batch in loader:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(**batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        pace.stepped(float(loss), float(norm))


class PlainRecipe(nn.Module):
    """A vision encoder, a projector and a language model as a loop of one's own has them, from a composed model."""

    def __init__(self, config: Any, folder: Path):
        from transformers import AutoModel, AutoModelForCausalLM

        from modeling_vlm import VLMForConditionalGeneration

        super().__init__()
        composed = VLMForConditionalGeneration.from_pretrained(folder / "model")
        self.vision = AutoModel.from_config(config.vision_config)
        self.vision.load_state_dict(composed.model.vision_tower.state_dict(), strict=False)
        self.text = AutoModelForCausalLM.from_config(config.text_config)
        self.text.base_model.load_state_dict(composed.model.language_model.state_dict())
        self.projector = composed.model.multi_modal_projector

    def forward(self, input_ids, attention_mask, labels, pixel_values):
        """The mean cost of the supervised tokens; the first position of each row is the image's."""
        seen = self.projector(self.vision(pixel_values).last_hidden_state[:, :1])
        texts = self.text.get_input_embeddings()(input_ids[:, 1:])
        logits = self.text(
            inputs_embeds=torch.cat([seen, texts], 1), attention_mask=attention_mask, use_cache=False
        ).logits  # fmt: skip
        costs = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="none", ignore_index=-100
        )
        return costs.sum() / (labels[:, 1:] != -100).sum()


def run_gemm(task: Task, folder: Path, precision: str, pace: Pace) -> None:
    """Square matrices multiplied: the most that this machine's core does, as `loss` in FLOP a CPU second."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    sizes = [1024, 2048] if task.shape != "small" else [256]
    pace.on_train_begin()
    while True:
        best = 0.0
        for size in sizes:
            left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
            for _ in range(5):
                start = cpu_seconds()
                for _ in range(repeats := max(1, 2**31 // size**3)):
                    left @ right
                best = max(best, 2 * size**3 * repeats / max(cpu_seconds() - start, 1e-9))
        pace.stepped(best, 0.0)


def _blocks(folder):
    config = json.loads((folder / "model" / "config.json").read_text())["text_config"]
    return config.get("num_hidden_layers") or config["n_layer"]


ROW = ("--padding_free", "on", "--share_prefix")
FROZEN, CACHE = ("--frozen_dtype", "auto"), ("--cache_vision_features", "CACHE")
LADDER: dict[str, dict[str, Any]] = {
    "duet, nothing saved": {"rows": "apart", "arguments": ("--padding_free", "off")},
    "duet, no padding": {"rows": "apart", "arguments": (*ROW, "off")},
    "duet, images once": {"arguments": (*ROW, "off")},
    "duet, shared prefix": {"arguments": (*ROW, "on")},
    "duet, frozen in bf16": {"arguments": (*ROW, "on", *FROZEN)},
    "duet, cache": {"arguments": (*ROW, "on", *FROZEN, *CACHE)},
}
"""Duet with one saving more in each; `CACHE` stands for a folder."""

RUNNERS: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "gemm": (run_gemm, {}),
    "plain": (run_plain, {}),
    "plain, padded to 128": (run_plain, {"captions_to": 128}),
    "llava": (run_llava, {}),
    "trl": (run_trl, {}),
    **{name: (run_duet, savings) for name, savings in LADDER.items()},
}
"""Name -> function and its further arguments."""


def start(connection: Connection, name: str, task: Task, folder: Path, precision: str, log: Path) -> None:
    """A runner's process: prepare, then step when told; what it prints goes into a file."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    torch.set_num_threads(1)
    set_seed(0)
    function, further = RUNNERS[name]
    try:
        function(task, folder, precision, Pace(connection), **further)
    except Exception:
        connection.send({"failed": traceback.format_exc()})
