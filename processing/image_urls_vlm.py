"""What lies at a URL that data names, fetched so that no server can hold a worker, fill it, or lead it astray.

What is special: one deadline for the whole fetch (names, every redirect, headers and content), one bound of bytes, and
one question at every address before it is connected to: does it belong to the internet at large? The address that was
asked about is the one that is connected to, so no name can answer differently the second time. Nothing of this machine
is sent along: no token, no cookie. Proxies of the environment are used; what they connect to is theirs to decide. The
file travels with every checkpoint.
"""

import functools
import http.client
import io
import ipaddress
import socket
import ssl
import string
import threading
import time
import urllib.request
import zlib
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit

from huggingface_hub import is_offline_mode
from huggingface_hub.utils import httpx


FETCH_SECONDS = 10
FETCH_BYTES = 20_000_000

_HEADER_BYTES = 200_000
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""IPv6 addresses that stand for the IPv4 address in their last 32 bits."""


class NotFetched(Exception):
    """Nothing came, for the reason that the message gives."""


class TooManyBytes(NotFetched):
    """More than `FETCH_BYTES`."""


class LocalAddress(NotFetched):
    """The URL, or what it redirects to, leads into a network of its own: of this machine, a company, a cloud."""


def fetch(url: str, allow_local: bool = False) -> bytes:
    """
    What lies at an http or https URL, within `FETCH_SECONDS` in all and `FETCH_BYTES`.

    Args:
        url: the URL; redirects are followed to http and https URLs.
        allow_local: whether it may lead to loopback, private, link-local and reserved addresses.

    Raises:
        NotFetched: it could not be had; one line.
    """
    if is_offline_mode():
        raise NotFetched("HF_HUB_OFFLINE is set")
    until = time.monotonic() + FETCH_SECONDS
    opener = urllib.request.OpenerDirector()  # not the usual one, which opens files and FTP as well
    for handler in (
        urllib.request.ProxyHandler(),
        _Handler(until, allow_local),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    try:
        request = urllib.request.Request(_ascii(url), headers={"User-Agent": "duet"})
        with opener.open(request, timeout=FETCH_SECONDS) as response:
            content = bytearray()
            while chunk := response.read(65_536):
                content += chunk
                _check_count(len(content))
            return _decoded(bytes(content), response.headers.get("Content-Encoding", ""))
    except HTTPError as error:
        error.close()
        why = f"the server answers {error.code}"
    except TimeoutError:
        why = f"not there within {FETCH_SECONDS} seconds"
    except URLError as error:
        is_late = isinstance(error.reason, TimeoutError)
        why = f"not there within {FETCH_SECONDS} seconds" if is_late else str(error.reason)
    except (OSError, ValueError, http.client.HTTPException, zlib.error) as error:
        why = str(error) or type(error).__name__
    raise NotFetched(" ".join(why.split())[:200])


def _ascii(url):
    """A URL as it can be sent: names of hosts as DNS has them, all else percent-encoded."""
    parts = urlsplit(url)
    if not parts.hostname:
        raise ValueError("no host in the URL")
    return quote(parts._replace(netloc=parts.netloc.encode("idna").decode()).geturl(), safe=string.punctuation)


def _decoded(content, encoding):
    """Content that is sent compressed, though this was not asked for; no bomb unpacks beyond the bound."""
    if encoding.lower() not in ("gzip", "x-gzip", "deflate"):
        return content
    content = zlib.decompressobj(32 + zlib.MAX_WBITS).decompress(content, FETCH_BYTES + 1)
    _check_count(len(content))
    return content


def _check_count(count):
    if count > FETCH_BYTES:
        raise TooManyBytes(f"more than {FETCH_BYTES:,} bytes")


def _left(until):
    """Seconds up to a moment.

    Raises:
        TimeoutError: it has passed.
    """
    if (left := until - time.monotonic()) <= 0:
        raise TimeoutError
    return left


def _addresses(host, port, until, allow_local):
    """The addresses of a host, each as text; asked in a thread, because no resolver takes a deadline."""
    answer = []

    def ask():
        try:
            answer.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_left(until))
    if not answer:
        raise TimeoutError
    if isinstance(answer[0], Exception):
        raise answer[0]
    addresses = [place[0] for *_, place in answer[0]]
    local = [] if allow_local else [address for address in addresses if not _is_public(address)]
    if local:
        raise LocalAddress(f"{host} is {local[0]}, no address of the internet at large")
    return addresses


def _is_public(address):
    """Whether an address belongs to the internet at large; where it carries another, the inner one counts."""
    address = ipaddress.ip_address(address.partition("%")[0])
    if address.version == 6:
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        address = inner or address
    if getattr(address, "is_site_local", False):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


class _Handler(urllib.request.AbstractHTTPHandler):
    """Opens http and https with connections that keep to the rules."""

    def __init__(self, until, allow_local):
        super().__init__()
        self.rules = {"until": until, "allow_local": allow_local}
        self.http_request = self.https_request = self.do_request_

    def http_open(self, request):
        target = urlsplit(request.full_url).hostname if request.has_proxy() else None
        return self.do_open(_Connection, request, target=target, **self.rules)

    def https_open(self, request):
        return self.do_open(_SecureConnection, request, **self.rules)


class _Connection(http.client.HTTPConnection):
    """Connects to an address that was found to be allowed, and reads no longer than there is time."""

    def __init__(self, host, *, until, allow_local, target=None, **options):
        super().__init__(host, **options)
        self.until, self.allow_local = until, allow_local
        self.target = target  # what a proxy, which `host` then is, is asked for
        self.response_class = functools.partial(_Response, until)

    def set_tunnel(self, host, port=None, headers=None):
        super().set_tunnel(host, port, headers)
        self.target = urlsplit(f"//{host}").hostname

    def connect(self):
        if self.target:
            try:
                _addresses(self.target, self.port, self.until, self.allow_local)
            except socket.gaierror:
                pass  # a name that only the proxy can resolve
        name, failure = self.host, None
        for address in _addresses(name, self.port, self.until, self.allow_local or bool(self.target)):
            self.host, self.timeout = address, _left(self.until)
            try:
                super().connect()
                return
            except OSError as error:
                failure = error
            finally:
                self.host = name
        raise failure


class _SecureConnection(_Connection):
    """The same with TLS."""

    default_port = http.client.HTTPS_PORT

    def connect(self):
        super().connect()
        self.sock.settimeout(_left(self.until))
        self.sock = _tls().wrap_socket(self.sock, server_hostname=self.target or self.host)


@functools.lru_cache(maxsize=1)  # reading the certificates takes tens of milliseconds
def _tls() -> ssl.SSLContext:
    """Trusts whom huggingface_hub trusts."""
    return httpx.create_ssl_context()


class _Response(http.client.HTTPResponse):
    """An answer of which not even the headers take longer than there is time."""

    def __init__(self, until, sock, *args, **options):
        super().__init__(sock, *args, **options)
        self.fp = io.BufferedReader(_Bounded(self.fp.detach(), sock, until))


class _Bounded(io.RawIOBase):
    """What a socket gives until a moment, and up to a number of bytes, headers and redirects included."""

    def __init__(self, source, sock, until):
        self.source, self.sock, self.until, self.count = source, sock, until, 0

    def readable(self):
        return True

    def readinto(self, buffer):
        self.sock.settimeout(_left(self.until))
        count = self.source.readinto(buffer)
        self.count += count or 0
        _check_count(self.count - _HEADER_BYTES)
        return count

    def close(self):
        if not self.closed:
            self.source.close()
        super().close()


__all__ = ["LocalAddress", "NotFetched", "TooManyBytes", "fetch"]
