"""Copies of this project's modules with lines changed, executed beside the originals: how faults are planted,
and harmless rewrites made.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

from refimpl.errors import refusal

Edit = Sequence[str]


class Mutant(NamedTuple):
    """A faulty kernel, made when asked for."""

    name: str
    op: str
    make: Callable[[], Callable[..., Any]]
    declared: dict[str, Any] = {}  # noqa: RUF012


def planted(*modules: str, edits: Sequence[Edit], function: str) -> Callable[..., Any]:
    """`function` of the last of these modules, all of them copied in this order, so that later ones import
    the earlier copies.

    Each edit replaces one text by another; it must stand exactly once in all of them together: MismatchError
    E8009 otherwise.
    """
    sources = {}
    for name in modules:
        spec = importlib.util.find_spec(name)
        assert spec and spec.origin
        with open(spec.origin) as file:
            sources[name] = file.read()
    for old, new in edits:
        found = [name for name, text in sources.items() for _ in range(text.count(old))]
        if len(found) != 1:
            raise refusal("E8009 once", ", ".join(modules), found=len(found), expected=old)
        sources[found[0]] = sources[found[0]].replace(old, new)
    with _in_place_of(modules) as copies:
        for name, copy in copies.items():
            exec(compile(sources[name], f"<changed {name}>", "exec"), vars(copy))
        return getattr(copies[modules[-1]], function)


@contextmanager
def _in_place_of(modules: tuple[str, ...]) -> Iterator[dict[str, ModuleType]]:
    """New modules under these names for the time of their execution; Numba keeps no machine code of them.

    They call themselves otherwise: machine code of the originals, read from the cache, would take theirs for
    its own where the symbols are the same.
    """
    from refimpl.kernels import jit

    originals = {name: importlib.import_module(name) for name in modules}
    copies = {name: ModuleType(name) for name in modules}
    folder, jit.folder = jit.folder, lambda: None  # type: ignore[assignment]
    try:
        for name, copy in copies.items():
            copy.__name__ = f"{name} changed"
            sys.modules[copy.__name__] = copy  # where dataclasses look for it
            _put(name, copy)
        yield copies
    finally:
        jit.folder = folder
        for copy in copies.values():
            sys.modules.pop(copy.__name__, None)
        for name, original in originals.items():
            _put(name, original)


def _put(name: str, module: ModuleType) -> None:
    parent, _, leaf = name.rpartition(".")
    sys.modules[name] = module
    setattr(sys.modules[parent], leaf, module)
