"""Who is let in, before anything of a request is read.

What is special: a server of this machine is within reach of every web page that is open on it. So a request has to
name the server by an address, by `localhost` or by a name that was allowed: a page whose own name was pointed at this
machine names itself. And a request that a browser sends for a page of another origin is refused, unless that origin is
allowed.
"""

import hmac
import ipaddress
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ApiError
from .settings import ServingSettings


OPEN_PATHS = ("/", "/health", "/page/")
"""What needs no key: a page that asks for it, and whether the server is there."""


class Guard:
    """ASGI middleware that refuses whom the settings do not let in."""

    def __init__(self, app: ASGIApp, settings: ServingSettings):
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope)
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, scope) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not _is_own(host, self.settings.allow_hosts):
            raise ApiError(
                "this server is not known by the name in the Host header; name it by its address, or start it with "
                "--allow_hosts NAME.",
                403,
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}", *self.settings.allow_origins):
            raise ApiError(
                "web pages of this origin may not use this server; start it with --allow_origins ORIGIN.",
                403,
                code="origin_not_allowed",
            )
        if self.settings.api_key is not None and not _is_open(scope["path"]):
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(
                key.strip().encode(), self.settings.api_key.encode()
            ):
                raise ApiError(
                    "Incorrect API key provided, or none; send it as Authorization: Bearer KEY.",
                    401,
                    code="invalid_api_key",
                )


def _is_open(path: str) -> bool:
    return any(path == one or (one.endswith("/") and one != "/" and path.startswith(one)) for one in OPEN_PATHS)


def _is_own(host: str, names: Iterable[str]) -> bool:
    """Whether a Host header can only have come by way of this server's own address or name."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() and not host.endswith("]") else host
    name = name.lower().removeprefix("[").removesuffix("]")
    if name == "localhost" or name in (other.lower() for other in names):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


__all__ = ["OPEN_PATHS", "Guard"]
