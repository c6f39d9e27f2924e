"""The command: run campaigns and print what they counted; exit code 1 when one of them found something."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

from tests.campaigns import CAMPAIGNS, campaign, scratch

KEPT = Path("build/campaigns")
SHOWN = 20


def main(argv: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(CAMPAIGNS)}; all without one")
    parser.add_argument("--long", action="store_true", help="as many cases as `make campaigns` asks for, not as few as the tests")
    parser.add_argument("--cases", type=int, help="how many cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object a campaign")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(CAMPAIGNS):
        parser.error(f"no campaign {min(unknown)}; there are {', '.join(CAMPAIGNS)}")
    found = [_run(name, args) for name in args.names or CAMPAIGNS]
    return int(any(found))


def _run(name: str, args: argparse.Namespace) -> bool:
    module = campaign(name)
    cases = args.cases or (module.LONG if args.long else module.SHORT)
    with scratch() as folder:
        start = time.monotonic()
        report = module.run(cases, args.seed, Path(folder))
        seconds = time.monotonic() - start
        if report.failures and (Path(folder) / "failed").exists():
            shutil.copytree(Path(folder) / "failed", KEPT / name, dirs_exist_ok=True)
    if args.json:
        print(json.dumps({"name": name, "seed": args.seed, "seconds": round(seconds, 1), **report._asdict()}), flush=True)
        return bool(report.failures)
    print(f"{name}: {report.cases} cases, {len(report.failures)} failures, seed {args.seed}, {seconds:.0f} s", flush=True)
    for key, value in report.facts.items():
        print(f"  {key}: {value}")
    for line in report.failures[:SHOWN]:
        print(f"  FAILED {line}")
    if report.failures:
        print(f"  files of failures, where there are any: {KEPT / name}", flush=True)
    return bool(report.failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
