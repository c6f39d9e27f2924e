"""The routes: OpenAI's two completions, models, health, metrics, and the page."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from refimpl.errors import RefimplError
from refimpl.server import wire
from refimpl.server.answering import Delta, Served, Telling
from refimpl.server.asked import ChatRequest, Common, CompletionRequest, Wrong, parse
from refimpl.server.engine import Busy, End, Engine, Job, Token, Turn
from refimpl.server.guard import Gone, Guard, Limits, read_body
from refimpl.server.metrics import Metrics

PAGE = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
# The page may load its own two files and talk to this server, and nothing else: whatever a model says.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


@dataclass
class Answering:
    """A turn under way and where its tokens arrive."""

    asked: Common
    turn: Turn
    telling: Telling
    job: Job
    events: asyncio.Queue[Token | End]


class Server:
    """An engine and a model, spoken to by HTTP."""

    def __init__(self, engine: Engine, served: Served):
        self.engine, self.served, self.metrics = engine, served, Metrics(engine)
        # Templates and tokenizers of strangers may take their time: not in the thread that serves all others.
        # Tokens of a whole round are handed over at once: to wake the other thread for each of them costs
        # more than all else that is done about it.
        self._outbox: list[tuple[asyncio.AbstractEventLoop, asyncio.Queue, Token | End]] = []
        engine.flush = self._deliver
        self._texts = ThreadPoolExecutor(1, "texts")

    def _deliver(self) -> None:
        batch, self._outbox = self._outbox, []
        if batch:
            with suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                batch[0][0].call_soon_threadsafe(_put, batch)

    # --- turns ----------------------------------------------------------------------------------------------

    async def begin(self, request: Request, kind: type[Common]) -> Answering:
        """Read a request and stand in line. Wrong where it cannot be done, 503 included."""
        state = request.scope["state"]
        body = await read_body(request.receive, state["limits"])
        asked = parse(kind, body)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Token | End]()
        turn = await loop.run_in_executor(self._texts, self.served.turn, asked, state["owner"])
        if turn.experts and not self.engine.routes.possible:
            raise Wrong(400, "experts are known only where the model runs on the CPU", "experts")

        def emit(what: Token | End) -> None:
            self._outbox.append((loop, events, what))

        try:
            job = self.engine.submit(turn, emit)
        except Busy as busy:
            wrong = Wrong(503, "all places are taken and enough are waiting: try again", None, "busy")
            wrong.retry_after = busy.retry_after  # type: ignore[attr-defined]
            raise wrong from None
        except RefimplError as error:
            raise Wrong(400, error.what, None, error.code) from None
        chat = kind is ChatRequest
        return Answering(asked, turn, Telling(self.served.tokenizer, turn, asked.stops(), chat), job, events)

    async def deltas(self, a: Answering, ended: list[End]) -> AsyncIterator[list[Delta]]:
        """What has come since last time, until the end, which is put into `ended`. The job's place is free
        afterwards, however this ends.
        """
        try:
            while not ended:
                found = [await a.events.get()]
                while not a.events.empty():
                    found.append(a.events.get_nowait())
                told: list[Delta] = []
                for event in found:
                    if isinstance(event, Token):
                        told += a.telling.push(event)
                    else:
                        ended.append(event)
                if a.telling.finished and not ended:
                    ended.append(End("stop"))
                if ended:
                    told += a.telling.end()
                if told:
                    yield told
        finally:
            self.engine.cancel(a.job)
            self.metrics.turn(a.turn, a.telling.tokens, a.job)

    def usage(self, a: Answering) -> dict[str, Any]:
        """Tokens of a turn that is over."""
        return wire.usage(len(a.turn.prompt), a.telling.tokens, a.job.cached, a.telling.reasoning_tokens)

    async def whole(self, request: Request, a: Answering) -> Response:
        """The answer in one object; a client that leaves meanwhile ends it."""
        chat = isinstance(a.asked, ChatRequest)
        ended: list[End] = []
        found: list[Delta] = []

        async def collect() -> None:
            async for told in self.deltas(a, ended):
                found.extend(told)

        async def leave() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        tasks = [asyncio.create_task(collect()), asyncio.create_task(leave())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise Gone
            tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        reason = _reason(ended[0])
        return reply(wire.Wire(self.served, chat, False).whole(found, reason, self.usage(a)))

    async def stream(self, a: Answering) -> AsyncIterator[bytes]:
        """The answer as events."""
        chat = isinstance(a.asked, ChatRequest)
        w, ended = wire.Wire(self.served, chat, True), list[End]()
        if (first := w.first()) is not None:
            yield wire.sse(first)
        deltas = self.deltas(a, ended)
        try:
            async for told in deltas:
                yield b"".join(wire.sse(w.chunk(d)) for d in told)
            yield wire.sse(w.last(_reason(ended[0])))
            if a.asked.include_usage():
                yield wire.sse(w.final_usage(self.usage(a)))
        except Wrong as wrong:
            yield wire.sse(wrong.body())
        finally:
            await deltas.aclose()  # type: ignore[attr-defined] # the place is free at once, not when it is collected
        yield wire.DONE

    async def complete(self, request: Request, kind: type[Common]) -> Response:
        """One of the two endpoints."""
        a = await self.begin(request, kind)
        if not a.asked.stream:
            return await self.whole(request, a)
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return Streamed(self, a, headers)

    def models(self) -> list[dict[str, Any]]:
        """The list of models in the answer of /v1/models: the one that is served."""
        return [
            {
                "id": self.served.name,
                "object": "model",
                "created": 0,
                "owned_by": "refimpl",
                "context_length": self.served.context,
            }
        ]


def _put(batch: list[tuple[Any, asyncio.Queue, Token | End]]) -> None:
    for _, events, what in batch:
        events.put_nowait(what)


def reply(value: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An object as a response. All beyond ASCII is escaped: a half of a surrogate pair has no UTF-8."""
    return Response(json.dumps(value, allow_nan=False), status, headers, "application/json")


