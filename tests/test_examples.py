"""The examples run as a user runs them, on a file of the user's and on nothing named, and what they save is a model."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor

import train_pretrain
from evaluation_vlm.__main__ import main as evaluate
from evaluation_vlm.metrics import named_metrics
from processing import VLMDataCollator, read_rows
from processing.reading.sources import open_source
from tests import tiny
from tests.isolated import run_without_package


EXAMPLES = Path(__file__).parents[1] / "examples"
QUICK = ["--use_cpu", "--bf16", "False", "--per_device_train_batch_size", "4", "--disable_tqdm", "True"]
ASK = """
from pathlib import Path
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

assert not importable, importable
content = [{"type": "image", "image": Image.new("RGB", (40, 30), "red")}, {"type": "text", "text": "what is it?"}]
for folder in sys.argv[3:]:
    is_adapter = (Path(folder) / "adapter_config.json").exists()
    whole = sys.argv[2] if is_adapter else folder
    model = AutoModelForImageTextToText.from_pretrained(whole, trust_remote_code=True)
    if is_adapter:
        model = PeftModel.from_pretrained(model, folder)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
                                           tokenize=True, return_dict=True, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    print("generated", out.shape[1] - inputs["input_ids"].shape[1])
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory, folders):
    """A saved checkpoint, and rows of each kind beside their images."""
    folder = tmp_path_factory.mktemp("examples")
    model, processor = tiny.compose(*folders("vit-gpt2"), "cls")
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    said = {role: lambda text, role=role: [{"role": role, "content": text}] for role in ("user", "assistant")}
    rows = {"dialogues": [], "captions": [], "preferences": [], "tasks": []}
    for number in range(8):
        name, answer = f"{number}.png", "a red circle " * (1 + number % 3)
        Image.new("RGB", (40, 30), (30 * number, 80, 40)).save(folder / name)
        rows["dialogues"].append({"image": name, "question": "what is it?", "answer": answer})
        rows["captions"].append({"image": name, "caption": answer})
        prompt = {"prompt": said["user"]("what is it?")}
        answers = {"chosen": said["assistant"](answer), "rejected": said["assistant"]("no")}
        rows["preferences"].append({"images": [name], **prompt, **answers})
        rows["tasks"].append({"image": name, **prompt, "answer": answer})
    for kind, lines in rows.items():
        (folder / f"{kind}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def run(monkeypatch):
    """`run("lora", ...)` runs the script with these arguments, from its own folder."""

    def run(name, *argv):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv), *QUICK])
        monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
        monkeypatch.delitem(sys.modules, "rows", raising=False)
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        monkeypatch.delitem(sys.modules, "rows")

    return run


def weights(folder):
    file = folder / "model.safetensors"
    return load_file(file if file.exists() else folder / "adapter_model.safetensors")


def test_lora_on_a_saved_folder_trains_adapters_and_the_projector_and_loads_elsewhere(made, run, tmp_path):
    out = tmp_path / "lora"
    run("lora", "--model", made / "model", "--dataset", made / "dialogues.jsonl", "--output_dir", out, "--max_steps", 2)
    before, after = weights(made / "model"), weights(out)
    assert all("lora_" in name or "multi_modal_projector" in name for name in after)
    assert all(".language_model." in name for name in after if "lora_" in name)
    assert any(tensor.any() for name, tensor in after.items() if "lora_B" in name)
    for name, tensor in before.items():
        if "multi_modal_projector" in name and "weight" in name:
            assert not tensor.equal(after[f"base_model.model.{name}"])
    assert run_without_package(ASK, tmp_path, str(made / "model"), str(out)).count("generated 3") == 1


def test_lora_has_data_of_its_own(made, run, tmp_path):
    run("lora", "--model", made / "model", "--output_dir", tmp_path, "--max_steps", 1)
    assert weights(tmp_path)


def test_two_backbones_are_joined_and_taught_by_the_librarys_trainer_and_what_it_saves_answers(
    made, run, folders, tmp_path
):
    vision, text = folders("siglip-llama")
    data = ["--dataset", made / "dialogues.jsonl", "--output_dir", tmp_path / "plain", "--max_steps", 2]
    run("plain_trainer", "--vision_model", vision, "--text_model", text, *data)
    after, before = weights(tmp_path / "plain"), load_file(text / "model.safetensors")
    kept = "model.embed_tokens.weight"
    rows = len(before[kept])
    assert after[kept.replace("model.", "model.language_model.")][:rows].equal(before[kept])
    assert run_without_package(ASK, tmp_path, "none", str(tmp_path / "plain")).count("generated 3") == 1


