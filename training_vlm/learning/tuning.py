"""What learns, as one object: a part of the model, its parameters, how they learn, at which rate, and who said so.

What is special: everything is found from the model's own modules and not from their names. The blocks of a backbone are
the one list of modules that is as long as its config says that it is deep, adapters are what peft's layers say of
themselves; so the rule holds for any encoder and any language model. The optimizer's groups, the table before training,
the model card and the check after the first step are all read off one plan.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from processing.data_error_vlm import DuetError

from ..policy import TuningArguments
from .adapters import composed


if TYPE_CHECKING:
    from .trainer import VLMTrainer

VISION, PROJECTOR, EMBEDDINGS, TEXT, HEAD = "vision encoder", "projector", "token embeddings", "language model", "head"
SIDES = {VISION: "vision", PROJECTOR: "projector"}
"""Parts that may have a rate and a decay of their own, and what these are called by."""
PLAN = "tuning.json"


class Component(NamedTuple):
    """One line of the table shown before training."""

    name: str
    parameters: int
    trained: int
    policy: str
    learning_rate: float
    weight_decay: float


@dataclass(frozen=True)
class PartPlan:
    """
    A part of the model, and what becomes of it.

    Args:
        policy: the word that was declared: frozen, full, last:N, lora; `as set` where only the parameters say it.
        parameters: all of the part's, by their name in the composed model.
        learning: names of those that learn.
        learning_rate, weight_decay: theirs.
    """

    name: str
    policy: str
    parameters: dict[str, nn.Parameter]
    learning: frozenset[str]
    learning_rate: float
    weight_decay: float


@dataclass(frozen=True)
class TuningPlan:
    """What learns of a model; every parameter is in exactly one part."""

    parts: tuple[PartPlan, ...]

    @property
    def learning(self) -> frozenset[str]:
        """The names of all that learns."""
        return frozenset().union(*(part.learning for part in self.parts))

    def apply(self, model: nn.Module) -> None:
        """Have the parameters of a model, or of what is wrapped around it, learn as it was declared."""
        learning = self.learning
        for name, parameter in composed(model).named_parameters():
            parameter.requires_grad_(name in learning)

    def is_stock(self, args: TrainingArguments) -> bool:
        """Whether all that learns has the rate and the decay of `TrainingArguments`."""
        own = {(part.learning_rate, part.weight_decay) for part in self.parts if part.learning}
        return own <= {(args.learning_rate, args.weight_decay)}

    def groups(self, model: nn.Module, decaying: Iterable[str]) -> list[dict[str, Any]]:
        """
        The optimizer's groups, those of the language model's rate first.

        Args:
            decaying: names of the parameters that decay, where their part does.
        """
        decaying, groups = set(decaying), dict[tuple[float, float], list[nn.Parameter]]()
        for name, parameter in _in_order(self.parts, composed(model)):
            part = next(part for part in self.parts if name in part.parameters)
            key = part.learning_rate, part.weight_decay if name in decaying else 0.0
            groups.setdefault(key, []).append(parameter)
        return [{"params": found, "lr": rate, "weight_decay": decay} for (rate, decay), found in groups.items()]

    def components(self) -> list[Component]:
        """How many parameters each part has, and how many of them learn; a part without any is left out."""
        lines = []
        for part in self.parts:
            count = {name: _count(name, parameter) for name, parameter in part.parameters.items()}
            trained = sum(count[name] for name in part.learning)
            line = Component(
                part.name, sum(count.values()), trained, part.policy, part.learning_rate, part.weight_decay
            )
            lines += [line] * (line.parameters > 0)
        return lines


def make_plan(model: nn.Module, tuning: TuningArguments | None, args: TrainingArguments | None = None) -> TuningPlan:
    """
    What learns of a composed model, by what is said; a backbone of which nothing is said is frozen.

    Args:
        model: a `VLMForConditionalGeneration`, or what is wrapped around it.
        tuning: `None` where `requires_grad` says it.
        args: with the rate and the decay of what has none of its own.

    Raises:
        DuetError: another word, more blocks than there are, or something said of what is not there or does not learn.
    """
    inner = composed(model)
    names = {id(parameter): name for name, parameter in inner.named_parameters()}
    found: dict[str, dict[str, nn.Parameter]] = {}
    for part, parameters in _owners(inner):
        found[part] = {names.pop(id(p)): p for p in parameters if id(p) in names}
    words = _words(tuning, inner)
    rate, decay = (0.0, 0.0) if args is None else (args.learning_rate, args.weight_decay)
    parts = []
    for part, own in found.items():
        learning = _learning(tuning, part, words[part], inner, own)
        rates = [_own(tuning, part, what, bool(learning)) for what in ("learning_rate", "weight_decay")]
        settled = (default if value is None else value for value, default in zip(rates, (rate, decay)))
        parts.append(PartPlan(part, words[part], own, frozenset(learning), *settled))
    return TuningPlan(tuple(parts))


def apply_tuning(
    model: PreTrainedModel, vision: str = "frozen", text: str = "frozen", freeze_embeddings: bool = False
) -> None:
    """
    Set `requires_grad` on every parameter of a composed model, for any Trainer; the projector learns.

    Args:
        model: a `VLMForConditionalGeneration`.
        vision, text: `"frozen"`, `"full"` or `"last:N"`.
        freeze_embeddings: keep the token embeddings (and a head tied to them) as they are.

    Raises:
        DuetError: another word, or more blocks than there are.
    """
    if "lora" in (vision, text):
        raise DuetError(
            "adapters are put into a model by peft, see examples/lora.py; expected frozen, full, or last:N."
        )
    make_plan(model, TuningArguments(vision, "full", text, freeze_embeddings)).apply(model)


def _owners(inner) -> Iterator[tuple[str, Iterable[nn.Parameter]]]:
    newline = inner.model.image_newline
    yield VISION, inner.model.vision_tower.parameters()
    yield PROJECTOR, [*inner.model.multi_modal_projector.parameters(), *([] if newline is None else [newline])]
    yield EMBEDDINGS, inner.get_input_embeddings().parameters()  # and a head tied to them
    yield TEXT, inner.model.language_model.parameters()
    yield HEAD, inner.get_output_embeddings().parameters()


def _words(tuning: TuningArguments | None, inner) -> dict[str, str]:
    if tuning is None:
        return dict.fromkeys((VISION, PROJECTOR, EMBEDDINGS, TEXT, HEAD), "as set")
    told = tuning.tune_vision, tuning.tune_projector, tuning.tune_text
    vision, projector, text = (word if said is None else said for said, word in zip(told, ("frozen", "full", "frozen")))
    if projector not in ("full", "frozen"):
        raise DuetError(f"tune_projector={projector!r}: expected full or frozen.")
    embeddings = "frozen" if tuning.freeze_embeddings or text.startswith("last:") else text
    head = "frozen" if text.startswith("last:") else text
    return {VISION: vision, PROJECTOR: projector, EMBEDDINGS: embeddings, TEXT: text, HEAD: head}


def _learning(tuning, part: str, word: str, inner, own: dict[str, nn.Parameter]) -> set[str]:
    """Names of what learns of a part."""
    if word == "as set":
        return {name for name, parameter in own.items() if parameter.requires_grad}
    if word == "frozen":
        return set()
    brought, replaced = _adapters(inner)
    if word == "full":
        return {name for name, parameter in own.items() if id(parameter) not in replaced}
    if word == "lora":
        return {name for name, parameter in own.items() if id(parameter) in brought}
    backbones = _encoders(inner) if part == VISION else [inner.model.language_model]
    chosen = {id(p) for backbone in backbones for p in _last(f"tune_{SIDES.get(part, 'text')}", word, backbone)}
    return {name for name, parameter in own.items() if id(parameter) in chosen}


def _own(tuning: TuningArguments | None, part: str, what: str, learns: bool) -> float | None:
    """A part's own rate or decay, where it has one."""
    option = f"{SIDES.get(part)}_{what}"
    value = getattr(tuning, option, None)
    if value is not None and not learns:
        raise DuetError(f"{option}={value:g}: nothing of the {part} learns; let it learn, or leave this out.")
    if value == 0 and what == "learning_rate":
        raise DuetError(f"{option}=0: the {part} would not learn; say so with tune_{SIDES[part]}: frozen.")
    return value


