"""Text of any script in a picture: each character in a font of this machine that has it.

Pillow's own font knows English only, and draws a box for whatever a font lacks. So fonts are looked for where systems
keep them, the first that has a character is used for it, and what none has is told, for the text to be shown otherwise.
"""

import functools
import os
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import cast

from PIL import ImageDraw, ImageFont


# Tried first: upright fonts without serifs, of many letters before those of one script.
_PREFERRED = ("DejaVuSans", "NotoSans-Regular", "Arial Unicode", "arial", "Helvetica", "segoeui", "NotoSansCJK")
_NOT_UPRIGHT = ("bold", "italic", "oblique", "light", "thin", "black", "condensed", "emoji", "mono", "serif-")
_MOST_FONTS = 400


def _folders() -> list[Path]:
    home = Path.home()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA", "")
        return [Path(os.environ.get("WINDIR", "C:/Windows"), "Fonts"), Path(local, "Microsoft/Windows/Fonts")]
    if sys.platform == "darwin":
        return [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"]
    shared = os.environ.get("XDG_DATA_DIRS", "/usr/local/share:/usr/share").split(":")
    return [home / ".local/share/fonts", home / ".fonts", *(Path(folder, "fonts") for folder in shared if folder)]


@functools.cache
def system_fonts() -> list[Path]:
    """Font files of this machine, those that are likeliest to fit a plain text first."""
    files = {
        file
        for folder in _folders()
        if folder.is_dir()
        for file in folder.rglob("*")
        if file.suffix.lower() in (".ttf", ".otf", ".ttc")
    }

    def order(file: Path):
        name = file.stem.lower()
        first = [number for number, wanted in enumerate(_PREFERRED) if name.startswith(wanted.lower())]
        upright = not any(word in name for word in _NOT_UPRIGHT)
        return (not upright, min(first, default=len(_PREFERRED)), len(name), str(file))

    return sorted(files, key=order)[:_MOST_FONTS]


class Fonts:
    """
    The fonts that a picture's texts are drawn in, all of one size.

    Args:
        size: pixels of a letter.

    Attributes:
        missing (`set[str]`): characters that were asked for and no font has.
    """

    def __init__(self, size: int = 13):
        self.size = size
        self.missing: set[str] = set()
        # With a size it is always of this class.
        self._fonts = [cast(ImageFont.FreeTypeFont, ImageFont.load_default(size=size))]
        self._untried = iter(system_fonts())
        self._font_of: dict[str, ImageFont.FreeTypeFont] = {}

    def width(self, text: str) -> float:
        """Pixels that a text is wide."""
        return sum(font.getlength(run) for run, font in self._runs(text))

    def draw(self, pen: ImageDraw.ImageDraw, place: tuple[float, float], text: str, fill: str) -> None:
        """Draw a line of text, its upper left corner at `place`."""
        x, y = place
        for run, font in self._runs(text):
            pen.text((x, y + self.size), run, fill=fill, font=font, anchor="ls")
            x += font.getlength(run)

    def wrap(self, text: str, width: float) -> list[str]:
        """A text in lines of at most `width` pixels, broken at blanks where there are any and between letters else."""
        lines = []
        for paragraph in text.split("\n"):
            line = ""
            for word in _words(paragraph):
                if line and self.width(line + word.rstrip()) > width:
                    lines.append(line.rstrip())
                    line = ""
                while self.width(word.rstrip()) > width:
                    count = next(n for n in range(len(word), 0, -1) if n == 1 or self.width(word[:n]) <= width)
                    lines.append(word[:count])
                    word = word[count:]
                line += word
            lines.append(line.rstrip())
        return [line for line in lines if line] or [""]

    def _runs(self, text: str) -> Iterable[tuple[str, ImageFont.FreeTypeFont]]:
        """The text in runs of one font each."""
        start, current = 0, self._fonts[0]
        for index, character in enumerate(text):
            # A blank, an accent, a joiner: what has no place of its own goes on in the font of those before it.
            alone = not character.isspace() and unicodedata.category(character) not in ("Mn", "Mc", "Me", "Cf")
            font = self._font(character) if alone else current
            if font is not current:
                if index > start:
                    yield text[start:index], current
                start, current = index, font
        if text[start:]:
            yield text[start:], current

    def _font(self, character: str) -> ImageFont.FreeTypeFont:
        if character not in self._font_of:
            found = next((font for font in self._all() if _has(font, character)), None)
            if found is None:
                self.missing.add(character)
            self._font_of[character] = found or self._fonts[0]
        return self._font_of[character]

    def _all(self) -> Iterable[ImageFont.FreeTypeFont]:
        yield from list(self._fonts)
        for file in self._untried:
            try:
                font = ImageFont.truetype(file, self.size)
            except OSError:  # it holds bitmaps in other sizes, or is broken
                continue
            self._fonts.append(font)
            yield font


def _words(text: str) -> list[str]:
    """Pieces that a line may be broken behind: words with their blanks, and each letter of scripts without blanks."""
    words, word = [], ""
    for character in text:
        word += character
        if character.isspace() or ord(character) >= 0x2E80:
            words.append(word)
            word = ""
    return [*words, word] if word else words


def _has(font: ImageFont.FreeTypeFont, character: str) -> bool:
    """Whether a font draws a character as anything else than what it draws for one that no font has."""
    drawn, box = font.getmask(character), font.getmask("\U0010fffe")
    return drawn.size != box.size or bytes(drawn) != bytes(box)


__all__ = ["Fonts", "system_fonts"]
