"""Ids become text as they are written: whole characters, and nothing of a stop string.

What is special: what was given can not be taken back, so a piece is given when no later token can change it. A
character of several tokens waits for its last (Chinese, emoji, Arabic), what may be the beginning of a stop string for
what follows, and blanks for a word behind them. All pieces together are what `text_of` makes of the ids at once.
"""

import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria


_HALF = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet


class Spoken:
    """
    The text of one answer.

    Args:
        tokenizer: the model's.
        ends: ids that end the answer.
        stops: strings that end it, of which none is given, nor anything behind it.

    Attributes:
        ended (`bool`): whether an end or a stop string was met.
        count (`int`): ids up to there.
    """

    def __init__(self, tokenizer: Any, ends: Collection[int] = (), stops: Sequence[str] = ()):
        self.tokenizer, self.ends, self.stops = tokenizer, ends, stops
        self.ended, self.count = False, 0
        self._ids: list[int] = []
        # Ids are decoded behind those of the piece before, without which some decoders take a blank away.
        self._start, self._middle, self._given = 0, 0, 0
        self._held, self._begun = "", False

    def add(self, id: int) -> str:
        """What can be given now that this id is there; often nothing."""
        if self.ended:
            return ""
        self._ids.append(id)
        self.count += 1
        self.ended = id in self.ends
        text = self._decoded()
        whole = text.rstrip(_HALF)
        new, self._given = whole[self._given :], max(self._given, len(whole))
        if new and whole == text:
            self._start, self._middle = self._middle, len(self._ids)
            self._given = len(self._decoded())
        return self._shown(new)

    def end(self) -> str:
        """What is left when no id follows."""
        return self._shown(self._decoded()[self._given :], ends=True)

    def _decoded(self):
        return self.tokenizer.decode(self._ids[self._start :], skip_special_tokens=True)

    def _shown(self, new, ends=False):
        text = self._held + new
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            text, ends, self.ended = text[: min(found)], True, True
            self._given = sys.maxsize  # and nothing more
        shown = text if ends else text[: len(text) - self._may_stop(text)]
        shown = shown.rstrip()
        self._held = "" if ends else text[len(shown) :]
        if not self._begun:
            shown = shown.lstrip()
            self._begun = bool(shown)
        return shown

    def _may_stop(self, text):
        """How many of the last characters may be the beginning of a stop string."""
        lengths = (length for stop in self.stops for length in range(1, len(stop)) if text.endswith(stop[:length]))
        return max(lengths, default=0)


class Listening(StoppingCriteria):
    """
    Hears each id as it is written, gives the pieces on, and ends the rows whose answer has ended.

    Args:
        spoken: the text of each row.
        length: positions of the prompts.
        tell: is given the number of a row and a piece of its text.
        ended: whether to write no more, asked after each step.
        pause: called after each step behind which there is another.
    """

    def __init__(
        self,
        spoken: Sequence[Spoken],
        length: int,
        tell: Callable[[int, str], None] = lambda row, piece: None,
        ended: Callable[[], bool] = lambda: False,
        pause: Callable[[], None] = lambda: None,
    ):
        self.spoken, self.heard, self.tell, self.ended, self.pause = spoken, length, tell, ended, pause

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        for row, ids in enumerate(input_ids[:, self.heard :].tolist()):
            for id in ids:
                if piece := self.spoken[row].add(id):
                    self.tell(row, piece)
        self.heard = input_ids.shape[1]
        if not all(spoken.ended for spoken in self.spoken) and not self.ended():
            self.pause()
        done = [self.ended() or spoken.ended for spoken in self.spoken]
        return torch.tensor(done, device=input_ids.device)


__all__ = ["Listening", "Spoken"]
