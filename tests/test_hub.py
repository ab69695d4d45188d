"""What a run leaves on the Hub: models that load by name, a card that the Hub takes, and nothing of the machine."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainingArguments

import train_pretrain
from evaluation_vlm.judgement import judge
from evaluation_vlm.metrics import METRICS
from evaluation_vlm.predictions import Prediction
from evaluation_vlm.questions import Question
from inference_vlm.answering import Prompt
from processing.batching.account import Account
from processing.data_error_vlm import DuetError
from tests import tiny
from tests.fake_hub import faults_of_card, hub_environment, start_fake_hub, told_in
from tests.isolated import WITHOUT_PACKAGE
from tests.test_trainer import trainer_of
from training_vlm import model_card
from training_vlm.learning.checkpoints import fault
from training_vlm.learning.publishing import was_pushed
from training_vlm.model_card import RunCard
from training_vlm.settings import parse_arguments
from training_vlm.stages import SFT


ROOT = Path(__file__).parents[1]
USER, HOST, TOKEN = "xanthippe", "zephyr-node-17", "hf_NobodyElseMayReadThisToken00001"

RUN = f"""
import socket
socket.gethostname = lambda: "{HOST}"
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import train_pretrain, train_sft
from modeling_vlm import VLMForConditionalGeneration
from processing import VLMProcessor
from training_vlm.estimate import main as estimate

home = Path.home()
common = [
    "--use_cpu", "--bf16", "False", "--per_device_train_batch_size", "4", "--max_new_tokens", "4", "--logging_steps",
    "1", "--dataloader_num_workers", "0", "--disable_tqdm", "True", "--push_to_hub", "--hub_token", "{TOKEN}",
    "--overwrite_output_dir", "--image_dir", str(home / "my pictures"), "--save_strategy", "steps", "--save_steps", "1",
]
train_pretrain.main([
    *common, "--vision_model", "maker/vit", "--text_model", "maker/lm", "--vision_token", "{TOKEN}", "--dataset",
    str(home / "captions.jsonl"), "--output_dir", str(home / "aligned"), "--max_steps", "3", "--hub_strategy",
    "all_checkpoints", "--hub_always_push", "True",
])
train_sft.main([
    *common, "--model", "me/aligned", "--trust_remote_code", "--dataset", str(home / "dialogues.jsonl"), "--eval_split",
    "train[:4]", "--test_split", "train[:3]", "--output_dir", str(home / "assistant"), "--max_steps", "2",
    "--hub_model_id", "me/chat", "--hub_revision", "try", "--eval_strategy", "steps", "--eval_steps", "1",
    "--load_best_model_at_end", "True", "--card_samples", "True", "--tune_text", "last:1",
    "--hub_strategy", "checkpoint",
])
for name, begun in (("own-base", ["--vision_model", "maker/vit", "--text_model", "maker/lm"]),
                    ("hub-base", ["--model", "me/aligned", "--trust_remote_code"])):
    train_sft.main([
        *common, *begun, "--dataset", str(home / "dialogues.jsonl"), "--output_dir", str(home / name), "--max_steps",
        "2", "--hub_strategy", "checkpoint", "--tune_text", "lora", "--learning_rate", "0.01", "--lora_r", "4",
    ])
train_sft.main([
    *common, "--model", "me/own-base", "--trust_remote_code", "--dataset", str(home / "dialogues.jsonl"),
    "--output_dir", str(home / "merged-base"), "--max_steps", "1", "--tune_text", "lora", "--merge_first",
])
print("ESTIMATED")
estimate([
    "--use_cpu", "--model", "me/own-base", "--dataset", str(home / "dialogues.jsonl"), "--image_dir",
    str(home / "my pictures"), "--output_dir", "none", "--bf16", "False",
])
adapted = VLMForConditionalGeneration.from_pretrained(home / "own-base")
adapted.push_to_hub("by-hand-base")
adapted.save_pretrained(home / "saved" / "saved-base", push_to_hub=True, commit_message="Mine", revision="main")
for name in ("by-hand-base", "saved-base"):
    VLMProcessor.from_pretrained(home / "own-base").push_to_hub(name)
VLMForConditionalGeneration.from_pretrained(home / "assistant").push_to_hub("by-hand")
VLMProcessor.from_pretrained(home / "assistant").push_to_hub("by-hand")
"""

ADAPTED = ("own", "hub", "merged", "by-hand", "saved")
LOAD = """
import json
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

