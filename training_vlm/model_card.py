"""The Hub card of a run: what the model is, how it is loaded and asked, how it was trained, how good it became.

Everything in it follows from the run. Its metadata are written and read by huggingface_hub's own classes, so that the
Hub finds the model by its bases, its data and its scores. What comes from data or from a model stands in it as text and
as nothing else, and nothing in it tells of the machine, see `private.py`.
"""

import json
import math
import platform
import re
import subprocess
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn
from transformers import SchedulerType
from transformers.training_args import OptimizerNames

from evaluation_vlm.judgement import Judgement, mean_of
from modeling_vlm.adapters_vlm import BASE, is_adapted
from modeling_vlm.configuration_vlm import DUET_VERSION
from processing.batching.account import Account, number_of
from processing.data_error_vlm import JOINERS
from processing.reading.settings import SourceSettings

from .learning.adapters import composed
from .learning.publishing import CURVE, SAMPLES
from .learning.trainer import VLMTrainer
from .licences import Base, find_bases, licence_of
from .private import is_hub_name, public_name, without_folders
from .settings import Arguments
from .stages import Stage
from .training_arguments import precision_of


TEMPLATE = Path(__file__).parent / "model_card.md.jinja"
BUILT_IN = "shapes"
TASK = "image-text-to-text"
_LIBRARIES = ("transformers", "torch", "accelerate", "peft", "datasets", "tokenizers", "huggingface_hub", "Pillow")


