"""What does not depend on the kernel on trial is worked out once: what a seed draws, the arguments made of
it, and their truth.

Rows of one operation, faults in it and rewrites of it are given the same numbers, each in memory of its own.
Truth is found again by the bytes of the arguments, never by their address or by where they came from, so a
kernel that writes into its inputs cannot spoil it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from refimpl.conformance.inputs.arrays import leaves, tree_map


class Memo:
    """Values by key, the last used kept, up to so much in all."""

    def __init__(self, room: int):
        self.room, self.used = room, 0
        self.kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def get(self, key: Hashable) -> Any:
        """None for what is not kept."""
        if key not in self.kept:
            return None
        self.kept.move_to_end(key)
        return self.kept[key][0]

    def put(self, key: Hashable, value: Any, size: int) -> None:
        """Keep it, and let go of the oldest where there is no room."""
        self.used += size - self.kept.pop(key, (None, 0))[1]
        self.kept[key] = value, size
        while self.used > self.room:
            self.used -= self.kept.popitem(last=False)[1][1]


RECIPES = Memo(2**17)  # by number
ARGUMENTS, LARGE, TRUTHS = Memo(2**29), Memo(2**28), Memo(2**26)  # by bytes
"""Small cases of an operation are kept until its next row is judged; real sizes would drive them out."""
BIG = 2**24


def arguments(key: Hashable, make: Callable[[], tuple]) -> tuple:
    """What `make` returns for this key, each time in new memory that is laid out as `make` laid it out: views
    of one array are views of one again, such as the two parts of a cache's rows.
    """
    kept = ARGUMENTS.get(key) or LARGE.get(key)
    if kept is None:
        kept = make()
        size = sum(_owner(a).nbytes for a in leaves(kept))
        (LARGE if size > BIG else ARGUMENTS).put(key, kept, size)
    owners: dict[int, np.ndarray] = {}
    return tree_map(lambda a: _again(a, owners), kept)


def _owner(a: np.ndarray) -> np.ndarray:
    return a if a.base is None else a.base


def _again(a: np.ndarray, owners: dict[int, np.ndarray]) -> np.ndarray:
    """A copy in new memory with the strides and the offset that `a` has in the array it is a view of, whose
    own copy is one of `owners`, by its address.
    """
    owner = _owner(a)
    if not owner.flags.c_contiguous:
        return a.copy(order="K")
    offset = a.__array_interface__["data"][0] - owner.__array_interface__["data"][0]
    if id(owner) not in owners:
        owners[id(owner)] = owner.copy(order="C")
    return type(a)(a.shape, a.dtype, owners[id(owner)], offset, a.strides)


def truth(
    key: tuple, args: tuple, find: Callable[[], list[tuple[np.ndarray, ...]]]
) -> list[tuple[np.ndarray, ...]]:
    """What `find` returns for these arguments: tuples of arrays, to be read only."""
    where = (*key, digest(args))
    found = TRUTHS.get(where)
    if found is None:
        found = find()
        TRUTHS.put(where, found, sum(a.nbytes for arrays in found for a in arrays))
    return found


def digest(value: Any) -> Hashable:
    """What tells the contents of a tree of arrays and plain values from those of another, in this process: of
    bytes Python's own hash of 64 bits, which is ten times as fast as those of hashlib.
    """
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, hash(value.tobytes())
    if isinstance(value, tuple | list):
        return type(value).__name__, *map(digest, value)
    return repr(value)
