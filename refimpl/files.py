"""Reading and writing files so that nothing is lost or half-written: mapped views that survive a file cut
short, bounded copies, one writer for whatever a command leaves behind, one check for folders that are
trusted, and one gate for numbers that a file brings.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import secrets
import signal
import stat
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from refimpl.errors import refusal

try:
    import refimpl.vanished as vanished
except ImportError:  # no C compiler when this was installed, or a system without SIGBUS
    vanished = None

CHUNK = (
    1 << 20
)  # bytes held while copying; what stays in a core's cache is copied and summed at four times the speed
AHEAD = 8 << 20  # bytes written before the disk is told of them


def regular_size(path: Path) -> int:
    """Bytes in a regular file. ResourceError E5002 for a directory, pipe or device; OSError when it cannot be
    read.
    """
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):
        raise refusal("E5002", path)
    return info.st_size


def read_small(path: Path, limit: int) -> bytes:
    """A regular file's bytes. InputFormatError E5004 when there are more than `limit`; otherwise as
    `regular_size`.
    """
    size = regular_size(path)  # a pipe would be waited for, a device read for ever
    if size > limit:
        raise refusal("E5004", path, found=f"{size} bytes", expected=f"at most {limit}")
    with open(path, "rb") as file:
        return file.read(limit)


# --- mapped files -------------------------------------------------------------------------------------------


class FileVanished(BaseException):
    """A mapped file was cut short, or its disk failed, while it was read: raised in the main thread between
    two instructions, as KeyboardInterrupt is, and like it no Exception, so that nobody goes on with zeros.
    """

    def __init__(self, path: Path):
        super().__init__(str(path))
        self.path = path


_mappings: dict[int, tuple[int, Path]] = {}  # address: (bytes, file)


def map_bytes(path: Path) -> np.ndarray:
    """The file as a read-only u8 array, pages read when touched; an empty file gives an empty array. No file
    stays open.
    """
    size = regular_size(path)
    if not size:
        return np.empty(0, np.uint8)
    if os.name != "posix":
        return np.memmap(path, np.uint8, "r")
    with open(path, "rb") as file:
        return np.frombuffer(_mapped(file, size, path), np.uint8)


def window(path: Path, offset: int, nbytes: int, memory: np.ndarray | None = None) -> np.ndarray:
    """The bytes [offset, offset + nbytes) of a file as read-only u8 [nbytes], on `memory` (from `map_bytes`)
    or a new mapping. InputFormatError E5003 where the file has become shorter.
    """
    memory = map_bytes(path) if memory is None else memory
    found = memory[offset : offset + nbytes]
    if len(found) != nbytes:
        raise refusal("E5003", path, found=f"{len(memory)} bytes", expected=f"{nbytes} from {offset}")
    return found


def _mapped(file: BinaryIO, size: int, path: Path) -> memoryview:
    """The system's own call: Python's keeps a descriptor for each mapping, and a checkpoint of 163 files is
    more than some users may open.
    """
    libc = _libc()
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), file.name)
    _mappings[address] = size, path
    if vanished is not None:
        vanished.add(address, size)
    block = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(block, _unmap, address, size).atexit = False  # threads may read to the end
    return memoryview(block).cast("B").toreadonly()


def _unmap(address: int, size: int) -> None:
    _mappings.pop(address, None)
    if vanished is not None:
        vanished.drop(address)
    _libc().munmap(address, size)


@contextmanager
def watched_mappings() -> Iterator[None]:
    """Within it, a mapped file that is cut short raises FileVanished in the main thread.

    Touching a page that is no longer in its file is SIGBUS, which ends a process. A handler in Python would
    never run: the instruction that failed is tried again first. Reads that cannot fault would mean a copy of
    all weights. So one in C (vanished.pyx) puts empty pages there, lets the instruction end, and asks the
    interpreter for this exception. What the kernels computed meanwhile is thrown away with it. Only commands
    do this; a library leaves signals to its user. Nothing is done outside the main thread, which alone can.
    """
    if vanished is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    told = False

    def tell(signum: int, frame: object) -> None:
        nonlocal told
        lost = vanished.lost()
        if not told and lost:  # once: another one would break into the cleaning up
            told = True
            raise FileVanished(
                next((p for a, (n, p) in _mappings.items() if a <= lost < a + n), Path("a mapped file"))
            )

    before = signal.getsignal(signal.SIGBUS)
    vanished.begin(lambda: signal.signal(signal.SIGBUS, tell))
    try:
        yield
    finally:
        vanished.end(lambda: signal.signal(signal.SIGBUS, before or signal.SIG_DFL))


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, libc.mmap.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64],
    )
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


def chunks(path: Path, offset: int, nbytes: int) -> Iterator[bytes]:
    """The bytes [offset, offset + nbytes) in bounded pieces, by reads and not by a mapping: a file that
    shrinks meanwhile is an error, no crash.
    """
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        left = nbytes
        while left:
            piece = file.read(min(left, CHUNK))
            if not piece:
                raise refusal(
                    "E5003", path, found=f"{nbytes - left} bytes", expected=f"{nbytes} from {offset}"
                )
            left -= len(piece)
            yield piece


class Writeback:
    """Lets the disk work while more is written: the system begins to store what it would keep until the sync,
    which has less to wait for then.

    Nothing is promised by it, and nothing lost: a failure is told by the sync. Systems without the call do
    without.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.begun, self.end = file, 0, 0

    def wrote(self, nbytes: int) -> None:
        """So many bytes more have been written, one after the other from the start of the file."""
        self.end += nbytes
        if self.end - self.begun >= AHEAD and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.file.fileno(), self.begun, self.end - self.begun, os.POSIX_FADV_DONTNEED)
            self.begun = self.end


