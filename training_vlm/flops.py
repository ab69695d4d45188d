"""What a training step has to compute, in floating point operations; the one place that says it.

What is special: nothing is known of any family of models. Each part is run once without weights, forwards and, as far
as something in it or before it learns, backwards, under torch's own counter; autograd itself tells which products that
needs. A language model is run at two lengths, which tells what costs by position (linear layers, the active experts of
a mixture) from what costs by pair of positions (attention). So a step costs what its batch holds: images that are
encoded, positions that are run, pairs that see each other, positions that are predicted. Recomputed blocks, padding,
pairs that a mask hides and logits that nobody reads are no part of it; elementwise work is not counted.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling_vlm import VLMForConditionalGeneration
from modeling_vlm.vision_vlm import blank_image

from .weightless import blank, blank_like, weightless


LENGTH = 512  # long enough for layers that work on pieces of a sequence


@dataclass
class Work:
    """
    What batches hold that has to be computed.

    Attributes:
        encoded: views that go through the vision encoder.
        projected: views that go through the projector, those of a cache too.
        positions: of the language model, without padding; what texts share once.
        predicted: positions at which the head is needed.
        pairs: how many pairs of positions see each other in a layer, by its window (`None`: none).
    """

    encoded: int = 0
    projected: int = 0
    positions: int = 0
    predicted: int = 0
    pairs: Counter[int | None] = field(default_factory=Counter)

    def add(self, other: "Work") -> None:
        """Add what another batch holds."""
        for name in ("encoded", "projected", "positions", "predicted"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.pairs.update(other.pairs)

    def times(self, number: float) -> "Work":
        """So often that."""
        pairs = Counter({window: int(count * number) for window, count in self.pairs.items()})
        names = ("encoded", "projected", "positions", "predicted")
        return Work(**{name: int(getattr(self, name) * number) for name in names}, pairs=pairs)


@dataclass(frozen=True)
class Costs:
    """
    Floating point operations of a training step of one model, forwards and backwards.

    Attributes:
        encoding, projecting: of a view.
        position: of a position of the language model.
        pairs: of a pair of positions in all layers of a window (`None`: none).
        prediction: of a position at which the head is needed.
    """

    encoding: int
    projecting: int
    position: int
    pairs: dict[int | None, float]
    prediction: int

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The windows that `Work` counts pairs for."""
        return tuple(self.pairs)

    def of(self, work: Work) -> int:
        """The operations that this work takes."""
        attention = sum(cost * work.pairs[window] for window, cost in self.pairs.items())
        linear = self.position * work.positions + self.prediction * work.predicted
        return int(self.encoding * work.encoded + self.projecting * work.projected + linear + attention)


def windows_of(text_config: Any) -> tuple[int | None, ...]:
    """The window of each layer of a language model's config, `None` for a layer that sees all before it."""
    window = getattr(text_config, "sliding_window", None)
    window = window if getattr(text_config, "use_sliding_window", True) else None
    kinds = getattr(text_config, "layer_types", None) or ["sliding_attention"]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds if "attention" in kind) or (None,)


def work_of(batch: dict[str, Any], lengths: Iterable[int], predicted: int, windows: Iterable[int | None]) -> Work:
    """
    What a batch of the collator holds; nothing is asked of a device.

    Args:
        lengths: positions of its conversations.
        predicted: its supervised positions.
        windows: those to count pairs for.
    """
    runs = [(0, length) for length in lengths]
    if batch.get("segments") is not None:
        runs = list(_runs(batch["segments"]))
    encoded = 0 if batch.get("pixel_values") is None else len(batch["pixel_values"])
    projected = encoded if batch.get("vision_features") is None else len(batch["vision_features"])
    pairs = Counter({window: sum(_pairs(*run, window) for run in runs) for window in windows})
    return Work(encoded, projected, sum(length for _, length in runs), predicted, pairs)


