"""Models as people have them on disk: what is not whole, or is not there, is one line before data are read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file

import train_pretrain
import train_sft
from modeling_vlm import VLMForConditionalGeneration
from processing.data_error_vlm import DuetError
from tests import tiny
from training_vlm import load
from training_vlm.learning.trainer import VLMTrainer


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 1234567\n"


def pointer(file):
    file.write_text(POINTER)


def half(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file):
    file.write_bytes(b"")


def gone(file):
    file.unlink()


def as_bin(file):
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()


def half_a_bin(file):
    as_bin(file)
    half(file.with_name("pytorch_model.bin"))


def missing_shards(file):
    weight_map = dict.fromkeys(load_file(file), "model-00001-of-00002.safetensors")
    file.unlink()
    file.with_name("model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def a_list(file):
    file.write_text("[1, 2]")


def quantised(method, **settings):
    def change(file):
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "quantization_config": {"quant_method": method, **settings}}))

    return change


@pytest.fixture
def parts(folders, tmp_path):
    """Copies of the two backbones in `vision` and `text`, and of a composed model in `composed`."""
    for name, folder in zip(("vision", "text"), folders("vit-gpt2")):
        shutil.copytree(folder, tmp_path / name)
    model, processor = tiny.compose(*folders("vit-gpt2"), "cls")
    model.save_pretrained(tmp_path / "composed")
    processor.save_pretrained(tmp_path / "composed")
    return tmp_path


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
    """`refused(main, *argv)` is the one line that a run ends in, which has read no data."""

    def no_data(*args):
        raise AssertionError("data were read")

    monkeypatch.setattr(train_pretrain, "load_data", no_data)
    monkeypatch.setattr(train_sft, "load_data", no_data)

    def run(main, *argv):
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, argv), "--dataset", "shapes", "--use_cpu", "--output_dir", str(tmp_path / "out")])
        assert stopped.value.code == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    return run


BROKEN = [
    *[(part, "model.safetensors", change, words) for part in ("vision", "text", "composed") for change, words in (
        (pointer, "git lfs pull"), (half, "cut short"), (empty, "is empty"), (gone, "has no weights"),
        (missing_shards, "model-00001-of-00002.safetensors"), (half_a_bin, "pytorch_model.bin is cut short"),
    )],
    *[(part, file, pointer, f"{file} is a git-lfs pointer") for part, file in (
        ("text", "tokenizer.json"), ("text", "tokenizer_config.json"), ("text", "config.json"),
        ("vision", "preprocessor_config.json"), ("vision", "config.json"), ("composed", "config.json"),
        ("composed", "tokenizer.json"), ("composed", "processor_config.json"),
    )],
    ("text", "tokenizer.json", half, "is no JSON"),
    ("text", "tokenizer.json", gone, "the tokenizer"),
    ("text", "config.json", a_list, "config.json holds no settings by name"),
    ("vision", "preprocessor_config.json", a_list, "preprocessor_config.json holds no settings by name"),
    ("vision", "preprocessor_config.json", gone, "has no image processor"),
    ("composed", "processor_config.json", gone, "has no processor_config.json"),
    ("composed", "tokenizer.json", gone, "has no tokenizer.json"),
    ("text", "config.json", quantised("bitsandbytes", load_in_4bit=True, _load_in_4bit=True), "bitsandbytes, 4 bits"),
    ("text", "config.json", quantised("gptq", bits=4), "gptq, 4 bits"),
    ("text", "config.json", quantised("compressed-tensors"), "quantised (compressed-tensors"),
    ("vision", "config.json", quantised("fp8"), "quantised (fp8"),
]  # fmt: skip


@pytest.mark.parametrize("part, file, change, words", BROKEN, ids=lambda value: getattr(value, "__name__", value))
def test_a_file_that_is_not_whole_is_named_before_data_are_read(parts, refused, part, file, change, words):
    change(parts / part / file)
    if part == "composed":
        line = refused(train_sft.main, "--model", parts / "composed")
    else:
        line = refused(train_pretrain.main, "--vision_model", parts / "vision", "--text_model", parts / "text")
    assert words in line and str(parts / part) in line


@pytest.mark.parametrize("change, words", [(pointer, "git lfs pull"), (half, "cut short"), (missing_shards, "00001")])
def test_composing_in_a_program_names_the_file_as_well(parts, change, words):
    change(parts / "text" / "model.safetensors")
    with pytest.raises(ValueError, match=words) as found:
        VLMForConditionalGeneration.from_backbones(str(parts / "vision"), str(parts / "text"))
    assert found.value.is_duet_error


def test_settings_of_generation_that_are_none_are_named_where_they_are_read(parts):
    a_list(parts / "text" / "generation_config.json")
    with pytest.raises(ValueError, match=r"text/generation_config\.json holds no settings by name"):
        VLMForConditionalGeneration.from_backbones(str(parts / "vision"), str(parts / "text"))


def test_weights_as_torch_saves_them_are_composed(parts):
    for name in ("vision", "text"):
        as_bin(parts / name / "model.safetensors")
    found, _ = tiny.compose(parts / "vision", parts / "text", "cls")
    expected = VLMForConditionalGeneration.from_pretrained(parts / "composed").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())


def test_an_error_of_our_own_keeps_its_stack_trace(parts, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a mistake of the program")

    monkeypatch.setattr(load, "check_files", broken)
    with pytest.raises(RuntimeError, match="a mistake of the program"):
        train_sft.main(["--model", str(parts / "composed"), "--dataset", "shapes", "--output_dir", str(parts / "out")])


@pytest.mark.parametrize("name", ["outputs/aligned", "aligned", "./outputs/aligned", "a/b/c", "outputs/aligned/"])
def test_a_model_that_is_nowhere_is_the_line_to_run_stage_1(refused, name):
    line = refused(train_sft.main, "--model", name)
    assert f"there is no model in {name}" in line and "run `python -m train_pretrain --output_dir" in line
    assert "connect" not in line


def test_a_model_that_the_hub_does_not_know_is_the_line_to_run_stage_1(refused, monkeypatch):
    class Response:
        headers, request, status_code = {}, None, 404

    def unknown(*args, **kwargs):
        try:
            raise RepositoryNotFoundError("404 Client Error", response=Response())
        except RepositoryNotFoundError as error:
            raise OSError("outputs/aligned is not a local folder and is not a valid model identifier") from error

    monkeypatch.setattr(load.PreTrainedConfig, "get_config_dict", unknown)
    line = refused(train_sft.main, "--model", "outputs/aligned")
    assert "knows no such name" in line and "run `python -m train_pretrain --output_dir outputs/aligned" in line


def test_a_folder_without_a_model_says_what_it_holds(parts, refused):
    folder = parts / "aligned"
    folder.mkdir()
    line = refused(train_sft.main, "--model", folder)
    assert "which is empty" in line and "run `python -m train_pretrain --output_dir" in line
    (folder / "notes.txt").write_text("mine")
    assert "holds no config.json" in refused(train_sft.main, "--model", folder)
    for number in (5, 10):
        shutil.copytree(parts / "composed", folder / f"checkpoint-{number}")
    line = refused(train_sft.main, "--model", folder)
    assert "--resume_from_checkpoint auto" in line and f"--model {folder / 'checkpoint-10'}" in line
    assert "is a file" in refused(train_sft.main, "--model", folder / "notes.txt")


def test_a_stage_1_that_was_stopped_midway_leads_on(folders, tmp_path, monkeypatch, refused):
    vision, text = folders("vit-gpt2")
    monkeypatch.undo()
    steps, step = [], VLMTrainer.training_step

    def stopped(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 3:
            raise DuetError("stopped on purpose")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(VLMTrainer, "training_step", stopped)
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 8
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--dataset", str(tmp_path / "rows.jsonl"), "--use_cpu", "--bf16", "False", "--max_steps", "4",
              "--tune_text", "full"]  # fmt: skip
    with pytest.raises(SystemExit):
        train_sft.main([
            *common, "--vision_model", str(vision), "--text_model", str(text), "--save_strategy", "steps",
            "--save_steps", "2", "--output_dir", str(tmp_path / "one"),
        ])  # fmt: skip
    assert Path(tmp_path / "one" / "checkpoint-2").is_dir()
    line = refused(train_sft.main, "--model", tmp_path / "one")
    assert "checkpoint-2 of a run that has not come to its end" in line
