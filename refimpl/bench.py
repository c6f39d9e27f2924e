"""How fast the kernels are, against peers and against this machine's memory: `python -m refimpl.bench [experts linear dequantize quantize | fp8]`.

Equality with the reference comes first. Then all contenders take turns on the same bytes in one process, and the median and the spread (from the
first to the third quartile, relative to the median) of each are printed. `limit` is what plain reading of memory reaches in the same run with as many
threads. Compare figures of one run only: a shared machine moves by half between runs.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from refimpl import formats, fp8, linear, ops, packed, peers
from refimpl.cli import Parser, run
from refimpl.errors import MismatchError
from refimpl.formats import bf16
from refimpl.tensors import Packed, ScaledFP8

SHAPES = {"tiny": (256, 256, 8, 2), "v3": (7168, 2048, 32, 8)}  # hidden, expert width, experts, experts a token
TOKENS = (1, 4, 16, 32, 128)
FP8_TOKENS = (1, 16, 128, 4096)
MIXES = {"Q4_K": ("Q4_K", "Q4_K"), "Q4_K+Q6_K": ("Q4_K", "Q6_K")}  # gate and up, down
REST_S = 0.2  # between contenders: threads of one library spin for a while after work, in the way of the next
WARM_S = 0.2  # of untimed calls before a turn: after a rest two threads wake on one core, and it takes the system a while to part them
WITH_KT = False  # --kt
Job = Callable[[], Any]
Sides = tuple[Packed, Packed, Packed]  # gate, up, down


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


# --- measuring ---------------------------------------------------------------------------------------------------------------------------------


def race(jobs: dict[str, Job], seconds: float) -> dict[str, list[float]]:
    """Seconds of a call of each, in turns, for about `seconds` and at least five rounds. Short jobs are called many times a turn."""
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


def rows(name: str, shape: str, threads: int, times: dict[str, list[float]], nbytes: float, flops: float, limit: float) -> list[Row]:
    """The contenders' figures; ours, "cpu", with the fastest of the others."""
    medians = {k: float(np.median(t)) for k, t in times.items()}
    others = {k: m for k, m in medians.items() if k not in ("cpu", "reference")}
    found = []
    for k, m in medians.items():
        low, high = np.quantile(times[k], (0.25, 0.75))
        found.append(Row(name, k, shape, threads, m, float(high - low) / m, nbytes / m / 1e9, flops / m / 1e9, limit, nbytes / m / 1e9 / limit))
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
    def total(piece):  # by itself, for LLVM to vectorise it
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
    """MismatchError E5130 unless each row of `fast` is within `tolerance` of the row of `true`, relative to its largest number. A sieve against
    timing the wrong thing; the proof is in the tests."""
    scale = np.abs(true).max(axis=-1, keepdims=True) + 1e-30
    worst = float(np.nan_to_num(np.abs(fast - true) / scale, nan=np.inf).max())
    if not worst <= tolerance:
        raise MismatchError("E5130", what, "the result is not the reference's", found=f"{worst:.2g} off", expected=f"at most {tolerance:g}")


# --- weights and contenders ----------------------------------------------------------------------------------------------------------------------


