"""Must not cry wolf: the drawn laws of right kernels with many seeds, dealt out to processes. What is
enumerated does not depend on a seed.
"""

from __future__ import annotations

import argparse
import gc
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
from refimpl.conformance.pool import EVERY_S, Stopped, dealt
from refimpl.conformance.rows import interpreted
from refimpl.conformance.trial import Trial
from refimpl.conformance.verdict import Verdict

Trials = Callable[[argparse.Namespace], list[Trial]]  # of a module, so that each process makes its own


@dataclass
class Seen:
    """What was judged with one seed: in how many parts, how many verdicts, and which were alarms."""

    seed: int
    parts: int = 0  # operations, and the cache
    verdicts: int = 0
    seconds: float = 0.0  # of a core
    alarms: list[Verdict] = field(default_factory=list)

    def add(self, verdicts: list[Verdict]) -> None:
        """Count the verdicts, and keep those that are alarms."""
        self.verdicts += len(verdicts)
        self.alarms += [v for v in verdicts if not v.passed]

    def join(self, other: Seen) -> None:
        """Add what was judged with the same seed elsewhere."""
        self.parts += other.parts
        self.verdicts += other.verdicts
        self.seconds += other.seconds
        self.alarms += other.alarms


# --- in a process of its own --------------------------------------------------------------------------------

_kernels: list[list[tuple[Law, list[Trial]]]]  # of each operation: its laws that draw, and whom they judge


def _initialize(make: Trials, args: argparse.Namespace) -> None:
    global _kernels
    _kernels = [_by_law(trials, args.law) for trials in _operations(make(args))]
    ops.set_threads(1)
    gc.freeze()  # what is compiled stays, and need not be looked through whenever hypothesis left garbage


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


def _part(seed: int, number: int) -> Seen:
    """All kernels of the operation of this number with one seed; the cache behind the last of them."""
    seen, start = Seen(seed, parts=1), time.process_time()
    if number < len(_kernels):
        seen.add([_judged(trial, law, seed) for law, trials in _kernels[number] for trial in trials])
    else:
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


# --- the campaign -------------------------------------------------------------------------------------------


def campaign(make: Trials, args: argparse.Namespace) -> int:
    """Up to N seeds from --seed on, in --processes, for at most --minutes; exit code 1 for any alarm, 130
    when it was stopped before its end.
    """
    trials = make(args)
    run = Run(args, parts=len(_operations(trials)) + _with_cache(args))
    print(f"{len(trials)} kernels{_left_out(args)}, {args.processes} processes", file=sys.stderr)
    with Stopped() as stopped:
        for one in _dealt(make, args, run.parts):
            if one:
                run.add(one)
            run.tell()
    if args.json:
        print(to_json(run.as_json([f"{t.op} {t.label}" for t in trials])))
    line = f"{run.line()}, {time.monotonic() - run.begun:.0f} s in {args.processes} processes"
    line = f"stopped before the end: {line}" if stopped.early else line
    print(line, file=sys.stderr if args.json else sys.stdout)
    return stopped.code(bool(run.alarms()))


def _operations(trials: list[Trial]) -> list[list[Trial]]:
    """The kernels of each operation: they get the same numbers, which are made once."""
    return [list(group) for _, group in groupby(trials, lambda t: t.op)]


def _with_cache(args: argparse.Namespace) -> bool:
    return not (args.equivalents or args.op or args.law)


def _left_out(args: argparse.Namespace) -> str:
    return (
        " (without the GPU's: there is none)"
        if not args.equivalents and not args.kernel and interpreted("cuda")
        else ""
    )


@dataclass
class Run:
    """How far a campaign is: what was judged with each seed, of which each has so many parts."""

    args: argparse.Namespace
    parts: int
    seeds: dict[int, Seen] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)
    told: float = 0.0

    def add(self, one: Seen) -> None:
        """Count a part, and tell its alarms."""
        self.seeds.setdefault(one.seed, Seen(one.seed)).join(one)
        for v in one.alarms:
            print(f"seed {one.seed}\n{report.text([v])}", file=sys.stderr, flush=True)

    def tell(self) -> None:
        """Now and then one line about how far it is."""
        if time.monotonic() > self.told + EVERY_S:
            self.told = time.monotonic()
            print(f"{self.told - self.begun:6.0f} s  {self.line()}", file=sys.stderr, flush=True)

    def done(self) -> list[Seen]:
        """The seeds of which nothing is left to judge."""
        return [s for s in self.seeds.values() if s.parts == self.parts]

    def alarms(self) -> list[tuple[int, Verdict]]:
        """Every false alarm, with its seed."""
        return [(s.seed, v) for s in self.seeds.values() for v in s.alarms]

    def line(self) -> str:
        """How many runs were finished, and all verdicts, those of unfinished runs too."""
        done, every = self.done(), self.seeds.values()
        what = "all equivalent rewrites" if self.args.equivalents else "the quick level"
        each = f", {sum(s.seconds for s in done) / len(done):.1f} s of a core each" if done else ""
        return (
            f"{len(done)} of {self.args.false_alarms} runs of {what}{each}, "
            f"{sum(s.verdicts for s in every)} verdicts, {len(self.alarms())} false alarms"
        )

    def as_json(self, rows: list[str]) -> dict[str, Any]:
        """The finished seeds, the number of verdicts, the alarms, and whose they are."""
        found = [{"seed": seed, **one} for seed, v in self.alarms() for one in report.as_json([v])]
        verdicts = sum(s.verdicts for s in self.seeds.values())
        return {
            "seeds": sorted(s.seed for s in self.done()),
            "verdicts": verdicts,
            "alarms": found,
            "kernels": rows,
        }


def _dealt(make: Trials, args: argparse.Namespace, parts: int) -> Iterator[Seen | None]:
    """Each operation of each seed as it is done, None whenever EVERY_S went by without one."""
    end = time.time() + 60 * args.minutes if args.minutes else float("inf")
    jobs = ((seed, i) for seed in range(args.seed, args.seed + args.false_alarms) for i in range(parts))
    return dealt(args.processes, _initialize, (make, args), _part, jobs, end)
