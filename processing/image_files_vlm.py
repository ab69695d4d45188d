"""An image reference becomes pixels here, and nowhere else.

Rows and conversations carry references: a PIL image, a path, `{"bytes", "path"}` as the `datasets` library stores
images, a URL, or the image itself as a `data:` URI. What data names is not trusted: `resolve_reference` says where a
row's reference points, refuses what leads out of the data set's folder, and gives it an `ImagePolicy` to take along.
`load_image` opens it when a batch is made, in the worker processes, so that neither a row nor a cache holds pixels, and
looks again at where it leads. A plain path is a person's own and may lie anywhere. Only regular files are opened, and
only `FORMATS`. Whatever the file is, the model sees upright RGB, see `images_vlm.to_rgb`. The file travels with
every checkpoint.
"""

import base64
import binascii
import functools
import hashlib
import io
import math
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from PIL import Image

from .data_error_vlm import DuetError, printable
from .image_urls_vlm import LocalAddress, NotFetched, TooManyBytes, fetch
from .images_vlm import png_chunk, to_rgb


ImageReference = Image.Image | str | os.PathLike | dict[str, Any]

MISSING = "missing image file"
UNREADABLE = "unreadable image"
TOO_LARGE = "image too large"
NOT_FETCHED = "image could not be fetched"

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
"""What a picture may be, by its content; Pillow knows formats that run other programs, or hold no pictures."""

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


@dataclass(frozen=True)
class ImagePolicy:
    """Where the references of a data set may lead."""

    folder: str | os.PathLike | None = None
    """What relative paths start from, and what no path may lead out of."""
    allow_urls: bool = False
    """Whether http and https URLs are fetched."""
    allow_links: bool = False
    """Whether links in the folder may lead out of it."""
    allow_local_urls: bool = False
    """Whether URLs may lead to this machine and to networks of its own."""
    caches: tuple[str, ...] = ()
    """Folders in which a library keeps what it fetched; absolute paths may lie there, too. Where there is neither a
    folder nor one of these, paths have to be absolute."""
    own_paths: bool = False
    """Whether rows are of a person's own making: without a folder paths lead anywhere, relative ones from the working
    directory."""


NO_FOLDER = ImagePolicy()


class NamedImage(str):
    """A path or URL that data names, with the policy of where it may lead; it compares as the text that it is."""

    policy: ImagePolicy

    def __new__(cls, name: str, policy: ImagePolicy):
        self = super().__new__(cls, name)
        self.policy = policy
        return self

    def __getnewargs__(self):
        return str(self), self.policy


def resolve_reference(reference: ImageReference, policy: ImagePolicy) -> ImageReference:
    """
    Where a reference that a row holds points: one that `load_image` can open from any working directory.

    Args:
        reference: what the row has. An image that is stored in its row, or given as a `data:` URI, stays as it is.
        policy: where it may lead.

    Raises:
        DuetError: a reference of another kind, or one that leads where it may not; one line, without the row.
    """
    if isinstance(reference, dict) and reference.get("bytes") is not None:
        return reference
    path = reference.get("path") if isinstance(reference, dict) else reference
    if isinstance(path, Image.Image):
        return path
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        raise _no_reference(reference)
    path = os.fspath(path)
    if _is_data_uri(path):
        return path
    if scheme := re.match(r"([a-z][a-z0-9+.-]*)://|data:|file:", path, re.IGNORECASE):
        if (scheme[1] or "").lower() not in ("http", "https"):
            expected = "a path, an http or https URL, or data:image/...;base64,..."
            raise DuetError(f"the image {_short(path)} is of an unknown scheme; expected {expected}")
        if not policy.allow_urls:
            raise DuetError(
                f"the image {_short(path)} is a URL; add --allow_urls, or fetch the images and name their folder with "
                "--image_dir"
            )
        return NamedImage(path, policy)
    if any(_is_in(cache, path) for cache in policy.caches):
        return NamedImage(path, policy)
    if policy.folder is None:
        if policy.own_paths or (os.path.isabs(path) and not policy.caches):
            return NamedImage(os.path.abspath(path), policy)
        if os.path.isabs(path):
            raise DuetError(
                f"the image is the file {_short(path)} of this machine, which data may not choose; name the folder "
                "that holds all images with --image_dir"
            )
        raise DuetError(f"the image is the path {_short(path)}; name the folder it is relative to with --image_dir")
    return NamedImage(inside(policy.folder, path), policy)


def inside(folder: str | os.PathLike, path: str) -> str:
    """The absolute path of a file named by a data set, which may not lead out of the folder of its images.

    Raises:
        DuetError: it does; one line, without the row.
    """
    base = os.path.abspath(Path(folder).expanduser())
    full = os.path.normpath(os.path.join(base, path))
    # Where the folder is a link, a path may also name what is behind it.
    if not _is_in(base, full) and not _is_in(_real(base), _real(full)):
        raise DuetError(
            f"the image {_short(path)} lies outside {base}; give a folder that holds all of them as --image_dir"
        )
    return full


