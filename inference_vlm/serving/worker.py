"""One thread that answers, and those who wait for it.

What is special: a model answers one request at a time, whole, so that nothing of one request can change the answer of
another. Clients take turns: whoever asks many things at once waits behind those who ask one. A request whose client has
gone leaves the line at once, and the thread before its next token.
"""

import asyncio
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

from .errors import ApiError


logger = logging.getLogger(__name__)


class Job:
    """
    A request on its way, and the flag that ends it.

    Args:
        work: called in the thread with this job, to `tell` whoever waits what comes of it.
        client: whose turn it is.
        until: the moment (`time.monotonic`) at which it ends, wherever it is.
    """

    def __init__(self, work: Callable[["Job"], None], client: str, until: float):
        self.work, self.client, self.until = work, client, until
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._given_up = threading.Event()

    def tell(self, event: Any) -> None:
        """Give an event to whoever waits, from the thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop is closed: nobody waits
            self.give_up()

    def is_set(self) -> bool:
        """Whether nobody waits any more, or the time is over."""
        return self._given_up.is_set() or time.monotonic() > self.until

    def give_up(self) -> None:
        """End it where it is."""
        self._given_up.set()

    async def next(self) -> Any:
        """
        The next event, in order.

        Raises:
            Exception: what went wrong in the thread.
        """
        event = await self._events.get()
        if isinstance(event, BaseException):
            raise event
        return event


class Worker:
    """The thread, and the line before it."""

    def __init__(self):
        self._line: OrderedDict[str, deque[Job]] = OrderedDict()  # by whose turn it is
        self._changed = threading.Condition()
        self._running: Job | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive()

    @property
    def inside(self) -> int:
        """Requests that are answered, or wait for it; not those whose answer only has to be sent."""
        with self._changed:
            return self._inside()

    def _inside(self):
        is_busy = self._running is not None and not self._running.is_set()
        return is_busy + sum(map(len, self._line.values()))

    def add(self, job: Job, most: int, refusal: ApiError) -> None:
        """
        Put a request in the line; where that is full, in place of the last of whoever has most in it.

        Args:
            most: requests that may wait.
            refusal: what who has to go is told.

        Raises:
            ApiError: the refusal, where nobody has more in the line than its client.
        """
        with self._changed:
            if self._inside() > most:
                longest = max(self._line.values(), key=len, default=deque())
                if len(longest) < 2 + len(self._line.get(job.client, ())):
                    raise refusal
                last = longest.pop()
                last.give_up()
                last.tell(refusal)
            self._line.setdefault(job.client, deque()).append(job)
            self._changed.notify()

    def drop(self, job: Job) -> None:
        """Take a request back, wherever it is."""
        job.give_up()
        with self._changed:
            jobs = self._line.get(job.client, deque())
            if job in jobs:
                jobs.remove(job)
                if not jobs:
                    del self._line[job.client]

    def close(self, seconds: float = 5) -> None:
        """End what is being answered, and the thread."""
        with self._changed:
            self._closed = True
            if self._running is not None:
                self._running.give_up()
            self._changed.notify()
        self._thread.join(seconds)

    def _next(self) -> Job | None:
        with self._changed:
            self._running = None
            while not self._line and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            client, jobs = self._line.popitem(last=False)
            job = self._running = jobs.popleft()
            if jobs:
                self._line[client] = jobs  # behind the others
            return job

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                if not job.is_set():
                    job.work(job)
            except ApiError as error:
                job.tell(error)
            except Exception:  # one request is lost, and the others are answered
                logger.exception("a request could not be answered")
                job.tell(ApiError("The server had an error while processing your request.", 500, code="server_error"))


__all__ = ["Job", "Worker"]
