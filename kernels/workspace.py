"""Memory that kernels work in, kept from call to call, so that a steady state allocates nothing."""

from __future__ import annotations

import math
import threading

import numpy as np

F32, U8 = np.dtype(np.float32), np.dtype(np.uint8)


class Workspace(threading.local):
    """Buffers that calls share and that grow when needed, so that a steady state allocates nothing. One set
    for each Python thread.
    """

    def __init__(self):
        self._memory: dict[str, np.ndarray] = {}
        self._known: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: np.dtype = F32) -> np.ndarray:
        """An array of `dtype` [*shape] in memory of earlier calls under this name, contents undefined, from a
        64-byte boundary.
        """
        # Views are kept too, as making one takes time at every call.
        known = self._known.get((name, shape))
        if known is not None and known.dtype is dtype:
            return known
        nbytes = math.prod(shape) * dtype.itemsize
        # 64 bytes for the boundary, half as much again for requests that grow. Where shapes are many, of
        # prompts of every length, views are forgotten before they pile up.
        if name not in self._memory or self._memory[name].nbytes < nbytes + 64 or len(self._known) > 256:
            self._known.clear()  # views of what is given up
            self._memory[name] = np.empty(nbytes + nbytes // 2 + 64, np.uint8)
        start = -self._memory[name].ctypes.data % 64
        self._known[name, shape] = self._memory[name][start : start + nbytes].view(dtype).reshape(shape)
        return self._known[name, shape]


WORKSPACE = Workspace()
