"""Losses, metrics and rates of a training as one picture, drawn from the Trainer's own log.

What is special: the log lies in every checkpoint, so that the curves of a run that goes on begin where the run began.
Pillow draws them; no other package is needed.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from .files import replace_image


WIDTH, HEIGHT, COLUMNS = 580, 330, 2
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 96, 56, 46
_FINE = 3  # each pixel is drawn as so many, for smooth lines
_INK, _FAINT, _GRID = "#1c2430", "#5b6675", "#e6e9ee"
_COLOURS = ("#2563eb", "#ea580c", "#0f9d58", "#9333ea", "#0891b2", "#be123c")
_SPIKE = 4  # times the median of a loss, above which a curve may leave its panel

Point = tuple[float, float]
"""A step and a value."""


class Series(NamedTuple):
    """A curve: what it is called, its points, and whether each is a measurement of its own to be marked."""

    name: str
    points: list[Point]
    marked: bool = False


class Panel(NamedTuple):
    """Curves that share their axes; `best` says whether the most (`max`) or the least (`min`) is pointed at."""

    title: str
    series: list[Series]
    best: str = ""


def panels_of(log_history: Sequence[dict[str, Any]], metrics: Sequence[str] = ()) -> list[Panel]:
    """
    What a log tells, in panels: the losses, each metric, the rates.

    Args:
        log_history: of a `TrainerState`.
        metrics: names of values that evaluations log as `eval_NAME`.
    """

    def points(key):
        found = [(entry["step"], entry[key]) for entry in log_history if key in entry and "step" in entry]
        return [(float(step), float(value)) for step, value in found if math.isfinite(value)]

    losses = [Series("training", points("loss")), Series("evaluation", points("eval_loss"), marked=True)]
    panels = [Panel("loss", losses, "min")]
    panels += [Panel(name, [Series("evaluation", points(f"eval_{name}"), marked=True)], "max") for name in metrics]
    rates = dict.fromkeys(key for entry in log_history for key in entry if key.endswith("learning_rate"))
    named = [Series(key.removesuffix("learning_rate").rstrip("_") or "all else", points(key)) for key in rates]
    panels.append(Panel("learning rate", [Series("", named[0].points)] if len(named) == 1 else named))
    shown = (panel._replace(series=[series for series in panel.series if series.points]) for panel in panels)
    return [panel for panel in shown if panel.series]


def draw_curves(log_history: Sequence[dict[str, Any]], file: Path, metrics: Sequence[str] = ()) -> Image.Image | None:
    """
    Write the curves of a training; nothing where nothing was logged. For the arguments see `panels_of`.

    Args:
        file: the picture, a PNG, which is replaced whole.

    Returns:
        the picture.
    """
    panels = panels_of(log_history, metrics)
    if not panels:
        return None
    rows = -(-len(panels) // COLUMNS)
    sheet = Image.new("RGB", (WIDTH * min(COLUMNS, len(panels)), HEIGHT * rows), "white")
    for number, panel in enumerate(panels):
        row, column = divmod(number, COLUMNS)
        sheet.paste(_drawn(panel), (column * WIDTH, row * HEIGHT))
    replace_image(sheet, file)
    return sheet


def _drawn(panel: Panel) -> Image.Image:
    picture = Image.new("RGB", (WIDTH * _FINE, HEIGHT * _FINE), "white")
    _Pen(ImageDraw.Draw(picture), panel).draw()
    return picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


class _Pen:
    """Draws one panel, in coordinates of the picture as it will be."""

    def __init__(self, pen: ImageDraw.ImageDraw, panel: Panel):
        self.pen, self.panel = pen, panel
        values = [value for series in panel.series for _, value in series.points]
        steps = [step for series in panel.series for step, _ in series.points]
        self.first, self.last = min(steps), max(max(steps), min(steps) + 1)
        self.ticks = nice_ticks(min(values), _ceiling(panel))

    def draw(self):
        """The panel from its ground up."""
        self._axes()
        labels = []
        for series, colour in zip(self.panel.series, _COLOURS):
            self._curve(series, colour)
            labels.append((self._y(series.points[-1][1]), _shown(series.points[-1][1]), colour))
        self._at_the_end(labels)
        self._heading()

    def _heading(self):
        self._text((_LEFT, 20), self.panel.title.replace("_", " "), _INK, 17, "lm")
        x = WIDTH - _RIGHT
        for series, colour in reversed(list(zip(self.panel.series, _COLOURS))):
            if not series.name:
                continue
            x -= self._font(12).getlength(series.name) / _FINE
            self._text((x, 20), series.name, _FAINT, 12, "lm")
            x -= 20
            self._line([(x, 20), (x + 14, 20)], colour, 2.5)
            x -= 14

    def _axes(self):
        for tick in self.ticks:
            self._line([(_LEFT, self._y(tick)), (WIDTH - _RIGHT, self._y(tick))], _GRID, 1)
            self._text((_LEFT - 8, self._y(tick)), _shown(tick, self.ticks[1] - self.ticks[0]), _FAINT, 12, "rm")
        for tick in nice_ticks(self.first, self.last, whole=True):
            if self.first <= tick <= self.last:
                self._text((self._x(tick), HEIGHT - _BOTTOM + 14), f"{tick:,.0f}", _FAINT, 12, "mm")
        self._text(((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 12), "step", _FAINT, 12, "mm")

    def _curve(self, series, colour):
        places = [(self._x(step), self._y(value)) for step, value in series.points]
        if len(places) > 1:
            self._line(places, colour, 2)
        if series.marked or len(places) == 1:
            for place in places if len(places) <= 60 else places[-1:]:
                self._dot(place, colour, 3)
        if series.marked and self.panel.best and len(places) > 1:
            choose = max if self.panel.best == "max" else min
            step, value = choose(series.points, key=lambda point: point[1])
            self._dot((self._x(step), self._y(value)), colour, 6.5)
            self._dot((self._x(step), self._y(value)), "white", 4.5)
            self._dot((self._x(step), self._y(value)), colour, 3)
            if (step, value) != series.points[-1]:
                x = min(max(self._x(step), _LEFT + 30), WIDTH - _RIGHT - 30)
                self._text((x, self._y(value) - 15), f"best {_shown(value)}", colour, 12, "mm")

    def _at_the_end(self, labels):
        """The last value of each curve, none over another."""
        below = math.inf
        for y, text, colour in sorted(labels, reverse=True):
            y = below = min(y, below - 15)
            self._text((WIDTH - _RIGHT + 10, y), text, colour, 13, "lm")

    def _x(self, step):
        return _LEFT + (step - self.first) / (self.last - self.first) * (WIDTH - _LEFT - _RIGHT)

    def _y(self, value):
        low, high = self.ticks[0], self.ticks[-1]
        share = min(1.0, (value - low) / (high - low))
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)

    def _line(self, places, colour, width):
        fine = [(x * _FINE, y * _FINE) for x, y in places]
        self.pen.line(fine, fill=colour, width=round(width * _FINE), joint="curve")

    def _dot(self, place, colour, radius):
        self.pen.circle((place[0] * _FINE, place[1] * _FINE), radius * _FINE, fill=colour)

    def _text(self, place, text, colour, size, anchor):
        fine = (place[0] * _FINE, place[1] * _FINE)
        self.pen.text(fine, text, fill=colour, font=self._font(size), anchor=anchor)

    def _font(self, size):
        return ImageFont.load_default(size * _FINE)


def _ceiling(panel: Panel) -> float:
    """The highest value that is shown: what a loss begins with may be far above all that follows."""
    values = [value for series in panel.series for _, value in series.points]
    if panel.best != "min":
        return max(values)
    usual = _SPIKE * statistics.median(values)
    return min(max(values), usual) if usual > min(values) else max(values)


def nice_ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Round numbers, four to eight of them, the first not above `low` and the last not below `high`."""
    if high <= low:
        low, high = (low - 0.5, low + 0.5) if low else (0.0, 1.0)
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * (1 - 1e-9))
    step = max(1.0, math.ceil(step)) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _shown(value: float, step: float | None = None) -> str:
    """A number as short as it can be read; with as many places as tell it from one that is `step` away."""
    if step is not None and 1e-4 < step <= abs(value) * (1 + 1e-9) < 1e5:
        places = len(f"{step:.6f}".rstrip("0").partition(".")[2])
        return f"{value:,.{places}f}"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")


__all__ = ["Panel", "Series", "draw_curves", "nice_ticks", "panels_of"]
