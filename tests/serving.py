"""A server on a free port of this machine, for as long as a test needs it."""

import base64
import io
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from PIL import Image

from inference_vlm.serve import bound
from inference_vlm.serving.app import Service, create_app
from inference_vlm.serving.running import server_of
from inference_vlm.serving.settings import ServingSettings


class Server(NamedTuple):
    """Where a server is, and what runs there."""

    port: int
    service: Service

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def serving(answerer, examples=None, is_captioner=False, **settings) -> Iterator[Server]:
    """A server, which has ended when the test has."""
    with bound("127.0.0.1", 0) as place:
        app = create_app(answerer, ServingSettings(**{"name": "tiny", **settings}), examples, is_captioner)
        server = server_of(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
        thread.start()
        try:
            until = time.monotonic() + 20
            while not server.started and time.monotonic() < until:
                time.sleep(0.01)
            yield Server(place.getsockname()[1], app.state.service)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def ask(url: str, body=None, headers=None, method=None) -> tuple[int, dict]:
    """Status and JSON of a response; a body that is not bytes is sent as JSON."""
    content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, content, headers or {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def said(text: str, *images: Image.Image, role: str = "user") -> dict:
    """A message, as the API has it."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return {"role": role, "content": [*parts, {"type": "text", "text": text}] if images else text}


def data_url(image: Image.Image) -> str:
    """An image as it is sent."""
    held = io.BytesIO()
    image.save(held, "PNG")
    return f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}"


def until(true, seconds: float = 10) -> bool:
    """Whether something becomes true in time."""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()
