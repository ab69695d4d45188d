"""Generated tokens as a person can read them, one by one.

What is special: a character whose bytes several tokens hold is shown for each of them, with its part; what cannot be
seen has a sign or its code; and Arabic letters of one word are joined across tokens as they are in the word.
"""

import re
import unicodedata
from typing import Any, NamedTuple


_LONGEST = 16  # tokens that are waited for until their bytes are a character
_HALF = "\ufffd"  # what half a character is decoded as
_SIGNS = {" ": "\u2423", "\n": "\u23ce", "\t": "\u21e5"}
_JOINER = "\u200d"
_ARABIC = re.compile("[\u0620-\u065f\u066e-\u06d3\u06fa-\u06ff\u0750-\u077f]")


class Piece(NamedTuple):
    """
    A token.

    `text` is what it adds to the text, empty but for the first where several tokens are one character; `label` is what
    is shown for it, `part` which part of a character it is ("2/4"), `control` whether it is no text.
    """

    id: int
    text: str
    label: str
    part: str = ""
    control: bool = False


def pieces_of(tokenizer: Any, ids: list[int], ends: list[int]) -> list[Piece]:
    """
    Tokens of an answer, in their order.

    Args:
        ends: ids that end an answer.
    """
    pieces: list[Piece] = []
    controls, start = {*tokenizer.all_special_ids, *ends}, 0
    for end in range(1, len(ids) + 1):
        if ids[end - 1] in controls:
            pieces += _of_text(tokenizer, ids[:start], ids[start : end - 1])
            token = tokenizer.convert_ids_to_tokens(ids[end - 1])
            pieces.append(Piece(ids[end - 1], "", "end" if ids[end - 1] in ends else token, control=True))
            start = end
            continue
        text = _added(tokenizer, ids[:start], ids[start:end])
        if not text.endswith(_HALF) or end - start == _LONGEST or end == len(ids):
            pieces += _of_text(tokenizer, ids[:start], ids[start:end])
            start = end
    return _joined(pieces)


def _of_text(tokenizer, before, ids):
    """The tokens of whole characters; those before a control token may hold half of one."""
    if not ids:
        return []
    text = _added(tokenizer, before, ids)
    if len(ids) == 1:
        return [Piece(ids[0], text, _label(text))]
    parts = [Piece(id, "", _label(text), f"{number}/{len(ids)}") for number, id in enumerate(ids, start=1)]
    return [parts[0]._replace(text=text), *parts[1:]]


def _added(tokenizer, before, ids):
    """The text of ids behind others: decoded alone, many tokenizers leave out the blank at their beginning."""

    def decoded(ids):
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    left, both = decoded(before), decoded([*before, *ids])
    return both[len(left) :] if both.startswith(left) else decoded(ids)


def _label(text):
    """A text with signs for what cannot be seen."""
    if not text:
        return "\u2205"
    if not text.strip(" \t\n"):
        return "".join(map(_SIGNS.__getitem__, text))
    blank = "\u2423" if text.endswith(" ") else ""
    shown = "".join(_SIGNS.get(c, c) if c in "\n\t" else c if _is_seen(c, text) else f"U+{ord(c):04X}" for c in text)
    shown = shown.removesuffix(" " if blank else "") + blank
    return f"\u25cc{shown}" if unicodedata.combining(shown[0]) else shown


def _is_seen(character, text):
    """Whether something is to be seen of a character; one that joins its neighbours is, where it has both."""
    if character == " " or character.isprintable():
        return len(text) > 1 or unicodedata.category(character) not in ("Mn", "Me") or unicodedata.combining(character)
    return character == _JOINER and len(text) > 2


def _joined(pieces):
    """With a joiner where a word of Arabic letters goes on in the next token, so that they look as in the word."""
    labels = [piece.label for piece in pieces]
    for number, (piece, following) in enumerate(zip(pieces, pieces[1:])):
        if piece.text and following.text and _ARABIC.match(piece.text[-1]) and _ARABIC.match(following.text[0]):
            labels[number] += _JOINER
            labels[number + 1] = _JOINER + labels[number + 1]
    return [piece._replace(label=label) for piece, label in zip(pieces, labels)]


__all__ = ["Piece", "pieces_of"]
