"""The rows that the flags of the command name, judged one after the other or dealt out to processes."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from importlib.util import find_spec
from itertools import count
from threading import Lock

from refimpl import ops
from refimpl.conformance.child import INTERPRETED, Child, Job, Limits
from refimpl.conformance.families.by_name import family
from refimpl.conformance.lookup import Spec, checked, checked_manifest
from refimpl.conformance.manifest import Expected, Manifest
from refimpl.conformance.pool import ALONE
from refimpl.conformance.threads import COUNTS
from refimpl.conformance.verdict import Verdict
from refimpl.conformance.ways import Environment, elsewhere, environments
from refimpl.errors import near, refusal
from refimpl.kernels import processors
from refimpl.ops import OPS

Told = Callable[[Verdict], None]
MANY = {"NUMBA_NUM_THREADS": str(max(COUNTS))}
"""Room for as many threads as the law `threads` tries; how many there are otherwise is said to each child."""


def specs(args: argparse.Namespace) -> list[Spec]:
    """--kernel, or the rows of the table that --op and --backend name; InputFormatError E8007, E8008 where
    there are none.
    """
    if args.kernel:
        brought = Spec(args.op[0], reference=args.reference or "", format=args.format or "")
        brought.prepare()
        manifest = (Manifest.read(args.manifest) if args.manifest else Manifest()).with_declared(args.declare)
        op = checked(args.op[0])
        checked_manifest(op, manifest)
        return [brought._replace(kernel=args.kernel, manifest=manifest, level=args.level)]
    found = []
    for pattern in args.op or ["*"]:
        names = [op for op in OPS if fnmatchcase(op, pattern)] or [checked(pattern)]
        found += [(op, b) for op in names for b in columns(["reference", *OPS[op].fast], args)]
    if not found:
        raise refusal(
            "E8008",
            " ".join(args.op or ["*"]),
            found=" ".join(args.backend or []),
            expected=f"--backend {' or '.join(ops.BACKENDS)}, of a row that has it",
            hint="".join(f"did you mean {b}?" for b in near(" ".join(args.backend or []), ops.BACKENDS)),
        )
    return [
        Spec(op, backend, level=args.level, environment=environment)
        for op, backend in dict.fromkeys(found)
        for environment in ((), *_elsewhere(op, backend, args))
    ]


def _elsewhere(op: str, backend: str, args: argparse.Namespace) -> list[Environment]:
    """Where a row is judged once more: only when all its laws are, and not at the smoke level."""
    partly = args.law or args.case is not None or args.level == "smoke" or args.false_alarms
    return [] if partly else environments(op, backend)


def columns(have: list[str], args: argparse.Namespace) -> list[str]:
    """The backends, of those that a row has, that are asked for; else all whose libraries are installed."""
    if args.backend:
        return [b for b in have if b in args.backend]
    return [b for b in have if b != "cuda" or find_spec("torch")]


def interpreted(backend: str) -> bool:
    """Whether a row's kernels run in Triton's interpreter, which takes a process of its own: it is chosen
    when triton is first imported.
    """
    return backend == "cuda" and not os.environ.get("TRITON_INTERPRET") and not ops.sees_gpu()


def child(backend: str, args: argparse.Namespace, more: Environment = ()) -> Child:
    """A process to judge rows of this backend, in an environment with `more`."""
    chosen = (INTERPRETED if interpreted(backend) else {}) | (ALONE if args.processes > 1 else {}) | MANY
    environment = {n: value for n, value in chosen.items() if n not in os.environ} | dict(more)
    limits = Limits()
    limits = Limits(args.seconds or limits.seconds, 1e9 * args.memory if args.memory else limits.nbytes)
    return Child(limits, environment, threads=1 if args.processes > 1 else usual_threads())


def usual_threads() -> int:
    """The number of threads of a kernel: all cores this process may use. A child has room for more, see
    `MANY`.
    """
    return len(processors.affinity())


def judged(chosen: list[Spec], args: argparse.Namespace, expected: Expected, told: Told) -> list[Verdict]:
    """Verdicts in the order of the table; each is `told` as soon as it is known."""
    laws = tuple(args.law) if args.law else None
    jobs = [Job(s, elsewhere(s.environment) or laws, None, args.seed, expected) for s in chosen]
    found: list[list[Verdict]] = [[] for _ in jobs]
    order = (
        range(len(jobs)) if args.processes == 1 else sorted(range(len(jobs)), key=lambda i: _rank(chosen[i]))
    )
    groups = of_one_process(chosen, order)
    todo, lock, begun, done = deque(groups), Lock(), time.monotonic(), count(1)

    def tell(v: Verdict) -> None:
        with lock:
            told(v)

    def work(_: int) -> None:
        children: dict[tuple[bool, Environment], Child] = {}
        try:
            for group in _taken(todo):
                where = interpreted(chosen[group[0]].backend), chosen[group[0]].environment
                if where not in children:
                    children[where] = child(chosen[group[0]].backend, args, where[1])
                for i in group:
                    found[i] = children[where].judge(jobs[i], tell)
                    _progress(next(done), len(jobs), begun)
                if where[1]:  # nobody has more of it
                    children.pop(where).close()
        finally:
            todo.clear()  # all is done, or one of them failed
            for c in children.values():
                c.close()

    with ThreadPoolExecutor(args.processes) as pool:
        list(pool.map(work, range(args.processes)))
    return [v for verdicts in found for v in verdicts]


def of_one_process(chosen: list[Spec], order: Iterable[int]) -> list[list[int]]:
    """The numbers in this order, but those of an operation together, whose rows get the same inputs, which a
    process makes once, with their truth; and those of an environment, whose process begins once, and compiles
    its kernels once.
    """
    groups: dict[tuple, list[int]] = {}
    for i in order:
        spec = chosen[i]
        groups.setdefault(spec.environment or (spec.op, interpreted(spec.backend)), []).append(i)
    return list(groups.values())


def _taken(todo: deque[list[int]]) -> Iterator[list[int]]:
    """One after the other, until another thread has taken the last."""
    while todo:
        try:
            yield todo.popleft()
        except IndexError:
            return


def _rank(spec: Spec) -> tuple[bool, int]:
    """What takes longest comes first: interpreted kernels, then operations on many kinds of weights."""
    if spec.op not in OPS:  # the cache, and what else a model does
        return True, 0
    return not interpreted(spec.backend), -len(family(spec.op).variants(spec.op, Manifest()))


def _progress(done: int, total: int, begun: float) -> None:
    """On a terminal, how far it is."""
    if sys.stderr.isatty() and total > 1:
        left = (time.monotonic() - begun) / done * (total - done)
        print(f"{done} of {total} kernels, about {left:.0f} s left", file=sys.stderr, flush=True)
