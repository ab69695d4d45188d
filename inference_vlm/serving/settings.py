"""What a server allows: who may ask, how much, and for how long."""

import argparse
import dataclasses
import sys
from dataclasses import dataclass, field
from typing import Any


def _said(default: Any, help: str, least: int = 0, most: float = sys.float_info.max) -> Any:
    return field(default=default, metadata={"help": help, "least": least, "most": most})


@dataclass(frozen=True)
class ServingSettings:
    """How a server is run; each is an option of `python -m inference_vlm.serve`, whose help says what it is for."""

    name: str = _said("", "what clients call the model; the last part of its folder's name, or its name on the Hub")
    api_key: str | None = _said(None, "what clients have to send as `Authorization: Bearer KEY`")
    allow_urls: bool = _said(False, "fetch images at http and https URLs, from the internet at large alone")
    allow_hosts: tuple[str, ...] = _said((), "names by which the server is reached, besides localhost and addresses")
    allow_origins: tuple[str, ...] = _said((), "web pages of others that may use it, such as https://example.org")
    proxies: tuple[str, ...] = _said(
        (),
        "addresses or networks of reverse proxies, whose X-Forwarded-For is believed; else all behind one are a client",
    )
    max_new_tokens: int = _said(1024, "the longest answer, and the length of one whose request does not say", least=1)
    at_once: int = _said(
        4, "answers that are written at the same time, a token of each in turn; each has its cache in memory",
        least=1, most=256,
    )  # fmt: skip
    max_waiting: int = _said(64, "requests that wait for their turn; others are refused with 503")
    max_body_mb: float = _said(32, "the largest request, in millions of bytes, its images included")
    max_characters: int = _said(1_000_000, "the longest text of a request, all messages together")
    max_images: int = _said(16, "images in a request")
    max_megapixels: float = _said(100, "what the images of a request have together, in millions of pixels")
    body_seconds: float = _said(30, "how long a request may take to arrive")
    request_seconds: float = _said(600, "how long it may wait and be answered, together")
    conversations: int = _said(8, "of how many conversations the keys and values stay in memory for the next turn")
    conversations_mb: float = _said(1000, "what those may take together, in millions of bytes")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add an option for each of the settings."""
    for setting in dataclasses.fields(ServingSettings):
        default, option = setting.default, f"--{setting.name}"
        about = setting.metadata["help"]
        if isinstance(default, bool):
            parser.add_argument(option, action="store_true", help=about)
        elif isinstance(default, tuple):
            parser.add_argument(option, nargs="+", default=default, help=about)
        elif isinstance(default, (int, float)):
            kind = int if setting.type is int else float
            parser.add_argument(
                option,
                type=_amount(kind, setting.metadata["least"], setting.metadata["most"]),
                default=default,
                help=f"{about} (default: {default})",
            )
        else:
            parser.add_argument(option, default=default, help=about)


def settings_of(options: argparse.Namespace, **others: Any) -> ServingSettings:
    """The settings that a command line gives."""
    names = [setting.name for setting in dataclasses.fields(ServingSettings)]
    return ServingSettings(**{name: getattr(options, name) for name in names} | others)


def _amount(kind: type, least: int, most: float) -> Any:
    def read(text: str):
        value = kind(text)
        if not least <= value <= most:
            raise ValueError
        return value

    bound = "or more" if most > sys.maxsize else f"to {most}"
    read.__name__ = f"number of {least} {bound}"  # as argparse names it
    return read


__all__ = ["ServingSettings", "add_settings", "settings_of"]
