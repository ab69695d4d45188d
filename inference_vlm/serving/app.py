"""OpenAI's chat completions for one model, as an app that any ASGI server runs.

    app = create_app(Answerer.load("outputs/shapes/sft"), ServingSettings("sft"))

What is special: whatever can be wrong with a request is found before its first token, so that an answer which has begun
is an answer. One in a stream and one in a piece are the same events, told at once or together.
"""

import asyncio
import contextlib
import functools
import json
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from typing import Any
from weakref import WeakValueDictionary

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from .bodies import Bodies
from .chat_page import add_page
from .chat_request import ChatRequest, check_model, quoted, read_object, read_request
from .completing import Begun, Completing, Ended
from .errors import ApiError
from .guard import Guard
from .settings import ServingSettings
from .worker import Job, Worker


READERS = 4
"""Threads that read requests, and fetch the pictures that they name."""

READ = ["GET", "HEAD"]
"""How what only tells something is asked; those that look whether a server is there often ask for its head alone."""

SEND_SECONDS = 30
"""How long a client may go on reading a stream that has ended."""


def create_app(
    answerer: Any, settings: ServingSettings, examples: list[dict[str, Any]] | None = None, is_captioner: bool = False
) -> FastAPI:
    """
    The app.

    Args:
        answerer: an `Answerer`.
        settings: what is allowed.
        examples: questions that a page may offer; `/info` gives them.
        is_captioner: whether it was trained on captions alone, as a page has to say.
    """
    service = Service(answerer, settings, examples or [], is_captioner)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        service.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    app.add_middleware(Guard, settings=settings)
    if settings.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allow_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HTTPException, _not_here)
    app.add_exception_handler(Exception, _failed)
    app.add_api_route("/v1/chat/completions", service.complete, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", service.models, methods=READ)
    app.add_api_route("/v1/models/{name:path}", service.model, methods=READ)
    app.add_api_route("/load_model", service.load_model, methods=["POST"], response_model=None)
    app.add_api_route("/info", service.info, methods=READ)
    app.add_api_route("/health", service.health, methods=READ, response_model=None)
    add_page(app)
    return app


async def _refused(request, error) -> Response:
    return error.response()


async def _not_here(request, error) -> Response:
    what = f"{request.method} {quoted(request.url.path)[1:-1]}"
    message = f"Invalid URL ({what})." if error.status_code == 404 else f"{what}: {error.detail}."
    response = ApiError(message, error.status_code, code="unknown_url").response()
    response.headers.update(error.headers or {})  # which methods there are
    return response


async def _failed(request, error) -> Response:
    return ApiError("The server had an error while processing your request.", 500, code="server_error").response()


class Service:
    """What the routes of one app have in common."""

    def __init__(self, answerer: Any, settings: ServingSettings, examples: list[dict[str, Any]], is_captioner: bool):
        self.answerer, self.settings = answerer, settings
        self.examples, self.is_captioner = examples, is_captioner
        self.bodies = Bodies(settings)
        self.completing = Completing(answerer, settings)
        self.keeper: str | None = answerer.turns.share(settings.at_once)
        """What of the model has one answer written at a time, whatever the settings say."""
        self.worker = Worker(answerer.turns.at_once)
        self.readers = ThreadPoolExecutor(READERS, "requests")
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # of each client, to be read
        self.since = int(time.time())

    def close(self) -> None:
        """End what is being answered."""
        self.worker.close()
        self.readers.shutdown(wait=False, cancel_futures=True)

    def _card(self) -> dict[str, Any]:
        card = {"id": self.settings.name, "object": "model", "created": self.since, "owned_by": "duet"}
        return card | {"max_model_len": self.answerer.max_positions}

    async def models(self) -> dict[str, Any]:
        """`GET /v1/models`: the one model, with the positions that it has (null: any number)."""
        return {"object": "list", "data": [self._card()]}

    async def model(self, name: str) -> dict[str, Any]:
        """`GET /v1/models/NAME`."""
        check_model(name, self.settings)
        return self._card()

    async def health(self) -> Response:
        """`GET /health`: 200 as long as requests are answered."""
        alive = self.worker.is_alive
        return JSONResponse({"status": "ok" if alive else "unhealthy"}, 200 if alive else 503)

    async def info(self) -> dict[str, Any]:
        """`GET /info`: what a page has to know."""
        settings = self.settings
        return {
            "model": settings.name,
            "positions": self.answerer.max_positions,
            "limits": {
                "max_tokens": settings.max_new_tokens,
                "images": settings.max_images,
                "megapixels": settings.max_megapixels,
                "body_bytes": self.bodies.most,
                "waiting": settings.max_waiting,
                "at_once": self.answerer.turns.at_once,
                "seconds": settings.request_seconds,
                "urls": settings.allow_urls,
            },
            "waiting": self.worker.waiting,
            "defaults": self.completing.defaults(),
            "examples": self.examples,
            "captions": self.is_captioner,
        }

    async def load_model(self, request: Request) -> Response:
        """`POST /load_model`, which `transformers chat` begins with: the model is there, and no other ever is."""
        with self.bodies.holding(_client(request)) as hold:
            asked = read_object(await self.bodies.read(request, hold))
        check_model(asked.get("model"), self.settings)
        ready = {"status": "ready", "model": self.settings.name, "cached": True}
        return Response(_event(ready), media_type="text/event-stream")

    async def complete(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        until = time.monotonic() + self.settings.request_seconds
        with ExitStack() as stack:
            hold = stack.enter_context(self.bodies.holding(_client(request)))
            try:
                body = await self.bodies.read(request, hold)
            except ClientDisconnect:
                return Response(status_code=_GONE)
            asked = await self._read(body, _client(request))
            hold.add(asked.size - len(body))
            del body
            job = Job(functools.partial(self._answer, asked), _client(request), until)
            self.worker.add(job, self.settings.max_waiting, self._full())
            stack.callback(self.worker.drop, job)
            begun = await _unless_gone(request, self._begun(job))
            if begun is None:
                return Response(status_code=_GONE)
            answer = _Answer(self.settings.name, asked, begun)
            if asked.stream:
                return _Stream(_events(job, answer), stack.pop_all(), until + SEND_SECONDS)
            whole = await _unless_gone(request, answer.whole(job))
            return Response(status_code=_GONE) if whole is None else JSONResponse(whole)

    def _answer(self, asked: ChatRequest, job: Job) -> None:
        self.completing.run(asked, job.client, job.tell, job)

    async def _read(self, body: bytes, client: str) -> ChatRequest:
        """The request; one of a client's at a time, so that who names slow URLs leaves readers for the others."""
        turn = self._turns.setdefault(client, asyncio.Lock())
        async with turn:
            return await asyncio.get_running_loop().run_in_executor(self.readers, read_request, body, self.settings)

    def _full(self) -> ApiError:
        return ApiError(
            f"{self.settings.max_waiting} requests are waiting already; please try again later.",
            503,
            code="server_overloaded",
            retry_after=5,
        )

    async def _begun(self, job: Job) -> Begun:
        try:
            async with asyncio.timeout(job.until - time.monotonic()):
                return await job.next()
        except TimeoutError:
            raise ApiError(
                f"the request did not get its turn within {self.settings.request_seconds:g} seconds; please try again "
                "later.",
                503,
                code="server_overloaded",
                retry_after=30,
            ) from None


_GONE = 499
"""The status of a response that nobody reads any more, as other servers write it into their logs."""


def _client(request: Request) -> str:
    return request.client.host if request.client else ""


async def _unless_gone(request: Request, wanted) -> Any:
    """What comes of something, or `None` when the client goes away first."""
    task = asyncio.ensure_future(wanted)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Answer:
    """An answer in the words of the API."""

    def __init__(self, name: str, asked: ChatRequest, begun: Begun):
        self.asked, self.begun = asked, begun
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}

    def chunk(self, delta: dict[str, str], finish: str | None = None) -> bytes:
        """A piece of a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self._chunk([choice], None)

    def usage_chunk(self, ended: Ended) -> bytes:
        """The last piece of a stream that ends with numbers."""
        return self._chunk([], self.usage(ended))

    def _chunk(self, choices, usage) -> bytes:
        chunk = {**self.head, "object": "chat.completion.chunk", "choices": choices}
        return _event(chunk | {"usage": usage} if self.asked.with_usage else chunk)

    def usage(self, ended: Ended) -> dict[str, Any]:
        """Tokens that were read and written, those of images and those of the cache among them."""
        return {
            "prompt_tokens": self.begun.prompt_tokens,
            "completion_tokens": ended.completion_tokens,
            "total_tokens": self.begun.prompt_tokens + ended.completion_tokens,
            "prompt_tokens_details": {
                "image_tokens": self.begun.image_tokens,
                "cached_tokens": ended.cached_tokens,
            },
        }

    async def whole(self, job: Job) -> dict[str, Any]:
        """The answer in a piece."""
        pieces = []
        while not isinstance(event := await job.next(), Ended):
            pieces.append(event)
        message = {"role": "assistant", "content": "".join(pieces), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": event.reason}
        return {**self.head, "object": "chat.completion", "choices": [choice], "usage": self.usage(event)}


class _Stream(StreamingResponse):
    """Events that are sent as they come; in whatever way it ends, what is held for it is let go."""

    def __init__(self, events: AsyncIterator[bytes], held: ExitStack, until: float):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self.held, self.until = held, until

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.held, contextlib.suppress(TimeoutError):  # then nobody reads it, and the connection is closed
            async with asyncio.timeout(self.until - time.monotonic()):
                await super().__call__(scope, receive, send)


async def _events(job: Job, answer: _Answer) -> AsyncIterator[bytes]:
    """An answer as it is written."""
    yield answer.chunk({"role": "assistant", "content": ""})
    try:
        while not isinstance(event := await job.next(), Ended):
            yield answer.chunk({"content": event})
    except ApiError as error:  # the status is sent, so the error comes as an event
        yield _event(error.body)
        return
    yield answer.chunk({}, event.reason)
    if answer.asked.with_usage:
        yield answer.usage_chunk(event)
    yield b"data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


__all__ = ["Service", "create_app"]
