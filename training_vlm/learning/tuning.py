"""Which parameters learn: one declared policy, found from the model's own modules and not from their names.

The projector always learns. Nothing, everything or the last N blocks of each backbone learn (without the final
norm). The blocks are the one list of modules that is as long as the config says the backbone is deep, so the rule holds
for any encoder and any language model.
"""

import re
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from processing.data_error_vlm import DuetError


def apply_tuning(
    model: PreTrainedModel, vision: str, text: str, freeze_embeddings: bool = False, projector: str = "full"
) -> None:
    """
    Set `requires_grad` on every parameter of a composed model.

    Args:
        model: a `VLMForConditionalGeneration`.
        vision, text: `"frozen"`, `"full"` or `"last:N"`.
        freeze_embeddings: keep the token embeddings (and a head tied to them) as they are.
        projector: `"full"` or `"frozen"`.

    Raises:
        DuetError: another word, or more blocks than there are.
    """
    if projector not in ("full", "frozen"):
        raise DuetError(f"tune_projector={projector!r}: expected full or frozen.")
    model.requires_grad_(False)
    for parameter in _projector_parameters(model):
        parameter.requires_grad_(projector == "full")
    for encoder in _encoders(model):
        for parameter in _chosen("tune_vision", vision, encoder):
            parameter.requires_grad_(True)
    for parameter in _chosen("tune_text", text, model.model.language_model):
        parameter.requires_grad_(True)
    if text == "full":
        model.get_output_embeddings().requires_grad_(True)
    if freeze_embeddings:
        model.get_input_embeddings().requires_grad_(False)


def _projector_parameters(model):
    newline = model.model.image_newline
    return [*model.model.multi_modal_projector.parameters(), *([] if newline is None else [newline])]


def _encoders(model):
    """The vision encoder, or both of a pair."""
    return getattr(model.model.vision_tower, "encoders", (model.model.vision_tower,))


def _chosen(option: str, choice: str, backbone: PreTrainedModel) -> list[nn.Parameter]:
    if choice == "frozen":
        return []
    if choice == "full":
        return list(backbone.parameters())
    match = re.fullmatch(r"last:(\d+)", choice)
    blocks = find_blocks(backbone)
    if match is None or not 1 <= int(match[1]) <= len(blocks):
        raise DuetError(
            f"{option}={choice!r}: expected frozen, full, or last:N with N from 1 to {len(blocks)}, the number of "
            f"blocks of the {backbone.config.model_type}."
        )
    return [parameter for block in blocks[-int(match[1]) :] for parameter in block.parameters()]


def find_blocks(backbone: PreTrainedModel) -> nn.ModuleList:
    """The backbone's transformer blocks, in order."""
    depth = backbone.config.num_hidden_layers
    lists = [module for module in backbone.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    if not lists:
        raise DuetError(f"the {backbone.config.model_type} has no list of {depth} blocks; use frozen or full.")
    return lists[0]


class Component(NamedTuple):
    """One line of the table shown before training."""

    name: str
    parameters: int
    trained: int


def describe_components(model: PreTrainedModel) -> list[Component]:
    """How many parameters each component has, and how many of them learn; a head tied to the embeddings counts once."""
    embeddings = list(model.get_input_embeddings().parameters())
    groups = {
        "vision encoder": list(model.model.vision_tower.parameters()),
        "projector": _projector_parameters(model),
        "token embeddings": embeddings,
        "language model": list(model.model.language_model.parameters()),
        "head": list(model.get_output_embeddings().parameters()),
    }
    seen: set[int] = set()
    components = []
    for name, parameters in groups.items():
        if name == "language model":
            parameters = [p for p in parameters if id(p) not in {id(e) for e in embeddings}]
        parameters = [p for p in parameters if id(p) not in seen]
        seen.update(id(p) for p in parameters)
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        if parameters:
            components.append(Component(name, sum(p.numel() for p in parameters), trained))
    return components
