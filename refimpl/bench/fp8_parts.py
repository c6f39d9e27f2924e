"""What the time of an FP8 linear goes into: `python -m refimpl.bench fp8-parts` times its kernels on a GPU
again without parts of their work, each product in one launch.

The results are then wrong; only the time is looked at. A part that is not missed when it is gone was hidden
behind the others. A line for each matrix of a MoE layer, and their sum: microseconds of the whole kernel, and
without each part.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from refimpl.bench.fp8 import LAYER, Problem, gpu
from refimpl.cli import Parser, integer
from refimpl.devices.speed import replay
from refimpl.mutate import Edit, mutated

# {kernel: (modules that are changed, function of the last)}
MODULES = {
    "split": (("fp8_gemm_triton",), "split"),
    "gluon": (("fp8_overlap_gluon", "fp8_stream_gluon"), "stream"),
    "wide": (("fp8_overlap_gluon", "fp8_stream_gluon", "fp8_wide_gluon"), "stream"),
}
NO_PROMOTION = (
    "    product, scale = gl.broadcast(product, scale)\n    return gl.inline_asm_elementwise(",
    "    return product\n    gl.inline_asm_elementwise(",
)
NO_COPIES = [
    (
        f"mbarrier.expect(full.index({stage}), BYTES)\n{indent}load_tile(w_tiles, [n_tile * BN, b * 128], "
        f"full.index({stage}), w_ring.index({stage}))\n",
        f"mbarrier.arrive(full.index({stage}), count=1)\n",
    )
    for stage, indent in (("ahead", " " * 12), ("stage", " " * 16))
]
NO_COPIES += [
    (
        "load_tile(x_tiles, [row, b * 128], full.index(stage), x_ring.index(stage * COPIES + part))\n",
        "pass\n",
    )
]
# {kernel: {part that is left out: texts of its source, and what stands there instead}}
PARTS: dict[str, dict[str, Sequence[Edit]]] = {
    "split": {
        "whole": (),
        "no scales": [
            ("multiply(codes, values) * scales[None, :]", "multiply(codes, values)"),
        ],
        # each row's first two blocks, again and again
        "cached": [("codes = tl.load(w_at + b * 128)\n", "codes = tl.load(w_at + b % 2 * 128)\n")],
        "no adding up": [
            (
                'if tl.atomic_add(counter, 1, sem="acq_rel") == tl.num_programs(1) - 1:',
                "if tl.num_programs(1) == 0:",
            )
        ],
        # launched, stored, added up
        "no blocks": [("tl.minimum(first + blocks_each, blocks), num_stages", "first, num_stages")],
    },
    "gluon": {
        "whole": (),
        "no promotion": [NO_PROMOTION],
        "no copies": NO_COPIES,
        "no products": [
            (
                "return warpgroup_mma(left, right, product, use_acc=never, is_async=True)\n",
                "return product\n",
            ),
            ("product = warpgroup_mma_wait(LATER, deps=(running,))\n", "product = running\n"),
        ],
    },
    "wide": {
        "whole": (),
        "no promotion": [NO_PROMOTION],
        "no copies": NO_COPIES,
        "no products": [
            *(
                (
                    f"product = warpgroup_mma(x, half(w, {start}, 128), product, "
                    "use_acc=never, is_async=True)\n",
                    "pass\n",
                )
                for start in (0, 128)
            ),
            *(
                (
                    f"product = warpgroup_mma_wait(0, deps=(product,))\n    {half} = promote",
                    f"{half} = promote",
                )
                for half in ("left", "right")
            ),
        ],
    },
}


def without(kernel: str, edits: Sequence[Edit]) -> Any:
    """The kernel with these texts of its modules replaced. MismatchError E8009 for a text that is not there
    once.
    """
    names, function = MODULES[kernel]
    return mutated(*(f"refimpl.kernels.{name}" for name in names), edits=edits, function=function)


def microseconds(problem: Problem, m: int, kernels: dict[str, Any]) -> dict[str, float]:
    """Microseconds of the tile that the table picks, with each of these kernels in its kernel's place."""
    from refimpl.kernels import fp8_linear_triton as ours  # Triton: needs a GPU
    from refimpl.kernels.act_quant_triton import act_quant  # Triton: needs a GPU
    from refimpl.kernels.e4m3_triton import native  # Triton: needs a GPU

    torch = problem.torch
    codes, scale = act_quant(problem.activations(m))
    strides = (problem.k, *scale.stride()) if m > 1 else (problem.k, 1, 1)
    y = torch.empty(m, problem.n, dtype=torch.bfloat16, device=codes.device)

    def call(kernel: Any, w: Any) -> None:
        _, grid, arguments, options = ours._launch(
            native(codes),
            scale,
            native(w.codes),
            w.scale,
            y,
            (m, problem.n, problem.k),
            strides,
            codes.device,
        )
        kernel[grid](*arguments, **options)

    return {
        name: replay([partial(call, kernel, w) for w in problem.copies]).seconds * 1e6
        for name, kernel in kernels.items()
    }


def main(argv: list[str]) -> None:
    """Run `python -m refimpl.bench fp8-parts` with these arguments."""
    parser = Parser("python -m refimpl.bench fp8-parts", __doc__)
    parser.add_argument(
        "--tokens", type=integer(1), action="append", metavar="M", help="may be repeated (default 1 and 4096)"
    )
    args = parser.parse_args(argv)
    gpu()
    kernels = {
        kernel: {part: without(kernel, edits) for part, edits in parts.items()}
        for kernel, parts in PARTS.items()
    }
    for m in args.tokens or (1, 4096):
        for kernel, parts in kernels.items():
            _table(kernel, parts, m, [name for name, shape in LAYER.items() if _picked(m, *shape) == kernel])


def _picked(m: int, n: int, k: int) -> str:
    """The kernel that the table picks."""
    from refimpl.kernels.fp8_linear_triton import picked  # Triton: needs a GPU

    return picked(m, n, k, gpu().device("cuda", 0)).kernel


def _table(kernel: str, parts: dict[str, Any], m: int, names: Sequence[str]) -> None:
    """Print the times of these matrices, whose kernel this is, and their sums."""
    if not names:
        return
    sums = dict.fromkeys(parts, 0.0)
    print(f"{kernel}, M={m:<14}" + "".join(f"{part:>14}" for part in sums))
    for name in names:
        found = microseconds(Problem(*LAYER[name]), m, parts)
        sums = {part: sums[part] + found[part] for part in sums}
        print(f"{name:22}" + "".join(f"{t:14.1f}" for t in found.values()), flush=True)
    print(f"{'sum':22}" + "".join(f"{t:14.1f}" for t in sums.values()), flush=True)
