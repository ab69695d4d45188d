"""Two processes take the steps of one, with whole models or cut ones.

A worker that torchrun starts runs each case as the process of the test runs it alone, on the same global batches.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import train_sft
from modeling_vlm import VLMForConditionalGeneration
from processing import VLMDataCollator
from tests import tiny
from tests.isolated import run_without_package
from training_vlm import machines
from training_vlm.arguments import DataArguments
from training_vlm.efficiency import EfficiencyArguments
from training_vlm.learning.checkpoints import fault
from training_vlm.learning.sampling import change_of_order, order_of
from training_vlm.learning.sharding import SeesWeightsCut, block_names, check_goes_on, cut_at_blocks
from training_vlm.learning.trainer import VLMTrainer
from training_vlm.learning.tuning import apply_tuning
from training_vlm.training_arguments import VLMTrainingArguments


ROOT = Path(__file__).parents[1]


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
BY_FSDP = {"activation_checkpointing": True}
IN_PARTS = {"state_dict_type": "SHARDED_STATE_DICT"}
CASES = {
    "whole": Case(),
    "whole, last block": Case(text="last:1", changes=CHECKPOINTED),
    "whole, packed": Case("siglip-llama", packed=True),
    "whole, packed, checkpointed": Case("siglip-llama", packed=True, changes=CHECKPOINTED),
    "whole, tiles": Case("siglip-llama", tiles=4),
    "whole, tiles, packed": Case(tiles=4, packed=True, changes=CHECKPOINTED),
    "cut": Case(cut=True),
    "cut, last block, evaluated first": Case(text="last:1", cut=True, changes={"eval_on_start": True}),
    "cut, packed": Case("siglip-llama", packed=True, cut=True, changes=CHECKPOINTED),
    "cut, tiles": Case("siglip-llama", tiles=4, cut=True),
    "cut, checkpointed by FSDP": Case("siglip-llama", packed=True, cut=True, changes={"fsdp_config": BY_FSDP}),
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


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def trainer_of(case, backbones, folder, processes, **changes):
    """A run of a case; as many conversations a step whatever the processes."""
    model, processor = tiny.compose(*backbones(case.pair), tiny.PAIRS[case.pair][2], max_tiles=case.tiles)
    without_dropout(model)
    apply_tuning(model, "frozen" if case.text != "full" else "full", case.text)
    settings = dict(
        use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, dataloader_num_workers=0, learning_rate=0.5,
        optim="sgd", lr_scheduler_type="constant", max_steps=4, save_strategy="no", logging_steps=1, seed=7,
        train_sampling_strategy="sequential", per_device_train_batch_size=4 // processes,
        per_device_eval_batch_size=3, ddp_find_unused_parameters=False, output_dir=str(folder),
    )  # fmt: skip
    if case.cut and "TORCHELASTIC_RUN_ID" in os.environ:
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


def assert_same_weights(folder, other, weights="model.safetensors", **tolerance):
    found, expected = (load_file(Path(one) / weights) for one in (folder, other))
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
    told = done.stderr.partition("torch.distributed.elastic")[0]  # what follows is the launcher's own trace
    assert done.returncode == 0, told[-5000:]
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


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_in_every_form(tmp_path):
    """Weights whole and cut, packed and not, with tiles and without, with gradient checkpointing and without."""
    save_backbones(tmp_path)
    names = [name for name in CASES if name not in QUICK]
    launch(tmp_path, f"worker({str(tmp_path)!r}, {names})", limit=900)
    assert_as_in_one(tmp_path, names)


# -- DeepSpeed, where it is installed ----------------------------------------------------------------------------------


def deepspeed_worker(root, stages):
    """The same under ZeRO, which accelerate keeps for accelerators as well; gloo connects the processes."""
    import deepspeed

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # which would be compiled
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    deepspeed.init_distributed(dist_backend="gloo")
    there, root = torch.accelerator.is_available, Path(root)
    for stage in stages:
        for name in [name for name in os.environ if name.startswith("ACCELERATE_USE_")]:
            del os.environ[name]
        AcceleratorState._reset_state(reset_partial_state=True)
        zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
        sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        settings = {"zero_optimization": zero, **dict.fromkeys([*sizes, "gradient_clipping"], "auto")}
        torch.accelerator.is_available = lambda: True
        out = root / f"zero{stage}"
        changes = {"use_cpu": False, "deepspeed": settings, "dataloader_pin_memory": False}
        trainer = trainer_of(CASES["whole"], backbones_in(root), out, 2, **changes)
        torch.accelerator.is_available = there
        found = taken(trainer)
        assert trainer.is_deepspeed_enabled and trainer.args.world_size == 2
        assert all(hasattr(parameter, "ds_id") for parameter in trainer.model.parameters()) == (stage == 3)
        trainer.save_model()
        if trainer.args.process_index == 0:
            (root / f"zero{stage}.json").write_text(json.dumps(found))
        trainer.accelerator.wait_for_everyone()


@pytest.mark.slow
def test_two_processes_of_deepspeed_take_the_steps_of_one_with_images_on_either_or_neither(tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    save_backbones(tmp_path)
    for name, value in {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}.items():
        monkeypatch.setenv(name, value)
    launch(tmp_path, f"deepspeed_worker({str(tmp_path)!r}, [2, 3])")
    monkeypatch.undo()
    _, expected = run_case("whole", backbones_in(tmp_path), tmp_path / "one", 1)
    for stage in (2, 3):
        assert_same_steps(json.loads((tmp_path / f"zero{stage}.json").read_text()), expected)
        assert_same_weights(tmp_path / f"zero{stage}", tmp_path / "one")
        assert {path.name for path in (tmp_path / f"zero{stage}").iterdir()} == {
            path.name for path in (tmp_path / "one").iterdir()
        }


@pytest.mark.parametrize("mark", ["ds_id", "_hp_mapping", "unshard"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_batch_without_images_runs_the_modules_of_one_with_images_where_all_processes_have_to(folders, mark, cached):
    """As it is known from what FSDP and DeepSpeed leave at a module or a parameter."""
    model, processor = tiny.compose(*folders("vit-gpt2"), "cls")
    without_dropout(model)
    batch = tiny.collate(processor, [tiny.dialogue("what is it?", "a cat")])
    expected = model.train()(**batch).loss
    called = []
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        part.register_forward_hook(lambda module, *_: called.append(type(module).__name__))
    assert model(**batch).loss == expected and not called
    if mark == "unshard":
        model.model.vision_tower.unshard = None
    else:
        setattr(next(model.model.multi_modal_projector.parameters()), mark, 1)
    if cached:
        model.model.cached_shape = (1, 32)
    for training in (True, False):
        model.train(training)
        called.clear()
        loss = model(**batch).loss
        torch.testing.assert_close(loss, expected)
        assert called == ([] if cached else ["ViTModel"]) + ["MLP"]
    model.train()(**batch).loss.backward()
    learning = [
        *model.model.multi_modal_projector.parameters(),
        *([] if cached else model.model.vision_tower.parameters()),
    ]
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in learning)
    called.clear()
    model.eval()(input_ids=batch["input_ids"])  # as an answer is written
    assert not called


# -- a whole run of a script -------------------------------------------------------------------------------------------

CUT = ["--fsdp", "--fsdp_config", json.dumps(IN_PARTS)]
ADAPTED = ["--tune_text", "lora", "--lora_dropout", "0"]
SCRIPTS = {"cut": ["--tune_text", "full", *CUT], "adapted": ADAPTED, "adapted, cut": [*ADAPTED, *CUT]}


def script_worker(argv):
    """A script on two CPUs, where it would refuse to cut weights."""
    shard_here()
    machines.check_launch.__code__ = (lambda args: None).__code__
    train_sft.main(argv)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_trains_asks_and_saves_in_two_processes_what_it_does_in_one(tmp_path, name):
    """Both answer the questions, some of which show no image; what is saved loads by itself."""
    save_backbones(tmp_path)
    rows = []
    for number in range(12):
        picture(number).save(tmp_path / f"{number}.png")
        shown = {"image": f"{number}.png"} if number % 4 else {}
        rows.append({**shown, "question": "what?", "answer": f"picture {number}" + " of a cat" * (number % 3)})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    vision, text = backbones_in(tmp_path)("siglip-llama")
    argv = [
        "--vision_model", str(vision), "--text_model", str(text), "--dataset", str(tmp_path / "rows.jsonl"),
        "--use_cpu", "--bf16", "False", "--max_steps", "3", "--eval_split", "train[:5]", "--max_new_tokens", "4",
        "--train_sampling_strategy", "sequential", "--dataloader_num_workers", "0", "--disable_tqdm", "True",
        "--optim", "sgd", "--learning_rate", "0.5",
        "--predict_with_generate", "--eval_strategy", "steps", "--eval_steps", "1",
    ]  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    mine = [option for option in SCRIPTS[name] if option not in CUT]
    train_sft.main([*argv, *mine, "--per_device_train_batch_size", "4", "--output_dir", str(one)])
    share = ["--per_device_train_batch_size", "2", "--ddp_backend", "gloo", "--output_dir", str(two)]
    said = launch(tmp_path, f"script_worker({[*argv, *SCRIPTS[name], *share]})")
    assert "4 conversations a step (2 x 1 x 2 processes)" in said and "no padding" in said
    weights = "adapter_model.safetensors" if "adapted" in name else "model.safetensors"
    assert_same_weights(two, one, weights)
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    answers = [(folder / "predictions.jsonl").read_text() for folder in (one, two)]
    assert answers[0] == answers[1] and len(answers[0].splitlines()) == 5
    logs = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (one, two)]
    evaluated = [[(entry["eval_loss"], entry["step"]) for entry in log if "eval_loss" in entry] for log in logs]
    assert [loss for loss, _ in evaluated[0]] == pytest.approx([loss for loss, _ in evaluated[1]], rel=1e-5)
    assert len(evaluated[0]) >= 3
    source = """
