"""The one thread beside the main one that runs Numba kernels, while that one keeps a GPU busy. Numba's
threads serve one caller at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import numba

from refimpl.kernels import linear_numba


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="experts")


def submit(function: Callable, *args: Any) -> Future:
    """Call function(*args) there, after what was submitted before."""
    return _thread().submit(_run, function, args)


def _run(function: Callable, args: tuple) -> Any:
    numba.set_num_threads(linear_numba.threads())  # a thread's own number
    return function(*args)
