"""A tokenizer that can tell control tokens from text: what a user types is text, whatever it spells.

The file travels with every checkpoint.
"""

import itertools
import json
import re

from tokenizers import Tokenizer

from .data_error_vlm import DuetError


MARK = "\ue000{}\ue001"
"""The mark of a text, and of a token, by its number: characters of a private use area, which nobody types."""

_MARGIN = 64  # ids

_KNOWN_LENGTH, _MOST_KNOWN = 2_000, 4_096
"""Characters of a text whose ids are kept, and how many such texts."""


class TextEncoder:
    """
    A tokenizer that can tell control tokens from text.

    `encode` turns a string into ids without ever giving a control token, whatever the string says; `split` finds the
    control tokens of a template's own text. Control tokens are the special tokens and the added tokens that are not
    plain words or blanks (those are vocabulary).

    Raises:
        `DuetError`: the tokenizer has no backend of the `tokenizers` library.
    """

    def __init__(self, tokenizer):
        if not tokenizer.is_fast:
            raise DuetError(
                f"{type(tokenizer).__name__} is a slow tokenizer; Duet needs one with a `tokenizers` backend "
                "(a folder with tokenizer.json)."
            )
        special = set(tokenizer.all_special_ids)
        added = tokenizer.added_tokens_decoder
        control = {
            id: token
            for id, token in added.items()
            if token.special or id in special or not re.fullmatch(r"[\w\s]+", token.content)
        }
        self.control_ids = {token.content: id for id, token in control.items()}
        # The longest token wins, and takes the blanks that its flags say, as in the tokenizers library.
        patterns = [
            (r"\s*" if token.lstrip else "") + f"(?:{re.escape(token.content)})" + (r"\s*" if token.rstrip else "")
            for token in sorted(control.values(), key=lambda token: -len(token.content))
        ]
        self._control = re.compile("(" + "|".join(patterns) + ")") if patterns else None
        # Text may still come out as the unknown token; where that is eos as well (GPT-2), it never does.
        unknown = tokenizer.unk_token_id
        ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        self._forbidden = set(control) - ({unknown} - ends)

        # What a template writes comes again and again, and a dialogue that is read up to each of its answers.
        self._known: dict[tuple[str | None, str], list[int]] = {}

        # What the tokenizer puts before every text (bos, where it adds one).
        with_special, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
        self.prefix_ids = list(with_special[: len(with_special) - len(plain)])

        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # A control token that is no word of the vocabulary keeps its place, so that those behind it keep their ids.
        words = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
        state["added_tokens"] = [
            {**token, "content": MARK.format(token["id"])} if token["id"] in control else token
            for token in state["added_tokens"]
            if token["id"] not in control or token["content"] not in words
        ]
        state["truncation"] = state["padding"] = None
        self._first = Tokenizer.from_str(json.dumps(state))
        changed, only_first = _without_prefix_space(state)
        self._inner = Tokenizer.from_str(json.dumps(state)) if changed else self._first
        self._after_control = self._inner if only_first else self._first

    def split(self, text: str) -> list[tuple[int | None, str]]:
        """A template's text as `(control id, its string)` and `(None, plain text)`, in order."""
        if self._control is None:
            return [(None, text)] if text else []
        pieces = self._control.split(text)
        return [
            (self.control_ids[piece.strip() if piece not in self.control_ids else piece], piece)
            if index % 2
            else (None, piece)
            for index, piece in enumerate(pieces)
            if piece
        ]

    def encode(self, text: str, after: str | None = None, at_most: int | None = None) -> list[int]:
        """
        The ids of plain text.

        Args:
            text (`str`): read as text, also where it spells a control token.
            after (`str`, *optional*): what stands before it: nothing (`None`), `"control"` or `"text"`. A tokenizer
                that puts a blank before words does so at a beginning only, never inside a text.
            at_most (`int`, *optional*): so many ids are wanted; what is much longer than them is not read to its end.
        """
        if at_most is not None:
            size = 8 * (at_most + _MARGIN)
            while size < len(text):
                # Cut before a blank, where pieces end; the last few ids are left out, which could see the cut.
                cut = max(text.rfind(blank, size // 2, size) for blank in " \n")
                ids = self.encode(text[: cut if cut > 0 else size], after)
                if len(ids) >= at_most + _MARGIN:
                    return ids[:at_most]
                size *= 4
        if not text:
            return []
        if len(text) > _KNOWN_LENGTH:
            return self._encode(text, after)
        if (after, text) not in self._known:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[after, text] = self._encode(text, after)
        return list(self._known[after, text])

    def _encode(self, text, after):
        backend = {None: self._first, "control": self._after_control, "text": self._inner}[after]
        encoding = backend.encode(text, add_special_tokens=False)
        ids = encoding.ids
        if self._forbidden.isdisjoint(ids):
            return ids
        # The model's own vocabulary spells control tokens: break each in two and read what is between as text.
        spans = [span for id, span in zip(ids, encoding.offsets) if id in self._forbidden]
        middles = [(start + end + 1) // 2 for start, end in spans]
        middles = [middle for middle in dict.fromkeys(middles) if 0 < middle < len(text)]
        if not middles:
            return [id for id in ids if id not in self._forbidden]
        ids = self.encode(text[: middles[0]], after)
        for start, end in itertools.pairwise([*middles, len(text)]):
            ids += self.encode(text[start:end], "text")
        return ids


def _without_prefix_space(state: dict) -> tuple[bool, bool]:
    """Take the rule that puts a blank before a text out of a tokenizer's state: (was there one, at the start only)."""
    changed = only_first = False
    for key in ("normalizer", "pre_tokenizer"):
        part = state[key] or {}
        steps = part.get("normalizers", part.get("pretokenizers", [part]))
        for step in list(steps):
            if step.get("type") == "Prepend":
                changed = True
                steps.remove(step)
                if step is part:
                    state[key] = None
            elif step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never":
                changed, only_first = True, step.get("prepend_scheme") == "first"
                step["prepend_scheme"] = "never"
            elif step.get("type") == "ByteLevel" and step.get("add_prefix_space"):
                changed = True
                step["add_prefix_space"] = False
    return changed, only_first


__all__ = ["MARK", "TextEncoder"]
