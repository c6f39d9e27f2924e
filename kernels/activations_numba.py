"""Reference: the activations that refimpl.formats.q8_k, refimpl.formats.q8_0 and refimpl.fp8.act_quant make.

A matrix times a vector of bytes is a sum of products of bytes, so activations f32 [T, K] are quantized before
they meet quantized weights, each token once however many matrices it goes through. How they lie in memory is
drawn in `dot_llvm`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np

from refimpl.kernels import pairs_numba
from refimpl.kernels.dot_llvm import Q8_0_BYTES, Q8_K_BYTES
from refimpl.kernels.jit import callback, integers, jit, memory, variant
from refimpl.kernels.team import done, region, workers
from refimpl.kernels.workspace import F32, WORKSPACE

PIECE = 256  # columns of activations that a thread quantizes at once: whole blocks of every layout
PIECES = 16  # that a thread takes at least: some microseconds
Q8_K = np.dtype(
    [("q", "i1", 256), ("sums", "i2", 16), ("d", "f4"), ("sums32", "i2", 8), ("unused", "u1", 12)]
)
Q8_0 = np.dtype([("q", "i1", 32), ("d", "f4"), ("unused", "u1", 4)])
assert (Q8_K.itemsize, Q8_0.itemsize) == (Q8_K_BYTES, Q8_0_BYTES)


@jit
def to_q8_k(x, blocks):
    """One token, f32 [K] -> blocks [K/256] of Q8_K: the reference's roundings (refimpl.formats.q8_k). A block
    with NaN or infinity gets scale NaN.
    """
    for b in range(len(blocks)):
        block, v = blocks[b], x[256 * b : 256 * b + 256]
        sizes, largest, at = v.view(np.int32), np.int32(0), 0
        # Bits of floats without their sign order as the floats do, and integers are compared many at a time.
        for i in range(256):
            largest = max(largest, sizes[i] & np.int32(0x7FFFFFFF))
        while at < 255 and sizes[at] & np.int32(0x7FFFFFFF) != largest:
            at += 1
        finite = largest < np.int32(0x7F800000)
        # The first of the largest numbers becomes -127, whatever its sign: the scale may be negative.
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
        # Sums of activations are all that minima meet: made here once, not in each row's product.
        #
        #     sums     group of 16   0 2 4 6 8 10 12 14 | 1 3 5 7 9 11 13 15      HALVES
        #     sums32   group of 32   0 2 4 6 | 1 3 5 7                            pairs of `panel_llvm._pairs`
        for j in range(16):
            total = np.int16(0)
            for i in range(16 * j, 16 * j + 16):
                total += np.int16(q[i])
            block.sums[j // 2 + 8 * (j % 2)] = total  # unpack_llvm.HALVES
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
        # Floats just above 0.5 are 2**-24 apart, as subnormal halves are.
        return (x + np.float32(0.5)) - np.float32(0.5)
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
    """One token, f32 [K] -> the floats that its E4M3 codes and scales stand for, f32 [K]
    (refimpl.fp8.act_quant, decoded).
    """
    for start in range(0, len(x), 128):
        v, o = x[start : start + 128], out[start : start + 128]
        largest, finite = np.float32(0), np.float32(0)
        for i in range(len(v)):
            size = abs(v[i])
            largest = size if size > largest else largest
            finite += v[i] * np.float32(0)
        # 448 is E4M3's largest number. `largest` passes over NaN; `finite` tells of it.
        scale = largest / np.float32(448)
        if POWER_OF_TWO:
            scale = _power_of_two(scale)
        # NaN is not 0, so `finite` says both: a group with NaN or infinity is all NaN.
        if scale == 0 or finite != 0:
            o[:] = np.float32(0) if finite == 0 else np.float32(np.nan)
        else:
            for i in range(len(v)):
                r = v[i] / scale
                small = abs(r) < np.float32(2.0**-6)  # there codes are 2**-9 apart
                o[i] = (np.rint(r * np.float32(512)) * np.float32(2.0**-9) if small else _keep(r, 20)) * scale


@cache
def quantizer(layout: str) -> Any:
    """A task of `team` for activations in a layout: quantizes pieces of PIECE columns, all of the first
    token, then of the next, ...
    """
    if layout in PAIRS:
        power_of_two = int(layout.startswith("e4m3_ue8m0"))
        return callback(variant(pairs_numba.quantize_pieces, layout, POWER_OF_TWO=power_of_two), answers=True)
    width, dtype, of_one = LAYOUTS[layout]
    given = {"QUANTIZE": of_one, "BLOCK": dtype, "WIDTH": width, "BYTES": dtype.itemsize}
    return callback(variant(_quantize_pieces, layout, **given), answers=True)


QUANTIZE: Any = None  # these are given to each variant
BLOCK: Any = None
WIDTH: Any = None
BYTES: Any = None


def _quantize_pieces(args, low, high, who):
    a = integers(args)
    x, columns, out = a[0], a[1], a[2]
    # Piece i of x f32 [T, K]; PIECE columns of a token are PIECE / WIDTH blocks of BYTES bytes:
    #
    #     i      0        1              | pieces    pieces + 1   | ...
    #     x      | token 0: PIECE | PIECE | token 1: PIECE | ...
    #     out    | token 0: blocks        | token 1: blocks       | ...
    pieces = -(-columns // PIECE)
    for i in range(low, high):
        start = i % pieces * PIECE
        n = min(PIECE, columns - start)
        source = memory(x + (i // pieces * columns + start) * 4)
        to = memory(out + (i // pieces * columns + start) // WIDTH * BYTES)
        QUANTIZE(numba.carray(source, n, F32), numba.carray(to, n // WIDTH, BLOCK))
    return 1


@jit
def quantize(team, task, x, out):
    """x f32 [T, K] in the layout of a `quantizer` (its address, or 0 to leave x as it is), into out u8.
    Returns what `region` does.
    """
    if task == 0:
        return 1
    args = np.array((x.ctypes.data, x.shape[1], out.ctypes.data, len(x)), np.int64)
    return region(team, task, args, len(x) * (-(-x.shape[1] // PIECE)), PIECES)


# Of each: columns of a block, what a block is, and the function that writes a row of them. E4M3 is decoded
# at once to the floats that its codes stand for, as the CPU has no products of E4M3.
LAYOUTS: dict[str, tuple[int, np.dtype, Callable]] = {
    "q8_k": (256, Q8_K, to_q8_k),
    "q8_0": (32, Q8_0, to_q8_0),
    "e4m3": (1, F32, jit(variant(_to_e4m3, "e4m3", POWER_OF_TWO=False))),
    "e4m3_ue8m0": (1, F32, jit(variant(_to_e4m3, "e4m3_ue8m0", POWER_OF_TWO=True))),
}

PAIRS = ("e4m3_pairs", "e4m3_ue8m0_pairs")  # two more, for products of bfloat16 (`pairs_numba`)


def prepare(name: str, x: np.ndarray, layout: str | None) -> np.ndarray:
    """x f32 [T, K] in a layout of activations: "q8_k", "q8_0", "e4m3" or "e4m3_ue8m0" (float32, rounded) or
    "f32" (x itself).
    """
    if layout is None or layout == "f32":
        return x
    width, dtype, _ = LAYOUTS[layout]
    out = WORKSPACE.array(name, (len(x), x.shape[1] // width), dtype)
    with workers(32 * x.size) as team:
        done(quantize(team, quantizer(layout).address, x, out))
    return out
