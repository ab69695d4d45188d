"""An answer in pieces, while a thread of its own writes it.

What is special: whoever lets go of the pieces, or sets the flag that it gave, ends the writing within a step; what goes
wrong in the thread is raised where the pieces are read.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple, Protocol


class Finish(NamedTuple):
    """
    How an answer ended, and what it took.

    Attributes:
        reason: `"stop"` at its end or a stop string, `"length"` where there was no room for more, `"cancelled"`.
        prompt_tokens: positions of the prompt, `image_tokens` of them images'.
        completion_tokens: tokens that were written, an end token among them.
        cached_tokens: positions of the prompt that were not run again.
    """

    reason: str
    prompt_tokens: int
    image_tokens: int
    completion_tokens: int
    cached_tokens: int


class Flag(Protocol):
    """What says that nobody waits any more, as `threading.Event` does."""

    def is_set(self) -> bool: ...


class Stream(Iterator[str]):
    """
    The pieces of an answer as it is written; whoever lets go of it ends the writing.

    Attributes:
        finish (`Finish`): how it ended, once there are no more pieces.
    """

    def __init__(self, write: Callable[[Callable[[str], None], Flag], Finish]):
        self.finish: Finish | None = None
        self._pieces = _written(write)  # a function's, which knows nothing of this object and goes with it

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            self.finish = end.value or self.finish
            raise

    def close(self) -> None:
        """Write no more."""
        self._pieces.close()


def _written(write) -> Generator[str, None, Finish]:
    pieces: queue.SimpleQueue[str | Finish | BaseException] = queue.SimpleQueue()
    left = threading.Event()

    def work():
        try:
            pieces.put(write(pieces.put, left))
        except BaseException as error:
            pieces.put(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        while isinstance(piece := pieces.get(), str):
            yield piece
    finally:
        left.set()
        worker.join()
    if isinstance(piece, BaseException):
        raise piece
    return piece


class Either:
    """Set once one of two flags is."""

    def __init__(self, *flags: Flag | None):
        self.flags = [flag for flag in flags if flag is not None]

    def is_set(self) -> bool:
        return any(flag.is_set() for flag in self.flags)


__all__ = ["Either", "Finish", "Flag", "Stream"]
