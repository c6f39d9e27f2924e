"""Arrays between pages that nobody may touch: what reads or writes a byte beside them ends the process."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

import numpy as np

from refimpl.conformance.inputs.arrays import tree_map

ENDS = ("at its end", "at its start")
"""Where an array meets a page that is closed. Both at once only arrays of whole pages do."""


def possible() -> bool:
    """Whether this system can close pages."""
    return os.name == "posix" and hasattr(ctypes.CDLL(None), "mprotect")


def guarded(value: Any, end: str) -> Any:
    """All arrays of a tree copied, each with a closed page directly behind it, or directly before it."""
    return tree_map(lambda a: _placed(a, end).view(type(a)), value)


def _placed(a: np.ndarray, end: str) -> np.ndarray:
    if not a.nbytes:
        return a.copy()
    page = mmap.PAGESIZE
    room = -(-a.nbytes // page) * page
    memory = mmap.mmap(-1, room + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for closed in (address, address + page + room):
        if ctypes.CDLL(None).mprotect(ctypes.c_void_p(closed), ctypes.c_size_t(page), 0):  # PROT_NONE
            raise OSError("mprotect refused to close a page")
    start = page + (room - a.nbytes if end == ENDS[0] else 0)
    placed = np.frombuffer(memory, np.uint8, a.nbytes, start).view(a.dtype).reshape(a.shape)
    placed[...] = a
    return placed