assert not importable, importable
work, pushed = sys.argv[1], json.loads(sys.argv[2])
folder = snapshot_download("me/aligned")
found = {}
for name, revision in [*pushed, [folder + "/checkpoint-1", None]]:
    model = AutoModelForImageTextToText.from_pretrained(name, revision=revision, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=True)
    inputs = processor(images=Image.new("RGB", (32, 32), "red"), text="<image>", return_tensors="pt")
    said = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert said.shape[1] > inputs["input_ids"].shape[1]
    with torch.no_grad():
        found[name.replace(folder + "/", "")] = model(**inputs).logits
for name in ("own", "hub", "merged", "by-hand", "saved"):
    from peft import PeftModel

    name = f"me/{name}-base"
    base, kwargs = ("me/aligned", {}) if name == "me/hub-base" else (name, {"subfolder": "base"})
    model = AutoModelForImageTextToText.from_pretrained(base, trust_remote_code=True, **kwargs)
    with torch.no_grad():
        plain = model(**inputs).logits
        found[name + " plain"] = plain
        found[name + " by peft"] = PeftModel.from_pretrained(model, name).eval()(**inputs).logits
    assert not torch.equal(plain, found[name + " by peft"])
torch.save(found, work + "/found.pt")
"""


@pytest.fixture(scope="module")
def pushed(folders, tmp_path_factory):
    """The Hub's folder, the home of somebody who pushed to it from both scripts and by hand, and what was printed."""
    work = tmp_path_factory.mktemp("work")
    hub, home = work / "hub", work / "home" / USER
    (home / "my pictures").mkdir(parents=True)
    for name, folder in zip(("vit", "lm"), folders("vit-gpt2")):
        shutil.copytree(folder, hub / "models" / "maker" / name)
        (hub / "models" / "maker" / name / "README.md").write_text("---\nlicense: mit\n---\n# It\n")
    captions, dialogues = [], []
    for number in range(12):
        Image.new("RGB", (24, 24), (20 * number, 0, 0)).save(home / "my pictures" / f"{number}.png")
        picture = {"image": f"{number}.png" if number != 5 else "missing.png"}
        captions.append({**picture, "caption": f"a picture number {number}"})
        said = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": f"number {number}"}]
        dialogues.append({**picture, "messages": said})
    for name, rows in (("captions", captions), ("dialogues", dialogues)):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "aligned" / "runs" / f"Nov_{HOST}").mkdir(parents=True)
    (home / "aligned" / "runs" / f"Nov_{HOST}" / "events").write_text(HOST)
    (home / "aligned" / "notes.txt").write_text("the notes of somebody")
    with start_fake_hub(hub) as url:
        environment = hub_environment(url, home / ".cache") | {
            "HOME": str(home), "USER": USER, "LOGNAME": USER, "HOSTNAME": HOST, "HF_TOKEN": TOKEN,
            "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        }  # fmt: skip
        ran = subprocess.run([sys.executable, "-c", RUN], cwd=home, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr[-3000:]
        (work / "load.py").write_text(WITHOUT_PACKAGE + LOAD)
        names = ["me/aligned", "me/chat", "me/by-hand", *(f"me/{name}-base" for name in ADAPTED)]
        names = json.dumps([[name, "try" if name == "me/chat" else None] for name in names])
        environment = hub_environment(url, work / "fresh") | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-I", str(work / "load.py"), str(work), names]
        loaded = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
        assert loaded.returncode == 0, loaded.stderr[-3000:]
    return hub / "models" / "me", home, ran.stdout


def test_no_byte_that_is_pushed_tells_of_the_machine(pushed):
    hub, home, _ = pushed
    private = [USER, HOST, TOKEN, str(home), str(home.parent), str(hub), "my pictures"]
    assert len([path for path in hub.rglob("*") if path.is_file()]) > 60
    assert not [*told_in(hub, private)]


def test_what_lies_beside_a_card_tells_nothing_either(pushed):
    _, home, _ = pushed
    for folder in ("aligned", "assistant"):
        for file in (home / folder).iterdir():
            if file.is_file() and file.name != "notes.txt":
                text = file.read_bytes()
                assert not [word for word in (USER, HOST, TOKEN, str(home)) if word.encode() in text], file
    report = json.loads((home / "aligned" / "data_report.json").read_text())
    assert report["sources"].keys() == {"captions.jsonl"}
    (dropped,) = report["dropped samples"]
    assert dropped["reason"] == "missing image file" and "row 5: missing.png:" in dropped["detail"]


def test_only_what_belongs_to_a_model_is_pushed(pushed):
    hub, _, _ = pushed
    top = {path.name for path in (hub / "aligned").iterdir()}
    assert top >= {"model.safetensors", "config.json", "modeling_vlm.py", "processing_vlm.py", "README.md"}
    assert not top & {"notes.txt", "runs", "samples.png", "samples.html", "training_args.bin", "data_report.json"}
    assert {name for name in top if name.startswith("checkpoint-")} == {f"checkpoint-{step}" for step in (1, 2, 3)}


def test_what_was_pushed_loads_by_name_without_the_package(pushed):
    hub, home, _ = pushed
    found = torch.load(hub.parents[2] / "found.pt")
    adapted = {f"me/{name}-base" for name in ADAPTED}
    plain = {name: found.pop(f"{name} plain") for name in sorted(adapted)}
    assert set(found) == {"me/aligned", "me/chat", "me/by-hand", "checkpoint-1", *adapted, *(
        f"{name} by peft" for name in adapted
    )}  # fmt: skip
    for name in adapted:
        torch.testing.assert_close(found[name], found[f"{name} by peft"], rtol=0, atol=1e-6)
    same = {name: found[f"me/{name}-base"] for name in ADAPTED}
    assert torch.equal(same["own"], same["by-hand"]) and torch.equal(same["own"], same["saved"])
    torch.testing.assert_close(plain["me/merged-base"], same["own"], rtol=1e-5, atol=1e-5)  # merged before it began
    for name, folder in (("aligned", "aligned"), ("chat@try", "assistant"), ("by-hand", "assistant")):
        here, there = (load_file(place / "model.safetensors") for place in (home / folder, hub / name))
        assert here.keys() == there.keys() and all(torch.equal(here[key], there[key]) for key in here)
    assert torch.equal(found["me/chat"], found["me/by-hand"])
    assert not torch.equal(found["me/aligned"], found["checkpoint-1"])


def test_a_pushed_checkpoint_is_whole_and_goes_on(pushed):
    hub, home, _ = pushed
    for name in ("checkpoint-1", "checkpoint-3"):
        assert fault(hub / "aligned" / name) is None and (hub / "aligned" / name / "optimizer.pt").is_file()
        state = json.loads((hub / "aligned" / name / "data_account_0.json").read_text())
        assert Account.from_state(state).total["samples"] == 4 * int(name[-1])
    state = json.loads((home / "assistant" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == f"checkpoint-{state['best_global_step']}"


def test_adapters_are_pushed_with_their_base_or_name_its_repository(pushed):
    hub, home, _ = pushed
    own, other = (json.loads((hub / name / "adapter_config.json").read_text()) for name in ("own-base", "hub-base"))
    assert own["base_model_name_or_path"] == "me/own-base" and (hub / "own-base" / "base" / "config.json").is_file()
    assert other["base_model_name_or_path"] == "me/aligned" and not (hub / "hub-base" / "base").exists()
    assert fault(hub / "own-base" / "last-checkpoint") is None
    for name, base in (("own-base", ["maker/vit", "maker/lm"]), ("hub-base", ["me/aligned"])):
        content = (hub / name / "README.md").read_text()
        data = ModelCard(content).data
        assert not faults_of_card(content) and data.base_model == base and "lora" in data.tags
        assert f'PeftModel.from_pretrained(base, "me/{name}")' in content
        assert (', revision="' in content) == (name == "hub-base")
        assert data.get("base_model_relation") == ("adapter" if name == "hub-base" else None)


def test_the_estimate_of_an_adapter_on_the_hub_has_its_settings(pushed):
    hub, _, said = pushed
    said = said.partition("ESTIMATED")[2]
    weights = load_file(hub / "own-base" / "adapter_model.safetensors")
    learn = sum(tensor.numel() for name, tensor in weights.items() if ".lora_" in name)
    assert re.search(rf"^language model +[\d,]+ +{learn:,} +lora$", said, re.MULTILINE)


def test_a_card_is_one_that_the_hub_takes_and_reads(pushed):
    hub, _, _ = pushed
    for folder, stage in (("aligned", 1), ("chat@try", 2)):
        content = (hub / folder / "README.md").read_text()
        assert not faults_of_card(content)
        card = ModelCard(content)
        assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
        assert card.data.base_model == (["me/aligned"] if stage == 2 else ["maker/vit", "maker/lm"])
        assert card.data.license == "mit" and all(f"/{name})" in content for name in ("maker/vit", "maker/lm"))
        said = card.data.to_dict()
        assert (said["pipeline_tag"], said["library_name"]) == ("image-text-to-text", "transformers")
        assert f"stage-{stage}" in card.data.tags and f"Stage {stage} of 2" in content
        assert "| projector |" in content and "| schedule |" in content and "## Limits" in content
        assert f"transformers {__import__('transformers').__version__}" in content
        assert "no finished model" not in content
    scores = {result.metric_type: result for result in ModelCard(content).data.eval_results}
    assert scores["loss"].metric_value > 0 and 0 <= scores["exact_match"].metric_value <= 1
    assert scores["exact_match"].dataset_split == "train[:3]"
    assert scores["exact_match"].dataset_type == "dialogues.jsonl" and card.data.datasets is None
    assert 'from_pretrained("me/chat", trust_remote_code=True, revision="try")' in content


def test_samples_of_the_data_are_shown_where_that_is_agreed_to(pushed):
    hub, home, said = pushed
    assert (home / "aligned" / "samples.png").is_file() and "--card_samples agrees to it" in said
    for text in ("## Samples", "samples.png", "a picture number"):
        assert text not in (hub / "aligned" / "README.md").read_text()
    agreed = (hub / "chat@try" / "README.md").read_text()
    assert "## Samples" in agreed and "(samples.png)" in agreed and "what is it" in agreed
    assert (hub / "chat@try" / "samples.png").is_file()


def test_a_finished_run_that_is_asked_to_push_later_pushes(folders, image, tmp_path, monkeypatch, capsys):
    pushed = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **kwargs: type("Repo", (), {"repo_id": f"me/{name}"}))
    monkeypatch.setattr(HfApi, "list_repo_files", lambda self, repo_id, **kwargs: ["model-00001-of-00002.safetensors"])
    monkeypatch.setattr(HfApi, "create_commit", lambda self, repo_id, operations, **kwargs: pushed.append(operations))
    image().save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "a.png", "caption": "a cat"}) + "\n")
    vision, text = map(str, folders("vit-gpt2"))
    command = [
        "--vision_model", vision, "--text_model", text, "--dataset", str(tmp_path / "rows.jsonl"), "--image_dir",
        str(tmp_path), "--output_dir", str(tmp_path / "out"), "--use_cpu", "--bf16", "False", "--max_steps", "1",
        "--save_strategy", "steps", "--save_steps", "1", "--max_new_tokens", "2", "--eval_share", "0",
        "--dataloader_num_workers", "0", "--resume_from_checkpoint", "auto", "--hub_strategy", "end",
    ]  # fmt: skip
    train_pretrain.main(command)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    train_pretrain.main([*command, "--push_to_hub", "True"])
    (operations,) = pushed
    kinds = {operation.path_in_repo: type(operation).__name__ for operation in operations}
    assert kinds["model-00001-of-00002.safetensors"] == "CommitOperationDelete" and kinds["README.md"].endswith("Add")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert 'from_pretrained("me/out"' in (tmp_path / "out" / "README.md").read_text()
    train_pretrain.main([*command, "--push_to_hub", "True"])
    assert len(pushed) == 1 and "nothing is left to do" in capsys.readouterr().out
    train_pretrain.main([*command, "--push_to_hub", "True", "--hub_model_id", "second"])
    assert len(pushed) == 2 and 'from_pretrained("me/second"' in (tmp_path / "out" / "README.md").read_text()
    train_pretrain.main([*command, "--push_to_hub", "True", "--hub_model_id", "me/second"])
    assert len(pushed) == 2 and (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_a_run_counts_as_pushed_where_it_was_pushed_to(tmp_path):
    def asked(**settings):
        return TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, push_to_hub=True, **settings)

    assert was_pushed({}, TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    assert was_pushed({"pushed": "me/out"}, asked()) and was_pushed({"pushed": "me/b"}, asked(hub_model_id="me/b"))
    assert was_pushed({"pushed": "me/out@try"}, asked(hub_revision="try"))
    for known in ({}, {"pushed": None}, {"pushed": "me/other"}, {"pushed": "me/out@try"}):
        assert not was_pushed(known, asked())
    assert not was_pushed({"pushed": "me/out"}, asked(hub_revision="try"))
    assert not was_pushed({"pushed": "me/b"}, asked(hub_model_id="you/b"))


def test_a_push_takes_the_place_of_what_lay_there(tmp_path):
    there = tmp_path / "models" / "me" / "out"
    for name in (
        "model-00001-of-00002.safetensors", "test_results.json", "training.png", "chat_template.jinja", "LICENSE",
        "notes/model.safetensors", "last-checkpoint/optimizer.pt", "last-checkpoint/base/model.safetensors",
        "last-checkpoint-of-mine/x", "base/model-00001-of-00002.safetensors", "own.py",
    ):  # fmt: skip
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_text("of an earlier run")
    push = (
        "from training_vlm.learning.publishing import push\n"
        "push({'optimizer.bin': b'1', 'base/config.json': b'{}'}, 'me/out', 'a checkpoint', 'last-checkpoint')\n"
        "push({'model.safetensors': b'1', 'README.md': b'# It'}, 'me/out', 'a model')\n"
        "push({'model.safetensors': b'1', 'README.md': b'# It', 'base/model.safetensors': b'1'}, 'me/out', 'both')\n"
    )
    with start_fake_hub(tmp_path) as url:
        environment = hub_environment(url, tmp_path / "home") | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        subprocess.run([sys.executable, "-c", push], env=environment, check=True, capture_output=True)
    left = {path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()}
    assert left == {
        "model.safetensors", "README.md", "LICENSE", "own.py", "notes/model.safetensors",
        "last-checkpoint/optimizer.bin", "last-checkpoint/base/config.json", "last-checkpoint-of-mine/x",
        "base/model.safetensors",
    }  # fmt: skip


def test_a_picture_that_a_card_shows_is_pushed_with_it_in_between_too(folders, image, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **kwargs: type("Repo", (), {"repo_id": name}))
    monkeypatch.setattr(HfApi, "list_repo_files", lambda self, repo_id, **kwargs: [])
    monkeypatch.setattr(HfApi, "create_commit", lambda self, repo_id, operations, **kwargs: pushed.append(operations))
    out, settings = tmp_path / "out", {"push_to_hub": True, "hub_model_id": "me/out", "hub_always_push": True}
    settings |= {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    arguments = parse_arguments(SFT, ["--use_cpu", "--output_dir", str(out), "--dataset", "shapes"])
    trainer = trainer_of("vit-gpt2", folders, tiny.ragged_dialogues(image), out, **settings)
    trainer.card = RunCard(SFT, arguments, trainer)
    out.mkdir(exist_ok=True)
    for name in ("training.png", "samples.png"):
        image().save(out / name)
    trainer.train()
    assert len(pushed) == 2
    for operations in pushed:
        files = {operation.path_in_repo: operation.path_or_fileobj for operation in operations}
        text = files["README.md"].decode()
        assert "this is no finished model" in text and "](training.png)" in text and "](samples.png)" not in text
        assert files["training.png"] == (out / "training.png").read_bytes() and "samples.png" not in files


def test_a_push_that_fails_at_the_end_is_one_line(folders, image, tmp_path, monkeypatch):
    def create_commit(self, repo_id, operations, **kwargs):
        raise OSError("the line\nis cut")

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **kwargs: type("Repo", (), {"repo_id": f"me/{name}"}))
    monkeypatch.setattr(HfApi, "list_repo_files", lambda self, repo_id, **kwargs: [])
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    trainer = trainer_of("vit-gpt2", folders, tiny.ragged_dialogues(image), tmp_path / "out", max_steps=1)
    trainer.train()
    with pytest.raises(DuetError, match="^the push to me/out failed: the line is cut$"):
        trainer.push_to_hub()


def test_a_push_is_private_where_that_is_asked_for(folders, image, tmp_path, monkeypatch):
    made = []
    repo = type("Repo", (), {"repo_id": "me/out"})
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **kwargs: made.append(kwargs["private"]) or repo)
    trainer = trainer_of("vit-gpt2", folders, tiny.ragged_dialogues(image), tmp_path / "out", max_steps=1)
    monkeypatch.setattr(trainer, "push_saved", lambda *args, **kwargs: None)
    trainer.push_to_hub(private=True)
    assert made == [True]


