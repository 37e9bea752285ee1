"""The web server of ``mmljax demo``: one page, a search, and pictures of the gallery by row number.

=========================  ===================================================================
``GET /``                  the page, ``demo.html``, which loads nothing from elsewhere
``GET /facts``             what the page shows of run and gallery
``POST /search``           the bytes of an image file; answers as JSON, or 400, 413, 415 with
                           one line of text
``GET /images/ROW``        a picture of the gallery's image
=========================  ===================================================================

A request whose ``Host`` is none of the server's names gets 400: a page of another site that lets
its own name point here (DNS rebinding) reads nothing. A page of another site cannot post an image
type without asking first, which is never answered.
"""

from __future__ import annotations

import base64
import hashlib
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

from mmljax.data.decoding import KINDS
from mmljax.errors import UserError
from mmljax.inference.demo import FORMATS, MAX_BYTES, Demo, Refused

LOOPBACK = ("127.0.0.1", "localhost", "::1")
TYPES = tuple(f"image/{name.lower()}" for name in FORMATS)


def make_app(demo: Demo, *, names: Sequence[str] = LOOPBACK) -> Any:
    """The Starlette application.

    Args:
      demo: what answers.
      names: by which it may be called.
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    page = resources.files("mmljax.inference").joinpath("demo.html").read_text(encoding="utf-8")
    headers = security_headers(page)

    async def guard(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        if host_name(request.headers.get("host", "")) in names:
            response = await go_on(request)
        else:
            response = PlainTextResponse("this is not the name of this server", 400)
        response.headers.update(headers)
        return response

    async def show_page(request: Request) -> Response:
        return HTMLResponse(page)

    async def no_icon(request: Request) -> Response:
        return Response(status_code=204)

    async def facts(request: Request) -> Response:
        return JSONResponse(demo.facts)

    async def find(request: Request) -> Response:
        return JSONResponse(await _refusable(demo.answer, await _photograph(request)))

    async def picture(request: Request) -> Response:
        found = await _refusable(demo.picture, _row(request.path_params["row"]))
        return Response(found, media_type="image/webp")

    routes = [
        Route("/", show_page),
        Route("/favicon.ico", no_icon),
        Route("/facts", facts),
        Route("/search", find, methods=["POST"]),
        Route("/images/{row}", picture),
    ]
    return Starlette(routes=routes, middleware=[Middleware(BaseHTTPMiddleware, dispatch=guard)])


async def _photograph(request: Any) -> bytes:
    """The body of a request, read no further than its limit."""
    from starlette.exceptions import HTTPException

    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in TYPES:
        raise HTTPException(415, f"send a {KINDS} file")
    photograph = bytearray()
    async for part in request.stream():
        photograph += part
        if len(photograph) > MAX_BYTES:
            raise HTTPException(413, f"this file is larger than {MAX_BYTES // 2**20} MiB")
    return bytes(photograph)


def _row(text: str) -> int:
    from starlette.exceptions import HTTPException

    if not re.fullmatch("[0-9]{1,9}", text):
        raise HTTPException(404, "images have row numbers")
    return int(text)


async def _refusable(function: Callable[[Any], Any], argument: Any) -> Any:
    """What a function of :class:`Demo` returns, in a thread; what it refuses is a response."""
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException

    try:
        return await run_in_threadpool(function, argument)
    except Refused as error:
        raise HTTPException(error.status, str(error)) from error


def host_name(header: str) -> str | None:
    """The name in a ``Host`` header, in lower case and without port; None if there is none."""
    try:
        found = urlsplit(f"//{header}")
        return found.hostname if found.netloc == header and "@" not in header else None
    except ValueError:
        return None


def security_headers(page: str) -> dict[str, str]:
    """Of every response: only the page's own script and style run, and nothing is loaded."""

    def digest(tag: str) -> str:
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    policy = {
        "default-src": "'none'",
        "script-src": digest("script"),
        "style-src": digest("style"),
        "img-src": "'self' blob:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{key} {value}" for key, value in policy.items()),
        "Cross-Origin-Resource-Policy": "same-origin",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an address of this machine.

    Args:
      host: a name or address; not that of all addresses, which has no name to check.
      port: 0 takes one that is free.

    Raises:
      UserError: if the address is not this machine's, or the port is in use.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if address[0] in ("0.0.0.0", "::"):
            raise UserError(
                f"--host={host} is every address; name the one by which others reach this machine"
            )
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"--host={host} --port={port} cannot be served ({getattr(error, 'strerror', error)}); "
            "name another --port, or an address of this machine"
        ) from error


def address_of(host: str, listening: socket.socket) -> str:
    """The address of the page."""
    port = listening.getsockname()[1]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def make_server(demo: Demo, *, host: str) -> Any:
    """A ``uvicorn.Server``, whose ``run(sockets=[listening])`` answers until it is interrupted."""
    import uvicorn

    app = make_app(demo, names=(*LOOPBACK, host.lower()))
    return uvicorn.Server(
        uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none")
    )
