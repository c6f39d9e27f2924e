"""Placement rules: which module runs on which device, in the YAML of KTransformers' `--optimize_config_path`.

    python -m refimpl.rules FILE [--model_path DIR] [--json]        check a file and draw the device map it
    gives

A file is a list of rules. Modules are visited from the root down; the first rule that matches one, by a
regular expression found anywhere in its name and by class, says what becomes of it, and `recursive: False`
leaves all below it alone. What no rule matches goes to cuda:0. docs/placement.md has the language, and what
differs from KTransformers: names of classes are looked up in the tables below and nothing named in a file is
ever imported.
"""

from __future__ import annotations

from refimpl.cli import Parser, ranges, run, size, to_json
from refimpl.devices import memory
from refimpl.devices.placement import load


def main(argv: list[str]) -> None:
    """Run `python -m refimpl.rules` with these arguments."""
    parser = Parser("python -m refimpl.rules", __doc__)
    parser.add_argument("file", metavar="FILE", help="the rules")
    parser.add_argument(
        "--model_path",
        metavar="DIR",
        help="the model they are for (default: DeepSeek-V3 with Q4_K_M experts)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args(argv)
    inventory = (
        memory.Inventory.open(args.model_path) if args.model_path else memory.Inventory.builtin("deepseek-v3")
    )
    placement = load(args.file, inventory.config)
    items = memory.weights(inventory, placement)
    matched = [sum(p.rule == i for p in placement.places.values()) for i in range(len(placement.rules))]
    if args.json:
        rules = [
            {"line": r.line, "name": r.name, "class": r.class_, "replace": r.replace, "modules": n}
            for r, n in zip(placement.rules, matched)
        ]
        print(
            to_json({"rules": rules, "notes": list(placement.notes), "devices": [p.report() for p in items]})
        )
        return
    for rule, n in zip(placement.rules, matched):
        print(f"line {rule.line:3}: {n:5} modules -> {rule.replace} {rule.device or ''}".rstrip())
    for note in placement.notes:
        print(f"note: {note}")
    for device in placement.devices:
        here = [p for p in items if p.device == device]
        print(f"\n{device}  {size(sum(p.nbytes for p in here))}")
        for p in here:
            layers = f"layers {ranges(p.layers)}" if p.layers else ""
            print(f"  {p.name:15} {size(p.nbytes):>9}  {p.note:28} {layers}".rstrip())


if __name__ == "__main__":
    raise SystemExit(run(main))
