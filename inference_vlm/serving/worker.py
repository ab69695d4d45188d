"""The threads that answer, and those who wait for them.

What is special: clients take turns: whoever asks many things at once waits behind those who ask one, and where several
answers are written at the same time leaves a place for others. A request whose client has gone leaves the line at once,
and its thread before its next token.
"""

import asyncio
import logging
import threading
import time
from collections import Counter, OrderedDict, deque
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
    """
    The threads, and the line before them.

    Args:
        at_once: how many threads there are.
    """

    def __init__(self, at_once: int = 1):
        self._line: OrderedDict[str, deque[Job]] = OrderedDict()  # by whose turn it is
        self._changed = threading.Condition()
        self._running: list[Job] = []
        self._closed = False
        self._of_one = at_once // 2 + 1
        """How many of a client's requests are answered at the same time."""
        self._threads = [
            threading.Thread(target=self._run, name=f"answers-{number}", daemon=True) for number in range(at_once)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether requests are answered."""
        return all(thread.is_alive() for thread in self._threads)

    @property
    def waiting(self) -> int:
        """Requests in the line."""
        with self._changed:
            return self._waiting()

    @property
    def inside(self) -> int:
        """Requests that are answered, or wait for it; not those whose answer only has to be sent."""
        with self._changed:
            return self._answered() + self._waiting()

    def _answered(self):
        return sum(not job.is_set() for job in self._running)

    def _waiting(self):
        return sum(map(len, self._line.values()))

    def add(self, job: Job, most: int, refusal: ApiError) -> None:
        """
        Put a request in the line; where that is full, in place of the last of whoever has most in it.

        Args:
            most: requests that may wait.
            refusal: what who has to go is told.

        Raises:
            ApiError: the refusal, where nobody has more in the line than its client; or all has ended.
        """
        with self._changed:
            if self._closed:
                raise _ending()
            if self._answered() + self._waiting() >= most + len(self._threads):
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

    def end(self) -> None:
        """Answer nothing more: what is being written ends within a step, and what waits is told so."""
        with self._changed:
            self._closed = True
            waiting = [job for jobs in self._line.values() for job in jobs]
            self._line.clear()
            for job in waiting:
                job.tell(_ending())
            for job in (*waiting, *self._running):
                job.give_up()
            self._changed.notify_all()

    def close(self, seconds: float = 5) -> None:
        """End, and the threads too."""
        self.end()
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0, until - time.monotonic()))

    def _next(self, last: Job | None) -> Job | None:
        """What a thread does now that it has done the last."""
        with self._changed:
            if last is not None:
                self._running.remove(last)
                self._changed.notify_all()  # another of its client's may begin
            while (client := self._first()) is None and not self._closed:
                self._changed.wait()
            if client is None or self._closed:
                return None
            jobs = self._line.pop(client)
            job = jobs.popleft()
            self._running.append(job)
            if jobs:
                self._line[client] = jobs  # behind the others
            return job

    def _first(self) -> str | None:
        """The first client in the line who has not all the places that one may have."""
        of = Counter(job.client for job in self._running)
        return next((client for client in self._line if of[client] < self._of_one), None)

    def _run(self) -> None:
        job: Job | None = None
        while (job := self._next(job)) is not None:
            try:
                if not job.is_set():
                    job.work(job)
            except ApiError as error:
                job.tell(error)
            except Exception:  # one request is lost, and the others are answered
                logger.exception("a request could not be answered")
                job.tell(ApiError("The server had an error while processing your request.", 500, code="server_error"))


def _ending() -> ApiError:
    return ApiError("the server is being stopped.", 503, code="server_overloaded", retry_after=30)


__all__ = ["Job", "Worker"]
