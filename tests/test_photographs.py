"""Real photographs: 32 x 32 JPEG, captioned by their labels. Skipped where `DUET_TEST_DATA` does not name them."""

import json
import os
from pathlib import Path

import datasets
import pytest

import train_pretrain
from processing.reading.sources import open_source


FOLDER = Path(os.environ.get("DUET_TEST_DATA", "nowhere")) / "cifar10"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="DUET_TEST_DATA names no folder with cifar10/*.parquet")


def test_a_model_learns_from_photographs_as_the_hub_stores_them(folders, tmp_path):
    rows = open_source(FOLDER / "test.parquet").rows.select(range(400))
    captions = [f"a photo of a {label}" for label in rows["label"]]
    rows = rows.remove_columns("label").add_column("caption", captions)
    (tmp_path / "photographs").mkdir()
    rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "photographs" / "train.parquet")

    vision, text = folders("vit-gpt2")
    out = tmp_path / "out"
    train_pretrain.main([
        "--vision_model", str(vision), "--text_model", str(text), "--dataset", str(tmp_path / "photographs"),
        "--tune_vision", "full", "--tune_text", "full", "--learning_rate", "5e-3", "--num_train_epochs", "2",
        "--per_device_train_batch_size", "16", "--logging_steps", "5", "--eval_split", "train[:64]", "--use_cpu",
        "--bf16", "False", "--max_new_tokens", "12", "--output_dir", str(out),
    ])  # fmt: skip
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    losses = [log["loss"] for log in history if "loss" in log]
    assert losses[-1] < 2 and losses[0] > 4  # of log(377) = 5.9 at the start
    assert json.loads((out / "eval_results.json").read_text())["eval_loss"] < 2
