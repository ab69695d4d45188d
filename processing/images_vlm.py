"""An image as the encoder gets to see it: upright RGB, made to fit, cut into tiles where detail is wanted.

How many views an image has follows from its size alone, so that the number of its tokens is known before a pixel is
read. The file travels with every checkpoint and imports nothing of this package.
"""

import os
import sys
from typing import NamedTuple

import torch
from PIL import Image, ImageChops, ImageCms, ImageOps


IMAGE_MODES = ("resize", "pad", "crop")

MANY_PIXELS = 2**25
"""Up to so many pixels an image stays as it is; a larger one is halved until it has no more."""

MOST_STRETCHED = 100
"""The most that the long side of an image may be of its short one where an encoder scales images by the short one."""

_STRIP_PIXELS = 2**22
_DEPTHS = (1, 8, 10, 12, 14, 16, 24, 32)
"""Bits that the values of an image may have in a file that has room for more."""

_BITS, _PHOTOMETRIC, _LEAST, _MOST, _FORMAT, _SIGNED_LEAST, _SIGNED_MOST = 258, 262, 280, 281, 339, 340, 341
"""TIFF's tags for what its values mean."""


def to_rgb(image: Image.Image) -> Image.Image:
    """
    An image as a viewer shows it: EXIF orientation applied, alpha on white, first frame, 8-bit RGB.

    Values of more than 8 bits are scaled as the file says (TIFF's `MaxSampleValue` and `BitsPerSample`, PNG's
    `sBIT`), else as they say themselves: whole numbers by the fewest of 8, 10, 12, 14, 16, 24 or 32 bits that hold them
    all (where some are negative, from the least to the greatest), shares from 0 to 1 by 1, other fractions from the
    least (0 at most) to the greatest. An image of more than `MANY_PIXELS` comes in its `bounded_size`.

    Raises:
        ValueError: it has no value that could be shown.
    """
    meaning = _meaning(image) if _is_deep(image) else None  # while the file is open
    image = _of_8_bits(image)
    if bounded_size(*image.size) != image.size:
        image = _halved(image)
    image = ImageOps.exif_transpose(image)
    return _flat(image if meaning is None else _scaled(image, meaning))