def _runs(segments):
    """Of each segment how many positions it sees before its own, and how many it has; padding is none."""
    before: list[int] = []
    parents = {parent for _, _, parent, _ in segments}
    for place, (start, end, parent, text) in enumerate(segments):
        before.append(0 if parent < 0 else before[parent] + segments[parent][1] - segments[parent][0])
        if text >= 0 or place in parents:
            yield before[-1], end - start


def _pairs(before: int, length: int, window: int | None) -> int:
    """How many keys the queries of a run see together, each up to its own position and within the window."""
    if window is None or before + length <= window:
        return length * before + length * (length + 1) // 2
    growing = max(0, min(length, window - before))  # queries that see all before them
    return growing * before + growing * (growing + 1) // 2 + (length - growing) * window


def costs_of(model: VLMForConditionalGeneration) -> Costs:
    """
    What a training step of a composed model costs, as its parameters learn now.

    Args:
        model: real or on the meta device; it is as before afterwards.
    """
    base, was_training = model.model, model.training
    model.eval()
    try:
        with weightless(model), _plain_attention(base.vision_tower), _plain_attention(base.language_model):
            encoding, projecting, flows = _vision(base)
            flows = flows or any(p.requires_grad for p in base.get_input_embeddings().parameters())
            longest = min(LENGTH, base.max_positions or LENGTH)
            lengths = longest // 2, longest // 2 * 2
            width = base.get_input_embeddings().embedding_dim
            short, long = (_count(base.language_model, blank(1, length, width), flows)[0] for length in lengths)
            pair = (long - 2 * short) / (lengths[1] ** 2 - 2 * lengths[0] ** 2)
            position = (short - pair * lengths[0] ** 2) / lengths[0]
            learned = flows or any(p.requires_grad for p in base.language_model.parameters())
            prediction, _ = _count(model.lm_head, blank(1, model.lm_head.in_features), learned)
    finally:
        model.train(was_training)
    layers = Counter(windows_of(model.config.text_config))
    pairs = {window: pair * number / layers.total() for window, number in layers.items()}
    return Costs(encoding, projecting, round(position), pairs, prediction)


def _vision(base) -> tuple[int, int, bool]:
    """Operations of a view in the encoder and in the projector, and whether gradients flow out of them."""
    image = blank_like(blank_image(base.vision_tower, base.config.image_size))
    encoding, features = _count(lambda image: base.encode_views(image)[1], image, False)
    projecting, projected = _count(base.multi_modal_projector, features.detach(), features.requires_grad)
    return encoding, projecting, projected.requires_grad or base.image_newline is not None


def _count(part, inputs: torch.Tensor, flows: bool) -> tuple[int, torch.Tensor]:
    """Operations of a part forwards and backwards, and what it gives; gradients flow on where `flows`."""
    inputs = inputs.requires_grad_(flows)
    grouped = getattr(torch.ops.aten, "_grouped_mm", None)  # which earlier releases of torch have not
    own = {} if grouped is None else {grouped: _grouped_flops}
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        out = part(inputs_embeds=inputs, use_cache=False) if hasattr(part, "config") else part(inputs)
        out = out if isinstance(out, torch.Tensor) else out.last_hidden_state
        if out.requires_grad:
            out.sum().backward()
    return counter.get_total_flops(), out


def _grouped_flops(one, other, *args, out_shape=None, **kwargs) -> int:
    """Every row of the first with the matrix of its group, or of two that meet in their rows."""
    return 2 * one[-2] * one[-1] * other[-1]


@contextlib.contextmanager
def _plain_attention(backbone) -> Iterator[None]:
    """Within it attention is written out, so that its products are seen."""
    parts = getattr(backbone, "encoders", (backbone,))
    asked = [part.config._attn_implementation for part in parts]
    for part in parts:
        part.set_attn_implementation("eager")
    try:
        yield
    finally:
        for part, name in zip(parts, asked):
            part.set_attn_implementation(name)


__all__ = ["Costs", "Work", "costs_of", "windows_of", "work_of"]
