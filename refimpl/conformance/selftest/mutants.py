"""Real faults, each planted alone in a copy of a reference or a kernel: `python -m refimpl.conformance
--mutants`. The quick level must find all.

A fault is a changed line of source, see `faults.toml`; those that need a function around a kernel (stale
buffers, races) stand in `faulty_wrappers`.
"""

from __future__ import annotations

import time
import tomllib
from collections.abc import Iterator
from functools import partial
from importlib import resources
from typing import Any

from refimpl.conformance import cache_machine
from refimpl.conformance.judge import judge
from refimpl.conformance.manifest import Manifest
from refimpl.conformance.selftest.faulty_sizes import SIZE_FAULTS
from refimpl.conformance.selftest.faulty_wrappers import FAULTY_WRAPPERS
from refimpl.conformance.selftest.mutant import Mutant
from refimpl.conformance.trial import Trial
from refimpl.conformance.verdict import Verdict
from refimpl.mutate import mutated


def source_mutants() -> list[Mutant]:
    """Those of `faults.toml`."""
    text = resources.files("refimpl.conformance").joinpath("faults.toml").read_text()
    return [_planted(entry) for entry in tomllib.loads(text)["fault"]]


def _planted(entry: dict[str, Any]) -> Mutant:
    module, _, function = entry["where"].partition(":")
    modules = [f"refimpl.{m}" for m in (*entry.get("over", ()), module)]
    declared = entry.get("declare", {}) | {k: entry[k] for k in ("weights",) if k in entry}
    return Mutant(
        entry["name"],
        entry["op"],
        partial(mutated, *modules, edits=entry["edits"], function=function),
        declared,
    )


def everything() -> list[Mutant]:
    """All of them."""
    return [*source_mutants(), *FAULTY_WRAPPERS, *SIZE_FAULTS]


def tried(mutant: Mutant, seed: int = 0) -> Verdict | None:
    """The first law of the quick level that the mutant breaks; None where it breaks none."""
    kernel = mutant.make()
    if mutant.op == cache_machine.NAME:
        verdict = cache_machine.judge(kernel, mutant.name, number=seed, shrink=False)
        return None if verdict.passed else verdict
    trial = Trial(mutant.op, kernel, Manifest().with_values(mutant.declared, mutant.name), mutant.name)
    return next((v for v in judge(trial, seed=seed, shrink=False, stop=True) if not v.passed), None)


def run(seed: int = 0) -> Iterator[tuple[Mutant, Verdict | None, float]]:
    """Each mutant, what found it, and how long that took."""
    for mutant in everything():
        start = time.perf_counter()
        found = tried(mutant, seed)
        yield mutant, found, time.perf_counter() - start
