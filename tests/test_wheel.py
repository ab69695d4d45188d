"""The wheel carries the whole house: built and installed as a user does, its commands run from any folder.

The environment that it is installed into sees the other packages of this one, so that nothing is fetched.
"""

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import urllib.request
import venv
import zipfile
from pathlib import Path

import pytest

from tests import tiny
from tests.test_house import ROOT


MODULES = {
    "duet-pretrain": "train_pretrain", "duet-sft": "train_sft", "duet-inspect": "training_vlm.inspect_data.__main__",
    "duet-estimate": "training_vlm.estimate", "duet-evaluate": "evaluation_vlm.__main__",
    "duet-ask": "inference_vlm.ask", "duet-serve": "inference_vlm.serve", "duet-explain": "inference_vlm.explain",
    "duet-merge": "inference_vlm.merge", "duet-export": "inference_vlm.export", "duet-update": "inference_vlm.update",
}  # fmt: skip
QUICK = [
    "--max_steps", "2", "--lr_scheduler_type", "constant", "--use_cpu", "--bf16", "False", "--disable_tqdm", "True",
    "--per_device_train_batch_size", "4", "--max_eval_samples", "4", "--max_new_tokens", "4",
]  # fmt: skip
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
OFFLINE = ["--no-deps", "--no-index"]
HELP = """
import importlib.metadata, json, pathlib, sys

found = {}
for point in importlib.metadata.distribution("duet-vlm").entry_points:
    main = point.load()
    sys.argv = [f"/somewhere/bin/{point.name}", "--help"]
    print(f"@{point.name}")
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
    found[point.name] = point.value, sys.modules[main.__module__].__file__
print("@", json.dumps(found))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A fresh environment with the wheel in it, and nothing else of its own."""
    if int(_version("setuptools").partition(".")[0]) < 77 or _version("pip") == "0":
        pytest.skip("a wheel is built by pip and setuptools 77 or newer, which are not installed")
    folder = tmp_path_factory.mktemp("wheel")
    home = folder / "home"
    wheel = _wheel_of(_copied(folder / "source"), folder)
    pip = [*PIP, "--python", str(home)]
    venv.create(home)
    _run([*pip, "install", *OFFLINE, str(wheel)])
    others = "\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    Path(sysconfig.get_path("purelib", vars={"base": str(home)})).joinpath("others.pth").write_text(others)
    return home


def _copied(place):
    """The clone, as git has it."""
    shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(".*", "outputs", "build", "dist", "*.egg-info"))
    return place


def _wheel_of(source, folder):
    _run([*PIP, "wheel", *OFFLINE, "--no-build-isolation", "-w", str(folder), str(source)])
    (wheel,) = folder.glob("duet_vlm-*.whl")
    return wheel


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "0"