class RunCard:
    """
    The card of a run, which knows more the further the run is.

    Args:
        stage: the run's.
        arguments: its settings.
        trainer: whose model it is.

    Attributes:
        losses (`dict[str, float]`): the final ones, once there are some, and what else an evaluation says (`eval_...`).
        judgement (`Judgement`): of the answers to test questions, where there are any.
        samples (`list[tuple[str, str, str]]`): question, expected and generated answer.
        account (`Account`): of what was learned from.
        done (`bool`): whether all steps are.
    """

    def __init__(self, stage: Stage, arguments: Arguments, trainer: VLMTrainer):
        self.stage, self.arguments, self.trainer = stage, arguments, trainer
        self.losses: dict[str, float] = {}
        self.judgement: Judgement | None = None
        self.samples: list[tuple[str, str, str]] = []
        self.account: Account | None = None
        self.done = False
        self._bases: list[Base] | None = None

    @property
    def name(self) -> str:
        """How the model will be loaded: its repository, or the name of the folder that it lies in."""
        args = self.trainer.args
        return self.trainer.hub_model_id or args.hub_model_id or Path(args.output_dir or "").resolve().name

    @property
    def shows_samples(self) -> bool:
        """Whether samples of the data are shown: where it is said, and of the built-in data set."""
        asked = self.arguments.training.card_samples
        if asked is not None:
            return asked
        sources = [*self._sources(), *filter(None, [self.arguments.data.test_source()])]
        return all(source.path == BUILT_IN for source in sources)

    def text(self) -> str:
        """
        The card as it stands now.

        Raises:
            ValueError: its metadata are none that huggingface_hub takes.
        """
        trainer = self.trainer
        config, pictures = self._model.config, self.pictures()
        samples = [[_cell(text) for text in row] for row in self.samples] if self.shows_samples else []
        card = ModelCard.from_template(
            self._data(),
            template_path=str(TEMPLATE),
            title=_cell(self.name.rpartition("/")[2]),
            vision=config.vision_config.model_type,
            text=config.text_config.model_type,
            projector=config.projector_type,
            image_tokens=config.image_seq_length,
            step="" if self.done else f"{trainer.state.global_step} of {trainer.state.max_steps}",
            use=self._use(),
            stage=self.stage,
            bases=[_shown(base) for base in self.bases],
            licence=_licence_in_words(self.bases),
            account=self._account_in_words(),
            components=self._components(),
            settings={key: _cell(value) for key, value in self._settings().items()},
            curve=CURVE if CURVE in pictures else "",
            results=self._results(),
            samples=samples,
            asked="data" if self.judgement is None else "test questions",
            picture=SAMPLES if SAMPLES in pictures else "",
            limits=self._limits(),
            versions=_versions(),
        )
        return str(card)

    def pictures(self) -> list[str]:
        """The files beside it that it shows."""
        shown = [CURVE, *([SAMPLES] if self.samples and self.shows_samples else [])]
        return [name for name in shown if (self.trainer.run_folder / name).is_file()]

    @property
    def bases(self) -> list[Base]:
        """The models that the run began with; their cards are read once."""
        if self._bases is None:
            self._bases = find_bases(self.arguments.model)
        return self._bases

    @property
    def _model(self) -> Any:
        return composed(cast(nn.Module, self.trainer.model))

    def _sources(self) -> list[SourceSettings]:
        return self.arguments.data.sources()

    def _data(self) -> ModelCardData:
        base_models, tags, relation = [base.name for base in self.bases if base.is_nearest], [], None
        if is_adapted(self._model):
            tags = ["peft", "lora"]
            if (base := self._base_of_adapters()[0]) != BASE:
                base_models, relation = [base], "adapter"
        data = [source.path for source in self._sources() if _is_on_hub(source)]
        results = self._eval_results()
        return ModelCardData(
            library_name="transformers",
            pipeline_tag=TASK,
            base_model=list(dict.fromkeys(base_models)) or None,
            datasets=list(dict.fromkeys(data)) or None,
            base_model_relation=relation,
            tags=["duet", "vision-language", f"stage-{self.stage.number}", *tags],
            model_name=self.name.rpartition("/")[2] if results else None,
            eval_results=results or None,  # type: ignore[arg-type]
            **licence_of(self.bases),  # type: ignore[arg-type]
        )

    def _eval_results(self) -> list[EvalResult]:
        """The scores as the Hub's model-index takes them; a number that is none is left out."""
        found = []
        sources, split = self._sources(), ""
        if len(sources) == 1:
            split = sources[0].eval_split or f"held out of {sources[0].split or 'train'}"
        for key, value in self._final().items():
            metric = key.removeprefix("eval_")
            if metric != key and math.isfinite(value):
                name = "Loss a token" if metric == "loss" else metric
                found.append(_result(sources, split, metric, value, name))
        source, judgement = self.arguments.data.test_source(), self.judgement
        if source is None or judgement is None:
            return found
        for metric, value in judgement.values.items():
            shares = judgement.shares(metric)
            note = f" ({judgement.notes[metric]})" if metric in judgement.notes else ""
            values = {f"{metric}{note}": value}
            if len(shares) > 1:
                values |= {f"{metric}, {subset}{note}": mean_of(kinds) for subset, kinds in shares.items()}
            found += [
                _result([source], source.split or "", metric, number, name)
                for name, number in values.items()
                if math.isfinite(number)
            ]
        return found

    def _final(self) -> dict[str, float]:
        """What the end says of the data that were learned from; where there are test data, these were asked about."""
        if self.arguments.data.test_source() is None:
            return self.losses
        return {key: value for key, value in self.losses.items() if key.endswith("loss")}

    def _use(self) -> str:
        name = json.dumps(self.name, ensure_ascii=False).replace("`", "'")
        branch = self.trainer.args.hub_revision
        trust = _TRUST + (f", revision={json.dumps(branch)}" if branch else "")
        use = _USE.format(name=name, trust=trust, ask=self.stage.ask)
        if is_adapted(self._model):
            base, revision = self._base_of_adapters()
            base = f'{name}, subfolder="{BASE}", {trust}' if base == BASE else f"{json.dumps(base)}, {_TRUST}"
            base += f", revision={json.dumps(revision)}" if revision else ""
            use += _USE_PEFT.format(base=base, adapter=f"{name}, revision={json.dumps(branch)}" if branch else name)
        return use

    def _base_of_adapters(self) -> tuple[str, str | None]:
        """What the adapters lie on: the folder beside them, or a repository, at a revision."""
        config = next(iter(self._model.peft_config.values()))
        return config.base_model_name_or_path, config.revision

    def _components(self) -> str:
        lines = ["| part | parameters | learned | how | rate | decay |", "|---|---:|---:|---|---|---|"]
        for part in self.trainer.declared().components():
            rates = f"{part.learning_rate:g} | {part.weight_decay:g}" if part.trained else "- | -"
            policy = part.policy if part.trained else "frozen"
            lines.append(f"| {part.name} | {part.parameters:,} | {part.trained:,} | {policy} | {rates} |")
        return "\n".join(lines)

    def _settings(self) -> dict[str, Any]:
        """What decided the run: the Trainer's settings that every run has, and of ours those that were chosen."""
        args = self.trainer.args
        schedule = SchedulerType(args.lr_scheduler_type).value
        warm_up = args.get_warmup_steps(max(1, self.trainer.state.max_steps))
        settings = {
            "data": ", ".join(_told_of(source) for source in self._sources()),
            **({"epochs": f"{args.num_train_epochs:g}"} if args.max_steps < 0 else {"steps": args.max_steps}),
            "batch": self.trainer.conversations_a_step(),
            "schedule": f"{schedule}, {number_of(warm_up, 'step')} of warm-up",
            "optimizer": f"{OptimizerNames(args.optim).value}, betas {args.adam_beta1:g} and {args.adam_beta2:g}",
            "gradient clipping": args.max_grad_norm,
            "precision": precision_of(args),
            "seed": args.seed,
        }
        if args.label_smoothing_factor:
            settings["label smoothing"] = args.label_smoothing_factor
        for part in (part for part in self.arguments if part is not self.arguments.training):
            for field in fields(part):
                value = getattr(part, field.name)
                if value != field.default and field.name not in _NOT_TOLD and isinstance(value, _TOLD):
                    settings[field.name] = without_folders(str(value))
        return settings

    def _account_in_words(self) -> str:
        if self.account is None:
            return ""
        total = self.account.total
        dropped = total["samples"] - total["learned from"]
        left_out = (
            f" {number_of(dropped, 'more was', 'more were')} left out, as nothing could be learned from "
            f"{'it' if dropped == 1 else 'them'}." * bool(dropped)
        )
        return (
            f"Learned from {number_of(total['learned from'], 'conversation')} with "
            f"{number_of(total['images'], 'image')} and {number_of(total['supervised'], 'token')} to predict, each "
            f"counted as often as it was shown.{left_out}"
        )

    def _results(self) -> str:
        lines = [f"- {key.replace('_', ' ')}: {value:.4g}" for key, value in self._final().items()]
        if self.judgement is not None:
            report = self.judgement.report().replace("`", "'")  # which would end the block
            asked = number_of(len(self.judgement.predictions), "test question")
            lines.append(f"\nAnswers to {asked}, greedy decoding:\n\n```\n{report}\n```")
        return "\n".join(lines)

    def _limits(self) -> list[str]:
        config = self._model.config
        height, width = config.image_size
        tiles = f", or up to {config.max_tiles} tiles of that size" if config.max_tiles > 1 else ""
        limits = [
            f"It sees an image at {width} x {height} pixels{tiles}; what is smaller than a few of them is lost.",
            "It can say what is not in an image, in the tone of what is; nothing it says was checked.",
            "It has what its data and the models that it is made of have: their languages, and their biases.",
        ]
        if self.judgement is None:
            limits.insert(0, "No test questions were asked: how well it answers is not known.")
        elif (right := self.judgement.values.get("exact_match")) is not None:
            limits.insert(0, f"{1 - right:.1%} of its answers to the test questions are not exactly right.")
        return limits


