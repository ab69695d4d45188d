"""See why a model said what it said: which parts of the pictures each token of its answer hangs on.

    python -m inference_vlm.explain outputs/shapes/sft picture.png "Which colour is the circle?"
    python -m inference_vlm.explain MODEL before.png after.png "What has changed?" --out why.html --json why.json

Each patch of each picture is hidden once under the picture's mean colour, and the model is asked how likely it finds
its own answer now: what the log-probability of a token falls by is how much the token hangs on the patch. Without a
question the images are captioned. What is special: the map is put to the proof. The patches are hidden one after the
other, those that the map calls strongest first, and in random orders; an answer that hangs on what the map shows falls
sooner in the first, and the area between is a measure of it.
"""

import argparse
import json
import os
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging

from processing.data_error_vlm import DuetError, in_a_line, printable
from processing.image_files_vlm import ImagePolicy, image_name, is_url

from .answering import Answerer, Prepared, text_of
from .ask import ERROR, pictures_and_question, read_question
from .asked import opened, reference_of
from .explained_page import write_page
from .loading import add_loading_arguments, loading_of
from .occlusion import Occlusion, Patch, patches_of
from .pieces import Piece, pieces_of
from .program import ended_by, program, show_any_text


MAX_NEW_TOKENS = 64
STEPS = 16
"""Points of a deletion curve, beside that of pictures that are whole."""


class Deletion(NamedTuple):
    """
    The log-probability of the answer while more and more patches are hidden.

    `hidden` are numbers of patches, from none to all; `strongest` is the curve of those that the map calls strongest
    first, `chance` one for each random order.
    """

    hidden: list[int]
    strongest: list[float]
    chance: list[list[float]]

    @property
    def areas(self) -> list[float]:
        """For each random order how much higher it lies than the curve of the strongest, in nats, over all shares."""
        return [self._mean([above - below for above, below in zip(curve, self.strongest)]) for curve in self.chance]

    def _mean(self, heights):
        steps = zip(self.hidden, self.hidden[1:], heights, heights[1:])
        return sum((end - begin) * (low + high) / 2 for begin, end, low, high in steps) / max(1, self.hidden[-1])

    @property
    def area(self) -> float:
        """The mean of `areas`: 0 for a map that says no more than chance."""
        return statistics.fmean(self.areas)

    @property
    def spread(self) -> float | None:
        """The standard deviation of `areas`; one has none."""
        return statistics.pstdev(self.areas) if len(self.areas) > 1 else None


class Explanation(NamedTuple):
    """
    An answer, and what it hangs on.

    `falls` is `(patches, tokens)`: what the log-probability of each token loses, in nats, where the patch is hidden;
    less than 0 where the model then finds it likelier. `ended` is whether the model ended the answer, which is else cut
    short by `max_new_tokens` or for want of positions. `log_probs` are those of the pictures as they are; `rounding` is
    by how much they differ with what is read together, and `shares` whether the prompt before a picture was read once
    for all patches.
    """

    question: str | None
    answer: str
    ended: bool
    pieces: list[Piece]
    log_probs: list[float]
    pictures: list[Image.Image]
    colours: list[tuple[int, ...]]
    patches: list[Patch]
    falls: torch.Tensor
    deletion: Deletion
    around: int
    rounding: float
    shares: bool

    @property
    def strengths(self) -> torch.Tensor:
        """What the whole answer loses for each patch: the sum over its tokens, its end among them."""
        return self.falls.sum(1)

    @property
    def strongest(self) -> Patch:
        """The patch that the answer hangs on most."""
        return self.patches[int(self.strengths.argmax())]


