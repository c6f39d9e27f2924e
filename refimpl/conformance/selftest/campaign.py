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
from refimpl.conformance.selftest import equivalents as rewriting
from refimpl.conformance.selftest import mutants as planting
from refimpl.errors import printable, refusal
from refimpl.files import write_text

FEW = 10  # names that are still told one by one


def _stream(args: argparse.Namespace) -> TextIO:
    return sys.stderr if args.json else sys.stdout


def _finish(args: argparse.Namespace, rows: list[dict[str, Any]], stopped: Stopped, line: str) -> None:
    print(f"stopped before the end: {line}" if stopped.early else line, file=_stream(args))
    if args.json:
        print(to_json(rows))


def _left_out(args: argparse.Namespace, rows: list[dict[str, Any]], left: dict[str, list[str]]) -> None:
    """Say which are left out. InputFormatError E8012 where --named names none at all, which would read as if
    all were well.
    """
    for need, names in left.items():
        few = ": " + "; ".join(names) if len(names) < FEW else ""
        print(f"not tried, as they need {need}: {len(names)}{few}", file=_stream(args))
    if not rows and not left:
        raise refusal("E8012", printable(args.named, 60), files="refimpl/conformance/*.toml and selftest/")


def mutants(args: argparse.Namespace) -> int:
    """One line a fault, with the law that found it; exit code 1 when one was not found, 130 when stopped."""
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()
    with Stopped() as stopped:
        for mutant, found, seconds in planting.run(args.seed, args.named, args.processes):
            law = found.law if found else ""
            row = {"fault": mutant.name, "operation": mutant.op, "law": law, "gpu": bool(mutant.gpu)}
            rows.append(row | {"seconds": round(seconds, 2)})
            print(
                f"{mutant.op:20} {mutant.name:68} {law or 'NOT FOUND':13} {seconds:5.1f} s",
                file=_stream(args),
                flush=True,
            )
    if not stopped.early:
        _left_out(args, rows, planting.elsewhere(args.named))
    by = ", ".join(f"{law} {n}" for law, n in Counter(r["law"] for r in rows if r["law"]).most_common())
    if args.markdown:
        write_text(args.markdown, _page(args, rows, stopped.early), force=args.force)
    counts = ", and on a GPU ".join(map(_count, _parts(rows)))
    line = f"{counts} faults found in {time.perf_counter() - start:.0f} s"
    _finish(args, rows, stopped, f"{line}, by {by}" if by else line)
    return stopped.code(not rows or not all(r["law"] for r in rows))


def _parts(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Those that need no GPU, and those that need one, if there are any; one part in any case."""
    parts = [[r for r in rows if r["gpu"] == gpu] for gpu in (False, True)]
    return [part for part in parts if part] or [[]]


def _count(rows: list[dict[str, Any]]) -> str:
    return f"{sum(bool(r['law']) for r in rows)} of {len(rows)}"


OTHERS = {
    False: "Faults of code that runs on a GPU alone have [a table of their own](gpu-mutants.md).",
    True: "All faults of code that needs no GPU are in [another table](mutants.md).",
}
PAGE = """# Faults planted{where}, and what found them

**Does the conformance suite notice a faulty kernel?** This page is for readers who want to know how
much a green verdict is worth. Each row is a fault that was planted, alone, in a copy of a reference or
a kernel. The last column names the law that broke first.
[Conformance](conformance.md#the-suite-on-trial) explains the faults, and lists kinds of them that are
not found. {others}

This command wrote the page:
`python -m refimpl.conformance --mutants{named} --markdown {file} --force`.
"""


def _page(args: argparse.Namespace, rows: list[dict[str, Any]], early: bool) -> str:
    """The text of a page such as `docs/mutants.md`."""
    parts = _parts(rows)
    gpu = bool(rows) and all(r["gpu"] for r in rows)
    named = f' --named "{args.named}"' if args.named else ""
    more = " The command was stopped before it had planted them all." if early else ""
    words = {"where": " on a GPU" if gpu else "", "others": OTHERS[gpu]}
    lines = [PAGE.format(**words, named=named, file=f"docs/{args.markdown.name}")]
    for part in parts:
        body = [f"| {r['operation']} | {r['fault']} | {r['law'] or '**not found**'} |" for r in part]
        head = ["| operation | fault | found by |", "|---|---|---|"]
        lines += [f"{_count(part)} faults found.{more}", "", *head, *body, ""]
    return "\n".join(lines)


def equivalents(args: argparse.Namespace) -> int:
    """One line a rewrite; exit code 1 when a law was called broken that is not, 130 when stopped."""
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()
    with Stopped() as stopped:
        for rewrite, alarms in rewriting.run(args.seed, args.named, args.processes):
            rows.append({"rewrite": rewrite.name, "operation": rewrite.op, "alarms": report.as_json(alarms)})
            print(
                f"{rewrite.op:20} {rewrite.name:60} {'ALARM' if alarms else 'accepted'}",
                file=_stream(args),
                flush=True,
            )
            for alarm in alarms:
                print(report.failure(alarm), file=_stream(args))
    if not stopped.early:
        _left_out(args, rows, rewriting.elsewhere(args.named))
    accepted = sum(not r["alarms"] for r in rows)
    line = f"{accepted} of {len(rows)} equivalent rewrites accepted in {time.perf_counter() - start:.0f} s"
    _finish(args, rows, stopped, line)
    return stopped.code(not rows or accepted < len(rows))
