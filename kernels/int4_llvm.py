"""Reference: one output of refimpl.reference.int4.linear, the product of a row of INT4 in groups of 32 and a
few tokens' activations f32.

Written in the language of `simd_llvm` for the reasons said there and in `floats_llvm`: nibbles lie in an
order that only a permutation undoes, and sums are to be taken in one fixed order. The ten lines of Numba that
do the same, with the weights of a row taken apart:

    def int4_dot(q, scales, a):  # i8 [K], f32 [K / 32], f32 [K] -> f32
        y = np.float32(0)
        for group in range(len(scales)):
            part = np.float32(0)
            for k in range(32 * group, 32 * group + 32):
                part += np.float32(q[k]) * a[k]
            y += part * scales[group]
        return y

A group is 16 bytes, so that half a register holds it: low and high nibbles are laid in turns, widened, and
made floats, once for all tokens.
"""

from __future__ import annotations

import operator
from functools import reduce

from llvmlite import ir

from refimpl.formats.int4 import GROUP
from refimpl.kernels.simd_llvm import F32, I8, I16, I32, I64, WORDS, Emitter, Lanes

INT4 = 257  # beside ggml's type numbers and `floats_llvm.E4M3`
IN_TURNS = [lane + 16 * high for lane in range(16) for high in (0, 1)]


def _weights(e: Emitter, p: ir.Value) -> list[Lanes]:
    """The 32 weights whose 16 bytes lie at p, f32 [n], several times."""
    #     byte i        | high: weight 2 i + 1 | low: weight 2 i |          8 above what they stand for
    x, n = e.load(p, I8, 16), WORDS[e.level]
    q = (x & 15).take(IN_TURNS, x >> 4) - 8
    return [q.take(range(at, at + n)).sext(I32).floats() for at in range(0, GROUP, n)]


def int4_dot(
    e: Emitter, w: ir.Value, scale: ir.Value, columns: ir.Value, tokens: list[ir.Value], ahead: ir.Value
) -> list[ir.Value]:
    """f32 for each token, the row at w with its scales, BF16, at `scale`; arguments as `floats_llvm.Dot`."""
    b, n = e.b, WORDS[e.level]

    def group(i: ir.Value, totals: list[Lanes]) -> list[Lanes]:
        p = e.at(w, b.mul(i, I64(GROUP // 2)))
        e.prefetch(e.at(p, ahead))
        bits = b.zext(e.load(e.at(scale, b.mul(i, I64(2))), I16), I32)
        s = e.splat(b.bitcast(b.shl(bits, I32(16)), F32), n)
        weights, after = _weights(e, p), []
        for t, total in zip(tokens, totals):
            acts = e.at(t, b.mul(i, I64(4 * GROUP)))
            parts = [x * e.load(e.at(acts, 4 * n * j), F32, n) for j, x in enumerate(weights)]
            after.append(e.fma(reduce(operator.add, parts), s, total))
        return after

    zeros = [e.constant(F32, [0.0] * n)] * len(tokens)
    return [e.total(t) for t in e.loop(b.sdiv(columns, I64(GROUP)), zeros, group)]
