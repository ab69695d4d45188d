"""The bodies of requests, in bounds of size, of time, and of the memory that all of them take together."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import Request

from .errors import ApiError
from .settings import ServingSettings


AT_ONCE = 16
"""How many requests of the largest size are held at once, wherever they are on their way."""

OF_ONE = 8
"""How many of them may be of one client, so that nobody who fills the memory keeps the others out."""


class Bodies:
    """What of requests is in memory."""

    def __init__(self, settings: ServingSettings):
        self.most = round(settings.max_body_mb * 1e6)
        self.seconds = settings.body_seconds
        self.held = 0
        self.of: Counter[str] = Counter()  # what is held of each client

    @contextmanager
    def holding(self, client: str) -> Iterator["Hold"]:
        """What one request of a client holds, and lets go of at the end."""
        hold = Hold(self, client)
        try:
            yield hold
        finally:
            hold.add(-hold.count)

    async def read(self, request: Request, hold: "Hold") -> bytes:
        """
        The body of a request.

        Raises:
            ApiError: it is too large, too slow, or there is no room for it.
            ClientDisconnect: nobody sends it any more.
        """
        said = request.headers.get("content-length", "")
        if said.isdecimal() and int(said[:20]) > self.most:
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(self.seconds):
                async for chunk in request.stream():
                    hold.add(len(chunk))
                    body += chunk
                    if len(body) > self.most:
                        raise self._too_large()
        except TimeoutError:
            raise ApiError(
                f"the request did not arrive within {self.seconds:g} seconds.", 408, code="request_timeout"
            ) from None
        return bytes(body)

    def _too_large(self):
        return ApiError(
            f"the request is larger than {self.most / 1e6:g} MB; send fewer or smaller images.",
            413,
            code="request_too_large",
        )


class Hold:
    """Bytes that one request holds."""

    def __init__(self, bodies: Bodies, client: str):
        self.bodies, self.client, self.count = bodies, client, 0

    def add(self, count: int) -> None:
        """
        Count more, or fewer.

        Raises:
            ApiError: all requests together hold too many, or those of its client.
        """
        bodies = self.bodies
        self.count += count
        bodies.held += count
        bodies.of[self.client] += count
        if not bodies.of[self.client]:
            del bodies.of[self.client]
        if count > 0 and (bodies.held > AT_ONCE * bodies.most or bodies.of[self.client] > OF_ONE * bodies.most):
            raise ApiError(
                "the requests that are being answered take all the memory there is for them; please try again later.",
                503,
                code="server_overloaded",
                retry_after=5,
            )


__all__ = ["Bodies", "Hold"]
