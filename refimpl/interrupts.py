"""Ctrl-C in a command: one line and exit code 130, from the first line of our own code to the last.

While a command starts (a second of imports) and once it has ended there is nothing to tidy up, and a
KeyboardInterrupt raised inside somebody's import would be printed, or swallowed. So the process ends there
and then. In between it is raised, for files to be removed and answers to be kept. `import refimpl` sets no
handler: only `python -m refimpl.chat` and the console script do. Imports nothing that is not loaded anyway.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LINE = b"refimpl: interrupted\n"
MOMENT = 0.01  # seconds, in which a hook that is only left has ended


def leave(number: int = 0, frame: Any = None) -> None:
    """The handler of a command that has nothing to lose: the line, and the end."""
    try:
        os.write(2, LINE)
    finally:
        os._exit(130)


def take() -> None:
    """Make `leave` the handler where Python's own is: not where a parent has us ignore Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)
        # At its very end Python gives signals back to the system, which would end the process without a word
        # when all has been said. Registered first and so called last.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


@contextmanager
def raised() -> Iterator[None]:
    """Within it, Ctrl-C is a KeyboardInterrupt, if `take` was called before; without, nothing is changed.

    One that comes while a destructor or a callback runs, which can raise nothing, comes again after it: by a
    thread a moment later, since what is raised in the hook itself is lost, too.
    """
    if signal.getsignal(signal.SIGINT) is not leave:
        yield
        return
    import threading  # not before `take`, which would come later by it; numpy has it by now

    before = sys.unraisablehook

    def interrupt_main() -> None:  # a signal: `_thread.interrupt_main` wakes nobody who waits for a key
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def again(found: Any) -> None:
        if found.exc_type is KeyboardInterrupt:
            later = threading.Timer(MOMENT, interrupt_main)
            later.daemon = True
            later.start()
        else:
            before(found)

    sys.unraisablehook = again
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, leave)
        sys.unraisablehook = before


def is_interrupt(error: BaseException | None) -> bool:
    """Whether an error is Ctrl-C, or what somebody's code made of it."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False
