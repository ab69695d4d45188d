"""How good answers are: questions and answers in, numbers by subset and kind out."""

from collections.abc import Sequence

from .questions import Question


KINDS_SHOWN = 40

Shares = dict[str, dict[str, float]]
"""Subset -> kind -> share."""


def exact_match(questions: Sequence[Question], answers: Sequence[str]) -> Shares:
    """The share of answers that are exactly a right one: subset -> kind -> share."""
    right: dict[str, dict[str, list[bool]]] = {}
    for question, answer in zip(questions, answers):
        of_kind = right.setdefault(question.subset, {}).setdefault(question.kind, [])
        of_kind.append(question.is_right(answer))
    return {
        subset: {kind: sum(hits) / len(hits) for kind, hits in sorted(kinds.items())} for subset, kinds in right.items()
    }


def mean_of(shares: dict[str, float]) -> float:
    """The mean over kinds, each counting the same."""
    return sum(shares.values()) / len(shares)


def by_name(shares: Shares) -> dict[str, float]:
    """The shares, and the mean of each subset, as `subset/kind`."""
    named = {f"{subset}/{kind}": share for subset, kinds in shares.items() for kind, share in kinds.items()}
    return {**named, **{f"{subset}/mean": mean_of(kinds) for subset, kinds in shares.items()}}


def format_exact_match(shares: Shares) -> str:
    """The shares as a table: a line a kind, a column a subset; of very many kinds the first."""
    kinds = sorted(set().union(*shares.values()))
    labels = {kind: _label(kind) for kind in kinds[:KINDS_SHOWN]}
    width = max(4, *map(len, labels.values()))
    columns = {subset: max(14, len(_label(subset)) + 1) for subset in shares}
    lines = [" ".join([" " * width, *(f"{_label(subset):>{columns[subset]}}" for subset in shares)])]
    for kind, label in labels.items():
        cells = [
            f"{of_kind[kind]:>{columns[subset] - 1}.1%} " if kind in of_kind else " " * columns[subset]
            for subset, of_kind in shares.items()
        ]
        lines.append(" ".join([f"{label:<{width}}", *cells]))
    if len(kinds) > KINDS_SHOWN:
        lines.append(f"and {len(kinds) - KINDS_SHOWN:,} kinds more")
    means = [f"{mean_of(of_kind):>{columns[subset] - 1}.1%} " for subset, of_kind in shares.items()]
    return "\n".join([*lines, " ".join([f"{'mean':<{width}}", *means])])


# A fence of a card would end at a backtick, and what looks like a tag is none even for a reader that knows no fences.
_LOOK_ALIKE = str.maketrans({"`": "'", "<": "\u2039", ">": "\u203a"})


def _label(name: str) -> str:
    """What a data set calls a kind, as it can stand in a line of a terminal or a card."""
    line = " ".join("".join(c if c.isprintable() else " " for c in name).translate(_LOOK_ALIKE).split())
    return line if len(line) <= 40 else f"{line[:37]}..."


__all__ = ["Shares", "by_name", "exact_match", "format_exact_match", "mean_of"]
