"""An image reference becomes pixels here, and nowhere else.

Rows and conversations carry references: a PIL image, a path, `{"bytes", "path"}` as the `datasets` library stores
images, a URL, or the image itself as a `data:` URI. `resolve_reference` says where a row's reference points and refuses
what leads out of the data set's folder; `load_image` opens it when a batch is made, in the worker processes, so that
neither a row nor a cache ever holds pixels. Whatever the file is, the model sees upright RGB: EXIF orientation applied,
transparency laid on white, 16 bits scaled to 8, the first frame of an animation.
"""

import base64
import binascii
import io
import os
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import get_session
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import httpx
from PIL import Image

from .data_error_vlm import DuetError
from .images_vlm import to_rgb


ImageReference = Image.Image | str | os.PathLike | dict[str, Any]

MISSING = "missing image file"
UNREADABLE = "unreadable image"
TOO_LARGE = "image too large"
NOT_FETCHED = "image could not be fetched"

FETCH_SECONDS = 10
FETCH_BYTES = 20_000_000

_EXIF_ORIENTATION = 0x0112
_LYING = (5, 6, 7, 8)
"""The EXIF orientations that exchange width and height."""


class BadImage(DuetError):
    """An image that cannot be had. Its message is one line that names the image; `reason` is its kind, a constant."""

    # The default is for `DataLoader`, which raises what a worker raised anew, from its message alone.
    def __init__(self, message: str, reason: str = UNREADABLE):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):  # exceptions travel from worker processes by pickle, which would give `message` alone
        return type(self), (str(self), self.reason)


class MissingImage(BadImage, FileNotFoundError):
    """There is no such image file."""


def resolve_reference(
    reference: ImageReference, image_dir: str | os.PathLike | None, allow_urls: bool = False
) -> ImageReference:
    """
    Where a reference that a row holds points: one that `load_image` can open from any working directory.

    Args:
        reference: what the row has. An image that is stored in its row, or given as a `data:` URI, stays as it is.
        image_dir: the folder that relative paths start from and that no path may lead out of; without it a path has to
            be absolute.
        allow_urls: whether http and https URLs may be fetched.

    Raises:
        ValueError: a reference of another kind, or one that leads where it may not; one line, without the row.
    """
    path = reference
    if isinstance(reference, dict):
        if reference.get("bytes") is not None:
            return reference
        path = reference.get("path")
    if isinstance(path, Image.Image):
        return path
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        raise _no_reference(reference)
    path = os.fspath(path)
    if _is_data_uri(path):
        return path
    if scheme := re.match(r"([a-z][a-z0-9+.-]*)://|data:", path, re.IGNORECASE):
        if (scheme[1] or "").lower() not in ("http", "https"):
            expected = "a path, an http or https URL, or data:image/...;base64,..."
            raise DuetError(f"the image {_short(path)} is of an unknown scheme; expected {expected}")
        if not allow_urls:
            raise DuetError(
                f"the image {_short(path)} is a URL; add --allow_urls, or fetch the images and name their folder with "
                "--image_dir"
            )
        return path
    if image_dir is None:
        if os.path.isabs(path):
            return path
        raise DuetError(f"the image is the path {_short(path)}; name the folder it is relative to with --image_dir")
    return inside(image_dir, path)


def inside(folder: str | os.PathLike, path: str) -> str:
    """The absolute path of a file named by a data set, which may not lead out of the folder of its images.

    Raises:
        ValueError: it does; one line, without the row.
    """
    base = os.path.abspath(Path(folder).expanduser())
    full = os.path.normpath(os.path.join(base, path))
    # Where the folder is a link, a path may also name what is behind it.
    if not any(os.path.commonpath([at(base), at(full)]) == at(base) for at in (str, os.path.realpath)):
        raise DuetError(
            f"the image {_short(path)} lies outside {base}; give a folder that holds all of them as --image_dir"
        )
    return full


def load_image(reference: ImageReference, size: tuple[int, int] | None = None) -> Image.Image:
    """
    The image behind a reference, as an upright RGB image.

    Args:
        reference: what `resolve_reference` gives.
        size: (height, width) that the caller will scale the image down to. A JPEG that is at least twice as large
            comes reduced to a half, a quarter or an eighth, never below `size`, which is decoded in less time.

    Raises:
        MissingImage: a `BadImage` and a `FileNotFoundError`: there is no such file.
        BadImage: the file is no image, a broken one or a too large one, or it could not be fetched.
        ValueError: the reference is none.
    """
    with _opened(reference) as image:
        if size is not None and image is not reference:
            height, width = size
            # Does nothing but for a JPEG.
            image.draft(None, (height, width) if _is_lying(image) else (width, height))
        return to_rgb(image)


def check_image(reference: ImageReference) -> None:
    """Raise what `load_image` would for a file that is missing or no image; only its header is read, no pixel.

    A URL is not fetched.
    """
    if not is_url(reference):
        with _opened(reference):
            pass


def image_size(reference: ImageReference) -> tuple[int, int]:
    """
    Height and width of the upright image behind a reference, from its header alone.

    Raises:
        MissingImage, BadImage, ValueError: as `load_image`.
    """
    with _opened(reference) as image:
        return image.size if _is_lying(image) else image.size[::-1]


