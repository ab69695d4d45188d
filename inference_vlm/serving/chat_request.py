"""What a client asks for, read from its JSON: checked to the last key, so that nothing is ignored in silence.

What is special: a picture comes as bytes or not at all. What a client names is never a path, and no string of its own
reaches what opens files. A parameter that this server cannot honour is refused by its name, unless it has the value
that changes nothing, which many clients send with every request.
"""

import base64
import binascii
import json
import re
import time
from dataclasses import dataclass
from typing import Any

from processing.image_files_vlm import BadImage, image_size
from processing.image_urls_vlm import NotFetched, fetch

from .errors import ApiError
from .settings import ServingSettings


MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_PARTS = 2000
"""Texts and pictures in all messages together; what a chat template takes for them grows with their square."""

_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)
_WEB_URL = re.compile(r"https?://", re.IGNORECASE)

_LABELS = {"user", "safety_identifier", "prompt_cache_key"}
"""What clients mark their requests with; no answer depends on it."""

_UNCHANGING: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "metadata": ({},),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
"""Parameters of the API that cannot be honoured -> the values with which there is nothing to honour."""


@dataclass(frozen=True)
class ChatRequest:
    """
    A request for an answer.

    Attributes:
        messages: as the processor takes them; images are `{"bytes": ..., "path": the place in the request}`.
        temperature: `None` for what the model's own settings of generation say; so for `top_p`.
        max_tokens: the longest answer; the context may leave room for less.
        stop: what ends the answer where it would come.
        with_usage: whether a stream ends with the numbers of tokens.
    """

    model: str
    messages: list[dict[str, Any]]
    temperature: float | None
    top_p: float | None
    max_tokens: int
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    with_usage: bool
    size: int
    """Bytes of its pictures."""


def read_request(body: bytes, settings: ServingSettings) -> ChatRequest:
    """
    The request that a body holds; pictures at URLs are fetched for it, if they may be and all else is well.

    Raises:
        ApiError: it is no such request, or asks for what cannot be had.
    """
    fields = _Fields(read_object(body))
    fields.drop_unchanging()
    fields.read_library_settings()
    check_model(fields.take("model"), settings)
    messages, stream = fields.take("messages"), fields.truth("stream")
    limits = {name: fields.number(name, 1, settings.max_new_tokens, whole=True) for name in _LENGTHS}
    asked = {limit for limit in limits.values() if limit is not None}
    if len(asked) > 1:
        raise ApiError("max_tokens and max_completion_tokens differ; give one of them.", param="max_completion_tokens")
    request = {
        "model": settings.name,
        "temperature": fields.number("temperature", 0, 2),
        "top_p": fields.number("top_p", 0, 1),
        "max_tokens": asked.pop() if asked else settings.max_new_tokens,
        "seed": fields.number("seed", -(2**63), 2**63 - 1, whole=True),
        "stop": _stop(fields.take("stop")),
        "stream": stream,
        "with_usage": _with_usage(fields.take("stream_options"), stream),
    }
    fields.refuse_rest()
    reader = _Reader(settings)
    found = reader.messages(messages)
    return ChatRequest(messages=found, size=sum(len(picture["bytes"]) for picture in reader.pictures), **request)


_LENGTHS = ("max_tokens", "max_completion_tokens")


