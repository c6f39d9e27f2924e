"""The server in a thread of this process, for tests and campaigns."""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from refimpl import chat, serve
from refimpl.cli import Parser
from refimpl.server import listen
from refimpl.server.app import Server, make_app
from refimpl.server.guard import Limits


def make(**given) -> Server:
    """A server of the embedded model that listens nowhere yet."""
    parser = Parser("test", "")
    chat.add_model_flags(parser)
    args: argparse.Namespace = parser.parse_args(["--cpu_infer", "1"])
    return serve.make_server(chat.open_conversation(args), "refimpl-tiny", **given)


@contextmanager
def served(
    keys=(), limits: Limits | None = None, header_seconds: float = listen.HEADER_SECONDS, **given
) -> Iterator[tuple[int, Server]]:
    """(port, server) while it runs."""
    server = make(**given)
    app = make_app(server, keys, limits=limits)
    with serve.listen("127.0.0.1", 0) as sock:
        config = listen.config(app, "127.0.0.1", 0)
        config.http = type("Hasty", (listen.Patient,), {"header_seconds": header_seconds})
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        while not running.started:
            time.sleep(0.01)
        try:
            yield sock.getsockname()[1], server
        finally:
            running.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def settles(condition, seconds: float = 10.0) -> bool:
    """Whether it becomes true in time."""
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return bool(found)
