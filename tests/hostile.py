"""What the tests of bad input share: a command is run as a user runs it, and must say one line."""

import re

from refimpl import convert_model, inspect
from refimpl.cli import run
from refimpl.tiny import FP8_DIR, GGUF_DIR


class Refusal:
    """Calls commands in this process; `capsys` is pytest's. Use the fixture `refused`."""

    def __init__(self, capsys):
        self.capsys = capsys

    def __call__(self, code, main, *argv, names=""):
        """`main(argv)` exits with 1 and its only output is one printable line on stderr: the code, then
        somewhere `names`. Returns the line.
        """
        self.capsys.readouterr()
        status = run(main, [str(a) for a in argv])
        out, err = self.capsys.readouterr()
        assert (status, out, err.count("\n"), err[-1:]) == (1, "", 1, "\n"), f"exit {status}\n{out}{err}"
        line = err[:-1]
        assert line.startswith("refimpl: E") and line.isprintable(), line
        assert re.match(rf"refimpl: ({code})", line), f"{code} expected: {line}"
        assert names in line
        return line

    def merge(self, code, safetensor_path=FP8_DIR, gguf_path=GGUF_DIR, *, output, names=""):
        """The same of a merge, which leaves neither an output nor anything beside it."""
        before = sorted(p.name for p in output.parent.iterdir())
        paths = ["--safetensor_path", safetensor_path, "--gguf_path", gguf_path, "--output_path", output]
        line = self(code, convert_model.main, *paths, names=names)
        assert sorted(p.name for p in output.parent.iterdir()) == before
        return line

    def inspect(self, code, path, names=None):
        """The same of a look into a file, which the line names."""
        return self(code, inspect.main, path, names=path.name if names is None else names)


class Acceptance:
    """Use the fixture `accepted`."""

    def __init__(self, capsys):
        self.capsys = capsys

    def __call__(self, main, *argv):
        """`main(argv)` exits with 0; returns what it printed on stdout."""
        self.capsys.readouterr()
        status = run(main, [str(a) for a in argv])
        out, err = self.capsys.readouterr()
        assert status == 0, err
        return out

    def merge(self, safetensor_path=FP8_DIR, gguf_path=GGUF_DIR, *, output):
        """A merge that succeeds; returns the folder."""
        self(
            convert_model.main,
            "--safetensor_path",
            safetensor_path,
            "--gguf_path",
            gguf_path,
            "--output_path",
            output,
        )
        return output
