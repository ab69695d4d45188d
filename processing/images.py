"""An image reference becomes pixels here, and nowhere else.

Rows and conversations carry references: a PIL image, a path, or `{"bytes", "path"}` as the `datasets` library stores
images. They are opened when a batch is made, in the worker processes, so that neither a row nor a cache ever holds
pixels. Whatever the file is, the model sees upright RGB: EXIF orientation applied, transparency laid on white, 16 bits
scaled to 8, the first frame of an animation.
"""

import io
import os
from typing import Any

from PIL import Image

from .processing_vlm import to_rgb


ImageReference = Image.Image | str | os.PathLike | dict[str, Any]


def load_image(reference: ImageReference) -> Image.Image:
    """The image behind a reference, as an upright RGB image.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no image, or a broken one. Both messages are one line and name the file.
    """
    image = _open(reference)
    try:
        return to_rgb(image)
    except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
        raise _unreadable(reference, error) from error
    finally:
        _close(image, reference)


def check_image(reference: ImageReference) -> None:
    """Raise what `load_image` would for a file that is missing or no image; only its header is read, no pixel."""
    _close(_open(reference), reference)


def _open(reference: ImageReference) -> Image.Image:
    """The image with its header read; the caller's own object where the reference is one."""
    if isinstance(reference, Image.Image):
        return reference
    source = reference
    if isinstance(reference, dict):
        content = reference.get("bytes")
        source = io.BytesIO(content) if content is not None else reference.get("path")
    if not isinstance(source, (str, os.PathLike, io.BytesIO)):
        raise ValueError(
            f"found {type(reference).__name__} where an image was expected: give a PIL image, a path, "
            'or {"bytes": ..., "path": ...}'
        )
    try:
        return Image.open(source)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{_name(reference)}: no such image file; check the path, and the folder given as --image_dir"
        ) from None
    except Exception as error:
        raise _unreadable(reference, error) from error


def _close(image: Image.Image, reference: ImageReference) -> None:
    if image is not reference:  # the caller's own image stays open
        image.close()


def _unreadable(reference: ImageReference, error: Exception) -> ValueError:
    reason = "its format is not recognised" if isinstance(error, Image.UnidentifiedImageError) else str(error)
    reason = " ".join(reason.split()) or type(error).__name__
    return ValueError(f"{_name(reference)}: not a readable image ({reason}); remove the row or replace the file")


def _name(reference: ImageReference) -> str:
    """What to call an image in a message."""
    if isinstance(reference, dict):
        content, path = reference.get("bytes"), reference.get("path")
        return str(path) if path else f"an image stored in its row ({len(content or b''):,} bytes)"
    return f"a {type(reference).__name__}" if isinstance(reference, Image.Image) else str(reference)
