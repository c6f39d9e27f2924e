"""Many clients at once against the server, beside the engine driven directly with the same turns.

    python -m refimpl.bench serve [--clients 64] [--rounds 3] [--threads N] [--json]

The server is a process of its own on loopback (`python -m refimpl.serve`, the embedded model), the clients
stream from this one. Directly: the same conversations in one process, one after another, without server or
threads. The two take turns, so that both see the same machine. Every answer is compared with the direct one.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import NamedTuple

from refimpl import ops
from refimpl.cli import Parser, integer, run, to_json
from refimpl.generate import Sampling, Session
from refimpl.loading.hub import embedded
from refimpl.loading.opening import open_model
from refimpl.talk.conversation import Conversation
from refimpl.text.template import ChatTemplate
from refimpl.text.tokenizer import Tokenizer

STARTING = 120  # seconds that the server may take to start


class Told(NamedTuple):
    """What one client got: the answer, its tokens, and seconds from the common start of each event."""

    text: str
    tokens: int
    times: list[float]


@dataclass
class Load:
    """Figures of all rounds. A gap is the longest time between two pieces of one client's answer."""

    clients: int
    tokens: int  # of one round
    direct_tokens_per_s: float
    served_tokens_per_s: float
    share: float
    right: int
    asked: int
    first_token_s: float  # the slowest client's
    longest_gap_s: float
    first_finished_s: float
    last_finished_s: float


def questions(count: int) -> list[str]:
    """Sums that the embedded model can do, all different."""
    return [f"What is {100 + 13 * i % 900} + {100 + 7 * i % 900}?" for i in range(count)]


def directly(asked: list[str], model: object, tokenizer: Tokenizer) -> tuple[list[Told], float]:
    """Each question in a conversation of its own, one after another."""
    template, found, start = ChatTemplate.open(tokenizer), [], time.perf_counter()
    banned = tokenizer.without_token(model.config.vocab_size)  # type: ignore[attr-defined]
    for text in asked:
        chat = Conversation(Session(model, banned), tokenizer, template, Sampling(), None)  # type: ignore[arg-type]
        for _ in chat.ask(text):
            pass
        assert chat.last is not None
        found.append(Told(chat.last.text, len(chat.last.token_ids), []))
    return found, time.perf_counter() - start


@contextmanager
def server(threads: int, clients: int) -> Iterator[int]:
    """The server as a process; the port it listens on."""
    command = [sys.executable, "-m", "refimpl.serve", "--port", "0", "--cpu_infer", str(threads)]
    child = subprocess.Popen([*command, "--parallel", str(clients)], stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    try:
        found = next(
            (m for line in child.stderr if (m := re.search(r"http://127\.0\.0\.1:(\d+)", line))), None
        )
        if found is None:
            raise SystemExit("the server did not start")
        yield int(found[1])
    finally:
        child.terminate()
        child.wait()
        child.stderr.close()


async def ask(port: int, text: str, start: float) -> Told:
    """One client: a streamed answer, read as it comes. Plain sockets, so that the clients cost little."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
    writer.write(head.encode() + b"content-type: application/json\r\nconnection: close\r\n\r\n" + body)
    said, tokens, times = "", 0, []
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        times.append(time.perf_counter() - start)
        value = json.loads(line[6:])
        for choice in value["choices"]:
            said += choice["delta"].get("content", "")
        tokens = value.get("usage", {}).get("completion_tokens", tokens)
    writer.close()
    return Told(said.strip(), tokens, times)


async def _all(port: int, asked: list[str]) -> tuple[list[Told], float]:
    start = time.perf_counter()
    found = await asyncio.gather(*(ask(port, text, start) for text in asked))
    return list(found), time.perf_counter() - start


def measure(clients: int, rounds: int, threads: int) -> Load:
    """Rounds of both, in turns. A first one of each is not counted: kernels are compiled in it."""
    ops.set_threads(threads)
    asked, model = questions(clients), open_model(None, threads=threads)
    tokenizer = Tokenizer(embedded())
    rates: dict[str, list[float]] = {"direct": [], "served": []}
    served: list[Told] = []
    right = total = 0
    with server(threads, clients) as port:
        directly(asked[:2], model, tokenizer)
        asyncio.run(_all(port, asked[:2]))
        for _ in range(rounds):
            direct, seconds = directly(asked, model, tokenizer)
            rates["direct"].append(sum(t.tokens for t in direct) / seconds)
            served, seconds = asyncio.run(_all(port, asked))
            rates["served"].append(sum(t.tokens for t in served) / seconds)
            right += sum((a.text, a.tokens) == (b.text, b.tokens) for a, b in zip(direct, served))
            total += len(asked)
    one, other = (statistics.median(rates[k]) for k in ("direct", "served"))
    gaps = [b - a for t in served for a, b in zip(t.times, t.times[1:])]
    share = statistics.median(b / a for a, b in zip(rates["direct"], rates["served"]))
    ends = [t.times[-1] for t in served]
    first = max(t.times[min(1, len(t.times) - 1)] for t in served)
    tokens = sum(t.tokens for t in served)
    return Load(clients, tokens, one, other, share, right, total, first, max(gaps), min(ends), max(ends))


def main(argv: list[str]) -> int | None:
    """The command: exit code 1 when an answer is not the direct one."""
    parser = Parser("python -m refimpl.bench serve", __doc__)
    parser.add_argument(
        "--clients", type=integer(1, 400), default=64, metavar="N", help="at once (default 64)"
    )
    parser.add_argument("--rounds", type=integer(1), default=3, metavar="N", help="of each (default 3)")
    parser.add_argument(
        "--threads",
        type=integer(1),
        default=os.cpu_count() or 1,
        metavar="N",
        help="of the kernels (default all)",
    )
    parser.add_argument("--json", action="store_true", help="one object")
    args = parser.parse_args(argv)
    found = measure(args.clients, args.rounds, args.threads)
    if args.json:
        print(to_json(asdict(found)))
    else:
        show(found)
    return 0 if found.right == found.asked else 1


def show(found: Load) -> None:
    """Print the figures of one load for people."""
    print(f"{found.clients} clients at once, {found.tokens} tokens in all, median of the rounds")
    print(f"  directly, one after another   {found.direct_tokens_per_s:8.0f} tokens/s")
    print(f"  served, all at once           {found.served_tokens_per_s:8.0f} tokens/s, {found.share:.0%}")
    print(f"  answers as directly           {found.right} of {found.asked}")
    print(f"  first token, slowest client   {found.first_token_s:8.2f} s")
    print(f"  longest gap between pieces    {found.longest_gap_s:8.2f} s")
    print(
        f"  first and last client done    {found.first_finished_s:8.2f} s and {found.last_finished_s:.2f} s"
    )


if __name__ == "__main__":
    raise SystemExit(run(main))
