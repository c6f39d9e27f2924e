"""Pages of mapped weights, asked for when a model is loaded.

A weight that lies in a mapped file is read from there when it is first used. Even where the system has the
file in memory, it then has to enter each page into the process's table, which takes longer than multiplying
what is on it; so a model would be slow until all of its experts have been chosen once. Threads that touch one
byte of each page have all of them entered at the speed of a disk, or of the table.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from refimpl.checkpoint import names
from refimpl.cli import Progress, note
from refimpl.devices.backend import Backend
from refimpl.devices.memory import free_ram
from refimpl.loading.interleaving import FULL, PATIENCE, SHOWN, threads
from refimpl.tensors import Stack, Weight

PIECE = 64 << 20  # bytes of a file that a thread touches at a time
PAGE = mmap.PAGESIZE


def ahead(checkpoint: Mapping[str, Weight | Stack], backend: Backend) -> None:
    """Touch all weights that stay on the host, where memory has the room for them: of a model on a GPU those
    of the routed experts. After PATIENCE seconds the rest is left to be read when it is used, and a note says
    so.
    """
    pieces = [
        memory[start : start + PIECE]
        for memory in _mapped(checkpoint, backend.name == "cuda")
        for start in range(0, memory.size, PIECE)
    ]
    total = sum(p.size for p in pieces)
    if not total or total > FULL * free_ram():
        return
    end = time.monotonic() + PATIENCE
    with Progress(total, "reading weights", "auto" if total > SHOWN else "none") as progress:
        pool = ThreadPoolExecutor(threads())
        try:
            for nbytes in pool.map(_touch, pieces):
                progress(nbytes)
                if time.monotonic() > end:
                    break
        finally:  # also for Ctrl-C
            pool.shutdown(cancel_futures=True)
    if progress.done < total:
        note("the files are read slowly: what is left of them is read when it is first used")


def _mapped(checkpoint: Any, experts_alone: bool) -> Iterator[np.ndarray]:
    """The bytes of each tensor that is read from a file: u8 [n]. A copy that was kept is such, and cannot be
    written to; one that was just made is in memory.
    """
    made = getattr(checkpoint, "made", {})
    for name in checkpoint:
        if experts_alone and not names.is_routed_expert(name):
            continue
        if name not in made:
            yield from map(checkpoint.mapped, checkpoint.stored(name))
        elif not made[name].data.flags.writeable:
            yield made[name].data.reshape(-1)


def _touch(piece: np.ndarray) -> int:
    """Read a byte of each page of u8 [n]; returns n."""
    piece[::PAGE].max()
    return piece.size
