"""What the command does with its flags, see `flags`."""

from __future__ import annotations

import argparse
import sys
from fnmatch import fnmatchcase

from refimpl.cli import Parser, to_json
from refimpl.conformance import cache_machine, model_rules, report, rows
from refimpl.conformance.child import Job
from refimpl.conformance.laws.ladder import LADDER
from refimpl.conformance.lookup import Spec, checked_law
from refimpl.conformance.manifest import Expected
from refimpl.conformance.selftest import campaign, false_alarms, sensitivity
from refimpl.conformance.selftest.equivalents import everything
from refimpl.conformance.trial import Trial
from refimpl.conformance.verdict import Verdict
from refimpl.errors import RefimplError
from refimpl.files import check_writable, write_text

OUR_FAULT = ("E8009", "E8010")
"""Codes that are about this installation, not about the question."""


def answer(args: argparse.Namespace, parser: Parser, argv: list[str]) -> int:
    """Exit code 0 when all laws hold; 1 when a law is broken that no line of --xfails names, or nothing was
    judged; 2 for a question that cannot be answered.
    """
    if "" not in sys.path:
        sys.path.append("")  # a console script does not look in the current folder for --kernel
    try:
        return run(args, parser, argv)
    except RefimplError as error:
        if not error.code.startswith("E8") or error.code in OUR_FAULT:
            raise
        print(f"refimpl: {error.line()}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace, parser: Parser, argv: list[str]) -> int:
    """Do what the parsed flags ask for, and return the exit code."""
    if args.laws:
        said = {law.name: law.says for law in LADDER}
        said |= {name: f"of a model: {rule.says}" for name, rule in model_rules.RULES.items()}
        print(to_json(said) if args.json else "\n".join(f"{name:14} {says}" for name, says in said.items()))
        return 0
    if args.sensitivity:
        print(sensitivity.markdown())
        return 0
    _check(args, parser)
    if args.markdown:  # before hours are spent
        check_writable(args.markdown, force=args.force, inputs=filter(None, (args.xfails, args.manifest)))
    if args.false_alarms:
        return false_alarms.campaign(seeded, args)
    if args.mutants or args.equivalents:
        return campaign.mutants(args) if args.mutants else campaign.equivalents(args)
    chosen = _specs(args)
    if args.case is not None:
        return _again(chosen, args, parser)
    expected = Expected.read(args.xfails)
    verdicts = rows.judged(chosen, args, expected, lambda v: _told(v, args))
    if not verdicts:
        print("refimpl: no verdicts: no kernel that was chosen has to obey these laws", file=sys.stderr)
    print(to_json(report.as_json(verdicts)) if args.json else report.summary(verdicts))
    if args.markdown:
        text = report.markdown(verdicts, "python -m refimpl.conformance " + " ".join(argv))
        write_text(args.markdown, text, force=args.force)
    return int(not verdicts or not all(v.fine for v in verdicts))


def _check(args: argparse.Namespace, parser: Parser) -> None:
    """Flags that do not go together; InputFormatError E8005 for a law that there is not."""
    for law in args.law or []:
        if law != cache_machine.LAW and law not in model_rules.RULES:
            checked_law(law)
    if args.kernel and not (args.mutants or args.equivalents) and len(args.op or []) != 1:
        parser.error("--kernel needs one --op: the operation that it computes, such as q4_k.dequantize")
    if args.kernel and args.backend:
        parser.error("--backend names a row of the table, --kernel a function of yours: one of them")
    if (args.reference or args.format) and not args.kernel:
        parser.error("--reference and --format say what a --kernel is judged by")
    if (args.declare or args.manifest) and not args.kernel:
        parser.error("--declare and --manifest say what a --kernel does")


def _specs(args: argparse.Namespace) -> list[Spec]:
    """Rows, and the latent cache and what else a model does, where all is judged or they are asked for."""
    beside = {cache_machine.NAME: {cache_machine.LAW}, model_rules.NAME: {*model_rules.RULES}}
    asked, laws = args.op or [], set(args.law or ())
    named = asked if len(asked) == 1 and asked[0] in beside else []
    whole = not (args.op or args.kernel)
    more = [name for name in (named or beside if whole or named else ()) if not laws or laws & beside[name]]
    specs = [spec for name in more for spec in _beside(name, args)]
    if named:
        return specs
    only_beside = laws and whole and laws <= set().union(*beside.values())
    return specs if only_beside else [*rows.specs(args), *specs]


def _beside(name: str, args: argparse.Namespace) -> list[Spec]:
    """The latent caches or the rules of models that --kernel or --backend names, else all of them."""
    if args.kernel:
        return [Spec(name, "reference", args.kernel, level=args.level)]
    have = [*cache_machine.ROWS] if name == cache_machine.NAME else ["reference"]
    return [Spec(name, b, level=args.level) for b in rows.columns(have, args)]


def _again(chosen: list[Spec], args: argparse.Namespace, parser: Parser) -> int:
    """Judge the one case that --case names, and print what is wrong or "pass". Returns the exit code."""
    if len(chosen) != 1 or len(args.law or []) != 1:
        parser.error("--case needs one --op, one --law, and --kernel or --backend")
    with rows.child(chosen[0].backend, args) as child:
        wrong = child.again(Job(chosen[0], tuple(args.law), args.case))
    print(wrong.text() if wrong else "pass")
    return int(wrong is not None)


def seeded(args: argparse.Namespace) -> list[Trial]:
    """What --false-alarms judges: rewrites, or the rows that run in this process."""
    if args.equivalents:
        rewrites = sorted(everything(), key=lambda r: r.op)
        return [
            r.trial()
            for r in rewrites
            if not args.op or any(fnmatchcase(r.op, pattern) for pattern in args.op)
        ]
    return [spec.trial() for spec in rows.specs(args) if not rows.interpreted(spec.backend)]


def _told(v: Verdict, args: argparse.Namespace) -> None:
    print(report.text([v]), file=sys.stderr if args.json else sys.stdout, flush=True)
