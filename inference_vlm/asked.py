"""What a model is asked: ids, and images that were opened before anything is computed.

What is special: what is wrong with a prompt is said here, in a line, before the model runs: an image that is none, one
that is a URL or a file where none may be, and more positions than there are, counted.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

from PIL import Image

from processing.data_error_vlm import DuetError
from processing.image_files_vlm import BadImage, ImagePolicy, image_name, is_url, load_image, resolve_reference
from processing.processing_vlm import VLMProcessor


class PromptTooLong(DuetError):
    """A prompt of more positions than the language model has."""


class Prompt(NamedTuple):
    """Ids that a model is to go on with, one id an image, and references to the images in their order."""

    ids: list[int]
    images: list[Any]


class Prepared(NamedTuple):
    """
    A prompt that fits, with its images opened.

    Attributes:
        row: the ids, with each image expanded.
        images: upright RGB.
        names: what tells each image from others.
        counts: the positions of each.
    """

    row: list[int]
    images: list[Image.Image]
    names: list[Hashable]
    counts: list[int]

    @property
    def prompt_tokens(self) -> int:
        """Positions of the prompt."""
        return len(self.row)

    @property
    def image_tokens(self) -> int:
        """Those of them that are images'."""
        return sum(self.counts)


def image_of(part: dict) -> Any:
    """The image that a part of a message carries.

    Raises:
        DuetError: it carries none.
    """
    for key in ("image", "path", "url"):
        if key in part:
            return part[key]
    raise DuetError("an image part names no image; expected a PIL image, a path or a URL under 'image'.")


def reference_of(image: Any, policy: ImagePolicy, allow_files: bool = True) -> Any:
    """An image that may be looked at.

    Raises:
        DuetError: it is a URL or a file, and none may be.
    """
    if is_url(image) and not policy.allow_urls:
        name = image_name(image)
        raise DuetError(f"the image {name} is a URL, and none is fetched here; allow it (--allow_urls), or fetch it.")
    found = resolve_reference(image, policy)
    is_stored = isinstance(found, Image.Image) or (isinstance(found, dict) and found.get("bytes") is not None)
    if not allow_files and not is_stored and not is_url(found) and not str(found).lower().startswith("data:"):
        raise DuetError(f"the image {image_name(image)} is a file, and none is opened here; send the image itself.")
    return found


def opened(reference: Any) -> Image.Image:
    """
    The upright RGB image behind a reference.

    Raises:
        BadImage: it cannot be had; what would mend a data set is not said.
    """
    try:
        return load_image(reference)
    except BadImage as error:
        found, _, remedy = str(error).rpartition("; ")
        if "the row" not in remedy and "--image_dir" not in remedy:
            raise
        raise type(error)(f"{found}; give another image.", error.reason) from error


def too_long(length: int, counts: list[int], limit: int, turns: int) -> str:
    """What is too much, and what can be left out."""
    drop = ["earlier turns"] * (turns > 1)
    if counts:
        drop.append(f"images (the largest takes {max(counts):,})")
    drop.append("words")
    of_images = f", {sum(counts):,} of them those of {len(counts)} image{'s' * (len(counts) > 1)}" if counts else ""
    return (
        f"the prompt takes {length:,} positions{of_images}; the language model has {limit:,}, one of them for an "
        f"answer: leave out {length + 1 - limit:,} or more: {' or '.join(drop)}."
    )


def caption_ids(processor: VLMProcessor, images: int) -> list[int]:
    """The prompt of stage 1: images, of which the caption is what follows."""
    ids, weights = processor.encode_caption([{"type": "image"}] * images)
    return [id for id, weight in zip(ids, weights) if not weight]


__all__ = ["Prepared", "Prompt", "PromptTooLong", "caption_ids", "image_of", "opened", "reference_of", "too_long"]
