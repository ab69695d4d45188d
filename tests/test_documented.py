"""What README and docs tell a reader to type is run where it needs neither network nor accelerator, else parsed.

Commands of other programs (pip, vllm, curl) are theirs to check.
"""

import argparse
import ast
import importlib
import json
import re
import shlex
import tarfile
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from PIL import Image

import train_pretrain
import train_sft
from processing import shapes
from tests import tiny
from tests.test_house import ROOT
from tests.test_wheel import MODULES
from training_vlm import settings
from training_vlm.finish import _say_goodbye
from training_vlm.stages import SFT


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {"train_pretrain.py": "train_pretrain", "train_sft.py": "train_sft"}
NAMED = {name: module for name, module in MODULES.items()} | SCRIPTS
RUN_AS = {module.removesuffix(".__main__"): module for module in [*MODULES.values(), "processing.shapes"]}
OF_A_READER = {"mine.yaml", "RECIPE", "FILE"}
"""Settings that a page has the reader write."""
LIMITS = {
    "inference_vlm.ask": ["--max_new_tokens", "2"],
    "inference_vlm.explain": ["--max_new_tokens", "1", "--grid", "2", "--seeds", "1"],
    "evaluation_vlm.__main__": ["--max_new_tokens", "2", "--max_samples", "4"],
    "training_vlm.inspect_data.__main__": ["--max_samples", "40"],
    "processing.shapes": [],
}
"""What is run in a test, and what makes it quick."""
QUICK = [
    "--max_steps", "1", "--use_cpu", "--bf16", "False", "--per_device_train_batch_size", "4", "--disable_tqdm", "True",
    "--warmup_steps", "0", "--max_new_tokens", "2",
]  # fmt: skip


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


def commands_of(text: str) -> list[tuple[str, list[str]]]:
    """Module and arguments of each command of Duet's in lines of a shell."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a part of what is written into another program
            continue
        at = [-1, *(place for place, word in enumerate(words) if word in ("&&", "||", "|", ";")), len(words)]
        for start, end in zip(at, at[1:]):
            command = words[start + 1 : end]
            for place, word in enumerate(command):
                module = NAMED.get(word)
                if word == "-m" and place + 1 < len(command):
                    module, place = RUN_AS.get(command[place + 1]), place + 1
                if module is not None:
                    found.append((module, [one for one in command[place + 1 :] if one != "..."]))
                    break
    return found


def documented() -> list[tuple[str, str, list[str]]]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.S))
        for lines in blocks(page, "bash"):
            found += [(page.name, module, argv) for module, argv in commands_of(lines)]
        for line in inline:  # where a command is also spoken of by its name alone
            found += [(page.name, module, argv) for module, argv in commands_of(line) if argv and argv != ["--help"]]
    return found


DOCUMENTED = documented()


class Parsed(BaseException):
    """A command line was understood; what is left of it is for another parser."""


@pytest.fixture
def parsed(monkeypatch):
    """`parsed(module, argv)` has the command's own parser read its line, and nothing more happen."""
    parse, read = argparse.ArgumentParser.parse_known_args, settings.read_config

    def parse_only(self, args=None, namespace=None):
        raise Parsed(*parse(self, args, namespace)[1])

    def read_if_there(file, *rest):
        return {} if file.name in OF_A_READER else read(file, *rest)

    def parsed(module, argv):
        monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_only)
        monkeypatch.setattr(settings, "read_config", read_if_there)
        with pytest.raises(Parsed) as found:
            importlib.import_module(module).main(list(argv))
        left = [str(word) for word in found.value.args]
        if any(word.startswith("--") for word in left) and module.startswith("training_vlm"):
            with pytest.raises(Parsed) as found:
                settings.parse_arguments(SFT, left)
            left = [str(word) for word in found.value.args]
        return [word for word in left if word.startswith("-") and word != "-"]

    return parsed


