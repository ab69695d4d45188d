"""Questions, cut out of encoded conversations where a supervised answer begins.

So the model is asked with the very ids that it was trained to go on from, in both stages. What is special: a row with
several captions is one question with as many right answers, so that its image is asked about once.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

from inference_vlm.answering import Prompt, text_of
from processing.batching.encoding import IGNORE, Encoded
from processing.processing_vlm import VLMProcessor


class Question(NamedTuple):
    """
    What is asked, what is right, and what it is counted under.

    Args:
        prompt: the ids to go on from, and the images.
        answers: every answer that is right, each once; the learned one first.
        kind, subset: what it is counted under.
        given: the answers as the row has them, each as often as it was given (VQAv2's ten); none where a row has one.
        choices: the options of a multiple choice, as one of them would be answered.
        captions: how many captions of a row are its answers; 0 where it was asked for something else.
        source, row, id: where it comes from.
    """

    prompt: Prompt
    answers: tuple[str, ...]
    kind: str
    subset: str
    given: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    captions: int = 0
    source: str = ""
    row: int | str | None = None
    id: str = ""

    @property
    def expected(self) -> str:
        """The answer that a training would learn."""
        return self.answers[0]

    @property
    def references(self) -> tuple[str, ...]:
        """The answers to compare with, as often as they were given."""
        return self.given or self.answers

    def is_right(self, answer: str) -> bool:
        """Whether an answer is exactly one of the right ones."""
        return answer in self.answers


def find_questions(items: Iterable[Encoded | dict[str, Any]], processor: VLMProcessor) -> list[Question]:
    """
    Every supervised answer of encoded conversations as a question.

    What a row says of itself goes with its questions: `kind` and `subset`, under which answers are counted (`"all"`
    where it says neither), and `answers` and `choices` where it asks one question only. Conversations of one row that
    follow each other and ask the same are one question, with the answers of all: an image and its captions.
    """
    questions: list[Question] = []
    for item in items:
        ids, labels = item["input_ids"], item["labels"]
        starts = [i for i in range(1, len(ids)) if labels[i] != IGNORE and labels[i - 1] == IGNORE]
        counted = (item.get("kind") or "all", item.get("subset") or "all")
        known: dict[str, Any] = {"source": item.get("source") or "", "row": item.get("row"), "id": item.get("id") or ""}
        for start in starts:
            end = next((i for i in range(start, len(ids)) if labels[i] == IGNORE), len(ids))
            images = item["images"][: ids[:start].count(processor.image_token_id)]
            right, given = [text_of(processor, ids[start:end])], []
            if len(starts) == 1:
                given = [answer.strip() for answer in item.get("answers") or ()]
                known["choices"] = tuple(cast(dict[str, Any], item).get("choices") or ())
            answers = tuple(dict.fromkeys([*right, *given]))
            question = Question(Prompt(ids[:start], images), answers, *counted, given=tuple(given), **known)
            if questions and len(starts) == 1 and not given and _asks_the_same(questions[-1], question):
                question = _with_caption(questions.pop(), question)
            questions.append(question)
    return questions


def _asks_the_same(before: Question, question: Question) -> bool:
    """Whether two questions are captions of one row."""
    if question.row is None or (before.source, before.row) != (question.source, question.row):
        return False
    return before.prompt.ids == question.prompt.ids and before.prompt.images == question.prompt.images


def _with_caption(before: Question, question: Question) -> Question:
    given = (*before.references, *question.answers)
    return before._replace(answers=tuple(dict.fromkeys(given)), given=given, captions=len(given))


__all__ = ["Question", "find_questions"]