def read_object(body: bytes) -> dict[str, Any]:
    """
    The JSON object that a body is.

    Raises:
        ApiError: it is none.
    """
    try:
        value = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise ApiError(f"We could not parse the JSON body of your request: {reason}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(f"the body of a request is a JSON object; found {_kind(value)}.", code="invalid_json")
    return value


def _no_number(name):
    raise ValueError(f"{name} is no JSON")


def check_model(name: Any, settings: ServingSettings) -> None:
    """
    Refuse a request for another model than the one that is served.

    Raises:
        ApiError: it names another, or none.
    """
    if name is None:
        raise ApiError("you must provide a model parameter.", param="model", code="missing_required_parameter")
    if name != settings.name:
        raise ApiError(
            f"The model {quoted(name)} does not exist here; this server has {quoted(settings.name)} alone.",
            404,
            param="model",
            code="model_not_found",
        )


class _Fields:
    """What is left to read of an object; what is null counts as left out, as in the API."""

    def __init__(self, found: dict[str, Any]):
        self.left = {name: value for name, value in found.items() if value is not None}

    def take(self, name: str) -> Any:
        return self.left.pop(name, None)

    def truth(self, name: str) -> bool:
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise _of_type(name, "a boolean", value)
        return bool(value)

    def number(self, name: str, least: int, most: int, whole: bool = False) -> Any:
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise _of_type(name, "an integer" if whole else "a number", value)
        if not least <= value <= most:
            raise ApiError(
                f"Invalid value for {name}: {quoted(value)}; expected {least} to {most}.",
                param=name,
                code="invalid_value",
            )
        return value

    def drop_unchanging(self) -> None:
        """Take what does not change an answer; refuse what should, and cannot."""
        for name, value in list(self.left.items()):
            if name in _LABELS:
                self.take(name)
            elif name in _UNCHANGING:
                same = [other for other in _UNCHANGING[name] if other == value]
                if not same or isinstance(value, bool) != isinstance(same[0], bool):  # True is 1
                    raise ApiError(
                        f"{name} is not supported by this server; leave it out.",
                        param=name,
                        code="unsupported_parameter",
                    )
                self.take(name)

    def read_library_settings(self) -> None:
        """Take what `transformers chat` says in an object of its own, where it does not say it as the API does."""
        text = self.take("generation_config")
        if text is None:
            return
        place = "generation_config"
        if not isinstance(text, str):
            raise _of_type(place, "a string that holds JSON", text)
        found = _Fields(read_object(text.encode("utf-8", "replace")))
        found.take("transformers_version")
        sampled = found.truth("do_sample")
        mine = {"max_tokens": found.take("max_new_tokens"), "seed": None}
        mine |= {name: found.take(name) for name in ("temperature", "top_p")}
        if not sampled:
            mine["temperature"] = 0
        found.refuse_rest(f"{place}.")
        for name, value in mine.items():
            if value is not None:
                self.left.setdefault(name, value)

    def refuse_rest(self, place: str = "") -> None:
        """Refuse what nobody has read."""
        for name in self.left:
            raise ApiError(
                f"Unrecognized request argument supplied: {place}{quoted(name)[1:-1]}", code="unknown_parameter"
            )


def _stop(value) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise _of_type("stop", "a string or an array of strings, none of them empty", value)
    if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP_CHARACTERS for stop in stops):
        raise ApiError(
            f"stop: expected at most {MAX_STOPS} strings of at most {MAX_STOP_CHARACTERS} characters.",
            param="stop",
            code="invalid_value",
        )
    return tuple(_text(stop, "stop") for stop in stops)


def _with_usage(options, stream) -> bool:
    if options is None:
        return False
    if not stream:
        raise ApiError("stream_options is only allowed when stream is true.", param="stream_options")
    if not isinstance(options, dict):
        raise _of_type("stream_options", "an object", options)
    fields = _Fields(options)
    with_usage = fields.truth("include_usage")
    if fields.take("include_obfuscation"):
        raise ApiError(
            "stream_options.include_obfuscation is not supported by this server; leave it out.",
            param="stream_options.include_obfuscation",
            code="unsupported_parameter",
        )
    fields.refuse_rest("stream_options.")
    return with_usage


