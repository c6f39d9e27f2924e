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

They take 29 times as long (docs/cpu-experts.md) and read seven times the bytes; a test holds the two to each
other. The kernel differs in three ways. Weights stay packed until they are in a register, where a block is
unpacked once, however many tokens there are, and each token then costs its products alone. Products are of
bytes, 32 in an instruction. And `low` needs sums of activations only, which are made once for all rows.
Integer parts are exact, and floats are added in one fixed order.

Activations come in three layouts, made in `linear_numba`:

    Q8_K    for Q2_K to Q6_K        blocks of 320 bytes
            byte 0            256                      288     292                       308     320
                 | q: i8 [256] | sums of 16: i16 [16]   | d: f32 | sums of 32: i16 [8]    | unused |
                                 in HALVES order                   for panel_llvm
    Q8_0    for Q4_0, Q5_0, Q8_0    blocks of 40 bytes
            byte 0           32      36       40
                 | q: i8 [32] | d: f32 | unused |
    floats  for E4M3, BF16 and F16  f32 side by side
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial, reduce
from typing import NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from refimpl.formats import bf16, f16, q2_k, q3_k, q4_0, q4_k, q5_0, q5_k, q6_k, q8_0
from refimpl.kernels.simd_llvm import F32, I8, I16, I32, I64, WORDS, Emitter, Lanes, choose

LEVEL = choose()
E4M3 = 256  # beside ggml's type numbers
Q8_K_BYTES, Q8_0_BYTES = 320, 40
# Bytes: how far before their use weights are asked for, beyond what the CPU guesses by itself.
AHEAD = 1 << 14
NIBBLES = 0x0F0F0F0F

# The order in which scales, minima and sums of groups of 16 stand in a register:
#
#     group of 16        0   1 | 2   3 | 4   5 | ...  | 14  15          two groups are 32 weights, one load
#     HALVES             0 2 4 6 8 10 12 14  |  1 3 5 7 9 11 13 15
#     lane               0 1 2 3 4  5  6  7  |  8 9 .    .    .  15
#
# The scales of load g are lanes g and 8 + g, each in the half of the register where its weights lie: one
# shuffle inside halves spreads both.
HALVES = (*range(0, 16, 2), *range(1, 16, 2))


class Block(NamedTuple):
    """256 weights in registers: w[i] = d * scale * (q[i] - offset) - dmin * minimum, with a scale and a
    minimum for each 16 weights, in HALVES order.
    """

    d: Lanes  # f32 [2]: d and dmin, in the order `d_at`
    spread: Callable[[int], Lanes]  # number of 32 weights -> their scales as `Emitter.scaled_dot` wants them
    q: list[Lanes]  # eight times u8 [32], in the order of the weights
    mins: Lanes  # i16 [16]: minima, or offset * scale where d serves for both
    d_at: tuple[int, int] = (0, 1)


# What multiplies a row: (emitter, address of the row, address of its tile scales, columns, addresses of the
# tokens' activations, bytes to prefetch ahead) -> a float32 for each token.
Dot = Callable[[Emitter, ir.Value, ir.Value, ir.Value, list[ir.Value], ir.Value], list[ir.Value]]


# --- blocks of 256, by format: the references' `unpack` in registers ----------------------------------------


def _of_32(x: Lanes, first: int) -> Lanes:
    """The eight bytes of x from lane `first` on, one for each 32 weights -> i16 [16], in HALVES order."""
    return x.take([*range(first, first + 8)] * 2).zext(I16)


def _six_bits(e: Emitter, p: ir.Value) -> Lanes:
    """The 12 bytes of Q4_K and Q5_K at an address -> u8 [16]: eight scales, then eight minima."""
    # Letters are the bits of scales A..H and minima a..h, as in refimpl.formats._blocks.unpack_scales; a row
    # is a word of 32 bits, its first byte on the left:
    #
    #     x[0]   EEAAAAAA FFBBBBBB GGCCCCCC HHDDDDDD
    #     x[1]   eeaaaaaa ffbbbbbb ggcccccc hhdddddd
    #     x[2]   eeeeEEEE ffffFFFF ggggGGGG hhhhHHHH
    #
    #     low    x[0] & 63 | x[2] & 15       | x[1] & 63 | x[2] >> 4 & 15
    #     high       0     | x[0] >> 2 & 48  |     0     | x[1] >> 2 & 48
    #     or        A..D   |      E..H       |    a..d   |      e..h
    x = e.load(p, I32, 4)  # the fourth is not used
    low = (x.take([0, 2, 1, 2]) >> e.constant(I32, [0, 0, 0, 4])) & e.constant(I32, [0x3F3F3F3F, NIBBLES] * 2)
    high = (x.take([0, 0, 1, 1]) >> 2) & e.constant(I32, [0, 0x30303030] * 2)
    return (low | high).bits(I8, 16)


