"""Reading and writing files so that nothing is lost or half-written: mapped views, bounded copies, temp file
+ fsync + rename.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import stat
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from refimpl.errors import refusal

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
        return np.frombuffer(_mapped(file, size), np.uint8)


def _mapped(file: BinaryIO, size: int) -> memoryview:
    """The system's own call: Python's keeps a descriptor for each mapping, and a checkpoint of 163 files is
    more than some users may open.
    """
    libc = _libc()
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), file.name)
    block = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(block, libc.munmap, address, size).atexit = False  # threads may read to the end
    return memoryview(block).cast("B").toreadonly()


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


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A new file that appears under its name only when complete: written beside it, synced, renamed. On any
    exception nothing is left.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A small UTF-8 file, atomically."""
    with atomic(path) as file:
        file.write(text.encode("utf-8"))


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut, where the system has such a call."""
    if hasattr(os, "O_DIRECTORY"):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def cache_folder() -> Path:
    """$REFIMPL_CACHE, or `refimpl` in the user's cache folder; private to the user. ResourceError E5104 where
    none can be made.
    """
    base = os.environ.get("REFIMPL_CACHE")
    try:
        folder = (
            Path(base)
            if base
            else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refimpl"
        )
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise refusal("E5104", base or "cache folder", found=str(error)) from None
    return folder
