"""Say what would fail before it is started: `python -m refimpl.doctor --for sglang-kt DIR`.

DIR has MODEL/ and KT/, as `python -m refimpl.convert_model --layout sglang-kt` makes them. Exit code 1 when
something is wrong.
"""

from __future__ import annotations

from pathlib import Path

from refimpl.cli import Parser, run, to_json
from refimpl.errors import printable
from refimpl.merge.sglang_kt import LAYOUT
from refimpl.merge.sglang_kt_doctor import sglang_kt_faults


def main(argv: list[str]) -> int | None:
    """The command."""
    parser = Parser("python -m refimpl.doctor", __doc__)
    parser.add_argument("--for", dest="engine", choices=(LAYOUT,), default=LAYOUT, help="the engine to start")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args(argv)
    faults = sglang_kt_faults(args.folder)
    if args.json:
        print(to_json({"for": args.engine, "faults": faults}))
    else:
        print(
            "\n".join(printable(fault, 1000) for fault in faults)
            or "nothing found that would keep it from starting"
        )
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(run(main))
