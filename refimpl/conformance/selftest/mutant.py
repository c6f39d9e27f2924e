"""What a fault of a kernel is, to the suite that must find it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Mutant(NamedTuple):
    """A faulty kernel, made when asked for."""

    name: str
    op: str
    make: Callable[[], Callable[..., Any]]
    declared: dict[str, Any] = {}  # noqa: RUF012
