"""Which items of a data set show one image, and how much of them need not be run again: from columns, without a loop.

What is special: nothing here is guessed from what the items are called. Two items share what `packing` would share of
them: what stands there before either predicts. A sum over any items of a group, each with the one before it, is never
less than what their row takes, so that a batch planned by it never is larger than planned; of captions and of the turns
of a dialogue it is what the row takes exactly.
"""

from typing import NamedTuple

import datasets
import numpy as np
import pyarrow.compute as pc

from .packing import IGNORE, LEAST_SHARED


_AT_ONCE = 50_000
_WIDTH = 16


class Grouped(NamedTuple):
    """
    The items of an epoch, those that show one image beside each other; each array `(items,)`, in that order.

    Items of one group that follow each other take, in one row, the sum of their lengths less what each but the first of
    them shares; and so many images more as each but the first has new ones.
    """

    order: np.ndarray
    """Which item it is."""
    groups: np.ndarray
    """The number of its group."""
    lengths: np.ndarray
    """Its positions."""
    shared: np.ndarray
    """Those that are run for the item before it already, 0 where a group begins."""
    images: np.ndarray
    """Images that it shows."""
    new_images: np.ndarray
    """Those that the item before it does not show."""

    def chosen(self, items: np.ndarray, numbers: np.ndarray) -> "Grouped":
        """
        The same of some of these items.

        Args:
            items: which they are, none twice.
            numbers: what each is called in `order`.
        """
        rank = np.empty(len(self.order), dtype=np.int64)
        rank[self.order] = np.arange(len(self.order))
        sorting = np.argsort(rank[items])
        ranks = rank[items][sorting]
        chosen = Grouped(*(column[ranks] for column in self))
        begins = np.append(True, chosen.groups[1:] != chosen.groups[:-1])[: len(ranks)]
        # What is shared with an earlier one than the neighbour is at least what all between share.
        since, until = np.append(0, ranks[:-1] + 1)[: len(ranks)], ranks.max(initial=-1) + 1

        def with_one_before(values):
            return np.where(begins, 0, np.minimum.reduceat(values[:until], since) if until else values[:0])

        known = with_one_before(self.images - self.new_images)
        return chosen._replace(
            order=numbers[sorting], shared=with_one_before(self.shared), new_images=chosen.images - known
        )


class ImageTokens(NamedTuple):
    """How images stand in what is encoded: by one id, which takes that many positions, or more where it is tiled."""

    id: int
    positions: int
    is_tiled: bool


class _Ragged(NamedTuple):
    """Lists of numbers, one behind the other."""

    values: np.ndarray
    ends: np.ndarray

    @property
    def counts(self):
        return np.diff(self.ends, prepend=0)

    @property
    def starts(self):
        return self.ends - self.counts

    def of(self, items: np.ndarray) -> "_Ragged":
        """The lists of some."""
        counts = self.counts[items]
        ends = np.cumsum(counts)
        places = np.arange(ends[-1] if len(ends) else 0) + np.repeat(self.starts[items] - (ends - counts), counts)
        return _Ragged(self.values[places], ends)

    def first(self, places: np.ndarray) -> np.ndarray:
        """Of the places in `values` the first in each list, counted from its beginning; the list's length if none."""
        found = np.append(places, len(self.values))[np.searchsorted(places, self.starts)]
        return np.minimum(found, self.ends) - self.starts


def group_numbers(encodings: datasets.Dataset) -> np.ndarray:
    """For each item the position of the first row that shows its first image, or its own row's where that has none."""
    return _groups(encodings)[0]


def _groups(encodings) -> tuple[np.ndarray, _Ragged]:
    """Groups, and the number of each image: one number for one name, and for each image that is stored in its row."""
    table = encodings.select_columns(["references", "position"]).with_format("arrow")[:]
    lists, position = table["references"].combine_chunks(), table["position"].to_numpy()
    names = lists.flatten().dictionary_encode()
    counts = pc.list_value_length(lists).to_numpy()
    of = _Ragged(pc.fill_null(names.indices, -1).to_numpy().astype(np.int64), np.cumsum(counts, dtype=np.int64))
    place = np.arange(len(of.values)) - np.repeat(of.starts, counts)
    own = len(names.dictionary) + np.repeat(position, counts) * (place.max(initial=0) + 1) + place
    of = of._replace(values=np.where(of.values < 0, own, of.values))
    groups, shows = position.copy(), counts > 0
    _, index, inverse = np.unique(of.values[of.starts[shows]], return_index=True, return_inverse=True)
    groups[shows] = position[shows][index][inverse]
    return groups, of


