"""Two processes write one checkpoint, go on from it as they were, and stop together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from training_vlm.learning.checkpoints import MANIFEST, UNFINISHED, fault


ROOT = Path(__file__).parents[1]

RUN = """
import math, shutil, sys
from pathlib import Path
import torch
from accelerate.utils import gather_object
from tests.test_guard import items_of
from tests.test_trainer import trainer_of, weights
from PIL import Image

root = Path(sys.argv[1])
items = items_of(lambda seed: Image.new("RGB", (40, 28), (seed * 20, 99, 50))) * 2
settings = dict(
    train_sampling_strategy="sequential", save_strategy="steps", save_steps=1, max_steps=4, save_total_limit=2,
    ddp_backend="gloo",
)

def trainer(name):
    made = trainer_of("vit-gpt2", lambda pair: (root / "vision", root / "text"), items, root / name, **settings)
    made.data_collator.account = True
    return made

whole = trainer("whole")
whole.train()
process = whole.args.process_index
counted = whole.gathered_account().state()
lines = [line for line in whole.state.log_history if "loss" in line]
assert all(found == lines for found in gather_object([lines])) and lines[0]["samples_per_second"] > 0
counts = whole.meter._together(whole.meter.counts)
assert counts["samples"] == whole.gathered_account().total["learned from"] == 16
assert counts["samples"] > whole.meter.counts["samples"]
if process == 0:
    shutil.copytree(root / "whole" / "checkpoint-3", root / "resumed" / "checkpoint-3")
whole.accelerator.wait_for_everyone()
resumed = trainer("resumed")
resumed.train(resume_from_checkpoint=True)
assert all(torch.equal(one, weights(resumed)[name]) for name, one in weights(whole).items())
assert resumed.gathered_account().state() == counted
resumed.save_model()

sick = trainer("sick")
compute_loss = sick.compute_loss
def of_one_process(model, inputs, *args, **kwargs):
    loss = compute_loss(model, inputs, *args, **kwargs)
    return loss + math.inf if process and sick.state.global_step == 2 else loss
sick.compute_loss = of_one_process
try:
    sick.train()
except ValueError as error:
    (root / f"stopped-{process}.txt").write_text(str(error))
sick.accelerator.wait_for_everyone()
sick.accelerator.end_training()
"""


def stems(files):
    return {Path(name).stem for name in files}


@pytest.mark.slow
def test_two_processes_write_resume_and_stop_together(tmp_path):
    tiny.save_vit(tmp_path / "vision")
    tiny.save_gpt2(tmp_path / "text")
    (tmp_path / "run.py").write_text(RUN)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "run.py",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    for run, steps in (("whole", (3, 4)), ("resumed", (3, 4)), ("sick", (1, 2))):
        assert not (tmp_path / run / UNFINISHED).exists()
        checkpoints = sorted((tmp_path / run).glob("checkpoint-*"))
        assert [path.name for path in checkpoints] == [f"checkpoint-{step}" for step in steps]
        for checkpoint in checkpoints:
            files = json.loads((checkpoint / MANIFEST).read_text())["files"]
            assert fault(checkpoint) is None
            assert {
                f"{kind}_{n}.{end}" for n in (0, 1) for kind, end in (("rng_state", "pth"), ("data_account", "json"))
            } <= files.keys()
    assert (tmp_path / "resumed" / "model.safetensors").is_file()
    lines = {(tmp_path / f"stopped-{process}.txt").read_text() for process in (0, 1)}
    assert len(lines) == 1 and "the loss is inf at step 3" in lines.pop()
