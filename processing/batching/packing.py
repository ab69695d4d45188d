"""Texts of a batch in one row, without padding; what several of them begin with stands there once.

What is special: a text is cut where it begins to be supervised. Before its first prediction it is silent, and silent
positions that texts have in common (ids, and the features of images) are run once, as a trie of any depth; each text
goes on by itself where it differs, or where it first predicts, whichever comes first. So captions of one image each
begin with their own copy of the image's last position, and no position ever predicts two things. A beginning is shared
where it holds an image or is long: below that a row in pieces costs more than it saves.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


IGNORE = -100

LEAST_SHARED = 64
"""Positions that a common beginning without an image needs to have to be run once."""


class Text(NamedTuple):
    """A conversation, expanded: what stands at each of its positions."""

    ids: np.ndarray
    labels: np.ndarray
    """At each token its own id where it is supervised, else -100."""
    weights: np.ndarray
    """Of the labels in the loss."""
    features: np.ndarray
    """The number of the image feature that stands there, -1 where a token does."""

    @property
    def silent(self) -> int:
        """Positions before the first that predicts something; the last is no such, so a text is never all silent."""
        (supervised,) = np.nonzero(self.labels[1:] != IGNORE)
        return int(supervised[0]) if len(supervised) else len(self.ids) - 1


class Row(NamedTuple):
    """Texts in one row, each array `(tokens,)`; labels and weights at their own tokens, -100 and 0 where one begins."""

    ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    features: np.ndarray
    positions: np.ndarray
    segments: list[tuple[int, int, int, int]]
    """`(start, end, parent, text)` each: a run of positions that see themselves and all that their ancestors hold;
    the place of the segment that it continues, an earlier one, -1 where it begins anew; and the number of the text that
    ends with it, -1 where several share it, and in padding."""
    padding: int


class _Piece(NamedTuple):
    """Positions `start` to `end` of a text, those of one that shares them where it is -1."""

    of: int
    start: int
    end: int
    parent: int
    text: int


def pack(texts: Sequence[Text], share_prefix: bool, pad_id: int, multiple: int = 1) -> Row:
    """
    Texts in one row.

    Args:
        texts: at least one, or the row is one position of padding.
        share_prefix: run a common beginning once.
        pad_id: what padding holds.
        multiple: of which the row's length is one; what is missing is a segment of padding at its end.
    """
    columns, segments, length = [], [], 0
    for of, start, end, parent, text in _pieces(texts, share_prefix):
        ids, labels, weights, features = (array[start:end].copy() for array in texts[of])
        labels[0], weights[0] = IGNORE, 0  # what predicts it is not before it, or nothing does
        columns.append((ids, labels, weights, features, np.arange(start, end)))
        segments.append((length, length + end - start, parent, text))
        length += end - start
    padding = -(-max(length, 1) // multiple) * multiple - length
    if padding:
        ids, labels, features = (np.full(padding, value) for value in (pad_id, IGNORE, -1))
        columns.append((ids, labels, np.zeros(padding, np.float32), features, np.arange(padding)))
        segments.append((length, length + padding, -1, -1))
    ids, labels, weights, features, positions = map(np.concatenate, zip(*columns))
    return Row(ids, labels, weights, features, positions, segments, padding)


def packed_length(texts: Sequence[Text], share_prefix: bool) -> int:
    """Positions that texts in one row take, without padding."""
    return sum(piece.end - piece.start for piece in _pieces(texts, share_prefix))


def _pieces(texts: Sequence[Text], share_prefix: bool) -> list[_Piece]:
    """The segments of a row, by the positions that they have in their texts; each after the one that it continues."""
    if not share_prefix:
        return [_Piece(number, 0, len(text.ids), -1, number) for number, text in enumerate(texts)]
    order, common = _neighbours(texts)
    pieces: list[_Piece] = []
    # Texts, what neighbours among them have in common, from where they are to be run, and behind which piece.
    waiting = [(order, common, 0, -1)] if texts else []
    while waiting:
        order, common, start, parent = waiting.pop()
        if len(order) == 1:
            (number,) = order
            pieces.append(_Piece(number, start, len(texts[number].ids), parent, number))
            continue
        depth = min(common)
        if depth > start:
            pieces.append(_Piece(order[0], start, depth, parent, -1))
            parent = len(pieces) - 1
        cuts = [0, *(place + 1 for place, length in enumerate(common) if length == depth), len(order)]
        parts = [(order[a:b], common[a : b - 1], depth, parent) for a, b in zip(cuts, cuts[1:])]
        waiting += sorted(parts, key=lambda part: min(part[0]), reverse=True)  # the first text comes first
    return pieces


def _neighbours(texts: Sequence[Text]) -> tuple[list[int], list[int]]:
    """Texts in an order in which those with the most in common are neighbours, and how much neighbours share."""
    silent = [_names(text)[: text.silent] for text in texts]
    names = [silent.astype(">i8").tobytes() for silent in silent]
    order = sorted(range(len(texts)), key=names.__getitem__)
    return order, [shared(silent[a], silent[b]) for a, b in zip(order, order[1:])]


def _names(text: Text) -> np.ndarray:
    """A number for what stands at each position: images' features are below 0, ids are not."""
    return np.where(text.features < 0, text.ids, -1 - text.features)


def shared(one: np.ndarray, other: np.ndarray) -> int:
    """Positions of two beginnings that are run once: all that they have in common, or none where that is too little."""
    least = min(len(one), len(other))
    (differing,) = np.nonzero(one[:least] != other[:least])
    common = int(differing[0]) if len(differing) else least
    return common if common >= LEAST_SHARED or (one[:common] < 0).any() else 0


__all__ = ["LEAST_SHARED", "Row", "Text", "pack", "packed_length"]
