"""The memory that an estimate says, against the memory that the same steps take: peak of live tensors, and RSS beside.

    python benchmarks/memory.py                  # about ten minutes on one core
    python benchmarks/memory.py --shapes small

Models have random weights, data are made on the spot. The estimate sees configs alone; then the run's own Trainer takes
two steps of the same batch, and of the second every allocation of torch is counted, by torch's own profiler.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from speed_pairs import Task, make
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from training_vlm.estimate import settled
from training_vlm.learning.originals import shown_size
from training_vlm.load import load_model
from training_vlm.rehearsal import BATCHES, rehearsing
from training_vlm.run import build_trainer
from training_vlm.sketch import ROWS, Sketch
from training_vlm.stages import PRETRAIN, SFT


SETTINGS = {
    "fp32": ["--bf16", "false"],
    "bf16": ["--bf16", "true"],
    "fp32, checkpointed": ["--bf16", "false", "--gradient_checkpointing", "true"],
    "bf16, checkpointed": ["--bf16", "true", "--gradient_checkpointing", "true"],
    "bf16, padded": ["--bf16", "true", "--padding_free", "off"],
}
STATUS = Path("/proc/self/status")


class Memory(TrainerCallback):
    """Looks at the second step of a run."""

    def __init__(self, batch: dict[str, Any], folder: Path):
        self.batch, self.trace = batch, folder / "trace.json"
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == 1 and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        elif state.global_step == 1:
            parts = [*model.parameters(), *model.buffers(), *self.batch.values()]
            parts += [part for states in optimizer.state.values() for part in states.values()]
            storages = [part.untyped_storage() for part in parts if isinstance(part, torch.Tensor)]
            self.held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
            if STATUS.exists():
                Path("/proc/self/clear_refs").write_text("5")
            self.profiler.start()
        elif state.global_step == 2 and not torch.cuda.is_available():
            self.profiler.stop()

    def read(self) -> tuple[int, int]:
        """Bytes of live tensors at the peak, and of the process (on a GPU, of its pool), 0 where nobody knows."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        self.profiler.export_chrome_trace(str(self.trace))
        events = [event for event in json.loads(self.trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
        alive = most = 0
        for event in sorted(events, key=lambda event: event["ts"]):
            alive += event["args"]["Bytes"]
            most = max(most, alive)
        lines = STATUS.read_text().splitlines() if STATUS.exists() else []
        resident = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
        return self.held + most, resident


def compare(connection, stage, argv: list[str], folder: Path) -> None:
    """Estimate, then measure, in a process of its own."""
    torch.set_num_threads(1)
    arguments = settled(stage, argv)
    sketch = Sketch(stage, arguments)
    found = sketch.rehearsed
    model, _ = load_model(stage, arguments, sketch.data)
    asked = rehearsing(arguments, str(folder))._replace(efficiency=arguments.efficiency)
    if torch.cuda.is_available():  # an estimate is made on the CPU alone
        asked = asked._replace(training=replace(asked.training, use_cpu=False))
    trainer = build_trainer(asked, model, sketch.encoder, sketch.sample(ROWS), None)
    batches = [batch for batch, _ in zip(trainer.get_train_dataloader(), range(BATCHES))]
    batch = max(batches, key=lambda batch: (batch["account"].run, len(batch["pixel_values"])))
    del batches
    assert batch["account"].run == found.account.run, f"another batch: {trainer.savings} and {found.savings}"
    trainer.get_train_dataloader = lambda: [batch] * 2
    memory = Memory(batch, folder)
    trainer.add_callback(memory)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    connection.send((found.peak.total(), *memory.read(), found.account.run))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["G", "S"], choices=["small", "G", "S"])
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    process, worst = multiprocessing.get_context("spawn"), 0.0
    print("| shape | stage | setting | positions | estimated | measured | off by | RSS |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as root:
        for shape in options.shapes:
            for stage, tuned in ((PRETRAIN, "last:2"), (SFT, "full")):
                folder = Path(root) / f"{shape}{stage.number}"
                maker = process.Process(target=make, args=(Task(shape, stage.number, 5, 8, 3), folder))
                maker.start()
                maker.join()
                for name, settings in SETTINGS.items():
                    argv = [
                        "--model", str(folder / "model"), "--dataset", str(folder / "together.jsonl"), "--tune_text",
                        tuned, "--eval_share", "0", "--per_device_train_batch_size", str(options.batch),
                        "--output_dir", str(folder / "out"), *settings,
                    ]  # fmt: skip
                    mine, theirs = process.Pipe()
                    child = process.Process(target=compare, args=(theirs, stage, argv, folder))
                    child.start()
                    theirs.close()
                    estimated, measured, resident, positions = mine.recv()
                    child.join()
                    worst = max(worst, abs(estimated / measured - 1))
                    sizes = f"{shown_size(estimated)} | {shown_size(measured)} | {estimated / measured - 1:+.3%}"
                    row = f"| {shape} | {stage.number} | {name} | {positions:,} | {sizes} | {shown_size(resident)} |"
                    print(row, flush=True)
    print(f"\nAt most {worst:.2%} off.")
    sys.exit(worst > 0.1)


if __name__ == "__main__":
    main()
