"""How likely a model finds an answer while parts of its pictures are hidden.

What is special: a part is hidden in the picture as it is stored, under the picture's mean colour, and the picture then
goes the way of every picture, into tiles too. The answer is given, so one pass tells of all its tokens. What hiding
leaves as it was is not run again: views whose pixels stay the same, other pictures, and the prompt before the picture,
whose keys and values are kept where the model at hand proves that it goes on from them. Memory holds one batch.

Source: Zeiler and Fergus, Visualizing and Understanding Convolutional Networks, https://arxiv.org/abs/1311.2901.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageStat
from transformers.modeling_outputs import BaseModelOutputWithPooling

from processing.data_error_vlm import DuetError
from processing.images_vlm import MOST_STRETCHED
from processing.processing_vlm import VLMProcessor

from .conversation import CACHE
from .program import program


Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels of the picture as it is stored."""


class Patch(NamedTuple):
    """What is hidden as one: the number of its picture, its place in that picture's grid, and its pixels."""

    picture: int
    row: int
    column: int
    box: Box


def patches_of(
    processor: VLMProcessor, config: Any, picture: Image.Image, number: int = 0, grid: tuple[int, int] | None = None
) -> list[Patch]:
    """
    The patches that cover what the encoder sees of a picture, row by row.

    Args:
        config: the model's.
        number: the picture's, among several.
        grid: rows and columns; if not given, the patches are those that the encoder cuts the view of the whole into.
    """
    left, top, right, bottom = _seen(processor, *picture.size)
    if grid is None:
        rows, columns = config.patch_grid
        vision = getattr(config.vision_config, "encoders", (config.vision_config,))[0]
        sides = vision.patch_size if isinstance(vision.patch_size, (list, tuple)) else (vision.patch_size,) * 2
        # An encoder leaves out what is less than a patch at the end.
        height, width = (side / whole for side, whole in zip(sides, processor.view_size))
    else:
        rows, columns = grid
        height, width = 1 / rows, 1 / columns
    across = _edges(left, (right - left) * width, columns, picture.width)
    down = _edges(top, (bottom - top) * height, rows, picture.height)
    return [Patch(number, row, column, (x, y, to_x, to_y)) for row, y, to_y in down for column, x, to_x in across]


def _edges(start, step, count, most):
    """Number, beginning and end of patches along a side; those of which no pixel is there are left out."""
    ends = [min(max(round(start + step * number), 0), most) for number in range(count + 1)]
    return [(number, begin, end) for number, (begin, end) in enumerate(zip(ends, ends[1:])) if end > begin]


def _seen(processor, width, height):
    """The part of a picture that the view of the whole shows; it is larger than the picture where that is padded."""
    view_height, view_width = processor.view_size
    mode, images = processor.image_mode, processor.image_processor
    size = dict(images.size or {}) if getattr(images, "do_center_crop", False) else {}
    x, y = 0.0, 0.0
    if mode in ("pad", "crop"):
        scale = (min if mode == "pad" else max)(view_width / width, view_height / height)
        scaled = (width * scale, height * scale)
    elif mode == "resize" or processor.max_tiles > 1 or not size.keys() & {"shortest_edge", "height"}:
        return 0.0, 0.0, float(width), float(height)
    elif "height" in size:
        scaled = (size["width"], size["height"])
    else:
        kept = [min(side, MOST_STRETCHED * min(width, height)) for side in (width, height)]
        x, y = (width - kept[0]) / 2, (height - kept[1]) / 2
        width, height = kept
        scale = size["shortest_edge"] / min(width, height)
        scaled = (width * scale, height * scale)
    part_width, part_height = width * view_width / scaled[0], height * view_height / scaled[1]
    x, y = x + (width - part_width) / 2, y + (height - part_height) / 2
    return x, y, x + part_width, y + part_height


def mean_colour(picture: Image.Image) -> tuple[int, ...]:
    """The mean of a picture's pixels, which hides a part of it."""
    return tuple(round(value) for value in ImageStat.Stat(picture).mean)


class _Views(NamedTuple):
    """What the encoder is given of a picture, `(views, ...)` each: pixels, and what it makes of them; and the grid."""

    pixels: torch.Tensor
    features: torch.Tensor
    grid: torch.Tensor | None


