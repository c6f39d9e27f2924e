"""Say what this machine has, what each missing part costs, and what to install.

    python -m refimpl.doctor                         this machine
    python -m refimpl.doctor --for sglang-kt DIR     two folders for SGLang
    python -m refimpl.doctor --for sglang-kt DIR -- COMMAND

DIR has MODEL/ and KT/, as `python -m refimpl.convert_model --layout sglang-kt` makes them. It is told what
would keep the engine from starting, before anything is loaded. COMMAND is what will start it: its flags are
looked at too, and it is not run.

Exit code 0 where all works, though perhaps slower than it could, and 1 where something would fail.
"""

from __future__ import annotations

from pathlib import Path

from refimpl.cli import Parser, run, to_json
from refimpl.cli.waiting import at_terminal
from refimpl.devices import machine
from refimpl.errors import printable, refusal
from refimpl.merge.sglang_kt import LAYOUT
from refimpl.merge.sglang_kt_doctor import read_flags, sglang_kt_faults


def main(argv: list[str]) -> int | None:
    """Print what this machine has, or, given DIR, what the engine named by --for would find there. Returns
    the exit code, 1 where something must be put right; argparse exits with 2 on wrong flags.
    """
    parser = Parser("python -m refimpl.doctor", __doc__)
    parser.add_argument("--for", dest="engine", choices=(LAYOUT,), help="the engine that DIR is for")
    parser.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="what the engine would serve")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    at = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:at])
    if args.folder is None and args.engine:
        parser.error(f"--for {args.engine} needs the DIR that it would serve")
    if args.folder is None and at < len(argv):
        parser.error("a command behind -- is looked at for a DIR only")
    if args.folder is not None and not args.folder.is_dir():
        raise refusal("E4021", args.folder)
    command = read_flags(argv[at + 1 :]) if at < len(argv) else None
    return _machine(args.json) if args.folder is None else _pair(args.folder, command, args.json)


def _machine(as_json: bool) -> int:
    with at_terminal().during("looking at this machine"):
        found = machine.findings()
    if as_json:
        print(to_json({"findings": [f._asdict() for f in found], "verdict": machine.verdict(found)}))
    else:
        print("\n".join([*machine.show(found), "", machine.verdict(found)]))
    return int(any(f.state == machine.WRONG for f in found))


def _pair(folder: Path, command: dict[str, str] | None, as_json: bool) -> int:
    faults = sglang_kt_faults(folder, command)
    if as_json:
        print(to_json({"for": LAYOUT, "faults": faults}))
    else:
        print(
            "\n".join(printable(fault, 1000) for fault in faults)
            or "nothing found that would keep it from starting"
        )
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(run(main))