def _is_in(folder, path):
    """Whether an absolute path lies in a folder, links not followed."""
    path = os.path.normpath(path)
    return os.path.isabs(path) and (path == folder or path.startswith(os.path.join(folder, "")))


def _real(path):
    """A path with every link in it followed."""
    try:
        return os.path.realpath(path)
    except ValueError:  # no file can have such a name
        return ""


@functools.lru_cache(maxsize=256)
def _grounds(policy: ImagePolicy) -> tuple[str, ...]:
    """The folders that a file may really lie in, whatever links lead to it."""
    grounds = [policy.folder, *policy.caches]
    # In the Hub's cache the files of a repository are links from its `snapshots` to its `blobs`.
    real = Path(_real(policy.folder or ""))
    for at in (real, *real.parents):
        if at.name == "snapshots" and "--" in at.parent.name:
            grounds.append(at.parent / "blobs")
    return tuple(_real(ground) for ground in grounds if ground is not None)


def load_image(reference: ImageReference, size: tuple[int, int] | None = None) -> Image.Image:
    """
    The image behind a reference, as an upright RGB image.

    Args:
        reference: what `resolve_reference` gives, or a path, URL or image of one's own.
        size: (height, width) that the caller will scale the image down to. A JPEG that is at least twice as large
            comes reduced to a half, a quarter or an eighth, never below `size`, which is decoded in less time.

    Raises:
        MissingImage: a `BadImage` and a `FileNotFoundError`: there is no such file.
        BadImage: the file is no image, a broken one or a too large one, it leads where it may not, or it could not be
            fetched.
        DuetError: the reference is none.
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
        MissingImage, BadImage, DuetError: as `load_image`.
    """
    with _opened(reference) as image:
        return image.size if _is_lying(image) else image.size[::-1]


def image_stamp(reference: ImageReference) -> bytes:
    """
    What tells an image from every other, and from itself after a change, with nothing decoded: 16 bytes.

    Of a file its path, size and time of change; of what has no path its bytes, or pixels.

    Raises:
        MissingImage, BadImage, DuetError: as `load_image`; what lies at a URL is fetched for it.
    """
    with _named_errors(reference):
        source = _source(reference)
        if isinstance(source, (str, os.PathLike)):
            state = os.stat(source)
            return _digest(f"file {state.st_size} {state.st_mtime_ns} {os.path.abspath(source)}".encode())
    return image_content(reference)


def image_content(reference: ImageReference) -> bytes:
    """
    What images of the same bytes have in common, wherever they lie: 16 bytes.

    Raises:
        MissingImage, BadImage, DuetError: as `load_image`.
    """
    with _named_errors(reference):
        source = _source(reference)
        if isinstance(source, Image.Image):
            image = to_rgb(source)
            return _digest(f"pixels {image.size} ".encode(), image.tobytes())
        return _digest(b"bytes ", source.read() if isinstance(source, io.BytesIO) else Path(source).read_bytes())


def _digest(*parts):
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.digest()


def _is_lying(image: Image.Image) -> bool:
    """Whether a viewer exchanges width and height."""
    if image.format == "TIFF":  # Pillow exchanges them itself
        return False
    exif = Image.Image.getexif(image)
    # It may come behind the pixels, which Pillow's own `getexif` would decode to find it.
    if image.format == "PNG" and "exif" not in image.info and (content := png_chunk(image, b"eXIf")):
        exif.load(b"Exif\x00\x00" + content)
    return exif.get(_EXIF_ORIENTATION) in _LYING


@contextmanager
def _opened(reference: ImageReference) -> Iterator[Image.Image]:
    """The image with its header read, the caller's own object where the reference is one; all errors are `BadImage`."""
    image = None
    with _named_errors(reference):
        try:
            source = _source(reference)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of what is odd in a file
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = source if isinstance(source, Image.Image) else Image.open(source, formats=_formats())
                # And only warns of an image larger than its limit; what is done about warnings is the process's, where
                # another thread may just have changed it.
                if image is not source and image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                    raise Image.DecompressionBombWarning
                yield image
        finally:
            if image is not None and image is not reference:  # the caller's own image stays open
                image.close()


