"""The chat page at `/`: files that a browser runs as they are, and asks this server alone for all that it needs.

What is special: the page may load nothing from elsewhere and run nothing that is not a file of its own, by a policy
that the browser enforces; so what a model or a picture's name says can at worst be read.
"""

from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response


_FOLDER = Path(__file__).parent / "page"

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Add the page at `/`, and its files under `/page/`."""
    for file in sorted(_FOLDER.iterdir()):
        if file.suffix in _TYPES:
            place = "/" if file.name == "index.html" else f"/page/{file.name}"
            app.add_api_route(place, _giving(file), methods=["GET", "HEAD"], response_model=None)


def _giving(file: Path) -> Callable:
    content, kind = file.read_bytes(), f"{_TYPES[file.suffix]}; charset=utf-8"

    async def give() -> Response:
        return Response(content, headers=_HEADERS | {"Content-Type": kind})

    return give


__all__ = ["add_page"]
