"""Checkers for the exercises in the notebooks: they say what is wrong with an answer, and never stop a
notebook.

check(mine, right, inputs, mistakes={"the sign is lost": wrong})      a function, tried beside the right one
answer(mine, right, mistakes={288: "..."})                            a single value
judged(kernel, "q4_k.dequantize")                                     a kernel, before the conformance suite
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np


def check(
    mine: Callable,
    right: Callable,
    inputs: Iterable[Any],
    mistakes: Mapping[str, Callable] | None = None,
    tolerance: float = 0.0,
) -> bool:
    """Whether `mine` gives what `right` gives for every input (a tuple is several arguments); prints the
    first difference, and why if known.

    `mistakes` are wrong functions under the words that describe them: one that agrees with `mine` where
    `right` does not is named. Equal means equal bits of value, or within `tolerance` times the largest
    magnitude of the right answer.
    """
    cases = [x if isinstance(x, tuple) else (x,) for x in inputs]
    name = getattr(mine, "__name__", "your function")
    for number, args in enumerate(cases):
        want = right(*args)
        try:
            got = mine(*args)
        except Exception as error:
            print(f"Not yet: {_call(name, args)} raised {type(error).__name__}: {error}")
            return False
        if wrong := _difference(got, want, tolerance):
            print(f"Not yet: {_call(name, args)} {wrong}.")
            for words, function in (mistakes or {}).items():
                if _agrees(mine, function, cases[: number + 16], tolerance):
                    print(f"It looks as if {words}.")
            return False
    print(f"Right, in {len(cases)} of {len(cases)} cases.")
    return True


def answer(mine: Any, right: Any, mistakes: Mapping[Any, str] | None = None, tolerance: float = 0.0) -> bool:
    """Whether a value is the right one; prints why not, if its mistake is known."""
    if mine is ...:
        print("Not yet: put your answer in place of the three dots.")
        return False
    wrong = _difference(mine, right, tolerance)
    if not wrong:
        print("Right.")
        return True
    known = next(
        (why for value, why in (mistakes or {}).items() if not _difference(mine, value, tolerance)), ""
    )
    print(f"Not yet: {_show(mine)} is not it." + (f" It looks as if {known}." if known else ""))
    return False


def judged(kernel: Callable, operation: str, laws: Iterable[str] | None = None) -> bool:
    """Whether a kernel obeys the laws of the conformance suite for an operation (or those named); prints the
    first it breaks, and on what input.
    """
    from refimpl.conformance.judge import judge  # brings hypothesis, optional
    from refimpl.conformance.laws.ladder import LAWS  # as above
    from refimpl.conformance.trial import Trial  # as above

    verdicts = judge(Trial(operation, kernel, label=kernel.__name__), laws, stop=True)
    broken = next((v for v in verdicts if not v.passed), None)
    if broken is None:
        print(f"Right, by all {len(verdicts)} laws.")
        return True
    print(f"Not yet: {kernel.__name__} breaks the law {broken.law!r} ({LAWS[broken.law].says}).")
    print(
        f"{broken.why}"
        + (f"; at {broken.where} it gives {broken.got}, and {broken.want} is right." if broken.got else ".")
    )
    print(f"Smallest input found: {broken.case[:300]}")
    return False


def _difference(got: Any, want: Any, tolerance: float) -> str:
    """What is wrong with `got`, or nothing."""
    if got is None or got is ...:
        return (
            "gives nothing; the stub is waiting for you"
            if got is None
            else "gives the three dots of the stub"
        )
    if isinstance(want, str | bool):
        return (
            ""
            if isinstance(got, type(want)) and got == want
            else f"gives {_show(got)}, and {want!r} is right"
        )
    if isinstance(got, str):
        return f"gives {got!r}, and no text is expected"
    if isinstance(want, tuple):
        if not isinstance(got, tuple) or len(got) != len(want):
            return f"gives {type(got).__name__}, and {len(want)} results are expected"
        found = ((i, _difference(g, w, tolerance)) for i, (g, w) in enumerate(zip(got, want)))
        return next((f"result {i}: {wrong}" for i, wrong in found if wrong), "")
    return _array_difference(got, np.asarray(want), tolerance)


def _array_difference(value: Any, want: np.ndarray, tolerance: float) -> str:
    try:
        got = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        return f"gives {type(value).__name__}, and numbers are expected"
    if got.shape != want.shape:
        return f"gives shape {got.shape}, and {want.shape} is right"
    true = want.astype(np.float64)
    room = tolerance * float(np.max(np.abs(np.nan_to_num(true)), initial=0))
    bad = ~((got == true) | (np.isnan(got) & np.isnan(true)) | (np.abs(got - true) <= room))
    if not bad.any():
        return ""
    at = tuple(map(int, np.argwhere(bad)[0]))
    where = f" at {list(at)}" if at else ""
    return f"gives {{}}{where}, and {{}} is right".format(*_apart(got[at], true[at]))


def _apart(got: np.generic, true: np.generic) -> tuple[str, str]:
    """Two numbers that differ with as many digits as it takes to see that."""
    for digits in range(6, 18):
        shown = f"{got:.{digits}g}", f"{true:.{digits}g}"
        if shown[0] != shown[1]:
            break
    return shown


def _agrees(mine: Callable, wrong: Callable, cases: list[tuple], tolerance: float) -> bool:
    try:
        return not any(_difference(mine(*args), wrong(*args), tolerance) for args in cases)
    except Exception:
        return False


def _call(name: str, args: tuple) -> str:
    return f"{name}({', '.join(map(_show, args))})"


def _show(value: Any) -> str:
    """Short: a number with six digits, an array by its shape."""
    array = np.asarray(value) if isinstance(value, np.ndarray | np.generic | float | int) else None
    if array is None or isinstance(value, bool):
        return repr(value) if len(repr(value)) < 40 else type(value).__name__
    if array.size == 1 and not array.ndim:
        return f"{array.item():.6g}" if array.dtype.kind == "f" else str(array.item())
    return f"array {list(array.shape)}"