# -- the card ---------------------------------------------------------------------------------------------------------


HOSTILE = "x | y`</table><script>alert(1)</script> {{ 'in' ~ 'jected' }} {% raw %}\n---\n[a](http://evil) ![b](http://evil/b.png)"


@pytest.fixture
def card(folders, image, tmp_path):
    """`card(*argv, **found)` is the card of a run with these settings, as a text, and what it found."""
    trainer = trainer_of("vit-gpt2", folders, tiny.ragged_dialogues(image), tmp_path / "out")

    def text(*argv, folder="out", hub_revision=None, hub_model_id=None, **found):
        trainer.args.output_dir = str(tmp_path / folder)
        trainer.args.hub_revision, trainer.args.hub_model_id = hub_revision, hub_model_id
        arguments = parse_arguments(SFT, ["--use_cpu", "--output_dir", trainer.args.output_dir, *argv])
        made = RunCard(SFT, arguments, trainer)
        made.done = True
        for name, value in found.items():
            setattr(made, name, value)
        return made.text()

    return text


def predictions(*right, subset="all", kind="all"):
    question = Question(Prompt([1], []), ("a",), kind, subset)
    return [Prediction(question, "a" if one else "b") for one in right]


JUDGED = {"judgement": judge(predictions(True, False), [METRICS["exact_match"]]), "losses": {"eval_loss": 1.5}}


