"""From the reference to the fast kernel, step by step: `python -m refimpl.bench steps`. What
docs/cpu-experts.md tells, measured.

Q4_K matrices of DeepSeek-V3's gate projection, one thread, one call after another through matrices that fill
200 MB, so that weights come from memory; `cached` is one panel of 16 rows over and over. Medians; GB/s are of
weight bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
from numba import njit

from refimpl import ops
from refimpl.cli import Parser, to_json
from refimpl.devices.speed import median, random_weights, read_bandwidth
from refimpl.formats import bf16, q4_k
from refimpl.kernels.activations_numba import prepare
from refimpl.kernels.dot_llvm import AHEAD, dot
from refimpl.kernels.floats_llvm import E4M3, FLOATS
from refimpl.kernels.panel_llvm import PANELS, ROWS, multiply, pack_panel, scratch_bytes
from refimpl.kernels.workspace import WORKSPACE
from refimpl.reference import linear, packed

KIND, ROWS_, COLUMNS, COPIES = q4_k.GGML_TYPE, 2048, 7168, 24
FETCH = PANELS[KIND].lines


@njit
def plain(d, dmin, sc, mins, q, a, da, out):
    """The reference's loops on arrays that it has unpacked before: what Numba makes of them by itself."""
    for r in range(len(out)):
        total = np.float32(0)
        for b in range(d.shape[1]):
            dots, low = 0, 0
            for j in range(8):
                s, t = 0, 0
                for i in range(32):
                    s += q[r, b, j, i] * a[b, j, i]
                    t += a[b, j, i]
                dots += sc[r, b, j] * s
                low += mins[r, b, j] * t
            total += d[r, b] * da[b] * dots - dmin[r, b] * da[b] * low
        out[r] = total


@njit(error_model="numpy")
def rows1(w, row_bytes, rows, acts, out):
    """One row at a time."""
    for r in range(rows):
        out[0, r] = dot(KIND, w + r * row_bytes, 0, COLUMNS, (acts,), AHEAD)[0]


@njit(error_model="numpy")
def rows4(w, row_bytes, rows, acts, act_bytes, out):
    """One row at a time, four tokens."""
    for r in range(rows):
        y = dot(
            KIND,
            w + r * row_bytes,
            0,
            COLUMNS,
            (acts, acts + act_bytes, acts + 2 * act_bytes, acts + 3 * act_bytes),
            AHEAD,
        )
        out[0, r], out[1, r], out[2, r], out[3, r] = y


@njit(error_model="numpy")
def panels4(w, row_bytes, rows, acts, act_bytes, out, scratch, lines):
    """Panels of rows, four tokens; `lines` of the next panel fetched with each block."""
    y, step = out.ctypes.data, out.shape[1] * 4
    for r in range(0, rows, ROWS):
        pack_panel(KIND, w + r * row_bytes, row_bytes, COLUMNS, scratch)
        ahead, to = w + min(r + ROWS, rows - ROWS) * row_bytes, y + r * 4
        tokens = (acts, acts + act_bytes, acts + 2 * act_bytes, acts + 3 * act_bytes)
        multiply(KIND, scratch, COLUMNS, ahead, lines, tokens, (to, to + step, to + 2 * step, to + 3 * step))


def floats(kind: int, nbytes: int) -> Callable:
    """Rows of floats, one token, in parts of `step` columns, ROWS rows a part."""

    @njit(error_model="numpy")
    def run(w, row_bytes, rows, acts, out, scale, step):
        for start in range(0, rows, ROWS):
            for c in range(0, COLUMNS, step):
                for r in range(start, start + ROWS):
                    y = dot(
                        kind, w + r * row_bytes + c * nbytes, scale, step, (acts + 4 * c,), 2 * row_bytes
                    )[0]
                    out[0, r] = out[0, r] + y if c else y

    return run


