"""Reference: refimpl.reference.fp8.linear and refimpl.fp8.act_quant, a block of 128 columns of some tokens
and a panel of up to 64 rows at a time, by products of pairs of bfloat16.

E4M3 has four bits of significand and a bfloat16 has eight, so codes of weights and of activations are
bfloat16 numbers without any rounding. One instruction, vdpbf16ps, multiplies 32 pairs of these and adds each
two products to one of 16 sums in float32: twice as much as float32's own multiplication. The ten lines of
Numba that do the same are these:

    def pairs(weights, scale, acts, scales):  # f32 [128, R], a number, f32 [T, 128], f32 [T]
        y = np.zeros((len(acts), weights.shape[1]), np.float32)
        for t in range(len(acts)):
            for r in range(weights.shape[1]):
                part = np.float32(0)
                for k in range(len(weights)):
                    part += weights[k, r] * acts[t, k]
                y[t, r] = part * (scales[t] * scale)
        return y

A panel holds a pair of columns of each row in 32 bits, so that a register has the pairs of sixteen rows, and
all lanes meet the same pair of a token's activations:

    panel, 4 bytes each      | pair 0 of rows 0 .. 15 | of rows 16 .. 31 | ... | pair 1 of rows 0 .. 15 | ...
    pair                     | column 2 i, bf16 | column 2 i + 1, bf16 |

It is what the tile instructions of newer Xeons (tdpbf16ps) want of their second operand too: sixteen pairs
of sixteen rows, with a step from pair to pair.

A panel of 128 columns and 64 rows takes 16 kB, half of a first-level cache. Taking it apart costs as much as
five tokens' products, so it serves all tokens before the next block comes. Sums of a block begin at zero, in
registers; at its end they are multiplied by the scales of the tile and of the token's group, and added to
the totals of the blocks before, which stay in the second-level cache.

The instruction takes numbers below 2**-126 for zero, and makes zero of such sums. No code is so small, nor
is a sum of products of codes that is not zero.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from refimpl.formats import e4m3
from refimpl.kernels.simd_llvm import F32, I8, I16, I32, I64, LEVEL, Emitter, Lanes

PAIRS = LEVEL in ("bf16", "amx")  # whether this CPU has the instructions
BLOCK = 128  # columns that share a scale
ROWS = 16  # of a register
VECTOR = 4 * ROWS  # bytes
MOST_ROWS = 4 * ROWS  # of a panel: four registers, whose sums of four tokens are sixteen more
PANEL_BYTES = BLOCK // 2 * 4 * MOST_ROWS
BLOCK_BYTES = 2 * BLOCK  # of a token's activations


class BFloat(ir.Type):
    """LLVM's type bfloat, which llvmlite has no name for."""

    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


def _dot_pairs(e: Emitter, total: Lanes, x: Lanes, y: Lanes) -> Lanes:
    """total f32 [16] + bf16 [32] * bf16 [32], each two neighbours added; x and y are i32 [16]."""
    pairs = ir.VectorType(BFloat(), 2 * ROWS)
    x, y = (Lanes(e.b, e.b.bitcast(v.value, pairs)) for v in (x, y))
    return e._call("llvm.x86.avx512bf16.dpbf16ps.512", total.value.type, total, x, y)


# --- weights ------------------------------------------------------------------------------------------------


def _bytes_of_bf16() -> tuple[list[int], list[int]]:
    """The low and the high byte of the bfloat16 that each code without its sign stands for, 128 each."""
    with np.errstate(invalid="ignore"):
        bits = e4m3.TABLE[:128].astype(np.float32).view(np.uint32) >> 16
    return (bits & 0xFF).tolist(), (bits >> 8).tolist()


LOW, HIGH = _bytes_of_bf16()


def _look_up(e: Emitter, codes: Lanes, table: list[int]) -> Lanes:
    """The bytes of a table of 128 at the places that the lower seven bits of codes u8 [64] say."""
    halves = e.constant(I8, table[:64]), e.constant(I8, table[64:])
    return e._call("llvm.x86.avx512.vpermi2var.qi.512", codes.value.type, halves[0], codes, halves[1])


def _pairs_of_codes(e: Emitter, words: Lanes) -> list[Lanes]:
    """Four codes of each of 16 rows, i32 [16] -> two registers of pairs of bf16, i32 [16] each."""
    # Bytes are interleaved within quarters of a register, the lower eight of each with the lower eight. So
    # in each quarter the first two codes of four rows go to the lower half, the others to the upper one:
    #
    #     words    a0 a1 a2 a3 | b0 b1 b2 b3 | c0 ...           (row a, columns 0 to 3)
    #     codes    a0 a1 b0 b1 c0 c1 d0 d1 | a2 a3 b2 b3 ...
    #     low      one byte of each code's bfloat16             high     the other, with the sign
    #     result   low high of a0, of a1 | of b0, of b1 | ...   from the lower halves, then from the upper
    order = [
        16 * q + 4 * r + 2 * half + k for q in range(4) for half in (0, 1) for r in range(4) for k in (0, 1)
    ]
    codes = words.bits(I8, 64).take(order)
    low, high = _look_up(e, codes, LOW), _look_up(e, codes, HIGH) | (codes & 0x80)
    found = []
    for half in (0, 1):
        places = [16 * q + 8 * half + i for q in range(4) for i in range(8)]
        found.append(low.take([p for i in places for p in (i, 64 + i)], high).bits(I32, ROWS))
    return found


