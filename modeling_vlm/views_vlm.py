"""An image in views: one of the whole and, where it is cut into tiles for detail, one of each tile.

All views of a batch lie flat, one behind the other, and so do the features that come of them; the grids of the images
say which belong together. The file travels with every checkpoint.
"""

import torch
from transformers.utils import torch_compilable_check

from .model_error_vlm import DuetError


def views_of(grids: list[tuple[int, int]]) -> list[int]:
    """How many views each image has that is cut into `rows` x `columns` tiles: the whole and, if several, the tiles."""
    return [1 + (rows * columns if rows * columns > 1 else 0) for rows, columns in grids]


def grids_of_images(image_grids: torch.LongTensor | None, views: int) -> list[tuple[int, int]]:
    """
    Rows and columns of each image's tiles.

    Args:
        image_grids: `(images, 2)`, or `(views, 2)` where each view has that of its image, as engines cut a batch;
            `None` where no image is tiled.
        views: how many views there are.
    """
    grids = [(1, 1)] * views if image_grids is None else [tuple(grid) for grid in image_grids.tolist()]
    if sum(views_of(grids)) == views or len(grids) != views:
        return grids
    images, place = [], 0
    while place < views:
        (count,) = views_of([grids[place]])
        if grids[place : place + count] != [grids[place]] * count:
            return grids
        images.append(grids[place])
        place += count
    return images


def put_in_place(
    inputs_embeds: torch.Tensor, positions: torch.Tensor, features: torch.Tensor | None, index: torch.LongTensor
) -> torch.Tensor:
    """
    Embeddings, `(batch, tokens, hidden)`, with the feature that the index names at each position.

    Args:
        positions: where image tokens are, `(batch, tokens)`.
        features: `(features, hidden)`.
        index: number of a feature, or -1, `(batch, tokens)`.

    Raises:
        `ValueError`: features are named where no image token is, or none where one is, or such as there are not.
    """
    placed, count = index >= 0, 0 if features is None else len(features)
    wrong = (placed != positions) | (index >= count)
    torch_compilable_check(
        ~wrong.any(),
        lambda: (
            f"feature_index and the batch do not match: {int(wrong.sum())} positions have an image token and no "
            f"feature, a feature and no image token, or a feature that is none of the {count} of the batch."
        ),
    )
    if features is None:
        return inputs_embeds
    return inputs_embeds.masked_scatter(placed.unsqueeze(-1), features.index_select(0, index[placed]))


def join_views(
    features: torch.Tensor, newline: torch.Tensor, image_grids: torch.LongTensor | None
) -> list[torch.Tensor]:
    """
    The features of each image, `(tokens, hidden)`: the view of the whole, then its tiles, row by row.

    Args:
        features: `(views, tokens, hidden)`.
        newline: `(hidden,)`, what ends the view of the whole and each row of tiles.
        image_grids: what `grids_of_images` reads.

    Raises:
        `DuetError`: grids and views disagree.
    """
    grids = grids_of_images(image_grids, len(features))
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


__all__ = ["grids_of_images", "in_one_row", "join_views", "put_in_place", "views_of"]
