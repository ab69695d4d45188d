"""Short answers, compared with those that people gave."""

import math
import re
from collections.abc import Sequence

from ..predictions import Prediction, Scores, mean_scores


ANLS_THRESHOLD = 0.5


def exact_match(predictions: Sequence[Prediction]) -> Scores:
    """The share of answers that are, letter for letter, a right one."""
    return mean_scores([float(question.is_right(answer)) for question, answer, _ in predictions])


def vqa_accuracy(predictions: Sequence[Prediction]) -> Scores:
    """
    VQA accuracy (https://arxiv.org/abs/1505.00468): an answer that three people or more gave is right.

    Of fewer than three it is a third each; and each person's answer is left out once, so that people are judged by the
    others just as a model is. As in VQAv2's script (`vqaEval.py` of https://github.com/GT-Vision-Lab/VQA, commit
    a013f00), answers are made alike before, those of people too (see `normalised`); but where all people say the same,
    which may be a text in the image, an answer has to be just that, letter for letter.
    """
    return mean_scores([_vqa_accuracy(answer, question.references) for question, answer, _ in predictions])


def _vqa_accuracy(answer: str, given: Sequence[str]) -> float:
    said, *people = (_in_one_line(text) for text in (answer, *given))
    if len(set(people)) > 1:
        said, *people = map(normalised, (said, *people))
    agree = people.count(said)
    # Of those who agree each is left out once, of the others too, which takes none away.
    return (agree * min(1, (agree - 1) / 3) + (len(people) - agree) * min(1, agree / 3)) / len(people)


_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_OF_A_NUMBER = re.compile(r"\d,\d")
_PERIOD_OF_NO_NUMBER = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # the script gives `re.UNICODE` where a number of them is meant

# Written without one of their apostrophes they are taken for these words.
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's "
    "there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't "
    "what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll "
    "why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
).split()
_WITH_APOSTROPHE = {
    word[: match.start()] + word[match.end() :]: word for word in _CONTRACTIONS for match in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}


def normalised(answer: str) -> str:
    """
    An answer as VQAv2's evaluation compares it (https://visualqa.org/evaluation.html).

    In lower case, without punctuation but apostrophes, colons and what stands in numbers, without articles, numbers up
    to ten as digits, and contractions with their apostrophes. A sign is left out where it stands beside a blank or a
    number has a comma, and is a blank elsewhere.
    """
    text = _in_one_line(answer)
    in_number, cleaned = _COMMA_OF_A_NUMBER.search(text) is not None, text
    for sign in _PUNCTUATION:
        beside_blank = f"{sign} " in text or f" {sign}" in text
        cleaned = cleaned.replace(sign, "" if beside_blank or in_number else " ")
    words = [_NUMBERS.get(word, word) for word in _PERIOD_OF_NO_NUMBER.sub("", cleaned, _MOST_PERIODS).lower().split()]
    return " ".join(_WITH_APOSTROPHE.get(word, word) for word in words if word not in _ARTICLES)


def _in_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def anls(predictions: Sequence[Prediction]) -> Scores:
    """
    Average normalised Levenshtein similarity (https://arxiv.org/abs/1905.13648), from 0 to 1.

    One less the edits that lead from an answer to the nearest right one, as a share of the longer of the two; 0 where
    that share is half or more. Case and the number of blanks do not count.
    """
    each = [max(_similarity(answer, right) for right in question.references) for question, answer, _ in predictions]
    return mean_scores(each)


def _similarity(answer: str, right: str) -> float:
    said, wanted = (" ".join(text.lower().split()) for text in (answer, right))
    longer = max(len(said), len(wanted))
    share = _edits(said, wanted) / longer if longer else 0.0
    return 1 - share if share < ANLS_THRESHOLD else 0.0


def _edits(a: str, b: str) -> int:
    """Levenshtein's distance: how many letters are put in, left out or replaced."""
    before = list(range(len(b) + 1))
    for row, letter in enumerate(a, 1):
        current = [row]
        for column, other in enumerate(b, 1):
            current.append(min(before[column] + 1, current[-1] + 1, before[column - 1] + (letter != other)))
        before = current
    return before[-1]


def multiple_choice(predictions: Sequence[Prediction]) -> Scores:
    """
    The share of questions whose right choice is the one that the model finds likeliest (see `weighing`).

    Where no choice has room beside its question, none is right.
    """
    each = []
    for question, _, likelihoods in predictions:
        is_right = False
        if likelihoods and math.isfinite(likeliest := max(likelihoods)):
            is_right = question.is_right(question.choices[likelihoods.index(likeliest)])
        each.append(float(is_right))
    return mean_scores(each)


__all__ = ["anls", "exact_match", "multiple_choice", "normalised", "vqa_accuracy"]
