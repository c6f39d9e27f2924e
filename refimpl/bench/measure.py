"""Timing in turns: contenders on the same bytes in one process, medians and quartiles, and the bandwidth of
plain reading.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from refimpl import formats
from refimpl.errors import refusal
from refimpl.tensors import Packed

SHAPES = {
    "tiny": (256, 256, 8, 2),
    "v3": (7168, 2048, 32, 8),
}  # hidden, expert width, experts, experts a token


REST_S = 0.2  # between contenders: threads of one library spin for a while after work, in the way of the next


# of untimed calls before a turn: after a rest two threads wake on one core, and it takes the system a while
# to part them
WARM_S = 0.2


Job = Callable[[], Any]


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


def race(jobs: dict[str, Job], seconds: float) -> dict[str, list[float]]:
    """Seconds of a call of each, in turns, for about `seconds` and at least five rounds. Short jobs are
    called many times a turn.
    """
    repeats, untimed = {}, {}
    for name, job in jobs.items():
        job()
        start = time.perf_counter()
        job()
        once = time.perf_counter() - start
        repeats[name], untimed[name] = max(1, int(2e-3 / once)), int(min(WARM_S, seconds / 4) / once)
    times: dict[str, list[float]] = {name: [] for name in jobs}
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < 5 or time.perf_counter() < end:
        for name, job in jobs.items():
            time.sleep(REST_S)
            for _ in range(untimed[name]):
                job()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                job()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return times


def rows(
    name: str,
    shape: str,
    threads: int,
    times: dict[str, list[float]],
    nbytes: float,
    flops: float,
    limit: float,
) -> list[Row]:
    """The contenders' figures; ours, "cpu", with the fastest of the others."""
    medians = {k: float(np.median(t)) for k, t in times.items()}
    others = {k: m for k, m in medians.items() if k not in ("cpu", "reference")}
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
    if others and "cpu" in medians:
        best = min(others, key=lambda k: others[k])
        found[list(medians).index("cpu")].peer = best
        found[list(medians).index("cpu")].peer_median_s = others[best]
        found[list(medians).index("cpu")].speedup_vs_peer = others[best] / medians["cpu"]
    return found


@cache
def read_bandwidth(threads: int) -> float:
    """GB/s of adding up half a gigabyte, each thread in one piece; the best of seven."""
    from numba import njit, prange

    @njit(nogil=True)
    def total(piece):  # by itself, for LLVM to vectorize it
        s = np.uint64(0)
        for i in range(piece.size):
            s += piece[i]
        return s

    @njit(parallel=True)
    def read(data, n):
        s, size = np.uint64(0), data.size // n
        for t in prange(n):
            s += total(data[t * size : (t + 1) * size])
        return s

    data = np.ones(1 << 26, np.uint64)
    times = race({"read": lambda: read(data, threads)}, 1.0)["read"]
    return data.nbytes / min(times) / 1e9


def check(what: str, fast: np.ndarray, true: np.ndarray, tolerance: float) -> None:
    """MismatchError E5130 unless each row of `fast` is within `tolerance` of the row of `true`, relative to
    its largest number. A sieve against timing the wrong thing; the proof is in the tests.
    """
    scale = np.abs(true).max(axis=-1, keepdims=True) + 1e-30
    worst = float(np.nan_to_num(np.abs(fast - true) / scale, nan=np.inf).max())
    if not worst <= tolerance:
        raise refusal("E5130", what, found=f"{worst:.2g} off", expected=f"at most {tolerance:g}")


def random_weights(type_name: str, *shape: int) -> Packed:
    """A tensor of that type whose blocks are drawn from 4,096 quantized ones: real bit patterns, made in
    seconds.
    """
    kind = formats.type_id(type_name)
    module = formats.get(kind)
    rng = np.random.default_rng(0)
    pool = formats.quantize(
        kind, (rng.standard_normal((64, 64 * module.WEIGHTS)) * 0.02).astype(np.float32)
    ).reshape(-1, module.BLOCK.itemsize)
    data = pool[rng.integers(0, len(pool), int(np.prod(shape)) // module.WEIGHTS)]
    return Packed(data.reshape(*shape[:-1], -1), kind, shape)
