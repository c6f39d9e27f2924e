"""How the table in kernels/fp8_tiles.py was chosen: `python -m refimpl.bench fp8-sweep` times other
tiles than the table's on a GPU, each product in one launch.

Kernels are compiled first, in as many processes as there are cores; then every shape of `refimpl.bench fp8`
is timed with each candidate. There is a line for each shape, number of tokens and kind of activations: what
the table picks, and the two fastest.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from refimpl.bench.fp8 import DENSE, LAYER, Problem, gpu
from refimpl.cli import Parser, integer
from refimpl.devices.speed import replay

SHAPES = LAYER | DENSE
Case = tuple[str, int, str]  # shape, tokens, kind


def candidates(n: int, k: int, m: int, kind: str, device: Any) -> Iterator[Any]:
    """Tiles that are worth a try for a product of this shape; the first is the one that the table picks."""
    from refimpl.kernels.fp8_linear_triton import picked  # Triton: needs a GPU
    from refimpl.kernels.fp8_tiles import WIDE, Tiles

    blocks = -(-k // 128)
    chip = gpu().cuda.get_device_capability()
    yield picked(m, n, k, device, kind)
    if kind == "fp8" and chip[0] == 9:
        if m <= 16:
            for stages, beside in ((8, 1), (10, 1), (6, 2), (8, 2), (10, 2), (7, 3)):
                yield from (Tiles("gluon", 64, 16, 4, stages, splits, beside) for splits in (0, 1))
        elif m <= 64:
            for beside in (1, 2):
                yield from (Tiles("gluon", 64, 64, 4, 6, splits, beside) for splits in (0, 1, 2, 4))
                yield from (Tiles("gluon", 128, 64, 4, 4, splits, beside) for splits in (0, 1, 2, 4))
            for stages in (8, 10, 13):
                yield from (Tiles("gluon", 64, 64, 4, stages, splits) for splits in (0, 1))
        else:
            for outputs in (64, 128):
                yield from (Tiles("gluon", outputs, 128, 4, 0, splits) for splits in (0, 1, 2, 4))
            if blocks % 4 == 0:
                yield WIDE
            yield from (Tiles("gluon", 64, 64, 4, 6, splits) for splits in (0, 1, 2, 4))
    if kind == "bf16" and chip[0] == 9 and m > 32:
        for beside in (1, 2):
            yield from (Tiles("gluon", 64, 64, 4, 4, splits, beside) for splits in (0, 1, 2, 4))
        if m > 64:
            for outputs in (64, 128):
                yield from (Tiles("gluon", outputs, 128, 4, 0, splits) for splits in (0, 1, 2, 4))
    if m > (128 if kind == "fp8" and chip[0] == 9 else 1000):
        return
    tokens = max(16, min(m, 128))
    sizes = [(64, 4), (128, 8), (128, 4)] if m <= 16 else [(64, 4), (128, 8)]
    for outputs, warps in sizes:
        for stages in (3, 4, 6) if m <= 16 else (2, 3, 4):
            for splits in sorted(
                {-(-blocks // -(-blocks // s)) for s in (1, 2, 3, 4, 6, 8, 14, 16) if s <= blocks}
            ):
                programs = -(-n // outputs) * splits
                if (blocks // splits >= 2 or splits == 1) and programs <= 1100:
                    yield Tiles("split", outputs, tokens, warps, stages, splits)


def cases(tokens: list[int]) -> Iterator[Case]:
    """All that is timed; with many tokens only codes are multiplied."""
    for name in SHAPES:
        for m in tokens:
            for kind in ("fp8", "bf16") if m <= 128 else ("fp8",):
                yield name, m, kind


def compile_part(part: int, parts: int, tokens: list[int]) -> None:
    """Every `parts`-th distinct kernel, into Triton's cache."""
    torch = gpu()
    from refimpl.kernels import fp8_linear_triton as ours  # Triton: needs a GPU

    distinct: dict[Any, Any] = {}
    device = torch.device("cuda", 0)
    for name, m, kind in cases(tokens):
        n, k = SHAPES[name]
        for tile in candidates(n, k, m, kind, device):
            x = torch.bfloat16 if kind == "bf16" else torch.float8_e4m3fn
            key = (kind, tile._replace(splits=min(tile.splits, 2)))
            distinct.setdefault(key, (x, (m, n, k), tile))
    for x, (m, n, k), tile in list(distinct.values())[part::parts]:
        try:
            scale, strides = (None, (k, 0, 0)) if x == torch.bfloat16 else (torch.float32, (k, 1, m))
            kernel, grid, arguments, options = ours._launch(
                x, scale, torch.float8_e4m3fn, torch.float32, torch.bfloat16, (m, n, k), strides, device, tile
            )
            kernel.warmup(*arguments, grid=grid, **options)
        except Exception as error:
            print(f"does not compile: {tile}: {type(error).__name__}", file=sys.stderr)


