"""What all commands share: flags in both spellings, one error line instead of a traceback, exit codes, sizes
for people.
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any

from refimpl import interrupts
from refimpl.cli.environment import check_environment, quiet_libraries
from refimpl.cli.parser import Parser as Parser
from refimpl.cli.parser import completed as completed
from refimpl.errors import RefimplError, printable, refusal, visible
from refimpl.files import FileVanished, watched_mappings


def integer(least: int = 0, most: int = 2**31 - 1) -> Callable[[str], int]:
    """The `type` of a flag: an integer of [least, most], anything else is a usage error. An end that nobody
    reaches is not told.
    """
    return _flag(int, least, most, f"an integer from {least} {'up' if most >= 2**31 - 1 else f'to {most}'}")


def number(least: float, most: float) -> Callable[[str], float]:
    """The `type` of a flag: a finite number of [least, most], of which the end is not told where nobody gets
    there.
    """
    what = f"a number from {least:g} up" if most >= 1e6 else f"a number from {least:g} to {most:g}"
    return _flag(float, least, most, what)


def _flag(kind: type, least: float, most: float, what: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be {what}, not {printable(text, 40)}")
        return value

    return read


def run(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Call `main(argv)` the way a command promises: 0 fine, 1 bad data or machine, 130 interrupted;
    `REFIMPL_DEBUG=1` shows tracebacks.
    """
    _open_streams()
    with _seen():
        return _run(main, argv)


def _run(main: Callable[[list[str]], int | None], argv: list[str] | None) -> int:
    try:
        check_environment()
        quiet_libraries()
        with interrupts.raised(), watched_mappings():
            code = main(sys.argv[1:] if argv is None else argv) or 0
            sys.stdout.flush()
            return code
    except BrokenPipeError:
        _drop_output()  # its reader has gone
        return 0
    except (RefimplError, OSError, MemoryError, FileVanished) as error:
        if os.environ.get("REFIMPL_DEBUG"):
            raise
        _say(f"refimpl: {_describe(error)}")
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()  # the disk that it goes to is full
        return 1
    except BaseException as error:
        if not interrupts.is_interrupt(error) or isinstance(error, SystemExit):
            raise
        _say("refimpl: interrupted")
        return 130


def _say(line: str) -> None:
    with suppress(OSError):  # nobody listens
        print(line, file=sys.stderr)


def _open_streams() -> None:
    """Streams that were closed become empty ones, and what the output's encoding lacks is spelled out instead
    of raising.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class _Seen:
    """A stream for text of which all is seen: what a terminal acts upon is spelled out, see `visible`. Names
    of files, tensors and tokens come from strangers, and whoever prints one need not think of it.
    """

    def __init__(self, stream: Any):
        self.own = stream

    def write(self, text: str) -> int:
        self.own.write(visible(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)


def own(stream: Any) -> Any:
    """The stream beneath, for colours and lines that are rewritten."""
    return getattr(stream, "own", stream)


@contextmanager
def _seen() -> Iterator[None]:
    """Within it, both streams are such."""
    with redirect_stdout(_Seen(sys.stdout)), redirect_stderr(_Seen(sys.stderr)):
        yield


def _drop_output() -> None:
    """Keep the interpreter from complaining about the flush at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# Made while there is memory for it: the table of sentences is read for the first error that needs one.
OUT_OF_MEMORY = refusal("E5001", "memory", found="an allocation refused", expected="room").line()


def _describe(error: BaseException) -> str:
    if isinstance(error, RefimplError):
        return error.line()
    if isinstance(error, FileVanished):
        return refusal("E5003", error.path).line()
    if isinstance(error, MemoryError):
        return OUT_OF_MEMORY
    assert isinstance(error, OSError)
    return refused(error).line()


OS_ERRORS = {errno.EMFILE: "E5000 open", errno.ENOENT: "E5000 missing"}


