"""The suite on trial: faults it must find, and rewrites it must accept. Many seeds of both are dealt out by
`seeds`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from typing import Any, TextIO

from refimpl.cli import to_json
from refimpl.conformance import report
from refimpl.conformance.pool import Stopped
from refimpl.conformance.selftest.equivalents import run as run_rewrites
from refimpl.conformance.selftest.mutants import elsewhere, run
from refimpl.errors import printable, refusal
from refimpl.files import write_text


def _stream(args: argparse.Namespace) -> TextIO:
    return sys.stderr if args.json else sys.stdout


def _finish(args: argparse.Namespace, rows: list[dict[str, Any]], stopped: Stopped, line: str) -> None:
    print(f"stopped before the end: {line}" if stopped.early else line, file=_stream(args))
    if args.json:
        print(to_json(rows))


def _any_named(args: argparse.Namespace, rows: list[dict[str, Any]], files: str) -> None:
    """InputFormatError E8012 where --named left nothing to try, which would read as if all were well."""
    if not rows:
        raise refusal("E8012", printable(args.named, 60), files=files)


def mutants(args: argparse.Namespace) -> int:
    """One line a fault, with the law that found it; exit code 1 when one was not found, 130 when stopped."""
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()
    with Stopped() as stopped:
        for mutant, found, seconds in run(args.seed, args.named, args.processes):
            law = found.law if found else ""
            rows.append(
                {"fault": mutant.name, "operation": mutant.op, "law": law, "seconds": round(seconds, 2)}
            )
            print(
                f"{mutant.op:20} {mutant.name:68} {law or 'NOT FOUND':13} {seconds:5.1f} s",
                file=_stream(args),
                flush=True,
            )
    left_out = elsewhere(args.named)
    for name, level in left_out:
        print(f"{name}: not planted, as this CPU has no {level}", file=_stream(args))
    if not stopped.early and not left_out:
        _any_named(args, rows, "faults.toml, kernel_faults.toml and selftest/")
    count = sum(bool(r["law"]) for r in rows)
    by = ", ".join(f"{law} {n}" for law, n in Counter(r["law"] for r in rows if r["law"]).most_common())
    if args.markdown:
        write_text(args.markdown, _table(rows, stopped.early), force=args.force)
    line = f"{count} of {len(rows)} faults found in {time.perf_counter() - start:.0f} s, by {by}"
    _finish(args, rows, stopped, line)
    return stopped.code(count < len(rows) or not rows)


PAGE = """# Faults planted, and what found them

**Does the conformance suite notice a faulty kernel?** This page is for readers who want to know how
much a green verdict is worth. Each row is a fault that was planted, alone, in a copy of a reference or
a kernel. The last column names the law that broke first.
[Conformance](conformance.md#the-suite-on-trial) explains the faults, and lists kinds of them that are
not found.

The page is written by `python -m refimpl.conformance --mutants --markdown docs/mutants.md --force`.
"""


def _table(rows: list[dict[str, Any]], early: bool) -> str:
    """The text of the page `docs/mutants.md`."""
    count = sum(bool(r["law"]) for r in rows)
    more = " The command was stopped before it had planted them all." if early else ""
    body = [f"| {r['operation']} | {r['fault']} | {r['law'] or '**not found**'} |" for r in rows]
    head = ["| operation | fault | found by |", "|---|---|---|"]
    return "\n".join([PAGE, f"{count} of {len(rows)} faults found.{more}", "", *head, *body, ""])


def equivalents(args: argparse.Namespace) -> int:
    """One line a rewrite; exit code 1 when a law was called broken that is not, 130 when stopped."""
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()
    with Stopped() as stopped:
        for rewrite, alarms in run_rewrites(args.seed, args.named, args.processes):
            rows.append({"rewrite": rewrite.name, "operation": rewrite.op, "alarms": report.as_json(alarms)})
            print(
                f"{rewrite.op:20} {rewrite.name:60} {'ALARM' if alarms else 'accepted'}",
                file=_stream(args),
                flush=True,
            )
            for alarm in alarms:
                print(report.failure(alarm), file=_stream(args))
    if not stopped.early:
        _any_named(args, rows, "kernel_rewrites.toml and selftest/")
    accepted = sum(not r["alarms"] for r in rows)
    line = f"{accepted} of {len(rows)} equivalent rewrites accepted in {time.perf_counter() - start:.0f} s"
    _finish(args, rows, stopped, line)
    return stopped.code(accepted < len(rows))
