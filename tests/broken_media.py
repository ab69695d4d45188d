"""A corpus of image files as the world's data sets hold them: odd ones, broken ones and dangerous ones."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from processing.image_files_vlm import MISSING, TOO_LARGE, UNREADABLE


LYING = 6
"""EXIF's orientation of a picture that is stored lying on its side: a viewer turns it by 90 degrees clockwise."""


def make_corpus(folder: Path) -> dict[str, str | None]:
    """Write the corpus into a folder; file name -> why the image cannot be had, `None` where it can."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    photo = photograph(64, 48)

    photo.save(folder / "plain.jpg")
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = LYING
    photo.save(folder / "rotated.jpg", exif=exif)
    Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257).save(folder / "16bit.png")
    photo.quantize(16).save(folder / "palette.png")
    alpha = photo.convert("RGBA")
    alpha.paste((255, 0, 0, 0), (0, 0, 32, 48))
    alpha.save(folder / "alpha.png")
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (1, 1), "red").save(folder / "1x1.png")
    Image.new("RGB", (20_000, 1), "red").save(folder / "20000x1.png")

    whole = (folder / "plain.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("This is not an image.\n")
    (folder / "bomb.png").write_bytes(bomb(15_000, 15_000))

    readable = ("plain.jpg", "cmyk.jpg", "rotated.jpg", "16bit.png", "palette.png", "alpha.png", "animated.gif")
    return {
        **dict.fromkeys((*readable, "1x1.png", "20000x1.png")),
        **dict.fromkeys(("truncated.jpg", "zero.jpg", "text.jpg"), UNREADABLE),
        "missing.jpg": MISSING,
        "bomb.png": TOO_LARGE,
    }


def photograph(width: int, height: int) -> Image.Image:
    """A picture with the smooth shades and the detail of a photograph."""
    y, x = np.mgrid[:height, :width] / 16
    channels = [np.sin(x + phase) + np.cos(0.7 * y - phase) for phase in range(3)]
    noise = np.random.default_rng(0).normal(0, 4, (height, width, 3))
    return Image.fromarray(np.clip(128 + 55 * np.stack(channels, -1) + noise, 0, 255).astype(np.uint8))


def bomb(width: int, height: int) -> bytes:
    """A PNG file of some kilobytes that unpacks to `width` x `height` white pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    pack = zlib.compressobj(9)
    row = b"\0" + b"\xff" * -(-width // 8)  # no filter, then one bit a pixel
    pixels = b"".join([pack.compress(row) for _ in range(height)] + [pack.flush()])
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
