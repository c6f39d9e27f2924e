"""Judge kernels: every fast path of the table, or one of your own. Says which laws it obeys, and for a broken
one with which input.

    python -m refimpl.conformance                                                     the whole table
    python -m refimpl.conformance --op q4_k.dequantize --kernel my.module:decode      a kernel of yours
    python -m refimpl.conformance --op fp8.linear --kernel my.module:linear
        --declare array=torch device=cuda accumulation=tensor-core                    one for a GPU

REFIMPL_CONFORMANCE_KERNEL=package.module:function is the default of --kernel.

Exit codes: 0 all laws hold, 1 a law is broken or nothing was judged, 2 the question is wrong, 130 stopped.
"""

from __future__ import annotations

import os
from pathlib import Path

from refimpl.cli import Parser, completed, integer, number
from refimpl.conformance.manifest import Manifest
from refimpl.conformance.verdict import LEVELS

VARIABLE = "REFIMPL_CONFORMANCE_KERNEL"


def parser() -> Parser:
    """All flags of the command. This needs no hypothesis, so that --help always works."""
    found = Parser("python -m refimpl.conformance", __doc__)
    add_arguments(found)
    return found


def add_arguments(parser: Parser) -> None:
    """Add all flags of the conformance command to the parser."""
    for add in (_which, _how, _told, _on_trial):
        add(parser)


def _operations() -> list[str]:
    from refimpl.ops import OPS  # brings the kernels' modules: only for the Tab key

    return [*OPS]


def _laws() -> list[str]:
    from refimpl.conformance.laws.ladder import LAWS  # brings hypothesis: only for the Tab key

    return [*LAWS]


def _which(parser: Parser) -> None:
    """What is judged: rows of the table, or a kernel and what it is judged by."""
    op = parser.add_argument(
        "--op",
        action="append",
        metavar="NAME",
        help="an operation, or a pattern such as '*.dequantize'; may be repeated",
    )
    completed(op, _operations)
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
        "--reference",
        metavar="MODULE:FUNCTION",
        help="what --kernel must equal, where --op has no row or another truth",
    )
    parser.add_argument(
        "--format",
        metavar="FILE",
        help="a number format that is not ours, as a module like those of refimpl/formats",
    )


def _how(parser: Parser) -> None:
    """By which laws, how long, and under what declaration."""
    parser.add_argument(
        "--level",
        choices=LEVELS,
        default="quick",
        help="smoke: seconds; quick: minutes; full: 16 times the examples, all shapes of DeepSeek-V3; "
        "exhaustive: 64 times, all floats",
    )
    law = parser.add_argument("--law", nargs="+", action="extend", metavar="NAME", help="only these laws")
    completed(law, _laws)
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
    parser.add_argument("--seed", type=integer(), default=0, help="of the search (default 0)")
    parser.add_argument(
        "--seconds",
        type=number(0.001, 1e9),
        metavar="S",
        help="one case may take no longer, or the kernel hangs (default 120)",
    )
    parser.add_argument(
        "--memory",
        type=number(0.001, 1e9),
        metavar="GB",
        help="the kernel's process may have no more (default 24)",
    )
    parser.add_argument(
        "--processes",
        type=integer(1),
        default=1,
        metavar="N",
        help="deal rows, seeds, faults or rewrites out to N processes of one thread (default 1)",
    )


def _told(parser: Parser) -> None:
    """What is printed and written."""
    parser.add_argument(
        "--json", action="store_true", help="one JSON list of verdicts on stdout, and nothing else"
    )
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write a report that needs nothing beside it"
    )
    parser.add_argument("--force", action="store_true", help="replace the file of --markdown, if it is one")
    parser.add_argument("--laws", action="store_true", help="list the laws and stop")


def _on_trial(parser: Parser) -> None:
    """Campaigns that put the suite itself on trial."""
    parser.add_argument(
        "--mutants",
        action="store_true",
        help="plant faults, one at a time, and say which law of the quick level finds each",
    )
    parser.add_argument(
        "--equivalents",
        "--harmless",
        dest="equivalents",
        action="store_true",
        help="judge rewrites that change no result beyond its bound: all must be accepted",
    )
    parser.add_argument(
        "--named",
        default="",
        metavar="TEXT",
        help="of --mutants and --equivalents only those whose names hold this, such as LLVM",
    )
    parser.add_argument(
        "--sensitivity",
        action="store_true",
        help="how wrong a kernel may be at the sizes of DeepSeek-V3 before a bound notices",
    )
    parser.add_argument(
        "--false-alarms",
        type=integer(1),
        metavar="N",
        help="the drawn laws N times, with seeds from --seed on; with --equivalents of those",
    )
    parser.add_argument(
        "--minutes",
        type=number(0, 1e9),
        metavar="T",
        help="of --false-alarms: no more than that, and say how many seeds were finished",
    )
