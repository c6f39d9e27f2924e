"""How long a call takes, on the CPU and on a GPU, and how fast this machine's memories are read.

Every timing of the house is made here. `race` times calls on the CPU, `replay` kernels on a GPU;
`read_bandwidth` and `copy_bandwidth` are what `refimpl.plan` predicts from and `refimpl.bench` compares with.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from refimpl import formats, ops
from refimpl.checkpoint import codecs
from refimpl.reference import interleaved
from refimpl.tensors import Packed

Job = Callable[[], Any]
REST_S = 0.2  # between contenders: threads of one library spin for a while after work, in the way of the next
# Untimed calls before a turn: after a rest two threads wake on one core, and it takes the system a while to
# part them.
WARM_S = 0.2
SHORT_S = 2e-3  # shorter calls are made many times a turn
GIB = 1 << 30
MANY = 64  # tokens, 32 for each expert of `expert_rates`: arithmetic, not memory


class Result(NamedTuple):
    """Seconds of a call, its spread (quartiles, relative to the median); or why there are none."""

    seconds: float
    spread: float = 0.0
    failure: str = ""


# --- the CPU ------------------------------------------------------------------------------------------------


def race(jobs: dict[str, Job], seconds: float, rounds: int = 5) -> dict[str, list[float]]:
    """Seconds of a call of each, in turns, for about `seconds` and at least so many rounds. One job alone
    takes no rests.
    """
    turns = {name: _turn(job, seconds, len(jobs) > 1) for name, job in jobs.items()}
    times: dict[str, list[float]] = {name: [] for name in jobs}
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < rounds or time.perf_counter() < end:
        for name, turn in turns.items():
            times[name].append(turn())
    return times


def _turn(job: Job, seconds: float, rest: bool) -> Callable[[], float]:
    """What takes a turn of `job` and gives the seconds of a call in it; calls it twice to know how long it
    is.
    """
    job()
    once = _timed(job, 1)
    repeats, untimed = max(1, int(SHORT_S / once)), int(min(WARM_S, seconds / 4) / once)

    def turn() -> float:
        if rest:
            time.sleep(REST_S)
            for _ in range(untimed):
                job()
        return _timed(job, repeats)

    return turn


def _timed(job: Job, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        job()
    return (time.perf_counter() - start) / repeats


def median(job: Job, seconds: float = 1.0) -> float:
    """Seconds of a call, the median of three or more."""
    return float(np.median(race({"": job}, seconds, 3)[""]))


@cache
def read_bandwidth(threads: int) -> float:
    """GB/s of reading memory with so many threads, the best of some turns in a second."""
    reading = Reading(threads)
    return reading.nbytes / min(race({"read": reading.once}, 1.0)["read"]) / 1e9


class Reading:
    """How fast so many threads read memory at this moment: others may want it too."""

    def __init__(self, threads: int):
        plenty = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") > 48 * GIB
        # Half a gigabyte, or two where there is plenty and so perhaps a cache of hundreds of megabytes.
        data, read = np.ones(GIB // (4 if plenty else 16), np.uint64), _reader()
        self.nbytes, self.once = data.nbytes, lambda: read(data, threads)
        self.once()

    def gbps(self) -> float:
        """GB/s of reading all of it, the median of three times after one in which threads wake."""
        self.once()
        return self.nbytes / float(np.median([_timed(self.once, 1) for _ in range(3)])) / 1e9


@cache
def _reader() -> Callable[[np.ndarray, int], Any]:
    """What adds up an array, u64 [n], each thread one piece of it."""
    from numba import njit, prange  # heavy, and not everyone has it

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

    return read


def random_weights(type_name: str, *shape: int) -> Packed:
    """A tensor of that type whose blocks are drawn from 4,096 quantized ones: real bit patterns, made in
    seconds. Of a type that is only decoded they are any bits under scales of 2^-14.
    """
    kind = formats.type_id(type_name)
    module = formats.get(kind)
    rng = np.random.default_rng(0)
    if hasattr(module, "quantize"):
        x = (rng.standard_normal((64, 64 * module.WEIGHTS)) * 0.02).astype(np.float32)
        pool = codecs.quantize(kind, x).reshape(-1, module.BLOCK.itemsize)
    else:
        pool = rng.integers(0, 256, (4096, module.BLOCK.itemsize), np.uint8)
        pool.view(module.BLOCK)["d"] = 2.0**-14
    data = pool[rng.integers(0, len(pool), int(np.prod(shape)) // module.WEIGHTS)]
    return Packed(data.reshape(*shape[:-1], -1), kind, shape)


class Rates(NamedTuple):
    """What this machine's CPU does for routed experts, measured."""

    core_gbps: float  # weights of one token that one core takes in, from memory, arithmetic and all
    gflops: float  # of all threads, many tokens for each expert, two operations a weight


