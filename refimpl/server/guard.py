"""What stands before the routes: who may ask, how much and how slowly. Pure ASGI, so that it sees every byte.

A page of another site, open in the same browser, is kept out three ways: a server on loopback answers only to
the names of loopback (a name that was pointed here is another one), a POST must be JSON (which a browser asks
leave for first), and that leave is not given (CORS is off).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from refimpl.server.asked import Wrong

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
LOOPBACK = ("127.0.0.1", "localhost", "::1")
OPEN = ("/", "/page.js", "/page.css", "/health")  # what may be had without a key


@dataclass(frozen=True)
class Limits:
    """Limits of one request: bytes of its body, seconds for all of it, and seconds that a piece of the answer
    may wait for a reader.
    """

    body_bytes: int = 4 << 20
    body_seconds: float = 30.0
    reader_seconds: float = 60.0


class Gone(Exception):
    """The client does not read, or has left."""


class Guard:
    """Wraps the app. Sets `scope["state"]["owner"]`: a word for who asks, which caches are kept apart by."""

    def __init__(self, app: Any, keys: tuple[str, ...], loopback: bool, limits: Limits):
        self.app, self.loopback, self.limits = app, loopback, limits
        self.keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        begun = False

        async def patient(message: MutableMapping[str, Any]) -> None:
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start":
                number = b"req_" + secrets.token_hex(12).encode()
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", number)]
            try:
                async with asyncio.timeout(self.limits.reader_seconds):
                    await send(message)
            except TimeoutError:
                raise Gone from None

        try:
            headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
            scope.setdefault("state", {})["owner"] = self._admit(scope, headers)
            scope["state"]["limits"] = self.limits
            await self.app(scope, receive, patient)
        except Gone:
            pass
        except Wrong as wrong:
            if not begun:
                with suppress(Gone):
                    await drain(receive, self.limits)
                    await answer(wrong, patient)

    def _admit(self, scope: Scope, headers: dict[str, str]) -> str:
        """The word for who asks. Wrong 401, 403, 413 or 415."""
        if self.loopback and _name(headers.get("host", "")) not in LOOPBACK:
            raise Wrong(403, "this server answers to localhost only", None, "host_not_allowed")
        path, method = scope["path"], scope["method"]
        if method == "POST":
            if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
                raise Wrong(415, "the body must be sent as content-type application/json")
            length = headers.get("content-length", "0")
            if not length.isdecimal() or len(length) > 18 or int(length) > self.limits.body_bytes:
                raise Wrong(
                    413, f"the body is larger than {self.limits.body_bytes} bytes", None, "body_too_large"
                )
        given = _bearer(headers.get("authorization", ""))
        # Every key is compared, so that the time tells nothing.
        known = not self.keys or max([hmac.compare_digest(given, key) for key in self.keys])
        if not known and path not in OPEN and method != "OPTIONS":
            raise Wrong(401, "an API key is needed: Authorization: Bearer KEY", None, "invalid_api_key")
        client = (scope.get("client") or ("", 0))[0]
        return hashlib.sha256(client.encode() + b"\n" + (given if self.keys else b"")).hexdigest()


def _bearer(header: str) -> bytes:
    word, _, key = header.partition(" ")
    return key.strip().encode("latin-1", "replace") if word.lower() == "bearer" else b""


def _name(host: str) -> str:
    """The name of a Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host


async def read_body(receive: Receive, limits: Limits) -> bytes:
    """The whole body. Wrong 413 when it is too large, 408 when it does not come in time; Gone when the client
    leaves before its end.
    """
    found = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                found += message.get("body", b"")
                if len(found) > limits.body_bytes:
                    break
                if not message.get("more_body"):
                    return bytes(found)
    except TimeoutError:
        raise Wrong(408, f"the body did not come within {limits.body_seconds:g} s") from None
    await drain(receive, limits)
    raise Wrong(413, f"the body is larger than {limits.body_bytes} bytes", None, "body_too_large")


async def drain(receive: Receive, limits: Limits) -> None:
    """Read on for a moment what is refused: a client that still writes when the connection is closed sees a
    reset and not the reason.
    """
    read = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(min(1.0, limits.body_seconds)):
            while read < 4 * limits.body_bytes:
                message = await receive()
                read += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return


async def answer(wrong: Wrong, send: Send) -> None:
    """An error as a response."""
    body = json.dumps(wrong.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if wrong.status in (408, 413):  # the rest of the body is not read
        headers.append((b"connection", b"close"))
    if wrong.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": wrong.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
