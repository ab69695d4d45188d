"""Two processes take the steps of one, with whole models or cut ones; a launch that gave less than asked is refused.

A worker that torchrun starts runs each case as the process of the test runs it alone, on the same global batches.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from processing import VLMDataCollator
from tests import tiny
from training_vlm.arguments import VLMTrainingArguments
from training_vlm.learning.sharding import cut_at_blocks
from training_vlm.learning.trainer import VLMTrainer
from training_vlm.learning.tuning import apply_tuning
from training_vlm.settings import RECIPES


ROOT = Path(__file__).parents[1]
LAUNCHES = sorted((RECIPES / "accelerate").glob("*.yaml"))


# -- steps, in one process and in two ---------------------------------------------------------------------------------


class Case(NamedTuple):
    """A run whose weights two processes learn as one does."""

    pair: str = "vit-gpt2"
    tiles: int = 1
    packed: bool = False
    text: str = "full"
    cut: bool = False  # FSDP2
    changes: dict[str, Any] = {}


CHECKPOINTED = {"gradient_checkpointing": True}
IN_PARTS = {"state_dict_type": "SHARDED_STATE_DICT"}
CASES = {
    "whole": Case(),
    "whole, last block": Case(text="last:1", changes=CHECKPOINTED),
    "whole, packed": Case("siglip-llama", packed=True),
    "whole, packed, checkpointed": Case("siglip-llama", packed=True, changes=CHECKPOINTED),
    "whole, tiles": Case("siglip-llama", tiles=4),
    "whole, tiles, packed": Case(tiles=4, packed=True, changes=CHECKPOINTED),
    "cut": Case(cut=True),
    "cut, last block": Case(text="last:1", cut=True),
    "cut, packed": Case("siglip-llama", packed=True, cut=True, changes=CHECKPOINTED),
    "cut, tiles": Case("siglip-llama", tiles=4, cut=True),
    "cut, in parts on disk": Case(
        "siglip-llama", cut=True, changes={"fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
    ),
}
QUICK = ["whole", "cut"]


def picture(seed, size=(40, 28)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def ordered(tiles):
    """Batches of four: the first two rows are one process's, and have no image, alone have one, or have none as all."""
    size = (40, 28) if tiles == 1 else (100, 60)
    rows = tiny.ragged_dialogues(lambda seed: picture(seed, size))
    texts, images = [rows[3], rows[5]], [row for row in rows if row["images"]]
    return [*texts, *images[:2], *images[2:4], *texts, *texts, *reversed(texts), *images[:4]]


def trainer_of(case, backbones, folder, processes, **changes):
    """A run of a case; as many conversations a step whatever the processes."""
    model, processor = tiny.compose(*backbones(case.pair), tiny.PAIRS[case.pair][2], max_tiles=case.tiles)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    apply_tuning(model, "frozen" if case.text != "full" else "full", case.text)
    settings = dict(
        use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, dataloader_num_workers=0, learning_rate=0.5,
        optim="sgd", lr_scheduler_type="constant", max_steps=4, save_strategy="no", logging_steps=1, seed=7,
        train_sampling_strategy="sequential", per_device_train_batch_size=4 // processes,
        per_device_eval_batch_size=3, ddp_find_unused_parameters=False, output_dir=str(folder),
    )  # fmt: skip
    if case.cut and processes > 1:
        settings.update(fsdp=True)
    else:
        changes.pop("fsdp_config", None)
    items = ordered(case.tiles)
    collator = VLMDataCollator(processor, account=True)
    collator.padding_free = case.packed
    trainer = VLMTrainer(
        model=model, args=VLMTrainingArguments(**{**settings, **changes}), processing_class=processor,
        data_collator=collator, train_dataset=items, eval_dataset=items[:7],
    )  # fmt: skip
    cut_at_blocks(trainer)
    return trainer


def taken(trainer, **train):
    """What the steps of a run gave: losses, gradient norms, the loss of an evaluation."""
    trainer.train(**train)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    found = {name: [entry[name] for entry in log] for name in ("loss", "grad_norm")}
    return {**found, "eval_loss": [trainer.evaluate()["eval_loss"]]}


def run_case(name, backbones, folder, processes, **changes):
    """Run a case and save its model; what its steps gave."""
    case = CASES[name]
    trainer = trainer_of(case, backbones, folder, processes, **{**case.changes, **changes})
    found = taken(trainer)
    trainer.save_model()
    return trainer, found


def assert_same_steps(found, expected):
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=2e-5), name


def assert_same_weights(folder, other, **tolerance):
    found, expected = (load_file(Path(one) / "model.safetensors") for one in (folder, other))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, **(tolerance or {"rtol": 1e-4, "atol": 2e-6}), msg=name)


# -- what torchrun starts ---------------------------------------------------------------------------------------------


def shard_here():
    """
    Let accelerate's own preparation of FSDP in on a CPU, where it stays out.

    All else is what it does on GPUs: its plugin, its cuts, its gathered norms, its way of saving.
    """
    made = AcceleratorState.__init__

    def as_on_accelerators(self, *args, fsdp_plugin=None, **kwargs):
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = as_on_accelerators


def between_cases():
    """The next run is no FSDP because this one was."""
    AcceleratorState._reset_state()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]


def worker(root, names):
    """Run cases in the processes that torchrun started, and write down what they gave."""
    shard_here()
    root, processes = Path(root), int(os.environ["WORLD_SIZE"])
    given = []
    for name in names:
        between_cases()
        changes = {"ddp_backend": "gloo"}
        trainer, found = run_case(name, backbones_in(root), root / f"{processes} {name}", processes, **changes)
        given.append(trainer.args.world_size)
        assert torch.distributed.get_world_size() == trainer.args.world_size == processes
        cut = [isinstance(parameter, DTensor) for parameter in trainer.model.parameters()]
        assert all(cut) if CASES[name].cut else not any(cut)
        if not CASES[name].cut:
            assert trainer.model_wrapped.find_unused_parameters is False
        if trainer.args.process_index == 0:
            (root / f"{processes} {name}.json").write_text(json.dumps(found))
        trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def backbones_in(root):
    return lambda pair: (root / pair / "vision", root / pair / "text")


def save_backbones(root):
    for pair, (vision, text, _) in tiny.PAIRS.items():
        vision(root / pair / "vision")
        text(root / pair / "text")


def launch(root, call, processes=2, limit=280):
    """Have torchrun start a function of this file."""
    (root / "worker.py").write_text(f"from tests import test_machines\ntest_machines.{call}\n")
    environment = {**os.environ, "HF_HOME": str(root / "home"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*command, "worker.py"], cwd=root, env=environment, capture_output=True, text=True, timeout=limit
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout + done.stderr


def assert_as_in_one(root, names):
    for name in names:
        _, expected = run_case(name, backbones_in(root), root / f"1 {name}", 1)
        assert len(expected["loss"]) == 4 and expected["loss"][-1] != expected["loss"][0]
        assert_same_steps(json.loads((root / f"2 {name}.json").read_text()), expected)
        assert_same_weights(root / f"2 {name}", root / f"1 {name}")
        files = [{path.name for path in (root / f"{n} {name}").iterdir()} for n in (1, 2)]
        assert files[0] == files[1]


def test_two_processes_take_the_steps_of_one_with_images_on_either_or_neither_and_with_weights_cut(tmp_path):
    save_backbones(tmp_path)
    said = launch(tmp_path, f"worker({str(tmp_path)!r}, {QUICK})")
    assert "returned a view" not in said and "unused" not in said
    assert_as_in_one(tmp_path, QUICK)
