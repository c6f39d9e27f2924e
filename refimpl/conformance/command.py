"""Judge kernels: every fast path of the table, or one of your own. Says which laws it obeys, and for a broken
one with which input.

    python -m refimpl.conformance                                                     the whole table
    python -m refimpl.conformance --op q4_k.dequantize --kernel my.module:decode      a kernel of yours
    python -m refimpl.conformance --op fp8.linear --kernel my.module:linear --declare array=torch device=cuda
    accumulation=tensor-core

REFIMPL_CONFORMANCE_KERNEL=package.module:function is the default of --kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from refimpl.cache import LatentCache
from refimpl.cli import Parser
from refimpl.conformance import cache_machine, judge, report, rows
from refimpl.conformance.laws.ladder import LADDER
from refimpl.conformance.manifest import Expected, Manifest
from refimpl.conformance.selftest import campaign, false_alarms
from refimpl.conformance.trial import Trial
from refimpl.conformance.verdict import LEVELS, Verdict

VARIABLE = "REFIMPL_CONFORMANCE_KERNEL"


def add_arguments(parser: Parser) -> None:
    """The flags."""
    parser.add_argument(
        "--op",
        action="append",
        metavar="NAME",
        help="an operation, or a pattern such as '*.dequantize'; may be repeated",
    )
    parser.add_argument(
        "--kernel",
        metavar="MODULE:FUNCTION",
        default=os.environ.get(VARIABLE),
        help=f"judge this one (default ${VARIABLE})",
    )
    parser.add_argument(
        "--backend",
        action="append",
        metavar="NAME",
        help="only these columns of the table: reference, cpu, cuda",
    )
    parser.add_argument(
        "--level",
        choices=LEVELS,
        default="quick",
        help="quick: minutes; full: 16 times the examples; exhaustive: 64 times, all floats",
    )
    parser.add_argument("--law", nargs="+", action="extend", metavar="NAME", help="only these laws")
    parser.add_argument("--case", metavar="JSON", help="with --op and --law: try this one case again")
    parser.add_argument("--manifest", type=Path, metavar="FILE", help="TOML with what the kernel declares")
    parser.add_argument(
        "--declare",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help=f"the same here: {', '.join(Manifest.__dataclass_fields__)}",
    )
    parser.add_argument(
        "--xfails", type=Path, metavar="FILE", help="expected failures: lines of OPERATION LAW  # reason"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the search (default 0)")
    parser.add_argument("--json", action="store_true", help="one JSON list of verdicts")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write a report that needs nothing beside it"
    )
    parser.add_argument("--laws", action="store_true", help="list the laws and stop")
    parser.add_argument(
        "--mutants",
        action="store_true",
        help="plant faults, one at a time, and say which law of the quick level finds each",
    )
    parser.add_argument(
        "--harmless",
        action="store_true",
        help="judge rewrites that change no result beyond its bound: all must be accepted",
    )
    parser.add_argument(
        "--false-alarms",
        type=int,
        metavar="N",
        help="the drawn laws N times, with seeds from --seed on; with --harmless of those",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="deal rows, or seeds, out to N processes of one thread (default 1)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="T",
        help="of --false-alarms: no more than that, and say how many seeds were finished",
    )


def main(argv: list[str]) -> int:
    """Exit code 1 when a law is broken that no line of --xfails names."""
    parser = Parser("python -m refimpl.conformance", __doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv), parser, argv)


def run(args: argparse.Namespace, parser: Parser, argv: list[str]) -> int:
    """What the flags say."""
    if args.laws:
        print("\n".join(f"{law.name:14} {law.says}" for law in LADDER))
        return 0
    if args.kernel and not (args.mutants or args.harmless) and len(args.op or []) != 1:
        parser.error("--kernel needs one --op")
    if args.false_alarms:
        return false_alarms.campaign(seeded, args)
    if args.mutants or args.harmless:
        return campaign.mutants(args) if args.mutants else campaign.harmless(args)
    of_cache = args.op == [cache_machine.NAME]
    trials = [] if of_cache else rows.trials(args)
    cache: Any = (
        judge.find(args.kernel)
        if of_cache and args.kernel
        else LatentCache
        if of_cache or not (args.op or args.backend)
        else None
    )
    if args.case is not None:
        if len(trials) + of_cache != 1 or len(args.law or []) != 1:
            parser.error("--case needs one --op, one --law, and --kernel or --backend")
        wrong = (
            judge.again(trials[0], args.law[0], args.case)
            if trials
            else cache_machine.play(cache, json.loads(args.case))
        )
        print(wrong.text() if wrong else "pass")
        return int(wrong is not None)
    expected = Expected.read(args.xfails)
    verdicts = rows.judged(trials, args, expected, lambda v: _told(v, args))
    if cache is not None and (not args.law or cache_machine.LAW in args.law):
        verdicts.append(
            cache_machine.judge(cache, args.kernel or "reference", args.level, args.seed, expected=expected)
        )
        _told(verdicts[-1], args)
    print(json.dumps(report.as_json(verdicts)) if args.json else report.summary(verdicts))
    if args.markdown:
        args.markdown.write_text(report.markdown(verdicts, "python -m refimpl.conformance " + " ".join(argv)))
    return int(not all(v.fine for v in verdicts))


def seeded(args: argparse.Namespace) -> list[Trial]:
    """What --false-alarms judges: rewrites, or the rows that run in this process."""
    if args.harmless:
        from refimpl.conformance.selftest.equivalents import everything

        rewrites = sorted(everything(), key=lambda r: r.op)
        return [
            r.trial()
            for r in rewrites
            if not args.op or any(fnmatchcase(r.op, pattern) for pattern in args.op)
        ]
    return [t for t in rows.trials(args) if not rows.elsewhere(t.label)]


def _told(v: Verdict, args: argparse.Namespace) -> None:
    print(report.text([v]), file=sys.stderr if args.json else sys.stdout, flush=True)
