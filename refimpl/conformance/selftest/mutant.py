"""What a fault of a kernel, and a rewrite of one, are to the suite that must find the first and accept the
second.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from functools import partial
from importlib import resources
from typing import Any, NamedTuple

from refimpl import ops
from refimpl.conformance import cache_machine, interpreter
from refimpl.conformance.child import INTERPRETED
from refimpl.conformance.judge import judge
from refimpl.conformance.manifest import Manifest
from refimpl.conformance.rows import MANY
from refimpl.conformance.selftest.compiled import compiled
from refimpl.conformance.trial import Trial
from refimpl.conformance.verdict import Verdict
from refimpl.mutate import mutated

Kernel = Callable[..., Any]


class Mutant(NamedTuple):
    """A changed kernel, made when asked for. `interpreted`: it runs in Triton's interpreter, which takes a
    process of its own. `simd`: the level of SIMD that has the changed code, if not all have it.
    """

    name: str
    op: str
    make: Callable[[], Callable[..., Any]]
    declared: dict[str, Any] = {}  # noqa: RUF012
    interpreted: bool = False
    simd: str = ""

    def lacks(self) -> str:
        """The level of SIMD that this CPU lacks, without which the changed code does not run."""
        if not self.simd:
            return ""
        from refimpl.kernels.simd_llvm import available

        return "" if self.simd in available() else self.simd

    def environment(self) -> dict[str, str]:
        """Of the process in which it is judged."""
        return MANY | (INTERPRETED if self.interpreted else {})

    def verdicts(self, seed: int, level: str = "quick", first: bool = False) -> list[Verdict]:
        """By the laws of its operation; no more than the `first` it breaks, whose case stays as it is."""
        if self.interpreted:
            interpreter.quicken()
        if self.op == cache_machine.NAME:
            return [cache_machine.judge(self.make(), self.name, level, seed, shrink=not first)]
        declared = Manifest().with_values(self.declared, self.name)
        trial = Trial(self.op, self.make(), declared, self.name, level)
        return judge(trial, seed=seed, shrink=not first, stop=first)


def read(file: str, kind: str) -> list[Mutant]:
    """Those of a file beside `faults.toml`, whose tables are called `kind`."""
    text = resources.files("refimpl.conformance").joinpath(file).read_text()
    return [_of(entry) for entry in tomllib.loads(text)[kind]]


def _of(entry: dict[str, Any]) -> Mutant:
    declared = entry.get("declare", {}) | {k: entry[k] for k in ("weights",) if k in entry}
    interpreted = entry.get("interpreted", False)
    simd = entry.get("simd", "")
    return Mutant(entry["name"], entry["op"], _maker(entry), declared, interpreted, simd)


def _maker(entry: dict[str, Any]) -> Callable[[], Callable[..., Any]]:
    module, _, function = entry["where"].partition(":")
    if entry.get("cython"):
        return partial(compiled, edits=entry["edits"], function=function)
    modules = [f"refimpl.{m}" for m in (*entry.get("over", ()), module)]
    make = partial(mutated, *modules, edits=entry["edits"], function=function)
    whole = WHOLE.get(entry.get("when", ""))
    return (lambda: whole(make())) if whole else make


def _one_query(changed: Kernel) -> Kernel:
    """Attention whose way for a single query, which attends to all rows, is changed."""

    def kernel(
        q_nope: Any,
        q_pe: Any,
        latent: Any,
        k_pe: Any,
        kv_b: Any,
        scale: Any,
        rows: Any = None,
        length: Any = None,
    ) -> Any:
        arguments = (q_nope, q_pe, latent, k_pe, kv_b, scale)
        if len(q_nope) == 1 and rows is None:
            return changed(*arguments, length)
        return ops.load("mla_absorbed", "cuda")(*arguments, rows, length)

    return kernel


def _choices(changed: Kernel) -> Kernel:
    """The router whose choice among logits is changed."""
    return lambda x, weight, bias, config: changed(x @ weight.T, bias, config)


WHOLE: dict[str, Callable[[Kernel], Kernel]] = {"one query": _one_query, "choices": _choices}
"""What makes an operation of a function that is a part of one."""