def explain(
    answerer: Answerer,
    prepared: Prepared,
    question: str | None = None,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    grid: tuple[int, int] | None = None,
    around: int = 0,
    batch_size: int = 8,
    seeds: int = 5,
    progress: bool = False,
) -> Explanation:
    """
    The likeliest answer to a prompt, and what of its pictures it hangs on.

    Args:
        answerer: the model.
        prepared: of its `read` or `read_caption`, with one image at least.
        question: what was asked, as it is shown.
        grid: rows and columns of the patches of each picture; those of the encoder if not given.
        around: how many patches on every side of each are hidden with it, for an answer that hangs on more than one.
        batch_size: hidden pictures that are read at a time.
        seeds: random orders that the map is compared with, one at least.
        progress: show a bar on stderr.

    Raises:
        DuetError: the model's code is of an earlier Duet, or there is nothing to hide.
    """
    processor, pictures = answerer.processor, prepared.images
    if not pictures:
        raise DuetError("the prompt has no picture, of which parts could be hidden; expected one at least.")
    config = answerer.settings(temperature=0, max_new_tokens=max_new_tokens).config
    answer = _generated(answerer, prepared, config)
    suppressed = config.suppress_tokens or ()
    occlusion = Occlusion(answerer.model, processor, pictures, prepared.row, answer, suppressed, batch_size)
    patches = [
        patch
        for number, picture in enumerate(pictures)
        for patch in patches_of(processor, occlusion.model.config, picture, number, grid)
    ]

    def read(hidings: list[Sequence[Patch]], what: str) -> torch.Tensor:
        found = tqdm(occlusion.log_probs(hidings), what, len(hidings), disable=not progress, file=sys.stderr)
        return torch.stack(list(found))

    at = {patch[:3]: patch for patch in patches}
    whole, *hidden = read([[], *(_near(at, patch, around) for patch in patches)], "patches")
    falls = whole - torch.stack(hidden)
    order = sorted(range(len(patches)), key=lambda number: -falls[number].sum().item())
    orders = [[patches[number] for number in order]]
    orders += [random.Random(seed).sample(patches, len(patches)) for seed in range(seeds)]
    counts = sorted({round(len(patches) * step / STEPS) for step in range(STEPS + 1)})
    between = counts[1:-1]  # of none and of all there is nothing to choose
    *inner, last = (
        read([*(order[:count] for order in orders for count in between), patches], "deletion").sum(1).tolist()
    )
    curves = [
        [whole.sum().item(), *inner[place * len(between) : (place + 1) * len(between)], last]
        for place in range(len(orders))
    ]
    return Explanation(
        question=question,
        answer=text_of(processor, answer),
        ended=answer[-1] in _ends(config),
        pieces=pieces_of(processor.tokenizer, answer, _ends(config)),
        log_probs=whole.tolist(),
        pictures=list(pictures),
        colours=occlusion.colours,
        patches=patches,
        falls=falls,
        deletion=Deletion(counts, curves[0], curves[1:]),
        around=around,
        rounding=occlusion.rounding,
        shares=occlusion.shares,
    )


def _near(at, patch, around):
    """A patch, and those of its picture that lie around it; `at` finds a patch by its place."""
    reach = range(-around, around + 1)
    places = [(patch.picture, patch.row + down, patch.column + across) for down in reach for across in reach]
    return [at[place] for place in places if place in at]


@torch.no_grad()
def _generated(answerer, prepared, config) -> list[int]:
    """The ids of the likeliest answer, which is no longer than there is room for."""
    model, length = answerer.model, len(prepared.row)
    composed = model.get_base_model() if hasattr(model, "get_base_model") else model
    if answerer.max_positions is not None:
        config.max_new_tokens = min(config.max_new_tokens, answerer.max_positions - length)
    inputs = answerer.processor.process_images(prepared.images)
    inputs["input_ids"] = torch.tensor([prepared.row])
    inputs["attention_mask"] = torch.ones(1, length, dtype=torch.long)
    own, composed.generation_config = composed.generation_config, config  # it says what is not said here
    try:
        return model.generate(**inputs.to(model.device, model.dtype))[0, length:].tolist()
    finally:
        composed.generation_config = own


def _ends(config):
    ends = config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


def as_json(explanation: Explanation, name: str, images: Sequence[str]) -> dict[str, Any]:
    """An explanation as plain lists and numbers, log-probabilities in nats."""
    pictures = []
    for number, (image, picture, colour) in enumerate(zip(images, explanation.pictures, explanation.colours)):
        patches = [
            {"row": patch.row, "column": patch.column, "box": list(patch.box), "falls": falls}
            for patch, falls in zip(explanation.patches, explanation.falls.tolist())
            if patch.picture == number
        ]
        size = {"width": picture.width, "height": picture.height}
        pictures.append({"image": image, **size, "hidden_under": list(colour), "patches": patches})
    deletion = explanation.deletion
    return {
        "model": name,
        "question": explanation.question,
        "answer": explanation.answer,
        "ended": explanation.ended,
        "tokens": [
            {"id": piece.id, "text": piece.text, "shown": piece.label, "part": piece.part, "log_prob": log_prob}
            for piece, log_prob in zip(explanation.pieces, explanation.log_probs)
        ],
        "images": pictures,
        "around": explanation.around,
        "deletion": {**deletion._asdict(), "area": deletion.area, "spread": deletion.spread},
        "rounding": explanation.rounding,
    }


def _grid(text):
    """Rows and columns, of `8` or `6x8`."""
    rows, _, columns = text.lower().partition("x")
    try:
        grid = (int(rows), int(columns or rows))
    except ValueError:
        grid = (0, 0)
    if min(grid) < 1:
        raise DuetError(f"grid={text!r}: expected rows and columns of patches, such as 6x8, or one number for both.")
    return grid


