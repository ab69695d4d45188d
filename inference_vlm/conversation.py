"""What a model has read and written stays in memory as keys and values, so that the next turn runs only what is new.

What is special: what is kept is compared position by position, an image's by what it shows, and cut where the new
prompt differs; an image is kept whole or not at all. A cache that cannot be cut (recurrent layers, windows that have
moved on), or whose keys would be others in a longer text (dynamic rotary scaling), is not used: the prompt is run
again, and the answer is the same.
"""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPast


CACHE = ({field.name for field in dataclasses.fields(BaseModelOutputWithPast)} & {"cache", "past_key_values"}).pop()
"""The library's name of a cache, in outputs and arguments: it was renamed in transformers 5.24."""

_OTHER_KEYS_WHEN_LONGER = ("dynamic", "longrope")


class Conversation:
    """The keys and values of what was read and written last, of one conversation with one model."""

    def __init__(self) -> None:
        self._marks: list[Hashable] = []
        self._cache: Cache | None = None

    def __len__(self) -> int:
        """Positions that are kept."""
        return len(self._marks)

    @property
    def nbytes(self) -> int:
        """What they take in memory."""
        layers: list[Any] = [] if self._cache is None else self._cache.layers
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers if layer.is_initialized)

    def known(self, marks: Sequence[Hashable]) -> int:
        """How many of the first positions of a prompt, see `marks_of`, are kept; its last always has to be run."""
        most = min(len(self._marks), len(marks) - 1)
        known = next((at for at in range(most) if self._marks[at] != marks[at]), most)
        while known and isinstance(mark := marks[known], tuple) and mark[1]:  # in the middle of an image
            known -= 1
        return known

    def take(self, marks: Sequence[Hashable]) -> tuple[Cache | None, int]:
        """
        The cache of what a prompt begins with, and the number of its positions; `None` and 0 where it is run again.

        The conversation keeps nothing until `keep`.
        """
        cache, known = self._cache, self.known(marks)
        surplus = len(self._marks) - known
        self._marks, self._cache = [], None
        if cache is None or not known:
            return None, 0
        try:
            if surplus:
                cache.crop(-surplus)
        except (RuntimeError, ValueError):  # a window that has moved on
            return None, 0
        return cache, known

    def keep(self, cache: Any, marks: Sequence[Hashable], config: PreTrainedConfig) -> None:
        """
        Keep what was run.

        Args:
            cache: as `generate` gives it.
            marks: of the prompt and of what was written, whose last token has not been run.
            config: the language model's.
        """
        rope = str(getattr(config, "rope_parameters", None))
        layers = getattr(cache, "layers", None)
        if not layers or any(kind in rope for kind in _OTHER_KEYS_WHEN_LONGER):
            return
        if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
            self._cache, self._marks = cache, list(marks[: cache.get_seq_length()])


def marks_of(row: Sequence[int], image_token: int, names: Sequence[Hashable], counts: Sequence[int]) -> list[Hashable]:
    """What stands at each position: an id, or of an image its name and the place in it."""
    marks: list[Hashable] = list(row)
    images = iter(zip(names, counts))
    at = 0
    while at < len(row):
        if row[at] != image_token:
            at += 1
            continue
        name, count = next(images)
        marks[at : at + count] = [(name, place) for place in range(count)]
        at += count
    return marks


__all__ = ["CACHE", "Conversation", "marks_of"]
