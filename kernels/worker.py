"""The one thread beside the main one that runs routed experts, while that one keeps a GPU busy. It is the
team's caller (`team`) then, and takes part in the work.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="experts")


def submit(function: Callable, *args: Any) -> Future:
    """Call function(*args) there, after what was submitted before."""
    return _thread().submit(function, *args)
