"""A folder that an earlier Duet saved takes today's code, without any of its own being run, and goes on working."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from inference_vlm import update as program
from inference_vlm.update import main, shipped_code, update
from modeling_vlm import VLMConfig, VLMForConditionalGeneration
from modeling_vlm.backbones_vlm import CACHE
from modeling_vlm.configuration_vlm import DUET_VERSION
from tests import matrix
from tests.fake_hub import hub_environment, start_fake_hub
from tests.isolated import run_without_package
from tests.test_checkpoints import CHECKPOINTS


PLAIN = next(folder for folder in CHECKPOINTS if folder.name == "plain")
WITH_CODE = [folder for folder in CHECKPOINTS if (folder / "modeling_vlm.py").is_file()]

CHILD = """
import json, traceback
from pathlib import Path
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

torch.set_num_threads(1)
work, found = Path(sys.argv[1]), {"importable": importable}
for folder in sorted((work / "folders").iterdir()):
    try:
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        assert all(type(part).__module__.startswith("transformers_modules.") for part in (model, processor))
        expected = load_file(folder / "expected.safetensors")
        logits = expected.pop("logits")
        with torch.no_grad():
            difference = (model(**expected).logits - logits).abs().max().item()
        asked = processor(images=Image.new("RGB", (30, 70), "red"), text="what <image>?", return_tensors="pt")
        written = model.generate(**asked, max_new_tokens=3, do_sample=False)
        found[folder.name] = [difference, model.config.duet_version, written.shape[1] - asked["input_ids"].shape[1]]
    except Exception:
        found[folder.name] = traceback.format_exc()
(work / "found.json").write_text(json.dumps(found))
"""


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def copy_of(source, place):
    shutil.copytree(source, place)
    return place


def test_an_updated_folder_loads_anywhere_and_says_what_it_said(tmp_path):
    assert {folder.name for folder in WITH_CODE} >= {"plain", "tiled"}
    for folder in WITH_CODE:
        name = f"{folder.parent.name}-{folder.name}"
        update(copy_of(folder, tmp_path / "folders" / name))
        copy_of(folder, tmp_path / "folders" / f"{name}-before")
    run_without_package(CHILD, tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.pop("importable") == [] and len(found) == 2 * len(WITH_CODE)
    for name, result in found.items():
        if not name.endswith("-before"):
            assert isinstance(result, list) and result[0] <= 1e-5 and result[1:] == [DUET_VERSION, 3], result
        elif CACHE == "cache":  # what the update is for
            assert "unexpected keyword argument 'cache'" in result


def test_code_is_replaced_and_what_is_the_user_s_is_kept(tmp_path):
    folder = copy_of(PLAIN, tmp_path / "out")
    inside = copy_of(PLAIN, folder / "checkpoint-3")
    (folder / "checkpoint-best.txt").write_text("mine")
    (folder / "gone_vlm.py").write_text("raise SystemExit('code of the folder was run')")
    (folder / "mine.py").write_text("raise SystemExit('code of the folder was run')")
    (folder / "modeling_vlm.py").write_text("raise SystemExit('code of the folder was run')")
    before = files_of(folder)
    said = update(folder)
    assert len(said) == 2 and "gone_vlm.py removed" in said[0] and str(inside) in said[1]
    for place in (folder, inside):
        after = files_of(place)
        assert {name: content for name, content in after.items() if name.endswith("_vlm.py")} == shipped_code()
        config = json.loads(after["config.json"])
        assert config.pop("duet_version") == DUET_VERSION and config == json.loads(before["config.json"])
    after = files_of(folder)
    kept = before.keys() - shipped_code().keys() - {"gone_vlm.py", "config.json"}
    assert after.keys() - shipped_code().keys() - {"config.json"} == kept
    assert all(after[name] == before[name] for name in kept) and "mine.py" in kept


def test_a_folder_that_is_up_to_date_is_left_alone(tmp_path, capsys):
    folder = copy_of(PLAIN, tmp_path / "out")
    assert main([str(folder)]) == 0
    assert f"now has the code of Duet {DUET_VERSION} (before: a version without a number" in capsys.readouterr().out
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert main([str(folder)]) == 0
    assert "up to date" in capsys.readouterr().out
    assert stamps == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_what_a_save_writes_is_up_to_date(composed, tmp_path):
    model, processor = composed
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert "up to date" in update(tmp_path)[0]


def test_a_run_that_is_killed_is_repeated_and_done(tmp_path, monkeypatch):
    """At every single step: nothing but code is touched, and the config claims today's version at the end only."""
    copy_of(PLAIN, tmp_path / "wanted")
    calls = {name: getattr(os, name) for name in ("replace", "fsync")}

    def kill_at(number):
        left = [number]

        def killing(call):
            def wrapped(*args):
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                return call(*args)

            return wrapped

        for name, call in calls.items():
            monkeypatch.setattr(program.os, name, killing(call))

    update(tmp_path / "wanted")
    wanted = files_of(tmp_path / "wanted")
    killed = 0
    for number in range(60):
        folder = copy_of(PLAIN, tmp_path / str(number))
        (folder / "gone_vlm.py").write_text("")
        kill_at(number)
        try:
            update(folder)
        except KeyboardInterrupt:
            killed += 1
            found = files_of(folder)
            assert found["model.safetensors"] == wanted["model.safetensors"]
            assert "duet_version" not in json.loads(found["config.json"])
        for name, call in calls.items():
            monkeypatch.setattr(program.os, name, call)
        update(folder)
        assert files_of(folder) == wanted
        shutil.rmtree(folder)
    changed = [name for name, content in shipped_code().items() if files_of(PLAIN).get(name) != content]
    assert killed == 2 * (len(changed) + 1)