def expert_rates(
    threads: int, types: tuple[str, str], hidden: int, width: int, repack: bool = False
) -> Rates:
    """Measured rates of experts with gate and up in the first type and down in the second, with `repack` laid
    side by side where that is known. Sets the number of threads.
    """
    count, chosen = 16, 8
    gate, up = (random_weights(types[0], count, width, hidden) for _ in range(2))
    down = random_weights(types[1], count, hidden, width)
    nbytes = sum(w.data.nbytes for w in (gate, up, down)) * chosen / count
    stacks = [interleaved.where_possible(w) if repack else w for w in (gate, up, down)]
    experts, rng = ops.load("experts", "cpu"), np.random.default_rng(0)

    def seconds(tokens: int) -> float:
        x = rng.standard_normal((tokens, hidden)).astype(np.float32)
        weights = np.full((tokens, chosen), 1 / chosen, np.float32)
        pick = lambda: np.argsort(rng.random((tokens, count)), axis=1)[:, :chosen]  # noqa: E731
        return min(race({"": lambda: experts(x, pick(), weights, *stacks)}, 0.5)[""])

    ops.set_threads(1)
    core = nbytes / seconds(1) / 1e9
    ops.set_threads(threads)
    return Rates(core, 6 * MANY * chosen * hidden * width / seconds(MANY) / 1e9)


def float_rate(threads: int) -> float:
    """GFLOP/s of float32 products of many tokens by this project's kernel. Sets the number of threads."""
    x, w = (np.random.default_rng(0).standard_normal((n, 2048), np.float32) for n in (512, 4096))
    ops.set_threads(threads)
    linear = ops.load("linear", "cpu")
    return 2 * x.size * len(w) / min(race({"": lambda: linear(x, w)}, 0.5)[""]) / 1e9


# --- a GPU --------------------------------------------------------------------------------------------------


def replay(calls: Sequence[Job]) -> Result:
    """A call's time on the current GPU: all of them one after the other in a CUDA graph, as often as fill 20
    ms, the graph replayed ten times. Kernels and the gaps between them, no Python.
    """
    import triton.testing  # heavy and optional: the extra `gpu`

    def walk() -> None:
        for call in calls:
            call()

    low, median, high = triton.testing.do_bench_cudagraph(walk, rep=20, quantiles=(0.25, 0.5, 0.75))
    return Result(median / 1e3 / len(calls), (high - low) / median)


@cache
def copy_bandwidth(device: str = "cuda:0") -> float:
    """GB/s of copying a gigabyte within a GPU, reads and writes counted; by the driver or by a kernel,
    whichever is faster.
    """
    import torch  # heavy and optional: the extra `gpu`

    with torch.cuda.device(device):
        source = torch.randn(GIB // 4, device=device)
        target = torch.empty_like(source)
        copies = partial(target.copy_, source), partial(torch.neg, source, out=target)
        return 2 * GIB / min(replay([copy]).seconds for copy in copies) / 1e9


@cache
def upload_bandwidth(device: str = "cuda:0") -> float:
    """GB/s of bringing ordinary memory to a GPU, a quarter of a gigabyte at a time; the best of some."""
    import torch  # heavy and optional: the extra `gpu`

    host = torch.ones(GIB // 4, dtype=torch.uint8)

    def upload() -> None:
        host.to(device)
        torch.cuda.synchronize(device)

    return host.nbytes / min(race({"": upload}, 0.5)[""]) / 1e9
