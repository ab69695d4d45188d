"""The two scripts, end to end on tiny backbones: what they leave behind, how they resume, and what they refuse."""

import html
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import train_pretrain
import train_sft
from tests import tiny
from training_vlm.settings import DEFAULT_RECIPE, parse_arguments
from training_vlm.stages import PRETRAIN, SFT


ROOT = Path(__file__).parents[1]
QUICK = [
    "--use_cpu", "--bf16", "False", "--max_steps", "2", "--per_device_train_batch_size", "4", "--max_new_tokens", "4",
    "--save_strategy", "no", "--logging_steps", "1", "--dataloader_num_workers", "0", "--disable_tqdm", "True",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Captions and dialogues with images in a folder, as JSON lines."""
    import numpy as np

    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    captions, dialogues = [], []
    for number in range(12):
        pixels = random.integers(0, 256, (24, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        name = f"{number}.png"
        captions.append({"image": name, "caption": [f"a picture number {number}.", "a small red circle."]})
        turns = [("user", "what is in the picture?"), ("assistant", f"there are {number} objects")] * (1 + number % 2)
        dialogues.append({"images": [name], "messages": [{"role": r, "content": c} for r, c in turns]})
    for name, rows in (("captions", captions), ("dialogues", dialogues)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def source(data):
    """`source("captions")` are the arguments that name that data."""
    return lambda name: ["--dataset", str(data / f"{name}.jsonl"), "--image_dir", str(data / "images")]


@pytest.fixture
def backbones(pair, folders):
    vision, text = folders(pair)
    return ["--vision_model", str(vision), "--text_model", str(text), "--vision_feature_select_strategy",
            tiny.PAIRS[pair][2]]  # fmt: skip


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


COMPLETE = {
    "config.json", "generation_config.json", "model.safetensors", "modeling_vlm.py", "configuration_vlm.py",
    "projector_vlm.py", "processing_vlm.py", "messages_vlm.py", "processor_config.json", "tokenizer.json",
    "chat_template.jinja", "README.md", "samples.png",
}  # fmt: skip


def test_a_stage_on_cached_features_saves_and_says_what_it_does_without(backbones, source, tmp_path, capsys):
    """In full precision: weights, losses and answers to the test questions, and the second run computes nothing."""
    aligned, found = str(tmp_path / "aligned"), {}
    train_pretrain.main([*backbones, *source("captions"), *QUICK, "--output_dir", aligned])
    for name, options in {
        "plain": [],
        "cached": ["--cache_vision_features", str(tmp_path / "cache")],
        "again": ["--cache_vision_features", str(tmp_path / "cache")],
    }.items():
        capsys.readouterr()
        train_sft.main([
            "--model", aligned, *source("dialogues"), *QUICK, "--train_split", "train[3:]",
            "--eval_split", "train[3:7]", "--test_split", "train[:3]", *options, "--output_dir", str(tmp_path / name),
        ])  # fmt: skip
        results = json.loads((tmp_path / name / "all_results.json").read_text())
        losses = [results[key] for key in ("train_loss", "eval_loss")]
        found[name] = capsys.readouterr().out, losses, weights(tmp_path / name)
    assert "12 images are to be computed" in found["cached"][0] and "no image is lacking" in found["again"][0]
    for name in ("cached", "again"):
        assert found[name][1] == pytest.approx(found["plain"][1], rel=1e-5)
        assert "exactly right" in found[name][0] and found[name][2].keys() == found["plain"][2].keys()
        for key, tensor in found["plain"][2].items():
            torch.testing.assert_close(found[name][2][key], tensor, rtol=1e-3, atol=1e-5)
            assert "vision_tower" not in key or torch.equal(found[name][2][key], tensor)


def test_two_backbones_become_an_assistant_in_two_stages(backbones, source, tmp_path, capsys, image):
    aligned, assistant = str(tmp_path / "aligned"), str(tmp_path / "assistant")
    train_pretrain.main([*backbones, *source("captions"), *QUICK, "--output_dir", aligned])
    said = capsys.readouterr().out
    assert "Stage 1" in said and f"python -m train_sft --model {aligned}" in said
    assert {path.name for path in Path(aligned).iterdir()} >= COMPLETE

    train_sft.main([
        "--model", aligned, *source("dialogues"), *QUICK, "--tune_text", "last:1", "--eval_split", "train[:4]",
        "--test_split", "train[:3]", "--output_dir", assistant,
    ])  # fmt: skip
    said = capsys.readouterr().out
    assert "supervised" in said and "exactly right" in said and "inference_vlm.ask" in said
    assert {path.name for path in Path(assistant).iterdir()} >= COMPLETE
    assert Image.open(Path(assistant) / "samples.png").width > 100
    before, after = weights(aligned), weights(assistant)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("multi_modal_projector" in name for name in moved)
    assert not any("vision_tower" in name for name in moved)

    from inference_vlm.ask import main as ask

    image().save(tmp_path / "picture.png")
    assert ask([assistant, str(tmp_path / "picture.png"), "what is in the picture?"]) == 0
    assert ask([aligned, str(tmp_path / "picture.png")]) == 0
    capsys.readouterr()
    for option, value in (("--temperature", "-1"), ("--max_new_tokens", "0")):
        assert ask([aligned, str(tmp_path / "picture.png"), option, value]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and option[2:] in line
    settings = Path(aligned) / "generation_config.json"
    greedy = {"--temperature": "0", "--max_new_tokens": "8"}
    said = []
    for penalty in (1.0, 50.0):  # which a language model may ship
        settings.write_text(json.dumps({**json.loads(settings.read_text()), "repetition_penalty": penalty}))
        assert ask([aligned, str(tmp_path / "picture.png"), *itertools.chain(*greedy.items())]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_a_resumed_run_is_the_same_run(folders, source, tmp_path):
    vision, text = folders("vit-gpt2")
    common = ["--vision_model", str(vision), "--text_model", str(text), *source("captions"), *QUICK, "--max_steps", "6",
              "--save_strategy", "steps", "--save_steps", "2", "--tune_text", "full", "--caption_choice", "random",
              "--dataloader_num_workers", "1"]  # fmt: skip
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train_pretrain.main([*common, "--output_dir", str(whole)])
    # As `kill -9` during the saving of the last checkpoint leaves it: its state file is cut.
    for name in ("checkpoint-2", "checkpoint-4", "checkpoint-6"):
        shutil.copytree(whole / name, stopped / name)
    (stopped / "checkpoint-4" / "trainer_state.json").unlink()
    state = stopped / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    train_pretrain.main([*common, "--output_dir", str(stopped), "--resume_from_checkpoint", "last"])
    expected, found = weights(whole), weights(stopped)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert json.loads((stopped / "trainer_state.json").read_text())["global_step"] == 6


def test_two_runs_with_one_seed_are_the_same_run(folders, source, tmp_path):
    vision, text = folders("siglip-llama")
    common = ["--vision_model", str(vision), "--text_model", str(text), *source("captions"), *QUICK]
    for name in ("one", "two"):
        train_pretrain.main([*common, "--output_dir", str(tmp_path / name)])
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_built_in_data_set_runs_with_the_default_recipe(tmp_path, capsys):
    small = [
        "--max_steps", "2", "--lr_scheduler_type", "constant", "--max_samples", "200", "--max_eval_samples", "20",
        "--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "20", "--bf16", "False",
        "--max_new_tokens", "8",
    ]  # fmt: skip
    train_pretrain.main(["--config", str(DEFAULT_RECIPE), *small, "--output_dir", str(tmp_path / "one")])
    train_sft.main([
        "--config", "shapes", *small, "--max_test_samples", "20", "--model", str(tmp_path / "one"),
        "--output_dir", str(tmp_path / "two"),
    ])  # fmt: skip
    said = capsys.readouterr().out
    for kind in ("colour", "count", "exists", "place", "relation", "mean"):
        assert f"\n{kind}" in said
    assert "seen pairs" in said and "unseen pairs" in said


def test_the_seeds_stage_1_recipe_runs_on_a_stand_in(folders, tmp_path, image):
    vision, text = folders("vit-gpt2")
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    (root / "train2017").mkdir()
    for number in range(4):
        image(number).save(root / "train2017" / f"{number:012}.jpg")
    content = {
        "images": [{"id": n, "file_name": f"{n:012}.jpg"} for n in range(4)],
        "annotations": [{"id": n, "image_id": n % 4, "caption": f"a picture {n}"} for n in range(8)],
    }
    (root / "annotations" / "captions_train2017.json").write_text(json.dumps(content))
    out = tmp_path / "out"
    train_pretrain.main([
        "--config", "coco_vit_gpt2", "--vision_model", str(vision), "--text_model", str(text), "--dataset", str(root),
        "--output_dir", str(out), "--use_cpu", "--bf16", "False", "--num_train_epochs", "1",
    ])  # fmt: skip
    assert (out / "checkpoint-1" / "optimizer.pt").is_file()
    assert json.loads((out / "config.json").read_text())["projector_type"] == "gelu_norm"


def test_the_seeds_stage_2_recipe_runs_on_a_stand_in(folders, tmp_path, image):
    import datasets

    vision, text = folders("vit-gpt2")
    rows = {
        "image": [image(n) for n in range(5)],
        "caption": [[f"a picture {n}", "another caption"] for n in range(5)],
        "sentids": [[str(n)] for n in range(5)],
        "split": ["train"] * 5,
        "img_id": [str(n) for n in range(5)],
        "filename": [f"{n}.jpg" for n in range(5)],
    }
    features = datasets.Features({
        "image": datasets.Image(), "caption": datasets.List(datasets.Value("string")),
        "sentids": datasets.List(datasets.Value("string")), "split": datasets.Value("string"),
        "img_id": datasets.Value("string"), "filename": datasets.Value("string"),
    })  # fmt: skip
    (tmp_path / "flickr").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "flickr" / "test-0000.parquet")
    out = tmp_path / "out"
    train_sft.main([
        "--config", "flickr30k_vit_distilgpt2", "--vision_model", str(vision), "--text_model", str(text),
        "--dataset", str(tmp_path / "flickr"), "--output_dir", str(out), "--use_cpu", "--bf16", "False",
        "--card_samples", "True",
    ])  # fmt: skip
    saved = json.loads((out / "generation_config.json").read_text())
    assert saved["do_sample"] is True and saved["temperature"] == 0.9
    assert "[用户] 请描述这张图片。" in html.unescape((out / "README.md").read_text())


def test_the_seeds_recipes_say_what_the_seed_does():
    model, tuning, data, *_, training = parse_arguments(PRETRAIN, ["--config", "coco_vit_gpt2", "--use_cpu"])
    assert (model.vision_model, model.projector_type) == ("google/vit-base-patch16-224-in21k", "gelu_norm")
    assert (tuning.tune_vision, tuning.tune_text, data.max_length) == ("frozen", "last:2", 65)
    assert (training.learning_rate, training.lr_scheduler_type, training.max_grad_norm) == (1e-4, "cosine", 1.0)
    assert (training.num_train_epochs, training.per_device_train_batch_size) == (2, 8)
    assert (training.save_strategy, training.weight_decay) == ("epoch", 0.01)

    found = parse_arguments(SFT, ["--config", "flickr30k_vit_distilgpt2", "--use_cpu"])
    model, tuning, data, generation, *_, training = found
    assert (model.projector_type, model.vision_feature_select_strategy) == ("linear", "cls")
    assert tuning.freeze_embeddings and tuning.tune_vision == "frozen" and tuning.tune_text == "full"
    assert (data.max_samples, data.sample_seed, data.caption_choice, data.max_length) == (100, 42, "first", 128)
    assert data.prompt == "[用户] 请描述这张图片。\n[助手] " and data.dataset_revision == "refs/convert/parquet"
    assert (training.learning_rate, training.lr_scheduler_type, training.max_grad_norm) == (1e-5, "constant", 0)
    assert (training.num_train_epochs, training.weight_decay, generation.temperature) == (3, 0.01, 0.9)


def test_every_recipe_holds_only_known_settings():
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        for stage in (PRETRAIN, SFT):
            parse_arguments(stage, ["--config", str(recipe), "--output_dir", "somewhere", "--use_cpu"])


def test_the_command_line_wins_over_the_section_over_the_top_level(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({
        "learning_rate": 1e-3, "weight_decay": 0.1, "seed": 7, "output_dir": "a", "use_cpu": True,
        "sft": {"learning_rate": 2e-3, "weight_decay": 0.2},
    }))  # fmt: skip
    *_, pretrain = parse_arguments(PRETRAIN, ["--config", str(config)])
    assert (pretrain.learning_rate, pretrain.weight_decay, pretrain.seed) == (1e-3, 0.1, 7)
    *_, sft = parse_arguments(SFT, [f"--config={config}", "--weight_decay", "0.3"])
    assert (sft.learning_rate, sft.weight_decay, sft.seed) == (2e-3, 0.3, 7)


def test_a_run_leaves_what_the_user_had(source, folders, tmp_path, capsys):
    vision, text = folders("vit-gpt2")
    mine = tmp_path / "out" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    command = ["--vision_model", str(vision), "--text_model", str(text), *source("captions"), *QUICK, "--output_dir",
               str(mine.parent)]  # fmt: skip
    with pytest.raises(SystemExit):
        train_pretrain.main(command)
    assert "--overwrite_output_dir" in capsys.readouterr().err
    train_pretrain.main([*command, "--overwrite_output_dir"])
    assert mine.read_text() == "mine"


@pytest.fixture
def refused(capsys):
    """`refused(main, argv)` runs it, and gives the one line with which it ends."""

    def run(main, argv):
        with pytest.raises(SystemExit) as exit:
            main(argv)
        assert exit.value.code == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    return run


def test_bad_input_is_one_line_before_any_training(refused, source, folders, tmp_path, image, monkeypatch):
    vision, text = folders("vit-gpt2")
    out = ["--output_dir", str(tmp_path / "out"), *QUICK]
    both = ["--vision_model", str(vision), "--text_model", str(text)]
    captions, dialogues = source("captions"), source("dialogues")
    pretrain = train_pretrain.main

    line = refused(pretrain, [*both, "--dataset", str(tmp_path / "nowhere"), *out])
    assert str(tmp_path / "nowhere") in line
    line = refused(pretrain, [*both, "--dataset", "someone/nothing", *out])
    assert "someone/nothing" in line and "Hub" in line
    line = refused(pretrain, ["--vision_model", "someone/nothing", "--text_model", str(text), *captions, *out])
    assert "vision encoder 'someone/nothing'" in line
    line = refused(pretrain, ["--vision_model", str(vision), "--text_model", "someone/nothing", *captions, *out])
    assert "language model 'someone/nothing'" in line
    line = refused(pretrain, [*both, "--dataset", captions[1], "--image_dir", str(tmp_path), *out])
    assert "0.png" in line and "image_dir" in line
    longer = [json.loads(row) for row in Path(dialogues[1]).read_text().splitlines()][1::2]
    (tmp_path / "longer.jsonl").write_text("".join(json.dumps(row) + "\n" for row in longer))
    line = refused(pretrain, [*both, "--dataset", str(tmp_path / "longer.jsonl"), *dialogues[2:], *out])
    assert "stage 1" in line and "train_sft.py" in line
    line = refused(pretrain, [*both, *captions, *out, "--max_length", "4000"])
    assert "128" in line and "4000" in line
    line = refused(pretrain, [*both, *captions, *out, "--tune_text", "last:9"])
    assert "last:9" in line and "1 to 3" in line
    line = refused(pretrain, [*both, *captions, *out, "--projector_type", "magic"])
    assert "magic" in line and "gelu_norm" in line
    line = refused(pretrain, [*both, *captions, *out, "--learning_rat", "1"])
    assert "--learning_rate" in line
    line = refused(pretrain, [*both, *captions, *out, "--image_token", "a"])
    assert "'a'" in line and "image_token" in line
    line = refused(pretrain, [*both, *captions, *out, "--resume_from_checkpoint", "last"])
    assert "no checkpoint" in line
    line = refused(train_sft.main, ["--model", str(tmp_path / "stage1"), *dialogues, *out])
    assert "python -m train_pretrain" in line
    line = refused(train_sft.main, ["--model", str(text), *dialogues, *out])
    assert "gpt2 checkpoint" in line
    line = refused(train_sft.main, ["--model", str(text), "--text_model", str(text), *dialogues, *out])
    assert "text_model" in line

    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_text("this is no image")
    (broken / "rows.jsonl").write_text(json.dumps({"image": "a.png", "caption": "a"}) + "\n")
    line = refused(pretrain, [*both, "--dataset", str(broken / "rows.jsonl"), *out])
    assert "a.png" in line
    (broken / "captions.json").write_text(json.dumps({"images": [], "annotations": "none"}))
    line = refused(pretrain, [*both, "--dataset", str(broken / "captions.json"), *out])
    assert "captions.json" in line
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_a_processor_of_another_model_is_refused(refused, folders, source, tmp_path):
    model, _ = tiny.compose(*folders("vit-gpt2"), "patch")
    _, processor = tiny.compose(*folders("vit-gpt2"), "cls")
    model.save_pretrained(tmp_path / "mixed")
    processor.save_pretrained(tmp_path / "mixed")
    line = refused(
        train_sft.main,
        ["--model", str(tmp_path / "mixed"), *source("dialogues"), *QUICK, "--output_dir", str(tmp_path / "out")],
    )
    assert "image_seq_length is 1 in the processor and 16 in the model" in line


def test_an_image_that_breaks_later_is_one_line_from_a_worker_too(refused, folders, source, tmp_path, image):
    vision, text = folders("vit-gpt2")
    rows = []
    for number in range(300):
        rows.append({"image": f"{number}.png", "caption": "a"})
        image(number, size=(8, 8)).save(tmp_path / f"{number}.png")
    whole = (tmp_path / "299.png").read_bytes()
    (tmp_path / "299.png").write_bytes(whole[:60])  # the header is there, so only decoding finds out
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = refused(train_pretrain.main, [
        "--vision_model", str(vision), "--text_model", str(text), "--dataset", str(tmp_path / "rows.jsonl"), *QUICK,
        "--max_steps", "100", "--dataloader_num_workers", "1", "--output_dir", str(tmp_path / "out"),
        "--on_bad_sample", "error", "--eval_share", "0",
    ])  # fmt: skip
    assert line.startswith(f"error: {tmp_path / 'rows.jsonl'}, row 299: {tmp_path / '299.png'}: ")


def run_script(arguments, tmp_path, **environment):
    own = {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env = {**os.environ, **own, **environment}
    return subprocess.run(arguments, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)


def test_accelerate_launch_runs_a_script_and_nothing_warns(folders, source, tmp_path):
    vision, text = folders("siglip-llama")
    launcher = [
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no",
    ]  # fmt: skip
    script = [str(ROOT / "train_sft.py"), "--vision_model", str(vision), "--text_model", str(text)]
    done = run_script([*launcher, *script, *source("dialogues"), "--max_steps", "2", "--output_dir", "out"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert "warn" not in (done.stdout + done.stderr).lower(), done.stderr