@contextmanager
def _named_errors(reference: ImageReference) -> Iterator[None]:
    """Whatever is wrong with an image becomes a `BadImage` that names it."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        message = f"{image_name(reference)}: no such image file; check the path, and the folder given as --image_dir"
        raise MissingImage(message, MISSING) from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadImage(
            f"{image_name(reference)}: more pixels than the limit of {Image.MAX_IMAGE_PIXELS:,}, which keeps a "
            "decompression bomb from filling the memory; remove the row or scale the image down",
            TOO_LARGE,
        ) from error
    except DuetError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
        raise _unreadable(reference, error) from error


def _source(reference: ImageReference) -> Image.Image | str | os.PathLike | io.BytesIO:
    """What Pillow opens: the bytes of an image that is stored, written out or fetched, else its path."""
    source: Image.Image | str | os.PathLike | io.BytesIO | None
    if isinstance(reference, dict):
        content = reference.get("bytes")
        source = io.BytesIO(content) if content is not None else reference.get("path")
    else:
        source = reference
    if not isinstance(source, (Image.Image, str, os.PathLike, io.BytesIO)):
        raise _no_reference(reference)
    if _is_data_uri(source):
        try:
            return io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True))
        except binascii.Error as error:
            raise _unreadable(reference, error) from error
    if is_url(source):
        return io.BytesIO(_fetch(source))
    return source if isinstance(source, (Image.Image, io.BytesIO)) else _file(source)


def _file(path: str | os.PathLike) -> str | os.PathLike:
    """The regular file that a path leads to.

    Raises:
        FileNotFoundError: there is none.
        BadImage: it is no regular file, which could hold a worker for ever, or lies where data may not reach.
    """
    if isinstance(path, NamedImage) and not path.policy.allow_links:
        real, grounds = os.path.realpath(path), _grounds(path.policy)
        if grounds and not any(_is_in(ground, real) for ground in grounds):
            raise BadImage(
                f"{_short(path)}: a link to {_short(real)}, outside {_short(grounds[0])}; if the link is your own, add "
                "--allow_links"
            )
        path = real
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise BadImage(f"{_short(str(path))}: no regular file; remove the row or replace the file")
    return path


@functools.lru_cache(maxsize=1)
def _formats() -> list[str]:
    """Those of `FORMATS` that this Pillow opens; it raises at the name of another."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _fetch(url: str) -> bytes:
    """What lies at a URL, see `image_urls_vlm`."""
    remedy = "remove the row, or fetch the images and name their folder with --image_dir"
    try:
        return fetch(url, isinstance(url, NamedImage) and url.policy.allow_local_urls)
    except TooManyBytes as error:
        raise BadImage(f"{_short(url)}: {error}; {remedy}", TOO_LARGE) from None
    except LocalAddress as error:
        remedy = "fetch the image yourself, or add --allow_local_urls if the data may reach your own network"
        raise BadImage(f"{_short(url)}: not fetched ({error}); {remedy}", NOT_FETCHED) from None
    except NotFetched as error:
        raise BadImage(f"{_short(url)}: the image could not be fetched ({error}); {remedy}", NOT_FETCHED) from None


def is_url(reference: Any) -> TypeGuard[str]:
    """Whether a reference has to be fetched."""
    return isinstance(reference, str) and re.match("https?://", reference, re.IGNORECASE) is not None


def _is_data_uri(reference: Any) -> TypeGuard[str]:
    return isinstance(reference, str) and re.match("data:image/[^,]*;base64,", reference, re.IGNORECASE) is not None


def _no_reference(reference: Any) -> DuetError:
    return DuetError(
        f"found {type(reference).__name__} where an image was expected: give a PIL image, a path, "
        '{"bytes": ..., "path": ...}, a URL or a data: URI'
    )


def _unreadable(reference: ImageReference, error: Exception) -> BadImage:
    reason = str(error)
    if isinstance(error, Image.UnidentifiedImageError):
        reason = f"its format is not recognised as one of {', '.join(_formats())}"
    reason = _short(" ".join(reason.split())) or type(error).__name__
    return BadImage(
        f"{image_name(reference)}: not a readable image ({reason}); remove the row or replace the file", UNREADABLE
    )


def image_name(reference: ImageReference) -> str:
    """What to call an image in a message."""
    if isinstance(reference, dict):
        content, path = reference.get("bytes"), reference.get("path")
        return _short(str(path)) if path else f"an image stored in its row ({len(content or b''):,} bytes)"
    return f"a {type(reference).__name__}" if isinstance(reference, Image.Image) else _short(str(reference))


def _short(text: str) -> str:
    """A path or URL as it can stand in a line; the beginning of a `data:` URI says enough."""
    most = 40 if _is_data_uri(text) else 200
    text = printable(text)
    return text if len(text) <= most else f"{text[: most - 3]}..."


__all__ = [
    "NO_FOLDER", "BadImage", "ImagePolicy", "ImageReference", "MissingImage", "NamedImage", "check_image",
    "image_content", "image_name", "image_size", "image_stamp", "inside", "is_url", "load_image", "resolve_reference",
]  # fmt: skip
