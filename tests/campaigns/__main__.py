"""The command: run campaigns and print what they counted; exit code 1 when one of them found something."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from tests.campaigns import CAMPAIGNS, WHOLE, Part, Report, campaign, scratch

KEPT = Path("build/campaigns")
SHOWN = 20


def main(argv: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(CAMPAIGNS)}; all without one")
    parser.add_argument(
        "--long",
        action="store_true",
        help="as many cases as `make campaigns` asks for, not as few as the tests",
    )
    parser.add_argument("--cases", "--count", type=int, help="how many cases")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="again with the next seed, until so long has passed"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="share the cases among so many processes"
    )
    parser.add_argument(
        "--part", type=_part, metavar="I/N", help="only the cases of the I-th of N processes, counted from 0"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a campaign")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(CAMPAIGNS):
        parser.error(f"no campaign {min(unknown)}; there are {', '.join(CAMPAIGNS)}")
    found = [_run(name, args) for name in args.names or CAMPAIGNS]
    return int(any(found))


def _run(name: str, args: argparse.Namespace) -> bool:
    module = campaign(name)
    cases = args.cases or (module.LONG if args.long else module.SHORT)
    start = time.monotonic()
    if args.processes > 1 and not args.part:
        report = _shared(name, cases, args)
    else:
        report = _repeated(name, cases, args, start + (args.seconds or 0))
    seconds = time.monotonic() - start
    if args.json:
        print(
            json.dumps({"name": name, "seed": args.seed, "seconds": round(seconds, 1), **report._asdict()}),
            flush=True,
        )
        return bool(report.failures)
    print(
        f"{name}: {report.cases} cases, {len(report.failures)} failures, seed {args.seed}, {seconds:.0f} s",
        flush=True,
    )
    for key, counter in report.counts.items():
        print(
            f"  {key}: {sum(counter.values())}: "
            + ", ".join(f"{n} {what}" for what, n in sorted(counter.items(), key=lambda c: -c[1]))
        )
    for key, value in report.facts.items():
        print(f"  {key}: {value}")
    for line in report.failures[:SHOWN]:
        print(f"  FAILED {line}")
    if report.failures:
        print(f"  files of failures, where there are any: {KEPT / name}", flush=True)
    return bool(report.failures)


def _part(text: str) -> Part:
    number, of = map(int, text.split("/"))
    if not 0 <= number < of:
        raise ValueError(text)
    return Part(number, of)


def _repeated(name: str, cases: int, args: argparse.Namespace, end: float) -> Report:
    """Once, or with one seed after the other until `end`."""
    found = [_alone(name, cases, args.seed, args.part or WHOLE)]
    while time.monotonic() < end:
        found.append(_alone(name, cases, args.seed + len(found), args.part or WHOLE))
    return Report.joined(found)


def _alone(name: str, cases: int, seed: int, part: Part) -> Report:
    """A campaign, or a part of it, in this process."""
    with scratch() as folder:
        report: Report = campaign(name).run(cases, seed, Path(folder), part)
        if report.failures and (Path(folder) / "failed").exists():
            shutil.copytree(Path(folder) / "failed", KEPT / name, dirs_exist_ok=True)
    return report


def _shared(name: str, cases: int, args: argparse.Namespace) -> Report:
    """A campaign in several processes; one that dies is a failure and takes nothing with it."""
    command = [
        sys.executable,
        "-m",
        "tests.campaigns",
        name,
        "--cases",
        str(cases),
        "--seed",
        str(args.seed),
        "--json",
        *(["--seconds", str(args.seconds)] if args.seconds else []),
    ]
    running = [
        subprocess.Popen([*command, "--part", f"{i}/{args.processes}"], stdout=subprocess.PIPE, text=True)
        for i in range(args.processes)
    ]
    reports = []
    for i, process in enumerate(running):
        said = process.communicate()[0]
        if process.returncode not in (0, 1) or not said:
            reports.append(
                Report(0, [f"part {i}/{args.processes} ended with exit code {process.returncode}"], {}, {})
            )
            continue
        raw = json.loads(said)
        reports.append(
            Report(
                raw["cases"], raw["failures"], {k: Counter(c) for k, c in raw["counts"].items()}, raw["facts"]
            )
        )
    return Report.joined(reports)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