def _named(given):
    """What a model or a picture is called where others may read it: of a path what tells nothing of the machine."""
    if is_url(given):
        found = urlsplit(given)  # what is before an @ or behind a ? may be a password
        return image_name(f"{found.scheme}://{found.hostname}{found.path}")
    if not os.path.exists(given):
        return image_name(given)
    return "/".join(Path(given).resolve().parts[-2:]) if os.path.isdir(given) else Path(given).name


def _writable(path: Path | None, others: Sequence[str | Path | None]) -> None:
    """Refuse a file that could not be written, or would take the place of others, before anything is computed."""
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir():
        found = "is a folder" if path.is_dir() else f"lies in {path.parent}, which is no folder"
        raise DuetError(f"{path} {found}; expected the name of a file that can be written.")
    if path.resolve() in [Path(other).resolve() for other in others if other is not None]:
        raise DuetError(f"{path} is named for two things, and would be written over; give each a name of its own.")


def _write(path, text):
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DuetError(f"{path} could not be written: {in_a_line(error)}.") from error


def _run(args: argparse.Namespace) -> str:
    """Explain as the command line asks; gives what is printed."""
    for option, least in (("max_new_tokens", 1), ("batch_size", 1), ("seeds", 1), ("around", 0)):
        if getattr(args, option) < least:
            raise DuetError(f"{option}={getattr(args, option)}: expected {least} or more.")
    grid = None if args.grid is None else _grid(args.grid)
    images, question = pictures_and_question(args.inputs, args.question)
    _writable(args.out, [*images, args.json])
    _writable(args.json, images)
    question = read_question(question)
    if not images:
        raise DuetError("there is no picture to explain an answer by; name one behind the model.")
    policy = ImagePolicy(allow_urls=args.allow_urls, allow_local_urls=args.allow_local_urls, own_paths=True)
    pictures = [opened(reference_of(image, policy)) for image in images]
    logging.disable_progress_bar()
    answerer = Answerer.load(args.model, **loading_of(args))
    if question is None:
        prepared = answerer.read_caption(pictures)
    else:
        parts = [
            *({"type": "image", "image": picture} for picture in pictures),
            {"type": "text", "text": question},
        ]
        prepared = answerer.read([{"role": "user", "content": parts}])
    found = explain(
        answerer, prepared, question, max_new_tokens=args.max_new_tokens, grid=grid,
        around=args.around, batch_size=args.batch_size, seeds=args.seeds, progress=True,
    )  # fmt: skip
    if not found.shares:
        print("the model's cache cannot be gone on from: the whole prompt was read for every patch", file=sys.stderr)
    name, images = _named(args.model), list(map(_named, images))
    _write(args.out, write_page(found, name, images))
    if args.json is not None:
        _write(args.json, json.dumps(as_json(found, name, images), ensure_ascii=False, indent=1) + "\n")
    of = f"what each of {len(found.pieces)} tokens hangs on, of {len(found.patches)} patches"
    of += "" if found.ended else ", cut short there"
    area, spread = found.deletion.area, found.deletion.spread
    cost = f"the strongest first cost {abs(area):.2f} nats {'more' if area >= 0 else 'less'} than in random orders"
    cost += "" if spread is None else f" (± {spread:.2f})"
    return f"{printable(found.answer)}\n{args.out}: {of}; {cost}."


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 where the model or an image cannot be read, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog=program("inference_vlm.explain"), description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="folder or Hub name of a model trained with Duet; its own code is run")
    parser.add_argument(
        "inputs", nargs="*", metavar="PICTURE ... QUESTION",
        help="image files or URLs, and one question, - for stdin. Without a question the pictures are captioned",
    )  # fmt: skip
    parser.add_argument("--question", help="the question, where it could be taken for a picture; - for stdin")
    parser.add_argument("--allow_urls", action="store_true", help="fetch pictures that are URLs")
    parser.add_argument("--allow_local_urls", action="store_true", help="from networks of this machine, too")
    parser.add_argument("--out", type=Path, default=Path("explained.html"), help="the page (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="a file for all that the page shows, as numbers")
    parser.add_argument("--grid", help="rows and columns of patches, 8 or 6x8; the encoder's own if not given")
    parser.add_argument("--around", type=int, default=0, help="patches hidden with each, on every side (%(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=MAX_NEW_TOKENS, help="longest answer (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="hidden pictures read at a time (%(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="random orders to compare with (%(default)s)")
    add_loading_arguments(parser)
    args = parser.parse_intermixed_args(argv)
    show_any_text()
    try:
        print(_run(args))
    except torch.OutOfMemoryError:
        print(f"error: batch_size={args.batch_size} is more than fits in memory; give less.", file=sys.stderr)
        return ERROR
    except (Exception, KeyboardInterrupt) as error:
        return ended_by(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
