"""What is shown while one waits: a line on the terminal with what is being done, how far it is and how long
it will still take, gone when it is done.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from refimpl.cli import own

PATIENCE = 0.4  # seconds that pass before a line is shown: most waits are over by then


def announce(text: str) -> None:
    """A plain line before what takes seconds and is measured, which a line that moves would disturb; at a
    terminal alone.
    """
    if sys.stderr.isatty():
        print(f"refimpl: {text}", file=sys.stderr, flush=True)


class Waiting:
    """A line that moves, drawn by `rich` on a terminal; nothing at all where `live` is false."""

    def __init__(self, live: bool):
        self.live, self.text = live, ""
        self.start = 0.0
        self._status: Any = None
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()

    def begin(self, text: str) -> None:
        """Say what is being done from now on."""
        self.end()
        if not self.live:
            return
        self.text, self.start = text, time.monotonic()
        self._timer = threading.Timer(PATIENCE, self._appear)
        self._timer.daemon = True
        self._timer.start()

    def end(self) -> None:
        """Take the waiting line off the terminal, or keep it from appearing."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._status is not None:
                self._status.stop()
                self._status = None

    def say(self, text: str) -> None:
        """Another text for what goes on."""
        self.text = text
        with self._lock:
            if self._status is not None:
                self._status.update(_plain(text))

    def tokens(self, done: int, total: int) -> None:
        """How many tokens of a question have been read; the rest is told in seconds."""
        if self.live and done < total:
            left = (time.monotonic() - self.start) / max(done, 1) * (total - done)
            self.say(f"reading the question: {done} of {total} tokens, about {left:.0f} s left")

    def compiled(self, done: int, total: int) -> None:
        """How many of the kernels that are compiled ahead are there."""
        self.say(f"compiling kernels for this CPU, which happens once: {done} of {total}")

    @contextmanager
    def during(self, text: str) -> Iterator[None]:
        """`begin` and `end` around a block."""
        self.begin(text)
        try:
            yield
        finally:
            self.end()

    def watch_compiler(self) -> None:
        """Name each kernel that Numba compiles meanwhile, and not its parts; those that come from the disk
        are not compiled.
        """
        if not self.live or "numba" not in sys.modules:
            return
        from numba.core import event  # Numba takes half a second, and is there already

        waiting = self

        class Compiler(event.Listener):
            depth, before = 0, ""

            def on_start(self, event: Any) -> None:
                self.depth += 1
                if self.depth == 1:
                    self.before = waiting.text
                    name = event.data["dispatcher"].py_func.__name__.strip("_")
                    waiting.say(f"compiling {name} for this CPU, which happens once")

            def on_end(self, event: Any) -> None:
                self.depth -= 1
                if self.depth == 0:
                    waiting.say(self.before)

        event.register("numba:compile", Compiler())

    def _appear(self) -> None:
        from rich.console import Console  # only now: most waits are over before

        with self._lock:
            if self._timer is not None:
                self._status = Console(file=own(sys.stderr)).status(_plain(self.text))
                self._status.start()


def at_terminal() -> Waiting:
    """Of this process: silent in a pipe, on a terminal that cannot move its cursor, and without `rich`."""
    dumb = os.environ.get("TERM") == "dumb"
    return Waiting(sys.stderr.isatty() and not dumb and find_spec("rich") is not None)


def _plain(text: str) -> Any:
    """A name in square brackets is a name, not a colour."""
    from rich.text import Text  # see `_appear`

    return Text(text)