# --- the writer ---------------------------------------------------------------------------------------------


def check_writable(path: Path, *, force: bool = False, inputs: Iterable[Path] = ()) -> None:
    """Raise where a new file must not be put, before work is spent on it.

    ResourceError: E5107 a link, a pipe, a device or a folder is there; E5105 it is one of `inputs`, or a file
    of a folder among them, whatever `force` says; E5108 a file is there, and `force` does not let it go;
    E5000 its folder is not there.
    """
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise refusal("E5000 folder", path, folder=path.parent) from None
        return
    if not stat.S_ISREG(info.st_mode):
        raise refusal("E5107", path, found=_kind(info.st_mode), expected="a new file")
    for given in inputs:
        for file in (given, *(given.iterdir() if given.is_dir() else ())):
            if file.exists() and os.path.samestat(file.stat(), info):
                raise refusal("E5105 file", path, found=file)
    if not force:
        raise refusal("E5108", path)


def _kind(mode: int) -> str:
    kinds = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFREG: "a file"}
    return kinds.get(stat.S_IFMT(mode), "a device or a socket")


@contextmanager
def atomic(path: Path, *, force: bool = False) -> Iterator[BinaryIO]:
    """A new file that appears under its name only when complete: written beside it, synced, renamed. On any
    exception nothing is left, and what was there still is. `force` lets it take the place of a regular file.

    ResourceError as `check_writable`, at once and again when the file is complete.
    """
    check_writable(path, force=force)
    short = os.fsdecode(os.fsencode(path.name)[:200])  # names have bytes, 255 of them
    part = path.with_name(f".{short}.{secrets.token_hex(4)}.part")
    file = open(part, "xb")  # noqa: SIM115 - closed below, and what could not be made is not removed
    try:
        with file, _named(part):
            yield file
            file.flush()
            os.fsync(file.fileno())
        _publish(part, path, force)
        sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """A full disk tells no name: OSErrors without one get this."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def _publish(part: Path, path: Path, force: bool) -> None:
    """Give a complete file its name. A link cannot take the place of a file that came meanwhile, which a
    rename would; file systems without links get the rename.
    """
    if not force:
        try:
            os.link(part, path)
            return
        except FileExistsError:
            check_writable(path)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES):
                raise
    check_writable(path, force=force)
    os.replace(part, path)


def write_text(path: Path, text: str, *, force: bool = False) -> None:
    """A small UTF-8 file, as `atomic` does it."""
    with atomic(path, force=force) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut, where the system has such a call."""
    if hasattr(os, "O_DIRECTORY"):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


