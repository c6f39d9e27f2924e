"""The parser of all commands: flags in both spellings, paths with `~`, suggestions for what is misspelled,
help of 80 columns, completion in a shell.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from refimpl.errors import near, printable

COLUMNS = 80
PATHS = re.compile(r"\b(DIR|FILE|PATH|RULES)\b")  # metavars of flags that name a file or a folder
TWICE = re.compile(r"(--[\w-]+)/--[\w-]+")  # argparse's name of a flag with two spellings
PREFIX = "python -m "
_called = ("", "")  # a module's call, and what stands for it


def called(module: str, name: str) -> None:
    """Have all help name a command as it was called: `python -m MODULE` as NAME."""
    global _called
    _called = PREFIX + module.removesuffix(".__main__"), name


def renamed(text: str) -> str:
    """A text with the command named as it was called."""
    module, name = _called
    return re.sub(rf"{re.escape(module)}(?![\w.])", lambda _: name, text) if module else text


class Parser(argparse.ArgumentParser):
    """argparse with `--gguf_path` and `--gguf-path` meaning the same for every flag, no abbreviations, and no
    numbers without bounds. `~` is expanded in what names a file: by its type, Path, or its metavar.
    """

    def __init__(self, prog: str, description: str | None):
        super().__init__(
            renamed(prog),
            description=renamed(description or ""),
            allow_abbrev=False,
            formatter_class=Help,
            epilog="Every flag may be written with - in place of _, too.",
        )
        self._given: Sequence[str] = ()
        self.stray = ""  # the flags behind which a word belongs that was given without one

    def add_argument(self, *names, **kwargs):
        spellings = [s for n in names for s in ((n, n[:2] + _other(n[2:])) if n.startswith("--") else (n,))]
        kind = kwargs.get("type", str)
        if kind in (int, float):
            raise TypeError(f"{names[0]}: a number has bounds, see `integer` and `number`")
        if kind is Path or (kind is str and PATHS.search(str(kwargs.get("metavar")))):
            kwargs["type"] = _expanded(kind)
        return super().add_argument(*dict.fromkeys(spellings), **kwargs)

    def parse_args(self, args=None, namespace=None):
        """argparse's, which first completes a word where a shell asks for it."""
        self._given = sys.argv[1:] if args is None else args
        if "_ARGCOMPLETE" in os.environ:
            complete(self)
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Exit code 2, with the flags that may have been meant and where all are told."""
        told = [printable(TWICE.sub(r"\1", message), 1000)]
        for word in self._given:
            if word == "--":
                break
            flag = word.partition("=")[0]
            if flag.startswith("--") and flag not in self._option_string_actions:
                close = near(flag, [*self._option_string_actions])
                told += [f"there is no {printable(flag, 60)}: did you mean {close[0]}?"] if close else []
        if re.match("unrecognized arguments: [^-]", message) and (where := self.stray or self._paths()):
            told.append(where)
        lines = "\n".join(f"{self.prog}: {'error: ' * (i == 0)}{t}" for i, t in enumerate(told))
        self.exit(2, f"usage: {self.prog} ...   ({self.prog} --help lists the flags)\n{lines}\n")

    def _paths(self) -> str:
        """The flags that take a path, where nothing else is said of a word too many."""
        named = [a for a in self._actions if a.option_strings and PATHS.search(str(a.metavar))]
        flags = " or ".join(a.option_strings[0] for a in named)
        return f"a path goes behind {flags}" if named else ""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            close = near(str(value), [str(c) for c in action.choices or ()])
            if close:
                error.message = f"{printable(str(value), 60)!r} is none of them: did you mean {close[0]}?"
            raise


def completed(flag: argparse.Action, names: Callable[[], Iterable[str]]) -> None:
    """Have a shell complete a flag's value by these names, which are asked for only then."""
    flag.completer = lambda **_: names()  # type: ignore[attr-defined]  # argcomplete looks for it


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks how a word may go on, and end. Without argcomplete (the extra `completion`)
    the shell was not taught to ask.
    """
    import argcomplete  # optional, and for a shell alone

    argcomplete.autocomplete(parser, default_completer=argcomplete.completers.FilesCompleter())


def _other(name: str) -> str:
    return name.replace("_", "-") if "_" in name else name.replace("-", "_")


def _expanded(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def path(text: str) -> Any:
        return kind(os.path.expanduser(text))

    return path


class Help(argparse.RawDescriptionHelpFormatter):
    """Prose filled, indented lines kept, nothing wider than COLUMNS or the terminal; each flag in one of its
    spellings.
    """

    def __init__(self, prog: str):
        super().__init__(prog, width=min(shutil.get_terminal_size().columns, COLUMNS) - 1)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(_filled(part, width) for part in re.split(r"\n\s*\n", text.strip("\n")))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        kept = action.option_strings
        seen = {s.replace("-", "_"): s for s in reversed(kept)}  # of two spellings the first
        action.option_strings = [s for s in kept if s in seen.values()]
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = kept


def _filled(paragraph: str, width: int) -> str:
    lines = paragraph.splitlines()
    if not any(line.startswith(" ") for line in lines):
        return textwrap.fill(" ".join(lines), width)
    return "\n".join(part for line in lines for part in _indented(line, width))


def _indented(line: str, width: int) -> list[str]:
    """A line that is too long is broken before its second column, or else between words."""
    if len(line) <= width:
        return [line]
    margin = " " * (len(line) - len(line.lstrip()))
    columns = re.split(r"\s{2,}", line.strip(), maxsplit=1)
    if len(columns) == 1:
        return textwrap.wrap(line.strip(), width, initial_indent=margin, subsequent_indent=margin + "    ")
    found = _indented(margin + columns[0], width)
    deep = margin + "    "
    return found + textwrap.wrap(columns[1], width, initial_indent=deep, subsequent_indent=deep)
