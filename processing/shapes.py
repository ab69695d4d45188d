"""The built-in dataset: small drawn scenes, with captions and dialogues about them.

It is there so that both training stages, and the exact-match evaluation after them, run from scratch on two CPU cores
with nothing to download. What is special about it:

* Nothing is stored. `scene(split, index, seed)` is a pure function with random access: a map-style dataset calls it in
  its workers, and the picture, the five captions and the dialogue all follow from the scene it returns.
* The splits never share a scene. A hash of the objects alone (shape, colour, size, place; not the ground, not the
  jitter) says which split a scene belongs to, whatever the seed or the index.
* The colour-shape pairs in `UNSEEN_PAIRS` appear in test alone, drawn or named: what is answered about them has been
  composed, not remembered.
* Every question has one right answer with one wording, and the answer is not to be had from the question: "yes" is as
  frequent as "no", absent objects resemble present ones, counts are spread.

    python -m processing.shapes --out pictures      # a few test scenes and questions, to try a model on
"""

import argparse
import json
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw

from .data_error_vlm import DuetError


COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 35),
    "yellow": (250, 230, 40),
    "green": (30, 150, 50),
    "blue": (35, 60, 215),
    "purple": (125, 35, 165),
    "pink": (255, 130, 190),
}
SHAPES: tuple[str, ...] = ("circle", "triangle", "cross")
# The radius of an object, as a share of the image's side.
SIZES: dict[str, float] = {"small": 0.13, "large": 0.215}
# The centre of each place, as shares of the image's width and height, in reading order.
PLACES: dict[str, tuple[float, float]] = {
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
}
GROUNDS: tuple[str, ...] = ("plain", "speckled", "striped")
# (colour, shape) pairs that only test scenes hold: every shape once, every colour at most once.
UNSEEN_PAIRS: frozenset[tuple[str, str]] = frozenset({("red", "triangle"), ("green", "circle"), ("blue", "cross")})
KINDS: tuple[str, ...] = ("place", "colour", "count", "exists", "relation")
SPLITS: tuple[str, ...] = ("train", "validation", "test")

_PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
_SEEN_PAIRS = [pair for pair in _PAIRS if pair not in UNSEEN_PAIRS]
_NUMBERS = ("zero", "one", "two", "three", "four")
# How many objects a scene has: few more often than many.
_OBJECTS = (1, 1, 1, 2, 2, 2, 3, 3, 4)
# The share of the test scenes that is made to hold an unseen pair.
_UNSEEN_SHARE = 0.25
# Objects are drawn this many times larger and reduced: smooth edges at any image size.
_OVERSAMPLING = 3


