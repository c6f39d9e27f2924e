"""Reference: refimpl.reference.linear.linear, and below it refimpl.reference.packed.linear and
refimpl.fp8.linear.

One kernel multiplies everything: `multiply_jobs` takes a list of jobs, each a matrix and the activations that
go through it, and has a team of threads (`team`) take their rows, in strips. A linear layer is one job; a
layer's gate and up projections are two for each expert in use. Every output is computed by one thread in one
order, so results do not depend on the number of threads.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numba
import numpy as np

from refimpl.entered import entered, listened_to
from refimpl.kernels.block_llvm import fetch, multiply_block
from refimpl.kernels.dot_llvm import (
    AHEAD,
    E4M3,
    FLOATS,
    KINDS,
    LEVEL,
    Q8_0_BYTES,
    Q8_K_BYTES,
    decode,
    dot,
)
from refimpl.kernels.jit import call, callback, floats, integers, jit, memory, variant
from refimpl.kernels.panel_llvm import PANELS, ROWS, multiply, pack_panel, scratch_bytes
from refimpl.kernels.simd_llvm import choose
from refimpl.kernels.team import TEAM, region, set_threads, threads
from refimpl.kernels.tiles_numba import BEHIND, blocks_side_by_side, tile_scratch_bytes, tile_strip
from refimpl.kernels.tiles_numba import HEIGHT as TILE_ROWS
from refimpl.kernels.tiles_numba import constants as tile_constants
from refimpl.reference import linear as reference
from refimpl.tensors import Packed, ScaledFP8, Weight

__all__ = ["linear", "set_threads", "threads"]

BLOCKS_FROM = 8  # tokens, from where a strip of floats is decoded once for all of them
PART = 1024  # columns decoded at a time, and
BLOCK_ROWS = 64  # rows, 256 KB of the second-level cache, where a job's activations would fill
ACTS_BYTES = 1 << 20  # of it: they pass by once for all of these rows
TOKENS = 128  # of one job where a matrix has so few strips that threads must also part its tokens
FEW_STRIPS = 512
GRAIN = 1 << 16  # bytes of weights a thread takes at least, with one token
PIECE = 256  # columns of activations that a thread quantizes at once: whole blocks of every layout
PIECES = 16  # that a thread takes at least: some microseconds
F32, U8 = np.dtype(np.float32), np.dtype(np.uint8)
NOTHING = np.empty(0, np.uint8)
# Whether many tokens go through tiles. Tests say so where loops are in their place.
TILES = LEVEL == "amx"
# Multiplications below which one thread is faster alone: some 25 microseconds. Others are awake if they were
# at work in the last milliseconds, but what they need is not in their caches.
MIN_PARALLEL_MACS = 1 << 21
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
    w,
    s,
    start,
    stop,
    rows,
    row_bytes,
    scale_bytes,
    columns,
    act_rows,
    count,
    acts,
    act_bytes,
    out,
    own,
    ahead,
):
    """Rows start to stop - 1 of a job, one at a time with up to four of its tokens. Arguments as in
    `_strips`; `ahead` is where the next strip lies.

    Activations in float32 would fill the first-level cache, and go through it once for each row; so rows are
    taken in parts that leave room.
    """
    act_rows, out, t = integers(act_rows), floats(out), 0
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
    w,
    s,
    start,
    stop,
    rows,
    row_bytes,
    scale_bytes,
    columns,
    act_rows,
    count,
    acts,
    act_bytes,
    out,
    own,
    ahead,
):
    """Panels of ROWS rows of a job, side by side from three tokens on. The last panel of a matrix begins
    early enough to be whole.

    One or two tokens are not worth taking a strip apart: the time goes to memory, which is fastest when read
    row by row.
    """
    act_rows, y, last = integers(act_rows), floats(out), count - 1
    a0, a1 = acts + act_rows[0] * act_bytes, acts + act_rows[min(1, last)] * act_bytes
    for panel in range(start, stop, ROWS):
        top = min(panel, rows - ROWS)
        if count == 1:
            for r in range(top, top + ROWS):
                y[r] = dot(KIND, w + r * row_bytes, 0, columns, (a0,), AHEAD)[0]
            continue
        if count == 2:
            for r in range(top, top + ROWS):
                y[r], y[rows + r] = dot(KIND, w + r * row_bytes, 0, columns, (a0, a1), AHEAD)
            continue
        pack_panel(KIND, w + top * row_bytes, row_bytes, columns, own)
        # While tokens pass, the next panel is fetched at the pace at which memory delivers: LINES of the
        # cache for each block of columns.
        fetched, lines = 0, min(LINES, -(-4 * LINES // count))
        further = w + (panel + ROWS) * row_bytes if panel + ROWS < stop else ahead
        step, y0 = rows * 4, out + top * 4
        for at in range(0, count, 4):
            left, b0 = count - at, acts + act_rows[at] * act_bytes
            b1 = acts + act_rows[min(at + 1, last)] * act_bytes
            b2 = acts + act_rows[min(at + 2, last)] * act_bytes
            y1 = y0 + min(1, left - 1) * step
            if left == 1:
                multiply(KIND, own, columns, further, lines, (b0,), (y0,))
            elif left == 2:
                multiply(KIND, own, columns, further, lines, (b0, b1), (y0, y1))
            else:  # of three the last counts twice
                b3, y3 = acts + act_rows[min(at + 3, last)] * act_bytes, y0 + min(3, left - 1) * step
                multiply(KIND, own, columns, further, lines, (b0, b1, b2, b3), (y0, y1, y0 + 2 * step, y3))
            y0 += 4 * step
            fetched, further = fetched + lines, further + columns // 256 * lines * 64
            lines = min(lines, LINES - fetched)


def _block_strip(
    w,
    s,
    start,
    stop,
    rows,
    row_bytes,
    scale_bytes,
    columns,
    act_rows,
    count,
    acts,
    act_bytes,
    out,
    own,
    ahead,
):
    """Rows start to stop - 1 of floats with many tokens: decoded once for all of them, PART columns at a
    time, into `own`, and multiplied there, four rows by four tokens. What is decoded next is fetched
    meanwhile, a row for each of the first products.
    """
    act_rows, out, last, height = integers(act_rows), floats(out), count - 1, stop - start
    at_sums = own + BLOCK_ROWS * PART * 4
    sums, row_part = floats(at_sums), min(PART, columns) * BYTES
    for c in range(0, columns, PART):
        n, x, fetched = min(PART, columns - c), acts + 4 * c, 0
        for r in range(start, stop):
            tile = s + r // 128 * scale_bytes + c // 128 * 4
            decode(KIND, w + r * row_bytes + c * BYTES, tile, n, own + (r - start) * PART * 4)
        then = w + start * row_bytes + (c + PART) * BYTES if c + PART < columns else ahead
        each = -(-height // (-(-height // 4) * -(-count // 4)))
        for t in range(0, count, 4):
            a0, a1 = x + act_rows[t] * act_bytes, x + act_rows[min(t + 1, last)] * act_bytes
            a2 = x + act_rows[min(t + 2, last)] * act_bytes
            a3 = x + act_rows[min(t + 3, last)] * act_bytes
            for r in range(0, height, 4):
                for _ in range(min(each, height - fetched)):
                    fetch(then + fetched * row_bytes, row_part)
                    fetched += 1
                multiply_block(own + r * PART * 4, PART * 4, n, (a0, a1, a2, a3), at_sums)
                for i in range(min(4, count - t)):
                    for j in range(min(4, height - r)):
                        at = (t + i) * rows + start + r + j
                        out[at] = sums[4 * i + j] + (out[at] if c else np.float32(0))


def _strips(args, low, high, who):
    """Strips low to high - 1 of all that the jobs have, one job after the other: a task of `team`, with the
    arguments that `multiply_jobs` makes.
    """
    a = integers(args)
    few, many, height, rows, row_bytes, scale_bytes, columns = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
    data, scales, first, counts = integers(a[7]), integers(a[8]), integers(a[9]), integers(a[10])
    act_rows, acts, act_bytes, out, own, jobs = a[11], a[12], a[13], a[14], a[15] + who * a[16], a[17]
    side_by_side = a[18]
    strips = -(-rows // height)
    j, i = low // strips, low % strips
    for before in range(j):
        out += counts[before] * rows * 4
    for t in range(low, high):
        w, start, stop = data[j], i * height, min(i * height + height, rows)
        ahead = w + stop * row_bytes if i + 1 < strips else data[min(j + 1, jobs - 1)]
        if t + 1 == high:  # the next strip is another thread's
            ahead = w + start * row_bytes
        lies_at, step = acts, act_bytes
        if side_by_side and counts[j] >= BLOCKS_FROM:
            lies_at, step = side_by_side + first[j] * Q8_K_BYTES, a[19] * Q8_K_BYTES
        call(
            few if counts[j] < BLOCKS_FROM else many,
            (
                w,
                scales[j],
                start,
                stop,
                rows,
                row_bytes,
                scale_bytes,
                columns,
                act_rows + 8 * first[j],
                counts[j],
                lies_at,
                step,
                out,
                own,
                ahead,
            ),
        )
        i += 1
        if i == strips:
            out += counts[j] * rows * 4
            j, i = j + 1, 0
    return 1


@jit
def multiply_jobs(team, like, data, scales, first, counts, act_rows, acts, out, scratch, side_by_side):
    """Job j multiplies the matrix at data[j], whose tile scales are at scales[j], with the activations
    act_rows[first[j] : first[j] + counts[j]]. What the matrices have in common is `like`, from `Matrix.like`.

    Its outputs stand behind those of the jobs before it in out f32 [sum of counts, rows]. acts u8 [T, bytes],
    scratch u8 [threads, bytes]. side_by_side u8 [bytes] is memory for the activations as tiles want them,
    empty where there are none. Returns what `region` does.
    """
    height, rows, row_bytes, jobs = like[3], like[4], like[5], len(data)
    most = like[8] if len(out) // jobs * 4 * like[7] > like[9] else ROWS
    for higher in (ROWS, most):  # as long as there are enough strips for all threads
        if height < higher and jobs * (-(-rows // higher)) >= 4 * len(scratch):
            height = higher
    args = np.empty(20, np.int64)
    args[0], args[1], args[2], args[3:7] = like[1], like[2], height, like[4:8]
    args[7], args[8] = data.ctypes.data, scales.ctypes.data
    args[9], args[10], args[11] = first.ctypes.data, counts.ctypes.data, act_rows.ctypes.data
    args[12], args[13], args[14] = acts.ctypes.data, acts.shape[1], out.ctypes.data
    args[15], args[16], args[17] = scratch.ctypes.data, scratch.shape[1], jobs
    well, args[18], args[19] = 1, 0, len(act_rows) + BEHIND
    if side_by_side.size and like[10]:
        args[18] = side_by_side.ctypes.data
        copy = np.array((args[12], args[13], args[11], args[18], args[19]), np.int64)
        well = region(team, like[10], copy, len(act_rows), PIECES)
    least = max(1, GRAIN // (height * row_bytes)) if len(out) <= 2 * jobs else 1
    return well & region(team, like[0], args, jobs * (-(-rows // height)), least)


@cache
def _task() -> Any:
    return callback(_strips, answers=True)


@cache
def _copies() -> Any:
    return callback(blocks_side_by_side, answers=True)


@cache
def strip(kind: int, way: str) -> Any:
    """What multiplies a strip of a format: "lanes", "rows" or "blocks". `say` knows it by its address."""
    found = _strip(kind, way)
    _WAYS[found.address] = way
    return found


_WAYS: dict[int, str] = {}


def _strip(kind: int, way: str) -> Any:
    if way == "lanes":
        return callback(variant(_lane_strip, f"{kind}", KIND=kind, LINES=PANELS[kind].lines))
    if way == "tiles":
        return callback(variant(tile_strip, f"{kind}", **tile_constants(kind, slowly=LEVEL != "amx")))
    function = _row_strip if way == "rows" else _block_strip
    return callback(variant(function, f"{kind}", KIND=kind, BYTES=FLOATS[kind][1] if kind in FLOATS else 0))


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
def _power_of_two(scale):
    """The smallest power of two from 2^-126 up that is not below a finite scale: one exponent more where
    there is a mantissa.
    """
    bits = np.float32(scale).view(np.uint32)
    exponent = (bits >> np.uint32(23)) + np.uint32((bits & np.uint32(0x7FFFFF)) != 0)
    return np.uint32(max(exponent, np.uint32(1)) << np.uint32(23)).view(np.float32)


POWER_OF_TWO: Any = None  # given to each of the two variants


def _to_e4m3(x, out):
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
        if POWER_OF_TWO:
            scale = _power_of_two(scale)
        if scale == 0 or finite != 0:
            o[:] = np.float32(0) if finite == 0 else np.float32(np.nan)
        else:
            for i in range(len(v)):
                r = v[i] / scale
                small = abs(r) < np.float32(2.0**-6)  # there codes are 2**-9 apart
                o[i] = (np.rint(r * np.float32(512)) * np.float32(2.0**-9) if small else _keep(r, 20)) * scale


@cache
def _quantizer(layout: str) -> Any:
    """A task of `team`: quantizes pieces of PIECE columns, all of the first token, then of the next, ..."""
    width, dtype, quantize = LAYOUTS[layout]
    given = {"QUANTIZE": quantize, "BLOCK": dtype, "WIDTH": width, "BYTES": dtype.itemsize}
    return callback(variant(_quantize_pieces, layout, **given), answers=True)


QUANTIZE: Any = None  # these are given to each variant
BLOCK: Any = None
WIDTH: Any = None


def _quantize_pieces(args, low, high, who):
    a = integers(args)
    x, columns, out = a[0], a[1], a[2]
    pieces = -(-columns // PIECE)
    for i in range(low, high):
        start = i % pieces * PIECE
        n = min(PIECE, columns - start)
        source = memory(x + (i // pieces * columns + start) * 4)
        to = memory(out + (i // pieces * columns + start) // WIDTH * BYTES)
        QUANTIZE(numba.carray(source, n, F32), numba.carray(to, n // WIDTH, BLOCK))
    return 1


@jit
def quantize(team, quantizer, x, out):
    """x f32 [T, K] in the layout of a `quantizer` (the address of a task; 0 leaves x as it is), into out.
    Returns what `region` does.
    """
    if quantizer == 0:
        return 1
    args = np.array((x.ctypes.data, x.shape[1], out.ctypes.data), np.int64)
    return region(team, quantizer, args, len(x) * (-(-x.shape[1] // PIECE)), PIECES)


LAYOUTS: dict[str, tuple[int, np.dtype, Callable]] = {
    "q8_k": (256, Q8_K, to_q8_k),
    "q8_0": (32, Q8_0, to_q8_0),
    "e4m3": (1, F32, jit(variant(_to_e4m3, "e4m3", POWER_OF_TWO=False))),
    "e4m3_ue8m0": (1, F32, jit(variant(_to_e4m3, "e4m3_ue8m0", POWER_OF_TWO=True))),
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
    """x f32 [T, K] in a layout of activations: "q8_k", "q8_0", "e4m3" or "e4m3_ue8m0" (float32, rounded) or
    "f32" (x itself).
    """
    if layout is None or layout == "f32":
        return x
    width, dtype, _ = LAYOUTS[layout]
    out = WORKSPACE.array(name, (len(x), x.shape[1] // width), dtype)
    with workers(32 * x.size) as team:
        done(quantize(team, _quantizer(layout).address, x, out))
    return out


def workers(products: int) -> Any:
    """The team, where so many products are worth its while; 0, which is nobody."""
    return TEAM if products > MIN_PARALLEL_MACS and TEAM.threads > 1 else ALONE


ALONE = nullcontext(0)


def done(well: int) -> None:
    """RuntimeError where a worker failed; Numba has printed why."""
    if not well:
        raise RuntimeError("a worker thread of refimpl failed; what it raised is printed above")


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


class _Known(NamedTuple):
    """What `matrix` found, and for what. It keeps no array alive, nor the file that one is mapped from."""

    data: weakref.ref
    scale: weakref.ref | None  # of FP8
    kind: tuple | None  # shape and type of a packed one
    matrix: Matrix | None


_known: dict[int, _Known] = {}


def matrix(w: Weight) -> Matrix | None:
    """None for a weight the kernel does not take: plain arrays, formats without a row in KINDS, ragged or
    scattered ones.

    A stack [E, N, K] gives its first matrix. What was found for a weight is kept as long as its array is:
    asking numpy for addresses takes longer than a small product.
    """
    if isinstance(w, ScaledFP8):
        data, found = w.codes, _known.get(id(w.codes))
        if found and found.data() is data and found.scale and found.scale() is w.scale:
            return found.matrix
        return _keep_matrix(data, weakref.ref(w.scale), None, _matrix(w))
    if isinstance(w, Packed):
        data, found = w.data, _known.get(id(w.data))
        if found and found.data() is data and found.kind == (w.shape, w.ggml_type):
            return found.matrix
        return _keep_matrix(data, None, (w.shape, w.ggml_type), _matrix(w))
    return None


def _keep_matrix(
    data: np.ndarray, scale: weakref.ref | None, kind: tuple | None, found: Matrix | None
) -> Matrix | None:
    key = id(data)

    def forget(_: object, known: dict = _known) -> None:  # also while the process ends
        known.pop(key, None)

    _known[key] = _Known(weakref.ref(data, forget), scale, kind, found)
    return found


def _matrix(w: ScaledFP8 | Packed) -> Matrix | None:
    if isinstance(w, ScaledFP8):
        (rows, columns), scale = w.codes.shape, w.scale
        if columns % KINDS[E4M3].columns or not (w.codes.flags.c_contiguous and scale.flags.c_contiguous):
            return None
        return Matrix(E4M3, rows, columns, _address(w.codes), columns, _address(scale), 4 * scale.shape[1])
    if w.ggml_type not in KINDS or w.shape[-1] % KINDS[w.ggml_type].columns or not w.data.flags.c_contiguous:
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
        if m.kind != E4M3 or activations == "exact":
            return "f32"
        return "e4m3_ue8m0" if activations == "ue8m0" else "e4m3"
    return None if activations == "exact" else acts


class Like(NamedTuple):
    """What `multiply_jobs` and `quantize` need to know of matrices of one kind and shape."""

    # int64: addresses of the task and its two ways, rows of a strip, Matrix's, most rows of a strip with many
    # tokens, and from how many bytes of activations on, address of what copies activations for tiles, or 0
    numbers: np.ndarray
    quantizer: int  # address; 0 for float32 as it is
    act_bytes: int  # of a token
    scratch_bytes: int  # of a thread
    blocks: int = 0  # of a token's activations, where strips with many tokens want those side by side


@lru_cache(4096)
def like(m: Matrix, how: str, many: bool) -> Like:
    """For matrices like m, activations in layout `how`, and `many`: BLOCKS_FROM tokens or more in a job."""
    lanes, blocks = m.kind in PANELS and m.rows >= ROWS, many and m.kind in FLOATS
    tiles = lanes and many and TILES
    few = strip(m.kind, "lanes" if lanes else "rows").address
    most, from_bytes = (BLOCK_ROWS, ACTS_BYTES) if blocks else (TILE_ROWS, 0) if tiles else (ROWS, 0)
    numbers = np.array(
        (
            _task().address,
            few,
            strip(m.kind, "blocks" if blocks else "tiles").address if blocks or tiles else few,
            ROWS if lanes else 4,
            *(m.rows, m.row_bytes, m.scale_bytes, m.columns),
            *(most, from_bytes, _copies().address if tiles else 0),
        )
    )
    scratch = 64
    if lanes:
        scratch = max(scratch_bytes(m.kind, m.columns), tile_scratch_bytes(m.kind) if tiles else 0)
    elif blocks:
        scratch = 4 * (BLOCK_ROWS * PART + 16)
    if how == "f32":
        return Like(numbers, 0, 4 * m.columns, scratch)
    width, dtype, _ = LAYOUTS[how]
    of_token = m.columns // width
    return Like(numbers, _quantizer(how).address, of_token * dtype.itemsize, scratch, of_token * tiles)


@jit
def _linear(team, quantizer, x, acts, numbers, data, scales, first, counts, act_rows, out, own, more):
    return quantize(team, quantizer, x, acts) & multiply_jobs(
        team, numbers, data, scales, first, counts, act_rows, acts, out, own, more
    )


def linear(x: np.ndarray | ScaledFP8, w: Weight, activations: str = "fp8") -> np.ndarray:
    """x [..., K] f32 times the transpose of w [N, K] -> [..., N] f32, as the reference; what the kernel does
    not take goes there.
    """
    m = matrix(w)
    how = m and layout(m, activations)
    if m is None or how is None or isinstance(x, ScaledFP8) or not x.size:
        entered("reference")
        return reference.linear(x, w, activations)
    flat = np.ascontiguousarray(x.reshape(-1, x.shape[-1]), np.float32)
    tokens = len(flat)
    out = np.empty((tokens, m.rows), np.float32)
    parts = -(-tokens // TOKENS) if m.rows < FEW_STRIPS * ROWS else 1
    of = like(m, how, tokens // parts >= BLOCKS_FROM)
    with workers(m.rows * m.columns * tokens) as team:
        if listened_to():
            say(team, of, together(tokens, parts)[1])
        done(
            _linear(
                team,
                of.quantizer,
                flat,
                activations_of("x", flat, of),
                of.numbers,
                *alone(m.data, m.scale, parts),
                *together(tokens, parts),
                out,
                scratch(team, of),
                side_by_side(tokens, of),
            )
        )
    return out.reshape(*x.shape[:-1], m.rows)


HOW_MANY = ("no token", "one token", "two tokens", "few tokens")


def say(team: int, of: Like, counts: np.ndarray) -> None:
    """Name to `entered` the threads, the level of SIMD, and the ways that jobs of `counts` tokens take."""
    few, many = (_WAYS[int(address)] for address in of.numbers[1:3])
    taken = {f"{few}, {HOW_MANY[min(n, 3)]}" if n < BLOCKS_FROM else f"{many}, many tokens" for n in counts}
    entered("a team" if team else "one thread", f"simd {choose()}", *taken)


def activations_of(name: str, x: np.ndarray, of: Like) -> np.ndarray:
    """Memory for x quantized, u8 [T, bytes]; x itself where it is not."""
    return WORKSPACE.array(name, (len(x), of.act_bytes), U8) if of.quantizer else x.view(U8)


def scratch(team: int, *of: Like) -> np.ndarray:
    """Memory for each thread of a team, or for its caller alone."""
    return WORKSPACE.array("strip", (TEAM.threads if team else 1, max(o.scratch_bytes for o in of)), U8)


def side_by_side(pairs: int, *of: Like) -> np.ndarray:
    """Memory for the activations of so many pairs as tiles want them, u8 [bytes]; empty where none do."""
    blocks = max(o.blocks for o in of)
    nbytes = blocks * (pairs + BEHIND) * Q8_K_BYTES
    return WORKSPACE.array("side by side", (nbytes,), U8) if blocks else NOTHING


@lru_cache(4096)
def alone(data: int, scale: int, jobs: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """A list of one matrix, as jobs want it, or the same one for several."""
    return np.full(jobs, data), np.full(jobs, scale)


@lru_cache(64)
def together(tokens: int, jobs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All tokens, parted evenly among jobs: where each job's start, how many it has, and which."""
    ends = tokens * np.arange(jobs + 1) // jobs
    return ends[:-1], np.diff(ends), np.arange(tokens)