def measure(problem: Problem, m: int, kind: str, tile: Any) -> float:
    """Microseconds, or infinity where it fails."""
    from refimpl.kernels import fp8_linear_triton as ours  # Triton: needs a GPU
    from refimpl.kernels.act_quant_triton import act_quant  # Triton: needs a GPU

    x = problem.activations(m)
    codes, scale = act_quant(x) if kind == "fp8" else (x, None)
    calls = [partial(ours._product, codes, scale, w, problem.torch.bfloat16, tile) for w in problem.copies]
    try:
        return replay(calls).seconds * 1e6
    except Exception as error:
        problem.torch.cuda.synchronize()
        print(f"failed: {tile}: {type(error).__name__} {str(error)[:80]}", file=sys.stderr)
        return float("inf")


def show(tile: Any) -> str:
    """In a few letters: kernel, outputs x tokens, warps, stages, splits, programs beside each other."""
    size = f"{tile.outputs}x{tile.tokens}w{tile.warps}s{tile.stages}"
    return f"{tile.kernel[:3]}{size}k{tile.splits}b{tile.beside}"


def main(argv: list[str]) -> None:
    """Run `python -m refimpl.bench fp8-sweep` with these arguments."""
    parser = Parser("python -m refimpl.bench fp8-sweep", __doc__)
    parser.add_argument(
        "--tokens",
        type=integer(1),
        action="append",
        metavar="M",
        help="may be repeated (default 1, 16, 128, 4096)",
    )
    parser.add_argument("--all", action="store_true", help="print every candidate, not the two fastest")
    parser.add_argument("--part", metavar="I/N", help="only compile the I-th of N parts")
    args = parser.parse_args(argv)
    tokens = args.tokens or [1, 16, 128, 4096]
    torch = gpu()
    if args.part:
        part, parts = map(int, args.part.split("/"))
        return compile_part(part, parts, tokens)
    start, cores = time.perf_counter(), os.cpu_count() or 1
    command = [sys.executable, "-m", "refimpl.bench", "fp8-sweep", *(f"--tokens={m}" for m in tokens)]
    for process in [subprocess.Popen([*command, "--part", f"{i}/{cores}"]) for i in range(cores)]:
        process.wait()
    print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    problem, last = None, None
    for name, m, kind in cases(tokens):
        if name != last:
            problem = None
            torch.cuda.empty_cache()
            problem, last = Problem(*SHAPES[name]), name
        assert problem is not None
        picked, *others = dict.fromkeys(candidates(*SHAPES[name], m, kind, torch.device("cuda", 0)))
        times = {tile: measure(problem, m, kind, tile) for tile in (picked, *others)}
        best = sorted(times, key=lambda t: times[t])[: None if args.all else 2]
        print(
            f"{name:13} M={m:<4} {kind:4} {show(picked)} {times[picked]:.1f}; best "
            + ", ".join(f"{show(t)} {times[t]:.1f}" for t in best),
            flush=True,
        )
    print(f"done in {time.perf_counter() - start:.0f} s", flush=True)
