"""Whole runs on data as people have it: broken files, several sources, streams; each ends, and its account adds up."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import train_pretrain
import train_sft
from tests.broken_media import make_corpus


ROOT = Path(__file__).parents[1]
QUICK = [
    "--use_cpu", "--bf16", "False", "--per_device_train_batch_size", "4", "--max_new_tokens", "4", "--save_strategy",
    "no", "--dataloader_num_workers", "0", "--disable_tqdm", "True", "--eval_share", "0",
]  # fmt: skip


@pytest.fixture
def backbones(folders):
    vision, text = folders("siglip-llama")
    return ["--vision_model", str(vision), "--text_model", str(text)]


@pytest.fixture
def refused(capsys):
    """`refused(main, argv)` is the one line that a run with a mistake ends in."""

    def run(main, argv):
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in argv])
        assert stopped.value.code == 1
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("error: ")
        return line

    return run


def write_rows(file: Path, rows) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def write_dialogues(folder: Path, name: str, count: int) -> str:
    """Dialogues about small pictures, as JSON lines."""
    folder.mkdir(exist_ok=True)
    rows = []
    for number in range(count):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{name}-{number}.png")
        said = [{"role": "user", "content": f"what is {name} {number}?"}, {"role": "assistant", "content": "a cat"}]
        rows.append({"image": f"{name}-{number}.png", "messages": said})
    return write_rows(folder / f"{name}.jsonl", rows)


def account_of(out) -> dict:
    return json.loads((Path(out) / "data_report.json").read_text())


def assert_adds_up(report) -> None:
    for counts in (report["total"], *report["sources"].values()):
        assert counts["samples"] == counts["learned from"] + sum(counts["dropped"].values())
    for name in ("samples", "learned from", "images", "tokens", "image_tokens", "supervised"):
        assert report["total"][name] == sum(counts[name] for counts in report["sources"].values())


@pytest.mark.parametrize(
    "ahead, workers",
    [
        ("True", "0"),
        ("False", "2"),
        pytest.param("True", "2", marks=pytest.mark.slow),
        pytest.param("False", "0", marks=pytest.mark.slow),
    ],
)
def test_every_broken_file_is_survived_named_and_counted(backbones, tmp_path, capsys, ahead, workers):
    corpus = make_corpus(tmp_path / "media")
    rows = [{"image": name, "caption": f"a picture called {name}"} for name in corpus]
    rows += [{"image": next(iter(corpus)), "caption": None}, {"image": None, "caption": "alone"}]
    rows += [{"image": "../outside.png", "caption": "no"}, {"image": "http://example.com/a.png", "caption": "no"}]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    train_pretrain.main([
        *backbones, "--dataset", data, "--image_dir", str(tmp_path / "media"), "--output_dir", str(tmp_path / "out"),
        *QUICK, "--num_train_epochs", "1", "--encode_ahead", ahead, "--dataloader_num_workers", workers,
    ])  # fmt: skip
    report = account_of(tmp_path / "out")
    assert_adds_up(report)
    expected = Counter(reason for reason in corpus.values() if reason is not None)
    expected["malformed row"] = 4
    assert report["total"]["dropped"] == dict(expected)
    assert report["total"]["samples"] == len(rows)
    assert report["total"]["learned from"] == sum(reason is None for reason in corpus.values())
    named = {entry["row"]: entry for entry in report["dropped samples"]}
    for row, (name, reason) in enumerate(corpus.items()):
        assert (str(row) in named) == (reason is not None)
        if reason is not None:
            assert named[str(row)]["reason"] == reason and name in named[str(row)]["detail"]
    said = capsys.readouterr()
    assert "dropped: unreadable image" in said.out
    assert "warn" not in (said.out + said.err).lower()


def test_the_first_bad_sample_can_stop_the_run(backbones, refused, tmp_path):
    corpus = make_corpus(tmp_path / "media")
    data = write_rows(tmp_path / "rows.jsonl", [{"image": name, "caption": "a"} for name in corpus])
    common = [*backbones, "--dataset", data, "--image_dir", tmp_path / "media", "--output_dir", tmp_path / "out"]
    common += QUICK
    line = refused(train_pretrain.main, [*common, "--on_bad_sample", "error"])
    assert any(name in line for name, reason in corpus.items() if reason is not None)
    Image.new("RGB", (8, 8)).save(tmp_path / "media" / "a.png")
    write_rows(tmp_path / "rows.jsonl", [{"image": "a.png", "caption": "a"}, {"image": "a.png", "caption": None}])
    for ahead in ("True", "False"):
        line = refused(train_pretrain.main, [*common, "--on_bad_sample", "error", "--encode_ahead", ahead])
        assert line.startswith(f"error: {data}, row 1: ")


@pytest.mark.parametrize("ahead", ["True", "False"])
def test_several_sources_are_mixed_by_weight(backbones, tmp_path, ahead):
    one, other = (write_dialogues(tmp_path / name, name, count) for name, count in (("cats", 30), ("dogs", 10)))
    entries = [{"path": one, "weight": 0.25, "split": "train[:20]"}, {"path": other, "weight": 0.75}]
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"datasets": entries}))
    train_sft.main([
        "--config", str(tmp_path / "mix.yaml"), *backbones, *QUICK, "--num_train_epochs", "2", "--encode_ahead", ahead,
        "--output_dir", str(tmp_path / "out"),
    ])  # fmt: skip
    report = account_of(tmp_path / "out")
    assert_adds_up(report)
    shares = {Path(name).stem: counts["samples"] for name, counts in report["sources"].items()}
    # Two epochs of 20 + 10 samples.
    assert sum(shares.values()) == 60 and abs(shares["cats"] - 15) <= 1


def test_a_mix_says_what_is_wrong_with_it(backbones, refused, tmp_path):
    data = write_dialogues(tmp_path / "cats", "cats", 3)
    for entries, expected in (
        ("cats", "expected a list in a yaml file"),
        ([{"path": data, "weight": 1}, {"path": data}], "a positive one for each, or none"),
        ([{"path": data, "weigth": 1}], "did you mean 'weight'?"),
        ([{"split": "train"}], "expected {path: DATA, ...}"),
    ):
        (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"datasets": entries}))
        argv = ["--config", tmp_path / "mix.yaml", *backbones, *QUICK, "--output_dir", tmp_path / "out"]
        assert expected in refused(train_sft.main, argv)
        assert "both given" in refused(train_sft.main, [*argv, "--dataset", data])


def test_a_source_that_gives_nothing_is_named(backbones, refused, tmp_path):
    good = write_dialogues(tmp_path / "cats", "cats", 30)
    bad = write_rows(tmp_path / "cats" / "bad.jsonl", [{"messages": [{"role": "nobody", "content": "a"}]}])
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"datasets": [{"path": good}, {"path": bad}]}))
    argv = ["--config", tmp_path / "mix.yaml", *backbones, *QUICK, "--output_dir", tmp_path / "out"]
    line = refused(train_sft.main, argv)
    assert line.startswith(f"error: {bad}: there is nothing to learn from") and "role 'nobody'" in line


@pytest.mark.parametrize("workers", [pytest.param("0", marks=pytest.mark.slow), "2"])
def test_a_resumed_stream_is_the_same_run(backbones, tmp_path, workers):
    for shard in range(4):
        write_dialogues(tmp_path / "shards", f"shard{shard}", 9)
    common = [
        *backbones, "--dataset", str(tmp_path / "shards" / "*.jsonl"), "--streaming", *QUICK, "--learning_rate", "1e-3",
        "--save_strategy", "steps", "--save_steps", "5", "--max_steps", "12", "--shuffle_buffer", "8",
        "--dataloader_num_workers", workers, "--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "2",
    ]  # fmt: skip
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train_sft.main([*common, "--output_dir", str(whole)])
    shutil.copytree(whole / "checkpoint-5", stopped / "checkpoint-5")
    train_sft.main([*common, "--output_dir", str(stopped), "--resume_from_checkpoint", "last"])
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, stopped))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert account_of(whole)["total"] == account_of(stopped)["total"]
    assert account_of(whole)["total"]["samples"] == 12 * 2 * 2


def test_the_account_goes_on_with_a_resumed_run(backbones, tmp_path):
    data = write_dialogues(tmp_path / "cats", "cats", 24)
    (tmp_path / "cats" / "cats-7.png").write_bytes(b"broken")
    common = [*backbones, "--dataset", data, *QUICK, "--save_strategy", "steps", "--save_steps", "4"]
    train_sft.main([*common, "--output_dir", str(tmp_path / "whole"), "--num_train_epochs", "2"])
    shutil.copytree(tmp_path / "whole" / "checkpoint-8", tmp_path / "stopped" / "checkpoint-8")
    train_sft.main([
        *common, "--output_dir", str(tmp_path / "stopped"), "--num_train_epochs", "2", "--resume_from_checkpoint",
        "last",
    ])  # fmt: skip
    assert account_of(tmp_path / "whole") == account_of(tmp_path / "stopped")
    assert account_of(tmp_path / "whole")["total"]["dropped"] == {"unreadable image": 2}


def test_a_weighted_mix_grouped_by_length_resumes_as_the_same_run(backbones, tmp_path):
    """Stopped in the third epoch."""
    entries = []
    for name, count, weight in (("cats", 24, 0.25), ("dogs", 16, 0.75)):
        rows = []
        for number in range(count):
            said = [("user", f"what is {name} {number}?"), ("assistant", "a cat " * (number % 7 + 1))]
            rows.append({"messages": [{"role": role, "content": text} for role, text in said]})
        entries.append({"path": write_rows(tmp_path / f"{name}.jsonl", rows), "weight": weight})
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"datasets": entries}))
    common = [
        "--config", str(tmp_path / "mix.yaml"), *backbones, *QUICK, "--num_train_epochs", "3", "--learning_rate",
        "1e-3", "--save_strategy", "steps", "--save_steps", "23", "--train_sampling_strategy", "group_by_length",
        "--tune_text", "full",
    ]  # fmt: skip
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train_sft.main([*common, "--output_dir", str(whole)])
    shutil.copytree(whole / "checkpoint-23", stopped / "checkpoint-23")
    train_sft.main([*common, "--output_dir", str(stopped), "--resume_from_checkpoint", "last"])
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, stopped))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert account_of(whole) == account_of(stopped)
    assert account_of(whole)["total"]["samples"] == 3 * 40


@pytest.mark.parametrize(
    "changes",
    [pytest.param([], id="skipping"), pytest.param(["--ignore_data_skip"], id="anew", marks=pytest.mark.slow)],
)
def test_a_resumed_stream_is_evaluated(backbones, tmp_path, changes):
    data = write_dialogues(tmp_path / "cats", "cats", 40)
    common = [
        *backbones, "--dataset", data, "--streaming", *QUICK, "--eval_share", "0.2", "--eval_strategy", "steps",
        "--eval_steps", "3", "--save_strategy", "steps", "--save_steps", "4", "--max_steps", "6",
        "--dataloader_num_workers", "2", "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    train_sft.main(common)
    expected = (tmp_path / "out" / "eval_results.json").read_text()
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    train_sft.main([*common, *changes, "--resume_from_checkpoint", "last"])
    assert account_of(tmp_path / "out")["total"]["samples"] == 6 * 4
    if not changes:
        found = json.loads((tmp_path / "out" / "eval_results.json").read_text())
        assert found["eval_loss"] == json.loads(expected)["eval_loss"]


def test_a_stream_asks_for_what_it_needs(backbones, refused, tmp_path):
    data = write_dialogues(tmp_path / "cats", "cats", 3)
    argv = [*backbones, "--dataset", data, "--streaming", *QUICK, "--output_dir", tmp_path / "out"]
    assert "--max_steps" in refused(train_sft.main, argv)
    argv += ["--max_steps", "3"]
    assert "grouped by length" in refused(train_sft.main, [*argv, "--train_sampling_strategy", "group_by_length"])
    assert "encoded ahead" in refused(train_sft.main, [*argv, "--encode_ahead", "True"])


@pytest.mark.parametrize(
    "mode", [["--encode_ahead", "True"], ["--encode_ahead", "False"], ["--streaming", "--max_steps", "2"]]
)
def test_training_refuses_to_learn_nothing_or_everything(backbones, refused, tmp_path, mode):
    out = ["--output_dir", tmp_path / "out"]
    silent = write_rows(tmp_path / "silent.jsonl", [{"messages": [{"role": "user", "content": "hello?"}]}] * 3)
    line = refused(train_sft.main, [*backbones, "--dataset", silent, *QUICK, *mode, *out])
    assert "there is nothing to learn from: no token of it is supervised" in line
    unknown = write_rows(tmp_path / "unknown.jsonl", [{"picture": "a.png", "words": "a cat"}] * 3)
    line = refused(train_sft.main, [*backbones, "--dataset", unknown, *QUICK, *mode, *out])
    assert "malformed row" in line and "picture, words" in line and "row 0" in line
    loose = write_rows(tmp_path / "loose.jsonl", [{"messages": [{"role": "assistant", "content": "a text"}]}] * 3)
    plain = [*backbones, "--chat_template", "plain", "--dataset", loose, *QUICK, *mode, *out]
    assert "every token of every sample would be learned" in refused(train_sft.main, plain)


def test_columns_can_be_named(backbones, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    data = write_rows(tmp_path / "rows.jsonl", [{"picture": "a.png", "words": "a cat"}] * 4)
    train_pretrain.main([
        *backbones, "--dataset", data, "--columns", "image=picture,caption=words", *QUICK, "--max_steps", "1",
        "--output_dir", str(tmp_path / "out"),
    ])  # fmt: skip
    assert account_of(tmp_path / "out")["total"]["learned from"] == 4


def test_a_share_is_held_out_where_no_split_is_named(backbones, tmp_path, capsys):
    data = write_dialogues(tmp_path / "cats", "cats", 40)
    train_sft.main([
        *backbones, "--dataset", data, *QUICK, "--eval_share", "0.1", "--num_train_epochs", "1",
        "--output_dir", str(tmp_path / "out"),
    ])  # fmt: skip
    assert account_of(tmp_path / "out")["total"]["samples"] == 36
    assert "eval_loss" in (tmp_path / "out" / "eval_results.json").read_text()
    assert "evaluation data" in capsys.readouterr().out


def test_what_is_cut_is_counted(backbones, tmp_path):
    rng = random.Random(0)
    rows = []
    for _ in range(30):
        said = [("user", "what is it?"), ("assistant", "a cat " * rng.randrange(1, 30))] * rng.randrange(1, 4)
        rows.append({"messages": [{"role": role, "content": text} for role, text in said]})
    data = write_rows(tmp_path / "rows.jsonl", rows)
    for truncation, reason in (("truncate_text", "text cut at its end"), ("keep_last_turns", "first turns left out")):
        out = tmp_path / truncation
        train_sft.main([
            *backbones, "--dataset", data, *QUICK, "--num_train_epochs", "1", "--max_length", "80",
            "--truncation", truncation, "--tune_text", "full", "--output_dir", str(out),
        ])  # fmt: skip
        report = account_of(out)
        assert_adds_up(report)
        assert report["total"]["cut"][reason] > 0 and report["total"]["samples"] == 30
        assert report["length percentiles"]["100 %"] <= 80


@pytest.mark.slow
def test_several_processes_with_workers_share_a_stream(backbones, tmp_path):
    """Half of the rows miss their image: as many are dropped as are named, so none was seen twice or by nobody."""
    for shard in range(4):
        name = f"shard{shard}"
        write_dialogues(tmp_path / "shards", name, 8)
        for number in range(4):
            (tmp_path / "shards" / f"{name}-{number}.png").unlink()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
            str(ROOT / "train_sft.py"), *backbones, "--dataset", str(tmp_path / "shards" / "*.jsonl"), "--streaming",
            *QUICK, "--ddp_backend", "gloo", "--max_steps", "4", "--dataloader_num_workers", "2", "--output_dir", "out",
        ],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "8 conversations a step (4 x 1 x 2 processes)" in done.stdout
    report = account_of(tmp_path / "out")
    assert_adds_up(report)
    assert report["total"]["samples"] == 32
    assert report["total"]["dropped"] == {"missing image file": 16}
    assert len({entry["detail"] for entry in report["dropped samples"]}) == 16
