"""A metric of one's own: which share of the words of an answer and of its reference are the same (SQuAD's F1).

    python -m evaluation_vlm outputs/shapes/sft --dataset shapes --dataset_name dialogues --split test \\
        --metrics examples/own_metric.py:word_f1,exact_match
    python train_sft.py --config shapes --predict_with_generate --metrics examples/own_metric.py:word_f1

A function is given all predictions and returns a score for each, or one number; what a prediction holds is in
docs/evaluation.md. Exact match calls "a small red circle" for "a red circle" wrong; this calls it nearly right.
"""

from collections import Counter


def word_f1(predictions) -> list[float]:
    """Each answer against the reference that it is nearest to, from 0 to 1."""
    return [max(_f1(one.answer, right) for right in one.question.references) for one in predictions]


def _f1(answer: str, right: str) -> float:
    said, wanted = Counter(answer.lower().split()), Counter(right.lower().split())
    shared = (said & wanted).total()
    return 2 * shared / (said.total() + wanted.total()) if shared else float(said == wanted)
