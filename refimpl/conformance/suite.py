"""The suite as one line of a pytest file: `test_mine = refimpl.conformance.suite("fp8.linear",
my_kernel)`.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
from functools import cache
from typing import Any

from refimpl.conformance.child import Child, Job
from refimpl.conformance.judge import judge
from refimpl.conformance.laws.ladder import FORM, applying
from refimpl.conformance.lookup import Spec, checked, checked_manifest
from refimpl.conformance.manifest import Manifest
from refimpl.conformance.report import text
from refimpl.conformance.trial import Trial
from refimpl.conformance.verdict import Verdict


def suite(
    op: str,
    kernel: Callable[..., Any] | str,
    level: str = "quick",
    xfail: dict[str, str] | None = None,
    **manifest: Any,
) -> Callable:
    """A test function with one case for each law. `kernel` is "package.module:function", which is then judged
    in a process of its own that it may crash, or a function, which is judged in that of the tests; keywords
    are fields of `Manifest`.

    `xfail` maps laws that are known to fail to the reason. Raises InputFormatError for an unknown operation,
    kernel or declaration.
    """
    import pytest  # of the extra `conformance`, and only tests need it

    op = checked(op)
    declared = checked_manifest(op, Manifest().with_values(manifest, "suite"))
    if isinstance(kernel, str):
        spec = Spec(op, "", kernel, declared, level)
        trial = spec.trial()
        judged = _in_child(spec)
    else:
        trial = Trial(op, kernel, declared, f"{kernel.__module__}:{kernel.__qualname__}", level)

        def judged(law: str) -> list[Verdict]:
            return judge(trial, [law])

    known = xfail or {}
    marks = [
        pytest.param(law.name, marks=pytest.mark.xfail(reason=known[law.name]) if law.name in known else ())
        for law in applying(trial)
    ]

    @pytest.mark.parametrize("law", marks)
    def test(law: str) -> None:
        for verdict in judged(law):
            if verdict.law == FORM != law:
                pytest.skip("the results have not even the reference's form")
            assert verdict.passed, text([verdict])

    return test


def _in_child(spec: Spec) -> Callable[[str], list[Verdict]]:
    """Verdicts from one process for all laws, begun when the first is asked for."""

    @cache
    def process() -> Child:
        child = Child()
        atexit.register(child.close)
        return child

    return lambda law: process().judge(Job(spec, (law,)))
