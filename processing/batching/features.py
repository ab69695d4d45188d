"""What a frozen encoder makes of each image, read from files in place of the image.

A cache is a folder of shards, written by any number of processes: the features of many images, one behind the other
(`.features`), and an index of them (`.index`), which gets its name when all that it speaks of is on the disk, so that
what a kill left half written is never read. An image is found by its stamp (`image_stamp`): the path, size and time of
change of a file, the content of what has no path. An image that changed has another stamp and is not found.
"""

import mmap
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..data_error_vlm import DuetError
from ..image_files_vlm import ImageReference, image_name, image_stamp, load_image


ENTRY = np.dtype(
    [("high", "<u8"), ("low", "<u8"), ("shard", "<u8"), ("first", "<u4"), ("rows", "<u2"), ("columns", "<u2")]
)
"""A line of an index: the 16 bytes of a stamp, the number of a shard, the first view in it, and the image's grid."""

FEATURES, INDEX = ".features", ".index"


class Found(NamedTuple):
    """Where the features of an image lie: the shard, the first view in it, and the rows and columns of tiles."""

    shard: int
    first: int
    grid: tuple[int, int]


def mapped(file: Path) -> torch.Tensor:
    """The bytes of a file, read as they are looked at; not to be written to."""
    with open(file, "rb") as stream, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), dtype=torch.uint8)


class FeatureCache:
    """
    Features by image, for a collator in any number of worker processes.

    Args:
        folder: where shards and indices lie, of one tower and one processor.
        shape: `(tokens, width)` of a view.
        dtype: of the features.
    """

    def __init__(self, folder: Path, shape: tuple[int, int], dtype: torch.dtype):
        self.folder, self.shape, self.dtype = folder, shape, dtype
        self._shards: dict[int, torch.Tensor] = {}
        self.entries = np.empty(0, ENTRY)
        self.refresh()

    def __getstate__(self):
        return {**self.__dict__, "_shards": {}}  # a process opens its own

    def __len__(self):
        return len(self.entries)

    @property
    def view_bytes(self) -> int:
        """Bytes that the features of a view take."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def refresh(self) -> None:
        """Read the indices, and with them what other processes have added."""
        sizes = {int(path.stem, 16): path.stat().st_size for path in self.folder.glob(f"*{FEATURES}")}
        read = [np.fromfile(path, ENTRY) for path in sorted(self.folder.glob(f"*{INDEX}"))]
        entries = np.concatenate([np.empty(0, ENTRY), *read])
        lengths = np.array([sizes.get(shard, 0) for shard in entries["shard"].tolist()])
        tiles = entries["rows"].astype(np.int64) * entries["columns"]
        ends = entries["first"] + 1 + np.where(tiles > 1, tiles, 0)
        entries = entries[ends * self.view_bytes <= lengths]
        entries = entries[np.lexsort((entries["low"], entries["high"]))]
        self.entries, self._high = entries, np.ascontiguousarray(entries["high"])  # which is searched much faster

    def find(self, stamp: bytes) -> Found | None:
        """Where the features of an image lie, by its stamp."""
        high, low = np.frombuffer(stamp, "<u8")
        at = int(self._high.searchsorted(high))
        while at < len(self._high) and self._high[at] == high:
            entry = self.entries[at]
            if entry["low"] == low:
                return Found(int(entry["shard"]), int(entry["first"]), (int(entry["rows"]), int(entry["columns"])))
            at += 1
        return None

    def read(self, found: Found) -> torch.Tensor:
        """
        The features of an image, `(views, tokens, width)`: a part of a file that is mapped into memory.

        Raises:
            DuetError: the file is gone.
        """
        if found.shard not in self._shards:
            try:
                content = mapped(self.folder / f"{found.shard:016x}{FEATURES}")
            except OSError as error:
                raise DuetError(
                    f"the cached features in {self.folder} cannot be read: {error.strerror}; start again, and what is "
                    "missing is computed anew."
                ) from error
            self._shards[found.shard] = content.view(self.dtype).view(-1, *self.shape)
        rows, columns = found.grid
        views = 1 + (rows * columns if rows * columns > 1 else 0)
        return self._shards[found.shard][found.first : found.first + views]

    def seen(self, reference: ImageReference) -> tuple[torch.Tensor, tuple[int, int]]:
        """
        The features of an image, and the rows and columns of its tiles.

        Raises:
            BadImage: the image cannot be read.
            DuetError: it is not in the cache, or the cache is gone.
        """
        found = self.find(image_stamp(reference))
        if found is None:
            load_image(reference)  # which says what is wrong with one that cannot be read
            raise DuetError(
                f"{image_name(reference)} is not among the cached features in {self.folder}: it was changed after the "
                "run began, or is none of the run's data; start again, and what changed is computed anew."
            )
        return self.read(found), found.grid


class ShardWriter:
    """
    Adds to a cache: features to a file beside, of which an index speaks once they are on the disk.

    Args:
        cache: what is added to; `find` knows what was added since, too.
    """

    def __init__(self, cache: FeatureCache):
        self.cache = cache
        self._begin()

    def _begin(self):
        self.shard = int.from_bytes(os.urandom(8), "little")
        self.views = 0
        self._lines: dict[bytes, tuple[Any, ...]] = {}
        self._file = None

    def find(self, stamp: bytes) -> Found | None:
        """Where features lie, or will when they are committed."""
        if stamp in self._lines:
            shard, first, *grid = self._lines[stamp]
            return Found(shard, first, tuple(grid))
        return self.cache.find(stamp)

    def name(self, stamp: bytes, found: Found) -> None:
        """Say that an image has features that are there already."""
        self._lines[stamp] = (found.shard, found.first, *found.grid)

    def add(self, stamp: bytes, features: torch.Tensor, grid: tuple[int, int]) -> None:
        """Add the features of an image, `(views, tokens, width)`."""
        if self._file is None:
            self._file = open(self._beside(FEATURES), "wb")  # noqa: SIM115  until `commit`
        content = features.to("cpu", self.cache.dtype).contiguous()
        self._file.write(content.view(torch.uint8).numpy())
        self.name(stamp, Found(self.shard, self.views, grid))
        self.views += len(features)

    def commit(self) -> None:
        """Put in place what was added since the last time."""
        if self._file is not None:
            _close(self._file)
            os.replace(self._beside(FEATURES), self._place(FEATURES))
        if self._lines:
            lines = [(*np.frombuffer(stamp, "<u8"), *line) for stamp, line in self._lines.items()]
            with open(self._beside(INDEX), "wb") as file:
                file.write(np.array(lines, ENTRY).tobytes())
                _close(file)
            os.replace(self._beside(INDEX), self._place(INDEX))
            self.cache.refresh()
        self._begin()

    def discard(self) -> None:
        """Remove what was not committed."""
        if self._file is not None:
            self._file.close()
        for end in (FEATURES, INDEX):
            self._beside(end).unlink(missing_ok=True)

    def _place(self, end):
        return self.cache.folder / f"{self.shard:016x}{end}"

    def _beside(self, end):
        return self.cache.folder / f"unfinished-{self.shard:016x}{end}.part"


def _close(file):
    file.flush()
    os.fsync(file.fileno())
    file.close()


__all__ = ["FeatureCache", "Found", "ShardWriter", "mapped"]
