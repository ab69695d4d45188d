"""Serve a model to people, on a chat page, and to programs, by the API that OpenAI's clients speak.

    python -m inference_vlm.serve outputs/shapes/sft
    curl http://127.0.0.1:8000/v1/models

This machine alone can reach it, unless `--host` says otherwise. It ends with Ctrl-C and exit code 0; with 1 where the
model cannot be loaded or the port cannot be had, and with 2 where an option is wrong.
"""

import argparse
import contextlib
import dataclasses
import errno
import ipaddress
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.utils import logging

from processing.data_error_vlm import DuetError, in_a_line

from .answering import Answerer
from .loading import add_loading_arguments, loading_of
from .program import ended_by, program, show_any_text
from .serving.settings import ServingSettings, add_settings, settings_of


KEY = "DUET_API_KEY"
"""Where a key is looked for that is not given as an option, which other users of a machine can read."""


def serve(model: str, host: str, port: int, settings: ServingSettings, **loading: Any) -> None:
    """
    Serve a model until the process is told to end.

    Args:
        model: folder or Hub name; its own code is run.
        host: name or address that is listened at.
        port: 0 for any that is free.
        settings: what is allowed.
        **loading: arguments of `Answerer.load`.

    Raises:
        DuetError: the model cannot be loaded, the port cannot be had, or a package is missing.
    """
    try:
        from .serving.app import create_app
        from .serving.examples import examples_of, is_captioner
        from .serving.running import server_of
    except ImportError as error:
        raise DuetError(f'serving needs more packages: pip install "duet-vlm[serve]" ({in_a_line(error)}).') from error
    settings = dataclasses.replace(settings, allow_hosts=(*settings.allow_hosts, host))
    # Ctrl-C is an end like any other; the port is taken before the model is loaded, which can take minutes.
    with contextlib.suppress(KeyboardInterrupt), bound(host, port) as place:
        app = create_app(Answerer.load(model, **loading), settings, examples_of(Path(model)), is_captioner(model))
        with _had(host, port):  # another that was started meanwhile may have it
            place.listen()  # whoever reads the line may ask at once, and waits for as long as the server takes to start
        print(
            f"{settings.name} answers at {_url(place)}/v1; chat with it at {_url(place)}/; Ctrl-C ends it.", flush=True
        )
        if keeper := app.state.service.keeper:
            print(
                f"Answers are written one at a time, not {settings.at_once}: the language model keeps something of "
                f"what it wrote in {keeper}.",
                flush=True,
            )
        if not ipaddress.ip_address(place.getsockname()[0].partition("%")[0]).is_loopback:
            who = "with the key" if settings.api_key else f"at all: there is no --api_key or {KEY}"
            print(f"Other machines reach it too, anyone {who}.", flush=True)
        server_of(app).run(sockets=[place])


def bound(host: str, port: int) -> socket.socket:
    """
    A socket that has the port, and does not listen yet.

    Raises:
        DuetError: it cannot be had.
    """
    with _had(host, port):
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        place = socket.socket(family, kind, protocol)
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, os.name == "posix")
        place.bind(address)
    return place


@contextlib.contextmanager
def _had(host: str, port: int) -> Iterator[None]:
    """While a port is asked for, which may be another's."""
    try:
        yield
    except (OSError, OverflowError) as error:  # the latter of a port that none can have
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise DuetError(f"port {port} of {host} is in use; end what uses it, or give another --port.") from error
        raise DuetError(f"port {port} of {host} cannot be had: {in_a_line(error)}.") from error


def _url(place: socket.socket) -> str:
    host, port = place.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 where the model cannot be served."""
    parser = argparse.ArgumentParser(prog=program("inference_vlm.serve"), description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a folder that Duet saved, or the name of one on the Hub; its own code is run")
    parser.add_argument("--host", default="127.0.0.1", help="address that is listened at (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any that is free (default: 8000)")
    add_settings(parser)
    add_loading_arguments(parser)
    args = parser.parse_args(argv)
    show_any_text()
    key = args.api_key if args.api_key is not None else os.environ.get(KEY)
    key = None if key is None else key.strip()  # a file's last line break is none of it
    if key is not None and not (key.isascii() and key):
        parser.error(f"the key (--api_key, or {KEY}) has to be of ASCII characters, and not empty")
    if not all(re.fullmatch(r"https?://[^/*]+", origin) for origin in args.allow_origins):
        parser.error("--allow_origins: expected origins as browsers name them, such as https://example.org")
    for network in args.proxies:
        try:
            ipaddress.ip_network(network)
        except ValueError as error:
            parser.error(f"--proxies: expected addresses or networks, such as 127.0.0.1 or 10.0.0.0/8; {error}")
    name = args.name or (Path(args.model).resolve().name if Path(args.model).exists() else args.model)
    logging.disable_progress_bar()
    try:
        serve(args.model, args.host, args.port, settings_of(args, name=name, api_key=key), **loading_of(args))
    except Exception as error:
        return ended_by(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
