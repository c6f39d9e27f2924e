"""Numbers of threads: of this project's kernels, numpy's BLAS, and torch where it is loaded."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from threadpoolctl import get_cached_controller

from refimpl import ops

COUNTS = (1, 2, 3, 16)
"""That the law `threads` tries. The team of kernels has at most NUMBA_NUM_THREADS, which `child` sets to the
last, so that there are more threads than most machines have cores.
"""


@contextmanager
def kept() -> Iterator[None]:
    """Afterwards all of them have as many threads as before."""
    team, torch = _team(), sys.modules.get("torch")
    before = team.threads() if team else 1
    of_torch = torch.get_num_threads() if torch else 1
    with get_cached_controller().limit(limits=None):  # at its end BLAS and OpenMP have what they had
        try:
            yield
        finally:
            ops.set_threads(before)
            if torch:
                torch.set_num_threads(of_torch)


def _team() -> ModuleType | None:
    """The kernels that know how many threads there are. They are loaded for that: what is not loaded yet has
    the default, and would be left with another.
    """
    if importlib.util.find_spec("numba") is None:
        return None
    return importlib.import_module("refimpl.kernels.team")
