"""The HTTP server under the app: uvicorn, with an end to connections that never say what they want."""

import asyncio
import ipaddress
import socket
from collections import Counter
from collections.abc import Iterable
from typing import ClassVar

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol


HEAD_SECONDS = 20
"""How long the head of a request may take."""

CONNECTIONS = 256
"""How many one client may have open, so that nobody takes all that the process can have."""


class _Protocol(H11Protocol):
    """Closes connections on which no request has begun in time, the first or another; and those that are too many."""

    open: ClassVar[Counter[str]] = Counter()
    """Connections by the address of their client."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._address = (transport.get_extra_info("peername") or ("",))[0]
        self.open[self._address] += 1
        if self.open[self._address] > CONNECTIONS and not _is_of(self._address, self.config.forwarded_allow_ips):
            transport.abort()
        else:
            self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.open[self._address] -= 1
        if not self.open[self._address]:
            del self.open[self._address]

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect_request()

    def _expect_request(self) -> None:
        self.loop.call_later(HEAD_SECONDS, self._close_unless_begun, self.cycle)

    def _close_unless_begun(self, last) -> None:
        if self.cycle is last:
            self.transport.close()


class _Server(uvicorn.Server):
    """Ends what is being answered when it is told to end, and does not wait for it only to break it off."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.state.service.worker.end()  # type: ignore[union-attr]  # it is ours
        await super().shutdown(sockets)


def _is_of(address: str, networks: Iterable[str]) -> bool:
    try:
        return any(ipaddress.ip_address(address) in ipaddress.ip_network(network) for network in networks)
    except ValueError:  # of a socket that has none
        return False


def server_of(app: FastAPI) -> uvicorn.Server:
    """A server that runs the app on sockets that it is given."""
    proxies = list(app.state.service.settings.proxies)
    config = uvicorn.Config(
        app, http=_Protocol, ws="none", log_level="warning", server_header=False, proxy_headers=bool(proxies),
        forwarded_allow_ips=proxies,
    )  # fmt: skip
    config.timeout_graceful_shutdown = 5
    return _Server(config)


__all__ = ["server_of"]
