"""Around each call of a whole model: how many threads of the CPU's kernels take part in it, by their times.

The kernels are asked where they are loaded: a model that does not use them, on a GPU alone, needs no Numba.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

TEAM = "refimpl.kernels.team"


def step(tokens: int) -> AbstractContextManager[None]:
    """For the time in which so many tokens pass through a model."""
    team = sys.modules.get(TEAM)
    return team.TEAM.step(tokens) if team else nullcontext()


def threads_found() -> tuple[int, int, bool] | None:
    """Threads that a token is fastest with, of how many, and whether all numbers have been tried; None where
    somebody said a number, or no token was work for several threads.
    """
    team = sys.modules.get(TEAM)
    found = team.found() if team and team.TEAM.team else None
    return (found[0], team.threads(), found[1]) if team and found else None


class Steps:
    """A model's function of tokens [T, ...] and more, each call within `step`."""

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, x: Any, *args: Any, **named: Any) -> Any:
        """What the function returns."""
        with step(len(x)):
            return self.function(x, *args, **named)
