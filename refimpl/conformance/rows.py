"""The rows that the flags of the command name, judged one after the other or dealt out to processes, law by
law.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from importlib.util import find_spec

from refimpl import ops
from refimpl.conformance import judge
from refimpl.conformance.laws.ladder import applying
from refimpl.conformance.manifest import Expected, Manifest
from refimpl.conformance.pool import dealt
from refimpl.conformance.trial import Trial
from refimpl.conformance.verdict import Verdict
from refimpl.errors import refusal
from refimpl.ops import OPS

Told = Callable[[Verdict], None]


def trials(args: argparse.Namespace) -> list[Trial]:
    """--kernel, or the rows of the table that --op and --backend name; InputFormatError E8008 where there are
    none.
    """
    if args.kernel:
        manifest = (Manifest.read(args.manifest) if args.manifest else Manifest()).with_declared(args.declare)
        return [Trial(judge.checked(args.op[0]), judge.find(args.kernel), manifest, args.kernel, args.level)]
    found = []
    for pattern in args.op or ["*"]:
        names = [op for op in OPS if fnmatchcase(op, pattern)] or [judge.checked(pattern)]
        found += [
            (op, b)
            for op in names
            for b in ("reference", *OPS[op].fast)
            if not args.backend or b in args.backend
        ]
    if not found:
        raise refusal(
            "E8008",
            " ".join(args.op or ["*"]),
            found=" ".join(args.backend),
            expected="--backend NAME of a row",
        )
    return [
        judge.row(op, backend, args.level) if not elsewhere(backend) else _absent(op, backend, args.level)
        for op, backend in dict.fromkeys(found)
    ]


def elsewhere(backend: str) -> bool:
    """Whether a row needs a process of its own: Triton's interpreter is chosen when triton is first
    imported.
    """
    if backend != "cuda" or os.environ.get("TRITON_INTERPRET") or find_spec("torch") is None:
        return False
    import torch

    return not torch.cuda.is_available()


def _absent(op: str, backend: str, level: str) -> Trial:
    return Trial(op, OPS[op].reference, Manifest(), backend, level)


def judged(chosen: list[Trial], args: argparse.Namespace, expected: Expected, told: Told) -> list[Verdict]:
    """Verdicts in the order of the table; each is `told` as soon as it is known."""
    if args.processes > 1:
        return _in_processes(chosen, args, expected, told)
    return [v for trial in chosen for v in _judged(trial, args.law, args, expected, told)]


def _judged(
    trial: Trial, laws: list[str] | None, args: argparse.Namespace, expected: Expected, told: Told
) -> list[Verdict]:
    """Here, or in another process under Triton's interpreter."""
    if not elsewhere(trial.label):
        return judge.judge(trial, laws, args.seed, True, expected, told=told)
    command = [
        sys.executable,
        "-m",
        "refimpl.conformance",
        "--op",
        trial.op,
        "--backend",
        trial.label,
        "--level",
        trial.level,
    ]
    command += ["--seed", str(args.seed), "--json", *(f"--law={law}" for law in laws or [])]
    command += ["--xfails", str(args.xfails)] if args.xfails else []
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    if done.returncode not in (0, 1) or not done.stdout.strip():
        crash = Verdict(
            trial.op,
            trial.label,
            "process",
            False,
            0,
            0.0,
            why=f"the process ended with {done.returncode}: {done.stderr[-400:]}",
        )
        told(crash)
        return [crash]
    verdicts = [Verdict(**v) for v in json.loads(done.stdout.splitlines()[-1])]
    for v in verdicts:
        told(v)
    return verdicts


# --- in many processes --------------------------------------------------------------------------------------

_chosen: list[Trial]
_given: tuple[argparse.Namespace, Expected]


def _start(args: argparse.Namespace, expected: Expected) -> None:
    global _chosen, _given
    _chosen, _given = trials(args), (args, expected)
    ops.set_threads(1)


def _work(row: int, laws: list[str] | None) -> tuple[int, list[Verdict]]:
    return row, _judged(_chosen[row], laws, *_given, told=lambda v: None)


def _jobs(chosen: list[Trial], wanted: list[str] | None) -> Iterator[tuple[int, list[str] | None]]:
    """A law of a row each; rows of which only the other process knows the laws as a whole, and first, as they
    take longest.
    """
    apart = [i for i, trial in enumerate(chosen) if elsewhere(trial.label)]
    yield from ((i, wanted) for i in apart)
    for i, trial in enumerate(chosen):
        if i not in apart:
            yield from ((i, [law.name]) for law in applying(trial) if not wanted or law.name in wanted)


def _in_processes(
    chosen: list[Trial], args: argparse.Namespace, expected: Expected, told: Told
) -> list[Verdict]:
    found: list[list[Verdict]] = [[] for _ in chosen]
    for row, verdicts in filter(
        None, dealt(args.processes, _start, (args, expected), _work, _jobs(chosen, args.law))
    ):
        found[row] += verdicts
        for v in verdicts:
            told(v)
    return [
        v
        for verdicts in found
        for v in sorted(verdicts, key=lambda v: [*judge.LAWS].index(v.law) if v.law in judge.LAWS else -1)
    ]
