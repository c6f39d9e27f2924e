"""What the benches share: shapes, the rows they print, random weights, and a look at results before they are
timed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from refimpl.errors import refusal

SHAPES = {
    "tiny": (256, 256, 8, 2),
    "v3": (7168, 2048, 32, 8),
}  # hidden, expert width, experts, experts a token


OURS = ("cpu", "cpu interleaved")
"""The contenders that are this project's: weights as a file has them, and with rows side by side."""


class Settings(NamedTuple):
    """What a group of contenders is timed with."""

    shape: str
    tokens: list[int]
    threads: int
    peers: bool
    kt: bool
    seconds: float
    mixes: tuple[str, ...] = ()  # of the experts' formats; all where there is none
    kinds: tuple[str, ...] = ()  # of a linear layer's weights, likewise
    matrices: tuple[tuple[int, int], ...] = ()  # (N, K) of linear layers, instead of the shape's


@dataclass
class Row:
    """One contender's figures; seconds are of one call, bytes those of the weights it touches."""

    name: str
    backend: str
    shape: str
    threads: int
    median_s: float
    spread: float
    gbps: float
    gflops: float
    limit_gbps: float
    share_of_limit: float
    peer: str | None = None
    peer_median_s: float | None = None
    speedup_vs_peer: float | None = None


def rows(
    name: str,
    shape: str,
    threads: int,
    times: dict[str, list[float]],
    nbytes: float,
    flops: float,
    limit: float,
) -> list[Row]:
    """The contenders' figures; OURS with the fastest of the others."""
    medians = {k: float(np.median(t)) for k, t in times.items()}
    others = {k: m for k, m in medians.items() if k not in (*OURS, "reference")}
    found = []
    for k, m in medians.items():
        low, high = np.quantile(times[k], (0.25, 0.75))
        found.append(
            Row(
                name,
                k,
                shape,
                threads,
                m,
                float(high - low) / m,
                nbytes / m / 1e9,
                flops / m / 1e9,
                limit,
                nbytes / m / 1e9 / limit,
            )
        )
    for ours in (row for row in found if others and row.backend in OURS):
        ours.peer = min(others, key=lambda k: others[k])
        ours.peer_median_s = others[ours.peer]
        ours.speedup_vs_peer = ours.peer_median_s / ours.median_s
    return found


def require_close(what: str, fast: np.ndarray, true: np.ndarray, tolerance: float) -> None:
    """MismatchError E5130 unless each row of `fast` is within `tolerance` of the row of `true`, relative to
    its largest number. A sieve against timing the wrong thing; the proof is in the tests.
    """
    scale = np.abs(true).max(axis=-1, keepdims=True) + 1e-30
    worst = float(np.nan_to_num(np.abs(fast - true) / scale, nan=np.inf).max())
    if not worst <= tolerance:
        raise refusal("E5130", what, found=f"{worst:.2g} off", expected=f"at most {tolerance:g}")
