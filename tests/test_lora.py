"""Runs with adapters: what is on disk loads anywhere, goes on, merges, and nothing else than what was declared learns.

One run of the script is shared by many tests; fresh processes load all folders in one go.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file

import train_sft
from inference_vlm.update import update
from modeling_vlm import VLMForConditionalGeneration
from processing import VLMProcessor
from tests import tiny
from tests.isolated import run_without_package
from training_vlm.estimate import main as estimate


QUICK = [
    "--use_cpu", "--bf16", "False", "--per_device_train_batch_size", "4", "--max_new_tokens", "3",
    "--dataloader_num_workers", "0", "--disable_tqdm", "True", "--logging_steps", "1", "--learning_rate", "0.01",
    "--lr_scheduler_type", "linear", "--warmup_steps", "0",
]  # fmt: skip
FOUR = ["--max_steps", "4", "--save_steps", "2"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The arguments that name some dialogues."""
    folder, random, rows = tmp_path_factory.mktemp("data"), np.random.default_rng(0), []
    for number in range(12):
        Image.fromarray(random.integers(0, 256, (24, 36, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        turns = [("user", "what is in the picture?"), ("assistant", f"there are {number} objects")] * (1 + number % 2)
        rows.append({"images": [f"{number}.png"], "messages": [{"role": r, "content": c} for r, c in turns]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--dataset", str(folder / "rows.jsonl"), "--image_dir", str(folder)]


@pytest.fixture(scope="module")
def trained(folders, source, tmp_path_factory):
    """`trained("vit-gpt2")` is the folder of a run of four steps: both backbones by adapters, the projector whole."""
    done = {}

    def get(pair):
        if pair not in done:
            done[pair] = tmp_path_factory.mktemp("run") / pair
            vision, text = folders(pair)
            backbones = ["--vision_model", str(vision), "--text_model", str(text)]
            if pair == "vit-gpt2":
                backbones += ["--vision_feature_select_strategy", "cls"]
            how = ["--tune_text", "lora", "--tune_vision", "lora", *FOUR, "--output_dir", str(done[pair])]
            train_sft.main(source + QUICK + backbones + how)
        return done[pair]

    return get


@pytest.fixture(scope="module")
def first(trained):
    """The run of ViT and GPT-2."""
    return trained("vit-gpt2")


def batch_of(processor):
    image = Image.fromarray(np.random.default_rng(5).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    batch = tiny.collate(processor, [tiny.dialogue("what is it?", "a cat", image)])
    return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}


@torch.no_grad()
def logits_of(model, inputs):
    return model.eval()(**inputs).logits


def by_hand(folder):
    """The model of an adapter's folder: its base, and LoRA's two matrices multiplied into it, without peft."""
    base = next(place for place in (folder / "base", folder.parent / "base") if place.is_dir())
    model = VLMForConditionalGeneration.from_pretrained(base)
    weights, own = load_file(folder / "adapter_model.safetensors"), dict(model.named_parameters())
    settings = json.loads((folder / "adapter_config.json").read_text())
    scale = settings["lora_alpha"] / settings["r"]
    for name, weight in weights.items():
        name = name.removeprefix("base_model.model.")
        if name.endswith(".lora_A.weight"):
            change = scale * weights["base_model.model." + name.replace("lora_A", "lora_B")] @ weight
            target = own[name.replace(".lora_A", "")]
            target.data += change if target.shape == change.shape and "c_" not in name else change.T
        elif "lora_" not in name:
            own[name].data.copy_(weight)
    return model


@pytest.mark.parametrize("pair", tiny.PAIRS)
def test_a_checkpoint_is_the_adapter_times_its_base_by_every_way_of_loading(trained, pair):
    run = trained(pair)
    for folder in (run / "checkpoint-2", run / "checkpoint-4", run):
        inputs = batch_of(VLMProcessor.from_pretrained(folder))
        expected = logits_of(by_hand(folder), inputs)
        loaded = VLMForConditionalGeneration.from_pretrained(folder)
        merged = VLMForConditionalGeneration.from_pretrained(folder, merge_adapter=True)
        base = VLMForConditionalGeneration.from_pretrained(run / "base")
        assert (logits_of(base, inputs) - expected).abs().max() > 1e-3
        for model in (loaded, merged, PeftModel.from_pretrained(base, folder)):
            torch.testing.assert_close(logits_of(model, inputs), expected, rtol=1e-5, atol=1e-5)
        assert not [name for name, _ in merged.named_parameters() if "lora_" in name]


@pytest.mark.parametrize("pair", tiny.PAIRS)
def test_a_checkpoint_holds_what_learned_and_nothing_that_did_not(trained, pair):
    run = trained(pair)
    names = {name.removeprefix("base_model.model.") for name in load_file(run / "adapter_model.safetensors")}
    beside = {name for name in names if ".lora_" not in name}
    assert beside == {name for name in own_names(run / "base") if ".multi_modal_projector." in name}
    for part in ("vision_tower", "language_model"):
        assert any(f".{part}." in name and name.endswith("lora_B.weight") for name in names)
    assert not (run / "model.safetensors").exists() and not (run / "checkpoint-2" / "model.safetensors").exists()
    assert (run / "adapter_model.safetensors").stat().st_size < (run / "base" / "model.safetensors").stat().st_size


def own_names(folder):
    return dict(VLMForConditionalGeneration.from_pretrained(folder).named_parameters())


CHILD = """
import json
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

work, names = Path(sys.argv[1]), json.loads(sys.argv[2])
torch.set_num_threads(1)
inputs, found = load_file(work / "inputs.safetensors"), {"importable": importable}
for name in names:
    folder = work / name
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "duet_vlm"
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    base = next(place for place in (folder / "base", folder.parent / "base") if place.is_dir())
    adapted = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(base, trust_remote_code=True), folder
    )
    models = {"peft": adapted}
    for kind in ("AutoModel", "AutoModelForImageTextToText", "AutoModelForCausalLM"):
        models[kind] = getattr(transformers, kind).from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        found[name] = {kind: model.eval()(**inputs).logits.tolist() for kind, model in models.items()}
    written = models["AutoModel"].generate(**inputs, do_sample=False, max_new_tokens=3)
    found[name]["written"] = written.tolist()
(work / "found.json").write_text(json.dumps(found))
"""


def test_a_run_that_was_moved_loads_in_a_process_without_this_package(first, tmp_path):
    from safetensors.torch import save_file

    shutil.copytree(first, tmp_path / "moved" / "run")
    inputs = batch_of(VLMProcessor.from_pretrained(first))
    save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, tmp_path / "inputs.safetensors")
    names = ["moved/run/checkpoint-2", "moved/run"]
    run_without_package(CHILD, tmp_path, json.dumps(names))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.pop("importable") == []
    for name in names:
        folder = first if name.endswith("run") else first / "checkpoint-2"
        expected, found[name]["written"] = logits_of(by_hand(folder), inputs), None
        for kind in ("peft", "AutoModel", "AutoModelForImageTextToText", "AutoModelForCausalLM"):
            torch.testing.assert_close(torch.tensor(found[name][kind]), expected, rtol=1e-5, atol=1e-5)


def test_a_resumed_run_is_the_same_run(first, source, folders, tmp_path):
    shutil.copytree(first, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    (tmp_path / "run" / "adapter_model.safetensors").unlink()
    vision, text = folders("vit-gpt2")
    named = ["--vision_model", str(vision), "--text_model", str(text), "--vision_feature_select_strategy", "cls"]
    how = ["--tune_text", "lora", "--tune_vision", "lora", *FOUR, "--output_dir", str(tmp_path / "run")]
    train_sft.main(source + QUICK + named + how + ["--resume_from_checkpoint", "last"])
    again = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    assert again == (first / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "change, said",
    [
        (["--lora_r", "4"], "holds adapters with lora_r=16, and this run has 4"),
        (["--lora_target_modules", "c_attn"], "lora_target_modules"),
        (["--tune_text", "full", "--tune_vision", "frozen"], "holds an adapter, and this run learns whole weights"),
        (["--projector_type", "linear"], "was made of another model, or joined otherwise"),
    ],
)
def test_a_run_with_another_policy_or_model_does_not_go_on(first, source, folders, capsys, change, said):
    vision, text = folders("vit-gpt2")
    named = ["--vision_model", str(vision), "--text_model", str(text), "--vision_feature_select_strategy", "cls"]
    how = ["--tune_text", "lora", "--tune_vision", "lora", *FOUR, "--output_dir", str(first)]
    with pytest.raises(SystemExit):
        train_sft.main(source + QUICK + named + how + ["--resume_from_checkpoint", "last", *change])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error


def test_a_checkpoint_that_was_set_aside_has_its_base(first, tmp_path):
    moved = tmp_path / "run" / "_set_aside-1" / "checkpoint-2"
    shutil.copytree(first / "base", tmp_path / "run" / "base")
    shutil.copytree(first / "checkpoint-2", moved)
    inputs = batch_of(VLMProcessor.from_pretrained(first))
    found = [VLMForConditionalGeneration.from_pretrained(folder) for folder in (first / "checkpoint-2", moved)]
    assert torch.equal(*(logits_of(model, inputs) for model in found))


def test_a_run_that_holds_an_adapter_as_it_is_goes_on(first, source, tmp_path):
    out = tmp_path / "held"
    held = ["--model", str(first), "--tune_text", "frozen", "--tune_vision", "frozen", "--output_dir", str(out)]
    for steps in ("1", "2"):
        train_sft.main(source + QUICK + held + ["--max_steps", steps, "--resume_from_checkpoint", "auto"])
    before, after = (load_file(run / "adapter_model.safetensors") for run in (first, out / "checkpoint-2"))
    assert {name for name in before if torch.equal(before[name], after[name])} == {n for n in before if "lora" in n}


def test_the_next_run_goes_on_with_the_adapter_or_with_what_it_merges_to(first, source, tmp_path):
    train_sft.main(source + QUICK + ["--model", str(first), "--max_steps", "1", "--output_dir", str(tmp_path / "on")])
    assert {path.name for path in (tmp_path / "on").iterdir()} >= {"base", "adapter_model.safetensors"}
    before, after = (load_file(run / "adapter_model.safetensors") for run in (first, tmp_path / "on"))
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before if "lora_B" in name)
    same = own_names(first / "base"), own_names(tmp_path / "on" / "base")
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])
    how = ["--merge_first", "--tune_text", "last:1", "--max_steps", "1", "--output_dir", str(tmp_path / "merged")]
    train_sft.main(source + QUICK + ["--model", str(first), *how])
    merged, found = own_names(tmp_path / "merged"), dict(by_hand(first).named_parameters())
    still = [name for name in merged if ".language_model.h." in name and ".h.2." not in name or ".vision_tower" in name]
    for name in still:
        torch.testing.assert_close(merged[name], found[name], rtol=0, atol=1e-6)
    assert not (tmp_path / "merged" / "base").exists()


@pytest.mark.parametrize(
    "asked, said",
    [
        (["--tune_text", "full"], "tune_text=full: the adapter in"),
        (["--tune_text", "lora", "--lora_r", "4"], "lora_r: the adapter in"),
        (["--tune_text", "lora", "--load_in_4bit", "--load_in_8bit"], "both given"),
    ],
)
def test_what_cannot_be_with_an_adapter_is_one_line(first, source, tmp_path, capsys, asked, said):
    with pytest.raises(SystemExit):
        train_sft.main(source + QUICK + ["--model", str(first), "--output_dir", str(tmp_path / "no"), *asked])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error


def test_an_adapter_without_its_base_is_one_line_before_data_are_read(first, tmp_path, capsys):
    shutil.copytree(first / "checkpoint-2", tmp_path / "alone")
    with pytest.raises(SystemExit):
        train_sft.main(["--model", f"{tmp_path}/alone", "--dataset", "no/such", "--output_dir", f"{tmp_path}/o"])
    assert "has no base" in capsys.readouterr().err


def test_a_loaded_adapter_is_saved_with_its_base(first, tmp_path):
    loaded = VLMForConditionalGeneration.from_pretrained(first / "checkpoint-2")
    loaded.save_pretrained(tmp_path / "saved")
    shutil.move(tmp_path / "saved", tmp_path / "moved")
    assert str(first) not in (tmp_path / "moved" / "adapter_config.json").read_text()
    inputs = batch_of(VLMProcessor.from_pretrained(first))
    found = VLMForConditionalGeneration.from_pretrained(tmp_path / "moved")
    assert torch.equal(logits_of(found, inputs), logits_of(loaded, inputs))


def test_an_adapter_beside_another_base_than_its_own_is_a_line(first, tmp_path):
    """As an earlier adapter that stays where a later run has begun."""
    shutil.copytree(first, tmp_path / "run")
    source = tmp_path / "run" / "base" / "base_source.json"
    source.write_text(json.dumps({**json.loads(source.read_text()), "id": "another"}))
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        with pytest.raises(ValueError, match="learned on another base than the one in"):
            VLMForConditionalGeneration.from_pretrained(folder)


def test_update_gives_an_adapter_and_its_base_the_code_of_today(first, tmp_path):
    shutil.copytree(first, tmp_path / "run")
    for folder in (tmp_path / "run", tmp_path / "run" / "base", tmp_path / "run" / "checkpoint-2"):
        (folder / "loss_vlm.py").write_text("old")
    update(tmp_path / "run")
    code = (Path(__file__).parents[1] / "modeling_vlm" / "loss_vlm.py").read_text()
    for folder in (tmp_path / "run", tmp_path / "run" / "base", tmp_path / "run" / "checkpoint-2"):
        assert (folder / "loss_vlm.py").read_text() == code


def first_settings(folders, pair="vit-gpt2"):
    """The arguments of a run of adapters on new backbones, without dropout."""
    vision, text = folders(pair)
    named = ["--vision_model", str(vision), "--text_model", str(text), "--tune_text", "lora", "--lora_dropout", "0"]
    return named + (["--vision_feature_select_strategy", "cls"] if pair == "vit-gpt2" else [])


def learned(run):
    return load_file(run / "adapter_model.safetensors")


# Plain descent, and a model without dropout: Adam makes much of a gradient that is rounding alone.
EXACT = ["--optim", "sgd", "--learning_rate", "1", "--train_sampling_strategy", "sequential"]


@pytest.mark.slow
def test_savings_and_checkpointing_change_nothing_of_what_adapters_learn(folders, source, tmp_path):
    settings = source + QUICK + first_settings(folders, "siglip-llama") + EXACT
    settings += ["--max_steps", "3", "--save_strategy", "no"]
    ways = {
        "padded": ["--padding_free", "off"],
        "packed": ["--padding_free", "on"],
        "shared": ["--share_prefix", "on"],
        "checkpointed": ["--gradient_checkpointing", "True"],
        "cached": ["--cache_vision_features", str(tmp_path / "cache")],
    }
    for name, way in ways.items():
        train_sft.main(settings + way + ["--output_dir", str(tmp_path / name)])
    expected = learned(tmp_path / "padded")
    for name in ways:
        found = learned(tmp_path / name)
        assert found.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=2e-6, msg=f"{name}: {key}")


def test_the_best_checkpoint_of_adapters_is_what_is_saved_in_the_end(folders, source, tmp_path):
    how = ["--eval_share", "0.2", "--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1"]
    best = ["--load_best_model_at_end", "True", "--metric_for_best_model", "eval_loss", "--learning_rate", "3"]
    run = tmp_path / "run"
    train_sft.main(
        source + QUICK + first_settings(folders) + how + best + ["--max_steps", "3", "--output_dir", str(run)]
    )
    logs = json.loads((run / "trainer_state.json").read_text())["log_history"]
    losses = {line["step"]: line["eval_loss"] for line in logs if "eval_loss" in line}
    step = min((1, 2, 3), key=losses.__getitem__)
    assert len({losses[n] for n in (1, 2, 3)}) == 3
    same, found = learned(run / f"checkpoint-{step}"), learned(run)
    assert all(torch.equal(same[name], found[name]) for name in same)


def test_an_adapter_on_an_encoder_whose_features_are_cached_is_refused(folders, source, tmp_path, capsys):
    how = ["--tune_vision", "lora", "--cache_vision_features", str(tmp_path / "cache")]
    with pytest.raises(SystemExit):
        train_sft.main(source + QUICK + first_settings(folders) + how + ["--output_dir", str(tmp_path / "run")])
    assert "tune_vision=lora: the features of an encoder that learns cannot be cached" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_learn_the_adapters_that_one_does(folders, source, tmp_path):
    root = Path(__file__).parents[1]
    settings = source + first_settings(folders, "siglip-llama") + QUICK + EXACT
    settings += ["--max_steps", "3", "--save_steps", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, way in {"plain": [], "checkpointed": ["--gradient_checkpointing", "True"]}.items():
        one, two = tmp_path / f"{name}-one", tmp_path / f"{name}-two"
        train_sft.main(settings + way + ["--output_dir", str(one)])
        halved = ["--per_device_train_batch_size", "2", "--ddp_backend", "gloo", "--output_dir", str(two)]
        command = launch + [str(root / "train_sft.py"), *settings, *way, *halved]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "2 x 1 x 2 processes" in done.stdout
        expected, found = learned(one), learned(two)
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=2e-6)
        assert (two / "base").is_dir() and (two / "checkpoint-2" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_estimate_knows_adapters_and_few_bits(first, source, folders, capsys):
    def weights(*how):
        estimate(source + ["--output_dir", "none", "--bf16", "False", *how])
        said = capsys.readouterr().out
        [held] = re.findall(r"^weights {2,}([\d.]+) kB", said, re.MULTILINE)
        [states] = re.findall(r"^optimizer {2,}([\d.]+) kB", said, re.MULTILINE)
        table = {part: int(n.replace(",", "")) for part, n in re.findall(r"^(\w[\w ]+?)  +([\d,]+) ", said, re.M)}
        return float(held), float(states), table

    vision, text = folders("siglip-llama")
    new = ["--vision_model", str(vision), "--text_model", str(text)]
    whole, _, table = weights(*new)
    lora, states, adapted = weights(*new, "--tune_text", "lora")
    added = adapted["language model"] - table["language model"]
    assert lora - whole == pytest.approx(4 * added / 1e3, abs=0.2)
    assert states == pytest.approx(8 * (added + table["projector"]) / 1e3, abs=1)
    linear = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)  # of three blocks
    few, *_ = weights(*new, "--tune_text", "lora", "--load_in_4bit")
    assert lora - few == pytest.approx(linear * (4 - 0.5 - 65 / 64 / 64) / 1e3, abs=0.2)
    few, *_ = weights(*new, "--tune_text", "lora", "--load_in_8bit")
    assert lora - few == pytest.approx(linear * 3 / 1e3, abs=4)  # and a scale for each row
    own, _, table = weights("--model", str(first))
    names = {name for name in load_file(first / "adapter_model.safetensors") if "lora_" in name}
    count = sum(load_file(first / "adapter_model.safetensors")[name].numel() for name in names)
    plain = sum(p.numel() for p in VLMForConditionalGeneration.from_pretrained(first / "base").parameters())
    assert sum(table.values()) == plain + count
