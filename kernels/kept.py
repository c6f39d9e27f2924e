"""Compiled kernels on the disk: Numba's cache for a user's own folder, in which every file is checked before
it is believed.

What lies there is unpickled and run. So the folder and those above it that we made must be the user's alone,
each file is a regular one of the user's, and ends with the SHA-256 of the rest: Numba notices a file that
is missing and none that is damaged. A file that fails is removed and its kernel compiled anew, with a note;
where none can be kept (no folder, no room), kernels are compiled in each process, with a note.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numba
from numba.core import event
from numba.core.caching import (
    CompileResultCacheImpl,
    FunctionCache,
    IndexDataCacheFile,
    UserProvidedCacheLocator,
)
from numba.core.ccallback import CFunc

from refimpl.errors import RefimplError, printable
from refimpl.files import cache_folder, not_private
from refimpl.kernels.simd_llvm import choose

MOST = 1 << 28  # bytes of a file, which have a hundred times less
# Numba's word for a form that works and cannot be kept: Ctrl-C came as LLVM handed its object over.
UNFINISHED = "no compiled object yet"
_notes: set[str] = set()


@cache
def folder() -> Path | None:
    """The folder of compiled kernels for these sources, made if need be; None for no cache.

    It is named by what the machine code depends on and Numba does not look at: the other kernel files, the
    level of SIMD.
    """
    # All kernel files, as a kernel contains what it calls from others; Numba looks at its own file alone.
    digest = hashlib.sha256(f"{numba.__version__} {sys.version} {choose()}".encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    try:
        return cache_folder(f"numba-{digest.hexdigest()[:16]}")
    except (RefimplError, OSError) as error:
        _note("refused", f"compiled kernels are not kept: {error}")
        return None


def announce() -> None:
    """Tell the user, once, that kernels are compiled now, which takes a while; not where none are kept."""
    if (found := folder()) is not None and "compiling" not in _notes:
        _notes.add("compiling")
        where = printable(str(found), 400)
        print(
            f"refimpl: compiling the kernels for this CPU ({choose()}), once; kept in {where}",
            file=sys.stderr,
        )


def hush() -> None:
    """Have `announce` say nothing, where another process does."""
    _notes.add("compiling")


def _note(kind: str, text: str) -> None:
    """Once a kind, however many kernels it befalls."""
    if kind not in _notes:
        _notes.add(kind)
        print(f"refimpl: note: {printable(text, 1000)}", file=sys.stderr)


class _Damaged(Exception):
    """Why a file of the cache is not believed."""


class _Files(IndexDataCacheFile):
    """An index and data files as Numba has them, each followed by its SHA-256."""

    def _load_index(self) -> dict[Any, str]:
        try:
            file = io.BytesIO(self._read(self._index_path))
        except FileNotFoundError:
            return {}
        # The checksum has been compared by now: nothing is unpickled that fails it.
        if pickle.load(file) != self._version:  # of another Numba: its types may not be read
            return {}
        stamp, overloads = pickle.load(file)
        return overloads if stamp == self._source_stamp else {}

    def _save_index(self, overloads: dict[Any, str]) -> None:
        parts = pickle.dumps(self._version), self._dump((self._source_stamp, overloads))
        self._write(self._index_path, b"".join(parts))

    def _load_data(self, name: str) -> Any:
        return pickle.loads(self._read(self._data_path(name)))

    def _save_data(self, name: str, data: Any) -> None:
        self._write(self._data_path(name), self._dump(data))

    def _read(self, path: str) -> bytes:
        # No link is followed, and a pipe does not block.
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with open(fd, "rb") as file:
            if why := not_private(os.fstat(fd)):
                raise _Damaged(why)
            if len(found := file.read(MOST + 1)) > MOST:
                raise _Damaged("it is too large")
        if hashlib.sha256(found[:-32]).digest() != found[-32:]:
            raise _Damaged("its checksum is wrong")
        return found[:-32]

    def _write(self, path: str, data: bytes) -> None:
        with self._open_for_write(path) as file:
            if hasattr(os, "fchmod"):  # whatever the umask lets others do
                os.fchmod(file.fileno(), 0o600)
            file.write(data + hashlib.sha256(data).digest())

    def drop(self) -> None:
        """Remove the index, without which no data file is found; they are written over one by one."""
        with suppress(FileNotFoundError):
            os.unlink(self._index_path)


class _Impl(CompileResultCacheImpl):
    """In our folder or nowhere: Numba would fall back on folders beside the sources."""

    _locator_classes = [UserProvidedCacheLocator]  # noqa: RUF012


class KernelCache(FunctionCache):
    """One function's compiled forms. Nothing about it ends a program: a form that cannot be loaded is None,
    one that cannot be saved is not.
    """

    _impl_class = _Impl

    def __init__(self, function: Any):
        super().__init__(function)
        stamp = self._impl.locator.get_source_stamp()
        self._cache_file: _Files = _Files(self._cache_path, self._impl.filename_base, stamp)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            found = super().load_overload(sig, target_context)
        except Exception as error:  # of pickle's, LLVM's, or ours
            self._forget(error)
            found = None
        if found is None:  # it is compiled next
            announce()
        return found

    def _forget(self, error: Exception) -> None:
        _note("damaged", f"a compiled kernel in {self._cache_path} is damaged and made anew: {error}")
        try:
            self._cache_file.drop()
        except OSError:
            self.disable()

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            self.disable()
            _note("unkept", f"compiled kernels are not kept in {self._cache_path}: {error.strerror or error}")
        except Exception as error:  # the index it begins with
            if UNFINISHED not in str(error):
                self._forget(error)


def keep(compiled: Any, function: Any) -> None:
    """Have a compiled function, or a callback before it is compiled, kept in `folder()`; not at all where
    Numba can put nothing there.
    """
    numba.config.CACHE_DIR = str(folder())
    try:
        compiled._cache = KernelCache(function)
    except RuntimeError as error:  # no room for a subfolder, or one that others made
        _note("unkept", f"compiled kernels are not kept: {error}")


class _Callback(CFunc):
    """Whose compiling is an event like that of other functions, for who shows what goes on."""

    def _compile_uncached(self) -> Any:
        what = SimpleNamespace(py_func=self._pyfunc)  # type: ignore[attr-defined]
        with event.trigger_event("numba:compile", data={"dispatcher": what}):
            return super()._compile_uncached()  # type: ignore[misc]


def callback(signature: Any, function: Any, *, kept: bool) -> CFunc:
    """`numba.cfunc` with error_model "numpy", and kept here."""
    found = _Callback(
        function, (signature.args, signature.return_type), locals={}, options={"error_model": "numpy"}
    )
    if kept:
        keep(found, function)
    found.compile()
    return found
