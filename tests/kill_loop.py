"""Runs that are killed at random moments, half of them during a save, and started again until they are done.

    python -m tests.kill_loop --kills 100

A start is a fork of this process, which has imported all that a script needs and computed nothing: the script's own
`main`, with `--resume_from_checkpoint auto`. Each run is killed a few times and then left to its end; its weights and
the account of its data have to be those of a run that nobody killed.
"""

import argparse
import contextlib
import filecmp
import json
import os
import random
import select
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402
from PIL import Image  # noqa: E402

import train_sft  # noqa: E402
from tests import tiny  # noqa: E402
from training_vlm.learning.trainer import VLMTrainer  # noqa: E402


STEPS, EVERY = 6, 2
COMMON = [
    "--use_cpu", "--bf16", "False", "--max_steps", str(STEPS), "--max_new_tokens", "2", "--save_strategy", "steps",
    "--save_steps", str(EVERY), "--logging_steps", "1", "--dataloader_num_workers", "0", "--disable_tqdm", "True",
    "--save_total_limit", "2", "--per_device_train_batch_size", "4", "--learning_rate", "1e-3", "--report_to", "none",
    "--resume_from_checkpoint", "auto",
]  # fmt: skip
FULL = ["--tune_text", "full", "--eval_share", "0"]


class Kind(NamedTuple):
    """A kind of run."""

    options: list[str]
    processes: int = 1


KINDS = {
    "map-style": Kind(["--tune_text", "full", "--eval_share", "0.2", "--eval_strategy", "steps", "--eval_steps", "2"]),
    "streamed": Kind([*FULL, "--streaming", "--shuffle_buffer", "8"]),
    "packed": Kind([*FULL, "--max_tokens_per_batch", "200"]),
    "packed stream": Kind([*FULL, "--max_tokens_per_batch", "200", "--streaming", "--shuffle_buffer", "8"]),
    "LoRA": Kind(["--tune_text", "lora", "--lora_r", "4", "--eval_share", "0"]),
    "two processes": Kind([*FULL, "--per_device_train_batch_size", "2", "--ddp_backend", "gloo"], processes=2),
}


class Run(NamedTuple):
    """A run that was started."""

    pids: list[int]
    events: int
    log: Path

    def wait(self, event: bytes, count: int = 1) -> bool:
        """Wait until something has happened so many times; `False` where the run ended before."""
        while count:
            select.select([self.events], [], [])
            happened = os.read(self.events, 1)
            if not happened:
                return False
            count -= happened == event
        return True

    def kill(self, rng: random.Random) -> None:
        """Kill the processes, in any order, as they lose their machine."""
        for pid in rng.sample(self.pids, len(self.pids)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            time.sleep(rng.choice([0.0, 0.02]) if len(self.pids) > 1 else 0.0)

    def end(self) -> bool:
        """Wait for the end; whether the run came to it by itself."""
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]
        os.close(self.events)
        killed = -signal.SIGKILL in codes
        assert killed or not any(codes), f"{codes}\n{self.log.read_text()[-3000:]}"
        return not killed


def start(kind: Kind, arguments: list[str], out: Path) -> Run:
    """Start a run; its events are `t` for training, `s` and `e` for a save that begins and ends."""
    reader, writer = os.pipe()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log, pids = out.with_name(f"{out.name}.log"), []
    for rank in range(kind.processes):
        pid = os.fork()
        if not pid:
            _be_the_run(kind, [*COMMON, *arguments, *kind.options, "--output_dir", str(out)], rank, port, writer, log)
        pids.append(pid)
    os.close(writer)
    return Run(pids, reader, log)


def _be_the_run(kind, argv, rank, port, events, log):
    code = 1
    try:
        opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(opened, stream)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
        if kind.processes > 1:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(kind.processes), MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(kind.processes),
            )  # fmt: skip
        torch.set_num_threads(1)
        if rank == 0:
            _tell(events)
        try:
            train_sft.main(argv)
            code = 0
        except SystemExit as end:
            code = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _tell(events):
    def telling(method, before, after=b""):
        def told(*args, **kwargs):
            os.write(events, before)
            try:
                return method(*args, **kwargs)
            finally:
                os.write(events, after)

        return told

    VLMTrainer.train = telling(VLMTrainer.train, b"t")
    for name in ("_save_checkpoint", "save_model"):
        setattr(VLMTrainer, name, telling(getattr(VLMTrainer, name), b"s", b"e"))