class Streamed(StreamingResponse):
    """A stream whose turn gives its place back even when its first byte was never asked for."""

    def __init__(self, server: Server, a: Answering, headers: dict[str, str]):
        super().__init__(server.stream(a), media_type="text/event-stream", headers=headers)
        self._server, self._answering = server, a

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._server.engine.cancel(self._answering.job)


def _reason(end: End) -> str:
    """`finish_reason`. Wrong 500 or 503 where the engine failed."""
    if end.reason == "error":
        error = end.error
        if isinstance(error, RefimplError) and error.code not in ("E7022",):
            raise Wrong(500, f"the model cannot go on: {error.what}", None, error.code)
        if isinstance(error, RefimplError | MemoryError):
            raise Wrong(503, "there is no memory left for this conversation", None, "out_of_memory")
        raise Wrong(500, "the engine failed; the server's log says how", None, "internal_error")
    if end.reason == "cancelled":
        raise Wrong(503, "the server is stopping", None, "stopping")
    return end.reason


def make_app(
    server: Server,
    keys: tuple[str, ...] = (),
    loopback: bool = True,
    cors: tuple[str, ...] = (),
    limits: Limits | None = None,
) -> Any:
    """The ASGI application that answers for `server`: routes, keys, limits and CORS."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        server.engine.close()

    # The interactive docs of fastapi load scripts from the network. A redirect to the path without its last
    # slash would be an answer that is no JSON, to a place that the request's own Host header names.
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)
    if cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    _routes(app, server)
    _errors(app, server)
    return Guard(app, keys, loopback, limits or Limits())


def _routes(app: FastAPI, server: Server) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await server.complete(request, ChatRequest)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await server.complete(request, CompletionRequest)

    @app.get("/v1/models")
    async def models() -> Response:
        return reply({"object": "list", "data": server.models()})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != server.served.name:
            raise Wrong(404, f"there is no model {name[:100]!r} here", "model", "model_not_found")
        return reply(server.models()[0])

    @app.get("/health")
    async def health() -> Response:
        alive = server.engine.alive
        return reply({"status": "ok" if alive else "the engine has ended"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    for path, (name, kind) in PAGE.items():
        body = resources.files("refimpl.server").joinpath("page", name).read_bytes()
        app.add_api_route(path, _page(body, kind), methods=["GET"])


def _page(body: bytes, kind: str) -> Any:
    headers = {
        "content-security-policy": POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }

    async def page() -> Response:
        return Response(body, media_type=kind, headers=headers)

    return page


def _errors(app: FastAPI, server: Server) -> None:
    @app.exception_handler(Wrong)
    async def wrong(request: Request, error: Wrong) -> Response:
        server.metrics.refusals.labels(str(error.status)).inc()
        headers = {}
        if error.status == 503:
            headers["retry-after"] = str(getattr(error, "retry_after", 5))
        if error.status in (408, 413):
            headers["connection"] = "close"
        return reply(error.body(), error.status, headers)

    @app.exception_handler(Gone)
    async def gone(request: Request, error: Gone) -> Response:
        return Response(status_code=400)  # to nobody

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: HTTPException) -> Response:
        found = Wrong(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}")
        return reply(found.body(), error.status_code, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return reply(Wrong(500, "the server failed; its log says how").body(), 500)
