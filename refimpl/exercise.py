"""The checker of the notebooks' exercises: it says what is wrong and where, and never raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

UNDONE, DONE = "Not yet:", "Right:"


def check(answer: Any, right: Any, *cases: tuple, hint: str = "", tolerance: float = 0.0) -> None:
    """Compare an answer with what is right and print one line that begins with DONE or UNDONE.

    With `cases` both are functions, called with each tuple of arguments; without, both are values. None or `...` counts as not yet
    answered. Numbers may differ by `tolerance` times the largest one expected; NaN equals NaN.
    """
    wrong = (
        next(filter(None, (_judge_call(answer, right, case, tolerance) for case in cases)), "")
        if cases
        else _judge("the answer", answer, right, tolerance)
    )
    if wrong:
        print(f"{UNDONE} {wrong}." + (f" {hint}" if hint else ""))
    else:
        print(f"{DONE} " + (f"`{_name(answer)}` agrees in all {len(cases)} cases." if cases else "that is it."))


def _judge_call(answer: Callable, right: Callable, case: tuple, tolerance: float) -> str:
    call = f"`{_name(answer)}({', '.join(map(_show, case))})`"
    try:
        found = answer(*case)
    except Exception as error:
        return f"{call} raises {type(error).__name__}: {error}"
    return _judge(call, found, right(*case), tolerance)


def _judge(what: str, found: Any, right: Any, tolerance: float) -> str:
    """What is wrong, or nothing."""
    if found is None or found is ...:
        return f"{what} is still empty"
    if isinstance(right, tuple):
        if not isinstance(found, tuple) or len(found) != len(right):
            return f"{what} should be {len(right)} things, as a tuple"
        return next(filter(None, (_judge(f"number {i} of {what}", f, r, tolerance) for i, (f, r) in enumerate(zip(found, right)))), "")
    if isinstance(right, str | bool | dict | list):
        return "" if found == right else f"{what} is {found!r} and should be {right!r}"
    return _judge_numbers(what, found, np.asarray(right), tolerance)


def _judge_numbers(what: str, found: Any, right: np.ndarray, tolerance: float) -> str:
    try:
        mine = np.asarray(found).astype(np.float64)
    except (TypeError, ValueError):
        return f"{what} is {found!r} and should be numbers"
    if mine.shape != right.shape:
        return f"{what} has shape {mine.shape} and should have {right.shape}"
    true = right.astype(np.float64)
    allowed = tolerance * np.max(np.abs(true), initial=0, where=np.isfinite(true))
    with np.errstate(invalid="ignore"):
        good = (mine == true) | (np.isnan(mine) & np.isnan(true)) | (np.abs(mine - true) <= allowed)
    if good.all():
        return ""
    at = tuple(map(int, np.argwhere(~good)[0]))
    place = f" at {list(at)}" if at else ""
    count = f" ({(~good).sum()} of {good.size} differ)" if good.size > 1 else ""
    return f"{what}{place} is {mine[at]:.7g} and should be {true[at]:.7g}{count}"


def _name(function: Any) -> str:
    return getattr(function, "__name__", "answer")


def _show(argument: Any) -> str:
    size = getattr(argument, "shape", None)
    return f"an array {list(size)}" if size else type(argument).__name__ if hasattr(argument, "__dict__") else f"{argument!r:.40}"
