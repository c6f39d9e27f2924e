"""The command: `python -m refimpl.conformance [--op NAME] [--kernel package.module:function]`."""

from refimpl.cli import run
from refimpl.conformance import main

if __name__ == "__main__":
    raise SystemExit(run(main))