# --- folders that are trusted -------------------------------------------------------------------------------


def private_folder(path: Path, *, shared: bool = False) -> Path:
    """`path`, made with all that is missing above it for the user alone, or found to be so.

    ResourceError E5104: as for `real_folder`, or it belongs to somebody else, or others can write to it.
    `shared` allows that where nobody can rename or remove what is another's, as in /tmp.
    """
    if why := not_private(os.lstat(real_folder(path)), folder=True, shared=shared):
        raise refusal("E5104 private", path, found=why)
    return path


def real_folder(path: Path) -> Path:
    """`path`, made with all that is missing above it for the user alone, or found to be a folder, whoever can
    write to it. ResourceError E5104: it cannot be made, is a link or no folder.
    """
    missing = [p for p in (path, *path.parents) if not os.path.lexists(p)]
    try:
        for folder in reversed(missing):
            folder.mkdir(mode=0o700, exist_ok=True)
        mode = os.lstat(path).st_mode
    except OSError as error:
        raise refusal("E5104", path, found=error.strerror or str(error)) from None
    if not stat.S_ISDIR(mode):
        raise refusal("E5104 private", path, found=_kind(mode))
    return path


def not_private(info: os.stat_result, *, folder: bool = False, shared: bool = False) -> str:
    """What `os.lstat` says against a file or folder whose contents are run or believed; "" for nothing."""
    if not (stat.S_ISDIR if folder else stat.S_ISREG)(info.st_mode):
        return _kind(info.st_mode)
    if not hasattr(os, "getuid"):  # Windows keeps a user's folders apart by other means
        return ""
    if info.st_uid not in ({os.getuid(), 0} if shared else {os.getuid()}):
        return f"it belongs to user {info.st_uid}"
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not (shared and info.st_mode & stat.S_ISVTX):
        return f"others can write to it (mode {stat.S_IMODE(info.st_mode):04o})"
    return ""


def cache_base() -> Path:
    """Where caches lie: $REFIMPL_CACHE, or `refimpl` in the user's cache folder; nothing is made or checked.
    ResourceError E5104 for a user without a home.
    """
    if base := os.environ.get("REFIMPL_CACHE"):
        return Path(os.path.abspath(os.path.expanduser(base)))
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refimpl"
    except RuntimeError as error:
        raise refusal("E5104", "cache folder", found=str(error)) from None


def cache_folder(name: str = "") -> Path:
    """The cache, or the folder `name` in it, made if need be; it and the cache are private. ResourceError
    E5104.
    """
    base = private_folder(cache_base(), shared=True)
    return private_folder(base / name) if name else base


# --- numbers that a file brings -----------------------------------------------------------------------------


def whole(value: Any, name: str, where: object, least: int = 0, most: int = 2**31 - 1) -> int:
    """`value` as an integer of [least, most]: from an int, or from a float that is one. InputFormatError
    E4006 for anything else, a bool and a text included. `name` is the field, `where` its file.
    """
    a_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not a_number or not least <= value <= most or value != int(value):
        found = repr(value)[:40] if not isinstance(value, int) or abs(value) < 10**30 else "a huge number"
        raise refusal("E4006", where, name=name, found=found, expected=f"an integer of {least} to {most}")
    return int(value)


def real(value: Any, name: str, where: object, least: float = -1e30, most: float = 1e30) -> float:
    """`value` as a finite float of [least, most]; E4006 as `whole`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        found = repr(value)[:40] if not isinstance(value, int) or abs(value) < 10**30 else "a huge number"
        raise refusal("E4006", where, name=name, found=found, expected=f"a number of {least:g} to {most:g}")
    return float(value)
