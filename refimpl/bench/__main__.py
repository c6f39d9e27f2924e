"""The command `python -m refimpl.bench`: its benches, its table and its JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict

from refimpl import ops
from refimpl.bench import cpu, peers
from refimpl.bench.cpu import FP8_TOKENS, TOKENS, experts, linears
from refimpl.bench.measure import SHAPES, Row
from refimpl.cli import Parser, run


def dequantize(
    shape: str, tokens: list[int], threads: int, with_peers: bool, seconds: float
) -> Iterator[Row]:
    """The decoders of the table, see `bench_codecs`."""
    from refimpl.bench import codecs

    yield from codecs.codecs("dequantize", shape, threads, with_peers, seconds)


def quantize(shape: str, tokens: list[int], threads: int, with_peers: bool, seconds: float) -> Iterator[Row]:
    """The quantizers of the table, see `bench_codecs`."""
    from refimpl.bench import codecs

    yield from codecs.codecs("quantize", shape, threads, with_peers, seconds)


def fp8_linears(
    shape: str, tokens: list[int], threads: int, with_peers: bool, seconds: float
) -> Iterator[Row]:
    """The FP8 linears on a GPU, see `bench_fp8`."""
    from refimpl.bench import fp8

    yield from fp8.fp8(tokens)


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
    figures = (
        f"{row.median_s * 1e3:9.3f} ms +-{row.spread / 2:4.0%} {row.gbps:7.2f} GB/s "
        f"{row.share_of_limit:5.0%} {row.gflops:8.1f} GFLOP/s"
    )
    return f"{row.name:26} {row.shape:5} {row.threads:2} {row.backend:11} {figures}  {versus}"


def main(argv: list[str]) -> None:
    """The command."""
    parser = Parser("python -m refimpl.bench", __doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"of {', '.join(BENCHES)} (default: all but fp8, which needs a GPU)",
    )
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        default="v3",
        help="v3: hidden 7168, experts 2048 wide, 8 of 32; tiny: the embedded model's",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        action="append",
        metavar="M",
        help=f"tokens of a batch, may be repeated (default {TOKENS}; fp8: 1, 16, 128, 4096)",
    )
    parser.add_argument(
        "--threads", type=int, action="append", metavar="N", help="may be repeated (default 1 and all cores)"
    )
    parser.add_argument(
        "--peers", action="store_true", help="ggml and torch too, where they are installed (extra `peers`)"
    )
    parser.add_argument(
        "--kt",
        action="store_true",
        help="kt-kernel too, for experts on one thread: it spins between calls, which costs the others",
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="for each group of contenders (default 4)")
    parser.add_argument("--json", action="store_true", help="one JSON list")
    args = parser.parse_args(argv)
    if unknown := [n for n in args.names if n not in BENCHES]:
        parser.error(f"no benchmark {unknown[0]}; there are {', '.join(BENCHES)}")
    cpu.WITH_KT = args.kt
    if args.peers:
        peers.library()
    cores = os.cpu_count() or 1
    found = []
    for name in args.names or [n for n in BENCHES if n != "fp8"]:
        for threads in args.threads or ([1] if name in ONCE else sorted({1, cores})):
            if name != "fp8":
                ops.set_threads(threads)
            for row in BENCHES[name](
                args.shape,
                args.tokens or list(FP8_TOKENS if name == "fp8" else TOKENS),
                threads,
                args.peers,
                args.seconds,
            ):
                found.append(row)
                print(show(row), file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.json:
        print(json.dumps([asdict(r) for r in found]))


if __name__ == "__main__":
    raise SystemExit(run(main))
