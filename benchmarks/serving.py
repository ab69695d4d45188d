"""Clients of a server at once: how long each waits for the first word and the last, and what the server gives in all.

    python -m inference_vlm.serve outputs/shapes/sft &
    python benchmarks/serving.py --clients 50 --each 2

Every client asks about a picture of its own, streamed, and asks again when it has the answer. What failed is counted.
`--beside 500` has an answer of as many tokens written meanwhile, which a model gives that has no end token.
"""

import argparse
import base64
import io
import json
import statistics
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from PIL import Image


class Took(NamedTuple):
    """Seconds to the first word and to the end, tokens that were written, and what went wrong."""

    first: float
    whole: float
    tokens: int
    error: str | None = None


def picture(number: int) -> str:
    """A picture that no other client sends."""
    held = io.BytesIO()
    Image.new("RGB", (224, 224), (number * 37 % 256, number * 91 % 256, number * 53 % 256)).save(held, "PNG")
    return f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}"


def ask(url: str, body: dict, begun: threading.Event | None = None) -> Took:
    """One answer, as it comes; `begun` is set at its first word."""
    started, first, tokens = time.perf_counter(), None, 0
    try:
        request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=600) as response:
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise OSError(chunk["error"]["message"])
                if chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                    first = first or time.perf_counter() - started
                    if begun is not None:
                        begun.set()
                tokens = (chunk["usage"] or {}).get("completion_tokens", tokens)
    except OSError as error:
        return Took(0.0, 0.0, 0, str(error))
    whole = time.perf_counter() - started
    return Took(first or whole, whole, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--each", type=int, default=2, help="requests of a client, one after the other")
    parser.add_argument("--max_tokens", type=int, default=16)
    parser.add_argument("--beside", type=int, default=0, help="tokens of an answer that is being written all the while")
    parser.add_argument("--question", default="What is at the top left?")
    args = parser.parse_args()
    with urllib.request.urlopen(f"{args.url}/v1/models") as response:
        model = json.load(response)["data"][0]["id"]

    def request(client: int, tokens: int) -> dict:
        content = [
            {"type": "image_url", "image_url": {"url": picture(client)}},
            {"type": "text", "text": args.question},
        ]
        body = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0, "stream": True}
        return body | {"max_tokens": tokens, "stream_options": {"include_usage": True}}

    def talk(client: int) -> list[Took]:
        return [ask(args.url, request(client, args.max_tokens)) for _ in range(args.each)]

    begun = threading.Event()
    with ThreadPoolExecutor(args.clients + 1) as clients:
        beside = clients.submit(ask, args.url, request(args.clients, args.beside), begun) if args.beside else None
        if beside is not None:
            begun.wait(60)
        started = time.perf_counter()
        took = [one for of_client in clients.map(talk, range(args.clients)) for one in of_client]
        seconds = time.perf_counter() - started
        was_written = beside is not None and not beside.done()
    if beside is not None:
        long = beside.result()
        when = "after" if was_written else "before"
        print(f"beside one of {long.tokens} tokens, which took {long.whole:.1f} s and ended {when} the others")
    well = [one for one in took if one.error is None]
    print(f"{len(took)} requests of {args.clients} clients in {seconds:.1f} s: {len(took) - len(well)} failed")
    for error in sorted({one.error for one in took if one.error is not None}):
        print(f"  {error}")
    if len(well) > 1:
        tokens = sum(one.tokens for one in well)
        each = tokens / len(well)
        print(f"{len(well) / seconds:.1f} answers/s, {tokens / seconds:.0f} tokens/s, {each:.1f} tokens an answer")
        for name in ("first", "whole"):
            values = sorted(getattr(one, name) for one in well)
            high = statistics.quantiles(values, n=20)[-1]
            print(f"seconds, {name}: median {statistics.median(values):.2f}, 95 % {high:.2f}, most {values[-1]:.2f}")


if __name__ == "__main__":
    main()
