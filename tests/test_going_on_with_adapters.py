# ruff: noqa: F811 (fixtures of another file)
"""What is said of an adapter that is gone on with, merged or saved: what is equal is taken, all else is one line."""

import json
import shutil

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from inference_vlm.merge import main as merge
from modeling_vlm import VLMForConditionalGeneration
from tests.test_lora import first, source, trained  # noqa: F401
from training_vlm.adapting import settle_adapter, sketched
from training_vlm.learning.lora import AdaptedVLM
from training_vlm.settings import parse_arguments
from training_vlm.stages import SFT


def told(model, *more):
    return parse_arguments(SFT, ["--model", str(model), "--dataset", "x", "--output_dir", "out", *more])


def sketch(run, *more):
    """The model of a run that goes on, as the estimate has it."""
    return sketched(VLMForConditionalGeneration.from_pretrained(run / "base"), told(run, *more))


def changed(run, folder, **settings):
    """A copy of an adapter with other settings."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def error_of(do, *args):
    with pytest.raises(ValueError) as caught:
        do(*args)
    assert caught.value.is_duet_error and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_setting_that_is_given_counts_where_it_is_the_default_too(first, tmp_path):
    other = changed(first, tmp_path / "other", r=4, lora_alpha=8, use_rslora=True)
    equal = ["--lora_r", "16", "--lora_alpha", "32", "--lora_dropout", "0.05", "--use_dora", "false"]
    assert settle_adapter(told(first, *equal)).name == str(first)
    for option, default, found in (("lora_r", 16, 4), ("lora_alpha", 32, 8), ("use_rslora", False, True)):
        said = error_of(settle_adapter, told(other, f"--{option}", str(default)))
        assert said.startswith(f"{option}: the adapter in") and f"was made with {found}" in said
    said = error_of(lambda: told(first, "--tune_text", "frozen", "--tune_vision", "frozen", "--lora_r", "16"))
    assert said.startswith("lora_r is about adapters")


def test_the_same_modules_are_taken_however_they_are_named(first):
    names = json.loads((first / "adapter_config.json").read_text())["target_modules"]
    ends = sorted({name.rpartition(".")[2] for name in names})
    pattern = r".*\.(layers?|h)\.\d+\..*"
    for same in (names, ends, [pattern]):
        assert isinstance(sketch(first, "--lora_target_modules", *same), AdaptedVLM)
    assert "is also in model." in error_of(sketch, first, "--lora_target_modules", *ends[1:])


def test_an_adapter_of_another_method_or_of_none_is_one_line(first, tmp_path):
    unknown = changed(first, tmp_path / "unknown", peft_type="LATER")
    ia3 = changed(first, tmp_path / "ia3", peft_type="IA3", feedforward_modules=[])
    listed, torn, bare = (changed(first, tmp_path / name) for name in ("listed", "torn", "bare"))
    (listed / "adapter_config.json").write_text("[]")
    weights = torn / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    (bare / "adapter_model.safetensors").unlink()
    load = VLMForConditionalGeneration.from_pretrained
    assert "peft makes nothing of its adapter_config.json, KeyError: 'LATER'" in error_of(settle_adapter, told(unknown))
    assert "is of another method, IA3" in error_of(settle_adapter, told(ia3))
    assert "KeyError: 'LATER'" in error_of(load, unknown)
    for do, what in ((load, listed), (settle_adapter, told(listed))):
        assert "holds no settings by name" in error_of(do, what)
    assert "is cut short: it has" in error_of(load, torn)
    assert "has no weights: expected an adapter_model.safetensors" in error_of(load, bare)


def test_what_cannot_be_merged_is_one_line(first, tmp_path, capsys, monkeypatch):
    def said(adapter, out, *more):
        assert merge([str(adapter), str(out), *more]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    (tmp_path / "file").write_text("mine")
    other = changed(first, tmp_path / "other")
    wide = {name: torch.cat([tensor] * 2) for name, tensor in load_file(other / "adapter_model.safetensors").items()}
    save_file(wide, other / "adapter_model.safetensors")
    listed, unknown = changed(first, tmp_path / "listed"), changed(first, tmp_path / "unknown", peft_type="LATER")
    (listed / "adapter_config.json").write_text("[]")
    assert "it is no adapter" in said(first / "base", tmp_path / "out")
    assert "is a folder, which has no revisions" in said(first, tmp_path / "out", "--revision", "main")
    assert "the Hub cannot be reached or has no adapter" in said("no/such", tmp_path / "out")
    assert "is a file" in said(first, tmp_path / "file")
    assert "holds something already" in said(first, first)
    assert "does not fit the base" in said(other, tmp_path / "out")
    assert "holds no settings by name" in said(listed, tmp_path / "out")
    assert "KeyError: 'LATER'" in said(unknown, tmp_path / "out")
    activated = changed(first, tmp_path / "activated", alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM")
    assert "cannot be merged into its base: aLoRA does not support merging" in said(activated, tmp_path / "out")
    assert (tmp_path / "file").read_text() == "mine" and not [*tmp_path.glob("out*")]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert merge([str(first), "."]) == 0 and (tmp_path / "here" / "model.safetensors").is_file()


def test_merging_first_what_is_no_adapter_is_one_line(first, folders):
    assert f"and {first / 'base'} is no adapter" in error_of(settle_adapter, told(first / "base", "--merge_first"))
    vision, text = folders("vit-gpt2")
    new = ["--vision_model", str(vision), "--text_model", str(text), "--dataset", "x", "--output_dir", "out"]
    said = error_of(settle_adapter, parse_arguments(SFT, [*new, "--merge_first"]))
    assert "no --model is named; leave it out" in said
    said = error_of(settle_adapter, told("me/unreached", "--merge_first"))
    assert "me/unreached is no folder, and the Hub cannot be reached or has no adapter of that name" in said


def test_an_adapter_is_saved_by_the_main_process_alone(first, tmp_path):
    model = VLMForConditionalGeneration.from_pretrained(first)
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    model.save_pretrained(tmp_path / "none", False)
    assert not (tmp_path / "none").exists()
    model.save_pretrained(tmp_path / "saved", True)
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()


def test_what_saving_an_adapter_does_not_heed_is_said(first, tmp_path, caplog):
    model = VLMForConditionalGeneration.from_pretrained(first)
    logging.get_logger("transformers").addHandler(caplog.handler)
    model.save_pretrained(tmp_path / "saved", max_shard_size="1GB")
    assert "not heeded" not in caplog.text
    model.save_pretrained(tmp_path / "again", varient="fp16", selected_adapters=["a"])
    logging.get_logger("transformers").removeHandler(caplog.handler)
    assert "not heeded where adapters are saved: selected_adapters, varient." in caplog.text


def test_a_loaded_adapter_is_saved_over_another_with_all_of_its_base_and_nothing_of_the_others(first, tmp_path):
    shutil.copytree(first, tmp_path / "saved")
    shutil.copytree(first, tmp_path / "own")
    weights = load_file(first / "base" / "model.safetensors")
    (tmp_path / "own" / "base" / "model.safetensors").unlink()
    save_torch_state_dict(weights, tmp_path / "own" / "base", max_shard_size="50KB")
    wrong = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    save_file(wrong, tmp_path / "saved" / "base" / "model.safetensors", {"format": "pt"})
    model = VLMForConditionalGeneration.from_pretrained(tmp_path / "own")
    model.save_pretrained(tmp_path / "saved")
    found = VLMForConditionalGeneration.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())
    assert not (tmp_path / "saved" / "base" / "model.safetensors").exists()


def test_embeddings_that_stay_anyway_are_not_frozen_in_silence():
    said = error_of(lambda: told("some/model", "--tune_text", "last:1", "--freeze_embeddings"))
    assert said.startswith("freeze_embeddings: with tune_text=last:1")
    assert told("some/model", "--tune_text", "full", "--freeze_embeddings").tuning.freeze_embeddings
