"""Which of many judged answers a person is shown, and in which words.

What is special: the lowest are all there as far as there is room, and the others evenly, so that a page of a few tells
of thousands. A question is shown as a person would ask it, without the words that its chat template puts around.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

from PIL import Image

from inference_vlm.answering import text_of
from processing.image_files_vlm import BadImage, load_image
from processing.processing_vlm import VLMProcessor

from .gallery import Shown
from .judgement import Judgement
from .questions import Question


SHOWN, SIDE = 100, 400
_MARK = "qxzv"  # no text has it

One = TypeVar("One")


class Wording:
    """What a question asks, without the chat template around it and the turns before it."""

    def __init__(self, processor: VLMProcessor):
        self.processor = processor
        self.before, self.after = "", ""
        for mark in (_MARK, *_long_words(processor.tokenizer)):  # a small vocabulary may not spell the first
            message = {"role": "user", "content": [{"type": "text", "text": mark}]}
            try:
                text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
            except Exception:  # a template of any kind, which may want anything
                return
            ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            shown = processor.tokenizer.decode(ids, skip_special_tokens=True)
            if shown.count(mark) == 1:
                before, _, after = shown.partition(mark)
                self.before, self.after = before.lstrip(), after.rstrip()
                return

    def __call__(self, question: Question) -> str:
        """The question in words; empty where the image alone is asked about."""
        image = self.processor.image_token_id
        text = text_of(self.processor, [id for id in question.prompt.ids if id != image])
        if self.after and text.endswith(self.after):
            text = text.removesuffix(self.after)
            if self.before:
                text = text.rpartition(self.before)[2]
        return text.strip()


def _long_words(tokenizer: Any, most: int = 5) -> list[str]:
    words = {token.lstrip("\u2581\u0120") for token in tokenizer.get_vocab()}
    return sorted(filter(str.isalpha, words), key=lambda word: (-len(word), word))[:most]


def chosen(judgement: Judgement, most: int = SHOWN) -> list[int]:
    """
    Numbers of the predictions to show, the lowest scores first, what has none last.

    Half of them are the lowest of all, where there are more than `most`; the rest lies evenly among the others.
    """
    scores = [judgement.score_of(number) for number in range(len(judgement.predictions))]
    order = sorted(range(len(scores)), key=lambda number: (scores[number] is None, scores[number] or 0.0))
    lowest = most // 2 if len(order) > most else len(order)
    return [*order[:lowest], *evenly(order[lowest:], most - lowest)]


def evenly(numbers: Sequence[One], most: int) -> list[One]:
    """So many of some, evenly from the first to the last."""
    if len(numbers) <= most:
        return list(numbers)
    return [numbers[place * (len(numbers) - 1) // max(1, most - 1)] for place in range(most)]


def shown_of(judgement: Judgement, numbers: Sequence[int], wording: Wording) -> list[Shown]:
    """Predictions as they are shown, each picture no larger than needed."""
    marks = _marks(judgement)
    found = []
    for number in numbers:
        question, said, _ = judgement.predictions[number]
        score, metric = judgement.score_of(number), _metric_of(judgement, number)
        written = "" if score is None else f"{metric.name.replace('_', ' ')} {score:{metric.shown}}"
        kind = " / ".join(name for name in (question.subset, question.kind) if name != "all") or "all"
        look = Shown(picture_of(question), wording(question), question.references, said)
        found.append(look._replace(score=score, written=written, mark=marks(number), kind=kind))
    return found


def picture_of(question: Question) -> Image.Image | None:
    """The last image of a question, small; `None` where it has none, or it is no longer there."""
    if not question.prompt.images:
        return None
    try:
        image = load_image(question.prompt.images[-1], size=(SIDE, SIDE))
    except BadImage:
        return None
    image.thumbnail((SIDE, SIDE))
    return image


def _metric_of(judgement: Judgement, number: int) -> Any:
    """The metric that `Judgement.score_of` asks of a prediction."""
    for metric in judgement.metrics:
        each = judgement.scores[metric.name].each
        if each is not None and each[number] is not None:
            return metric
    return None


def _marks(judgement: Judgement):
    """A function of a prediction's number: how good its score is, on its metric's scale or among the others."""
    thirds = {}
    for metric in judgement.metrics:
        each = judgement.scores[metric.name].each
        found = sorted(score for score in each or () if score is not None)
        if metric.shown.endswith("%"):
            thirds[metric.name] = (1 / 3, 2 / 3)
        elif found:
            thirds[metric.name] = (found[len(found) // 3], found[2 * len(found) // 3])

    def mark(number):
        metric, score = _metric_of(judgement, number), judgement.score_of(number)
        if metric is None:
            return "mid"
        low, high = thirds[metric.name]
        return "good" if score > high else "bad" if score < low else "mid"

    return mark


__all__ = ["SHOWN", "Wording", "chosen", "evenly", "picture_of", "shown_of"]