class _Reader:
    """Reads the messages of one request, and what its pictures are."""

    def __init__(self, settings: ServingSettings):
        self.settings = settings
        self.pictures: list[dict[str, Any]] = []
        self.urls: list[tuple[dict[str, Any], str]] = []

    def messages(self, found: Any) -> list[dict[str, Any]]:
        if not isinstance(found, list) or not found:
            raise _of_type("messages", "an array of at least one message", found)
        messages = [self._message(message, f"messages[{number}]") for number, message in enumerate(found)]
        self._check_text([part for message in messages for part in message["content"]])
        if len(self.pictures) > self.settings.max_images:
            raise ApiError(
                f"found {len(self.pictures)} images; this server takes at most {self.settings.max_images} a request.",
                param="messages",
                code="too_many_images",
            )
        room, until = self.settings.max_body_mb * 1e6, time.monotonic() + self.settings.body_seconds
        for picture, url in self.urls:
            if time.monotonic() > until:
                raise ApiError(
                    f"the images at URLs were not there within {self.settings.body_seconds:g} seconds.",
                    408,
                    param=picture["path"],
                    code="request_timeout",
                )
            picture["bytes"] = self._fetched(url, picture["path"])
            room -= len(picture["bytes"])
            if room < 0:
                raise ApiError(
                    f"the images at URLs have more than {self.settings.max_body_mb:g} MB together.",
                    param=picture["path"],
                    code="request_too_large",
                )
        self._check_sizes()
        return messages

    def _check_text(self, parts) -> None:
        """Refuse what would take the model's thread for minutes only to be too long."""
        characters = sum(len(part["text"]) for part in parts if part["type"] == "text")
        for count, most, what in (
            (len(parts), MAX_PARTS, "texts and images"),
            (characters, self.settings.max_characters, "characters"),
        ):
            if count > most:
                raise ApiError(
                    f"the messages have {count:,} {what}; this server takes at most {most:,} a request.",
                    413,
                    param="messages",
                    code="request_too_large",
                )

    def _message(self, found, place):
        if not isinstance(found, dict):
            raise _of_type(place, "an object", found)
        fields = _Fields({name: value for name, value in found.items() if value != []})  # as clients give back answers
        role, content = fields.take("role"), fields.take("content")
        if role == "developer":  # what the API calls the system's message today
            role = "system"
        if role not in ("system", "user", "assistant"):
            raise ApiError(
                f"Invalid value for {place}.role: {quoted(role)}; expected system, developer, user or assistant.",
                param=f"{place}.role",
                code="invalid_value",
            )
        for name in fields.left:
            raise ApiError(
                f"{place}.{quoted(name)[1:-1]} is not supported by this server; leave it out.",
                param=place,
                code="unsupported_parameter",
            )
        place = f"{place}.content"
        if isinstance(content, str):
            parts = [{"type": "text", "text": _text(content, place)}]
        elif isinstance(content, list) and content:
            parts = [self._part(part, f"{place}[{number}]", role) for number, part in enumerate(content)]
        else:
            raise _of_type(place, "a string or an array of parts", content)
        return {"role": role, "content": parts}

    def _part(self, found, place, role):
        if not isinstance(found, dict):
            raise _of_type(place, "an object", found)
        fields = _Fields(found)
        kind = fields.take("type")
        if kind == "text":
            text = fields.take("text")
            if not isinstance(text, str):
                raise _of_type(f"{place}.text", "a string", text)
            part: dict[str, Any] = {"type": "text", "text": _text(text, f"{place}.text")}
        elif kind == "image_url" and role == "user":
            part = {"type": "image", "image": self._picture(fields.take("image_url"), f"{place}.image_url")}
        else:
            expected = "text or image_url" if role == "user" else f"text, in a message of the {role}"
            raise ApiError(
                f"Invalid value for {place}.type: {quoted(kind)}; expected {expected}.",
                param=f"{place}.type",
                code="invalid_value",
            )
        fields.refuse_rest(f"{place}.")
        return part

    def _picture(self, found, place):
        if isinstance(found, dict):
            fields = _Fields(found)
            url, detail = fields.take("url"), fields.take("detail")
            if detail not in (None, "auto", "high"):  # an image is always read as finely as the model can
                raise ApiError(
                    f"{place}.detail: {quoted(detail)} is not supported by this server; leave it out.",
                    param=f"{place}.detail",
                    code="unsupported_parameter",
                )
            fields.refuse_rest(f"{place}.")
        else:
            url = found
        if not isinstance(url, str):
            raise _of_type(f"{place}.url", "a string", url)
        picture: dict[str, Any] = {"bytes": b"", "path": place}
        if head := _DATA_URL.match(url):
            try:
                picture["bytes"] = base64.b64decode(url[head.end() :], validate=True)
            except (binascii.Error, ValueError):
                raise _bad_image(place, "its base64 is broken") from None
        elif _WEB_URL.match(url) and self.settings.allow_urls:
            self.urls.append((picture, url))
        else:
            expected = "data:image/...;base64,..."
            if self.settings.allow_urls:
                expected += ", or an http or https URL"
            elif _WEB_URL.match(url):
                expected += "; this server fetches no URLs (--allow_urls)"
            raise _bad_image(place, f"{quoted(url)} is not allowed; expected {expected}")
        self.pictures.append(picture)
        return picture

    def _fetched(self, url, place):
        try:
            return fetch(_text(url, place))
        except NotFetched as error:
            raise _bad_image(place, f"{quoted(url)} could not be fetched ({error})") from None

    def _check_sizes(self) -> None:
        """Refuse pictures that are none, or too large together, before any pixel is decoded."""
        pixels = 0
        for picture in self.pictures:
            try:
                height, width = image_size(picture)
            except BadImage as error:
                raise bad_image(error) from None
            pixels += height * width
            if pixels > self.settings.max_megapixels * 1e6:
                raise ApiError(
                    f"the images up to {picture['path']} have {pixels / 1e6:,.1f} megapixels; this server takes at "
                    f"most {self.settings.max_megapixels:g} a request.",
                    param=picture["path"],
                    code="image_too_large",
                )


def bad_image(error: BadImage) -> ApiError:
    """The API's error for a picture that cannot be had; its message begins with the place in the request."""
    return ApiError(str(error).partition(";")[0], param=str(error).partition(":")[0], code="invalid_image")


def _bad_image(place, reason):
    return ApiError(f"{place}: {reason}", param=place, code="invalid_image")


def _text(text: str, place: str) -> str:
    """A text that can be encoded, which halves of characters cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(f"{place}: found half of a UTF-16 pair, which is no character.", param=place) from None
    return text


def _of_type(place: str, expected: str, found: Any) -> ApiError:
    return ApiError(
        f"Invalid type for {place}: expected {expected}, found {_kind(found)}.", param=place, code="invalid_type"
    )


def _kind(value) -> str:
    return _KINDS.get(type(value), "nothing")


_KINDS = {
    bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "an array", dict: "an object",
}  # fmt: skip


def quoted(value: Any, most: int = 100) -> str:
    """A value of a client's as it can stand in a message: ASCII, and short."""
    text = json.dumps(value)
    return text if len(text) <= most else f'{text[: most - 4]}..."'


__all__ = ["ChatRequest", "bad_image", "check_model", "quoted", "read_object", "read_request"]
