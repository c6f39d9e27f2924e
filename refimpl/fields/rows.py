"""The rows of the table of fields: what is done with a key, and where or why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

HONOURED, HARMLESS, REFUSED = "honoured", "harmless", "refused"


class Field(NamedTuple):
    """A row: what is done with the key, and where or why.

    `neutral`: values of a refused key that change nothing, or a function of (value, all fields) that knows
    them; null is always one. `needs` says the same in words.
    """

    verdict: str
    why: str
    neutral: tuple[Any, ...] | Callable[[Any, Mapping[str, Any]], bool] = ()
    needs: str = ""

    def passes(self, value: Any, raw: Mapping[str, Any]) -> bool:
        """Whether a key of this row with this value is let through."""
        if self.verdict != REFUSED or value is None:
            return True
        if callable(self.neutral):
            return self.neutral(value, raw)
        return any((type(value) is type(n) and value == n) or _equal_numbers(value, n) for n in self.neutral)

    @property
    def expected(self) -> str:
        """What a refused key may be, in words."""
        return self.needs or " or ".join([*(repr(n) for n in self.neutral), "no such field"])  # type: ignore[union-attr]


def _equal_numbers(a: Any, b: Any) -> bool:
    return not isinstance(a, bool | str) and not isinstance(b, bool | str) and a == b


def honoured(why: str, *keys: str) -> dict[str, Field]:
    """Rows for keys that are obeyed."""
    return {key: Field(HONOURED, why) for key in keys}


def harmless(why: str, *keys: str) -> dict[str, Field]:
    """Rows for keys without a say."""
    return {key: Field(HARMLESS, why) for key in keys}


def refused(why: str, *keys: str, neutral: Any = (), needs: str = "") -> dict[str, Field]:
    """Rows for keys that are not obeyed, and so not accepted."""
    return {key: Field(REFUSED, why, neutral, needs) for key in keys}


# Reasons that fields of several files have.
BOOKKEEPING = "says how the file came about, or which code of others reads it"
OUTPUT = "chooses what a function of transformers returns, or how much memory it takes"