def bounded_size(side: int, other: int) -> tuple[int, int]:
    """The sides that an image of this size is shown with, in either order: halved while it has too many pixels."""
    while side * other > MANY_PIXELS:
        side, other = -(-side // 2), -(-other // 2)
    return side, other


def _halved(image):
    """An image in its bounded size, made strip by strip: what is many bytes a pixel is never whole."""
    size, factor = bounded_size(*image.size), 1
    while -(-image.width // factor) > size[0]:
        factor *= 2
    image.load()
    mode = "F" if image.mode == "F" else "I" if _is_deep(image) else "RGB"
    small = Image.new(mode, size)
    rows = max(1, _STRIP_PIXELS // (image.width * factor)) * factor
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        strip = _flat(strip) if mode == "RGB" else strip.convert(mode)
        small.paste(strip.reduce(factor), (0, top // factor))
    small.info = {key: value for key, value in image.info.items() if key in ("exif", "xmp", "XML:com.adobe.xmp")}
    return small


def _flat(image):
    """An image of 8 bits as RGB, its transparency on white."""
    if image.mode == "La":  # which Pillow converts to nothing else
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "LAB":  # Pillow converts it by profiles only
        image = ImageCms.profileToProfile(
            image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    return image.convert("RGB")


# --- values of more than 8 bits


class _Meaning(NamedTuple):
    """What a file says of its grey values."""

    bits: int | None = None
    """How many bits they have, where that is not simply how many there is room for."""
    least: float | None = None
    most: float | None = None
    """What is black, and what is white."""
    is_negative: bool = False
    """Whether it is the other way round."""
    is_signed: bool | None = None
    """Whether values may be below 0, where it is said."""


def _is_deep(image):
    """Whether its values are grey and have more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def _meaning(image):
    if image.format == "PNG":
        significant = png_chunk(image, b"sBIT")
        return _Meaning(bits=significant[0] if significant else None)
    tags = getattr(image, "tag_v2", {})

    def value(*names):
        found = next((tags[name] for name in names if name in tags), None)
        return float(found[0] if isinstance(found, tuple) else found) if found is not None else None

    bits = value(_BITS)
    return _Meaning(
        int(bits) if bits and bits % 8 else None,
        value(_SIGNED_LEAST, _LEAST),
        value(_SIGNED_MOST, _MOST),
        value(_PHOTOMETRIC) == 0,
        None if _FORMAT not in tags else value(_FORMAT) == 2,
    )


def _scaled(image, meaning):
    """The 8-bit grey image that is meant."""
    mode, kind = ("F", torch.float32) if image.mode == "F" else ("I", torch.int32)
    values = torch.frombuffer(bytearray(image.convert(mode).tobytes()), dtype=kind)
    shown = (_shares(values, meaning) if mode == "F" else _numbers(values, meaning)).clamp(0, 255).to(torch.uint8)
    if meaning.is_negative:
        shown = 255 - shown
    grey = Image.frombytes("L", image.size, shown.numpy().tobytes())
    if isinstance(transparent := image.info.get("transparency"), int):
        opaque = (values != transparent).to(torch.uint8) * 255
        grey.putalpha(Image.frombytes("L", image.size, opaque.numpy().tobytes()))
    return grey


def _numbers(values, meaning):
    if meaning.is_signed is False:  # Pillow reads 32 bits as signed
        values = values.long() & 0xFFFFFFFF
    least, most = (int(end) for end in values.aminmax())
    if _says_range(meaning, least, most):
        return _stretched(values, meaning.least, meaning.most)
    if least < 0:
        return _stretched(values, least, most)
    bits = meaning.bits if meaning.bits and most < 2**meaning.bits else None
    depths = sorted((*_DEPTHS, 15, 31)) if meaning.is_signed else _DEPTHS
    bits = bits or next(depth for depth in depths if most < 2**depth)
    return values * 255 if bits == 1 else values << (8 - bits) if bits < 8 else values >> (bits - 8)


def _shares(values, meaning):
    finite = values[values.isfinite()]
    if not len(finite):
        raise ValueError("none of its values is a number")
    least, most = (float(end) for end in finite.aminmax())
    values = values.nan_to_num(nan=least, posinf=most, neginf=least)
    if _says_range(meaning, least, most):
        return _stretched(values, meaning.least, meaning.most)
    if 0 <= least and most <= 1:
        return _stretched(values, 0, 1)
    if max(-least, most) < 2**31 and bool((values == values.round()).all()):
        return _numbers(values.to(torch.int32), meaning)
    return _stretched(values, min(least, 0), most)


def _says_range(meaning, least, most):
    """Whether the file says what is black and white, and its values keep to it."""
    return None not in (meaning.least, meaning.most) and meaning.least <= least <= most <= meaning.most != meaning.least


def _stretched(values, black, white):
    return (values.double() - black).mul(255 / ((white - black) or 1)).round()


def _of_8_bits(image):
    """
    An image whose 8-bit values, as Pillow reads them, are what its file means.

    Pillow keeps the upper 8 bits of 16-bit colours, in which 12 bits would be all but black. Where these are small, the
    file is read once more for the lower ones.
    """
    if image.format == "TIFF" and image.mode == "L" and image.tag_v2.get(_FORMAT, (1,))[0] == 2:
        return image.point([value ^ 0x80 for value in range(256)])
    tiles, source = getattr(image, "tile", None), getattr(image, "filename", None) or getattr(image, "fp", None)
    raw = _raw_mode(tiles[0]) if tiles else ""
    if ";16" not in raw or image.mode not in ("RGB", "RGBA"):
        return image
    significant = png_chunk(image, b"sBIT")
    image.load()
    colours, alpha = image.split()[:3], image.split()[3:]
    most = max(band.getextrema()[1] for band in colours)
    bits = significant[0] if significant and most < 2 ** (significant[0] - 8) else None
    bits = bits or next(depth for depth in _DEPTHS if depth >= 8 and most < 2 ** (depth - 8))
    if bits < 16:
        if not raw.startswith("RGB"):
            raise ValueError("its grey has fewer than the 16 bits of the file, and Pillow reads but the upper 8")
        with Image.open(source, formats=[image.format]) as again:
            again.tile = [_with_lower_bytes(tile) for tile in again.tile]
            lower = again.split()[:3]
        up, down = ([value << (16 - bits) for value in range(256)], [value >> (bits - 8) for value in range(256)])
        colours = [ImageChops.add(high.point(up), low.point(down)) for high, low in zip(colours, lower)]
    whole = Image.merge(image.mode, (*colours, *alpha))
    whole.info = dict(image.info)
    if isinstance(transparent := whole.info.get("transparency"), tuple):
        whole.info["transparency"] = tuple(value >> (bits - 8) for value in transparent)
    return whole


def _raw_mode(tile):
    return tile.args if isinstance(tile.args, str) else str(tile.args[0])


def _with_lower_bytes(tile):
    """A part of a file of 16-bit colours with its bytes taken the other way round, so that the lower ones are kept."""
    kind, end = _raw_mode(tile).split(";16")
    is_little = end == "L" or (end == "N" and sys.byteorder == "little")
    raw = f"{kind};16{'B' if is_little else 'L'}"
    return tile._replace(args=raw if isinstance(tile.args, str) else (raw, *tile.args[1:]))


def png_chunk(image: Image.Image, kind: bytes) -> bytes | None:
    """What a PNG file that is still open holds under a name, before its pixels or behind them."""
    file = getattr(image, "fp", None)
    if image.format != "PNG" or file is None or file.closed:
        return None
    place, content = file.tell(), None
    file.seek(8)
    while content is None and len(head := file.read(8)) == 8:
        length = int.from_bytes(head[:4], "big")
        if head[4:] == kind:
            content = file.read(length)
        else:
            file.seek(length + 4, os.SEEK_CUR)
    file.seek(place)
    return content


def choose_grid(size: tuple[int, int], view: tuple[int, int], max_tiles: int) -> tuple[int, int]:
    """
    Rows and columns of tiles that show the most of an image, and of those that show as much the fewest wasted pixels.

    The rule is LLaVA-NeXT's (https://llava-vl.github.io/blog/2024-01-30-llava-next/), over all grids of at most
    `max_tiles`. An image that one view shows whole is not tiled.

    Args:
        size: height and width of the image.
        view: height and width of a view.
    """
    (height, width), best, chosen = size, None, (1, 1)
    for rows in range(1, max_tiles + 1):
        for columns in range(1, max_tiles // rows + 1):
            canvas_height, canvas_width = rows * view[0], columns * view[1]
            scale = min(canvas_height / height, canvas_width / width)
            shown = min(int(height * scale) * int(width * scale), height * width)
            fitness = (shown, shown - canvas_height * canvas_width)
            if best is None or fitness > best:
                best, chosen = fitness, (rows, columns)
    return chosen


def trim(image: Image.Image) -> Image.Image:
    """The middle of an image that is `MOST_STRETCHED` times as long as it is wide, or as wide as it is long."""
    size = [min(side, MOST_STRETCHED * min(image.size)) for side in image.size]
    left, top = ((whole - part) // 2 for whole, part in zip(image.size, size))
    return image if size == list(image.size) else image.crop((left, top, left + size[0], top + size[1]))


def fit(image: Image.Image, size: tuple[int, int], mode: str, fill: tuple[int, int, int], resample: int) -> Image.Image:
    """
    An RGB image as one of `size` (height, width).

    Args:
        mode: `"resize"` stretches it, `"pad"` puts it whole on a ground of colour `fill`, `"crop"` fills the size with
            its centre.
    """
    size = size[::-1]
    if image.size == size:
        return image
    if mode == "resize":
        return image.resize(size, resample)
    if mode == "crop":
        return ImageOps.fit(image, size, resample)
    scale = min(size[0] / image.width, size[1] / image.height)
    image = image.resize([max(1, round(side * scale)) for side in image.size], resample)
    ground = Image.new("RGB", size, fill)
    ground.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return ground


def cut_tiles(image: Image.Image, grid: tuple[int, int]) -> list[Image.Image]:
    """The tiles of an image of which rows and columns divide height and width, row by row."""
    rows, columns = grid
    width, height = image.width // columns, image.height // rows
    corners = [(column * width, row * height) for row in range(rows) for column in range(columns)]
    return [image.crop((left, top, left + width, top + height)) for left, top in corners]


__all__ = ["IMAGE_MODES", "bounded_size", "choose_grid", "cut_tiles", "fit", "png_chunk", "to_rgb", "trim"]