def grouped(encodings: datasets.Dataset, image: ImageTokens) -> Grouped:
    """
    What the items of one source share.

    Args:
        encodings: see `encode_rows`.
        image: how the images stand in them.
    """
    groups, images = _groups(encodings)
    order = np.argsort(groups, kind="stable")
    parts = []
    for start in range(0, len(order), _AT_ONCE):
        items = order[max(0, start - 1) : start + _AT_ONCE]
        same_group = np.append(False, groups[items[1:]] == groups[items[:-1]])
        part = _shared(_columns(encodings, items), images.of(items), same_group, image)
        parts.append([column[min(start, 1) :] for column in part])
    lengths, shared, new = map(np.concatenate, zip(*parts)) if parts else [np.zeros(0, dtype=np.int64)] * 3
    return Grouped(order, groups[order], lengths, shared, images.counts[order], new)


def _columns(encodings, items):
    is_range = len(items) and (np.diff(items) == 1).all()
    chosen = range(int(items[0]), int(items[-1]) + 1) if is_range else items
    table = encodings.select_columns(["input_ids", "labels", "length"]).with_format("arrow")[chosen]
    lists = (table[name].combine_chunks() for name in ("input_ids", "labels"))
    ragged = [
        _Ragged(column.flatten().to_numpy().astype(np.int64), np.cumsum(pc.list_value_length(column).to_numpy()))
        for column in lists
    ]
    return *ragged, table["length"].to_numpy()


def _shared(columns, images: _Ragged, same_group, image: ImageTokens):
    """Of items the length, what each shares with the one before, and how many images this does not show."""
    ids, labels, lengths = columns
    is_image = ids.values == image.id
    names = ids.values.copy()
    names[is_image] = -1 - images.values
    before = np.append(0, np.cumsum(is_image))  # images
    in_images = lengths - ids.counts + images.counts

    def expanded(places):
        """Positions that the first so many ids of each take, or fewer where only some of its tiled images are there."""
        shown = before[ids.starts + places] - before[ids.starts]
        in_these = np.where(image.is_tiled & (shown == images.counts), in_images, shown * image.positions)
        return places - shown + in_these

    first_image = ids.first(np.flatnonzero(is_image))
    learned = labels.values != IGNORE
    learned[labels.starts[labels.counts > 0]] = False  # nothing is before it to predict it
    silent = expanded(labels.first(np.flatnonzero(learned))) - 1

    shared = np.minimum(expanded(_common(ids._replace(values=names), same_group)), silent)
    shared[1:] = np.minimum(shared[1:], silent[:-1])
    shared[(shared < LEAST_SHARED) & (shared <= first_image)] = 0
    return lengths, shared, images.counts - _common(images, same_group)


def _common(lists: _Ragged, is_asked: np.ndarray) -> np.ndarray:
    """How many numbers each list begins with that the one before it begins with, too; 0 where that is not asked."""
    starts, counts = lists.starts, lists.counts
    most = np.where(is_asked, np.minimum(counts, np.append(0, counts[:-1])), 0)
    found, alive = np.zeros(len(counts), dtype=np.int64), np.flatnonzero(most)
    while len(alive):
        places = found[alive, None] + np.arange(_WIDTH)
        is_inside = places < most[alive, None]
        places = np.where(is_inside, places, 0)
        here, there = (lists.values[starts[of][:, None] + places] for of in (alive, alive - 1))
        run = ((here == there) & is_inside).cumprod(1).sum(1)
        found[alive] += run
        alive = alive[run == _WIDTH]
    return found


__all__ = ["Grouped", "ImageTokens", "group_numbers", "grouped"]
