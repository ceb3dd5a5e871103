"""Who is let in to a served page: whoever has its address, from this machine, and from no other site's page."""

import secrets
from collections.abc import Collection

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from transcoders.errors import InputError

LARGEST_BODY = 2**20
"""Bytes of a request."""
_DO = "open the address that `circuitsae serve` printed."
_HEADERS = (
    (b"cache-control", b"no-store"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
)


class TooLargeError(InputError):
    """A request of more than `LARGEST_BODY` bytes."""


class Guard:
    """Refuses what comes without the token, under another name of this machine, or from another site's page.

    The token is the first part of the path. `hosts`: what the page's address may call this server (`127.0.0.1:8000`):
    any other name may be another site's, bound anew to this machine (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, *, token: str, hosts: Collection[str]) -> None:
        self._app, self._token, self._hosts = app, token, set(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # no page of ours opens a web socket
            await send({"type": "websocket.close", "code": 1008})
            return

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        refusal = self._refusal(Request(scope))
        app = self._app if refusal is None else JSONResponse({"error": refusal}, status_code=403)
        await app(scope, receive, marked)

    def _refusal(self, request: Request) -> str | None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if host not in self._hosts:
            return f"This server is not {host!r:.80}; open the address that `circuitsae serve` printed."
        if origin is not None and origin != f"http://{host}":
            return (
                f"A page of {origin!r:.80} may not ask this server; open the address that `circuitsae serve` printed."
            )
        if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return "Another site's page may not ask this server; open the address that `circuitsae serve` printed."
        given = request.url.path.split("/")[1] if request.url.path.startswith("/") else ""
        if not secrets.compare_digest(given.encode(), self._token.encode()):
            return f"The token in the address is missing or wrong; {_DO}"
        return None


async def body_of(request: Request) -> bytes:
    """What was sent. Raises `TooLargeError` before more of it is kept, and `InputError` for what is not called JSON."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise InputError("A request to this server is JSON; send it with the content type application/json.")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > LARGEST_BODY:
            raise TooLargeError(f"The request has more than {LARGEST_BODY:,} bytes; send less.")
        parts.append(part)
    return b"".join(parts)