def _adapters(model: nn.Module) -> tuple[set[int], set[int]]:
    """Ids of the parameters that adapters in force brought, and of those that a copy to be trained stands for."""
    brought: set[int] = set()
    replaced: set[int] = set()
    for module in model.modules():
        for kind in getattr(module, "adapter_layer_names", ()):
            held: Any = getattr(module, kind, None)
            for adapter in getattr(module, "active_adapters", ()):
                if isinstance(held, (nn.ModuleDict, nn.ParameterDict)) and adapter in held:
                    one = held[adapter]
                    brought.update(map(id, one.parameters() if isinstance(one, nn.Module) else [one]))
            if kind == "modules_to_save":
                replaced.update(map(id, module.original_module.parameters()))  # type: ignore[union-attr,operator]
    return brought, replaced


def _encoders(model):
    """The vision encoder, or both of a pair."""
    return getattr(model.model.vision_tower, "encoders", (model.model.vision_tower,))


def _last(option: str, word: str, backbone: PreTrainedModel) -> list[nn.Parameter]:
    match = re.fullmatch(r"last:(\d+)", word)
    blocks = find_blocks(backbone)
    if match is None or not 1 <= int(match[1]) <= len(blocks):
        raise DuetError(
            f"{option}={word!r}: expected frozen, full, lora, or last:N with N from 1 to {len(blocks)}, the number of "
            f"blocks of the {backbone.config.model_type}."
        )
    return [parameter for block in blocks[-int(match[1]) :] for parameter in block.parameters()]