# Byte offset in a block -> the 32 bytes there; in `panel_llvm` a few bytes each of several rows. Only their
# order matters: `x & 15` does not care whose bytes x has.
Raw = Callable[[int], Lanes]


def _q4_k_weights(raw: Raw, part: int) -> list[Lanes]:
    """Weights 64 part to 64 part + 63: twice u8 [32], up to 15."""
    #     byte 32 part + i    | high: weight 32 + i | low: weight i |
    x = raw(16 + 32 * part)
    return [x & 15, x >> 4]


def _q5_k_weights(raw: Raw, part: int) -> list[Lanes]:
    """Weights 64 part to 64 part + 63: twice u8 [32], up to 31."""
    # Nibbles as in Q4_K; bit j of the i-th of 32 bytes before them is the fifth of weight 32 j + i.
    x = raw(48 + 32 * part)
    fifth = raw(16)
    return [(x & 15) | (((fifth >> 2 * part) & 1) << 4), (x >> 4) | (((fifth >> 2 * part + 1) & 1) << 4)]


def _q6_k_weights(raw: Raw, part: int) -> list[Lanes]:
    """Weights 128 part to 128 part + 127: four times u8 [32], up to 63, 32 above what they stand for."""
    #     first[i]     | high: 64 + i  | low: i       |          four low bits of weight ...
    #     second[i]    | high: 96 + i  | low: 32 + i  |
    #     high[i]      | 96 + i | 64 + i | 32 + i | i |          two high bits of weight ...
    first = raw(64 * part)
    second = raw(64 * part + 32)
    high = raw(128 + 32 * part)
    low = [first & 15, second & 15, first >> 4, second >> 4]
    return [x | (((high >> 2 * plane) & 3) << 4) for plane, x in enumerate(low)]


def _q2_k_weights(raw: Raw, part: int) -> list[Lanes]:
    """Weights 128 part to 128 part + 127: four times u8 [32], up to 3."""
    #     x[i]         | 96 + i | 64 + i | 32 + i | i |          two bits of weight ...
    x = raw(16 + 32 * part)
    return [(x >> 2 * plane) & 3 for plane in range(4)]


def _q3_k_weights(raw: Raw, part: int) -> list[Lanes]:
    """Weights 128 part to 128 part + 127: four times u8 [32], up to 7, 4 above what they stand for."""
    # Two bits as in Q2_K; bit j of the i-th of the block's first 32 bytes is the third of weight 32 j + i.
    x = raw(32 + 32 * part)
    third = raw(0)
    return [((x >> 2 * plane) & 3) | (((third >> 4 * part + plane) & 1) << 2) for plane in range(4)]


# For each format the parts of a block that are read for themselves, and the vectors u8 of 32 weights, in
# their order, of one part.
WEIGHTS: dict[int, tuple[int, Callable[[Raw, int], list[Lanes]]]] = {
    q2_k.GGML_TYPE: (2, _q2_k_weights),
    q3_k.GGML_TYPE: (2, _q3_k_weights),
    q4_k.GGML_TYPE: (4, _q4_k_weights),
    q5_k.GGML_TYPE: (4, _q5_k_weights),
    q6_k.GGML_TYPE: (2, _q6_k_weights),
}


def _weights(e: Emitter, module, p: ir.Value) -> list[Lanes]:
    """All of the block at p: eight times u8 [32]."""
    parts, of_part = WEIGHTS[module.GGML_TYPE]
    return [q for part in range(parts) for q in of_part(lambda offset: e.load(e.at(p, offset), I8, 32), part)]


