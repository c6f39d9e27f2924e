"""The team of worker threads (kernels/team.py) beside Numba's `prange`: how long an empty region takes, back
to back and after a rest like that between two layers' experts, and how fast memory is read in one.

`limit` is the faster of the two at reading. OpenMP, below `prange`, spins between regions for as long as
GOMP_SPINCOUNT or OMP_WAIT_POLICY say; set them to see what they do.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numba
import numpy as np
from numba import njit, prange

from refimpl.bench.measure import Row, rows
from refimpl.cli import Parser, integer, number, run, to_json
from refimpl.kernels.jit import callback, integers, memory
from refimpl.kernels.team import Team, region

REST_S = 0.7e-3  # a layer's part on a GPU, about
QUIET_S = 0.1  # between contenders: threads of one spin for a while, in the way of the other's
CHUNK = 1 << 18  # bytes


def _nothing(args: Any, low: Any, high: Any, who: Any) -> int:
    return 1


@njit(nogil=True)
def total(piece):
    """Sum of u64, by itself for LLVM to vectorize it."""
    s = np.uint64(0)
    for v in piece:
        s += v
    return s


def _read(args: Any, low: Any, high: Any, who: Any) -> int:
    a = integers(args)
    start, n = a[0] + low * CHUNK, (high - low) * CHUNK // 8
    integers(a[1])[16 * who] += np.int64(total(numba.carray(memory(start), n, np.uint64)))
    return 1


@njit(parallel=True)
def _prange_nothing(sums, n):
    for t in prange(n):
        sums[16 * t] += 1


@njit(parallel=True)
def _prange_read(data, sums, n):
    size = data.size // n
    for t in prange(n):
        sums[16 * t] += np.int64(total(data[t * size : (t + 1) * size]))


def measure(threads: int, data: np.ndarray, seconds: float) -> Iterator[Row]:
    """Rows of both, for so many threads."""
    team, sums = Team(threads), np.zeros(16 * threads, np.int64)
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    args = np.array([data.ctypes.data, sums.ctypes.data])
    nothing, read = (callback(f, answers=True).address for f in (_nothing, _read))

    def turns(ours: Callable, theirs: Callable, rest: float) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {"cpu": [], "prange": []}
        end = time.perf_counter() + seconds
        while len(times["cpu"]) < 20 or time.perf_counter() < end:
            for name, job in (("cpu", ours), ("prange", theirs)):
                time.sleep(QUIET_S)
                job()
                for _ in range(10):
                    if rest:
                        time.sleep(rest)
                    start = time.perf_counter()
                    job()
                    times[name].append(time.perf_counter() - start)
        return times

    def our_region() -> None:
        region(team.address, nothing, args, 4 * threads, 1)

    def our_read() -> None:
        region(team.address, read, args, data.nbytes // CHUNK, 1)

    try:
        reads = turns(our_read, lambda: _prange_read(data, sums, threads), 0)
        limit = data.nbytes / min(np.median(t) for t in reads.values()) / 1e9
        yield from rows("read", f"{data.nbytes >> 20}MB", threads, reads, data.nbytes, 0.0, limit)
        for name, rest in (("region", 0.0), ("region after 0.7 ms", REST_S)):
            times = turns(our_region, lambda: _prange_nothing(sums, threads), rest)
            yield from rows(name, "-", threads, times, 0.0, 0.0, limit)
    finally:
        team.stop()


def main(argv: list[str]) -> None:
    """Run `python -m refimpl.bench team` with these arguments."""
    parser = Parser("python -m refimpl.bench team", __doc__)
    parser.add_argument(
        "--threads",
        type=integer(1),
        action="append",
        metavar="N",
        help="may be repeated (default 2 and all cores)",
    )
    parser.add_argument(
        "--mb", type=integer(1, 10**6), default=512, help="to read, in megabytes (default 512)"
    )
    parser.add_argument(
        "--seconds", type=number(0.001, 1e9), default=2.0, help="for each pair of contenders (default 2)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON list")
    args = parser.parse_args(argv)
    data, found = np.ones(args.mb << 17, np.uint64), []
    for threads in args.threads or sorted({2, os.cpu_count() or 2}):
        for row in measure(threads, data, args.seconds):
            found.append(row)
            text = (
                f"{row.name:20} {row.threads:3} threads {row.backend:7} {row.median_s * 1e6:10.1f} us "
                f"{row.gbps:7.1f} GB/s"
            )
            print(text, file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.json:
        print(to_json([asdict(r) for r in found]))


if __name__ == "__main__":
    raise SystemExit(run(main))