@intrinsic
def pack_pairs(typingctx, rows, row_bytes, count, columns, panel, step):
    """pack_pairs(rows, row_bytes, count, columns, panel, step) inside a Numba function: columns of up to 16
    rows of codes, `row_bytes` apart, to pairs at the address `panel`, a register each `step` bytes. In place
    of rows from `count` on the last is taken again; columns are a multiple of 16.
    """

    def codegen(context, b, signature, args):
        rows, row_bytes, count, columns, panel, step = args
        e, last = Emitter(b, LEVEL), b.sub(count, I64(1))
        places = [b.select(b.icmp_signed("<", I64(r), last), I64(r), last) for r in range(ROWS)]
        at = [e.at(rows, b.mul(place, row_bytes)) for place in places]

        def sixteen(i: ir.Value, nothing: list[Lanes]) -> list[Lanes]:
            words = e.words_at([e.at(row, b.mul(i, I64(16))) for row in at])
            to = e.at(panel, b.mul(b.mul(i, I64(8)), step))
            for j, pairs in enumerate(p for four in words for p in _pairs_of_codes(e, four)):
                e.store(pairs, e.at(to, b.mul(step, I64(j))))
            return nothing

        e.loop(b.sdiv(columns, I64(16)), [], sixteen)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 6), codegen


# --- products -----------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """Addresses of a block of columns."""

    panel: ir.Value
    acts: ir.Value  # bf16 [tokens, 128] of all tokens
    scales: ir.Value  # f32 [tokens] of all tokens
    scale: ir.Value  # f32 of the tile


def _sums(
    e: Emitter, of: Block, pairs: ir.Value, tokens: list[ir.Value], vectors: int, ahead: list[ir.Value]
) -> list[Lanes]:
    """Of so many pairs of columns: f32 [16] for each register of rows, all of the first token, ..."""
    b = e.b
    acts = [e.at(of.acts, b.mul(t, I64(BLOCK_BYTES))) for t in tokens]

    def pair(i: ir.Value, sums: list[Lanes]) -> list[Lanes]:
        at = e.at(of.panel, b.mul(i, I64(vectors * VECTOR)))
        weights = [e.load(e.at(at, VECTOR * v), I32, ROWS) for v in range(vectors)]
        # A row with each pair, so that memory is never asked for more than it delivers. A row's part of a
        # block begins anywhere in a line of 64 bytes, and so touches three.
        for line in range(0, BLOCK + 64, 64):
            e.prefetch(e.at(e.at(ahead[0], b.mul(ahead[1], i)), line))
        both = [e.splat(e.load(e.at(a, b.mul(i, I64(4))), I32), ROWS) for a in acts]
        factors = [(w, x) for x in both for w in weights]
        return [_dot_pairs(e, y, w, x) for y, (w, x) in zip(sums, factors)]

    return e.loop(pairs, [e.constant(F32, [0.0] * ROWS)] * (vectors * len(tokens)), pair)


@intrinsic(prefer_literal=True)
def multiply_pairs(typingctx, vectors, pairs, of, tokens, start, step, to, ahead):
    """multiply_pairs(vectors, pairs, (panel, acts, scales, scale), tokens, start, step, to, ahead) inside a
    Numba function: so many pairs of a `Block`, times those of two or four tokens with these numbers. The
    scaled sums and what is at `start`, f32 [16 * vectors], `step` bytes further for each token, go to the
    addresses `to`.

    `vectors` is a constant: of the panel. `ahead` says what is to be fetched meanwhile, a block's columns of
    as many rows as there are pairs: an address, and bytes from row to row.
    """
    if not isinstance(vectors, types.IntegerLiteral):
        return None

    def codegen(context, b, signature, args):
        _, pairs, of, tokens, start, step, to, ahead = args
        e, many, count = Emitter(b, LEVEL), signature.args[0].literal_value, signature.args[3].count
        tokens, to = ([b.extract_value(x, i) for i in range(count)] for x in (tokens, to))
        block = Block(*(b.extract_value(of, i) for i in range(4)))
        sums = _sums(e, block, pairs, tokens, many, [b.extract_value(ahead, i) for i in (0, 1)])
        scale = e.splat(e.load(block.scale, F32), ROWS)
        for i, t in enumerate(tokens):
            both = e.splat(e.load(e.at(block.scales, b.mul(t, I64(4))), F32), ROWS) * scale
            before = e.at(start, b.mul(step, I64(i)))
            for v, y in enumerate(sums[i * many : i * many + many]):
                total = e.fma(y, both, e.load(e.at(before, VECTOR * v), F32, ROWS))
                e.store(total, e.at(to[i], VECTOR * v))
        return context.get_dummy_value()

    two, four, each = (types.UniTuple(types.int64, n) for n in (2, 4, tokens.count))
    return types.none(vectors, types.int64, four, each, types.int64, types.int64, each, two), codegen