def repeated(function: Callable, address: int, row_bytes: int, rows: int, *rest: object) -> float:
    """Seconds of a call, of as many as make 2,048 rows."""
    many = max(1, 2048 // rows)
    return median(lambda: [function(address, row_bytes, rows, *rest) for _ in range(many)]) / many


def _float_rows(show: Callable, x: np.ndarray, out: np.ndarray, cached: int) -> None:
    """Time rows of E4M3 and BF16 with the first token of x f32 [T, COLUMNS], and `show` each."""
    scales = np.ones(COLUMNS // 128, np.float32)
    for label, kind in (("E4M3", E4M3), ("BF16", bf16.GGML_TYPE)):
        nbytes, function = FLOATS[kind][1], floats(kind, FLOATS[kind][1])
        codes = np.random.default_rng(1).integers(0, 64, (16384, COLUMNS * nbytes), np.uint8)
        for name, rows in (("cached", cached), ("from memory", len(codes))):
            for parts in (1, 2):
                rest = (codes.strides[0], rows, x.ctypes.data, out, scales.ctypes.data, COLUMNS // parts)
                show(
                    f"rows of {label}, {name}{', in two parts' * (parts > 1)}",
                    1,
                    repeated(function, codes.ctypes.data, *rest),
                    rows,
                    nbytes,
                )


def main(argv: list[str]) -> None:
    """Run `python -m refimpl.bench steps` with these arguments."""
    parser = Parser("python -m refimpl.bench steps", __doc__)
    parser.add_argument("--json", action="store_true", help="one JSON list")
    args = parser.parse_args(argv)
    out_to, found = sys.stderr if args.json else sys.stdout, []
    ops.set_threads(1)
    w = random_weights("Q4_K", COPIES * ROWS_, COLUMNS)
    first = packed.Packed(w.data[:ROWS_], KIND, (ROWS_, COLUMNS))
    x = np.random.default_rng(0).standard_normal((4, COLUMNS)).astype(np.float32)
    acts = prepare("steps", x, "q8_k")
    a, row_bytes, act_bytes = acts.ctypes.data, w.data.strides[0], acts.strides[0]
    out, scratch = (
        np.zeros((4, len(w.data)), np.float32),
        WORKSPACE.array("steps", (scratch_bytes(KIND, COLUMNS),), np.dtype(np.uint8)),
    )
    d, dmin, sc, mins, q = (np.ascontiguousarray(p) for p in q4_k.unpack(first.data))
    sc, mins, q = sc.astype(np.int32), mins.astype(np.int32), q.astype(np.int32).reshape(ROWS_, -1, 8, 32)
    ints, da, one = (
        acts["q"][0].astype(np.int32).reshape(-1, 8, 32),
        np.ascontiguousarray(acts["d"][0]),
        np.zeros(ROWS_, np.float32),
    )
    address, cached, some = w.data.ctypes.data, 16, len(w.data)

    def show(name: str, tokens: int, seconds: float, rows: int, nbytes: float = 0.5625) -> None:
        size = rows * COLUMNS
        row_s, gbps = seconds / rows, size * nbytes / seconds / 1e9
        gflops = 2 * tokens * size / seconds / 1e9
        step = {"name": name, "tokens": tokens, "row_s": row_s, "gbps": gbps, "gflops": gflops}
        found.append(step)
        print(
            f"{name:44} {tokens:2} tokens {row_s * 1e9:9.1f} ns a row {gbps:6.2f} GB/s {gflops:7.1f} GFLOP/s",
            file=out_to,
            flush=True,
        )

    print(f"reading memory {read_bandwidth(1):.1f} GB/s", file=out_to)
    show("reference: refimpl.reference.packed.linear", 1, median(lambda: linear.linear(x[:1], first)), ROWS_)
    show("dequantized, then numpy", 1, median(lambda: x[:1] @ packed.dense(first).T), ROWS_)
    show(
        "Numba on what the reference unpacked",
        1,
        median(lambda: plain(d, dmin, sc, mins, q, ints, da, one)),
        ROWS_,
    )
    np.testing.assert_allclose(one, linear.linear(x[:1], first)[0], rtol=1e-3, atol=1e-3)
    panel = scratch.ctypes.data
    for name, rows in (("cached", cached), ("from memory", some)):
        show(f"rows, {name}", 1, repeated(rows1, address, row_bytes, rows, a, out), rows)
        show(f"rows, {name}", 4, repeated(rows4, address, row_bytes, rows, a, act_bytes, out), rows)
        show(
            f"panels, {name}",
            4,
            repeated(panels4, address, row_bytes, rows, a, act_bytes, out, panel, 0),
            rows,
        )
        show(
            f"panels, {name}, the next one fetched",
            4,
            repeated(panels4, address, row_bytes, rows, a, act_bytes, out, panel, FETCH),
            rows,
        )
    np.testing.assert_allclose(out[:, :ROWS_], linear.linear(x, first), rtol=1e-3, atol=1e-3)
    _float_rows(show, x, out, cached)
    if args.json:
        print(to_json(found))
