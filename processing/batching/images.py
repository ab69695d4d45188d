"""The images of one batch: each opened, decoded and made to fit once, however many of its texts show it.

What is special: an image is known by what it is called, with where that may lead; by its bytes, where it is stored in
its row; or by being the same object. No pixels are compared. What is wrong with one is remembered, too, so that every
text that shows it is dropped for it, and a file or an address is tried once.
"""

import os
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import torch

from ..image_files_vlm import BadImage, ImageReference, load_image
from ..processing_vlm import VLMProcessor
from .features import FeatureCache


class Seen(NamedTuple):
    """What an encoder sees of an image, and the positions that it takes."""

    tensors: dict[str, torch.Tensor]
    tokens: int


class BatchImages:
    """
    Images by their references, only one of them in memory as large as it is stored.

    Args:
        processor: the model's processor.
        features: where what the encoder makes of each is read, in place of the image.
    """

    def __init__(self, processor: VLMProcessor, features: FeatureCache | None = None):
        self.processor, self.features = processor, features
        self._found: dict[Hashable, tuple[Seen | BadImage, ImageReference]] = {}

    def __getitem__(self, reference: ImageReference) -> Seen:
        """
        What is seen of an image.

        Raises:
            BadImage: it cannot be had.
        """
        name = image_key(reference)
        if name not in self._found:
            try:
                seen: Seen | BadImage = self._look(reference)
            except BadImage as error:
                seen = error
            self._found[name] = seen, reference  # kept, so that no other object is given its id
        found, _ = self._found[name]
        if isinstance(found, BadImage):
            raise found
        return found

    def _look(self, reference):
        if self.features is not None:
            features, grid = self.features.seen(reference)
            tensors = {"vision_features": features}
            if self.processor.max_tiles > 1:
                tensors["image_grids"] = torch.tensor([grid])
            return Seen(tensors, self.processor.tile_tokens(*grid))
        image = load_image(reference, size=self._size)
        tokens = self.processor.image_tokens(image.height, image.width)
        return Seen(dict(self.processor.process_images([image])), tokens)

    @property
    def _size(self):
        """The least height and width that the image processor needs, so that large files are decoded no larger."""
        if self.processor.max_tiles > 1:  # the grid follows from the size that the file has
            return None
        size = dict(getattr(self.processor.image_processor, "size", None) or {})
        sides = size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge"))
        return sides if None not in sides else None


def image_key(reference: ImageReference) -> Hashable:
    """What tells an image from others without a look at it: its name and policy, its bytes, or the object itself."""
    if isinstance(reference, dict):
        content, path = reference.get("bytes"), reference.get("path")
        if isinstance(content, bytes):
            return content
        if content is None and isinstance(path, (str, os.PathLike)):
            reference = path
    if isinstance(reference, (str, os.PathLike)):
        return os.fspath(reference), getattr(reference, "policy", None)
    return id(reference)


def once(shown: Iterable[Seen]) -> tuple[list[Seen], list[int]]:
    """The images in the order of their first showing, each once, and for every showing where its features begin."""
    starts: dict[int, int] = {}
    images: list[Seen] = []
    first, begins = 0, []
    for image in shown:
        if id(image) not in starts:
            starts[id(image)] = first
            images.append(image)
            first += image.tokens
        begins.append(starts[id(image)])
    return images, begins


def joined(images: list[Seen]) -> dict[str, Any]:
    """The tensors of images, one behind the other."""
    names = images[0].tensors if images else ()
    return {name: torch.cat([image.tensors[name] for image in images]) for name in names}


__all__ = ["BatchImages", "Seen", "image_key", "joined", "once"]
