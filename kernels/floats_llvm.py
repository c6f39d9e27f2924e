"""Reference: one output of refimpl.reference.fp8.linear, or of refimpl.reference.linear.linear on BF16, F16
and float32: the product of a row of floats and a few tokens' activations f32.

Written in the language of `simd_llvm`, which says why: sums are to be taken in one fixed order, many lanes
wide, which LLVM may not make of a loop by itself. For E4M3 the ten lines of Numba are these:

    def e4m3_dot(codes, scales, a, value):  # u8 [K], f32 [K / 128], f32 [K], f32 [256] -> f32
        y = np.float32(0)
        for tile in range(len(scales)):
            part = np.float32(0)
            for k in range(128 * tile, 128 * tile + 128):
                part += value[codes[k]] * a[k]
            y += part * scales[tile]
        return y

`value` is refimpl.formats.e4m3's table. The kernel computes a float from the code's bits instead, 8 or 16
at a time, since a CPU's table look-up is one value an instruction; and it keeps several sums, so that
additions need not wait for each other.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from refimpl.formats import bf16, f16, f32
from refimpl.kernels.simd_llvm import F32, I8, I16, I32, I64, LEVEL, WORDS, Emitter, Lanes

E4M3 = 256  # beside ggml's type numbers

# What multiplies a row: (emitter, address of the row, address of its tile scales, columns, addresses of the
# tokens' activations, bytes to prefetch ahead) -> a float32 for each token.
Dot = Callable[[Emitter, ir.Value, ir.Value, ir.Value, list[ir.Value], ir.Value], list[ir.Value]]


def _e4m3(e: Emitter, p: ir.Value) -> tuple[list[Lanes], Lanes]:
    """32 codes at an address -> weights f32 [n], several times, and the codes without their sign, u8 [32], of
    which 0x7F is NaN.

    Weights are 2**-8 of what they stand for: FLOATS has the factor.
    """
    # A code's bits are those of a half but for the bias of the exponent, 7 and 15; two steps move them there:
    #
    #     code, sign-extended    SSSSSSSS SEEEEMMM
    #     << 7                   SSEEEEMM M0000000
    #     & 0xBF80               S0EEEEMM M0000000        a half: S, 0EEEE, MMM0000000
    #
    # Without an instruction for halves it is floats, whose bias differs by 120 from that of the codes: << 20
    # and 2**112 leave the same 2**-8.
    # Decoding is here, beside refimpl.formats.e4m3, since a table look-up is no vector instruction.
    n = WORDS[e.level]
    codes = [e.load(e.at(p, at), I8, n) for at in range(0, 32, n)]
    if e.level == "generic":
        weights = [((c.sext(I32) << 20) & 0x87F00000).bits(F32, n) * 2.0**112 for c in codes]
    else:
        weights = [e.half((c.sext(I16) << 7) & 0xBF80) for c in codes]
    return weights, e.load(p, I8, 32) & 0x7F


def _bf16(e: Emitter, p: ir.Value) -> tuple[list[Lanes], None]:
    """32 weights at an address -> f32 [n], several times: a bfloat16 is the upper half of a float32."""
    n = WORDS[e.level]
    return [(e.load(e.at(p, at), I16, n).zext(I32) << 16).bits(F32, n) for at in range(0, 64, 2 * n)], None


def _f16(e: Emitter, p: ir.Value) -> tuple[list[Lanes], None]:
    """32 weights at an address -> f32 [n], several times."""
    n = WORDS[e.level]
    return [e.half(e.load(e.at(p, at), I16, n)) for at in range(0, 64, 2 * n)], None


def _f32(e: Emitter, p: ir.Value) -> tuple[list[Lanes], None]:
    """32 weights at an address -> f32 [n], several times."""
    n = WORDS[e.level]
    return [e.load(e.at(p, at), F32, n) for at in range(0, 128, 4 * n)], None


def float_dot(decode: Callable, nbytes: int, factor: float | None) -> Dot:
    """The product of a row of floats of `nbytes` bytes and activations f32. `factor` is for formats with tile
    scales: what it takes to make weights right. `columns` must be a multiple of 32.
    """

    def dot(
        e: Emitter, w: ir.Value, scale: ir.Value, columns: ir.Value, tokens: list[ir.Value], ahead: ir.Value
    ) -> list[ir.Value]:
        b = e.b
        n = WORDS[e.level]
        count = len(tokens)
        chains = 4 if count == 1 else 2  # sums of a token, for additions not to wait for each other
        zeros = [e.constant(F32, [0.0] * n)] * count
        clean = e.constant(I8, [0] * 32)  # the largest codes met: 0x7F once there was a NaN
        nothing = [*zeros * chains, clean]

        def step(column: ir.Value, carried: list[Lanes], first: int = 0) -> list[Lanes]:
            """32 columns from `column` on: parts[token * chains + chain] f32 [n], and the largest codes."""
            *parts, worst = carried
            weights, sizes = decode(e, e.at(w, b.mul(column, I64(nbytes))))
            for i, x in enumerate(weights):
                at = b.mul(b.add(column, I64(n * i)), I64(4))
                chain = (first + i) % chains
                parts[chain::chains] = e.in_order(
                    [e.fma(x, e.load(e.at(t, at), F32, n), y) for t, y in zip(tokens, parts[chain::chains])]
                )
            return [*parts, worst if sizes is None else worst.umax(sizes)]

        def finish(tile: ir.Value, totals: list[Lanes], parts: list[Lanes]) -> list[Lanes]:
            """The sums of a tile, f32 [n], times its scale, onto the totals, f32 [n] for each token."""
            sums = [reduce(operator.add, parts[t * chains : (t + 1) * chains]) for t in range(count)]
            if factor is None:
                return [total + s for total, s in zip(totals, sums)]
            s = e.splat(e.load(e.at(scale, b.mul(tile, I64(4))), F32), n)
            return [e.fma(x * factor, s, total) for total, x in zip(totals, sums)]

        def tile(i: ir.Value, carried: list[Lanes]) -> list[Lanes]:
            """128 columns in one piece: totals f32 [n] for each token, and the largest codes u8 [32]."""
            *totals, worst = carried
            column = b.mul(i, I64(128))
            parts = [*nothing[:-1], worst]
            for offset in range(0, 128 * nbytes, 64):
                e.prefetch(e.at(e.at(e.at(w, ahead), b.mul(column, I64(nbytes))), offset))
            for c in range(4):
                parts = step(b.add(column, I64(32 * c)), parts, c * 32 // n)
            return [*finish(i, totals, parts[:-1]), parts[-1]]

        full = b.sdiv(columns, I64(128))
        *totals, worst = e.loop(full, [*zeros, clean], tile)
        # What is left of the columns, 32 at a time.
        column = b.mul(full, I64(128))
        rest = b.sdiv(b.sub(columns, column), I64(32))
        *parts, worst = e.loop(
            rest, [*nothing[:-1], worst], lambda i, p: step(b.add(column, b.mul(i, I64(32))), p)
        )
        # With nothing left there is no such tile: tile 0 is there, and its scale is multiplied by zeros.
        last = b.select(b.icmp_signed(">", rest, I64(0)), full, I64(0))
        with_rest = finish(last, totals, parts)
        nan = e.any(worst.equals(0x7F).sext(I8))
        return [b.select(nan, F32(float("nan")), e.total(t)) for t in with_rest]

    return dot


def _float_decoder(decode: Callable, nbytes: int, factor: float | None) -> Callable[..., None]:
    """What stores a row of floats as float32; arguments as `float_dot`."""

    def run(e: Emitter, w: ir.Value, scale: ir.Value, columns: ir.Value, out: ir.Value) -> None:
        b = e.b
        n = WORDS[e.level]

        def step(i: ir.Value, nothing: list[Lanes]) -> list[Lanes]:
            floats, sizes = decode(e, e.at(w, b.mul(i, I64(32 * nbytes))))
            for k, x in enumerate(floats):
                if factor is not None:
                    x = x * factor * e.splat(e.load(e.at(scale, b.mul(b.sdiv(i, I64(4)), I64(4))), F32), n)
                    nan = sizes.take(range(n * k, n * k + n)).equals(0x7F).sext(I32)
                    x = (x.bits(I32, n) | nan).bits(F32, n)  # all bits are a NaN
                e.store(x, e.at(out, b.add(b.mul(i, I64(128)), I64(4 * n * k))))
            return nothing

        e.loop(b.sdiv(columns, I64(32)), [], step)

    return run


# Formats of floats: what decodes 32 of them, bytes of one, and the factor for `float_dot`.
FLOATS: dict[int, tuple[Callable, int, float | None]] = {
    E4M3: (_e4m3, 1, 2.0**8),
    bf16.GGML_TYPE: (_bf16, 2, None),
    f16.GGML_TYPE: (_f16, 2, None),
    f32.GGML_TYPE: (_f32, 4, None),
}
DECODERS = {number: _float_decoder(*how) for number, how in FLOATS.items()}


@intrinsic(prefer_literal=True)
def decode(typingctx, kind, w, scale, columns, out):
    """decode(kind, w, scale, columns, out) inside a Numba function: the f32 [columns] of a row of floats at
    address w to address `out`.

    `kind` is a constant of FLOATS; `scale` the address of the row's f32 tile scales (E4M3 only).
    """
    if not isinstance(kind, types.IntegerLiteral):
        return None

    def codegen(context, b, signature, args):
        _, w, scale, columns, out = args
        DECODERS[kind.literal_value](Emitter(b, LEVEL), w, scale, columns, out)
        return context.get_dummy_value()

    return types.none(kind, types.int64, types.int64, types.int64, types.int64), codegen