class Loop:
    """
    Runs of one kind.

    Args:
        name: of `KINDS`.
        folder: where they are.
        seed: of the moments.
    """

    def __init__(self, name: str, folder: Path, seed: int = 0):
        self.kind, self.rng = KINDS[name], random.Random(f"{name} {seed}")
        self.folder = folder / name.replace(" ", "-")
        self.folder.mkdir(parents=True)
        self.arguments = make_data(folder)
        self.killed = {"during a save": 0, "at any moment": 0}
        self.runs = 0
        self.whole = self.folder / "whole"
        self._measure()

    def _measure(self):
        run, began, saving, saves = start(self.kind, self.arguments, self.whole), 0.0, [], []
        for event in iter(lambda: os.read(run.events, 1), b""):
            now = time.monotonic()
            if event == b"t":
                began = now
            elif event == b"s":
                saving.append(now)
            else:
                saves.append(now - saving.pop())
        assert run.end()
        self.training, self.saving = time.monotonic() - began, max(saves)

    def run(self, kills: int) -> int:
        """Have a run killed up to so many times and then left to its end, which is compared; how often it was."""
        out, killed, self.runs = self.folder / f"run-{self.runs}", 0, self.runs + 1
        while True:
            run = start(self.kind, self.arguments, out)
            if killed < kills:
                how = min(self.killed, key=lambda how: (self.killed[how], how))
                if how == "during a save":
                    happened, longest = run.wait(b"s", self.rng.randint(1, 3)), self.saving
                else:
                    happened, longest = run.wait(b"t"), self.training
                if happened:
                    time.sleep(self.rng.uniform(0, longest))
                    run.kill(self.rng)
            if run.end():
                break
            killed += 1
            self.killed[how] += 1
        self.compare(out)
        return killed

    def compare(self, out: Path) -> None:
        """See that a run is what one is that nobody killed."""
        weights = [path.name for path in self.whole.glob("*model.safetensors")]
        for name in (*weights, "data_report.json"):
            assert filecmp.cmp(self.whole / name, out / name, shallow=False), f"{out / name} is not that of a whole run"
        losses = [_losses(folder) for folder in (self.whole, out)]
        assert losses[0] == losses[1], losses
        left = [path.name for path in out.iterdir() if path.name.startswith("_")]
        assert left == ["_run.json"], left


def _losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(line["step"], name, line[name]) for line in history for name in ("loss", "eval_loss") if name in line]


def make_data(folder: Path) -> list[str]:
    """Two backbones and 24 dialogues of different length about eight images, and the arguments that name them."""
    if not (folder / "rows.jsonl").is_file():
        tiny.save_vit(folder / "vision")
        tiny.save_gpt2(folder / "text")
        rng, rows = random.Random(0), []
        for number in range(24):
            Image.new("RGB", (40, 28), (number * 9, 90, 50)).save(folder / f"{number % 8}.png")
            said = [("user", "what is it?"), ("assistant", "a cat " * rng.randrange(1, 12))] * rng.randrange(1, 3)
            messages = [{"role": role, "content": text} for role, text in said]
            rows.append({"images": [f"{number % 8}.png"], "messages": messages})
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    backbones = ["--vision_model", str(folder / "vision"), "--text_model", str(folder / "text")]
    return [*backbones, "--dataset", str(folder / "rows.jsonl"), "--image_dir", str(folder)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--a_run", type=int, default=5, help="Kills of a run before it is left to its end.")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        loops = {name: Loop(name, Path(folder), arguments.seed) for name in arguments.kinds}
        done, began = 0, time.monotonic()
        while done < arguments.kills:
            for name, loop in loops.items():
                done += loop.run(min(arguments.a_run, max(0, arguments.kills - done)))
                print(f"{name}: {loop.killed}, {loop.runs} runs, all equal; {done} kills", flush=True)
        print(f"{done} kills in {time.monotonic() - began:.0f} s, none lost, all weights and accounts equal")


if __name__ == "__main__":
    main()
