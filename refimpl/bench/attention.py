"""Latent attention of one layer of DeepSeek-V3 over a cache of random rows, on the CPU beside the numpy
reference, or on a GPU: `python -m refimpl.bench attention [--backend cuda]`.

On the CPU, `kv_b` is what a checkpoint of FP8 has, 16.8 MB; the reference gets it dequantized. On a GPU it is
bfloat16, and so is the cache, which has just the room for its rows. One token is computed there in large
tiles of many heads and by 16 heads at a time, whichever a model would take, and a prompt as a model takes it.
Several layers of `kv_b` and of the cache take turns, so that they come from memory. Bytes are theirs, each
once. The linear layers before and behind are not part of it (`python -m refimpl.bench linear --kind FP8`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import cycle

import numpy as np

from refimpl import ops
from refimpl.bench.fp8 import CACHE, gpu
from refimpl.bench.measure import Row, require_close, rows
from refimpl.cli import Parser, integer, number, run, to_json
from refimpl.devices.speed import Job, copy_bandwidth, race, read_bandwidth, replay
from refimpl.reference import fp8
from refimpl.reference.packed import dense
from refimpl.tensors import ScaledFP8

HEADS, NOPE, ROPE, VALUE, LATENT = 128, 128, 64, 128, 512
DEVICE = "cuda"
LAYERS = 16  # of kv_b, 268 MB: more than most caches hold
PAIRS = 1 << 15  # of a token and a row: with more the reference takes seconds, and is left out


def measure(tokens: int, context: int, threads: int, seconds: float) -> Iterator[Row]:
    """Rows of the kernel, and of the reference where that lasts milliseconds, for tokens behind a context."""
    rng, s = np.random.default_rng(4), context + tokens
    kv_b = [ScaledFP8(c, f) for c, f in _layers(rng)]
    cache = rng.standard_normal((s, LATENT + ROPE), np.float32)
    q = rng.standard_normal((tokens, HEADS, NOPE + ROPE), np.float32)
    given = q[..., :NOPE], np.ascontiguousarray(q[..., NOPE:]), cache[:, :LATENT], cache[:, LATENT:]
    numbers = dense(kv_b[0]).reshape(HEADS, NOPE + VALUE, LATENT)
    ours, true = ops.load("mla_absorbed", "cpu"), ops.OPS["mla_absorbed"].reference
    turns, name = cycle(kv_b), f"attention M={tokens} S={s}"
    jobs: dict[str, Job] = {"cpu": lambda: ours(*given, next(turns), 0.1)}
    if s * tokens <= PAIRS:
        require_close(name, ours(*given, kv_b[0], 0.1), true(*given, numbers, 0.1), 1e-3)
        jobs["reference"] = lambda: true(*given, numbers, 0.1)
    nbytes, times = kv_b[0].codes.nbytes + cache.nbytes, race(jobs, seconds)
    flops = _operations(tokens, context)
    yield from rows(name, "v3", threads, times, float(nbytes), flops, read_bandwidth(threads))


def measure_on_gpu(tokens: int, context: int) -> Iterator[Row]:
    """Rows of the kernels for tokens behind a context."""
    torch, s = gpu(), context + tokens
    from refimpl.kernels import attention_torch, mla_decode_triton  # torch and Triton: optional

    make = torch.Generator(DEVICE).manual_seed(4)
    draw = partial(torch.randn, device=DEVICE, generator=make)
    kv_b = (draw(HEADS, NOPE + VALUE, LATENT) * LATENT**-0.5).to(torch.bfloat16)
    cache = draw(s, LATENT + ROPE).to(torch.bfloat16)
    q_nope, q_pe = draw(tokens, HEADS, NOPE), draw(tokens, HEADS, ROPE)
    nbytes = 2 * (kv_b.numel() + cache.numel())
    given = [
        (q_nope, q_pe, c[:, :LATENT], c[:, LATENT:], w, 0.1)
        for w, c in ((kv_b.clone(), cache.clone()) for _ in range(-(-CACHE // nbytes)))
    ]
    ways = {"cuda": attention_torch.mla_absorbed}
    if tokens == 1:
        one = mla_decode_triton.mla_absorbed
        ways = {"large tiles": partial(one, many=True), "16 heads": partial(one, many=False)}
    name = f"attention M={tokens} S={s}"
    found = [np.asarray(way(*given[0]).cpu()) for way in ways.values()]
    require_close(name, found[-1], found[0], 1e-3)
    times = {k: [replay([partial(way, *g) for g in given]).seconds] for k, way in ways.items()}
    yield from rows(name, "v3", 0, times, float(nbytes), _operations(tokens, context), copy_bandwidth())


def _operations(tokens: int, context: int) -> float:
    """Multiplications and additions of attention in latents."""
    seen = tokens * (context + (tokens + 1) / 2)  # pairs of a token and a row
    return 2.0 * HEADS * (tokens * (NOPE + VALUE) * LATENT + seen * (2 * LATENT + ROPE))


def _layers(rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Codes and scales of LAYERS matrices, numbers of about 1 / sqrt(LATENT)."""
    shape = HEADS * (NOPE + VALUE), LATENT
    few = fp8.weight_quant(rng.standard_normal((128, 1024), np.float32)).codes.reshape(-1)
    scale = np.full([n // 128 for n in shape], 1 / (100 * LATENT**0.5), np.float32)
    for _ in range(LAYERS):
        yield rng.choice(few, shape), scale


def main(argv: list[str]) -> None:
    """Run `python -m refimpl.bench attention` with these arguments."""
    parser = Parser("python -m refimpl.bench attention", __doc__)
    usual = {"tokens": (1, 32), "context": (500, 4000), "threads": sorted({1, os.cpu_count() or 1})}
    for name, values in usual.items():
        what = "rows of the cache before the tokens" if name == "context" else name
        text = f"{what}, may be repeated (default {' and '.join(map(str, values))})"
        least = integer(0 if name == "context" else 1)
        parser.add_argument(f"--{name}", type=least, action="append", metavar="N", help=text)
    parser.add_argument(
        "--seconds", type=number(0.001, 1e9), default=2.0, help="for each pair of contenders (default 2)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON list")
    parser.add_argument("--backend", choices=("cpu", "cuda"), default="cpu")
    args, found = parser.parse_args(argv), []
    on_gpu = args.backend == "cuda"
    for threads in [0] if on_gpu else args.threads or usual["threads"]:
        if not on_gpu:
            ops.set_threads(threads)
        for tokens in args.tokens or usual["tokens"]:
            for context in args.context or usual["context"]:
                measured = (
                    measure_on_gpu(tokens, context)
                    if on_gpu
                    else measure(tokens, context, threads, args.seconds)
                )
                for row in measured:
                    found.append(row)
                    print(show(row), file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.json:
        print(to_json([asdict(r) for r in found]))


def show(row: Row) -> str:
    """One measured row as a line of a table for people."""
    where = f"{row.threads:3} threads {row.backend:9}" if row.threads else f"{row.backend:21}"
    return (
        f"{row.name:24} {where} {row.median_s * 1e3:10.3f} ms "
        f"+-{row.spread / 2:4.0%} {row.gflops:8.0f} GFLOP/s {row.gbps:6.1f} GB/s, "
        f"{row.share_of_limit:4.0%} of reading"
    )


if __name__ == "__main__":
    raise SystemExit(run(main))
