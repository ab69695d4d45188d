"""An image as the encoder gets to see it: upright RGB, made to fit, cut into tiles where detail is wanted.

How many views an image has follows from its size alone, so that the number of its tokens is known before a pixel is
read. The file travels with every checkpoint and imports nothing of this package.
"""

from PIL import Image, ImageOps


IMAGE_MODES = ("resize", "pad", "crop")


def to_rgb(image: Image.Image) -> Image.Image:
    """An image as a viewer shows it: EXIF orientation applied, alpha on white, first frame, 8-bit RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel: converting would clip everything above 255 to white
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


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
    ground.paste(image, [(whole - part) // 2 for whole, part in zip(size, image.size)])
    return ground


def cut_tiles(image: Image.Image, grid: tuple[int, int]) -> list[Image.Image]:
    """The tiles of an image of which rows and columns divide height and width, row by row."""
    rows, columns = grid
    width, height = image.width // columns, image.height // rows
    corners = [(column * width, row * height) for row in range(rows) for column in range(columns)]
    return [image.crop((left, top, left + width, top + height)) for left, top in corners]


__all__ = ["IMAGE_MODES", "choose_grid", "cut_tiles", "fit", "to_rgb"]
