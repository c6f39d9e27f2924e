"""What a planted fault is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Mutant(NamedTuple):
    """A faulty kernel, made when asked for."""

    name: str
    op: str
    make: Callable[[], Callable[..., Any]]
    declared: dict[str, Any] = {}  # noqa: RUF012
