"""Real faults, each planted alone in a copy of a reference or a kernel: `python -m refimpl.conformance
--mutants`. The quick level must find all.

A fault is a changed line of source, see `faults.toml` (references, formats, Numba, torch),
`kernel_faults.toml` (LLVM, Numba, Triton, Cython) and `gpu_faults.toml` (Gluon, and what only compiled Triton
has); those that need a function around a kernel (stale buffers, races) stand in `faulty_wrappers`, those of
real sizes in `faulty_sizes`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from refimpl.conformance.pool import Task, in_order
from refimpl.conformance.rows import usual_threads
from refimpl.conformance.selftest.faulty_sizes import SIZE_FAULTS
from refimpl.conformance.selftest.faulty_wrappers import FAULTY_WRAPPERS
from refimpl.conformance.selftest.mutant import Mutant, left_out, read
from refimpl.conformance.verdict import Verdict


def source_mutants() -> list[Mutant]:
    """The faults of references' source that `faults.toml` lists."""
    return read("faults.toml", "fault")


def kernel_mutants() -> list[Mutant]:
    """The faults of kernels' source that `kernel_faults.toml` lists."""
    return read("kernel_faults.toml", "fault")


def everything() -> list[Mutant]:
    """All faults that need no GPU: in source, in wrappers, and those that show at real sizes alone."""
    return [*source_mutants(), *kernel_mutants(), *FAULTY_WRAPPERS, *SIZE_FAULTS]


def on_gpu() -> list[Mutant]:
    """The faults that need a GPU, which `gpu_faults.toml` lists."""
    return read("gpu_faults.toml", "fault")


def _named(only: str) -> list[Mutant]:
    return [m for m in (*everything(), *on_gpu()) if only in m.name]


def tried(mutant: Mutant, seed: int = 0) -> Verdict | None:
    """The first law of the quick level that the mutant breaks; None where it breaks none, or where that does
    not show the fault.
    """
    broken = next((v for v in mutant.verdicts(seed, first=True) if not v.passed), None)
    return broken if broken and mutant.shown_by(broken) else None


def tried_by_name(op: str, name: str, seed: int = 0) -> tuple[Verdict | None, float]:
    """`tried` for the fault of this operation and name, and the seconds it took: a function that another
    process can be sent.
    """
    start = time.perf_counter()
    found = tried(next(m for m in _named(name) if (m.op, m.name) == (op, name)), seed)
    return found, time.perf_counter() - start


def run(seed: int = 0, only: str = "", processes: int = 1) -> Iterator[tuple[Mutant, Verdict | None, float]]:
    """Each mutant whose name holds `only`, what found it, and how long that took; not those `elsewhere`."""
    chosen = [m for m in _named(only) if not m.lacks()]
    tasks = [Task((m.op, m.name, seed), m.environment()) for m in chosen]
    threads = 1 if processes > 1 else usual_threads()
    for mutant, found in zip(chosen, in_order(processes, threads, tried_by_name, tasks)):
        yield mutant, *found


def elsewhere(only: str = "") -> dict[str, list[str]]:
    """The names of those that `run` leaves out, by what this machine lacks."""
    return left_out(_named(only))
