"""COCO's metrics of captions, computed by pycocoevalcap, and BLEU as sacrebleu computes it.

What is special: BLEU is no mean over captions, so what each caption adds to its counts is kept, from which the value of
any part of the captions follows. CIDEr weighs words by how many of all the images they are said of, and a part of the
captions keeps the weights of the whole.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from ..predictions import Prediction, Scores, mean_scores
from .words import split_words


NO_WORDS = "no right answer has a word"


def bleu4(predictions: Sequence[Prediction]) -> Scores:
    """BLEU-4 of COCO (https://arxiv.org/abs/1504.00325), from 0 to 1, with the length of the closest reference."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    said, right, note = _as_words(predictions)
    scorer = BleuScorer(n=4)
    for hypothesis, references in zip(said, right):
        scorer += (hypothesis, references)
    values, each = scorer.compute_score(option="closest", verbose=0)
    correct, guessed = (np.array([of[name] for of in scorer.ctest], dtype=float) for name in ("correct", "guess"))
    lengths = np.array([of["testlen"] for of in scorer.ctest], dtype=float)
    closest = [min((abs(length - of["testlen"]), length) for length in of["reflen"])[1] for of in scorer.ctest]
    wanted = np.array(closest, dtype=float)

    def of(numbers: Sequence[int]) -> float:
        rows = np.asarray(numbers)
        shares = (correct[rows].sum(0) + 1e-15) / (guessed[rows].sum(0) + 1e-9)
        ratio = (lengths[rows].sum() + 1e-15) / (wanted[rows].sum() + 1e-9)
        return float(np.prod(shares) ** 0.25 * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0))

    return Scores(float(values[3]), [float(score) for score in each[3]], of, note)


def cider(predictions: Sequence[Prediction]) -> Scores:
    """CIDEr-D of COCO (https://arxiv.org/abs/1411.5726), from 0 to 10; 0 of one image, and without words."""
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    said, right, note = _as_words(predictions)
    if not any(text for of_one in right for text in of_one):  # which the scorer cannot weigh words by
        return mean_scores([0.0] * len(said), f"{note}; {NO_WORDS}" if note else NO_WORDS)
    scorer = CiderScorer(n=4, sigma=6.0)
    for hypothesis, references in zip(said, right):
        scorer += (hypothesis, references)
    value, each = scorer.compute_score()
    return Scores(float(value), [float(score) for score in each], note=note)


def rouge_l(predictions: Sequence[Prediction]) -> Scores:
    """ROUGE-L as COCO counts it, from 0 to 1: the best recall and the best precision of all references."""
    from pycocoevalcap.rouge.rouge import Rouge

    said, right, note = _as_words(predictions)
    scorer = Rouge()
    each = [float(scorer.calc_score([hypothesis], references)) for hypothesis, references in zip(said, right)]
    return Scores(sum(each) / len(each), list(each), note=note)


def bleu(predictions: Sequence[Prediction]) -> Scores:
    """BLEU as sacrebleu computes it (https://arxiv.org/abs/1804.08771), from 0 to 100; its signature is the note."""
    from sacrebleu.metrics.bleu import BLEU

    scorer = BLEU()
    found = [
        scorer.corpus_score([answer], [[text] for text in question.references]) for question, answer, _ in predictions
    ]
    counts = np.array([[*of.counts, *of.totals, of.sys_len, of.ref_len] for of in found])

    def of(numbers: Sequence[int], effective_order: bool = False) -> float:
        *all_counts, said, wanted = counts[np.asarray(numbers)].sum(0).tolist()
        order = len(all_counts) // 2
        return BLEU.compute_bleu(
            all_counts[:order], all_counts[order:], said, wanted, "exp", effective_order=effective_order
        ).score

    streams = list(itertools.zip_longest(*(question.references for question, _, _ in predictions)))  # null: no more
    whole = scorer.corpus_score([answer for _, answer, _ in predictions], streams)
    each = [of([number], effective_order=True) for number in range(len(found))]
    return Scores(whole.score, list(each), of, str(scorer.get_signature()))


def _as_words(predictions: Sequence[Prediction]) -> tuple[list[str], list[list[str]], str]:
    """Answers and references as words, and how they were split where that was not as published."""
    references = [question.references for question, _, _ in predictions]
    texts = [answer for _, answer, _ in predictions] + [text for of_one in references for text in of_one]
    words, note = split_words(tuple(texts))
    rest = iter(words[len(predictions) :])
    return words[: len(predictions)], [[next(rest) for _ in of_one] for of_one in references], note


__all__ = ["bleu", "bleu4", "cider", "rouge_l"]