def _q4_k(e: Emitter, p: ir.Value, s: Lanes, spread: Callable[[int], Lanes]) -> Block:
    return Block(e.halves_at(p), spread, _weights(e, q4_k, p), _of_32(s, 8))


def _q5_k(e: Emitter, p: ir.Value, s: Lanes, spread: Callable[[int], Lanes]) -> Block:
    return Block(e.halves_at(p), spread, _weights(e, q5_k, p), _of_32(s, 8))


def _q6_k(e: Emitter, p: ir.Value) -> Block:
    scales = e.load(e.at(p, 192), I8, 16).take(HALVES).sext(I16)
    # d stands in the block's last two bytes; with the two before them it is the second of the halves there.
    d = e.halves_at(e.at(p, 206))
    return Block(d, partial(e.spread, scales), _weights(e, q6_k, p), scales * 32, (1, 1))


def _q2_k(e: Emitter, p: ir.Value) -> Block:
    s = e.load(p, I8, 16).take(HALVES)  # | minimum: 4 bits | scale: 4 bits |
    d = e.halves_at(e.at(p, 80))
    scales = (s & 15).zext(I16)
    return Block(d, partial(e.spread, scales), _weights(e, q2_k, p), (s >> 4).zext(I16))


def _q3_k(e: Emitter, p: ir.Value) -> Block:
    # Letters are the bits of scales A..P; a row is a word, its first byte on the left, as in
    # refimpl.formats.q3_k:
    #
    #     word at 96    IIIIAAAA JJJJBBBB KKKKCCCC LLLLDDDD         low    A..D | E..H | I..L | M..P
    #     word at 100   MMMMEEEE NNNNFFFF OOOOGGGG PPPPHHHH         high, shifted by 0, 2, 4, 6:
    #     word at 104   MMIIEEAA NNJJFFBB OOKKGGCC PPLLHHDD                A..D | E..H | I..L | M..P
    low = (e.load(e.at(p, 96), I32, 2).take([0, 1, 0, 1]) >> e.constant(I32, [0, 0, 4, 4])) & NIBBLES
    high = (e.splat(e.load(e.at(p, 104), I32), 4) >> e.constant(I32, [0, 2, 4, 6])) & 0x03030303
    scales = (low | (high << 4)).bits(I8, 16).take(HALVES).zext(I16) - 32
    d = e.halves_at(e.at(p, 106))  # the second of the two, as in Q6_K
    return Block(d, partial(e.spread, scales), _weights(e, q3_k, p), scales * 4, (1, 1))


class ScalesAhead:
    """Q4_K's and Q5_K's scales, unpacked a block early and put into memory, from where a load spreads each
    over a register.

    Without `vpdpwssd` to feed, a shuffle does as well. It would here too, but for waiting its turn with the
    products; and a load that comes too soon after the store waits longer than that, so there are two places,
    used in turns.
    """

    def __init__(self, e: Emitter, w: ir.Value, nbytes: int, blocks: ir.Value):
        """For the row at w of `blocks` blocks of `nbytes` bytes."""
        self.e = e
        self.w = w
        self.nbytes = nbytes
        self.last = e.b.sub(blocks, I64(1))
        self.places = e.stack_memory(64)

    def unpack(self, i: ir.Value) -> Lanes:
        """Scales and minima u8 [16] of block i, or of the last block where there is no i-th."""
        b = self.e.b
        i = b.select(b.icmp_signed("<", i, self.last), i, self.last)
        s = _six_bits(self.e, self.e.at(self.w, b.add(b.mul(i, I64(self.nbytes)), I64(4))))
        if self.e.vnni:
            self.e.store(s.take(range(8)).zext(I32), self._place(i))
        return s

    def spread(self, i: ir.Value, s: Lanes) -> Callable[[int], Lanes]:
        """Number of 32 weights -> their scale of block i, as `Emitter.scaled_dot` wants it. `s` is what
        `unpack` gave for the block.
        """
        e = self.e
        if not e.vnni:
            return partial(e.spread, _of_32(s, 0))
        return lambda group: e.splat(e.load(e.at(self._place(i), 4 * group), I32), 8).bits(I16, 16)

    def _place(self, i: ir.Value) -> ir.Value:
        """The address of block i's eight scales, i32."""
        return self.e.at(self.places, self.e.b.mul(self.e.b.and_(i, I64(1)), I64(32)))


