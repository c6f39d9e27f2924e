"""The suite as one line of a pytest file: `test_mine = refimpl.conformance.suite("fp8.linear",
my_kernel)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from refimpl.conformance.judge import checked, find, judge
from refimpl.conformance.laws.ladder import applying
from refimpl.conformance.manifest import Manifest
from refimpl.conformance.report import text
from refimpl.conformance.trial import Trial


def suite(
    op: str,
    kernel: Callable[..., Any] | str,
    level: str = "quick",
    xfail: dict[str, str] | None = None,
    **manifest: Any,
) -> Callable:
    """A test function with one case for each law. `kernel` is a function or "package.module:function";
    keywords are fields of `Manifest`.

    `xfail` maps laws that are known to fail to the reason. Raises InputFormatError for an unknown operation,
    kernel or declaration.
    """
    import pytest

    function = find(kernel) if isinstance(kernel, str) else kernel
    label = kernel if isinstance(kernel, str) else f"{function.__module__}:{function.__qualname__}"
    trial = Trial(checked(op), function, Manifest().with_values(manifest, "suite"), label, level)
    known = xfail or {}
    marks = [
        pytest.param(law.name, marks=pytest.mark.xfail(reason=known[law.name]) if law.name in known else ())
        for law in applying(trial)
    ]

    @pytest.mark.parametrize("law", marks)
    def test(law: str) -> None:
        for verdict in judge(trial, [law]):
            assert verdict.passed, text([verdict])

    return test