def test_a_card_names_data_sets_of_the_hub_and_their_scores(card):
    judged = judge(predictions(True, False, subset="new") + predictions(True, subset="old"), [METRICS["exact_match"]])
    content = card(
        "--dataset", "maker/talk", "--dataset_name", "en", "--dataset_revision", "v2", "--test_split", "test",
        "--model", "me/nothing", judgement=judged, losses={"train_loss": 2.0, "eval_loss": float("nan")},
    )  # fmt: skip
    assert not faults_of_card(content)
    data = ModelCard(content).data
    assert data.datasets == ["maker/talk"] and data.base_model == ["me/nothing"] and data.license is None
    scores = {result.metric_name: result for result in data.eval_results}
    assert {name: score.metric_value for name, score in scores.items()} == {
        "exact_match": pytest.approx(2 / 3), "exact_match, new": 0.5, "exact_match, old": 1.0
    }  # fmt: skip
    one = scores["exact_match"]
    assert (one.dataset_type, one.dataset_config, one.dataset_split) == ("maker/talk", "en", "test")
    assert one.dataset_revision == "v2" and one.task_type == "image-text-to-text"
    assert "33.3% of its answers" in content and "No licence is claimed" in content
    assert "maker/talk &#40;en, v2&#41;" in content


def test_a_card_tells_scores_of_test_questions_as_theirs_alone(card):
    found = {**JUDGED, "losses": {"eval_loss": 1.5, "eval_exact_match": 0.5}}
    held_out = ModelCard(card("--dataset", "maker/talk", **{**found, "judgement": None})).data.eval_results
    asked = ModelCard(card("--dataset", "maker/talk", "--test_dataset", "maker/asked", **found)).data.eval_results
    of_what = [[(one.metric_type, one.dataset_type) for one in results] for results in (held_out, asked)]
    assert of_what[0] == [("loss", "maker/talk"), ("exact_match", "maker/talk")]
    assert of_what[1] == [("loss", "maker/talk"), ("exact_match", "maker/asked")]