def _q8_k_dot(unpack: Callable[..., Block], nbytes: int) -> Dot:
    """The product of a row of blocks of 256 weights, `nbytes` long, and activations in Q8_K."""

    def dot(
        e: Emitter, w: ir.Value, scale: ir.Value, columns: ir.Value, tokens: list[ir.Value], ahead: ir.Value
    ) -> list[ir.Value]:
        b = e.b
        blocks = b.sdiv(columns, I64(256))
        early = ScalesAhead(e, w, nbytes, blocks) if unpack in (_q4_k, _q5_k) else None

        def block(i: ir.Value, carried: list[Lanes]) -> list[Lanes]:
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
    chains = 2 if len(acts) == 1 else 1  # of additions that wait for each other
    dots = [[e.constant(I32, [0] * 8)] * len(acts) for _ in range(chains)]
    for group, q in enumerate(x.q):
        chain = dots[group % chains]
        spread = x.spread(group)
        chain[:] = e.in_order(
            [e.scaled_dot(y, q, e.load(e.at(a, 32 * group), I8, 32), spread) for y, a in zip(chain, acts)]
        )
    return [reduce(operator.add, y) for y in zip(*dots)]


def _add_block(e: Emitter, x: Block, a: ir.Value, dots: Lanes, total: Lanes) -> Lanes:
    """total f32 [8] + what the block and the Q8_K block at `a` add to it; `dots` i32 [8] from
    `_scaled_dots`.
    """
    low = e.madd(x.mins, e.load(e.at(a, 256), I16, 16))  # minima times sums of 16
    d = x.d * e.splat(e.load(e.at(a, 288), F32), 2)
    first, second = (d.take([i] * 8) for i in x.d_at)
    if x.d_at[0] == x.d_at[1]:  # without minima of its own: one scale, and the integers subtract exactly
        return e.fma(first, (dots - low).floats(), total)
    return e.fma(second.negative(), low.floats(), e.fma(first, dots.floats(), total))


# --- blocks of 32: the halves of q as i8 [16] ---------------------------------------------------------------


def _q4_0(e: Emitter, p: ir.Value) -> list[Lanes]:
    #     byte 2 + i    | high: weight 16 + i | low: weight i |
    x = e.load(e.at(p, 2), I8, 16)
    return [(x & 15) - 8, (x >> 4) - 8]


def _q5_0(e: Emitter, p: ir.Value) -> list[Lanes]:
    # Nibbles as in Q4_0, from byte 6 on; bit i of the 32 at byte 2 is the fifth of weight i, and where it is
    # missing 16 is taken away. Lane i tests bit i % 8 of byte i // 8:
    #
    #     lanes       0 1 2 3 4 5 6 7 | 8 9 ...  15
    #     fifth[..]   0 0 0 0 0 0 0 0 | 1 1 ...   1      and of bytes 2 and 3 for weights 16 to 31
    #     & 1 <<      0 1 2 3 4 5 6 7 | 0 1 ...   7
    x = e.load(e.at(p, 6), I8, 16)
    fifth = e.load(e.at(p, 2), I8, 4)
    missing = [
        (fifth.take([at] * 8 + [at + 1] * 8) & e.constant(I8, [1 << i for i in range(8)] * 2)).equals(0)
        for at in (0, 2)
    ]
    sixteens = [m.where(e.constant(I8, [-16] * 16), e.constant(I8, [0] * 16)) for m in missing]
    return [(x & 15) + sixteens[0], (x >> 4) + sixteens[1]]


def _q8_0(e: Emitter, p: ir.Value) -> list[Lanes]:
    return [e.load(e.at(p, 2), I8, 16), e.load(e.at(p, 18), I8, 16)]