class Occlusion:
    """
    An answer to a prompt about pictures, of which parts are hidden.

    Args:
        model: a composed model, in evaluation mode, or one with adapters around it.
        processor: the model's.
        pictures: RGB, in the order of the prompt's images.
        prompt: ids, an image token for each position of an image.
        answer: ids that the model is to go on with, one at least.
        suppressed: ids that generation never writes, and that get no probability.
        batch_size: hidings that are read at a time.

    Attributes:
        shares (`bool`): whether the prompt before a picture is read once for all hidings.
        rounding (`float`): by how much log-probabilities differ with what is read together.

    Raises:
        DuetError: the model's code is of an earlier Duet.
    """

    def __init__(
        self,
        model: Any,
        processor: VLMProcessor,
        pictures: Sequence[Image.Image],
        prompt: list[int],
        answer: list[int],
        suppressed: Sequence[int] = (),
        batch_size: int = 8,
    ):
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not hasattr(self.model.model, "encode_views"):
            raise DuetError(
                "the model carries the code of an earlier Duet, which cannot be explained; bring it up to date with "
                f"`{program('inference_vlm.update')} FOLDER`."
            )
        self.processor, self.pictures, self.batch_size = processor, list(pictures), batch_size
        self.answer = torch.tensor(answer)
        self.suppressed = list(suppressed)
        self.ids = torch.tensor([*prompt, *answer[:-1]])
        self.colours = [mean_colour(picture) for picture in self.pictures]
        self._views: list[_Views] = []
        self._kept: tuple[int, Any] | None = None
        with torch.no_grad():
            for picture in self.pictures:
                pixels, grid = self._pixels(picture)
                self._views.append(_Views(pixels, self._encoded(pixels), grid))
            self._features = [self._projected([(view.features, view.grid)])[0] for view in self._views]
        self._starts = _starts(prompt, processor.image_token_id, [len(features) for features in self._features])
        self.rounding = 0.0
        self.shares = all([self._goes_on_from(first) for first in range(len(self.pictures))])

    # -- pictures -------------------------------------------------------------------------------------------------

    def _hidden(self, number, patches):
        picture = self.pictures[number].copy()
        for patch in patches:
            picture.paste(self.colours[number], patch.box)
        return picture

    def _pixels(self, picture):
        tensors = self.processor.process_images([picture])
        return tensors["pixel_values"], tensors.get("image_grids")

    def _encoded(self, pixels):
        """What the encoder makes of views, so many at a time."""
        parts = pixels.to(self.model.device, self.model.dtype).split(self.batch_size)
        return torch.cat([self.model.model.encode_views(part)[1] for part in parts])

    def _projected(self, encoded):
        """The features of pictures in the language model's space, `(tokens, hidden)` each."""
        if not encoded:
            return []
        features, grids = zip(*encoded)
        given = {} if grids[0] is None else {"image_grids": torch.cat(grids)}
        outputs = self.model.get_image_features(vision_features=torch.cat(features), return_dict=True, **given)
        return list(outputs.pooler_output)

    def _features_of(self, hidings):
        """The features of every picture for each of some hidings; only views that differ are encoded."""
        changed: dict[tuple[int, int], torch.Tensor] = {}
        for index, patches in enumerate(hidings):
            for number in {patch.picture for patch in patches}:
                pixels, _ = self._pixels(self._hidden(number, [p for p in patches if p.picture == number]))
                changed[index, number] = pixels
        differ = {key: (pixels != self._views[key[1]].pixels).flatten(1).any(1) for key, pixels in changed.items()}
        new = [pixels[differ[key]] for key, pixels in changed.items() if differ[key].any()]
        made = self._encoded(torch.cat(new)) if new else None
        encoded, done = [], 0
        for key, of_key in differ.items():
            features = self._views[key[1]].features
            if (count := int(of_key.sum())) and made is not None:
                features = features.clone()
                features[of_key.to(features.device)] = made[done : done + count]
                done += count
            encoded.append((features, self._views[key[1]].grid))
        projected = dict(zip(changed, self._projected(encoded)))
        return [
            [projected.get((index, number), own) for number, own in enumerate(self._features)]
            for index in range(len(hidings))
        ]

    # -- the answer -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def log_probs(self, hidings: Iterable[Sequence[Patch]]) -> Iterator[torch.Tensor]:
        """
        The log-probability of each token of the answer, `(tokens,)` in float64, for each hiding: patches that are
        hidden together, none for the pictures as they are.

        Those that follow each other and leave the same first pictures as they are, are read together.
        """
        hidings = iter(hidings)
        while batch := list(islice(hidings, self.batch_size)):
            first = min((patch.picture for patches in batch for patch in patches), default=0)
            yield from self._read(self._features_of(batch), first if self.shares else None)

    def _read(self, features, first) -> torch.Tensor:
        """As `log_probs`, `(rows, tokens)`, from the features of every row; `first`: the picture to begin with."""
        begins = 0 if first is None else self._starts[first]
        inputs: dict[str, Any] = {"use_cache": False}
        if begins:
            cache = copy.deepcopy(self._prefix(first))  # which reading extends
            cache.batch_repeat_interleave(len(features))
            inputs = {"use_cache": True, CACHE: cache}
        ids = self.ids[begins:].to(self.model.device).expand(len(features), -1)
        shown = [picture for row in features for picture in row[first or 0 :]]
        logits = self.model(
            input_ids=ids, logits_to_keep=len(self.answer), return_dict=True, **_given(shown), **inputs
        ).logits
        return torch.stack([self._of_answer(row) for row in logits])

    def _of_answer(self, logits):
        logits = logits.double()  # of a token that is all but certain the rest would be rounding
        logits[:, self.suppressed] = -float("inf")
        return logits.log_softmax(-1).gather(-1, self.answer.to(logits.device)[:, None])[:, 0].cpu()

    def _prefix(self, first):
        """The keys and values of all that stands before a picture; those for the last are kept."""
        if self._kept is not None and self._kept[0] == first:
            return self._kept[1]
        ids = self.ids[: self._starts[first]].to(self.model.device)[None]
        shown = _given(self._features[:first])
        outputs = self.model(input_ids=ids, logits_to_keep=1, use_cache=True, return_dict=True, **shown)
        self._kept = first, outputs[CACHE]
        return outputs[CACHE]

    @torch.no_grad()
    def _goes_on_from(self, first):
        """Whether the model says the same where it goes on from what stands before a picture, in two rows."""
        expected = self._read([self._features], None)
        try:
            found = self._read([self._features] * 2, first)
        except Exception:  # whatever a model does with a cache that it was not made to go on from
            return False
        differs = (found - expected).abs().max().item()
        if not differs < (2e-3 if self.model.dtype == torch.float32 else 0.2):
            return False
        self.rounding = max(self.rounding, differs)
        return True


def _given(features) -> dict[str, Any]:
    return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)}} if features else {}


def _starts(prompt, image_token_id, counts):
    """Where each image begins in a prompt."""
    starts, place = [], 0
    for count in counts:
        place = prompt.index(image_token_id, place)
        starts.append(place)
        place += count
    return starts


__all__ = ["Box", "Occlusion", "Patch", "mean_colour", "patches_of"]
