"""Reference: refimpl.reference.linear.linear, and below it refimpl.reference.packed.linear and
refimpl.fp8.linear.

One kernel multiplies everything: `grouped` takes a list of jobs, each a matrix and the activations that go
through it, and spreads their rows, in strips, over the threads, a contiguous piece of about equal work to
each. A linear layer is one job; a layer's gate and up projections are two for each expert in use. Every
output is computed by one thread in one order, so results do not depend on the number of threads.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import prange

from refimpl.kernels.dot_llvm import (
    AHEAD,
    DECODERS,
    E4M3,
    FLOATS,
    KINDS,
    Q8_0_BYTES,
    Q8_K_BYTES,
    decode,
    dot,
)
from refimpl.kernels.jit import call, callback, floats, integers, jit, variant
from refimpl.kernels.panel_llvm import PANELS, ROWS, multiply, pack_panel, scratch_bytes
from refimpl.reference import linear as reference
from refimpl.tensors import Packed, ScaledFP8, Weight

# tokens, from where float weights are decoded for numpy's BLAS: it reuses what it reads better than `dot`
BLAS_FROM = 8
BLAS_ROWS = 512  # decoded at a time
PACK_COST_TOKENS = 3  # what reading a strip costs, in tokens passed over it
F32, U8 = np.dtype(np.float32), np.dtype(np.uint8)
# Multiplications, or 32 times the elements: a tenth of a millisecond, below which waking threads costs more
# than they save.
MIN_PARALLEL_MACS = 1 << 23
Q8_K = np.dtype(
    [("q", "i1", 256), ("sums", "i2", 16), ("d", "f4"), ("sums32", "i2", 8), ("unused", "u1", 12)]
)
Q8_0 = np.dtype([("q", "i1", 32), ("d", "f4"), ("unused", "u1", 4)])
assert (Q8_K.itemsize, Q8_0.itemsize) == (Q8_K_BYTES, Q8_0_BYTES)


# --- the kernel ---------------------------------------------------------------------------------------------


KIND: Any = None  # these are given to each variant of the functions below
LINES: Any = None
BYTES: Any = None


@jit
def _part(columns, tokens):
    """Columns of a part of a row: as few parts of equal length as leave half of a first-level cache of 32 kB
    to the weights.
    """
    parts = -(-columns * tokens // 4096)
    return -(-columns // parts // 128) * 128


def _row_strip(
    w, s, start, rows, row_bytes, scale_bytes, columns, act_rows, count, acts, act_bytes, out, scratch, ahead
):
    """ROWS or fewer rows of a job from `start` on, one at a time with up to four of its tokens. Arguments as
    in `_grouped`.

    Activations in float32 would fill the first-level cache, and go through it once for each row; so rows are
    taken in parts that leave room.
    """
    act_rows, out, t, stop = integers(act_rows), floats(out), 0, min(start + ROWS, rows)
    while t < count:
        last, four = count - 1, count - t > 2  # four at once; of three the last counts twice
        t1, t2, t3 = min(t + 1, last), min(t + 2, last), min(t + 3, last)
        a0, a1 = acts + act_rows[t] * act_bytes, acts + act_rows[t1] * act_bytes
        a2, a3 = acts + act_rows[t2] * act_bytes, acts + act_rows[t3] * act_bytes
        step = (
            _part(columns, 4 if four else 1) if BYTES == 2 or (BYTES and four) else columns
        )  # one token's E4M3 waits for arithmetic
        for c in range(0, columns, step):
            n, x, after = min(step, columns - c), 4 * c, step if c + step < columns else -c
            for r in range(start, stop):
                # Two rows on, in this part of the strip, in its next part, or in the next strip.
                further = (2 if r + 2 < stop or after < 0 else 2 + start - stop) * row_bytes + (
                    0 if r + 2 < stop else after * BYTES
                )
                p, tile = w + r * row_bytes + c * BYTES, s + r // 128 * scale_bytes + c // 128 * 4
                further = AHEAD if step == columns else further
                if four:
                    y0, y1, y2, y3 = dot(KIND, p, tile, n, (a0 + x, a1 + x, a2 + x, a3 + x), further)
                    if c:
                        y0, y1, y2, y3 = (
                            out[t * rows + r] + y0,
                            out[t1 * rows + r] + y1,
                            out[t2 * rows + r] + y2,
                            out[t3 * rows + r] + y3,
                        )
                    out[t * rows + r], out[t1 * rows + r], out[t2 * rows + r], out[t3 * rows + r] = (
                        y0,
                        y1,
                        y2,
                        y3,
                    )
                else:
                    y0 = dot(KIND, p, tile, n, (a0 + x,), further)[0]
                    out[t * rows + r] = out[t * rows + r] + y0 if c else y0
        t += 4 if four else 1


def _lane_strip(
    w, s, start, rows, row_bytes, scale_bytes, columns, act_rows, count, acts, act_bytes, out, scratch, ahead
):
    """ROWS rows of a job, side by side from three tokens on. The last strip of a matrix begins early enough
    to be whole.

    One or two tokens are not worth taking a strip apart: the time goes to memory, which is fastest when read
    row by row.
    """
    act_rows, y, start = integers(act_rows), floats(out), min(start, rows - ROWS)
    a0 = acts + act_rows[0] * act_bytes
    if count == 1:
        for r in range(start, start + ROWS):
            y[r] = dot(KIND, w + r * row_bytes, 0, columns, (a0,), AHEAD)[0]
        return
    a1 = acts + act_rows[1] * act_bytes
    if count == 2:
        for r in range(start, start + ROWS):
            y[r], y[rows + r] = dot(KIND, w + r * row_bytes, 0, columns, (a0, a1), AHEAD)
        return
    pack_panel(KIND, w + start * row_bytes, row_bytes, columns, scratch)
    step, last = rows * 4, count - 1
    # While tokens pass, the next strip is fetched at the pace at which memory delivers: LINES of the cache
    # for each block of columns.
    y0, fetched, lines = out + start * 4, 0, min(LINES, -(-4 * LINES // count))
    for at in range(0, count, 4):
        left, a0, a1 = (
            count - at,
            acts + act_rows[at] * act_bytes,
            acts + act_rows[min(at + 1, last)] * act_bytes,
        )
        a2, y1 = acts + act_rows[min(at + 2, last)] * act_bytes, y0 + min(1, left - 1) * step
        if left == 1:
            multiply(KIND, scratch, columns, ahead, lines, (a0,), (y0,))
        elif left == 2:
            multiply(KIND, scratch, columns, ahead, lines, (a0, a1), (y0, y1))
        else:  # of three the last counts twice
            a3, y3 = acts + act_rows[min(at + 3, last)] * act_bytes, y0 + min(3, left - 1) * step
            multiply(KIND, scratch, columns, ahead, lines, (a0, a1, a2, a3), (y0, y1, y0 + 2 * step, y3))
        y0 += 4 * step
        fetched, ahead = fetched + lines, ahead + columns // 256 * lines * 64
        lines = min(lines, LINES - fetched)


@jit
def _piece(
    strip,
    part,
    parts,
    data,
    scales,
    first,
    counts,
    rows,
    row_bytes,
    scale_bytes,
    columns,
    act_rows,
    acts,
    out,
    scratch,
):
    """What thread `part` of `parts` does of the jobs: a contiguous piece of about equal work. Arguments as in
    `_grouped`.
    """
    strips, cost = -(-rows // ROWS), 0
    for j in range(len(data)):
        cost += strips * (PACK_COST_TOKENS + counts[j])
    begin, end, before, y = cost * part // parts, cost * (part + 1) // parts, 0, out.ctypes.data
    for j in range(len(data)):
        each = PACK_COST_TOKENS + counts[j]
        low, high = max(0, -((before - begin) // each)), min(strips, -((before - end) // each))
        for i in range(low, high):
            w = data[j]
            ahead = w + (i + 1) * ROWS * row_bytes if i + 1 < high else data[min(j + 1, len(data) - 1)]
            these, own = act_rows.ctypes.data + 8 * first[j], scratch[part].ctypes.data
            x, x_bytes = acts.ctypes.data, acts.shape[1]
            call(
                strip,
                (
                    w,
                    scales[j],
                    i * ROWS,
                    rows,
                    row_bytes,
                    scale_bytes,
                    columns,
                    these,
                    counts[j],
                    x,
                    x_bytes,
                    y,
                    own,
                    ahead,
                ),
            )
        before += strips * each
        y += counts[j] * rows * 4


@jit(parallel=True)
def _grouped(
    strip, data, scales, first, counts, rows, row_bytes, scale_bytes, columns, act_rows, acts, out, scratch
):
    """Job j multiplies the matrix at data[j], whose tile scales are at scales[j], with the activations
    act_rows[first[j] : first[j] + counts[j]].

    Its outputs stand behind those of the jobs before it in out f32 [sum of counts, rows]. acts u8 [T, bytes],
    scratch u8 [threads, scratch_bytes]; with one thread no other is woken. `strip` is the address of what
    multiplies a strip.
    """
    parts = len(scratch)
    if parts > 1:
        for part in prange(parts):
            _piece(
                strip,
                np.int64(part),
                parts,
                data,
                scales,
                first,
                counts,
                rows,
                row_bytes,
                scale_bytes,
                columns,
                act_rows,
                acts,
                out,
                scratch,
            )
    else:
        _piece(
            strip,
            np.int64(0),
            parts,
            data,
            scales,
            first,
            counts,
            rows,
            row_bytes,
            scale_bytes,
            columns,
            act_rows,
            acts,
            out,
            scratch,
        )


@cache
def strip(kind: int, lanes: bool) -> Any:
    """What multiplies a strip of a format, in one of the two ways."""
    if lanes:
        return callback(variant(_lane_strip, f"{kind}", KIND=kind, LINES=PANELS[kind].lines))
    return callback(variant(_row_strip, f"{kind}", KIND=kind, BYTES=FLOATS[kind][1] if kind in FLOATS else 0))


def _decoded(w, scale, row_bytes, scale_bytes, columns, start, out):
    """Rows start, start + 1, ... of floats as float32, into out [R, columns]."""
    to = out.ctypes.data
    for i in prange(len(out)):
        r = start + i
        decode(KIND, w + r * row_bytes, scale + r // 128 * scale_bytes, columns, to + i * columns * 4)


@cache
def decoded(kind: int) -> Callable:
    """`_decoded` for a format."""
    return jit(variant(_decoded, f"{kind}", KIND=kind), parallel=True)


# --- activations --------------------------------------------------------------------------------------------


@jit
def to_q8_k(x, blocks):
    """One token, f32 [K] -> blocks [K/256] of Q8_K: the reference's roundings (refimpl.formats.q8_k). A block
    with NaN or infinity gets scale NaN.
    """
    for b in range(len(blocks)):
        block, v = blocks[b], x[256 * b : 256 * b + 256]
        sizes, largest, at = v.view(np.int32), np.int32(0), 0
        for i in range(
            256
            # the bits of numbers without their sign order as the numbers do, and integers are compared many
            # at a time
        ):
            largest = max(largest, sizes[i] & np.int32(0x7FFFFFFF))
        while at < 255 and sizes[at] & np.int32(0x7FFFFFFF) != largest:
            at += 1
        finite = largest < np.int32(0x7F800000)
        inverse = np.float32(-127) / v[at] if finite and largest > 0 else np.float32(0)
        block.d = (
            (np.float32(1) / inverse if inverse != 0 else np.float32(0)) if finite else np.float32(np.nan)
        )
        q = block.q
        if finite:
            for i in range(256):
                q[i] = np.int32(min(np.rint(inverse * v[i]), np.float32(127)))
        else:
            q[:] = 0
        for j in range(16):
            total = np.int16(0)
            for i in range(16 * j, 16 * j + 16):
                total += np.int16(q[i])
            block.sums[j // 2 + 8 * (j % 2)] = total  # dot_llvm.HALVES
        for j in range(8):
            block.sums32[j // 2 + 4 * (j % 2)] = block.sums[j] + block.sums[8 + j]


@jit
def to_q8_0(x, blocks):
    """One token, f32 [K] -> blocks [K/32] of Q8_0, the scale rounded to a half as in files
    (refimpl.formats.q8_0).
    """
    for b in range(len(blocks)):
        block, v = blocks[b], x[32 * b : 32 * b + 32]
        largest, finite = np.float32(0), np.float32(0)
        for i in range(32):
            size = abs(v[i])
            largest = size if size > largest else largest
            finite += v[i] * np.float32(0)
        d = largest / np.float32(127)
        inverse = np.float32(1) / d if d != 0 else np.float32(0)
        block.d = _as_half(d) if finite == 0 else np.float32(np.nan)
        for i in range(32):
            r = v[i] * inverse
            block.q[i] = np.int8(np.trunc(r + np.copysign(np.float32(0.5), r))) if finite == 0 else np.int8(0)


@jit
def _as_half(x):
    """The float32 of the half nearest to x >= 0, ties to even."""
    if x < np.float32(2.0**-14):
        return (x + np.float32(0.5)) - np.float32(
            0.5
        )  # floats just above 0.5 are 2**-24 apart, as subnormal halves are
    return _keep(x, 13) if x < np.float32(65520) else np.float32(np.inf)


@jit
def _keep(x, dropped):
    """x without its last `dropped` bits of mantissa, rounded to nearest, ties to even."""
    b = np.float32(x).view(np.uint32)
    half = np.uint32((1 << (dropped - 1)) - 1)
    return np.uint32(
        (b + half + ((b >> np.uint32(dropped)) & np.uint32(1))) >> np.uint32(dropped) << np.uint32(dropped)
    ).view(np.float32)


@jit
def to_e4m3(x, out):
    """One token, f32 [K] -> the numbers that its E4M3 codes and scales stand for, f32 [K]
    (refimpl.fp8.act_quant, decoded).
    """
    for start in range(0, len(x), 128):
        v, o = x[start : start + 128], out[start : start + 128]
        largest, finite = np.float32(0), np.float32(0)
        for i in range(len(v)):
            size = abs(v[i])
            largest = size if size > largest else largest
            finite += v[i] * np.float32(0)
        scale = largest / np.float32(448)
        if scale == 0 or finite != 0:
            o[:] = np.float32(0) if finite == 0 else np.float32(np.nan)
        else:
            for i in range(len(v)):
                r = v[i] / scale
                small = abs(r) < np.float32(2.0**-6)  # there codes are 2**-9 apart
                o[i] = (np.rint(r * np.float32(512)) * np.float32(2.0**-9) if small else _keep(r, 20)) * scale


@jit(parallel=True)
def _prepare_q8_k(x, out, parallel):
    if parallel:
        for t in prange(len(x)):
            to_q8_k(x[t], out[t])
    else:
        for t in range(len(x)):
            to_q8_k(x[t], out[t])


@jit(parallel=True)
def _prepare_q8_0(x, out, parallel):
    if parallel:
        for t in prange(len(x)):
            to_q8_0(x[t], out[t])
    else:
        for t in range(len(x)):
            to_q8_0(x[t], out[t])


@jit(parallel=True)
def _prepare_e4m3(x, out, parallel):
    if parallel:
        for t in prange(len(x)):
            to_e4m3(x[t], out[t])
    else:
        for t in range(len(x)):
            to_e4m3(x[t], out[t])


LAYOUTS: dict[str, tuple[int, np.dtype, Callable]] = {
    "q8_k": (256, Q8_K, _prepare_q8_k),
    "q8_0": (32, Q8_0, _prepare_q8_0),
    "e4m3": (1, np.dtype(np.float32), _prepare_e4m3),
}


class Workspace(threading.local):
    """Buffers that calls share and that grow when needed, so that a steady state allocates nothing. One set
    for each Python thread.
    """

    def __init__(self):
        self._memory: dict[str, np.ndarray] = {}
        self._known: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: np.dtype = F32) -> np.ndarray:
        """Memory of an earlier call under this name, contents undefined, from a 64-byte boundary."""
        known = self._known.get((name, shape))
        if known is not None and known.dtype is dtype:
            return known
        nbytes = math.prod(shape) * dtype.itemsize
        if name not in self._memory or self._memory[name].nbytes < nbytes + 64 or len(self._known) > 256:
            self._known.clear()  # views of what is given up
            self._memory[name] = np.empty(nbytes + nbytes // 2 + 64, np.uint8)
        start = -self._memory[name].ctypes.data % 64
        self._known[name, shape] = self._memory[name][start : start + nbytes].view(dtype).reshape(shape)
        return self._known[name, shape]


WORKSPACE = Workspace()


def prepare(name: str, x: np.ndarray, layout: str | None) -> np.ndarray:
    """x f32 [T, K] in a layout of activations: "q8_k", "q8_0", "e4m3" (float32, rounded) or "f32" (x
    itself).
    """
    if layout is None or layout == "f32":
        return x
    width, dtype, quantize = LAYOUTS[layout]
    out = WORKSPACE.array(name, (len(x), x.shape[1] // width), dtype)
    quantize(x, out, worthwhile(x.size))
    return out


# --- matrices -----------------------------------------------------------------------------------------------


class Matrix(NamedTuple):
    """A weight as the kernel sees it. The arrays it points into must be kept alive."""

    kind: int
    rows: int
    columns: int
    data: int  # address
    row_bytes: int
    scale: int  # address of the tile scales, E4M3 only
    scale_bytes: int  # of one row of tiles


_known: dict[int, tuple[Weight, Matrix | None]] = {}


def matrix(w: Weight) -> Matrix | None:
    """None for a weight the kernel does not take: plain arrays, formats without a row in KINDS, ragged or
    scattered ones.

    A stack [E, N, K] gives its first matrix. What was found for a weight is kept: asking numpy for addresses
    takes longer than a small product.
    """
    found = _known.get(id(w))
    if found is not None and found[0] is w:
        return found[1]
    if len(_known) > 4096:
        _known.clear()
    _known[id(w)] = w, _matrix(w)
    return _known[id(w)][1]


def _matrix(w: Weight) -> Matrix | None:
    if isinstance(w, ScaledFP8):
        (rows, columns), scale = w.codes.shape, w.scale
        if columns % KINDS[E4M3].columns or not (w.codes.flags.c_contiguous and scale.flags.c_contiguous):
            return None
        return Matrix(E4M3, rows, columns, _address(w.codes), columns, _address(scale), 4 * scale.shape[1])
    if (
        not isinstance(w, Packed)
        or w.ggml_type not in KINDS
        or w.shape[-1] % KINDS[w.ggml_type].columns
        or not w.data.flags.c_contiguous
    ):
        return None
    return Matrix(w.ggml_type, w.shape[-2], w.shape[-1], _address(w.data), w.data.shape[-1], 0, 0)


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def layout(m: Matrix, activations: str) -> str | None:
    """How the activations of a matrix are laid out; None where "exact" asks for a product that only the
    reference has.
    """
    acts = KINDS[m.kind].acts
    if acts == "f32":
        return "e4m3" if m.kind == E4M3 and activations != "exact" else "f32"
    return None if activations == "exact" else acts


def run_jobs(
    m: Matrix,
    data: np.ndarray,
    scales: np.ndarray,
    first: np.ndarray,
    counts: np.ndarray,
    act_rows: np.ndarray,
    acts: np.ndarray,
    out: np.ndarray,
) -> None:
    """Matrices like m at the addresses `data`, each on its activations, see `grouped`."""
    parallel = _threads > 1 and m.rows * m.columns * len(out) > MIN_PARALLEL_MACS
    lanes = m.kind in PANELS and m.rows >= ROWS
    scratch = WORKSPACE.array(
        "strip", (_threads if parallel else 1, scratch_bytes(m.kind, m.columns) if lanes else 64), U8
    )
    _grouped(
        strip(m.kind, lanes).address,
        data,
        scales,
        first,
        counts,
        m.rows,
        m.row_bytes,
        m.scale_bytes,
        m.columns,
        act_rows,
        acts.view(U8),
        out,
        scratch,
    )


def set_threads(n: int) -> None:
    """Threads that kernels use from now on: 1 to Numba's NUMBA_NUM_THREADS, of which there are as many as
    cores.
    """
    global _threads
    _threads = max(1, min(n, numba.config.NUMBA_NUM_THREADS))
    numba.set_num_threads(_threads)


def threads() -> int:
    """Threads that kernels use."""
    return _threads


_threads = numba.config.NUMBA_NUM_THREADS


def worthwhile(elements: int) -> bool:
    """Whether more than one thread should pass over so many numbers."""
    return threads() > 1 and 32 * elements > MIN_PARALLEL_MACS


def linear(x: np.ndarray | ScaledFP8, w: Weight, activations: str = "fp8") -> np.ndarray:
    """x [..., K] f32 times the transpose of w [N, K] -> [..., N] f32, as the reference; what the kernel does
    not take goes there.
    """
    m = matrix(w)
    how = m and layout(m, activations)
    if m is None or how is None or isinstance(x, ScaledFP8) or not x.size:
        return reference.linear(x, w, activations)
    flat = np.ascontiguousarray(x.reshape(-1, x.shape[-1]), np.float32)
    out = np.empty((len(flat), m.rows), np.float32)
    if m.kind in DECODERS and len(flat) >= BLAS_FROM:
        _through_blas(m, prepare("x", flat, how), out)
    else:
        run_jobs(m, *alone(m.data, m.scale), *together(len(flat)), prepare("x", flat, how), out)
    return out.reshape(*x.shape[:-1], m.rows)


@lru_cache(4096)
def alone(data: int, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """A list of one matrix, as jobs want it."""
    return np.array([data]), np.array([scale])


@lru_cache(64)
def together(tokens: int, jobs: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All tokens in each job: where they start, how many it has, and which."""
    return np.zeros(jobs, np.int64), np.full(jobs, tokens), np.arange(tokens)


def _through_blas(m: Matrix, x: np.ndarray, out: np.ndarray) -> None:
    for start in range(0, m.rows, BLAS_ROWS):
        tile = WORKSPACE.array("tile", (min(BLAS_ROWS, m.rows - start), m.columns))
        decoded(m.kind)(m.data, m.scale, m.row_bytes, m.scale_bytes, m.columns, start, tile)
        out[:, start : start + len(tile)] = np.matmul(
            tile, x.T, out=WORKSPACE.array("turned", (len(tile), len(x)))
        ).T  # with many rows first: faster
