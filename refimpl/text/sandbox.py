"""Strangers' programs at work: the regular expressions of a tokenizer.json and the Jinja of a chat template,
in a process with limits.

A pattern may go on for hours, a template may ask for two gigabytes of blanks, and the library `tokenizers`
writes to the terminal when it gives up. The embedded model's two files are known, and are used in the
caller's process.

Run as a script this file is that process. It imports nothing of the package. It reads lines of JSON, [what,
value, seconds], and answers each with a line: {"answer": ...} or {"error": ...}. `what` is "build", "encode"
or "decode" of a tokenizer, or "render" of a template.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

SECONDS = 5.0  # of CPU time for one request of a tokenizer, and
SECONDS_PER_ITEM = 1e-5  # more for each character or id, some ten times what the library needs
MEMORY = 2 << 30  # bytes of address space above what the process has at its start, and
MEMORY_PER_BYTE = 32  # more for each byte of the file
ANSWER = 1 << 20  # bytes of one answer, and
ANSWER_PER_BYTE = 64  # more for each byte of the request

TEMPLATE_SECONDS = 2.0  # of wall clock and of CPU, counted from the moment the child starts to render
TEMPLATE_MEMORY = 256 << 20  # bytes of address space above what the child has by then
MAX_OUTPUT = 1 << 20  # characters; messages are placeholders, so this is the template's own text

WORDS = "refimpl.words"  # beside a tokenizer.json's own keys: the added tokens that plain text may become

# SHA-256 of the files that are used here, as JSON without blanks. tests/test_tokenizer.py says what to do
# when the embedded model's changes.
KNOWN: frozenset[str] = frozenset({"661474fdd673180e38d9255c9e8225af4b02da5e9d27c2ced78c8916205d83a3"})


# --- a tokenizer ---


class Failure(Exception):
    """What the library said last, or how the process it worked in ended."""


class Library(Protocol):
    """What is wanted of a tokenizer.json."""

    def vocabulary(self) -> dict[str, int]:
        """Spellings and ids, those of added tokens too."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, in which no added token is looked for but those under WORDS."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, added tokens spelled out."""


def open_library(raw: dict[str, Any]) -> Library:
    """A tokenizer.json's contents at work, here or in a process of its own. Failure when it cannot be built;
    the three functions raise it too.
    """
    try:
        text = json.dumps(raw, separators=(",", ":"))
    except RecursionError:
        raise Failure("nested too deep") from None
    return (
        InProcessTokenizer(text)
        if hashlib.sha256(text.encode()).hexdigest() in KNOWN
        else ChildTokenizer(text)
    )


class InProcessTokenizer:
    """The library in this process."""

    def __init__(self, text: str):
        from tokenizers import Tokenizer  # only the child that runs a tokenizer needs it

        raw = json.loads(text)
        words = raw.pop(WORDS, [])
        self._full = Tokenizer.from_str(json.dumps(raw) if words else text)
        plain = {**raw, "added_tokens": [t for t in raw.get("added_tokens") or [] if t["content"] in words]}
        self._plain = Tokenizer.from_str(json.dumps(plain))
        self._ids: dict[int, int] = {}
        if words:
            self._number(plain, words, Tokenizer.from_str)
        self.encode("a")  # some faults show at the first use

    def _number(self, plain: dict[str, Any], words: list[str], build: Callable[[str], Any]) -> None:
        """Give words their ids. Without the other added tokens they may have got others."""
        vocabulary, mine = self.vocabulary(), self._plain.get_vocab(with_added_tokens=True)
        taken = self._plain.get_vocab(with_added_tokens=False)
        wanted = {word: vocabulary[word] for word in words}
        self._ids = {mine[word]: i for word, i in wanted.items() if mine[word] != i}
        if self._ids.keys() & set(taken.values()):  # ids with gaps
            # A word keeps its id where the vocabulary has it. Elsewhere the vocabulary is left alone: with
            # `ignore_merges` every text that is split so would be that word.
            plain["model"] = {**plain["model"], "vocab": taken | wanted}
            self._plain, self._ids = build(json.dumps(plain)), {}

    def vocabulary(self) -> dict[str, int]:
        return self._full.get_vocab(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        ids = self._plain.encode(text, add_special_tokens=False).ids
        return [self._ids.get(i, i) for i in ids] if self._ids else ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._full.decode(list(ids), skip_special_tokens=False)


class ChildTokenizer:
    """The library in a process that ends with this object, and whenever it takes too long; the next request
    then starts another.
    """

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
        pipe = subprocess.PIPE
        self._child = subprocess.Popen(
            _command(), stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=child_environment()
        )
        self._end = weakref.finalize(self, _end, self._child)
        return self._exchange("build", self._text)

    def _exchange(self, what: str, value: Any) -> Any:
        """A request and its answer. Where the one is not followed by the other, at Ctrl-C too, the process is
        of no more use.
        """
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
    return (
        f"its process was ended by signal {-code}" if code < 0 else f"its process ended with exit code {code}"
    )


# --- a template ---


def render_in_child(source: str, context: dict[str, Any]) -> dict[str, str]:
    """Render a template in a process with limits. Returns {"text"} or {"code", "error"}; E6205 where a limit
    was exceeded.
    """
    request = json.dumps(["render", {"source": source, "context": context}, TEMPLATE_SECONDS])
    try:
        child = subprocess.run(
            _command(),
            input=request.encode() + b"\n",
            capture_output=True,
            env=child_environment(),
            timeout=30,
        )
    except subprocess.TimeoutExpired:
        return {"code": "E6205", "error": "no answer within 30 s"}
    if child.returncode < 0:
        return {
            "code": "E6205",
            "error": f"stopped by signal {-child.returncode}; the limit is {TEMPLATE_SECONDS:g} s",
        }
    try:
        answer = json.loads(child.stdout)
        if "error" in answer:
            return {"code": "E6203", "error": str(answer["error"])}
        return {str(k): str(v) for k, v in answer["answer"].items()}
    except (ValueError, AttributeError, KeyError, TypeError):
        last = child.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        return {"code": "E6203", "error": f"child exited with {child.returncode}: {' '.join(last)[:200]}"}


def render(source: str, context: dict[str, Any]) -> dict[str, str]:
    """Render here and now. Returns {"text"} or {"code", "error"}."""
    import jinja2  # only the child that renders needs it

    try:
        text = _environment().from_string(source).render(**context)
    except _Refusal as error:
        return {"code": "E6204", "error": str(error)}
    except jinja2.TemplateSyntaxError as error:
        return {"code": "E6203", "error": f"line {error.lineno}: {error.message}"}
    except MemoryError:
        return {"code": "E6205", "error": f"more than {TEMPLATE_MEMORY >> 20} MiB of memory"}
    except Exception as error:  # whatever a stranger's program does wrong
        return {"code": "E6203", "error": f"{type(error).__name__}: {error}"[:300]}
    if len(text) > MAX_OUTPUT:
        return {"code": "E6205", "error": f"{len(text)} characters of output; the limit is {MAX_OUTPUT}"}
    return {"text": text}


class _Refusal(Exception):
    """Raised where a template calls `raise_exception`."""


def _environment() -> Any:
    """Jinja as Hugging Face's `apply_chat_template` sets it up."""
    from jinja2 import nodes  # as in `render`
    from jinja2.ext import Extension, loopcontrols  # as above
    from jinja2.parser import Parser  # as above
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # as above

    class Generation(Extension):
        """`{% generation %}` marks an assistant's text for training; here it is only its body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def raise_exception(message: object) -> None:
        raise _Refusal(str(message))

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


# --- either ---


def child_environment() -> dict[str, str]:
    """What a process that works on a stranger's file is told of the environment: no more than Python
    needs.
    """
    keep = (
        "PATH",
        "HOME",
        "LANG",
        "LC_ALL",
        "TZ",
        "SYSTEMROOT",
        "VIRTUAL_ENV",
        "PYTHONPATH",
        "PYTHONHOME",
        "PYTHONUSERBASE",
    )
    return {name: os.environ[name] for name in keep if name in os.environ}


def _command() -> list[str]:
    return [sys.executable, "-P", str(Path(__file__).resolve())]


# --- the child process --------------------------------------------------------------------------------------


def _limit(memory: int, cpu_seconds: float | None = None) -> None:
    """Bound this process: no core, no file written, so many more bytes of address space; CPU time where it is
    given.
    """
    try:
        import resource  # not on Windows
    except ImportError:
        return
    bounds = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0}
    if cpu_seconds is not None:
        bounds[resource.RLIMIT_CPU] = int(resource.getrusage(resource.RUSAGE_SELF).ru_utime + cpu_seconds) + 1
    statm = Path("/proc/self/statm")
    if statm.exists():
        bounds[resource.RLIMIT_AS] = int(statm.read_text().split()[0]) * resource.getpagesize() + memory
    for which, value in bounds.items():
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


def _timer(clock: str, seconds: float) -> None:
    """The process ends when it has used so much of "ITIMER_PROF" (CPU time) or "ITIMER_REAL" from now on; 0
    for never.
    """
    if hasattr(signal, "setitimer"):
        signal.setitimer(getattr(signal, clock), seconds)


def _render_within_limits(source: str, context: dict[str, Any], seconds: float) -> dict[str, str]:

    _limit(TEMPLATE_MEMORY, seconds)
    _timer("ITIMER_REAL", seconds)  # SIGALRM, not handled, ends the process
    return render(source, context)


def _answer(
    library: InProcessTokenizer | None, what: str, value: Any
) -> tuple[InProcessTokenizer | None, Any]:
    if what == "build":
        _limit(MEMORY + MEMORY_PER_BYTE * len(value))
        library = InProcessTokenizer(value)
        return library, library.vocabulary()
    assert library is not None
    return library, library.encode(value) if what == "encode" else library.decode(value)


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at the terminal is meant for the parent
    library: InProcessTokenizer | None = None
    for line in sys.stdin.buffer:
        what, value, seconds = json.loads(line)
        try:
            if what == "render":
                value = _render_within_limits(**value, seconds=seconds)
            else:
                _timer("ITIMER_PROF", seconds)
                library, value = _answer(library, what, value)
            answer = {"answer": value}
        except BaseException as error:  # a panic of the library is no Exception
            answer = {"error": f"{error}"[:200] or type(error).__name__}
        _timer("ITIMER_PROF", 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main()
