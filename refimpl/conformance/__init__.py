"""The conformance suite: is a kernel equal to its reference, what does equal mean, and with which input is it
not.

    python -m refimpl.conformance                                      every row of the table of operations
    python -m refimpl.conformance --op q4_k.dequantize --kernel mine:decode
    test_mine = refimpl.conformance.suite("fp8.linear", mine.linear)   in a pytest file

The rooms, in the order in which they build on each other:

    manifest     what a kernel declares: arrays, rounding, overflow, accumulation, shapes
    inputs/      the numbers that kernels are fed, and the memory that these lie in
    truth/       what is true, and how far from it is still right
    families/    what operations with names alike have in common: inputs, truth, relations
    trial        a kernel that is judged
    laws/        the ladder of laws, small domains enumerated, real sizes
    judge        laws on one kernel: verdicts, with the smallest input found
    importing strangers lookup    which kernels; operations and formats that a stranger brings
    ways threads         the ways of a kernel that must be taken; how many threads there are
    child rows           each kernel in a process of its own; the table row by row
    report flags command suite    how verdicts read, and how they are asked for
    cache_machine model_rules greedy_ties     the latent cache against a list; what a model does between its
                         operations; tokens that rounding alone can change
    field/               kernels that other projects released, and bugs that such kernels had
    selftest/    faults that must be found, rewrites that must not be, many seeds

Judging needs the extra `conformance` (hypothesis, pytest). `docs/conformance.md` derives the bounds.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from refimpl.cli.environment import has_folder
from refimpl.conformance.flags import parser
from refimpl.conformance.manifest import Manifest
from refimpl.errors import RefimplError, refusal


def _missing() -> RefimplError | None:
    """Why nothing can be judged: no hypothesis, or no current folder, which it asks for when imported."""
    if find_spec("hypothesis") is None:
        return refusal("E8010", "hypothesis")
    return None if has_folder() else refusal("E5022", "hypothesis")


if _missing() is None:
    from refimpl.conformance.suite import suite
else:

    def suite(*args: Any, **more: Any) -> Any:  # type: ignore[misc]
        """UnsupportedError E8010: it needs hypothesis; ResourceError E5022 without a current folder."""
        raise _missing() or refusal("E5022", "refimpl.conformance was imported")


def main(argv: list[str]) -> int:
    """The command: exit code 0 when all laws hold, 1 when one is broken, 2 for a wrong question.
    UnsupportedError E8010 without hypothesis.
    """
    flags = parser()
    args = flags.parse_args(argv)
    if (missing := _missing()) is not None:
        raise missing
    from refimpl.conformance.command import answer  # imports hypothesis, which is optional

    return answer(args, flags, argv)


__all__ = ["Manifest", "main", "suite"]
