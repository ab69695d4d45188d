"""Values of more than 8 bits, of less, of other kinds: an image is seen as it is meant, or named as unreadable."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from processing import images_vlm as images
from processing.image_files_vlm import BadImage, load_image


RAMP = np.linspace(0, 1, 64 * 48).reshape(48, 64)
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], -1)


def tiff(values: np.ndarray, **tags) -> bytes:
    """A TIFF file of these values, as they are, with more tags or other ones."""
    height, width, *colours = values.shape
    count = colours[0] if colours else 1
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in {
        256: width, 257: height, 258: (8 * values.dtype.itemsize,) * count, 259: 1, 262: 2 if count == 3 else 1, 273: 0,
        277: count, 278: height, 279: values.nbytes, 339: ({"u": 1, "i": 2, "f": 3}[values.dtype.kind],) * count,
        **{int(tag[1:]): value for tag, value in tags.items()},
    }.items():  # fmt: skip
        directory[tag] = value
    return b"II*\0\x08\0\0\0" + directory.tobytes(8) + values.tobytes()


def png(values: np.ndarray, kind: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of 16 bits a value; kind 0 is grey, 2 colours, 4 grey with alpha, 6 colours with alpha."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values.reshape(height, -1))
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    parts = ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in parts
    )


def stored(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def seen(content: bytes) -> np.ndarray:
    return np.asarray(load_image({"bytes": content, "path": None})).astype(int)


def distance(found: np.ndarray, shares: np.ndarray) -> float:
    """How far, at most, shades are from these shares of white."""
    return abs(found[..., : shares.shape[-1]] - 255 * shares).max()


def of_bits(shares, bits, kind=np.uint16):
    return (shares * (2**bits - 1)).round().astype(kind)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_few_bits_in_many_are_not_black(bits):
    files = [
        stored(Image.fromarray(of_bits(RAMP, bits)), "PNG"),
        stored(Image.fromarray(of_bits(RAMP, bits)), "TIFF"),
        stored(Image.fromarray(of_bits(RAMP, bits, np.int32)), "TIFF"),
        stored(Image.fromarray(of_bits(RAMP, bits, np.int32)), "PPM"),
        tiff(of_bits(RAMP, bits, np.uint32)),
        tiff(of_bits(RAMP, bits, np.float32)),
    ]
    for number, file in enumerate(files):
        assert distance(seen(file), RAMP[..., None]) <= 1, number


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_few_bits_in_many_are_not_black_in_colour(bits):
    colours = of_bits(COLOURS, bits)
    opaque = np.concatenate([colours, np.full((48, 64, 1), 65535, np.uint16)], -1)
    for number, file in enumerate((png(colours, 2), png(opaque, 6), tiff(colours))):
        assert distance(seen(file), COLOURS) <= 1, number


def test_16_bits_in_16_are_the_upper_8_of_them():
    values = np.random.default_rng(0).integers(0, 65536, (48, 64), dtype=np.uint16)
    values[0, 0] = 65535
    assert (seen(stored(Image.fromarray(values), "PNG"))[..., 0] == values >> 8).all()
    assert (seen(png(np.stack([values] * 3, -1), 2))[..., 0] == values >> 8).all()


@pytest.mark.parametrize(
    ("least", "most"), [(0, 1), (-1, 1), (0, 255), (0, 65535), (-1000, 3000.5), (0, 1.02), (0, 1e30)]
)
def test_fractions_of_any_range_are_seen(least, most):
    values = (least + RAMP * (most - least)).astype(np.float32)
    assert distance(seen(tiff(values)), RAMP[..., None]) <= 1


def test_fractions_from_0_to_1_keep_their_darkness():
    assert distance(seen(tiff((RAMP / 4).astype(np.float32))), RAMP[..., None] / 4) <= 1


def test_what_is_no_number_is_black_and_infinity_white():
    values = RAMP.astype(np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    found = seen(tiff(values))[..., 0]
    assert found[0, :3].tolist() == [0, 255, 0] and abs(found - 255 * RAMP)[1:].max() <= 1
    with pytest.raises(BadImage, match="none of its values is a number"):
        seen(tiff(values * np.nan))


@pytest.mark.parametrize(
    "values",
    [
        (RAMP * 4095 - 1024).astype(np.int16),
        (RAMP * 65535 - 32768).astype(np.int16),
        of_bits(RAMP, 15, np.int16),
        of_bits(RAMP, 12, np.int16),
        of_bits(RAMP, 31, np.int32),
        of_bits(RAMP, 32, np.uint32),
        (RAMP * 255 - 128).round().astype(np.int8),
    ],
    ids=lambda values: f"{values.dtype} from {values.min()}",
)
def test_signed_and_long_numbers_are_seen(values):
    assert distance(seen(tiff(values)), RAMP[..., None]) <= 1


def test_a_file_says_what_is_white():
    """Dark images are dark where the file says so, and not brightened to their own greatest value."""
    dark = RAMP[..., None] / 4
    significant = png(of_bits(RAMP / 4, 12), 0, (b"sBIT", b"\x0c"))
    declared = tiff(of_bits(RAMP / 4, 12), t281=4095)
    signed = tiff((RAMP * 1000 - 2000).astype(np.int16), t340=-2000, t341=2000)
    for number, file in enumerate((significant, declared, signed)):
        assert distance(seen(file), dark) <= 1, number
    in_colour = png(of_bits(COLOURS / 4, 12), 2, (b"sBIT", b"\x0c\x0c\x0c"))
    assert distance(seen(in_colour), COLOURS / 4) <= 1
    not_kept = tiff(of_bits(RAMP, 12), t281=100)
    assert distance(seen(not_kept), RAMP[..., None]) <= 1, "what the values contradict is not believed"


def test_white_may_be_zero():
    for kind in (np.uint8, np.uint16):
        file = tiff(of_bits(RAMP, 8 * kind().itemsize, kind), t262=0)
        assert distance(seen(file), 1 - RAMP[..., None]) <= 1


def test_one_bit_is_black_and_white():
    mask = RAMP > 0.5
    files = [stored(Image.fromarray(mask), kind) for kind in ("PNG", "TIFF", "PPM")]
    files += [stored(Image.fromarray(mask.astype(np.uint16)), "PNG"), tiff(mask.astype(np.float32))]
    for number, file in enumerate(files):
        assert (seen(file) == 255 * mask[..., None]).all(), number


def reads(file):
    """Whether Pillow reads what it wrote, which before its 13th release it does not of every mode."""
    try:
        Image.open(io.BytesIO(file)).load()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "LAB", "LA", "PA", "RGBa", "La"])
def test_every_kind_of_colour_is_converted(mode):
    grey = Image.fromarray((RAMP * 255).astype(np.uint8))
    if mode == "LAB":
        image = Image.merge("LAB", [grey, *[Image.new("L", grey.size, 128)] * 2])
    else:
        via = {"PA": "P", "RGBa": "RGBA", "La": "LA"}.get(mode, "RGB")
        image = grey.convert(via).convert(mode) if via != mode else grey.convert(mode)
    given = [load_image(image)]
    if mode in ("CMYK", "YCbCr", "LAB") and reads(stored(image, "TIFF")):
        given.append(load_image({"bytes": stored(image, "TIFF"), "path": None}))
    for found in given:
        assert found.mode == "RGB" and distance(np.asarray(found), RAMP[..., None]) <= (12 if mode == "LAB" else 2)


def test_inverted_cmyk_as_adobe_writes_it_is_not_a_negative():
    colours = Image.fromarray((COLOURS * 255).astype(np.uint8))
    file = io.BytesIO()
    colours.convert("CMYK").save(file, "JPEG", quality=95)  # which Pillow writes as Adobe does
    assert b"Adobe" in file.getvalue()
    assert abs(seen(file.getvalue()) - 255 * COLOURS).mean() < 4


def test_a_transparent_value_of_16_bits_is_laid_on_white():
    values = np.full((4, 4), 40_000, np.uint16)
    values[0] = 20_000
    grey = png(values, 0, (b"tRNS", struct.pack(">H", 20_000)))
    colours = png(np.stack([values] * 3, -1), 2, (b"tRNS", struct.pack(">HHH", *[20_000] * 3)))
    for file in (grey, colours):
        found = seen(file)[..., 0]
        assert (found[0] == 255).all() and (found[1:] == 40_000 >> 8).all()


def test_what_cannot_be_seen_as_meant_is_named():
    few = np.stack([of_bits(RAMP, 12), np.full((48, 64), 65535, np.uint16)], -1)
    with pytest.raises(BadImage, match="its grey has fewer than the 16 bits of the file"):
        seen(png(few, 4))
    for values in (RAMP.astype(np.float16), RAMP.astype(np.float64), COLOURS.astype(np.float32)):
        with pytest.raises(BadImage, match="its format is not recognised"):
            seen(tiff(values))


@pytest.mark.parametrize("kind", ["grey", "long", "fractions", "colours", "few bits in colour", "palette", "clear"])
def test_a_halved_image_looks_as_the_whole_one(monkeypatch, kind):
    smooth = np.tile(np.linspace(0, 1, 400), (300, 1))
    colours = np.stack([smooth, smooth[:, ::-1], 0 * smooth], -1)
    picture = Image.fromarray((colours * 255).astype(np.uint8))
    clear = picture.convert("RGBA")
    clear.paste((255, 0, 0, 0), (0, 0, 200, 300))
    file = {
        "grey": lambda: stored(Image.fromarray((smooth * 255).astype(np.uint8)), "PNG"),
        "long": lambda: stored(Image.fromarray(of_bits(smooth, 12)), "PNG"),
        "fractions": lambda: tiff(smooth.astype(np.float32)),
        "colours": lambda: stored(picture, "PNG"),
        "few bits in colour": lambda: png(of_bits(colours, 12), 2),
        "palette": lambda: stored(picture.quantize(64), "PNG"),
        "clear": lambda: stored(clear, "PNG"),
    }[kind]()
    whole = load_image({"bytes": file, "path": None})
    monkeypatch.setattr(images, "MANY_PIXELS", 400 * 300 // 5)
    monkeypatch.setattr(images, "_STRIP_PIXELS", 400 * 40)  # several strips
    halved = load_image({"bytes": file, "path": None})
    assert halved.size == images.bounded_size(400, 300) == (100, 75)
    small = np.asarray(whole.resize((100, 75), Image.Resampling.BOX)).astype(int)
    assert abs(np.asarray(halved) - small).max() <= 3
