"""Which of its ways a kernel took. Kernels say it where they choose; who wants to know listens.

A kernel has several ways to one result: alone or with a team of threads, a few tokens or many, with a
format's own strips or through the reference. The conformance suite must know which of them its inputs
reached, so each says its name when it is entered. Nobody listens outside the suite, and then a name costs
one comparison.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

_heard: Counter[str] | None = None


def entered(*ways: str) -> None:
    """Say that these ways are taken now."""
    if _heard is not None:
        _heard.update(ways)


def listened_to() -> bool:
    """Whether anybody listens: names that take time to find need not be found otherwise."""
    return _heard is not None


@contextmanager
def listening() -> Iterator[Counter[str]]:
    """How often each way is entered meanwhile, in all threads of this process. Who listened before hears of
    it at the end.
    """
    global _heard
    before, mine = _heard, Counter[str]()
    _heard = mine
    try:
        yield mine
    finally:
        _heard = before
        if before is not None:
            before.update(mine)