def test_every_command_in_the_pages_has_options_that_there_are(parsed, capsys):
    assert {module for _, module, _ in DOCUMENTED} == set(RUN_AS.values()), "a command that no page shows"
    refused = []
    for page, module, argv in DOCUMENTED:
        try:
            refused += [f"{page}: {module} has no {option}" for option in parsed(module, argv)]
        except SystemExit:
            refused.append(f"{page}: {module} refuses {argv}: {capsys.readouterr().err[-200:]}")
    assert not refused, "\n".join(refused)


def test_a_command_with_an_option_that_there_is_not_would_be_found(parsed):
    [(module, argv)] = commands_of("accelerate launch --num_processes 8 train_sft.py --tune_txt full ... # all of it")
    assert (module, argv) == ("train_sft", ["--tune_txt", "full"]) and parsed(module, argv) == ["--tune_txt"]
    [(module, argv)] = commands_of('cd x && .venv/bin/python -m inference_vlm.ask it a.png "What?" --jsn && ls')
    assert parsed(module, argv) == ["--jsn"]


@pytest.fixture
def home(tmp_path, folders, monkeypatch):
    """The folder of a reader who has trained the built-in recipe, on tiny backbones."""
    model, processor = tiny.compose(*folders("vit-gpt2"), "cls")
    for stage in ("pretrain", "sft"):
        model.save_pretrained(tmp_path / "outputs" / "shapes" / stage)
        processor.save_pretrained(tmp_path / "outputs" / "shapes" / stage)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _run(module, argv):
    assert not importlib.import_module(module).main([*argv, *LIMITS[module]]), (module, argv)


def test_commands_about_the_built_in_recipe_run_as_they_stand(home, capsys):
    ran = set()
    shapes.main(["--out", "pictures"])
    for _, module, argv in DOCUMENTED:
        named = [word for word in argv if word.startswith("outputs/")]
        is_there = all((home / name).exists() for name in named)
        if module not in LIMITS or not is_there or not (named or module == "processing.shapes"):
            continue
        if (module, *argv) not in ran:
            ran.add((module, *argv))
            _run(module, argv)
    assert {module for module, *_ in ran} == set(LIMITS) and len(ran) >= 7


def test_the_tutorials_formula_is_the_loss_of_the_model(home, capsys):
    [program] = blocks(ROOT / "docs" / "tutorial.md", "python")
    found = {}
    exec(compile(program, "tutorial.md", "exec"), found)
    torch.testing.assert_close(found["by_hand"], found["outputs"].loss)
    assert found["in_a"].sum() > 4 and "formula (2): " in capsys.readouterr().out


def test_the_tutorial_names_what_is_in_the_files_that_it_links_to():
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    named = re.findall(r"`(?:(\w+)\.)?(\w+)` in\s+\[[^]]+\]\(\.\./([\w/]+\.py)\)", text)
    assert len(named) >= 7
    for owner, name, file in named:
        code = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        defined = {part.name: part for part in code.body if isinstance(part, (ast.ClassDef, ast.FunctionDef))}
        inside = [part.name for part in defined[owner].body if isinstance(part, ast.FunctionDef)] if owner else defined
        assert name in inside, f"{file} has no {owner} {name}"
    code = "\n".join((ROOT / file).read_text(encoding="utf-8") for file in re.findall(r"\(\.\./([a-z_/]+\.py)\)", text))
    others = set(re.findall(r"`(?!README)(?:[A-Z]\w+\.)?(\w+)`", text))
    assert len(others) > 12
    assert not [name for name in others if not re.search(rf"\b{name}\b", code)]


def test_a_first_model_of_ones_own_photographs_is_made_as_its_page_says(tmp_path, monkeypatch, capsys):
    page = ROOT / "docs" / "first_model.md"
    monkeypatch.chdir(tmp_path)
    for kind, colour in (("cat", "red"), ("قطة", "blue")):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (32 + number, 32), colour).save(tmp_path / "photos" / kind / f"{number}.png")
    [program] = blocks(page, "python")
    exec(compile(program, "rows.py", "exec"), {})
    assert len(Path("train.jsonl").read_text(encoding="utf-8").splitlines()) == 10
    written, others = blocks(page, "yaml")
    Path("mine.yaml").write_text(written, encoding="utf-8")
    assert yaml.safe_load(others).keys() == {"vision_model", "text_model"}
    Image.new("RGB", (40, 30), "red").save("photo.png")
    for lines in blocks(page, "bash"):
        for module, argv in commands_of(lines):
            if module == "train_sft":
                train_sft.main([*argv, *QUICK])
            else:
                _run(module, argv)
    assert Path("model/samples.html").is_file() and Path("judged/results.json").is_file()