# --- activations --------------------------------------------------------------------------------------------


def _code_values(e: Emitter, x: Lanes) -> Lanes:
    """The E4M3 numbers nearest to x f32 [16], ties to even, as f32."""
    # Adding a power of two 2**20 above x's own, and taking it away again, leaves x rounded to three bits
    # behind the first, as float32 has 23. Below 2**-6 codes are 2**-9 apart, as there.
    bits = x.bits(I32, ROWS)
    power = (bits & 0x7F800000).umax(e.constant(I32, [(127 - 6) << 23] * ROWS)) + (20 << 23)
    shift = (power | (bits & 0x80000000)).bits(F32, ROWS)
    return (x + shift) - shift


def _largest(e: Emitter, x: ir.Value, count: ir.Value) -> ir.Value:
    """The largest of the bits without sign, i32, of f32 [16 * count] at an address: they order as numbers do,
    and infinity and NaN are above all.
    """
    b = e.b

    def vector(i: ir.Value, carried: list[Lanes]) -> list[Lanes]:
        bits = e.load(e.at(x, b.mul(i, I64(VECTOR))), I32, ROWS) & 0x7FFFFFFF
        return [carried[0].umax(bits)]

    (most,) = e.loop(count, [e.constant(I32, [0] * ROWS)], vector)
    return e._call(f"llvm.vector.reduce.umax.v{ROWS}i32", I32, most).value


def _scale_of(e: Emitter, most: ir.Value, power_of_two: bool) -> tuple[ir.Value, ir.Value]:
    """The scale of a group whose largest magnitude has these bits, f32, and what to divide by: infinity where
    the scale is zero. NaN where a number is not finite.
    """
    b = e.b
    scale = b.fdiv(b.bitcast(most, F32), F32(448.0))
    if power_of_two:
        bits = b.bitcast(scale, I32)
        more = b.zext(b.icmp_unsigned("!=", b.and_(bits, I32(0x7FFFFF)), I32(0)), I32)
        exponent = b.add(b.lshr(bits, I32(23)), more)
        exponent = b.select(b.icmp_unsigned(">", exponent, I32(1)), exponent, I32(1))
        scale = b.bitcast(b.shl(exponent, I32(23)), F32)
    finite = b.icmp_unsigned("<", most, I32(0x7F800000))
    scale = b.select(finite, scale, F32(float("nan")))
    return scale, b.select(b.fcmp_ordered("==", scale, F32(0.0)), F32(float("inf")), scale)


@intrinsic(prefer_literal=True)
def quantize_pairs(typingctx, power_of_two, x, columns, acts, scale):
    """quantize_pairs(power_of_two, x, columns, acts, scale) inside a Numba function: a group of up to 128
    activations f32 [columns] to the values of their E4M3 codes, bf16 [columns] at the address `acts`, and
    their scale, f32 at the address `scale`; as refimpl.fp8.act_quant.

    `power_of_two` is a constant, 1 for scales that are one; columns are a multiple of 32.
    """
    if not isinstance(power_of_two, types.IntegerLiteral):
        return None

    def codegen(context, b, signature, args):
        _, x, columns, acts, scale = args
        e = Emitter(b, LEVEL)
        most = _largest(e, x, b.sdiv(columns, I64(ROWS)))
        found, divisor = _scale_of(e, most, bool(signature.args[0].literal_value))
        e.store(e.splat(found, 1), scale)
        wide = e.splat(divisor, ROWS)

        def two(i: ir.Value, nothing: list[Lanes]) -> list[Lanes]:
            at = e.at(x, b.mul(i, I64(2 * VECTOR)))
            halves = [e.load(e.at(at, VECTOR * k), F32, ROWS) for k in (0, 1)]
            values = [_code_values(e, Lanes(b, b.fdiv(h.value, wide.value))) for h in halves]
            # A value of a code has nothing in the lower half of its float32.
            first, second = (v.bits(I16, 2 * ROWS) for v in values)
            e.store(first.take(range(1, 4 * ROWS, 2), second), e.at(acts, b.mul(i, I64(VECTOR))))
            return nothing

        e.loop(b.sdiv(columns, I64(2 * ROWS)), [], two)
        return context.get_dummy_value()

    return types.none(power_of_two, *[types.int64] * 4), codegen
