"""Files that fail: what a program does to them is counted, and at the k-th act something happens. As a
command, a merge that meets one fault.

    python -m tests.campaigns.faults FAULT K SAFETENSORS GGUF OUTPUT

FAULT is `kill` (at the k-th act, in the middle of it), `wait` (says "ready" and begins when its standard
input ends), `memory` (K bytes of address space beside those in use) or `size` (no file larger than K bytes).
"""

from __future__ import annotations

import builtins
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from refimpl import convert_model
from refimpl.cli import run

ACTS = ("fsync", "replace", "rename", "mkdir", "rmdir", "unlink")


class Faults:
    """Counts acts; `happen(act)` is called in place of the one with number `at` (from 1)."""

    def __init__(self, at: int, happen: Callable[[str], None]):
        self.at, self.happen, self.acts = at, happen, list[str]()
        self._lock = threading.Lock()

    def due(self, act: str) -> bool:
        with self._lock:
            self.acts.append(act)
            return len(self.acts) == self.at

    def around(self, act: str, true: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.due(act):
            self.happen(act)
        return true(*args, **kwargs)

    def open(self, true: Callable[..., Any], path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not set(mode) & set("wxa+"):
            return true(path, mode, *args, **kwargs)
        return _Watched(self.around("open", true, path, mode, *args, **kwargs), self)

    @contextmanager
    def installed(self) -> Iterator[Faults]:
        with ExitStack() as stack:
            for act in ACTS:
                stack.enter_context(mock.patch.object(os, act, partial(self.around, act, getattr(os, act))))
            stack.enter_context(mock.patch.object(builtins, "open", partial(self.open, builtins.open)))
            yield self


class _Watched:
    """A file whose writes are counted; one that fails has written half."""

    def __init__(self, file: Any, faults: Faults):
        self._file, self._faults = file, faults

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        if self._faults.due("write"):
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            self._faults.happen("write")
        return self._file.write(data)

    def writelines(self, pieces: Any) -> None:
        for piece in pieces:
            self.write(piece)


def _die(act: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _limit(kind: str, nbytes: int) -> None:
    import resource

    if kind == "memory":
        nbytes += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    which = resource.RLIMIT_AS if kind == "memory" else resource.RLIMIT_FSIZE
    resource.setrlimit(which, (nbytes, nbytes))


def main(argv: list[str]) -> int:
    """The command."""
    fault, k, safetensors, gguf, output = argv
    merge = partial(
        run,
        convert_model.main,
        ["--safetensor_path", safetensors, "--gguf_path", gguf, "--output_path", output],
    )
    if fault == "kill":
        with Faults(int(k), _die).installed():
            return merge()
    if fault == "wait":
        print("ready", flush=True)
        sys.stdin.read()
    else:
        _limit(fault, int(k))
    return merge()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