def random_weights(type_name: str, *shape: int) -> Packed:
    """A tensor of that type whose blocks are drawn from 4,096 quantised ones: real bit patterns, made in seconds."""
    kind = formats.type_id(type_name)
    module = formats.get(kind)
    rng = np.random.default_rng(0)
    pool = formats.quantize(kind, (rng.standard_normal((64, 64 * module.WEIGHTS)) * 0.02).astype(np.float32)).reshape(-1, module.BLOCK.itemsize)
    data = pool[rng.integers(0, len(pool), int(np.prod(shape)) // module.WEIGHTS)]
    return Packed(data.reshape(*shape[:-1], -1), kind, shape)


def experts(shape: str, tokens: list[int], threads: int, with_peers: bool, seconds: float) -> Iterator[Row]:
    """A layer's routed experts for M tokens, routed anew each round."""
    hidden, width, count, chosen = SHAPES[shape]
    for mix, (first, last) in MIXES.items():
        gate, up, down = (
            random_weights(first, count, width, hidden),
            random_weights(first, count, width, hidden),
            random_weights(last, count, hidden, width),
        )
        for m in tokens:
            yield from _experts(f"experts {mix} M={m}", shape, m, threads, with_peers, seconds, (gate, up, down), chosen)


def _experts(
    name: str, shape: str, m: int, threads: int, with_peers: bool, seconds: float, sides: tuple[Packed, Packed, Packed], chosen: int
) -> Iterator[Row]:
    rng, count = np.random.default_rng(1), len(sides[0].data)
    x = rng.standard_normal((m, sides[0].shape[2])).astype(np.float32)
    weights = np.full((m, chosen), 1 / chosen, np.float32)
    # One routing a round, the same for all: each contender walks through the list at its own pace.
    routings = [np.argsort(rng.random((m, count)), axis=1)[:, :chosen] for _ in range(64)]
    touched = float(np.mean([len(np.unique(r)) for r in routings])) * sum(s.data.nbytes for s in sides) / count
    calls: dict[str, int] = {}

    def routing(who: str) -> np.ndarray:
        calls[who] = calls.get(who, -1) + 1
        return routings[calls[who] % len(routings)]

    ours = ops.load("experts", "cpu")
    few = min(m, 2)
    check(
        f"{name} cpu",
        ours(x, routings[0], weights, *sides)[:few],
        ops.OPS["experts"].reference(x[:few], routings[0][:few], weights[:few], *sides),
        2e-2,
    )
    jobs: dict[str, Job] = {"cpu": lambda: ours(x, routing("cpu"), weights, *sides)}
    if m == 1 and (shape == "tiny" or not with_peers):  # seconds on the larger shape
        jobs["reference"] = lambda: ops.OPS["experts"].reference(x, routing("reference"), weights, *sides)
    graphs = {}
    if with_peers:
        true = ours(x, routings[0], weights, *sides)
        for label, repack in (("ggml plain", False), ("ggml 8x8", True)):
            if repack and m * chosen > 8 * count:
                continue  # it falls to half of plain there, and lasts minutes
            graphs[label] = peers.Graph(threads, repack).experts(*sides, m, chosen)
            check(f"{name} {label}", graphs[label](x, routings[0].astype(np.int32)).mean(axis=1), true, 2e-2)
            jobs[label] = partial(lambda g, who: g(x, routing(who).astype(np.int32)), graphs[label], label)
        for label, make in (
            ("kt-kernel", peers.kt_experts if WITH_KT and threads == 1 else None),
            ("torch bf16", _torch_experts if m >= 512 else None),
        ):
            run_it = make(threads, m, chosen, sides) if make else None
            if run_it:
                check(f"{name} {label}", run_it(x, routings[0], weights), true, 5e-2)
                jobs[label] = partial(lambda f, who: f(x, routing(who), weights), run_it, label)
    flops = 6.0 * m * chosen * sides[0].shape[1] * sides[0].shape[2]
    yield from rows(name, shape, threads, race(jobs, seconds), touched, flops, read_bandwidth(threads))
    for graph in graphs.values():
        graph.close()


def _torch_experts(threads: int, tokens: int, chosen: int, sides: Sides) -> Callable | None:
    """The experts in torch with weights dequantised to bfloat16, 3.6 times the memory, where torch is installed."""
    with suppress(ImportError):
        import torch

        torch.set_num_threads(threads)
        gate, up, down = ([torch.from_numpy(packed.dense(side.expert(e))).to(torch.bfloat16) for e in range(len(side.data))] for side in sides)

        def run_it(x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
            t, out = torch.from_numpy(x).to(torch.bfloat16), torch.zeros(x.shape)
            for e in np.unique(ids):
                token, slot = np.nonzero(ids == e)
                own = t[torch.from_numpy(token)]
                hidden = torch.nn.functional.silu(own @ gate[e].T) * (own @ up[e].T)
                out.index_add_(0, torch.from_numpy(token), (hidden @ down[e].T).float() * torch.from_numpy(weights[token, slot, None]))
            return out.numpy()

        return run_it
    return None


def linears(shape: str, tokens: list[int], threads: int, with_peers: bool, seconds: float) -> Iterator[Row]:
    """Layers of several times the last-level cache, taken in turns: FP8 tiles (W8A8), BF16, and Q4_K."""
    hidden, width = SHAPES[shape][:2]
    copies = 8 if shape == "v3" else 1
    rng = np.random.default_rng(2)
    codes = rng.choice(fp8.weight_quant(rng.standard_normal((128, 1024)).astype(np.float32)).codes.reshape(-1), (copies, width, hidden))
    scale = np.full((-(-width // 128), -(-hidden // 128)), 1e-4, np.float32)
    halves = bf16.quantize(rng.standard_normal((copies * width, hidden)).astype(np.float32) * np.float32(0.02)).reshape(copies, width, -1)
    q4_k = random_weights("Q4_K", copies, width, hidden)
    kinds: dict[str, list] = {
        "FP8": [ScaledFP8(c, scale) for c in codes],
        "BF16": [Packed(h, bf16.GGML_TYPE, (width, hidden)) for h in halves],
        "Q4_K": [q4_k.expert(i) for i in range(copies)],
    }
    for kind, layers in kinds.items():
        for m in tokens:
            yield from _linear(f"linear {kind} M={m}", shape, m, threads, with_peers, seconds, layers)


def _linear(name: str, shape: str, m: int, threads: int, with_peers: bool, seconds: float, layers: list) -> Iterator[Row]:
    first = layers[0]
    rows_, columns = first.shape
    x = np.random.default_rng(3).standard_normal((m, columns)).astype(np.float32)
    ours = ops.load("linear", "cpu")
    true = linear.linear(x[:2], first)
    check(f"{name} cpu", ours(x, first)[:2], true, 1e-4)
    jobs: dict[str, Job] = {"cpu": lambda: [ours(x, w) for w in layers]}
    graphs = []
    if with_peers:
        jobs |= _torch_linears(x, layers, name, true, threads)
        if isinstance(first, Packed) and first.ggml_type != bf16.GGML_TYPE:
            for label, repack in (("ggml plain", False), ("ggml 8x8", True)):
                made = [peers.Graph(threads, repack).linear(w, m) for w in layers]
                check(f"{name} {label}", made[0](x)[:2], true, 1e-4)
                jobs[label] = partial(lambda gs: [g(x) for g in gs], made)
                graphs += made
    nbytes = float(sum(w.codes.nbytes if isinstance(w, ScaledFP8) else w.data.nbytes for w in layers))
    yield from rows(name, shape, threads, race(jobs, seconds), nbytes, 2.0 * m * rows_ * columns * len(layers), read_bandwidth(threads))
    for graph in graphs:
        graph.close()


def _torch_linears(x: np.ndarray, layers: list, name: str, true: np.ndarray, threads: int) -> dict[str, Job]:
    """torch's matrix products with the weights dequantised to bfloat16, where torch is installed."""
    with suppress(ImportError):
        import torch

        torch.set_num_threads(threads)
        wide = [torch.from_numpy(packed.dense(w)).to(torch.bfloat16) for w in layers]
        t = torch.from_numpy(x).to(torch.bfloat16)
        check(f"{name} torch bf16", (t @ wide[0].T).float().numpy()[:2], true, 5e-2)
        return {"torch bf16": lambda: [t @ w.T for w in wide]}
    return {}


def dequantize(shape: str, tokens: list[int], threads: int, with_peers: bool, seconds: float) -> Iterator[Row]:
    """The decoders of the table, see `bench_codecs`."""
    from refimpl import bench_codecs

    yield from bench_codecs.codecs("dequantize", shape, threads, with_peers, seconds)


def quantize(shape: str, tokens: list[int], threads: int, with_peers: bool, seconds: float) -> Iterator[Row]:
    """The quantisers of the table, see `bench_codecs`."""
    from refimpl import bench_codecs

    yield from bench_codecs.codecs("quantize", shape, threads, with_peers, seconds)


def fp8_linears(shape: str, tokens: list[int], threads: int, with_peers: bool, seconds: float) -> Iterator[Row]:
    """The FP8 linears on a GPU, see `bench_fp8`."""
    from refimpl import bench_fp8

    yield from bench_fp8.fp8(tokens)


# --- the command ---------------------------------------------------------------------------------------------------------------------------------

BENCHES: dict[str, Callable[[str, list[int], int, bool, float], Iterator[Row]]] = {
    "experts": experts,
    "linear": linears,
    "dequantize": dequantize,
    "quantize": quantize,
    "fp8": fp8_linears,
}
ONCE = ("dequantize", "quantize", "fp8")  # in one thread unless told otherwise


def show(row: Row) -> str:
    """A row for people."""
    versus = f"{row.speedup_vs_peer:5.2f}x {row.peer}" if row.speedup_vs_peer else ""
    figures = f"{row.median_s * 1e3:9.3f} ms +-{row.spread / 2:4.0%} {row.gbps:7.2f} GB/s {row.share_of_limit:5.0%} {row.gflops:8.1f} GFLOP/s"
    return f"{row.name:26} {row.shape:5} {row.threads:2} {row.backend:11} {figures}  {versus}"


def main(argv: list[str]) -> None:
    """The command."""
    parser = Parser("python -m refimpl.bench", __doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)} (default: all but fp8, which needs a GPU)")
    parser.add_argument("--shape", choices=SHAPES, default="v3", help="v3: hidden 7168, experts 2048 wide, 8 of 32; tiny: the embedded model's")
    parser.add_argument(
        "--tokens", type=int, action="append", metavar="M", help=f"tokens of a batch, may be repeated (default {TOKENS}; fp8: 1, 16, 128, 4096)"
    )
    parser.add_argument("--threads", type=int, action="append", metavar="N", help="may be repeated (default 1 and all cores)")
    parser.add_argument("--peers", action="store_true", help="ggml and torch too, where they are installed (extra `peers`)")
    parser.add_argument("--kt", action="store_true", help="kt-kernel too, for experts on one thread: it spins between calls, which costs the others")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each group of contenders (default 4)")
    parser.add_argument("--json", action="store_true", help="one JSON list")
    args = parser.parse_args(argv)
    if unknown := [n for n in args.names if n not in BENCHES]:
        parser.error(f"no benchmark {unknown[0]}; there are {', '.join(BENCHES)}")
    global WITH_KT
    WITH_KT = args.kt
    if args.peers:
        peers.library()
    cores = os.cpu_count() or 1
    found = []
    for name in args.names or [n for n in BENCHES if n != "fp8"]:
        for threads in args.threads or ([1] if name in ONCE else sorted({1, cores})):
            if name != "fp8":
                ops.set_threads(threads)
            for row in BENCHES[name](args.shape, args.tokens or list(FP8_TOKENS if name == "fp8" else TOKENS), threads, args.peers, args.seconds):
                found.append(row)
                print(show(row), file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.json:
        print(json.dumps([asdict(r) for r in found]))


if __name__ == "__main__":
    raise SystemExit(run(main))
