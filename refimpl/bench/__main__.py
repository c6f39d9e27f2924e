"""Speed and accuracy, measured side by side with peers and with the limits of this machine.

    python -m refimpl.bench [experts] [linear] [dequantize] [quantize] [fp8]    kernels; fp8 needs a GPU
    python -m refimpl.bench system        the whole system with random weights, beside the plan
    python -m refimpl.bench attention     latent attention, for tokens behind contexts
    python -m refimpl.bench merge         a merge beside a plain copy
    python -m refimpl.bench formats       what each format costs in accuracy
    python -m refimpl.bench steps         one inner product, from the reference to the fast kernel
    python -m refimpl.bench team          worker threads beside Numba's: regions, and reading memory
    python -m refimpl.bench growth        time against tokens, experts, layers and context
    python -m refimpl.bench serve         many clients at the server, beside the engine driven directly
    python -m refimpl.bench fp8-parts     what the time of an FP8 linear goes into, on a GPU
    python -m refimpl.bench fp8-sweep     tiles of the FP8 linears that were not chosen, on a GPU

Kernels may be named together; without a name all but fp8 are measured. The others have flags of their own:
`python -m refimpl.bench merge --help`. All contenders take turns on the same bytes in one process. Compare
figures of one run only: a shared machine moves by half between runs.
"""

from __future__ import annotations

import importlib
import os
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict

from refimpl import ops
from refimpl.bench import codecs, cpu, fp8, peers
from refimpl.bench.measure import SHAPES, Row, Settings
from refimpl.cli import Parser, integer, number, run, to_json
from refimpl.cli.waiting import announce
from refimpl.errors import meant

KERNELS: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "experts": cpu.experts,
    "linear": cpu.linears,
    "dequantize": lambda given: codecs.codecs("dequantize", given),
    "quantize": lambda given: codecs.codecs("quantize", given),
    "fp8": fp8.fp8,
}
ONCE = ("dequantize", "quantize", "fp8")  # in one thread unless told otherwise
ALONE = {  # each a module with a `main` and flags of its own
    "system": "system",
    "attention": "attention",
    "merge": "merge",
    "formats": "format_error",
    "steps": "steps",
    "team": "team",
    "growth": "growth",
    "serve": "serve",
    "fp8-parts": "fp8_parts",
    "fp8-sweep": "fp8_sweep",
}


def show(row: Row) -> str:
    """One measured row as a line of a table for people."""
    versus = f"{row.speedup_vs_peer:5.2f}x {row.peer}" if row.speedup_vs_peer else ""
    figures = (
        f"{row.median_s * 1e3:9.3f} ms +-{row.spread / 2:4.0%} {row.gbps:7.2f} GB/s "
        f"{row.share_of_limit:5.0%} {row.gflops:8.1f} GFLOP/s"
    )
    return f"{row.name:26} {row.shape:5} {row.threads:2} {row.backend:11} {figures}  {versus}"


def main(argv: list[str]) -> int | None:
    """The command: hands over to a bench that stands alone, or times kernels."""
    for i, word in enumerate(argv):
        if (name := word.replace("_", "-")) in ALONE:
            module = importlib.import_module(f"refimpl.bench.{ALONE[name]}")
            return module.main([*argv[:i], *argv[i + 1 :]])
    kernels(argv)
    return None


def kernels(argv: list[str]) -> None:
    """The kernels named, one row a contender: text on stdout, or with --json one list there and text on
    stderr.
    """
    args = _arguments(argv)
    floats = args.names == ["linear"] and args.kind and {*args.kind} <= {"FP8", "BF16"}  # torch's alone
    if args.peers and not floats and args.names != ["fp8"]:  # whose peers are on the GPU
        peers.library()
    found = []
    for row in _measured(args):
        found.append(row)
        print(show(row), file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.json:
        print(to_json([asdict(r) for r in found]))


def _measured(args: Namespace) -> Iterator[Row]:
    cores = os.cpu_count() or 1
    for name in args.names or [n for n in KERNELS if n != "fp8"]:
        tokens = args.tokens or list(fp8.TOKENS if name == "fp8" else cpu.TOKENS)
        for threads in args.threads or ([1] if name in ONCE else sorted({1, cores})):
            if name != "fp8":
                ops.set_threads(threads)
            announce(
                f"{name}, {threads} thread{'s' * (threads > 1)}: compiling and comparing first, then timing"
            )
            given = Settings(
                args.shape,
                tokens,
                threads,
                args.peers,
                args.kt,
                args.seconds,
                tuple(args.mix),
                tuple(args.kind),
                tuple(args.matrix),
            )
            yield from KERNELS[name](given)


def _matrix(text: str) -> tuple[int, int]:
    """N and K from a flag's text; an argparse error for what is none, or no whole blocks."""
    n, _, k = text.partition("x")
    rows, columns = integer(1)(n), integer(1)(k)
    if columns % 256:
        raise ArgumentTypeError(f"K must be a multiple of 256, not {columns}")
    return rows, columns


def _arguments(argv: list[str]) -> Namespace:
    parser = Parser("python -m refimpl.bench", __doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join([*KERNELS, *ALONE])}")
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        default="v3",
        help="v3: hidden 7168, experts 2048 wide, 8 of 32; tiny: the embedded model's",
    )
    parser.add_argument(
        "--tokens",
        type=integer(1),
        action="append",
        metavar="M",
        help=f"tokens of a batch, may be repeated (default {cpu.TOKENS}; fp8: {fp8.TOKENS})",
    )
    parser.add_argument(
        "--mix",
        choices=cpu.MIXES,
        action="append",
        default=[],
        help="formats of the experts, may be repeated (default all)",
    )
    parser.add_argument(
        "--kind",
        choices=cpu.KINDS,
        action="append",
        default=[],
        help=f"weights of the linear layers, may be repeated (default {', '.join(cpu.USUAL)})",
    )
    parser.add_argument(
        "--matrix",
        type=_matrix,
        action="append",
        default=[],
        metavar="NxK",
        help="rows and columns of linear layers, may be repeated (default: an expert's, by --shape)",
    )
    parser.add_argument(
        "--threads",
        type=integer(1),
        action="append",
        metavar="N",
        help="may be repeated (default 1 and all cores)",
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="ggml and torch too, where they are installed (extra `peers`); fp8: DeepGEMM",
    )
    parser.add_argument(
        "--kt",
        action="store_true",
        help="kt-kernel too, for experts on one thread: it spins between calls, which costs the others",
    )
    parser.add_argument(
        "--seconds", type=number(0.001, 1e9), default=4.0, help="for each group of contenders (default 4)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON list")
    args = parser.parse_args(argv)
    if unknown := [n for n in args.names if n not in KERNELS]:
        parser.error(f"no benchmark {unknown[0]}, expected {meant(unknown[0], [*KERNELS, *ALONE])}")
    return args


if __name__ == "__main__":
    raise SystemExit(run(main))
