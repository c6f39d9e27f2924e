"""Copies of this project's modules with lines changed, executed beside the originals: how the conformance
suite plants faults, and how `refimpl.bench fp8-parts` leaves out parts of a kernel.
"""

from __future__ import annotations

import importlib
import importlib.util
import linecache
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from types import ModuleType, SimpleNamespace
from typing import Any

from refimpl.errors import refusal

Edit = Sequence[str]  # what stands there, what shall
_serial = count()


def mutated(*modules: str, edits: Sequence[Edit], function: str) -> Callable[..., Any]:
    """`function` of the last of these modules, all of them copied in this order, so that later ones import
    the earlier copies. What they import only when it is needed, by `importlib`, may be a copy at any place.

    Each edit replaces one text by another; it must stand exactly once in all of them together: MismatchError
    E8009 otherwise.
    """
    sources = _edited({name: _source(name) for name in modules}, edits)
    with _in_place_of(modules) as copies:
        for name, copy in copies.items():
            exec(compile(sources[name], _remember(name, sources[name]), "exec"), vars(copy))
            if "importlib" in vars(copy):
                vars(copy)["importlib"] = SimpleNamespace(
                    import_module=lambda name: copies.get(name) or importlib.import_module(name)
                )
        return getattr(copies[modules[-1]], function)


def _source(name: str) -> str:
    spec = importlib.util.find_spec(name)
    assert spec and spec.origin
    with open(spec.origin, encoding="utf-8") as file:
        return file.read()


def _edited(sources: dict[str, str], edits: Sequence[Edit]) -> dict[str, str]:
    for old, new in edits:
        found = [name for name, text in sources.items() for _ in range(text.count(old))]
        if len(found) != 1:
            raise refusal("E8009", ", ".join(sources), found=len(found), expected=old)
        sources[found[0]] = sources[found[0]].replace(old, new)
    return sources


def _remember(name: str, source: str) -> str:
    """A file name under which `inspect` finds this source without a file: Triton compiles what it reads."""
    file = f"<changed {name} {next(_serial)}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    return file


@contextmanager
def _in_place_of(modules: tuple[str, ...]) -> Iterator[dict[str, ModuleType]]:
    """New modules under these names for the time of their execution; Numba keeps no machine code of them.

    They call themselves otherwise: machine code of the originals, read from the cache, would take theirs for
    its own where the symbols are the same.
    """
    from refimpl.kernels import jit  # brings Numba, which only planting needs

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