def test_a_projector_of_ones_own_trains_and_travels(made, folders, tmp_path):
    vision, text = folders("siglip-llama")
    train_pretrain.main([
        "--vision_model", str(vision), "--text_model", str(text), "--dataset", str(made / "captions.jsonl"),
        "--projector_type", str(EXAMPLES / "own_projector.py:MeanAndMax"), "--projector_settings", "scale=2",
        "--output_dir", str(tmp_path / "out"), "--max_steps", "1", *QUICK,
    ])  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["projector_type"] == "own_projector.MeanAndMax"
    assert (tmp_path / "out" / "own_projector.py").read_text() == (EXAMPLES / "own_projector.py").read_text()
    assert "model.multi_modal_projector.linear.weight" in weights(tmp_path / "out")


def test_a_metric_of_ones_own_scores_answers(made, tmp_path):
    (metric,) = named_metrics(f"{EXAMPLES / 'own_metric.py'}:word_f1")
    answers = {"a red circle": 1.0, "A small red circle": 6 / 7, "blue": 0.0, "": 0.0}
    question = SimpleNamespace(references=("nothing", "a red circle"))
    scores = metric.score([SimpleNamespace(answer=answer, question=question) for answer in answers])
    assert scores.each == pytest.approx(list(answers.values()))
    out = tmp_path / "judged"
    judged = ["--dataset", str(made / "dialogues.jsonl"), "--metrics", f"{EXAMPLES / 'own_metric.py'}:word_f1"]
    assert evaluate([str(made / "model"), *judged, "--max_new_tokens", "4", "--output_dir", str(out)]) == 0
    assert "word_f1" in (out / "results.json").read_text()


def test_a_layout_of_ones_own_becomes_rows_that_train(made, tmp_path):
    box = {"box": [10, 0, 4, 4]}
    boxes = {
        "0.png": [{"label": "\u732b", **box}, {"label": "car", "box": [1, 0, 4, 4]}],
        "1.png": [{"label": "car", **box}] * 2,
    }
    (tmp_path / "boxes.json").write_text(json.dumps(boxes | {"2.png": []}))
    own = runpy.run_path(str(EXAMPLES / "own_layout.py"))
    own["main"]([str(tmp_path / "boxes.json"), "--out", str(tmp_path / "rows")])
    items = read_rows(open_source(str(tmp_path / "rows" / "dialogues.jsonl")).rows, image_dir=made)
    said = [[message["content"] for message in item["messages"]] for item in items]
    assert len(items) == 2 and "2" in str(said[1]) and "Which is further to the left, car or \u732b?" in str(said[0])
    assert json.loads((tmp_path / "rows" / "captions.jsonl").read_text().splitlines()[1])["caption"] == "2 x car."
    processor = AutoProcessor.from_pretrained(made / "model", trust_remote_code=True)
    batch = VLMDataCollator(processor)(items)
    learned = [processor.decode(row[row != -100]).strip() for row in batch["labels"]]
    assert "car" in learned[0] and learned[1].startswith("2")


NEEDS_TRL = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 18),
    reason="TRL masks answers about images from 5.18 on",
)
ROWS = {"trl_sft": "dialogues", "trl_dpo": "preferences", "trl_grpo": "tasks"}


@NEEDS_TRL
def test_trls_trainers_take_a_saved_folder_and_a_users_rows_and_what_they_save_answers(made, run, tmp_path):
    pytest.importorskip("trl", minversion="1.16")
    before = weights(made / "model")
    for name, rows in ROWS.items():
        torch.manual_seed(0)
        data = ["--dataset_name", made / f"{rows}.jsonl", "--output_dir", tmp_path / name, "--max_steps", 2]
        run(name, "--model_name_or_path", made / "model", *data, "--learning_rate", 1e-3)
        after = weights(tmp_path / name)
        moved = {key for key in before if not before[key].equal(after[key])}
        for part in ("multi_modal_projector", "language_model", "vision_tower"):
            assert any(part in key for key in moved), (name, part)
    saved = [str(tmp_path / name) for name in ROWS]
    assert run_without_package(ASK, tmp_path, str(made / "model"), *saved).count("generated 3") == len(saved)


@NEEDS_TRL
def test_trls_options_of_peft_put_adapters_on_the_language_model(made, run, tmp_path):
    pytest.importorskip("trl", minversion="1.16")
    peft = ["--use_peft", "--lora_target_modules", ".*language_model.*c_attn", "--max_steps", 1]
    run("trl_sft", "--model_name_or_path", made / "model", "--output_dir", tmp_path, *peft)
    assert all(".language_model." in name and "lora_" in name for name in weights(tmp_path))


@NEEDS_TRL
@pytest.mark.parametrize("name", ROWS)
def test_trls_examples_have_data_of_their_own(made, run, tmp_path, name):
    pytest.importorskip("trl", minversion="1.16")
    run(name, "--model_name_or_path", made / "model", "--output_dir", tmp_path, "--max_steps", 1)
    assert weights(tmp_path)
