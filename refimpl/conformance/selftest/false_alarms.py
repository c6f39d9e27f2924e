"""Must not cry wolf: the drawn laws of right kernels with many seeds, dealt out to processes. What is
enumerated does not depend on a seed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from refimpl import ops
from refimpl.cli import to_json
from refimpl.conformance import cache_machine, report
from refimpl.conformance.judge import judge_drawn, warm_up
from refimpl.conformance.laws.ladder import LADDER, Law, applying
from refimpl.conformance.pool import EVERY_S, dealt
from refimpl.conformance.rows import interpreted
from refimpl.conformance.trial import Trial
from refimpl.conformance.verdict import Verdict

Trials = Callable[[argparse.Namespace], list[Trial]]  # of a module, so that each process makes its own


@dataclass
class Seen:
    """One seed: how many verdicts, and which were alarms."""

    seed: int
    finished: bool = True
    verdicts: int = 0
    seconds: float = 0.0  # of a core
    alarms: list[Verdict] = field(default_factory=list)

    def add(self, verdicts: list[Verdict]) -> None:
        """Count the verdicts, and keep those that are alarms."""
        self.verdicts += len(verdicts)
        self.alarms += [v for v in verdicts if not v.passed]


# --- in a process of its own --------------------------------------------------------------------------------

_kernels: list[list[tuple[Law, list[Trial]]]]  # of each operation: its laws that draw, and whom they judge
_args: argparse.Namespace


def _initialize(make: Trials, args: argparse.Namespace) -> None:
    global _kernels, _args
    _kernels, _args = (
        [_by_law(list(group), args.law) for _, group in groupby(make(args), lambda t: t.op)],
        args,
    )
    ops.set_threads(1)


def _by_law(trials: list[Trial], wanted: list[str] | None) -> list[tuple[Law, list[Trial]]]:
    """Law by law, so that kernels of an operation meet the same inputs one after the other."""
    for trial in trials:
        warm_up(trial)
    of = [(trial, {law.name for law in applying(trial)}) for trial in trials]
    return [
        (law, [t for t, names in of if law.name in names])
        for law in LADDER
        if (law.strategies or law.slow) and (not wanted or law.name in wanted)
    ]


def _seed(seed: int, end: float) -> Seen:
    """All kernels with one seed; not finished if `end` (time.time) comes first."""
    seen, start = Seen(seed), time.process_time()
    for laws in _kernels:
        if time.time() > end:
            seen.finished = False
            break
        seen.add([_judged(trial, law, seed) for law, trials in laws for trial in trials])
    if seen.finished and _with_cache(_args):
        seen.add([cache_machine.judge(number=seed)])
    seen.seconds = time.process_time() - start
    return seen


def _judged(trial: Trial, law: Law, seed: int) -> Verdict:
    """What a law itself raises is an alarm too."""
    try:
        return judge_drawn(trial, law, seed)
    except Exception as error:
        return Verdict(
            trial.op,
            trial.label,
            law.name,
            False,
            0,
            0.0,
            why=f"the law raised {type(error).__name__}: {error}"[:300],
        )


def _with_cache(args: argparse.Namespace) -> bool:
    return not (args.equivalents or args.op or args.law)


# --- the campaign -------------------------------------------------------------------------------------------


def campaign(make: Trials, args: argparse.Namespace) -> int:
    """Up to N seeds from --seed on, in --processes, for at most --minutes; exit code 1 for any alarm."""
    start, seen, told = time.monotonic(), list[Seen](), 0.0
    end = time.time() + 60 * args.minutes if args.minutes else float("inf")
    rows = [f"{t.op} {t.label}" for t in make(args)]
    print(f"{len(rows)} kernels{_left_out(args)}, {args.processes} processes", file=sys.stderr)
    try:
        for one in _dealt(make, args, end):
            seen += [one] if one else []
            for v in one.alarms if one else ():
                print(f"seed {one.seed if one else ''}\n{report.text([v])}", file=sys.stderr, flush=True)
            if time.monotonic() > told + EVERY_S:
                told = time.monotonic()
                print(f"{told - start:6.0f} s  {line(seen, args)}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    if args.json:
        print(to_json(_as_json(seen, rows)))
    print(
        f"{line(seen, args)}, {time.monotonic() - start:.0f} s in {args.processes} processes",
        file=sys.stderr if args.json else sys.stdout,
    )
    return int(any(s.alarms for s in seen))


def _left_out(args: argparse.Namespace) -> str:
    return (
        " (without the GPU's: there is none)"
        if not args.equivalents and not args.kernel and interpreted("cuda")
        else ""
    )


def line(seen: list[Seen], args: argparse.Namespace) -> str:
    """One line about how far the runs are."""
    done = [s for s in seen if s.finished]
    what = "all equivalent rewrites" if args.equivalents else "the quick level"
    each = f", {sum(s.seconds for s in done) / len(done):.1f} s of a core each" if done else ""
    verdicts, alarms = sum(s.verdicts for s in seen), sum(len(s.alarms) for s in seen)
    return (
        f"{len(done)} of {args.false_alarms} runs of {what}{each}, {verdicts} verdicts, {alarms} false alarms"
    )


def _as_json(seen: list[Seen], rows: list[str]) -> dict[str, Any]:
    done = sorted(s.seed for s in seen if s.finished)
    alarms = [{"seed": s.seed, **v} for s in seen for v in report.as_json(s.alarms)]
    return {"seeds": done, "verdicts": sum(s.verdicts for s in seen), "alarms": alarms, "kernels": rows}


def _dealt(make: Trials, args: argparse.Namespace, end: float) -> Iterator[Seen | None]:
    """Each seed as it is done, None whenever EVERY_S went by without one."""
    seeds = range(args.seed, args.seed + args.false_alarms)
    return dealt(args.processes, _initialize, (make, args), _seed, ((seed, end) for seed in seeds), end)