import sys
from transformers import AutoModelForImageTextToText
model, found = AutoModelForImageTextToText.from_pretrained(
    sys.argv[1] + "/two", trust_remote_code=True, output_loading_info=True
)
print(importable, type(model).__name__, *map(len, found.values()))
"""
    assert "[] VLMForConditionalGeneration 0 0 0" in run_without_package(source, tmp_path)


# -- going on with more or fewer processes ----------------------------------------------------------------------------


def run_jobs(root, name, jobs, processes, **changes):
    """Train to step 4 into each folder, from a checkpoint where one is named, with checkpoints at 2 and 4."""
    for out, resumed in jobs:
        settings = {**CASES[name].changes, "optim": "adamw_torch", "learning_rate": 1e-3, "save_strategy": "steps"}
        trainer = trainer_of(
            CASES[name], backbones_in(root), root / out, processes, **settings, save_steps=2, **changes
        )
        trainer.train(resume_from_checkpoint=None if resumed is None else str(root / resumed))
        assert trainer.args.world_size == processes and trainer.state.global_step == 4
        trainer.save_model()
        trainer.accelerator.wait_for_everyone()
    return trainer


def going_on_worker(root, name, jobs):
    """The same in the processes that torchrun started."""
    shard_here()
    processes = int(os.environ["WORLD_SIZE"])
    for job in jobs:
        between_cases()
        trainer = run_jobs(Path(root), name, [job], processes, ddp_backend="gloo")
    trainer.accelerator.end_training()


def go_on(root, name, jobs, processes):
    if processes == 1 and not CASES[name].cut:
        run_jobs(root, name, jobs, 1)
    else:
        launch(root, f"going_on_worker({str(root)!r}, {name!r}, {jobs})", processes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whole", "cut", "cut, in parts on disk"])
def test_a_run_goes_on_to_the_same_weights_with_more_or_fewer_processes(tmp_path, name):
    save_backbones(tmp_path)
    go_on(tmp_path, name, [("one", None)], 1)
    jobs = [("two", None), ("two after two", "two/checkpoint-2"), ("two after one", "one/checkpoint-2")]
    go_on(tmp_path, name, jobs, 2)
    go_on(tmp_path, name, [("one after two", "two/checkpoint-2")], 1)
    for checkpoint in ("one/checkpoint-2", "two/checkpoint-2", "two/checkpoint-4"):
        assert fault(tmp_path / checkpoint) is None
        assert (tmp_path / checkpoint / "model.safetensors").is_file()
    assert_same_weights(tmp_path / "two after two", tmp_path / "two", rtol=0, atol=0)
    for out in ("two", "two after one", "one after two"):
        assert_same_weights(tmp_path / out, tmp_path / "one", rtol=1e-4, atol=2e-5)
    first = load_file(tmp_path / "one" / "checkpoint-2" / "model.safetensors")
    last = load_file(tmp_path / "one" / "model.safetensors")
    assert max(float((last[key] - first[key]).abs().max()) for key in first) > 1e-3


@pytest.mark.parametrize(
    "files, fsdp, deepspeed, told",
    [
        (["optimizer.pt"], False, False, None),
        (["pytorch_model_fsdp.bin", "optimizer.bin"], True, False, None),
        (["pytorch_model_fsdp_0/", "optimizer_0/"], True, False, None),
        (["global_step2/"], False, True, None),
        (["optimizer.pt"], True, False, "is of a run of whole weights, and this one is with FSDP"),
        (["pytorch_model_fsdp.bin"], False, False, "is of a run with FSDP, and this one is of whole weights"),
        (["global_step2/"], True, False, "is of a run with DeepSpeed, and this one is with FSDP"),
    ],
)
def test_a_checkpoint_is_gone_on_from_as_its_weights_were_cut(tmp_path, files, fsdp, deepspeed, told):
    for name in files:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    trainer = SimpleNamespace(is_fsdp_enabled=fsdp, is_deepspeed_enabled=deepspeed)
    if told is None:
        assert check_goes_on(trainer, tmp_path) is None
    else:
        with pytest.raises(ValueError, match=f"{told}, .*--model"):
            check_goes_on(trainer, tmp_path)


def test_the_order_of_data_is_that_of_a_step_however_many_processes_share_it():
    def order(processes, batch, strategy="random"):
        args = SimpleNamespace(
            train_sampling_strategy=strategy, data_seed=1, gradient_accumulation_steps=1, world_size=processes,
            train_batch_size=batch,
        )  # fmt: skip
        dataset = type("Rows", (list,), {"lengths": [3, 4], "groups": [0, 1]})([0, 1])
        collator = SimpleNamespace(share_prefix=False, encoder=SimpleNamespace(max_length=None))
        trainer = SimpleNamespace(args=args, train_dataset=dataset, data_collator=collator, planned=None)
        return order_of(trainer, DataArguments(dataset="x"), EfficiencyArguments())

    assert change_of_order(order(1, 8), order(4, 2)) == ""
    assert "conversations of a step=16 (it had 8)" in change_of_order(order(1, 8), order(4, 4))
    assert "processes=4 (it had 1)" in change_of_order(order(1, 8, "group_by_length"), order(4, 2, "group_by_length"))


def test_weights_are_cut_by_the_second_version_and_looked_at(monkeypatch):
    plugin = SimpleNamespace(fsdp_version=1)
    trainer = SimpleNamespace(
        is_fsdp_enabled=True, accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    )
    with pytest.raises(ValueError, match="fsdp_version is 1.*set fsdp_version: 2"):
        cut_at_blocks(trainer)
    trainer.model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="FSDP was asked for, and no weight is cut"):
        SeesWeightsCut(trainer).on_train_begin(None, None, None)


def test_weights_are_cut_at_the_blocks_of_every_backbone(folders):
    found = {
        pair: block_names(tiny.compose(*folders(pair), strategy)[0]) for pair, (*_, strategy) in tiny.PAIRS.items()
    }
    assert found == {
        "vit-gpt2": ["GPT2Block", "ViTLayer"], "siglip-llama": ["LlamaDecoderLayer", "SiglipEncoderLayer"]
    }  # fmt: skip
    vision = tuple(str(folders(pair)[0]) for pair in tiny.PAIRS)
    both = VLMForConditionalGeneration.from_backbones(vision, str(folders("siglip-llama")[1]))
    assert block_names(both) == ["LlamaDecoderLayer", "SiglipEncoderLayer", "ViTLayer"]
