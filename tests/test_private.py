"""Names that others may read, and the bytes of a pushed run: nothing in them tells of a machine or its user."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from processing.batching.account import Account, Record
from tests.fake_hub import held_in, hub_environment, start_fake_hub, told_in
from training_vlm.private import public_account, public_name, without_folders


@pytest.mark.parametrize(
    "text, public",
    [
        ("/mnt/anna/rows.jsonl", "rows.jsonl"),
        ("/mnt/anna's data/my rows.jsonl", "my rows.jsonl"),
        ("/mnt/a b/c d.png: no such image file; and/or another", "c d.png: no such image file; and/or another"),
        ("rows.jsonl, row 5: '../other/x.png' is cut", "rows.jsonl, row 5: 'x.png' is cut"),
        (r"C:\Users\anna\x.png", "x.png"),
        ("~/data/x.png", "x.png"),
        ("maker/talk", "maker/talk"),
        ("maker/talk (train[:5])", "maker/talk (train[:5])"),
        ("http://example.com/a/b.png", "http://example.com/a/b.png"),
        ("1 / 2 of them, either/or", "1 / 2 of them, either/or"),
        ("image:/mnt/anna/x.png is cut", "image:x.png is cut"),
        ("file:///mnt/anna/my x.png", "my x.png"),
        ("file://node/anna/x.png", "x.png"),
        ("zip:///mnt/anna/a.zip::/anna/b.png", "a.zip::b.png"),
        ("zip://b.png::/mnt/anna/a.zip", "b.png::a.zip"),
        ("ssh://anna@node:22/mnt/anna/x.png", "x.png"),
        ("anna@node:/mnt/anna/x.png", "x.png"),
        ("s3://annas/data/x.png", "x.png"),
        (r"\\node\anna\x.png", "x.png"),
        (repr(r"\\node\anna\x.png"), "'x.png'"),
        (r"C:\Users\anna", "~"),
        (r"at C:\Users\anna\my data\x.png, row 1", "at x.png, row 1"),
        ("C:/Users/anna/x.png", "x.png"),
        ("~anna/data/x.png", "x.png"),
        ("/home/anna: no such file", "~: no such file"),
        ("https://anna:word@example.com/x.png?signed=word#word", "https://example.com/x.png"),
        ("http://node:8000/data/x.png, row 1", "x.png, row 1"),
        ("http://10.0.0.7/data/x.png", "x.png"),
        ("hf://datasets/maker/talk/x.parquet", "hf://datasets/maker/talk/x.parquet"),
        ("{'a': '/mnt/anna/a.jsonl', 'b': ['/mnt/anna/b.jsonl']}", "{'a': 'a.jsonl', 'b': ['b.jsonl']}"),
        (str(Path.home()), "~"),
    ],
)  # fmt: skip
def test_a_path_is_named_by_its_last_part(text, public):
    assert without_folders(text) == public


@pytest.mark.parametrize(
    "text, public",
    [
        ("https://example.com/x?SignedHeaders=host;range&Signature=word", "https://example.com/x"),
        ("https://example.com/x?token=a,word|word", "https://example.com/x"),
        ("https://example.com/x?token=word, row 1", "https://example.com/x, row 1"),
        ("https://a.org/x?t=word,https://anna:word@b.org/y", "https://a.org/x,https://b.org/y"),
        ("HTTPS://anna:word@example.com/x?signed=word", "https://example.com/x"),
        ("zip://x.csv::https://anna:word@example.com/a.zip?signed=word", "x.csv::https://example.com/a.zip"),
        ("az://pictures/x.png?sv=1&sig=word", "x.png"),
        ("http://[::1]:8000/data/x.png?t=word", "x.png"),
    ],
)  # fmt: skip
def test_what_gives_access_is_left_out_of_every_address(text, public):
    assert without_folders(text) == public


@pytest.mark.parametrize(
    "address", ["hf://datasets/maker/talk@main/x.parquet", "https://example.com/@maker/x", "https://a.org/x@1.2/y.js"]
)
def test_an_address_keeps_a_sign_that_is_no_login(address):
    assert without_folders(address) == address


def test_data_of_one_name_in_two_folders_stay_two_in_an_account():
    account = Account()
    for source in ("/mnt/anna/rows.jsonl", "/mnt/b/rows.jsonl", "/mnt/b/other.jsonl"):
        account.add([Record(source, 1, tokens=3), Record(source, 2, "malformed row", f"{source}, row 2: no")])
    public = public_account(account)
    assert list(public.sources) == ["rows.jsonl", "rows.jsonl (2)", "other.jsonl"]
    assert public.total == account.total and len(public.named) == 3
    assert "mnt" not in json.dumps(public.state()) + json.dumps(public.report())
    # As a run that goes on from a pushed checkpoint has it.
    public.merge(account)
    again = public_account(public)
    assert list(again.sources) == list(public_account(account).sources)
    assert again.total["samples"] == 2 * account.total["samples"]


def test_a_model_has_its_name_on_the_hub_or_that_of_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "maker" / "here").mkdir(parents=True)
    names = {"maker/vit": "maker/vit", "gpt2": "gpt2", "maker/here": "here", str(tmp_path / "maker"): "maker"}
    for name, public in names.items():
        assert public_name(name) == public


@pytest.mark.parametrize(
    "name, public",
    [
        ("/home/anna", "~"), (r"C:\Users\anna\lm", "lm"), (r"\\node\anna\lm", "lm"), ("~anna/lm", "lm"),
        ("lm/gone/x/", "x"),
        ("https://anna:word@example.com/rows.jsonl?signed=word", "rows.jsonl"), ("file:///mnt/anna/lm", "lm"),
        ("image:/mnt/anna/lm", "image:lm"), ("/mnt/anna/*.jsonl", "*.jsonl"),
    ],
)  # fmt: skip
def test_what_is_no_name_of_the_hub_is_called_by_its_last_part(name, public):
    assert public_name(name) == public


# -- what is pushed ---------------------------------------------------------------------------------------------------


ROOT = Path(__file__).parents[1]
USER, HOST, TOKEN = "xanthippe", "zephyr-node-17", "hf_NobodyElseMayReadThisToken00002"
FOLDERS = ["my models", "my pictures", "my data"]

OWN_CODE = """
from torch import nn

