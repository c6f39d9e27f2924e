"""The library `tokenizers` at work on a stranger's tokenizer.json: in a process of its own, with limits, and what it prints is not heard.

A tokenizer.json brings regular expressions, which may go on for hours, and the library's Rust code writes to the terminal when it gives up. The
embedded model's tokenizer is known, and used in this process.

Run as a script this file is the other process: a line of JSON in, [what, value, seconds], and a line out, {"answer": ...} or {"error": ...}.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

SECONDS = 5.0  # of CPU time for one request, and
SECONDS_PER_ITEM = 1e-5  # more for each character or id, some ten times what the library needs
MEMORY = 2 << 30  # bytes of address space above what the process has at its start, and
MEMORY_PER_BYTE = 32  # more for each byte of the file
ANSWER = 1 << 20  # bytes of one answer, and
ANSWER_PER_BYTE = 64  # more for each byte of the request

# SHA-256 of the files that are used here, as JSON without blanks. tests/test_tokenizer.py says what to do when the embedded model's changes.
KNOWN: frozenset[str] = frozenset({"661474fdd673180e38d9255c9e8225af4b02da5e9d27c2ced78c8916205d83a3"})


class Failure(Exception):
    """What the library said last, or how the process it worked in ended."""


class Library(Protocol):
    """What is wanted of a tokenizer.json."""

    def vocabulary(self) -> dict[str, int]:
        """Spellings and ids, those of added tokens too."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, in which no added token is looked for."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, added tokens spelled out."""


def open_library(raw: dict[str, Any]) -> Library:
    """A tokenizer.json's contents at work, here or in a process of its own. Failure when it cannot be built; the three functions raise it too."""
    try:
        text = json.dumps(raw, separators=(",", ":"))
    except RecursionError:
        raise Failure("nested too deep") from None
    return Here(text) if hashlib.sha256(text.encode()).hexdigest() in KNOWN else Apart(text)


class Here:
    """The library in this process."""

    def __init__(self, text: str):
        from tokenizers import Tokenizer

        self._full = Tokenizer.from_str(text)
        self._plain = Tokenizer.from_str(json.dumps({**json.loads(text), "added_tokens": []}))
        self.encode("a")  # some faults show at the first use

    def vocabulary(self) -> dict[str, int]:
        return self._full.get_vocab(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._full.decode(list(ids), skip_special_tokens=False)


class Apart:
    """The library in a process that ends with this object, and whenever it takes too long; the next request then starts another."""

    def __init__(self, text: str):
        self._text, self._lock = text, threading.Lock()
        with self._lock:
            self._vocabulary: dict[str, int] = self._start()

    def vocabulary(self) -> dict[str, int]:
        return self._vocabulary

    def encode(self, text: str) -> list[int]:
        return self._ask("encode", text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._ask("decode", list(map(int, ids)))

    def _ask(self, what: str, value: Any) -> Any:
        with self._lock:
            if not self._end.alive:
                self._start()
            return self._exchange(what, value)

    def _start(self) -> dict[str, int]:
        from refimpl.template import child_environment

        command, pipe = [sys.executable, "-P", str(Path(__file__).resolve())], subprocess.PIPE
        self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=child_environment())
        self._end = weakref.finalize(self, _end, self._child)
        return self._exchange("build", self._text)

    def _exchange(self, what: str, value: Any) -> Any:
        """A request and its answer. Where the one is not followed by the other, at Ctrl-C too, the process is of no more use."""
        request = json.dumps([what, value, SECONDS + SECONDS_PER_ITEM * len(value)]).encode() + b"\n"
        try:
            line = _exchange(self._child, request, ANSWER + ANSWER_PER_BYTE * len(request))
        except BaseException:
            self._end()
            raise
        answer = json.loads(line)
        if "error" in answer:
            raise Failure(answer["error"])
        return answer["answer"]


def _exchange(child: subprocess.Popen[bytes], request: bytes, limit: int) -> bytes:
    stdin, stdout = child.stdin, child.stdout
    assert stdin and stdout
    try:
        stdin.write(request)
        stdin.flush()
        line = stdout.readline(limit)
    except OSError:  # it has died
        line = b""
    if len(line) >= limit:
        raise Failure(f"an answer of more than {limit} bytes")
    if not line.endswith(b"\n"):
        raise Failure(_death(child.wait()))
    return line


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        with contextlib.suppress(OSError):  # what was not written yet
            pipe.close()  # type: ignore[union-attr]


def _death(code: int) -> str:
    if code == -getattr(signal, "SIGPROF", 0):
        return "it took too long and was stopped"
    return f"its process was ended by signal {-code}" if code < 0 else f"its process ended with exit code {code}"


# --- the other process --------------------------------------------------------------------------------------------------------------------------


def _bound(nbytes: int) -> None:
    """No core and no file written; address space for a file of so many bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return
    bounds = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0}
    statm = Path("/proc/self/statm")
    if statm.exists():
        bounds[resource.RLIMIT_AS] = int(statm.read_text().split()[0]) * resource.getpagesize() + MEMORY + MEMORY_PER_BYTE * nbytes
    for which, value in bounds.items():
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


def _timer(seconds: float) -> None:
    """The process ends, whatever it is at, when it has used so much CPU time from now on; 0 for never."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _answer(library: Here | None, what: str, value: Any) -> tuple[Here | None, Any]:
    if what == "build":
        _bound(len(value))
        library = Here(value)
        return library, library.vocabulary()
    assert library is not None
    return library, library.encode(value) if what == "encode" else library.decode(value)


def _main() -> None:
    library: Here | None = None
    for line in sys.stdin.buffer:
        what, value, seconds = json.loads(line)
        _timer(seconds)
        try:
            library, value = _answer(library, what, value)
            answer = {"answer": value}
        except BaseException as error:  # a panic of the library is no Exception
            answer = {"error": f"{error}"[:200] or type(error).__name__}
        _timer(0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at the terminal is meant for the other one
    _main()
