"""The base of a run with adapters: nothing that needs it loses it, and what does not change weights makes no other."""

# ruff: noqa: F811 (fixtures of another file)
import json
import shutil
from pathlib import Path

import pytest
import torch

import train_sft
from modeling_vlm import VLMForConditionalGeneration
from modeling_vlm.adapters_vlm import base_of
from processing import VLMProcessor
from tests.test_lora import FOUR, QUICK, batch_of, first, logits_of, source, trained  # noqa: F401
from training_vlm.bases import source_of
from training_vlm.learning import trainer as trainers
from training_vlm.settings import parse_arguments
from training_vlm.stages import SFT


def id_of(base):
    return json.loads((base / "base_source.json").read_text())["id"]


def settings(folders, source, out, *more):
    vision, text = folders("vit-gpt2")
    named = ["--vision_model", str(vision), "--text_model", str(text), "--vision_feature_select_strategy", "cls"]
    how = ["--tune_text", "lora", "--tune_vision", "lora", *FOUR, "--output_dir", str(out), *more]
    return source + QUICK + named + how


@pytest.fixture
def run(first, tmp_path):
    """A copy of a run, and what its model says."""
    shutil.copytree(first, tmp_path / "run")
    inputs = batch_of(VLMProcessor.from_pretrained(first))
    return tmp_path / "run", lambda folder: logits_of(VLMForConditionalGeneration.from_pretrained(folder), inputs)


class Killed(Exception):
    """In place of a kill."""


def killed_at(monkeypatch, step):
    """Have runs die at the end of a step, before its checkpoint."""
    plain = trainers.VLMTrainer.training_step

    def die(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Killed
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(trainers.VLMTrainer, "training_step", die)
    monkeypatch.setattr(trainers.VLMTrainer, "rescue", lambda self: None)


def test_overwriting_with_another_base_keeps_the_old_one_while_adapters_need_it(
    run, folders, source, monkeypatch, capsys
):
    run, says = run
    old, checkpoint, known = says(run), says(run / "checkpoint-2"), id_of(run / "base")
    again = settings(folders, source, run, "--overwrite_output_dir", "--seed", "7", "--save_steps", "1")
    with monkeypatch.context() as patch:
        patch.setattr(trainers.VLMTrainer, "_begin", lambda *args: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            train_sft.main(again)
    assert id_of(run / "base") == known and torch.equal(says(run / "checkpoint-2"), checkpoint)  # as it was
    with monkeypatch.context() as patch:
        killed_at(patch, 0)
        with pytest.raises(Killed):
            train_sft.main(again)
    assert id_of(run / "base") != known and not (run / "_new_base").exists()
    assert torch.equal(says(run / "_overwritten-1" / "checkpoint-2"), checkpoint) and torch.equal(says(run), old)
    with monkeypatch.context() as patch:
        killed_at(patch, 2)
        with pytest.raises(Killed):
            train_sft.main([*again, "--resume_from_checkpoint", "auto"])
    assert not (run / "_overwritten-1" / "checkpoint-2").exists()  # there is a better one
    assert torch.equal(says(run), old) and id_of(Path(base_of(str(run / "checkpoint-1"), {})[0])) == id_of(run / "base")
    train_sft.main([*again, "--resume_from_checkpoint", "auto"])
    assert not (run / "_overwritten-1").exists() and not torch.equal(says(run), old)


def test_overwriting_with_the_same_base_leaves_it_where_it_is(run, folders, source, monkeypatch):
    run, says = run
    old, known = says(run / "checkpoint-2"), id_of(run / "base")
    killed_at(monkeypatch, 0)
    with pytest.raises(Killed):
        train_sft.main(settings(folders, source, run, "--overwrite_output_dir", "--lora_r", "4"))
    assert id_of(run / "base") == known and torch.equal(says(run / "_overwritten-1" / "checkpoint-2"), old)


@pytest.mark.slow
def test_a_run_that_goes_on_from_what_was_overwritten_has_the_base_of_that(run, first, folders, source, monkeypatch):
    run, says = run
    with monkeypatch.context() as patch:
        killed_at(patch, 0)
        with pytest.raises(Killed):
            train_sft.main(settings(folders, source, run, "--overwrite_output_dir", "--seed", "7"))
    checkpoint = run / "_overwritten-1" / "checkpoint-2"
    train_sft.main(settings(folders, source, run, "--resume_from_checkpoint", str(checkpoint)))
    assert id_of(run / "base") == id_of(first / "base") and torch.equal(says(run), says(first))


def test_a_base_is_told_by_what_changes_its_weights_alone(folders, first, tmp_path):
    def told(model, *more):
        return source_of(parse_arguments(SFT, ["--model", str(model), "--output_dir", "out", "--dataset", "x", *more]))

    shutil.copytree(first, tmp_path / "elsewhere")
    shutil.copytree(first, tmp_path / "other")
    weights = tmp_path / "other" / "base" / "model.safetensors"
    model = VLMForConditionalGeneration.from_pretrained(tmp_path / "other" / "base")
    model.model.multi_modal_projector.linear_1.bias.data[0] += 1
    model.save_pretrained(weights.parent)
    plain = told(first)
    assert told(tmp_path / "elsewhere") == plain == told(first, "--text_attn_implementation", "eager")
    assert plain == told(first, "--vision_attn_implementation", "sdpa", "--trust_remote_code")
    assert len({plain, told(tmp_path / "other"), told(first, "--merge_first"), told(first, "--dtype", "bfloat16")}) == 4