def _q8_0_dot(unpack: Callable[[Emitter, ir.Value], list[Lanes]], nbytes: int) -> Dot:
    """The product of a row of blocks of 32 weights, `nbytes` long, and activations in Q8_0."""

    def dot(
        e: Emitter, w: ir.Value, scale: ir.Value, columns: ir.Value, tokens: list[ir.Value], ahead: ir.Value
    ) -> list[ir.Value]:
        b = e.b

        def block(i: ir.Value, totals: list[Lanes]) -> list[Lanes]:
            p = e.at(w, b.mul(i, I64(nbytes)))
            d = e.half_at(p)
            low, high = (q.sext(I16) for q in unpack(e, p))  # i16 [16] each
            after = []
            for t, total in zip(tokens, totals):
                a = e.at(t, b.mul(i, I64(Q8_0_BYTES)))
                first = e.madd(low, e.load(a, I8, 16).sext(I16))
                dots = first + e.madd(high, e.load(e.at(a, 16), I8, 16).sext(I16))  # i32 [8]
                after.append(e.fma(e.splat(b.fmul(d, e.load(e.at(a, 32), F32)), 8), dots.floats(), total))
            return after

        zeros = [e.constant(F32, [0.0] * 8)] * len(tokens)
        return [e.total(t) for t in e.loop(b.sdiv(columns, I64(32)), zeros, block)]

    return dot


# --- floats: 32 weights at a time, sums of 128 columns times the tile's scale -------------------------------


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


def _float_dot(decode: Callable, nbytes: int, factor: float | None) -> Dot:
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
            """The sums of a tile times its scale, onto the totals."""
            sums = [reduce(operator.add, parts[t * chains : (t + 1) * chains]) for t in range(count)]
            if factor is None:
                return [total + s for total, s in zip(totals, sums)]
            s = e.splat(e.load(e.at(scale, b.mul(tile, I64(4))), F32), n)
            return [e.fma(x * factor, s, total) for total, x in zip(totals, sums)]

        def tile(i: ir.Value, carried: list[Lanes]) -> list[Lanes]:
            """128 columns in one piece."""
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
    """What stores a row of floats as float32; arguments as `_float_dot`."""

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


def _0(module, unpack: Callable[[Emitter, ir.Value], list[Lanes]]) -> tuple[int, Kind]:
    """The row of a format of 32 weights in KINDS."""
    return module.GGML_TYPE, Kind("q8_0", 32, _q8_0_dot(unpack, module.BLOCK.itemsize))


# Formats of floats: what decodes 32 of them, bytes of one, and the factor for `_float_dot`.
FLOATS = {E4M3: (_e4m3, 1, 2.0**8), bf16.GGML_TYPE: (_bf16, 2, None), f16.GGML_TYPE: (_f16, 2, None)}
DECODERS = {number: _float_decoder(*how) for number, how in FLOATS.items()}


KINDS: dict[int, Kind] = dict(
    (
        *(_k(q2_k, _q2_k), _k(q3_k, _q3_k), _k(q4_k, _q4_k), _k(q5_k, _q5_k), _k(q6_k, _q6_k)),
        *(_0(q4_0, _q4_0), _0(q5_0, _q5_0), _0(q8_0, _q8_0)),
        *((number, Kind("f32", 32, _float_dot(*how))) for number, how in FLOATS.items()),
    )
)


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


@intrinsic(prefer_literal=True)
def dot(typingctx, kind, w, scale, columns, tokens, ahead):
    """dot(kind, w, scale, columns, tokens, ahead) inside a Numba function: a row at address w with the
    activations at the addresses `tokens`.

    `kind` is a constant of KINDS; `scale` the address of the row's f32 tile scales (E4M3 only); what lies
    `ahead` bytes behind each weight is fetched meanwhile. Returns a tuple of float32, one a token.
    """
    if not isinstance(kind, types.IntegerLiteral) or not isinstance(tokens, types.UniTuple):
        return None
    result = types.UniTuple(types.float32, tokens.count)

    def codegen(context, b, signature, args):
        _, w, scale, columns, tokens, ahead = args
        addresses = [b.extract_value(tokens, i) for i in range(result.count)]
        sums = KINDS[kind.literal_value].dot(Emitter(b, LEVEL), w, scale, columns, addresses, ahead)
        return context.make_tuple(b, result, sums)

    addresses = types.UniTuple(types.int64, tokens.count)
    return result(kind, types.int64, types.int64, types.int64, addresses, types.int64), codegen