_USE = """from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained({name}, {trust})
processor = AutoProcessor.from_pretrained({name}, {trust})
{ask}
output = model.generate(**inputs)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip())"""

_TRUST = "trust_remote_code=True"
_USE_PEFT = """

# These are adapters and their base, which the lines above put together. With peft itself:
from peft import PeftModel

base = AutoModelForImageTextToText.from_pretrained({base})
model = PeftModel.from_pretrained(base, {adapter})"""

_TOLD = (str, int, float, bool, list)
_NOT_TOLD = {
    "model", "vision_model", "second_vision_model", "text_model", "vision_token", "text_token", "trust_remote_code",
    "vision_trust_remote_code", "text_trust_remote_code", "dataset", "datasets", "dataset_name", "dataset_revision",
    "image_dir", "allow_urls", "allow_local_urls", "allow_links", "train_split", "eval_split", "test_split",
    "test_dataset", "download", "encode_ahead", "cache_vision_features", "tune_vision", "tune_projector", "tune_text",
    "freeze_embeddings", "vision_learning_rate", "projector_learning_rate", "vision_weight_decay",
    "projector_weight_decay",
}  # fmt: skip
"""Settings that the card tells elsewhere, or that are nobody else's business."""


def _is_on_hub(source: SourceSettings) -> bool:
    return source.path != BUILT_IN and is_hub_name(source.path)