def test_what_data_say_is_text_and_nothing_else_in_a_card(card, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = 'a "b" `c` <i> {{ 1 + 1 }}.jsonl'
    judged = judge(predictions(True, subset=HOSTILE, kind=HOSTILE), [METRICS["exact_match"]])
    content = card(
        "--dataset", file, "--test_split", "test", "--card_samples", "True", "--prompt", HOSTILE,
        "--model", HOSTILE[:9], judgement=judged, samples=[(HOSTILE, HOSTILE, HOSTILE)],
    )  # fmt: skip
    assert not faults_of_card(content)
    body = ModelCard(content).text
    for mark in ("<script", "</table", "](http://evil", "injected", "<i>"):
        assert mark not in body
    assert body.count("```") == 4 and "{{ 'in' ~ 'jected' }}" in html.unescape(body)
    samples = body[body.index("| asked |") :].splitlines()
    assert samples[2].count("|") == 4 and not samples[3]  # one row, of three cells


ODD = [
    "my rows (1).jsonl",
    "a: b #c.jsonl",
    "'x' \"y\".jsonl",
    "数据.jsonl",
    "---\n---.jsonl",
    "[a]|{b}.jsonl",
    "maker/rows.jsonl",
]


@pytest.mark.parametrize("name", ODD)
def test_a_card_of_data_with_an_odd_name_is_one_that_the_hub_takes(name, card, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    for path in (name, str(tmp_path / name)):
        content = card(f"--dataset={path}", "--test_split", "test", "--text_model", "gpt2", **JUDGED)
        assert not faults_of_card(content)
        data = ModelCard(content).data
        assert data.datasets is None and data.base_model == ["gpt2"]
        assert {result.dataset_name for result in data.eval_results} == {name.rpartition("/")[2]}


def test_a_card_of_a_mixture_is_one_that_the_hub_takes(card, tmp_path):
    mixed = [
        {"path": str(tmp_path / "my rows.jsonl"), "weight": 0.75, "split": "train"},
        {"path": "maker/talk", "name": "en", "weight": 0.2},
        {"path": "talk", "weight": 0.05},
    ]
    (tmp_path / "my rows.jsonl").write_text("{}")
    settings = {"datasets": mixed, "test_dataset": {"path": "maker/asked", "split": "test[:5]"}}
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    content = card("--config", str(tmp_path / "run.yaml"), "--text_model", "gpt2", **JUDGED)
    assert not faults_of_card(content) and str(tmp_path) not in content
    data = ModelCard(content).data
    assert data.datasets == ["maker/talk", "talk"]
    names = {result.metric_type: (result.dataset_type, result.dataset_name) for result in data.eval_results}
    assert names["loss"] == ("my-rows.jsonl-and-maker-talk-and-talk", "my rows.jsonl, maker/talk, talk")
    assert names["exact_match"] == ("maker/asked", "maker/asked")
    told = html.unescape(content)
    assert "my rows.jsonl (train, weight 0.75), maker/talk (en, weight 0.2), talk (weight 0.05)" in told


@pytest.mark.parametrize("name", ["my out (v1)", "a: b", "名", "-", "out"])
def test_a_card_of_a_model_with_an_odd_name_is_one_that_the_hub_takes(name, card):
    content = card("--dataset", "shapes", "--test_split", "test", "--text_model", "gpt2", folder=name, **JUDGED)
    assert not faults_of_card(content)
    data = ModelCard(content).data
    assert data.model_name == name and {result.dataset_type for result in data.eval_results} == {"shapes"}


@pytest.mark.parametrize(
    "metadata",
    [
        "license: my own", "datasets: [null]", "base_model: /home/me/vit", "pipeline_tag: image text", "tags: [1]",
        "model-index: [{name: a, results: [{task: {type: x}, dataset: {type: a b, name: c}, metrics: []}]}]",
        "model-index: [{name: a, results: [{task: {type: x}, dataset: {type: a, name: c}, metrics: [{type: y}]}]}]",
        "model-index: [{name: a, results: [{task: {}, dataset: {type: a, name: c}, metrics: []}]}]",
    ],
)  # fmt: skip
def test_the_hub_of_these_tests_refuses_what_the_hub_refuses(metadata):
    assert faults_of_card(f"---\n{metadata}\n---\n# It\n")


@pytest.mark.parametrize(
    "on, loads",
    [
        (("maker/vlm", "abc"), '"maker/vlm", trust_remote_code=True, revision="abc"'),
        (("base", None), '"me/out", subfolder="base", trust_remote_code=True, revision="try"'),
    ],
)  # fmt: skip
def test_a_card_of_adapters_loads_both_at_their_revisions(on, loads, card, monkeypatch):
    monkeypatch.setattr(model_card, "is_adapted", lambda model: True)
    monkeypatch.setattr(RunCard, "_base_of_adapters", lambda self: on)
    content = card("--dataset", "shapes", hub_revision="try", hub_model_id="me/out")
    assert f"base = AutoModelForImageTextToText.from_pretrained({loads})" in content
    assert 'PeftModel.from_pretrained(base, "me/out", revision="try")' in content


def test_an_unfinished_run_says_so_in_its_card(card):
    assert "this is no finished model" in card("--dataset", "shapes", done=False)
    assert "this is no finished model" not in card("--dataset", "shapes")


def test_samples_of_the_built_in_data_need_no_consent(card):
    shown = {"samples": [("what?", "a cat", "a dog")]}
    assert "a cat" in card("--dataset", "shapes", **shown)
    assert "a cat" not in card("--dataset", "shapes", "--card_samples", "False", **shown)
    assert "a cat" not in card("--dataset", "maker/talk", **shown)
