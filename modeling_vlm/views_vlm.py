"""An image in views: one of the whole and, where it is cut into tiles for detail, one of each tile.

All views of a batch lie flat, one behind the other, and so do the features that come of them; the grids of the images
say which belong together. The file travels with every checkpoint.
"""

import torch

from .model_error_vlm import DuetError


def views_of(grids: list[tuple[int, int]]) -> list[int]:
    """How many views each image has that is cut into `rows` x `columns` tiles: the whole and, if several, the tiles."""
    return [1 + (rows * columns if rows * columns > 1 else 0) for rows, columns in grids]


def join_views(
    features: torch.Tensor, newline: torch.Tensor, image_grids: torch.LongTensor | None
) -> list[torch.Tensor]:
    """
    The features of each image, `(tokens, hidden)`: the view of the whole, then its tiles, row by row.

    Args:
        features: `(views, tokens, hidden)`.
        newline: `(hidden,)`, what ends the view of the whole and each row of tiles.
        image_grids: `(images, 2)`, rows and columns of each image's tiles; `None` where no image is tiled.

    Raises:
        `DuetError`: grids and views disagree.
    """
    grids = [(1, 1)] * len(features) if image_grids is None else image_grids.tolist()
    counts = views_of(grids)
    if sum(counts) != len(features):
        raise DuetError(
            f"image_grids name {sum(counts)} views of {len(grids)} images, and pixel_values hold {len(features)}; "
            "pass both as the processor gives them."
        )
    newline = newline.to(features.device, features.dtype).unsqueeze(0)
    images = []
    for (_, columns), of_image in zip(grids, features.split(counts)):
        rows = [of_image[:1], *of_image[1:].split(columns)] if len(of_image) > 1 else [of_image]
        images.append(torch.cat([part for row in rows for part in (row.flatten(0, 1), newline)]))
    return images


def in_one_row(features: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    """The features of all images, as `get_image_features` gives them, as `(image tokens, hidden)`."""
    return features.flatten(0, 1) if isinstance(features, torch.Tensor) else torch.cat(features)


__all__ = ["in_one_row", "join_views", "views_of"]
