"""What every reader promises on any input: an answer or a `RefimplError` of one line, within a second, in
little memory.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from refimpl.errors import RefimplError

SECONDS = 1.0  # of CPU time, since the machine may be busy with something else
WALL = 30.0  # of the clock, for what waits
ROOM = 64 << 20  # bytes beside twice the input


class Hang(BaseException):
    """No answer in time."""


def _stop(number: int, frame: object) -> None:
    raise Hang("no answer in its CPU time" if number == signal.SIGPROF else f"no answer within {WALL:g} s")


@contextmanager
def watched() -> Iterator[None]:
    """Inside, `outcome` can interrupt what hangs."""
    before = {s: signal.signal(s, _stop) for s in (signal.SIGPROF, signal.SIGALRM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def outcome(read: Callable[[], object], seconds: float = SECONDS) -> tuple[str, str]:
    """("accepted", ""), ("refused", its code), or ("failed", why)."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, WALL)
    try:
        read()
        return "accepted", ""
    except RefimplError as error:
        line = error.line()
        return (
            ("refused", error.code) if line.isprintable() else ("failed", f"not one printable line: {line!r}")
        )
    except Hang as error:
        return "failed", str(error)
    except BaseException as error:  # a panic of a library is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return "failed", f"{type(error).__name__}: {error}"[:200]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
