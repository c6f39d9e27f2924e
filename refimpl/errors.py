"""Every error a user can meet: one line that names the file, what was found, what was expected and what to
do.

    refimpl: E1203 model.gguf: tensor offset past the end of the file (found 4096, expected at most 1024) -
        download it again

The classes say whose fault it is. The codes are stable: E1xxx GGUF, E2xxx safetensors and index, E3xxx merge,
E4xxx values, E5xxx machine and process, E6xxx tokenizer, template and chat, E7xxx rules, E8xxx conformance,
E9xxx server. Sentences and hints stand in errors.toml, from which docs/errors.md is made: `raise
refusal("E4021 hub", name)`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache, partial
from importlib import resources
from typing import Any
from unicodedata import category


class RefimplError(Exception):
    """Base of all errors that are reported as one line with exit code 1."""

    def __init__(
        self,
        code: str,
        where: object,
        what: str,
        *,
        found: object = None,
        expected: object = None,
        hint: str = "",
    ):
        self.code, self.where, self.what = code, str(where), what
        self.found, self.expected, self.hint = found, expected, hint
        super().__init__(self.line())

    def __reduce__(self) -> tuple[Any, ...]:
        """By its parts, so that a process that is dealt work can send it back."""
        make = partial(type(self), found=self.found, expected=self.expected, hint=self.hint)
        return make, (self.code, self.where, self.what)

    def line(self) -> str:
        """The line as printed, control characters made visible (names and paths may come from a stranger's
        file).
        """
        sides = [
            f"{word} {value}"
            for word, value in (("found", self.found), ("expected", self.expected))
            if value is not None
        ]
        where = (
            self.where if len(self.where) <= 400 else "…" + self.where[-400:]
        )  # a long path must not push out what is wrong
        text = f"{self.code} {where}: {self.what}" + (f" ({', '.join(sides)})" if sides else "")
        return printable(text + (f" - {self.hint}" if self.hint else ""), limit=1000)


class InputFormatError(RefimplError):
    """A file does not follow its format."""


class MismatchError(RefimplError):
    """Two things that must agree do not: index and file, GGUF and checkpoint, config and tensor."""


class UnsupportedError(RefimplError):
    """Well-formed, recognized by name, and not done here."""


class ResourceError(RefimplError):
    """The machine says no: disk, memory, permissions, locks."""


def refusal(
    key: str, where: object, /, *, found: object = None, expected: object = None, hint: str = "", **facts: Any
) -> RefimplError:
    """The error to raise: `key` names an entry of errors.toml, a code and perhaps a word, and `facts` fill in
    its sentence.

    A `hint` given here goes before the table's. KeyError for a key or fact that is not there.
    """
    entry = table()[key]
    kind = {k.__name__: k for k in (InputFormatError, MismatchError, UnsupportedError, ResourceError)}[
        entry["kind"]
    ]
    hint = hint or entry.get("hint", "").format(**facts)
    return kind(key[:5], where, entry["what"].format(**facts), found=found, expected=expected, hint=hint)


@cache
def table() -> dict[str, dict[str, str]]:
    """errors.toml: {"E4021 hub": {"kind", "what", "hint"}}, read when the first error is made."""
    return tomllib.loads(resources.files("refimpl").joinpath("errors.toml").read_text("utf-8"))


def near(word: str, known: Iterable[str], n: int = 1, cutoff: float = 0.6) -> list[str]:
    """The names most like `word`, best first and at most n, whether their letters are large or small: those
    that are alike, then those that begin so.
    """
    lower, word = {name.lower(): name for name in known}, word.lower()[:200]
    alike = get_close_matches(word, lower, n, cutoff)
    begun = [name for name in lower if len(word) > 1 and name.startswith(word)]
    return [lower[name] for name in dict.fromkeys((*alike, *begun))][:n]


def meant(word: str, known: Iterable[str]) -> str:
    """For the `expected` of a refusal: the names most like this one; all of them where none is."""
    known = list(known)
    close = near(word, known, 3)
    asked = "did you mean that?" if len(close) == 1 else "did you mean one of these?"
    return f"{', '.join(close)} ({asked})" if close else ", ".join(known)


def printable(text: str, limit: int = 120) -> str:
    """`text` with control characters, terminal escapes and lone surrogates written as escapes, cut at `limit`
    characters.
    """
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii")
        for c in text[:limit]
    )
    return shown + ("…" if len(text) > limit else "")


def visible(text: str) -> str:
    """`text` of many lines for a terminal: what is not seen and yet does something there is spelled out, as
    \\x1b or \\u202e. That is control characters but newline and tab, characters that turn the direction of
    writing or have no width, and lone surrogates.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_spelled(c) if c not in "\n\t" and category(c) in _UNSEEN else c for c in text)


_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def _spelled(c: str) -> str:
    n = ord(c)
    return f"\\x{n:02x}" if n < 256 else f"\\u{n:04x}" if n < 65536 else f"\\U{n:08x}"
