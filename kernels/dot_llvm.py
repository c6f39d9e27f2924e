"""Reference: one output of refimpl.reference.packed.linear and refimpl.reference.fp8.linear, the product of a
weight row and a few tokens' activations.

`dot` reads the row as it lies in the file, written instruction by instruction in the language of `simd_llvm`.
Why so is said there. For Q4_K the ten lines of Numba are these, on B blocks that somebody has unpacked:

    def q4_k_dot(d, dmin, sc, m, q, d_a, a):
        y = np.float32(0)  # d, dmin, d_a f32 [B]; sc, m i32 [B, 8]; q, a i32 [B, 8, 32]
        for b in range(len(d)):
            dots, low = 0, 0
            for j in range(8):
                for i in range(32):
                    dots += sc[b, j] * q[b, j, i] * a[b, j, i]
                    low += m[b, j] * a[b, j, i]
            y += d[b] * d_a[b] * np.float32(dots) - dmin[b] * d_a[b] * np.float32(low)
        return y

They take 28 times as long (docs/cpu-experts.md) and read seven times the bytes; a test holds the two to each
other. The kernel differs in three ways. Weights stay packed until they are in a register, where a block is
unpacked once, however many tokens there are, and each token then costs its products alone. Products are of
bytes, 32 in an instruction. And `low` needs sums of activations only, which are made once for all rows.
Integer parts are exact, and floats are added in one fixed order.

Activations come in three layouts, made in `activations_numba`:

    Q8_K    for Q2_K to Q6_K, IQ4_XS                     blocks of 320 bytes
            byte 0            256                      288     292                       308     320
                 | q: i8 [256] | sums of 16: i16 [16]   | d: f32 | sums of 32: i16 [8]    | unused |
                                 in HALVES order                   for panel_llvm
    Q8_0    for Q4_0, Q5_0, Q8_0, IQ4_NL, MXFP4           blocks of 40 bytes
            byte 0           32      36       40
                 | q: i8 [32] | d: f32 | unused |
    floats  for E4M3, INT4, BF16 and F16                  f32 side by side
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from refimpl.formats import iq4_nl, iq4_xs, mxfp4, q2_k, q3_k, q4_0, q4_k, q5_0, q5_k, q6_k, q8_0
from refimpl.kernels.floats_llvm import FLOATS, Dot, float_dot
from refimpl.kernels.int4_llvm import INT4, int4_dot
from refimpl.kernels.simd_llvm import F32, I8, I16, I32, I64, LEVEL, Emitter, Lanes
from refimpl.kernels.unpack_llvm import (
    Block,
    ScalesAhead,
    block_iq4_xs,
    block_q2_k,
    block_q3_k,
    block_q4_k,
    block_q5_k,
    block_q6_k,
    halves_iq4_nl,
    halves_mxfp4,
    halves_q4_0,
    halves_q5_0,
    halves_q8_0,
    scale_mxfp4,
)

Q8_K_BYTES, Q8_0_BYTES = 320, 40
# Bytes: how far before their use weights are asked for, beyond what the CPU guesses by itself.
AHEAD = 1 << 14


def _q8_k_dot(unpack: Callable[..., Block], nbytes: int) -> Dot:
    """The product of a row of blocks of 256 weights, `nbytes` long, and activations in Q8_K."""

    def dot(
        e: Emitter, w: ir.Value, scale: ir.Value, columns: ir.Value, tokens: list[ir.Value], ahead: ir.Value
    ) -> list[ir.Value]:
        b = e.b
        blocks = b.sdiv(columns, I64(256))
        early = ScalesAhead(e, w, nbytes, blocks) if unpack in (block_q4_k, block_q5_k) else None

        def block(i: ir.Value, carried: list[Lanes]) -> list[Lanes]:
            # What the loop carries: a vector of sums for each token, then scales unpacked ahead.
            totals = carried[: len(tokens)]  # f32 [8] for each token
            s = carried[len(tokens) :]
            p = e.at(w, b.mul(i, I64(nbytes)))
            for offset in range(0, nbytes, 64):
                e.prefetch(e.at(e.at(p, ahead), offset))
            x = unpack(e, p, s[0], early.spread(i, s[0])) if early else unpack(e, p)
            then = [early.unpack(b.add(i, I64(1)))] if early else []
            acts = [e.at(t, b.mul(i, I64(Q8_K_BYTES))) for t in tokens]
            dots = _scaled_dots(e, x, acts)
            return [*(_add_block(e, x, a, y, total) for a, y, total in zip(acts, dots, totals)), *then]

        zeros = [e.constant(F32, [0.0] * 8)] * len(tokens)
        carried = [*zeros, *([early.unpack(I64(0))] if early else [])]
        return [e.total(t) for t in e.loop(blocks, carried, block)[: len(tokens)]]

    return dot


def _scaled_dots(e: Emitter, x: Block, acts: list[ir.Value]) -> list[Lanes]:
    """i32 [8] for each token, to be added up: scale * q * activation, of a block and the Q8_K blocks at
    `acts`.
    """
    # Several tokens are chains of their own: additions of one need not wait for those of another.
    chains = 2 if len(acts) == 1 else 1  # of additions that wait for each other
    # dots[chain][token]: the chain takes turns with the groups of 32 weights.
    dots = [[e.constant(I32, [0] * 8)] * len(acts) for _ in range(chains)]
    multiply = e.signed_dot if x.mins is None else e.scaled_dot
    for group, q in enumerate(x.q):
        chain = dots[group % chains]
        spread = x.spread(group)
        chain[:] = e.in_order(
            [multiply(y, q, e.load(e.at(a, 32 * group), I8, 32), spread) for y, a in zip(chain, acts)]
        )
    return [reduce(operator.add, y) for y in zip(*dots)]


def _add_block(e: Emitter, x: Block, a: ir.Value, dots: Lanes, total: Lanes) -> Lanes:
    """total f32 [8] + what the block and the Q8_K block at `a` add to it; `dots` i32 [8] from
    `_scaled_dots`.
    """
    # Both scales of the block times the activations' one, in one multiplication.
    d = x.d * e.splat(e.load(e.at(a, 288), F32), 2)
    first, second = (d.take([i] * 8) for i in x.d_at)
    if x.mins is None:
        return e.fma(first, dots.floats(), total)
    # Minima and sums are both in HALVES order, so lanes meet as they lie: i16 [16] -> i32 [8].
    low = e.madd(x.mins, e.load(e.at(a, 256), I16, 16))  # minima times sums of 16
    if x.d_at[0] == x.d_at[1]:  # without minima of its own: one scale, and the integers subtract exactly
        return e.fma(first, (dots - low).floats(), total)
    return e.fma(second.negative(), low.floats(), e.fma(first, dots.floats(), total))


def _q8_0_dot(
    unpack: Callable[[Emitter, ir.Value], list[Lanes]],
    nbytes: int,
    scale_at: Callable[[Emitter, ir.Value], ir.Value],
) -> Dot:
    """The product of a row of blocks of 32 weights, `nbytes` long, which `unpack` makes i8 [16] twice, and
    activations in Q8_0. `scale_at` gives the scale of the block at an address, a float32.
    """

    def dot(
        e: Emitter, w: ir.Value, scale: ir.Value, columns: ir.Value, tokens: list[ir.Value], ahead: ir.Value
    ) -> list[ir.Value]:
        b = e.b
        # The integer scales of `signed_dot`, which blocks of 32 do not have.
        ones = e.constant(I16, [1] * 16)
        blocks = b.sdiv(columns, I64(32))
        chains = 4 if len(tokens) == 1 else 1  # of additions that wait for each other

        def block(i: ir.Value, totals: list[Lanes]) -> list[Lanes]:
            p = e.at(w, b.mul(i, I64(nbytes)))
            d = scale_at(e, p)
            # Weights 0 to 15, then 16 to 31, as low and high nibbles hold them.
            low, high = unpack(e, p)  # i8 [16] each
            after = []
            for t, total in zip(tokens, totals):
                a = e.at(t, b.mul(i, I64(Q8_0_BYTES)))
                q, none = low.take(range(32), high), e.constant(I32, [0] * 8)
                dots = e.signed_dot(none, q, e.load(a, I8, 32), ones)  # i32 [8]
                after.append(e.fma(e.splat(b.fmul(d, e.load(e.at(a, 32), F32)), 8), dots.floats(), total))
            return after

        def several(i: ir.Value, totals: list[Lanes]) -> list[Lanes]:
            first = b.mul(i, I64(chains))
            for offset in range(0, chains * nbytes, 64):
                e.prefetch(e.at(e.at(e.at(w, ahead), b.mul(first, I64(nbytes))), offset))
            every = [block(b.add(first, I64(c)), totals[c::chains]) for c in range(chains)]
            return [total for of_token in zip(*every) for total in of_token]

        zeros = [e.constant(F32, [0.0] * 8)] * (len(tokens) * chains)
        # Whole turns of `chains` blocks; then what is left, block by block, onto the sums.
        full = b.sdiv(blocks, I64(chains))
        totals = e.loop(full, zeros, several)
        # totals stand token by token, the chains of each side by side.
        totals = [reduce(operator.add, totals[t : t + chains]) for t in range(0, len(totals), chains)]
        done = b.mul(full, I64(chains))
        rest = e.loop(b.sub(blocks, done), totals, lambda i, found: block(b.add(done, i), found))
        return [e.total(t) for t in rest]

    return dot


# --- the table ----------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """How rows of a format are multiplied: their activations' layout, the columns in one step, and the
    code.
    """

    acts: str  # "q8_k", "q8_0" or "f32"
    columns: int
    dot: Dot


def _k(module, unpack: Callable[..., Block]) -> tuple[int, Kind]:
    """The row of a K-quant in KINDS."""
    return module.GGML_TYPE, Kind("q8_k", 256, _q8_k_dot(unpack, module.BLOCK.itemsize))


def _0(
    module,
    unpack: Callable[[Emitter, ir.Value], list[Lanes]],
    scale_at: Callable[[Emitter, ir.Value], ir.Value] = Emitter.half_at,
) -> tuple[int, Kind]:
    """The row of a format of 32 weights in KINDS."""
    return module.GGML_TYPE, Kind("q8_0", 32, _q8_0_dot(unpack, module.BLOCK.itemsize, scale_at))


KINDS: dict[int, Kind] = dict(
    (
        *(
            _k(q2_k, block_q2_k),
            _k(q3_k, block_q3_k),
            _k(q4_k, block_q4_k),
            _k(q5_k, block_q5_k),
            _k(q6_k, block_q6_k),
            _k(iq4_xs, block_iq4_xs),
        ),
        *(_0(q4_0, halves_q4_0), _0(q5_0, halves_q5_0), _0(q8_0, halves_q8_0)),
        *(_0(iq4_nl, halves_iq4_nl), _0(mxfp4, halves_mxfp4, scale_mxfp4)),
        *((number, Kind("f32", 32, float_dot(*how))) for number, how in FLOATS.items()),
        (INT4, Kind("f32", 32, int4_dot)),
    )
)


@intrinsic(prefer_literal=True)
def dot(typingctx, kind, w, scale, columns, tokens, ahead):
    """dot(kind, w, scale, columns, tokens, ahead) inside a Numba function: a row at address w with the
    activations at the addresses `tokens`.

    `kind` is a constant of KINDS; `scale` the address of the row's scales (E4M3 and INT4 only); what lies
    `ahead` bytes behind each weight is fetched meanwhile. Returns a tuple of float32, one a token.
    """
    if not isinstance(kind, types.IntegerLiteral) or not isinstance(tokens, types.UniTuple):
        return None
    result = types.UniTuple(types.float32, tokens.count)

    def codegen(context, b, signature, args):
        _, w, scale, columns, tokens, ahead = args
        # The number of tokens is part of the type, so code is written out for one, for two and for four.
        addresses = [b.extract_value(tokens, i) for i in range(result.count)]
        sums = KINDS[kind.literal_value].dot(Emitter(b, LEVEL), w, scale, columns, addresses, ahead)
        return context.make_tuple(b, result, sums)

    addresses = types.UniTuple(types.int64, tokens.count)
    return result(kind, types.int64, types.int64, types.int64, addresses, types.int64), codegen
