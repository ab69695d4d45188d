"""Questions, cut out of encoded conversations where a supervised answer begins.

So the model is asked with the very ids that it was trained to go on from, in both stages.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from inference_vlm.answering import Prompt, text_of
from processing.batching.encoding import IGNORE, Encoded
from processing.processing_vlm import VLMProcessor


class Question(NamedTuple):
    """What is asked, every answer that is right (the learned one first), and what it is counted under."""

    prompt: Prompt
    answers: tuple[str, ...]
    kind: str
    subset: str

    @property
    def expected(self) -> str:
        """The answer that a training would learn."""
        return self.answers[0]

    def is_right(self, answer: str) -> bool:
        """Whether an answer is exactly one of the right ones."""
        return answer in self.answers


def find_questions(items: Iterable[Encoded | dict[str, Any]], processor: VLMProcessor) -> list[Question]:
    """
    Every supervised answer of encoded conversations as a question.

    What a row says of itself goes with its questions: `kind` and `subset`, under which answers are counted (`"all"`
    where it says neither), and `answers`, all that are right, where it asks one question only.
    """
    questions = []
    for item in items:
        ids, labels = item["input_ids"], item["labels"]
        starts = [i for i in range(1, len(ids)) if labels[i] != IGNORE and labels[i - 1] == IGNORE]
        for start in starts:
            end = next((i for i in range(start, len(ids)) if labels[i] == IGNORE), len(ids))
            images = item["images"][: ids[:start].count(processor.image_token_id)]
            right = [text_of(processor, ids[start:end])]
            if len(starts) == 1:
                right += [answer.strip() for answer in item.get("answers") or ()]
            counted = (item.get("kind") or "all", item.get("subset") or "all")
            questions.append(Question(Prompt(ids[:start], images), tuple(dict.fromkeys(right)), *counted))
    return questions


__all__ = ["Question", "find_questions"]