def find_blocks(backbone: PreTrainedModel) -> nn.ModuleList:
    """The backbone's transformer blocks, in order."""
    if not has_blocks(backbone):
        depth = backbone.config.num_hidden_layers
        raise DuetError(f"the {backbone.config.model_type} has no list of {depth} blocks; use frozen or full.")
    return next(_lists(backbone))


def has_blocks(backbone: PreTrainedModel) -> bool:
    """Whether its blocks can be told."""
    return next(_lists(backbone), None) is not None


def _lists(backbone):
    depth = backbone.config.num_hidden_layers
    return (module for module in backbone.modules() if isinstance(module, nn.ModuleList) and len(module) == depth)


def _in_order(parts, inner) -> Iterator[tuple[str, nn.Parameter]]:
    """What learns, as the model has it now, in its own order; the language model's first, whose rate is the run's."""
    own = {name for part in parts if part.name in SIDES for name in part.learning}
    shared = {name for part in parts if part.name not in SIDES for name in part.learning}
    for chosen in (shared, own):
        yield from ((name, parameter) for name, parameter in inner.named_parameters() if name in chosen)


def _count(name: str, parameter: nn.Parameter) -> int:
    if ".original_module." in name:  # which its copy stands for
        return 0
    state = getattr(parameter, "quant_state", None)  # of 4 bit, where a number holds two
    return parameter.numel() if state is None else state.shape.numel()


def save_plan(plan: TuningPlan, checkpoint: Path) -> None:
    """Write what learns into a checkpoint, so that no run of another policy goes on from it."""
    (checkpoint / PLAN).write_text(json.dumps(_state(plan)), encoding="utf-8")


def check_plan(plan: TuningPlan, checkpoint: Path) -> None:
    """
    Refuse a checkpoint of which another policy was made: the optimizer's states would be of other parameters.

    Raises:
        DuetError: what was declared then, and what is now.
    """
    file = checkpoint / PLAN
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name, now in _state(plan).items():
        for what, value in now.items():
            if (was := before.get(name, now)[what]) != value:
                raise DuetError(
                    f"{checkpoint} is of a run in which the {name} had {what} {was}, and here it has {value}; go on as "
                    f"that run did, or start anew from its model, --model {checkpoint}."
                )


def _state(plan: TuningPlan) -> dict[str, dict[str, Any]]:
    return {
        part.name: {
            "the policy": part.policy, "parameters that learn:": len(part.learning),
            "the rate": part.learning_rate if part.learning else None,
            "the decay": part.weight_decay if part.learning else None,
        }
        for part in plan.parts
    }  # fmt: skip


class RatesOfParts(TrainerCallback):
    """
    Knows the rates of the step that was made, for the log: of the parts that have one of their own.

    Attributes:
        rates (`dict[str, float]`): by name, as `projector_learning_rate`.
    """

    def __init__(self, trainer: "VLMTrainer"):
        self.trainer = trainer
        self.rates: dict[str, float] = {}

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Look at the groups before the schedule goes on, as the stock loop does for `learning_rate`."""
        plan = self.trainer.plan
        if plan is None or plan.is_stock(args):
            return
        rate_of = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
        parameters = dict(composed(model).named_parameters())
        for part in plan.parts:
            found = [rate_of[key] for name in part.learning if (key := id(parameters[name])) in rate_of]
            if part.name in SIDES and found:
                self.rates[f"{SIDES[part.name]}_learning_rate"] = float(found[0])


__all__ = [
    "Component",
    "PartPlan",
    "RatesOfParts",
    "TuningPlan",
    "apply_tuning",
    "check_plan",
    "find_blocks",
    "has_blocks",
    "make_plan",
    "save_plan",
]
