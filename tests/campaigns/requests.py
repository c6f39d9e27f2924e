"""Strangers' requests to the server, as bytes on a socket: whatever comes, it answers with JSON or closes,
never says status 500, and serves the next one.

Half of them are requests that a client might send, with a field of the wrong type or out of range; the rest
are torn, doubled, oversized or no HTTP.
"""

from __future__ import annotations

import json
import random
import socket
from collections import Counter
from pathlib import Path
from typing import Any

from refimpl.server.guard import Limits
from tests.campaigns import WHOLE, Part, Report
from tests.serving import served

SHORT, LONG = 300, 10_000
PATIENCE = 0.3  # seconds that the server waits for the rest of a torn request
FIRST = 300.0  # seconds for the first answer of all
SECONDS = 20.0  # that an answer may take; a server that hangs is found so
PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/v1/models/refimpl-tiny",
    "/v1/models/%2e%2e/%2e%2e/etc/passwd",
    "/health",
    "/metrics",
    "/",
    "/page.js",
    "/page/../../../../etc/passwd",
    "/..%2f..%2fetc/passwd",
    "//etc/passwd",
    "/%00",
    "/\xff",
    "/docs",
    "/openapi.json",
    "*",
    "http://example.org/",
    "/" + "a" * 5000,
)
METHODS = ("POST", "GET", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE", "CONNECT", "x")
FIELDS = (
    "model",
    "messages",
    "prompt",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "logprobs",
    "top_logprobs",
    "n",
    "tools",
    "tool_choice",
    "response_format",
    "frequency_penalty",
    "logit_bias",
    "user",
    "metadata",
    "prompt_cache_key",
    "experts",
    "chat_template_kwargs",
    "echo",
    "suffix",
    "best_of",
    "__proto__",
)
NUMBERS = (None, True, False, 0, 1, -1, 2, 5, 21, 1.5, 1e308, 2**31, 2**63, 2**64, -(2**63), 10**400)
TEXTS = ("", "a", "\ud800", "\0", "<｜User｜>", "a" * 3000, "🙂" * 500)
LISTS = ([], [[]], [0, 1, 2], [-1], [511], [512], [True], ["a"], ["a", "b"], [""])
OBJECTS = ({}, {"": 0}, {"type": "text"}, {"type": "json_object"}, {"include_usage": True})
ODD: tuple[Any, ...] = (
    *NUMBERS,
    *TEXTS,
    *LISTS,
    *OBJECTS,
    {"thinking": 1},
    {"messages": 1},
    {"bos_token": 1},
)
ROLES = ("user", "system", "assistant", "developer", "tool", "function", "", None, 3)


def run(cases: int, seed: int, folder: Path, part: Part = WHOLE) -> Report:
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    with served(limits=Limits(1 << 20, PATIENCE, 5), header_seconds=PATIENCE) as (port, server):
        _sick(port, FIRST)  # kernels may have to be compiled for it
        for i in part.share(range(cases)):
            rng = random.Random(f"requests/{seed}/{i}")
            raw = _request(rng)
            outcome, wrong = _send(port, raw, rng)
            outcomes[outcome] += 1
            if wrong:
                failures.append(f"case {i}: {wrong}: {raw[:300]!r}")
            if i % 25 == 0 and (sick := _sick(port)):
                failures.append(f"after case {i}: {sick}")
        if not server.engine.alive:
            failures.append("the engine's thread has ended")
    return Report(sum(outcomes.values()), failures, {"outcomes": outcomes}, {})


def _request(rng: random.Random) -> bytes:
    """A request, whole or damaged."""
    method, path = rng.choice(METHODS), rng.choice(PATHS)
    if rng.random() < 0.8:
        method, path = "POST", rng.choice(PATHS[:2])
    body = json.dumps(_body(rng, path)).encode()
    if rng.random() < 0.2:
        body = _damaged(rng, body)
    lines = [
        f"{method} {path} HTTP/1.{rng.choice('1110')}",
        f"host: {rng.choice(('localhost',) * 9 + ('evil.example',))}",
    ]
    kind = rng.choice(("application/json",) * 9 + ("text/plain",))
    lines += [f"content-type: {kind}", "connection: close"]
    shape = rng.random()
    if shape < 0.8:
        lines.append(f"content-length: {len(body)}")
    elif shape < 0.9:
        lines.append("transfer-encoding: chunked")
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    else:
        lines.append(
            f"content-length: {rng.choice(('-1', '1e3', '99999999999', '0', '5', '', 'x', '00012'))}"
        )
    if rng.random() < 0.1:
        lines.append(
            rng.choice(
                (
                    "x: " + "y" * 70000,
                    "authorization: Bearer \xff",
                    "cookie: \0",
                    "x",
                    ": y",
                    "expect: 100-continue",
                )
            )
        )
    raw = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body
    return _damaged(rng, raw) if rng.random() < 0.1 else raw


def _body(rng: random.Random, path: str) -> Any:
    if rng.random() < 0.03:
        return rng.choice(ODD)
    if rng.random() < 0.02:
        deep: Any = 0
        for _ in range(900):
            deep = [deep]
        return {"messages": deep}
    found: dict[str, Any] = {"max_tokens": rng.randint(1, 4), "stream": rng.random() < 0.3}
    messages = [
        {"role": rng.choice(ROLES[: rng.choice((2, 2, 2, 9))]), "content": "What is 2 + 2?"}
        for _ in range(rng.choice((1, 1, 2, 3)))
    ]
    if rng.random() < 0.2:
        rng.choice(messages)[rng.choice(("content", "name", "tool_calls", "reasoning_content"))] = rng.choice(
            ODD
        )  # type: ignore[assignment]
    fitting = ("prompt", "What") if path == "/v1/completions" else ("messages", messages)
    name, value = fitting if rng.random() < 0.9 else (rng.choice(FIELDS), messages)
    found[name] = value
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        found[rng.choice(FIELDS)] = rng.choice(ODD)
    return found


def _damaged(rng: random.Random, raw: bytes) -> bytes:
    """Cut, doubled or with bytes changed."""
    at = rng.randrange(len(raw) + 1)
    what = rng.randrange(4)
    if what == 0:
        return raw[:at]
    if what == 1:
        return raw + raw
    if what == 2:
        return raw[:at] + rng.randbytes(rng.randint(1, 20)) + raw[at:]
    return raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]