def test_what_people_have_is_read_as_the_page_of_a_first_model_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "first_model.md"
    [table] = re.findall(r"\| what there is .*?\n\n", page.read_text(encoding="utf-8"), re.S)
    cells = [row.rpartition(" | ")[2] for row in table.splitlines()]
    model = yaml.safe_load(blocks(page, "yaml")[0])
    model = {name: model[name] for name in ("vision_model", "text_model")}
    ways = list(filter(None, (re.findall(r"`((?:dataset|image_dir|columns): [^`]+)`", cell) for cell in cells)))
    assert len(ways) == len(PEOPLE)
    for (name, write), given in zip(PEOPLE.items(), ways):
        folder = tmp_path / name
        (folder / "photos").mkdir(parents=True)
        monkeypatch.chdir(folder)
        write()
        Path("mine.yaml").write_text("\n".join([*given, yaml.safe_dump(model)]), encoding="utf-8")
        _run("training_vlm.inspect_data.__main__", ["--config", "mine.yaml", "--n", "2"])
        said = capsys.readouterr().out
        assert "a·red·one" in said and "cannot be read" not in said and "dropped" not in said, (name, said[-900:])


def _photo(place="photos/1.jpg", size=32):
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), "red").save(place)
    return Path(place)


def _sorted_photos():
    _photo("photos/a red one/1.jpg"), _photo("photos/a red one/2.jpg"), _photo("photos/none/3.jpg")


def _texts():
    for number in range(3):
        _photo(f"photos/{number}.jpg").with_suffix(".txt").write_text("a red one\n")


def _table():
    _photo()
    Path("table.csv").write_text("photo;what\n" + "1.jpg;a red one\n" * 3)


def _llava():
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a red one"}]
    paths = ["1.jpg", str(_photo().absolute()), "1.jpg"]
    Path("llava.json").write_text(json.dumps([{"image": path, "conversations": turns} for path in paths]))


def _parquet():
    Path("data").mkdir()
    rows = [{"image": {"bytes": _photo().read_bytes(), "path": None}, "caption": "a red one"}] * 3
    datasets.Dataset.from_list(rows).to_parquet("data/0.parquet")


def _shards():
    Path("shards").mkdir()
    _photo().with_suffix(".txt").write_text("a red one")
    with tarfile.open("shards/0.tar", "w") as tar:
        for number in range(3):
            for end in ("jpg", "txt"):
                tar.add(f"photos/1.{end}", f"{number}.{end}")


PEOPLE = {
    "sorted": _sorted_photos,
    "texts": _texts,
    "table": _table,
    "llava": _llava,
    "parquet": _parquet,
    "shards": _shards,
}


def test_every_page_is_reached_from_the_readme_and_every_link_leads_somewhere():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [page.name for page in PAGES[2:] if f"docs/{page.name}" not in readme]
    for page in PAGES:
        links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S))
        for link in links:
            place, _, title = link.partition("#")
            if "://" in link:
                continue
            target = page if not place else (page.parent / place).resolve()
            assert target.exists(), f"{page.name}: {link}"
            if title and target.suffix == ".md":
                heads = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
                anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
                assert title in anchors, f"{page.name}: {link}"


def test_every_example_is_named_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    examples = [path.name for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".ipynb")]
    assert not [name for name in examples if name != "rows.py" and name not in readme]


def test_stage_1_names_the_command_that_follows_as_it_can_be_run_anywhere(capsys):
    _say_goodbye(train_pretrain.PRETRAIN, "out")
    assert "    python -m train_sft --model out " in capsys.readouterr().out