def _is_lying(image: Image.Image) -> bool:
    """Whether a viewer exchanges width and height."""
    if image.format == "TIFF":  # of which Pillow exchanges them itself
        return False
    exif = Image.Image.getexif(image)
    if image.format == "PNG" and "exif" not in image.info and image.fp is not None:
        # It may come behind the pixels, which Pillow's own `getexif` would decode to find it.
        file, place = image.fp, image.fp.tell()
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length = int.from_bytes(head[:4], "big")
            if head[4:] == b"eXIf":
                exif.load(b"Exif\x00\x00" + file.read(length))
                break
            file.seek(length + 4, os.SEEK_CUR)
        file.seek(place)
    return exif.get(_EXIF_ORIENTATION) in _LYING


@contextmanager
def _opened(reference: ImageReference) -> Iterator[Image.Image]:
    """The image with its header read, the caller's own object where the reference is one; all errors are `BadImage`."""
    source = _source(reference)
    image = None
    try:
        # Pillow warns of what is odd in a file, and only warns of an image larger than its limit.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = source if isinstance(source, Image.Image) else Image.open(source)
            yield image
    except (FileNotFoundError, NotADirectoryError):
        message = f"{_name(reference)}: no such image file; check the path, and the folder given as --image_dir"
        raise MissingImage(message, MISSING) from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadImage(
            f"{_name(reference)}: more pixels than the limit of {Image.MAX_IMAGE_PIXELS:,}, which keeps a "
            "decompression bomb from filling the memory; remove the row or scale the image down",
            TOO_LARGE,
        ) from error
    except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
        raise _unreadable(reference, error) from error
    finally:
        if image is not None and image is not reference:  # the caller's own image stays open
            image.close()


def _source(reference: ImageReference) -> Image.Image | str | os.PathLike | io.BytesIO:
    """What Pillow opens: the bytes of an image that is stored, written out or fetched, else its path."""
    source = reference
    if isinstance(reference, dict):
        content = reference.get("bytes")
        source = io.BytesIO(content) if content is not None else reference.get("path")
    if not isinstance(source, (Image.Image, str, os.PathLike, io.BytesIO)):
        raise _no_reference(reference)
    if _is_data_uri(source):
        try:
            return io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True))
        except binascii.Error as error:
            raise _unreadable(reference, error) from error
    return io.BytesIO(_fetch(source)) if is_url(source) else source


def _fetch(url: str) -> bytes:
    """What lies at a URL, within `FETCH_SECONDS` (of waiting and in all) and `FETCH_BYTES`."""
    remedy = "remove the row, or fetch the images and name their folder with --image_dir"
    until, content = time.monotonic() + FETCH_SECONDS, bytearray()
    try:
        with get_session().stream("GET", url, timeout=FETCH_SECONDS) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > FETCH_BYTES:
                    raise BadImage(f"{_short(url)}: more than {FETCH_BYTES:,} bytes; {remedy}", TOO_LARGE)
                if time.monotonic() > until:
                    raise TimeoutError
    except httpx.HTTPStatusError as error:
        why = f"the server answers {error.response.status_code}"
    except (TimeoutError, httpx.TimeoutException):
        why = f"not there within {FETCH_SECONDS} seconds"
    except OfflineModeIsEnabled:
        why = "HF_HUB_OFFLINE is set"
    except BadImage:
        raise
    except (OSError, ValueError, httpx.HTTPError, httpx.InvalidURL) as error:
        why = _short(" ".join(str(error).split()) or type(error).__name__)
    else:
        return bytes(content)
    raise BadImage(f"{_short(url)}: the image could not be fetched ({why}); {remedy}", NOT_FETCHED)


def is_url(reference: Any) -> bool:
    """Whether a reference has to be fetched."""
    return isinstance(reference, str) and re.match("https?://", reference, re.IGNORECASE) is not None


def _is_data_uri(reference: Any) -> bool:
    return isinstance(reference, str) and re.match("data:image/[^,]*;base64,", reference, re.IGNORECASE) is not None


def _no_reference(reference: Any) -> ValueError:
    return ValueError(
        f"found {type(reference).__name__} where an image was expected: give a PIL image, a path, "
        '{"bytes": ..., "path": ...}, a URL or a data: URI'
    )


def _unreadable(reference: ImageReference, error: Exception) -> BadImage:
    reason = "its format is not recognised" if isinstance(error, Image.UnidentifiedImageError) else str(error)
    reason = " ".join(reason.split()) or type(error).__name__
    return BadImage(
        f"{_name(reference)}: not a readable image ({reason}); remove the row or replace the file", UNREADABLE
    )


def _name(reference: ImageReference) -> str:
    """What to call an image in a message."""
    if isinstance(reference, dict):
        content, path = reference.get("bytes"), reference.get("path")
        return _short(str(path)) if path else f"an image stored in its row ({len(content or b''):,} bytes)"
    return f"a {type(reference).__name__}" if isinstance(reference, Image.Image) else _short(str(reference))


def _short(text: str) -> str:
    """A path or URL as it can stand in a line; of a `data:` URI its beginning says enough."""
    most = 40 if _is_data_uri(text) else 200
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= most else f"{text[: most - 3]}..."
