"""The socket: uvicorn, with patience that ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from refimpl.server.asked import Wrong

HEADER_SECONDS = 10.0  # until a request's headers are complete
CONNECTIONS = 512  # at once; beyond, 503


class Patient(H11Protocol):
    """uvicorn's protocol, which by itself waits for ever for the second half of a header, and answers in
    plain text to what is no HTTP.
    """

    header_seconds = HEADER_SECONDS
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client is there; its first header is due."""
        super().connection_made(transport)
        self._watch()
        if len(self.connections) > CONNECTIONS:
            self._refuse(503, "too many connections: try again", [("retry-after", "5")])

    def data_received(self, data: bytes) -> None:
        """Bytes came: perhaps the end of a header, perhaps the beginning of one."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio calls this when the client has gone: nothing is left to watch."""
        super().connection_lost(exc)
        self._unwatch()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch()
        elif self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(self.header_seconds, self._late)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is refused as all else is, in one JSON object."""
        self._refuse(400, msg)

    def _refuse(self, status: int, message: str, more: Sequence[tuple[str, str]] = ()) -> None:
        body = json.dumps(Wrong(status, message).body()).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body)))]
        start = h11.Response(status_code=status, headers=[*headers, ("connection", "close"), *more])
        try:
            for event in (start, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:  # an answer is under way already
            pass
        if self.cycle is not None:  # whoever still answers this request speaks to nobody
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()


def config(app: Any, host: str, port: int) -> uvicorn.Config:
    """How uvicorn is to run: quiet, alone, and without headers that tell versions."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http=Patient,
        ws="none",
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=64 << 10,
    )
