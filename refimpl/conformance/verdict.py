"""The verdict of one law on one kernel, and the levels at which laws are tried."""

from __future__ import annotations

from dataclasses import dataclass, field

LEVELS = {"smoke": 0.25, "quick": 1, "full": 16, "exhaustive": 64}
"""How many times the examples of a law that are drawn. Shapes differ too, see `laws.real_sizes`."""

FATAL = ("survives", "returns")
"""Laws that any call can break, whatever law asked for it: nothing is judged after them."""


@dataclass
class Verdict:
    """One law's word on one kernel."""

    operation: str
    kernel: str
    law: str
    passed: bool
    examples: int
    seconds: float
    expected: str | None = None  # the reason of an expected failure
    cut: bool = False  # not all examples were run: the law's time was over
    silent: int = 0  # examples of which the bound said nothing: it was above the result's own size
    note: str = ""  # what was not judged here, though the verdict holds
    why: str = ""
    where: list[int] = field(default_factory=list)
    got: str = ""
    want: str = ""
    bound: float | None = None
    times: float | None = None
    case: str = ""
    reproduce: str = ""

    @property
    def fine(self) -> bool:
        """Passed, or known not to."""
        return self.passed or self.expected is not None