def _told_of(source: SourceSettings) -> str:
    """A data set in words: what it is called, and which of it was read."""
    name = source.path if _is_on_hub(source) or source.path == BUILT_IN else public_name(source.path)
    more = [str(part) for part in (source.name, source.split, source.revision) if part]
    share = [] if source.weight is None else [f"weight {source.weight:g}"]
    return f"{name} ({', '.join(more + share)})" if more + share else name


def _result(sources: list[SourceSettings], split: str, kind: str, value: float, name: str) -> EvalResult:
    names = [source.path if _is_on_hub(source) else public_name(source.path) for source in sources]
    one = sources[0] if len(sources) == 1 else None
    return EvalResult(
        task_type=TASK,
        task_name="Image-Text-to-Text",
        # An identifier of the Hub where the data have one, else something that is spelled like one.
        dataset_type=names[0] if one and _is_on_hub(one) else _identifier("-and-".join(names)),
        dataset_name=", ".join(names),
        dataset_config=one.name if one else None,
        dataset_split=split or None,
        dataset_revision=one.revision if one else None,
        metric_type=kind,
        metric_value=value,
        metric_name=name,
    )


def _identifier(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "data"


def _shown(base: Base) -> dict[str, str]:
    name = f"[{_cell(base.name)}](https://huggingface.co/{base.name})" if base.on_hub else _cell(base.name)
    return {"part": _cell(base.part), "shown": name, "licence": _cell(base.licence or "not stated")}


def _licence_in_words(bases: list[Base]) -> str:
    terms = licence_of(bases)
    if not bases:
        return "No licence is claimed for this model."
    if not terms:
        return "No licence is claimed for this model, because not all that it is made of states one."
    if len({base.licence for base in bases}) > 1 or terms == {"license": "other"} and len(bases) > 1:
        return "What it is made of has different licences; this model can be used as far as each of them allows."
    if terms == {"license": "other"}:
        return "What it is made of has a licence of its own, which holds for this model too; its card tells more."
    return f"All that it is made of states the licence {_cell(bases[0].licence)}, and so does this card."


def _versions() -> str:
    found = [f"Duet {DUET_VERSION}{_commit()}", f"Python {platform.python_version()}"]
    for library in _LIBRARIES:
        try:
            found.append(f"{library} {version(library)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def _commit() -> str:
    """The commit of Duet's code, where it is a clone; and whether it was changed since."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        asked = {"capture_output": True, "text": True, "timeout": 10, "check": True}
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], **asked)  # type: ignore[call-overload]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], **asked).stdout.strip()  # type: ignore[call-overload]
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], **asked).stdout  # type: ignore[call-overload]
    except (OSError, subprocess.SubprocessError):
        return ""
    return f" (commit {commit}{', with changes' if changed.strip() else ''})"


# Written as entities, which Markdown takes for the characters themselves and for no mark of its own.
_MARKS = {ord(mark): f"&#{ord(mark)};" for mark in "\\`*_{}[]()<>#|~$:@&\"'"}
_LONGEST = 600


def _cell(text: Any) -> str:
    """A text of the data, or a model's, as it can stand in a table: in one line, and nothing but text."""
    line = " ".join("".join(c if c.isprintable() or c in JOINERS else " " for c in str(text)).split())
    line = line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
    return line.translate(_MARKS).replace("www.", "www&#46;")
