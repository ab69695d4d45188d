"""A run's settings, from the command line and the yaml that it names.

One file holds the settings of both stages: shared keys at the top level, what differs under `pretrain:` and `sft:`.
The command line wins over the section, the section over the top level, that over the defaults; a key that nothing
reads, and a value of the wrong kind, are errors of one line. Without any argument the recipe of the built-in data set
is run.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from transformers import HfArgumentParser

from processing.data_error_vlm import DuetError, NotFound

from .arguments import DataArguments, GenerationArguments, ModelArguments, suggest
from .defaults import fill_in
from .efficiency import EfficiencyArguments
from .evaluation_arguments import EvaluationArguments
from .policy import TuningArguments
from .stages import STAGES, Stage
from .training_arguments import VLMTrainingArguments


_HERE = Path(__file__).resolve().parent
# Beside this file where Duet was installed from a wheel, beside its folder in a clone.
RECIPES = next(folder for folder in (_HERE / "recipes", _HERE.parent / "recipes") if folder.is_dir())
DEFAULT_RECIPE = RECIPES / "shapes.yaml"


class Arguments(NamedTuple):
    """All settings of a run, in seven parts."""

    model: ModelArguments
    tuning: TuningArguments
    data: DataArguments
    generation: GenerationArguments
    efficiency: EfficiencyArguments
    evaluation: EvaluationArguments
    training: VLMTrainingArguments


class _Parser(HfArgumentParser):
    """argparse's, whose errors are one line and not every option there is."""

    def error(self, message: str):
        raise DuetError(f"{message}; --help lists all options.")


def parse_arguments(
    stage: Stage, argv: list[str] | None = None, adjust: Callable[[dict[str, Any]], None] = lambda settings: None
) -> Arguments:
    """
    The settings of one stage from the command line and `--config FILE`.

    Args:
        stage: whose section of a yaml file is read.
        argv: the command line, `sys.argv[1:]` if not given.
        adjust: changes what was set, by name, before any of it is looked at; what was not has its default.

    Raises:
        DuetError: a setting that nothing reads, a value that it cannot have, a yaml of another shape, or no such file.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(
        tuple(Arguments.__annotations__.values()),  # type: ignore[arg-type]
        description=f"Stage {stage.number} of {len(STAGES)}. Every setting can stand in a yaml file: --config FILE.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, default=None, help="yaml with settings of both stages; see recipes/.")
    config, others = split_config(argv)
    sources: dict[str, str] = {}
    if config is not None:
        known = [f.name for kind in parser.dataclass_types for f in fields(kind) if f.init]
        settings = read_config(config, stage, known)
        _check_kinds(config, settings, parser)
        parser.set_defaults(**settings)
        sources = dict.fromkeys(settings, str(config))
    namespace, unknown = parser.parse_known_args(others)
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        hint = "; a pattern of files stands in quotes" if os.path.exists(unknown[0]) else suggest(unknown[0], options)
        raise DuetError(f"unknown argument {unknown[0]!r}{hint}; --help lists all.")
    sources |= dict.fromkeys(_told(parser, others), "command line")
    adjust(settings := vars(namespace))
    fill_in(stage, settings, sources)
    parsed = Arguments(*parser.parse_dict(settings, allow_extra_keys=True))
    parsed.tuning.sources = sources
    parsed.tuning.check_told()
    parsed.efficiency.settle(parsed.data, parsed.training)
    parsed.evaluation.settle(parsed.data, parsed.training)
    return parsed


def _told(parser: HfArgumentParser, argv: list[str]) -> list[str]:
    """The settings that a command line names; argparse gives no default to what a namespace has already."""
    unsaid = object()
    namespace = argparse.Namespace(**{action.dest: unsaid for action in parser._actions})
    found, _ = parser.parse_known_args(argv, namespace)
    return [name for name, value in vars(found).items() if value is not unsaid]


# Settings that a yaml file may give as a mapping or a list.
_STRUCTURED = {
    "vision_model", "second_vision_model", "text_model", "projector_settings", "image_size", "columns", "datasets",
    "test_dataset", "lora_target_modules", "vision_feature_layer",
}  # fmt: skip

# Settings whose on and off a yaml reads as true and false.
_SWITCHES = {"padding_free", "share_prefix"}


def _check_kinds(config: Path, settings: dict[str, Any], parser: HfArgumentParser) -> None:
    """Refuse what argparse would not look at, because it converts texts only."""
    ours = {f.name for kind in parser.dataclass_types for f in fields(kind) if kind is not VLMTrainingArguments}
    wanted = {int: "a whole number", float: "a number", str: "a text"}
    for action in parser._actions:
        value, kind = settings.get(action.dest), action.type
        if value is None or isinstance(value, str) or kind not in wanted or action.dest in _STRUCTURED:
            continue
        if kind is str and action.dest not in ours:  # the library's may be lists or mappings as well
            continue
        if isinstance(value, bool) and action.dest in _SWITCHES:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, kind) if kind is float else kind):
            raise DuetError(f"config {config} has {action.dest}: {value!r}; expected {wanted[kind]}.")


def split_config(argv: list[str]) -> tuple[Path | None, list[str]]:
    """
    The yaml that a command line names, and the rest of it; of an empty one the recipe of the built-in data set.

    Raises:
        DuetError: `--config` without a name.
    """
    config, others = None if argv else DEFAULT_RECIPE, []
    position = 0
    while position < len(argv):
        argument = argv[position]
        if argument == "--config":
            if position + 1 == len(argv):
                raise DuetError("--config needs the name of a yaml file.")
            config, position = Path(argv[position + 1]), position + 1
        elif argument.startswith("--config="):
            config = Path(argument.removeprefix("--config="))
        else:
            others.append(argument)
        position += 1
    return config, others


def read_config(file: Path, stage: Stage, known: list[str]) -> dict[str, Any]:
    """
    The settings that a yaml file has for a stage: its section over its top level.

    Args:
        file: a path, or the name of a recipe (`shapes`, `coco_vit_gpt2`).
        stage: whose section is read.
        known: names of all settings.
    """
    file, settings = _read_yaml(file)
    sections = {name: settings.pop(name, None) or {} for name in STAGES}
    for place, values in (("", settings), *((f" under {name}:", values) for name, values in sections.items())):
        if not isinstance(values, dict):
            raise DuetError(f"config {file} has a {type(values).__name__}{place}; expected `setting: value` lines.")
        for key in values:
            if key not in known:
                raise DuetError(f"config {file} has an unknown setting {key!r}{place}{suggest(key, known)}.")
    return {**settings, **sections[stage.section]}


def stages_of(file: Path) -> list[Stage]:
    """The stages that a yaml file has a section for."""
    _, settings = _read_yaml(file)
    return [stage for name, stage in STAGES.items() if name in settings]


def _read_yaml(file: Path) -> tuple[Path, dict[str, Any]]:
    recipe = RECIPES / f"{file.name.removesuffix('.yaml')}.yaml"
    if not file.is_file() and recipe.is_file():
        file = recipe
    if not file.is_file():
        recipes = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
        raise NotFound(f"config {str(file)!r} is neither a file nor a recipe ({recipes}).")
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DuetError(f"config {file} is no yaml: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise DuetError(f"config {file} holds a {type(settings).__name__}; expected `setting: value` lines.")
    return file, settings