def refused(error: OSError) -> RefimplError:
    """What the file system refuses, as ResourceError E5000."""
    name = (
        os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename or "file system"
    )
    kind = errno.errorcode.get(error.errno or 0, "")
    reason = f"{error.strerror or error}" + (f" ({kind})" if kind else "")
    return refusal(OS_ERRORS.get(error.errno or 0, "E5000"), name, reason=reason)


def to_json(value: Any, *, letters: bool = False) -> str:
    """JSON on one line, as all commands print it. It has no NaN and no infinities: they become the texts
    "NaN", "Infinity" and "-Infinity". Control and format characters are escapes; so is all beyond ASCII,
    unless `letters` says that people read it.
    """
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=not letters)
    except ValueError:
        text = json.dumps(_finite(value), allow_nan=False, ensure_ascii=not letters)
    if letters:
        return "".join(c if visible(c) == c else json.dumps(c)[1:-1].replace("\x7f", "\\u007f") for c in text)
    return text.replace("\x7f", "\\u007f")  # all beyond is escaped already


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {_finite(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def size(nbytes: float) -> str:
    """Decimal units, as disks and hubs count: 413 100 000 000 -> '413.1 GB'."""
    if nbytes < 1000:
        return f"{nbytes:.0f} B"
    power = min(4, (len(str(int(nbytes))) - 1) // 3)
    return f"{nbytes / 1000**power:.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def note(text: str) -> None:
    """Say on stderr what a user should know and need not act on."""
    print(f"refimpl: note: {text}", file=sys.stderr)


class Progress:
    """Bytes done, rate and time left on stderr. Call it with every n bytes.

    Not the package `rich`, nor for tables: its import takes 60 to 180 ms, longer than many a command; it
    takes a stranger's names for markup (a tensor called `a[/b]` raises MarkupError, `[bold]` vanishes); and
    it breaks lines at a width, where others read columns. What it would replace has thirty lines.

    `mode` "auto": a line that rewrites itself on a terminal, else one at the end; "json": an object a line,
    once a second and at both ends, {"event": "progress", "stage", "done", "total", "rate" in bytes a second,
    "eta_s" or null}; "none": nothing.
    """

    def __init__(
        self, total: int, label: str, mode: str = "auto", show: Callable[[float], str] | None = None
    ):
        """`show` is for what is not bytes."""
        self.total, self.label, self.done, self.mode = total, label, 0, mode
        self.show = show or size
        self.start = self.shown = time.monotonic()
        self.live = mode == "auto" and sys.stderr.isatty()

    def __enter__(self) -> Progress:
        if self.mode == "json":
            self._event()
        return self

    def __call__(self, n: int) -> None:
        self.done += n
        now = time.monotonic()
        if self.live and now - self.shown > 0.2:
            print(f"\r{self._line()}\x1b[K", end="", file=own(sys.stderr), flush=True)
        elif self.mode == "json" and now - self.shown > 1:
            self._event()
        else:
            return
        self.shown = now

    def __exit__(self, *exc: object) -> None:
        if self.mode == "json":
            self._event()
        elif self.mode == "auto":
            print(
                ("\r" if self.live else "") + self._line() + ("\x1b[K" if self.live else ""),
                file=own(sys.stderr),
            )

    def _event(self) -> None:
        rate = self.done / max(time.monotonic() - self.start, 1e-9)
        eta = (self.total - self.done) / rate if self.done else None
        event = {
            "event": "progress",
            "stage": self.label,
            "done": self.done,
            "total": self.total,
            "rate": rate,
            "eta_s": eta,
        }
        print(to_json(event), file=sys.stderr, flush=True)

    def _line(self) -> str:
        seconds = max(time.monotonic() - self.start, 1e-9)
        rate = self.done / seconds
        left = f", {(self.total - self.done) / rate:.0f} s left" if 0 < self.done < self.total else ""
        show = self.show
        return f"{self.label}: {show(self.done)} of {show(self.total)}, {show(rate)}/s{left}"


def ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 7] -> "0-2, 7"."""
    found: list[list[int]] = []
    for n in sorted(numbers):
        if found and n == found[-1][1] + 1:
            found[-1][1] = n
        else:
            found.append([n, n])
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in found)
