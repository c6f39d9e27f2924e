"""The command: `python -m refimpl.conformance [--op NAME] [--kernel package.module:function]`."""

from __future__ import annotations

from refimpl.cli import Parser, run


def main(argv: list[str]) -> int:
    """Exit code 1 when a law is broken that no line of --xfails names."""
    from refimpl.conformance import command

    parser = Parser("python -m refimpl.conformance", command.__doc__)
    command.add_arguments(parser)
    return command.run(parser.parse_args(argv), parser, argv)


if __name__ == "__main__":
    raise SystemExit(run(main))
