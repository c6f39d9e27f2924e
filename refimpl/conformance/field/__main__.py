"""Judge the kernels of other projects that are installed here, and say of each which laws it obeys.

    python -m refimpl.conformance.field
    python -m refimpl.conformance.field --only 'transformers*' '*scaled_mm*'
    python -m refimpl.conformance.field --markdown docs/field.md

Exit codes: 0 all that could be judged were, whatever the verdicts; 1 nothing could be judged; 2 the question
is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path

from refimpl.cli import Parser, integer, run, to_json
from refimpl.conformance import report
from refimpl.conformance.child import Child, Job, Limits
from refimpl.conformance.field import history, page
from refimpl.conformance.field.contenders import CONTENDERS, Contender
from refimpl.conformance.field.page import Judged
from refimpl.conformance.lookup import Spec
from refimpl.conformance.manifest import Manifest
from refimpl.conformance.verdict import LEVELS
from refimpl.errors import near


def parser() -> Parser:
    """The parser of this command's flags."""
    found = Parser("python -m refimpl.conformance.field", __doc__)
    found.add_argument("--only", nargs="+", metavar="PATTERN", help="kernels by name, such as 'ggml*'")
    found.add_argument("--list", action="store_true", help="name all kernels and stop")
    found.add_argument(
        "--level",
        choices=LEVELS,
        default="quick",
        metavar="LEVEL",
        help=f"{', '.join(LEVELS)}: see python -m refimpl.conformance",
    )
    found.add_argument("--processes", type=integer(1), default=1, help="judge so many at once")
    found.add_argument("--markdown", type=Path, metavar="FILE", help="write the page")
    found.add_argument("--json", action="store_true", help="verdicts as JSON on stdout")
    found.add_argument(
        "--history",
        action="store_true",
        help="bugs of such kernels, planted in this project's code: which law finds each, and what norms say",
    )
    return found


def chosen(patterns: list[str] | None) -> list[Contender]:
    """The contenders that one of the patterns names; all where there is none."""
    return [
        c
        for c in CONTENDERS
        if not patterns or any(fnmatchcase(c.name, p) or fnmatchcase(c.package, p) for p in patterns)
    ]


def judged(contender: Contender, level: str) -> Judged:
    """In a process of its own."""
    if missing := contender.missing():
        return Judged(contender, [], missing)
    manifest = Manifest().with_values(contender.declared, contender.name)
    spec = Spec(contender.op, "", contender.target(), manifest, level)
    with Child(Limits(), dict(contender.environment)) as child:
        return Judged(contender, child.judge(Job(spec)))


def all_judged(wanted: list[Contender], args: argparse.Namespace) -> Iterator[Judged]:
    """In the order of the table, each as soon as it and those before it are known."""
    with ThreadPoolExecutor(args.processes) as pool:
        yield from pool.map(lambda c: judged(c, args.level), wanted)


def main(argv: list[str]) -> int:
    """Judge kernels of other projects by the conformance suite and print the verdicts; --list and --history
    print what there is to judge and which known bugs the suite finds. Returns the exit code.
    """
    flags = parser()
    args = flags.parse_args(argv)
    if args.history:
        return history.told(args)
    wanted = chosen(args.only)
    if not wanted:
        close = near(args.only[0], {c.name for c in CONTENDERS} | {c.package for c in CONTENDERS}, 3)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        flags.error(f"no kernel is called {' or '.join(args.only)}; {hint}--list names all")
    if args.list:
        print("\n".join(c.name for c in wanted))
        return 0
    found = []
    for one in all_judged(wanted, args):
        found.append(one)
        print(page.line(one), file=sys.stderr if args.json else sys.stdout, flush=True)
        for v in one.broken:
            print(report.failure(v), file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.json:
        print(to_json({j.contender.name: report.as_json(j.verdicts) for j in found if not j.missing}))
    if args.markdown:
        args.markdown.write_text(page.markdown(found, args.level))
    return int(all(j.missing for j in found))


if __name__ == "__main__":
    raise SystemExit(run(main))
