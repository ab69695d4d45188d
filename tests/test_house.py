"""The house keeps its directions: who may import whom, what travels, and that whatever is there is packaged."""

import ast
import configparser
import dataclasses
import re
import sys
from pathlib import Path

import pytest

from training_vlm.arguments import DataArguments
from training_vlm.efficiency import EfficiencyArguments
from training_vlm.evaluation_arguments import EvaluationArguments


ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "modeling_vlm": set(),
    "processing": set(),
    "inference_vlm": {"processing"},
    "evaluation_vlm": {"processing", "inference_vlm"},
    "training_vlm": {"modeling_vlm", "processing", "inference_vlm", "evaluation_vlm"},
}
"""Package -> the other packages that it may import; nothing imports training_vlm."""
SCRIPTS = {"train_pretrain", "train_sft"}


def imported_packages(file: Path) -> set[str]:
    """Names of the top-level packages that a file imports, its own by a relative import not among them."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_package_imports_against_the_direction(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        name = file.relative_to(ROOT).as_posix()
        allowed = {package} | MAY_IMPORT[package]
        against = imported_packages(file) & (MAY_IMPORT.keys() | SCRIPTS | {"tests", "benchmarks"}) - allowed
        assert not against, f"{name} imports {', '.join(sorted(against))}"


def test_no_name_of_a_shipped_file_is_used_twice():
    names = [path.name for package in ("modeling_vlm", "processing") for path in (ROOT / package).rglob("*_vlm.py")]
    assert len(names) == len(set(names))
    assert not list((ROOT / "processing").glob("*/*_vlm.py"))  # they lie flat in a checkpoint


def test_every_package_is_installed_with_its_data():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    named = set(setup["options"]["packages"].split())
    moved = dict(line.split(" = ") for line in setup["options"]["package_dir"].strip().splitlines())
    there = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for package in MAY_IMPORT
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert named == there | moved.keys()
    folders = {name: ROOT / moved.get(name, name.replace(".", "/")) for name in named}
    packaged = {
        file
        for name, patterns in setup["options.package_data"].items()
        for pattern in patterns.split(",")
        for file in folders[name].glob(pattern.strip())
    }
    data = {
        file
        for folder in folders.values()
        for file in folder.rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc")
    }
    assert packaged == data and {"shapes.yaml", "default.jinja"} <= {file.name for file in packaged}


def test_what_is_imported_is_declared():
    """A library that comes with another today may not come with it tomorrow."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    wanted = setup["options"]["install_requires"].replace("Pillow", "PIL").replace("PyYAML", "yaml").split()
    declared = {line.partition(">")[0] for line in wanted}
    extras = {line.partition(">")[0] for lines in setup["options.extras_require"].values() for line in lines.split()}
    files = [file for package in MAY_IMPORT for file in (ROOT / package).rglob("*.py")] + list(ROOT.glob("train_*.py"))
    imported = set().union(*map(imported_packages, files)) - set(sys.stdlib_module_names) - MAY_IMPORT.keys()
    assert imported <= declared | extras, imported - declared


@pytest.mark.parametrize(
    "kind, page",
    [(DataArguments, "data.md"), (EfficiencyArguments, "speed.md"), (EvaluationArguments, "evaluation.md")],
)
def test_every_option_of_the_data_and_of_the_savings_is_explained(kind, page):
    docs = (ROOT / "docs" / page).read_text(encoding="utf-8")
    options = [field.name for field in dataclasses.fields(kind)]
    unexplained = [name for name in options if not re.search(rf"--{name}\b|`{name}:", docs)]
    assert not unexplained, f"options that docs/{page} says nothing about"


def test_the_picture_of_the_house_names_every_file_and_no_other():
    picture = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = picture.partition("## Rooms")[2].partition("\n## ")[0]
    named = re.findall(r"`([a-z_]+/)*([a-z_]+\.py)`", rooms)
    there = [path.name for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py") if "__" not in path.name]
    assert sorted(name for _, name in named) == sorted(there)
