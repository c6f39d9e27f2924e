"""What a fault of a kernel, and a rewrite of one, are to the suite that must find the first and accept the
second.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable
from functools import partial
from importlib import resources
from typing import Any, NamedTuple

from refimpl import ops
from refimpl.conformance import cache_machine, interpreter
from refimpl.conformance.child import INTERPRETED, Child, Job, Limits
from refimpl.conformance.judge import judge
from refimpl.conformance.lookup import Spec, row
from refimpl.conformance.manifest import Manifest
from refimpl.conformance.rows import MANY
from refimpl.conformance.selftest.compiled import compiled
from refimpl.conformance.trial import Trial
from refimpl.conformance.verdict import FATAL, Verdict
from refimpl.conformance.ways import NEEDS
from refimpl.mutate import mutated

Kernel = Callable[..., Any]
SECONDS = 60.0  # that one case of a kernel on a GPU may take: a fault may let it hang


class Mutant(NamedTuple):
    """A changed kernel, made when asked for. `interpreted`: it runs in Triton's interpreter, which takes a
    process of its own. `simd`: the level of SIMD that has the changed code, if not all have it. `gpu`: the
    GPU that has it, one of `NEEDS`; the kernel is judged in a process of its own then, by the name `planted`.
    """

    name: str
    op: str
    make: Callable[[], Callable[..., Any]]
    declared: dict[str, Any] = {}  # noqa: RUF012
    interpreted: bool = False
    simd: str = ""
    gpu: str = ""
    planted: str = ""
    hangs: bool = False  # or ends its process, on a GPU, where that may have other reasons

    def lacks(self) -> str:
        """What this machine lacks, without which the changed code does not run; empty for nothing."""
        if self.gpu:
            return "" if NEEDS[self.gpu].met() else NEEDS[self.gpu].says
        if not self.simd:
            return ""
        from refimpl.kernels.simd_llvm import available

        return "" if self.simd in available() else f"a CPU with {self.simd}"

    def environment(self) -> dict[str, str]:
        """Of the process in which it is judged."""
        return MANY | (INTERPRETED if self.interpreted else {})

    def verdicts(self, seed: int, level: str = "quick", first: bool = False) -> list[Verdict]:
        """By the laws of its operation; no more than the `first` it breaks, whose case stays as it is."""
        if self.gpu:
            return self._on_gpu(seed, level, first)
        if self.interpreted:
            interpreter.quicken()
        if self.op == cache_machine.NAME:
            return [cache_machine.judge(self.make(), self.name, level, seed, shrink=not first)]
        declared = Manifest().with_values(self.declared, self.name)
        trial = Trial(self.op, self.make(), declared, self.name, level)
        return judge(trial, seed=seed, shrink=not first, stop=first)

    def _on_gpu(self, seed: int, level: str, first: bool) -> list[Verdict]:
        """After a fault that hangs, or reads where nothing is, a process can do no more on a GPU."""
        declared = row(self.op, "cuda").manifest.with_values(self.declared, self.name)
        spec = Spec(self.op, kernel=self.planted, manifest=declared, level=level)
        with Child(Limits(SECONDS)) as child:
            found = child.judge(Job(spec, seed=seed, stop=first))
        if not found:
            raise RuntimeError(f"no verdict on {self.name}")
        return found

    def shown_by(self, broken: Verdict) -> bool:
        """Whether a broken law shows the fault. On a GPU an exception and a death have many reasons, such as
        a compiler or memory that others use; and the unchanged kernel must get the same case right.
        """
        if not self.gpu:
            return True
        if broken.law in FATAL:
            return self.hangs
        if broken.why.startswith("raised "):
            return False
        with Child(Limits(SECONDS)) as child:
            return child.again(Job(Spec(self.op, "cuda"), (broken.law,), broken.case)) is None


def left_out(chosen: Iterable[Mutant]) -> dict[str, list[str]]:
    """Names of those whose changed code does not run here, by what this machine lacks."""
    found: dict[str, list[str]] = {}
    for mutant in chosen:
        if need := mutant.lacks():
            found.setdefault(need, []).append(mutant.name)
    return found


def read(file: str, kind: str) -> list[Mutant]:
    """Those of a file beside `faults.toml`, whose tables are called `kind`."""
    text = resources.files("refimpl.conformance").joinpath(file).read_text()
    return [_of(entry, f"{PLANTED}:{kind}_{i}") for i, entry in enumerate(tomllib.loads(text)[kind])]


PLANTED = "refimpl.conformance.selftest.planted"
"""The module that gives changed kernels for a GPU by their numbers."""


def _of(entry: dict[str, Any], planted: str) -> Mutant:
    declared = entry.get("declare", {}) | {k: entry[k] for k in ("weights",) if k in entry}
    interpreted = entry.get("interpreted", False)
    needs = entry.get("simd", ""), entry.get("gpu", "")
    hangs = entry.get("hangs", False)
    return Mutant(entry["name"], entry["op"], _maker(entry), declared, interpreted, *needs, planted, hangs)


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