@dataclass(frozen=True)
class Object:
    """One thing in a scene."""

    shape: str
    colour: str
    size: str
    place: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"

    @property
    def pair(self) -> tuple[str, str]:
        """Its (colour, shape), the combination that may be unseen in training."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Turn:
    """A question about a scene and its one right answer.

    `kind` is one of `KINDS`; `unseen` says that the scene holds a colour-shape pair no training scene holds.
    """

    question: str
    answer: str
    kind: str
    unseen: bool


@dataclass(frozen=True)
class Scene:
    """One to four objects, each at its own place, on a ground; `seed` decides jitter, wording and the questions."""

    objects: tuple[Object, ...]
    ground: str
    seed: int

    @property
    def unseen(self) -> bool:
        """Whether the scene holds a colour-shape pair that no training scene holds."""
        return any(thing.pair in UNSEEN_PAIRS for thing in self.objects)

    def draw(self, image_size: int, object_scale: float = 1.0) -> Image.Image:
        """
        The picture: RGB, `image_size` pixels in width and height, the same composition at every size.

        Args:
            object_scale: how large the objects are drawn; below 1 they need an encoder that sees detail.
        """
        image, strokes = self._drawing(image_size * _OVERSAMPLING, object_scale)
        pen = ImageDraw.Draw(image)
        for thing, (x, y, radius, colour) in zip(self.objects, strokes):
            _DRAW[thing.shape](pen, x, y, radius, colour)
        return image.reduce(_OVERSAMPLING)

    def boxes(self, image_size: int, object_scale: float = 1.0) -> list[tuple[float, float, float, float]]:
        """Where `draw` puts each object: left, top, right and bottom in pixels, in the order of the objects."""
        _, strokes = self._drawing(image_size, object_scale)
        return [(x - radius, y - radius, x + radius, y + radius) for x, y, radius, _ in strokes]

    def _drawing(self, side, object_scale):
        """The ground, and of each object its centre, radius and colour."""
        rng = Random(f"drawing {self.seed}")
        image, strokes = _ground(self.ground, side, rng), []
        for thing in self.objects:
            x, y = (side * (centre + rng.uniform(-0.02, 0.02)) for centre in PLACES[thing.place])
            radius = side * SIZES[thing.size] * object_scale * rng.uniform(0.95, 1.05)
            colour = tuple(max(0, min(255, channel + rng.randint(-10, 10))) for channel in COLOURS[thing.colour])
            strokes.append((x, y, radius, colour))
        return image, strokes

    def asked_for(self, turn: Turn) -> list[int]:
        """Numbers of the objects that the right answer is about; none where that is all of them, or nothing."""
        if turn.kind == "count" or turn.answer in ("nothing", "no"):
            return []
        question, things = turn.question, list(enumerate(self.objects))
        if turn.kind == "place":
            return [number for number, thing in things if f"the {thing.place}?" in question]
        if turn.kind == "colour":
            return [number for number, thing in things if f" the {thing.shape}" in question]
        if turn.kind == "exists":
            return [number for number, thing in things if f" a {' '.join(thing.pair)}" in question]
        (mark,) = [thing for thing in self.objects if f"of the {' '.join(thing.pair)}" in question]
        x, sign = PLACES[mark.place][0], -1 if "left of" in question else 1
        return [number for number, thing in things if (PLACES[thing.place][0] - x) * sign > 0]

    def captions(self) -> list[str]:
        """Five captions that each name all objects: three place by place, one by shape, one by colour."""
        things = [(thing.place, f"a {thing}") for thing in self.objects]
        number = _NUMBERS[len(things)] + (" object" if len(things) == 1 else " objects")
        by_shape, by_colour = [], []
        for shape in SHAPES:
            found = [f"{thing.place} {thing.size} {thing.colour}" for thing in self.objects if thing.shape == shape]
            by_shape.append(f"{_plural(shape)}: " + ", ".join([_NUMBERS[len(found)], *found]))
        for colour in COLOURS:
            found = [f"{thing.place} {thing.size} {thing.shape}" for thing in self.objects if thing.colour == colour]
            by_colour += [f"{colour}: " + ", ".join([_NUMBERS[len(found)], *found])] if found else []
        return [
            "; ".join(f"{where}: {what}" for where, what in things) + ".",
            "at the " + _listed([f"{where} is {what}" for where, what in things], " and at the ", ", at the ") + ".",
            f"{number} on a {self.ground} ground: " + ", ".join(f"{where} {what}" for where, what in things) + ".",
            "; ".join(by_shape) + ".",
            "; ".join(by_colour) + ".",
        ]

    def dialogue(self) -> list[Turn]:
        """Two to five turns about the scene, nothing asked twice.

        The kinds come in turn, in random order; the hardest, places and relations, have two chances.
        """
        rng = Random(f"dialogue {self.seed}")
        wanted = rng.choice((2, 3, 4, 5, 5))
        turns: list[Turn] = []
        asked: set[str] = set()
        kinds: list[str] = []
        while len(turns) < wanted:
            if not kinds:
                kinds = [*KINDS, "relation", "place"]
                rng.shuffle(kinds)
            found = _ASK[kind := kinds.pop()](self, rng)
            if found is None or found[0] in asked:
                continue
            asked.add(found[0])
            turns.append(self._turn(kind, *found, rng))
        return turns

    def _turn(self, kind: str, subject: str, answer: str, rng: Random) -> Turn:
        question = rng.choice(_WORDINGS[kind]).format(subject)
        if rng.random() < 0.5:
            question = question[0].upper() + question[1:]
        return Turn(question, answer, kind, self.unseen)


def scene(split: str, index: int, seed: int = 0) -> Scene:
    """The scene at `index` of a split ("train", "validation", "test"); each seed gives another endless series of them.

    Raises:
        DuetError: there is no such split.
    """
    if split not in SPLITS:
        raise DuetError(f"the built-in dataset has no split {split!r}; it has {', '.join(SPLITS)}")
    rng = Random(f"{split} {seed} {index}")
    unseen = split == "test" and rng.random() < _UNSEEN_SHARE
    while True:
        objects = _objects(rng, unseen)
        if split_of(objects) == split:
            return Scene(objects, rng.choice(GROUNDS), rng.getrandbits(32))


def split_of(objects: tuple[Object, ...]) -> str:
    """The one split that may hold these objects: test for unseen pairs, else as their hash falls (6/8, 1/8, 1/8)."""
    if any(thing.pair in UNSEEN_PAIRS for thing in objects):
        return "test"
    content = ";".join(sorted(f"{thing} {thing.place}" for thing in objects))
    return {0: "test", 1: "validation"}.get(zlib.crc32(content.encode()) >> 16 & 7, "train")


def questions(split: str, n: int, seed: int = 0) -> list[tuple[Scene, Turn]]:
    """`n` single questions, each about its own scene, all `KINDS` in equal shares: for exact-match evaluation."""
    items = []
    for position in range(n):
        kind, index, found = KINDS[position % len(KINDS)], position, None
        while found is None:
            item = scene(split, index, seed)
            rng = Random(f"question {item.seed}")
            found = _ASK[kind](item, rng)
            index += n
        items.append((item, item._turn(kind, *found, rng)))
    return items


def _objects(rng: Random, unseen: bool) -> tuple[Object, ...]:
    """One to four objects in reading order. In half of the scenes shapes or colours come from two, so they recur."""
    places = sorted(rng.sample(range(len(PLACES)), rng.choice(_OBJECTS)))
    names = list(PLACES)
    colours, shapes = set(COLOURS), set(SHAPES)
    theme = rng.random()
    if theme < 0.25:
        colours = set(rng.sample(list(COLOURS), 2))
    elif theme < 0.5:
        shapes = set(rng.sample(SHAPES, 2))
    pairs = [(colour, shape) for colour, shape in _SEEN_PAIRS if colour in colours and shape in shapes]
    chosen = [rng.choice(pairs) for _ in places]
    if unseen:
        chosen[rng.randrange(len(chosen))] = rng.choice(sorted(UNSEEN_PAIRS))
    sizes = list(SIZES)
    return tuple(
        Object(shape, colour, rng.choice(sizes), names[place]) for (colour, shape), place in zip(chosen, places)
    )


# Questions. Each function gives (what is asked about, the answer), or None where the scene has no such question.

_WORDINGS = {
    "place": ("what is at the {}?", "what do you see at the {}?", "which object is at the {}?"),
    "colour": ("which colour is the {}?", "what colour is the {}?", "which colour does the {} have?"),
    "count": ("how many {} are there?", "how many {} do you see?", "how many {} are in the picture?"),
    "exists": ("is there a {}?", "do you see a {}?", "does the picture show a {}?"),
    "relation": ("what is {}?", "what do you see {}?", "which object is {}?"),
}


def _ask_place(item: Scene, rng: Random) -> tuple[str, str] | None:
    taken = {thing.place: thing for thing in item.objects}
    empty = [place for place in PLACES if place not in taken]
    if empty and rng.random() < 0.2:
        return rng.choice(empty), "nothing"
    thing = rng.choice(item.objects)
    return thing.place, f"a {thing}"


def _ask_colour(item: Scene, rng: Random) -> tuple[str, str] | None:
    times = Counter(thing.shape for thing in item.objects)
    single = [thing for thing in item.objects if times[thing.shape] == 1]
    if not single:
        return None
    thing = rng.choice(single)
    return thing.shape, thing.colour


def _ask_count(item: Scene, rng: Random) -> tuple[str, str] | None:
    if rng.random() < 0.4:
        return "objects", _NUMBERS[len(item.objects)]
    shapes = Counter(thing.shape for thing in item.objects)
    colours = Counter(thing.colour for thing in item.objects)
    counts = {_plural(shape): shapes[shape] for shape in SHAPES}
    counts |= {f"{colour} objects": colours[colour] for colour in COLOURS}
    number = rng.choice(sorted(set(counts.values())))
    return rng.choice([subject for subject, count in counts.items() if count == number]), _NUMBERS[number]


def _ask_exists(item: Scene, rng: Random) -> tuple[str, str] | None:
    present = sorted({thing.pair for thing in item.objects})
    if rng.random() < 0.5:
        return " ".join(rng.choice(present)), "yes"
    named = _PAIRS if item.unseen else _SEEN_PAIRS
    absent = [pair for pair in named if pair not in present]
    if rng.random() < 0.75:  # something like a present object: one glance at the colours or the shapes is not enough
        colour, shape = rng.choice(present)
        absent = [pair for pair in absent if (pair[0] == colour) != (pair[1] == shape)]
    return " ".join(rng.choice(absent)), "no"


def _ask_relation(item: Scene, rng: Random) -> tuple[str, str] | None:
    times = Counter(thing.pair for thing in item.objects)
    found = []
    for thing in item.objects:
        if times[thing.pair] > 1:
            continue
        x = PLACES[thing.place][0]
        for side, sign in (("left", -1), ("right", 1)):
            there = [other for other in item.objects if (PLACES[other.place][0] - x) * sign > 0]
            if len(there) == 1:
                found.append((f"{side} of the {' '.join(thing.pair)}", f"a {there[0]}"))
    return rng.choice(found) if found else None


_ASK: dict[str, Callable[[Scene, Random], tuple[str, str] | None]] = {
    "place": _ask_place,
    "colour": _ask_colour,
    "count": _ask_count,
    "exists": _ask_exists,
    "relation": _ask_relation,
}


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _listed(parts: list[str], last: str = " and ", between: str = ", ") -> str:
    return last.join([between.join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


# Drawing. Grounds are grey, so that a colour always belongs to an object.


def _ground(ground: str, side: int, rng: Random) -> Image.Image:
    grey = rng.randint(100, 155)
    image = Image.new("L", (side, side), grey)
    if ground == "speckled":
        grains = bytes(grey - 15 + value % 31 for value in rng.randbytes(24 * 24))
        image = Image.frombytes("L", (24, 24), grains).resize((side, side), Image.Resampling.NEAREST)
    elif ground == "striped":
        pen, width = ImageDraw.Draw(image), side / 16
        along, start = rng.random() < 0.5, rng.random() * width
        for stripe in range(-1, 8):
            near, far = start + 2 * stripe * width, start + (2 * stripe + 1) * width
            pen.rectangle((near, 0, far, side) if along else (0, near, side, far), fill=grey + 18)
    return image.convert("RGB")


def _circle(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: tuple[int, ...]) -> None:
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _triangle(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: tuple[int, ...]) -> None:
    pen.polygon(((x, y - radius), (x - radius, y + 0.85 * radius), (x + radius, y + 0.85 * radius)), fill=colour)


def _cross(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: tuple[int, ...]) -> None:
    arm = 0.3 * radius
    pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
    pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)


_DRAW: dict[str, Callable[..., None]] = {
    "circle": _circle,
    "triangle": _triangle,
    "cross": _cross,
}


def main(arguments: list[str] | None = None) -> None:
    """Write pictures to try a model on, and `questions.jsonl` with the captions of each, a question and its answer."""
    parser = argparse.ArgumentParser(prog="python -m processing.shapes", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--n", type=int, default=8, help="how many pictures (default: 8)")
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: test, which no training has seen")
    parser.add_argument("--image_size", type=int, default=64, help="width and height in pixels (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other scenes (default: 0)")
    args = parser.parse_args(arguments)

    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "questions.jsonl", "w", encoding="utf-8") as lines:
        for position, (item, turn) in enumerate(questions(args.split, args.n, args.seed)):
            path = args.out / f"{args.split}-{position:03d}.png"
            item.draw(args.image_size).save(path)
            row = {"image": path.name, "captions": item.captions(), **vars(turn)}
            lines.write(json.dumps(row) + "\n")
            print(f"{path}  {turn.question}  {turn.answer}")


if __name__ == "__main__":
    main()
