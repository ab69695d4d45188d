"""Rows of many texts beside the same texts padded, built by hand: what packing has to equal, for any model."""

import contextlib
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from modeling_vlm.loss_vlm import IGNORE
from tests import matrix


IMAGE = "image"  # among the ids of a node: a whole image


@dataclass
class Node:
    """Ids that texts share, or those of one text: all of them, or with what follows them."""

    ids: list
    below: list["Node"] = field(default_factory=list)
    images: list[int] = field(default_factory=list)  # which of the batch's, one for each IMAGE among the ids


class Batches:
    """
    One forest of texts as a padded batch and as a row.

    Args:
        roots: the texts; a node without others below it ends a text, and all of its ids are learned.
        model: composed of the matrix.
        pixel_values: the images.
    """

    def __init__(self, roots: list[Node], model, pixel_values: torch.Tensor):
        self.model, self.texts = model, []
        self.row = {name: [] for name in ("input_ids", "position_ids", "feature_index", "shift_labels")}
        self.segments = []
        for root in roots:
            self._add(root, -1, [], [])
        packed = {name: torch.tensor([values]) for name, values in self.row.items()}
        self.packed = {**packed, "labels": packed["input_ids"], "segments": self.segments, "pixel_values": pixel_values}
        length = max(len(text) for text in self.texts)
        fields = torch.tensor([text + [(0, -1, IGNORE, 0)] * (length - len(text)) for text in self.texts])
        ids, features, targets, mask = fields.unbind(-1)
        shift_labels = nn.functional.pad(targets, (0, 1), value=IGNORE)[:, 1:]
        self.padded = {
            "input_ids": ids,
            "attention_mask": mask,
            "feature_index": features,
            "shift_labels": shift_labels,
            "labels": ids,
            "pixel_values": pixel_values,
        }

    def _add(self, node, parent, before, last):
        size, token = self.model.config.image_seq_length, self.model.config.image_token_id
        own, images = [], iter(node.images)
        for one in node.ids:
            if one == IMAGE:
                first_of_image = next(images) * size
                own.extend((token, first_of_image + i, IGNORE, 1) for i in range(size))
            else:
                own.append((one, -1, IGNORE if node.below else one, 1))
        path = before + own
        # A branch begins with its own copy of what stands before it; what others follow leaves out its last.
        run = last + (own[:-1] if node.below else own)
        start, first = len(self.row["input_ids"]), len(before) - len(last)
        targets = [target for _, _, target, _ in run[1:]] + [IGNORE]
        self.row["input_ids"].extend(token for token, *_ in run)
        self.row["feature_index"].extend(feature for _, feature, *_ in run)
        self.row["shift_labels"].extend(targets)
        self.row["position_ids"].extend(range(first, first + len(run)))
        number = len(self.segments)
        self.segments.append((start, start + len(run), parent, -1 if node.below else len(self.texts)))
        if not node.below:
            self.texts.append(path)
        for child in node.below:
            self._add(child, number, path, own[-1:])


def forest(model, generator: torch.Generator) -> Batches:
    """
    An image and words that four texts share, two of them more; two images that two share; one of words alone.

    The row is longer than what models of the matrix have learned positions for.
    """

    def some(count):
        return torch.randint(1, 300, (count,), generator=generator).tolist()

    shared = Node([*some(3), IMAGE, *some(2)], images=[0])
    shared.below = [Node(some(9)), Node(some(6)), Node(some(5), [Node(some(7)), Node(some(11))])]
    pixel_values = torch.randn(2, 3, *model.config.image_size, generator=generator)
    both = Node([IMAGE, *some(2), IMAGE], [Node(some(4)), Node(some(8))], images=[1, 0])
    roots = [shared, both, Node(some(24))]
    return Batches(roots, model, pixel_values.to(next(model.parameters()).dtype))


def model_of(name: str, attention: str | None = None, dtype: torch.dtype = torch.float32, **settings):
    """A model of the matrix without dropout, with weights so large that attention matters."""
    kind, its_own = matrix.LANGUAGE_MODELS[name]
    config = matrix.config_of(kind, {**its_own, **settings})
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    model = matrix.compose("SigLIP", config, None)
    language_model = model.model.language_model
    if dtype == torch.float64 and getattr(config, "_experts_implementation", None):
        language_model.set_experts_implementation("eager")  # the other ways are for fewer digits
    if attention is not None:
        language_model.set_attn_implementation(attention)
    matrix.shake(language_model)
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in language_model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5 if parameter is embeddings else 3)
    return model.to(dtype).train()


class Double(TorchFunctionMode):
    """What a model computes in float32 whatever its weights are, in float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def wide(value):
            return torch.float64 if value is torch.float32 else value

        if function is torch.Tensor.float:
            return args[0].double()
        return function(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


def step(model, batch: dict, **kwargs) -> tuple[float, torch.Tensor]:
    """Loss and gradients of a batch."""
    model.zero_grad()
    double = next(model.parameters()).dtype == torch.float64
    with Double() if double else contextlib.nullcontext():
        loss = model(**batch, **kwargs).loss
        loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def off(gradients: torch.Tensor, expected: torch.Tensor) -> float:
    """How far gradients are from what they should be, relative."""
    return ((gradients - expected).norm() / expected.norm()).item()


def as_one_text(batch: dict) -> dict:
    """The row with the mask left out: its texts see each other."""
    return {**batch, "segments": [(0, batch["input_ids"].shape[1], -1, 0)]}
