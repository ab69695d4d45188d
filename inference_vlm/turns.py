"""Answers that are written at the same time take turns at one model, a step of each.

What is special: at any moment one step is computed, a prompt or a token, with all that the machine has, so it gives
what it gives alone; nothing is batched, and nothing runs beside it. Only what a model itself keeps from one step to
the next could mix. What the library is known to keep goes with its answer: rotary frequencies that grow with the text,
and how experts are multiplied. A model that keeps something else, which is found by trying, writes one at a time.
"""

import contextlib
import copy
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig


class Turns:
    """
    Who may use a model, and when.

    Args:
        composed: the model.

    Attributes:
        at_once (`int`): answers that are written at the same time; others wait for a place.
    """

    def __init__(self, composed: Any):
        self.composed, self.at_once = composed, 1
        self._places = threading.Semaphore(1)
        self._line = _Line()
        self._kept = _Kept(composed)

    @property
    def most_together(self) -> int | None:
        """The positions up to which what is written as one batch is what each would be alone; `None` for any number."""
        return min((rope.original_max_seq_len for rope in self._kept.ropes), default=None)

    def share(self, at_once: int) -> str | None:
        """
        Have so many answers written at the same time, from now on; not while one is being written.

        Returns:
            `str`: the name of what keeps them from it, and there is one at a time; `None` where nothing does.
        """
        keeper = kept_between_steps(self.composed) if at_once > 1 else None
        self.at_once = 1 if keeper else at_once
        self._places = threading.Semaphore(self.at_once)
        return keeper

    @contextlib.contextmanager
    def place(self, ended: Callable[[], bool]) -> Iterator[Callable[[], None]]:
        """
        A place among the answers that are written, and the first turn; what is given lets the others have theirs.

        Args:
            ended: whether nobody waits for the answer any more, which then gets no place.
        """
        while not (mine := self._places.acquire(timeout=0.05)) and not ended():
            pass
        if not mine:
            yield lambda: None
            return
        try:
            with self._line.turn() as pass_on:

                def pause():
                    if self._line.is_waited_for:
                        kept = self._kept.take()
                        pass_on()
                        self._kept.put(kept)

                self._kept.begin()
                yield pause
        finally:
            self._places.release()


class _Line:
    """Threads that do something one at a time, in the order in which they came."""

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._is_taken = False

    @property
    def is_waited_for(self) -> bool:
        return bool(self._waiting)

    @contextlib.contextmanager
    def turn(self) -> Iterator[Callable[[], None]]:
        """This thread's; what is given waits for the next, behind all that wait already."""
        is_mine = False

        def take():
            nonlocal is_mine
            gives_way, is_mine = is_mine, False
            self._take(gives_way)
            is_mine = True

        try:
            take()
            yield take
        finally:
            if is_mine:
                self._release()

    def _take(self, gives_way: bool) -> None:
        ticket = threading.Lock()
        ticket.acquire()
        with self._changing:
            self._waiting.append(ticket)
            if gives_way or not self._is_taken:
                self._call_next()
        try:
            ticket.acquire()
        except BaseException:  # Ctrl-C: whoever is no longer there would keep those behind
            with self._changing:
                if ticket in self._waiting:
                    self._waiting.remove(ticket)
                else:
                    self._call_next()
            raise

    def _release(self) -> None:
        with self._changing:
            self._call_next()

    def _call_next(self) -> None:
        self._is_taken = bool(self._waiting)
        if self._waiting:
            self._waiting.popleft().release()


class _Kept:
    """What the library keeps in a model from step to step."""

    def __init__(self, composed: Any):
        self.composed, self.ropes = composed, ropes_that_grow(composed)
        self._switches_experts = hasattr(composed, "get_experts_implementation")
        self._experts = self._experts_now()

    def begin(self) -> None:
        """As it is where nothing was written yet."""
        begin_anew(self.ropes)
        self._put_experts(self._experts)

    def take(self) -> Any:
        states = [
            (dict(rope.named_buffers(recurse=False, remove_duplicate=False)), dict(_own(rope))) for rope in self.ropes
        ]
        return states, self._experts_now()

    def put(self, kept: Any) -> None:
        states, experts = kept
        for rope, (buffers, others) in zip(self.ropes, states):
            vars(rope).update(others)
            for name, buffer in buffers.items():
                rope.register_buffer(name, buffer, persistent=False)
        self._put_experts(experts)

    def _experts_now(self):
        return self.composed.get_experts_implementation() if self._switches_experts else None

    def _put_experts(self, experts):
        if experts != self._experts_now():  # prompts are read by others than tokens are written by, on an accelerator
            self.composed.set_experts_implementation(experts)


def ropes_that_grow(model: nn.Module) -> list[Any]:
    """Modules whose frequencies depend on the longest text that they have seen (dynamic rotary scaling)."""
    return [module for module in model.modules() if "dynamic" in str(getattr(module, "rope_type", ""))]


def begin_anew(ropes: list[Any]) -> None:
    """Have the library forget the longest text, as it does by itself at a short one."""
    for rope in ropes:
        first = torch.zeros(1, 1, dtype=torch.long, device=next(rope.buffers()).device)
        for kind in rope.rope_type if isinstance(rope.rope_type, dict) else (None,):
            rope(first.float(), first, **({} if kind is None else {"layer_type": kind}))


_MODULES_OWN = {*vars(nn.Module())}


def _own(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a module holds besides what every module has."""
    return ((name, value) for name, value in vars(module).items() if name not in _MODULES_OWN)


@torch.no_grad()
def kept_between_steps(composed: Any) -> str | None:
    """
    The name of a module that keeps something of what was written, outside of the cache; `None` where none does.

    It is found by writing a few tokens twice: what was made once and stays is no answer's.
    """
    ids = [id for id in range(5) if id != composed.config.image_token_id][:4]
    writer = copy.copy(composed)
    writer.generation_config = GenerationConfig(max_new_tokens=3, min_new_tokens=3, eos_token_id=ids[0], pad_token_id=0)
    prompt = torch.tensor([ids], device=composed.device)
    grow = set(ropes_that_grow(composed))
    before: dict[tuple[str, str], Any] = {}
    for _ in range(2):
        writer.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt))
        last, before = before, {
            (at, name): (value, _state(value))
            for at, module in composed.model.language_model.named_modules()
            if module not in grow
            for name, value in (*_own(module), *module.named_buffers(recurse=False))
        }  # fmt: skip
    for key, (value, state) in before.items():
        if key not in last or not _same(value, last[key][0]) or state != last[key][1]:
            return ".".join(filter(None, key))
    return None


def _state(value):
    """What tells a thing from itself after a change."""
    return value._version if isinstance(value, torch.Tensor) else len(value) if hasattr(value, "__len__") else None


def _same(value, other):
    return value is other or (isinstance(value, (int, float, str)) and type(value) is type(other) and value == other)


__all__ = ["Turns", "begin_anew", "kept_between_steps", "ropes_that_grow"]