def _environment():
    """This one's, without what would have Python see the clone."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _run(command, cwd=None, code=0):
    done = subprocess.run(command, cwd=cwd, env=_environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == code, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture
def command(home, tmp_path):
    """`command("duet-ask", ...)` runs an installed command from an empty folder and gives what it wrote."""
    folder = tmp_path / "anywhere"
    folder.mkdir()
    return lambda name, *argv, code=0: _run([str(home / "bin" / name), *map(str, argv)], folder, code)


def test_every_command_is_the_main_of_its_module_and_is_called_by_its_name(home, tmp_path):
    said = _run([str(home / "bin" / "python"), "-I", "-c", HELP], tmp_path)
    *helps, last = said.split("\n@")
    found = json.loads(last)
    assert {name: value for name, (value, _) in found.items()} == {
        name: f"{module}:main" for name, module in MODULES.items()
    }
    for name, (_, file) in found.items():
        assert Path(file).is_relative_to(home), "the house that is tested is not the one of the wheel"
        text = next(text for text in helps if text.removeprefix("@").startswith(f"{name}\n"))
        assert f"usage: {name} " in text and "python -m" not in text.partition("\n\n")[0], text[:300]
        assert (home / "bin" / name).is_file()


def test_the_wheel_carries_what_the_code_reads(home):
    files = {str(file) for file in importlib.metadata.PathDistribution(next(home.rglob("duet_vlm-*.dist-info"))).files}
    for folder, package in (("processing", "processing"), ("training_vlm", "training_vlm"),
                            ("inference_vlm", "inference_vlm"), ("recipes", "training_vlm/recipes")):  # fmt: skip
        there = [path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".pyc"]
        assert there and {f"{package}/{path.relative_to(ROOT / folder).as_posix()}" for path in there} <= files
    said = importlib.metadata.PathDistribution(next(home.rglob("duet_vlm-*.dist-info"))).metadata
    assert said["License-Expression"] == "Apache-2.0" and said["License-File"] == "LICENSE"
    assert said["Description-Content-Type"] == "text/markdown" and "# Duet" in said.get_payload()


@pytest.mark.slow
def test_a_source_distribution_makes_the_same_wheel(home, tmp_path):
    source = _copied(tmp_path / "source")
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    _run([sys.executable, "-c", build], source)
    (packed,) = tmp_path.glob("duet_vlm-*.tar.gz")
    with tarfile.open(packed) as tar:
        assert not [name for name in tar.getnames() if "/tests/" in name]
    (wheel,) = home.parent.glob("duet_vlm-*.whl")
    names = [sorted(zipfile.ZipFile(one).namelist()) for one in (wheel, _wheel_of(packed, tmp_path))]
    assert names[0] == names[1]


@pytest.mark.slow
def test_the_installed_server_gives_its_page_whole_and_answers_about_a_picture(home, tmp_path, folders, image):
    pytest.importorskip("fastapi")
    from tests.serving import ask, said

    for part in tiny.compose(*folders("vit-gpt2"), "cls"):
        part.save_pretrained(tmp_path / "model")
    command = [str(home / "bin" / "duet-serve"), str(tmp_path / "model"), "--port", "0"]
    server = subprocess.Popen(command, cwd=tmp_path, env=_environment(), stdout=subprocess.PIPE, text=True)
    try:
        (url,) = re.findall(r"chat with it at (\S+)/;", server.stdout.readline())
        page = ROOT / "inference_vlm" / "serving" / "page"
        for file in page.iterdir():
            place = "/" if file.name == "index.html" else f"/page/{file.name}"
            with urllib.request.urlopen(url + place, timeout=60) as response:
                assert response.status == 200 and response.read() == file.read_bytes(), place
        question = {"model": "model", "max_tokens": 2, "messages": [said("What is it?", image(0))]}
        status, answer = ask(f"{url}/v1/chat/completions", question)
        assert status == 200 and answer["usage"]["prompt_tokens_details"]["image_tokens"] > 0
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
    finally:
        server.kill()


@pytest.mark.slow
def test_both_stages_and_all_that_follows_run_from_an_empty_folder(command, tmp_path):
    """The recipe that runs without any argument, with few steps; then its model is asked, judged, shown and updated."""
    said = command("duet-pretrain", "--config", "shapes", *QUICK, "--max_samples", "200")
    assert "duet-sft --model outputs/shapes/pretrain" in said
    stage_2 = ["-m", "train_sft", "--config", "shapes", *QUICK, "--max_samples", "200", "--max_test_samples", "4"]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    assert "exactly right" in command("python", *launch, *stage_2)
    out = tmp_path / "anywhere" / "outputs" / "shapes" / "sft"
    whole = {"model.safetensors", "chat_template.jinja", "modeling_vlm.py", "README.md", "samples.html"}
    assert whole <= {path.name for path in out.iterdir()}
    command("python", "-m", "processing.shapes", "--out", "pictures")
    asked = ["outputs/shapes/sft", "pictures/test-000.png", "What is at the top left?"]
    assert command("duet-ask", *asked, "--max_new_tokens", "4", "--json").startswith("{")
    command("duet-explain", *asked, "--max_new_tokens", "1", "--grid", "2", "--seeds", "1")
    assert "<html" in (tmp_path / "anywhere" / "explained.html").read_text(encoding="utf-8")
    shapes = ["--dataset", "shapes", "--dataset_name", "dialogues"]
    command("duet-evaluate", "outputs/shapes/sft", *shapes, "--split", "test", "--max_samples", "4")
    command("duet-inspect", "shapes", "--dataset_name", "dialogues", "--model", "outputs/shapes/sft", "--n", "1")
    command("duet-estimate", "shapes")
    assert command("duet-update", "outputs/shapes/sft")
    lora = ["--tune_vision", "frozen", "--tune_text", "lora", "--model", "outputs/shapes/sft", "--output_dir", "lora"]
    command("duet-sft", "--config", "shapes", *QUICK, "--max_samples", "200", "--max_test_samples", "1", *lora)
    command("duet-merge", "lora", "merged")
    command("duet-serve", "nothing", code=1)