@pytest.mark.parametrize(
    "content, line",
    [
        (None, "found no config.json"),
        ({"model_type": "llava"}, "found a config.json with model_type 'llava'"),
        ("{", "cannot be read as JSON"),
        ({"model_type": "duet_vlm", "duet_version": "99.0"}, "was saved by Duet 99.0, which is newer"),
    ],
)
def test_what_is_no_folder_of_duet_s_is_refused_in_one_line(tmp_path, capsys, content, line):
    if content is not None:
        (tmp_path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    before = files_of(tmp_path)
    assert main([str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and line in said and said.count("\n") == 1
    assert files_of(tmp_path) == before
    assert main([str(tmp_path / "nowhere")]) == 1 and "there is no folder" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys, monkeypatch):
    folder = copy_of(PLAIN, tmp_path / "out")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(program.os, "fsync", full)
    assert main([str(folder)]) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said and str(folder) in said and said.count("\n") == 1
    monkeypatch.undo()
    assert main([str(folder)]) == 0 and not list(folder.glob(".*.new"))


def test_a_projector_of_one_s_own_goes_on_with_the_folder(tmp_path):
    """Its file is the user's, and the model that is built with today's code is the one that was saved."""
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\n\nclass Mine(nn.Linear):\n    def __init__(self, config, vision_size, text_size):\n"
        "        super().__init__(vision_size, text_size)\n"
    )
    model = VLMForConditionalGeneration.from_backbones(
        matrix.encoder_of("ViT"),
        matrix.config_of(*matrix.LANGUAGE_MODELS["Llama"]),
        projector_type=f"{tmp_path / 'mine.py'}:Mine",
    ).eval()
    folder = tmp_path / "out"
    model.save_pretrained(folder)
    for file in folder.glob("*_vlm.py"):
        file.write_text("raise SystemExit('old')")
    assert f"of its {len(shipped_code())} files written" in update(folder)[0]
    assert (folder / "mine.py").read_bytes() == (tmp_path / "mine.py").read_bytes()
    again = VLMForConditionalGeneration.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(matrix.logits_of(again), matrix.logits_of(model))


def test_a_saved_config_names_the_version_of_the_code_beside_it(tmp_path):
    """Also where it was loaded from a folder of an earlier one."""
    config = VLMConfig.from_dict({**json.loads((PLAIN / "config.json").read_text()), "duet_version": "0.0.1"})
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["duet_version"] == DUET_VERSION


def test_the_version_is_written_in_one_place():
    root = Path(__file__).parents[1]
    assert "version = attr: modeling_vlm.configuration_vlm.DUET_VERSION" in (root / "setup.cfg").read_text()
    assert program.version_of(shipped_code()) == DUET_VERSION


HUB = """
from inference_vlm.update import main
import sys
out = sys.argv[1]
for arguments in (["me/vlm", "--out", out], ["me/vlm", "--out", out], ["me/other", "--out", out + "2"],
                  ["me/none", "--out", out + "3"], ["me/vlm"]):
    print("exit", main(arguments), flush=True)
"""


def test_a_model_of_the_hub_is_updated_in_a_folder_of_one_s_own(tmp_path):
    copy_of(PLAIN, tmp_path / "hub" / "models" / "me" / "vlm")
    other = tmp_path / "hub" / "models" / "me" / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llava"}')
    with start_fake_hub(tmp_path / "hub") as url:
        environment = hub_environment(url, tmp_path / "home")
        environment["PYTHONPATH"] = str(Path(__file__).parents[1])
        done = subprocess.run(
            [sys.executable, "-c", HUB, str(tmp_path / "out")], env=environment, capture_output=True, text=True
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("exit")]
    assert lines == ["exit 0", "exit 0", "exit 1", "exit 1", "exit 1"], done.stderr[-3000:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for line, words in zip(errors, ("model_type 'llava'", "'me/none'", "no folder me/vlm")):
        assert words in line
    assert len(errors) == 3 and not (tmp_path / "out2").exists()
    assert {name for name in files_of(tmp_path / "out") if name.endswith("_vlm.py")} == shipped_code().keys()
    torch.testing.assert_close(
        load_file(tmp_path / "out" / "model.safetensors"), load_file(PLAIN / "model.safetensors")
    )