def _send(port: int, raw: bytes, rng: random.Random, seconds: float = SECONDS) -> tuple[str, str]:
    """(what came of it, what is wrong with that or "")."""
    with socket.create_connection(("127.0.0.1", port), seconds) as client:
        try:
            client.sendall(raw)
            if rng.random() < 0.1:
                return "left", ""  # a client that does not wait for its answer
            answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
        except TimeoutError:
            return "hung", "no answer in time"
        except OSError:  # closed while we still wrote: too large a request is not read to its end
            return "closed", ""
    return _judged(answer, raw)


def _judged(answer: bytes, raw: bytes) -> tuple[str, str]:
    if not answer:
        return "closed", ""
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1].decode("latin-1")
    if status.startswith("5") and status != "503":
        return status, f"status {status}"
    if b"root:" in answer:
        return status, "a file's contents"
    if status.startswith("4") and not raw.startswith(b"HEAD") and b"application/json" in head:
        try:
            if "message" not in json.loads(body.partition(b"HTTP/1.1")[0])["error"]:
                return status, "an error without a message"
        except (ValueError, KeyError, TypeError):
            return status, f"an error that is no JSON object: {body[:80]!r}"
    elif status.startswith("4") and not raw.startswith(b"HEAD"):
        return status, "an error that is no JSON"
    return status, ""


def _sick(port: int, seconds: float = SECONDS) -> str:
    """What is wrong with an ordinary request, "" for nothing."""
    body = json.dumps({"prompt": "What", "max_tokens": 2, "temperature": 0}).encode()
    lines = ("POST /v1/completions HTTP/1.1", "host: localhost", "content-type: application/json")
    head = "\r\n".join((*lines, f"content-length: {len(body)}", "connection: close", "", ""))
    outcome, wrong = _send(port, head.encode() + body, random.Random(1), seconds)
    return "" if outcome == "200" and not wrong else f"an ordinary request gave {outcome} {wrong}"
