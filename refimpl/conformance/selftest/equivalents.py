"""Rewrites that change no result beyond its bound: other orders of summation, other blockings, fused
multiply-add, wider accumulators, tables for arithmetic; and lines of kernels written otherwise, see
`kernel_rewrites.toml`. `python -m refimpl.conformance --equivalents` judges them all; a law that one of them
breaks is a false alarm.
"""

from __future__ import annotations

from collections.abc import Iterator

from refimpl.conformance.judge import judge
from refimpl.conformance.pool import Task, in_order
from refimpl.conformance.rows import MANY, usual_threads
from refimpl.conformance.selftest.equal_attention import ATTENTION, FUSED
from refimpl.conformance.selftest.equal_formats import FP8, formats
from refimpl.conformance.selftest.equal_sums import POOL, linears
from refimpl.conformance.selftest.mutant import Mutant, left_out, read
from refimpl.conformance.selftest.rewrite import Rewrite
from refimpl.conformance.verdict import Verdict


def everything() -> list[Rewrite]:
    """All equivalent rewrites that are functions; those of kernels' source are in `of_kernels`."""
    return [*formats(), *FP8, *linears(), *POOL, *FUSED, *ATTENTION]


def of_kernels() -> list[Mutant]:
    """All that are changed lines of kernels."""
    return read("kernel_rewrites.toml", "rewrite")


def on_gpu() -> list[Mutant]:
    """Those of them that need a GPU."""
    return read("gpu_rewrites.toml", "rewrite")


def alarms(rewrite: Rewrite | Mutant, seed: int = 0, level: str = "quick") -> list[Verdict]:
    """The laws that a rewrite breaks: there should be none."""
    if isinstance(rewrite, Mutant):
        found = rewrite.verdicts(seed, level)
    else:
        trial = rewrite.trial()
        trial.level = level
        found = judge(trial, seed=seed)
    return [v for v in found if not v.passed]


def alarms_by_name(op: str, name: str, seed: int = 0) -> list[Verdict]:
    """`alarms` of the rewrite of this operation and name: a function that another process can be sent."""
    return alarms(next(r for r in both() if (r.op, r.name) == (op, name)), seed)


def both() -> list[Rewrite | Mutant]:
    """All rewrites, those that are functions first, and those that need a GPU last."""
    return [*everything(), *of_kernels(), *on_gpu()]


def run(
    seed: int = 0, only: str = "", processes: int = 1
) -> Iterator[tuple[Rewrite | Mutant, list[Verdict]]]:
    """Each rewrite whose name holds `only`, and the laws that called it wrong; not those `elsewhere`."""
    chosen = [r for r in both() if only in r.name and not (isinstance(r, Mutant) and r.lacks())]
    tasks = [Task((r.op, r.name, seed), r.environment() if isinstance(r, Mutant) else MANY) for r in chosen]
    threads = 1 if processes > 1 else usual_threads()
    yield from zip(chosen, in_order(processes, threads, alarms_by_name, tasks))


def elsewhere(only: str = "") -> dict[str, list[str]]:
    """The names of those that `run` leaves out, by what this machine lacks."""
    return left_out(r for r in both() if isinstance(r, Mutant) and only in r.name)