class Own(nn.Module):
    def __init__(self, config, vision_size, text_size):
        super().__init__()
        self.linear = nn.Linear(vision_size, text_size)

    def forward(self, features):
        return self.linear(features)

def score(predictions):
    return [1.0 for _ in predictions]
"""

RUN = f"""
import socket
socket.gethostname = lambda: "{HOST}"
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import train_pretrain, train_sft
from modeling_vlm import VLMForConditionalGeneration
from processing import VLMProcessor

home = Path.home()
common = [
    "--use_cpu", "--bf16", "False", "--per_device_train_batch_size", "4", "--max_new_tokens", "4", "--logging_steps",
    "1", "--dataloader_num_workers", "0", "--disable_tqdm", "True", "--push_to_hub", "--hub_token", "{TOKEN}",
    "--save_strategy", "steps", "--save_steps", "1", "--max_steps", "2", "--image_dir", str(home / "my pictures"),
]
train_pretrain.main([
    *common, "--vision_model", str(home / "my models" / "vit"), "--text_model", str(home / "my models" / "lm"),
    "--tokenizer", str(home / "my models" / "lm"), "--chat_template", str(home / "my data" / "own.jinja"),
    "--projector_type", str(home / "my data" / "own.py:Own"), "--dataset", str(home / "my data" / "captions.jsonl"),
    "--streaming", "--output_dir", str(home / "aligned"), "--hub_strategy", "all_checkpoints", "--hub_always_push",
    "True",
])
train_sft.main([
    *common, "--model", str(home / "aligned"), "--dataset", str(home / "my data" / "dialogues.jsonl"),
    "--trust_remote_code", "--test_dataset", str(home / "my data" / "dialogues.jsonl"), "--metrics",
    str(home / "my data" / "own.py:score") + ",exact_match", "--eval_strategy", "steps", "--eval_steps", "1",
    "--predict_with_generate", "--load_best_model_at_end", "True", "--output_dir", str(home / "chat"), "--tune_text",
    "lora", "--hub_strategy", "checkpoint", "--resume_from_checkpoint", "auto",
])
VLMForConditionalGeneration.from_pretrained(home / "aligned", trust_remote_code=True).push_to_hub("by-hand")
VLMProcessor.from_pretrained(home / "aligned", trust_remote_code=True).push_to_hub("by-hand")
"""


@pytest.fixture(scope="module")
def pushed(folders, tmp_path_factory):
    """The Hub's folder, and the home of somebody whose models and data lay in folders of theirs."""
    work = tmp_path_factory.mktemp("work")
    hub, home = work / "hub", work / "home" / USER
    for name in FOLDERS:
        (home / name).mkdir(parents=True)
    for name, folder in zip(("vit", "lm"), folders("vit-gpt2")):
        shutil.copytree(folder, home / "my models" / name)
    (home / "my data" / "own.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    (home / "my data" / "own.py").write_text(OWN_CODE)
    rows = {"captions": [], "dialogues": []}
    for number in range(8):
        Image.new("RGB", (24, 24), (20 * number, 0, 0)).save(home / "my pictures" / f"{number}.png")
        image = f"{number}.png" if number != 5 else str(home / "my pictures" / "missing.png")
        rows["captions"].append({"image": image, "caption": f"a picture number {number}"})
        said = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": f"number {number}"}]
        rows["dialogues"].append({"image": image, "messages": said})
    for name, some in rows.items():
        (home / "my data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    with start_fake_hub(hub) as url:
        environment = hub_environment(url, home / ".cache") | {
            "HOME": str(home), "USER": USER, "LOGNAME": USER, "HOSTNAME": HOST, "HF_TOKEN": TOKEN,
            "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        }  # fmt: skip
        ran = subprocess.run([sys.executable, "-c", RUN], cwd=home, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr[-3000:]
    return hub, home


def test_no_byte_of_a_run_from_folders_that_is_pushed_tells_of_them(pushed):
    hub, home = pushed
    private = [USER, HOST, TOKEN, str(home.parent), str(hub), *FOLDERS]
    # With those that a later commit removed or replaced.
    names = {path.name for path in hub.rglob("*") if path.is_file()}
    assert names >= {
        "config.json", "adapter_config.json", "tokenizer_config.json", "processor_config.json", "trainer_state.json",
        "own.py", "README.md", "optimizer.pt", "test_results.json", "training.png", "data_order.json", "run.json",
    }  # fmt: skip
    assert not [*told_in(hub, private)]


def test_what_lies_beside_the_pushed_models_tells_nothing_either(pushed):
    _, home = pushed
    for folder in (home / "aligned", home / "chat"):
        for file in (path for path in [*folder.iterdir(), *folder.glob("base/*")] if path.is_file()):
            assert not [*held_in(file, [USER, HOST, TOKEN])]
