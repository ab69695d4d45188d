"""What a run left in its folder that a page can offer: questions it was tested on, and what it was trained to do.

What is special: pictures come from `samples.html`, which a run writes for people; it is read as they would, card by
card. Without it the questions of `predictions.jsonl` are offered, to which one brings a picture.
"""

import contextlib
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import metadata_load
from transformers.utils import cached_file


EXAMPLES = 6

_LARGEST = 150_000  # letters of a picture
_CARDS = "samples.html"
_PREDICTIONS = "predictions.jsonl"


def examples_of(folder: Path) -> list[dict[str, Any]]:
    """
    Questions that a run was tested on, each once: `question`, the right answer as `expected`, and the picture asked
    about as `image`, a data URL, where the folder has it; none where the folder has none.
    """
    cards = _Cards()
    with contextlib.suppress(OSError, ValueError):
        cards.feed((folder / _CARDS).read_text(encoding="utf-8"))
    # A caption has no question; so what is asked counts once, unless nothing is.
    seen = {card["question"] or card["image"]: card for card in cards.found if len(card["image"]) <= _LARGEST}
    found = list(seen.values())
    if not found:
        return _questions(folder / _PREDICTIONS)
    count = min(EXAMPLES, len(found))  # they are in the order of their scores: some of all
    return [found[number * (len(found) - 1) // max(1, count - 1)] for number in range(count)]


def _questions(file: Path) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError):
        with open(file, encoding="utf-8") as lines:
            for line, _ in zip(lines, range(1000)):
                row = json.loads(line)
                if row["question"]:
                    found.setdefault(row["question"], {"question": row["question"], "expected": row["expected"][0]})
                if len(found) == EXAMPLES:
                    break
    return list(found.values())


def is_captioner(model: str) -> bool:
    """Whether the card of a model, a folder or a name on the Hub, says that it was trained on captions alone."""
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        tags = (metadata_load(cached_file(model, "README.md") or "") or {}).get("tags")
        return isinstance(tags, list) and "stage-1" in tags
    return False


class _Cards(HTMLParser):
    """The cards of a page of samples that have a picture."""

    def __init__(self):
        super().__init__()
        self.found: list[dict[str, str]] = []
        self._card: dict[str, str] = {}
        self._field, self._values = "", 0  # of the card that is being read

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "article":
            self._card, self._values = {"question": "", "expected": "", "image": ""}, 0
        elif tag == "img" and given.get("src", "").startswith("data:image/"):
            self._card["image"] = given["src"]
        elif given.get("class") == "asked":
            self._field = "question"
        elif tag == "dd":
            self._field, self._values = "" if self._values else "expected", self._values + 1
        elif tag in ("span", "small"):  # that there is none, and answers of the same worth
            self._field = ""

    def handle_endtag(self, tag: str) -> None:
        if tag in ("p", "dd"):
            self._field = ""
        elif tag == "article" and self._card.get("image"):
            self.found.append(self._card)

    def handle_data(self, data: str) -> None:
        if self._field:
            self._card[self._field] = self._card.get(self._field, "") + data.rstrip()


__all__ = ["EXAMPLES", "examples_of", "is_captioner"]
