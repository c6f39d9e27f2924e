"""Ctrl-C at random times of a start, from a tenth of a second on: no traceback, exit code 130 (or the answer,
when it was there already), and the next start answers.

Half of the starts are cold (an empty cache: the embedded model is merged, and kernels are compiled where the
backend has some), half warm. A tenth of a second is what Python itself may take before our first line; what
comes earlier is Python's own to answer.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from tests.campaigns import WHOLE, Part, Report

SHORT, LONG = 4, 300
FIRST = 0.1  # seconds
ROOT = Path(__file__).parents[2]
ENTRIES = (
    ["-m", "refimpl.chat"],
    ["-m", "refimpl", "chat"],
    ["-c", "import sys; from refimpl.__main__ import entry; sys.exit(entry())", "chat"],
)


def _start(entry: list[str], backend: str, cache: Path) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    command = [sys.executable, *entry, "-p", "What is 1 + 1?", "--greedy", "--backend", backend]
    pipe = subprocess.PIPE
    env = os.environ | {"PYTHONPATH": path, "REFIMPL_CACHE": str(cache)}
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, env=env)


def run(cases: int, seed: int, folder: Path, part: Part = WHOLE) -> Report:
    """`cases` starts; the backend is the reference, and in one of three of the long form the cpu."""
    failures: list[str] = []
    counts = {"cold": Counter[str](), "warm": Counter[str]()}
    warm = {backend: folder / f"warm-{backend}" for backend in ("reference", "cpu")[: 1 + (cases > 20)]}
    seconds = {}
    for backend, cache in warm.items():
        _start(ENTRIES[0], backend, cache).communicate()
        begin = time.monotonic()
        _start(ENTRIES[0], backend, cache).communicate()
        seconds[backend] = time.monotonic() - begin
    for i in part.share(range(cases)):
        rng = random.Random(f"interrupts/{seed}/{i}")
        backend = "cpu" if "cpu" in warm and i % 3 == 2 else "reference"
        kind = ("cold", "warm")[i % 2]
        cache = warm[backend] if kind == "warm" else folder / f"cold-{i}"
        entry = rng.choice(ENTRIES)
        process = _start(entry, backend, cache)
        after = FIRST + rng.random() * seconds[backend]
        time.sleep(after)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
        outcome, wrong = _judge(process.returncode, out, err.decode("utf-8", "replace"))
        if not wrong and kind == "cold":
            out, err = _start(entry, backend, cache).communicate()
            wrong = "" if out == b"2\n" else f"the next start: {err[-300:]!r}"
        counts[kind][outcome] += 1
        if wrong:
            failures.append(f"case {i} of seed {seed}, {kind}, {entry[:2]}, after {after:.2f} s: {wrong}")
    return Report(sum(map(Counter.total, counts.values())), failures, counts, {})


def _judge(code: int, out: bytes, err: str) -> tuple[str, str]:
    """How it ended, and what is wrong with that."""
    if "Traceback" in err or "Exception ignored" in err:
        return "traceback", err[-400:]
    if code == 0 and out == b"2\n":
        return "answered", ""
    if code != 130:
        return "another end", f"exit code {code}: {err[-300:]!r}"
    said = err.rstrip().endswith("refimpl: interrupted") or bool(out)  # an answer that was begun says it
    return "interrupted", "" if said else f"no word: {err[-300:]!r}"
