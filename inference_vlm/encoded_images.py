"""What the language model is given of an image, made once for all prompts that show it.

What is special: an image is decoded and encoded when the first prompt comes that shows it, and given up after the last,
so that memory holds those between, whatever their number in all. Of images that are asked about all along the oldest
are given up, and encoded anew, where they would take more than a bound.
"""

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from PIL import Image

from processing.batching.features import FeatureCache
from processing.batching.images import Seen, image_key, joined
from processing.image_files_vlm import BadImage, ImageReference, load_image
from processing.processing_vlm import VLMProcessor


KEPT_BYTES = 2**28
"""What features may take that wait for other prompts about their image."""


class EncodedImages:
    """
    The features of the images of many prompts.

    Args:
        model: whose `get_image_features` makes them.
        processor: the model's.
        names: those of the images of each prompt, see `name_of`.
        cache: where what the encoder makes of an image is read, in place of the image.

    Attributes:
        count (`int`): how many were encoded.
    """

    def __init__(
        self,
        model: Any,
        processor: VLMProcessor,
        names: Iterable[Sequence[Hashable]],
        cache: FeatureCache | None = None,
    ):
        self.model, self.processor, self.cache = model, processor, cache
        self.count = 0
        self._left = Counter(name for of_prompt in names for name in of_prompt)
        self._kept: dict[Hashable, torch.Tensor] = {}
        self._seen: dict[Hashable, Seen | BadImage] = {}

    def tokens(self, name: Hashable, reference: ImageReference) -> int:
        """
        Positions that an image takes, which is opened for it if need be.

        Raises:
            BadImage: it cannot be had.
        """
        return len(self._kept[name]) if name in self._kept else self._look(name, reference).tokens

    def _look(self, name, reference) -> Seen:
        if name not in self._seen:
            try:
                self._seen[name] = self._opened(reference)
            except BadImage as error:  # remembered, so that a file or an address is tried once
                self._seen[name] = error
        seen = self._seen[name]
        if isinstance(seen, BadImage):
            raise seen
        return seen

    def _opened(self, reference):
        if self.cache is None:
            image = load_image(reference)
            tokens = self.processor.image_tokens(image.height, image.width)
            return Seen(dict(self.processor.process_images([image])), tokens)
        features, grid = self.cache.seen(reference)
        tensors = {"vision_features": features}
        if self.processor.max_tiles > 1:
            tensors["image_grids"] = torch.tensor([grid])
        return Seen(tensors, self.processor.tile_tokens(*grid))

    def needs(self, names: Iterable[Hashable]) -> bool:
        """Whether any of some images has to be encoded."""
        return any(name not in self._kept for name in names)

    def encode(self, shown: dict[Hashable, ImageReference]) -> None:
        """Encode together those of some images that are not, and keep what comes of them."""
        new = {name: self._look(name, reference) for name, reference in shown.items() if name not in self._kept}
        for name in new:
            del self._seen[name]
        if new:
            self._kept.update(zip(new, (features.clone() for features in self._features(list(new.values())))))
            self.count += len(new)

    def encode_nothing(self) -> None:
        """Run the encoder on a blank image: beside processes that share its weights, and have some to encode."""
        if self.cache is None:
            blank = Seen(dict(self.processor.process_images([Image.new("RGB", (8, 8))])), 0)
        else:
            blank = Seen({"vision_features": torch.zeros(1, *self.cache.shape, dtype=self.cache.dtype)}, 0)
        self._features([blank])

    def _features(self, seen: list[Seen]) -> Iterable[torch.Tensor]:
        device, dtype = self.model.device, self.model.dtype
        tensors = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in joined(seen).items()
        }
        return self.model.get_image_features(**tensors, return_dict=True).pooler_output

    def take(self, names: Iterable[Hashable]) -> list[torch.Tensor]:
        """The features of encoded images, `(tokens, hidden)` each, for a prompt that is answered now."""
        names = list(names)
        self.leave_out(names)
        return self.of(names)

    def of(self, names: Iterable[Hashable]) -> list[torch.Tensor]:
        """The features of images that were taken, until they are given up."""
        return [self._kept[name] for name in names]

    def leave_out(self, names: Iterable[Hashable]) -> None:
        """Count the images of a prompt as shown."""
        self._left.subtract(names)

    def give_up(self) -> None:
        """Let go of what no prompt is left for, and of the oldest where the others are too many."""
        self._kept = {name: features for name, features in self._kept.items() if self._left[name] > 0}
        self._seen = {name: seen for name, seen in self._seen.items() if self._left[name] > 0}
        held = sum(features.nbytes for features in self._kept.values())
        while held > KEPT_BYTES:
            held -= self._kept.pop(next(iter(self._kept))).nbytes


def name_of(reference: ImageReference) -> Hashable:
    """What tells an image from others; of one that is stored in its row, a digest of its bytes."""
    key = image_key(reference)
    return hashlib.blake2b(key, digest_size=16).digest() if isinstance(key, bytes) else key


__all__ = ["KEPT_BYTES", "EncodedImages", "name_of"]
