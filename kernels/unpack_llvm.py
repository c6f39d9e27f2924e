"""Reference: the `unpack` of each module of refimpl.formats named here: blocks of quantized weights as they
lie in a file, in registers.

Written in the language of `simd_llvm`, which says why: LLVM finds no vectors in loops over nibbles. For Q4_K
the ten lines of Numba are these, on B blocks:

    def q4_k_unpack(data, q):  # u8 [B, 144] -> u8 [B, 8, 32]
        for b in range(len(data)):
            for j in range(4):
                for i in range(32):
                    byte = data[b, 16 + 32 * j + i]
                    q[b, 2 * j, i], q[b, 2 * j + 1, i] = byte & 15, byte >> 4

Here 32 weights are one register, `byte & 15` one instruction for all of them, and a block goes straight to
the products of `dot_llvm` or `panel_llvm`. Bytes are drawn at each format.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from llvmlite import ir

from refimpl.formats import iq4_nl, iq4_xs, mxfp4, q2_k, q3_k, q4_k, q5_k, q6_k
from refimpl.kernels.simd_llvm import F32, I8, I16, I32, I64, Emitter, Lanes

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
    minimum for each 16 weights, in HALVES order. Where `mins` is None there are no minima, q is i8 with a
    sign, and `spread` is as `Emitter.signed_dot` wants it.
    """

    d: Lanes  # f32 [2]: d and dmin, in the order `d_at`
    spread: Callable[[int], Lanes]  # number of 32 weights -> their scales as `Emitter.scaled_dot` wants them
    q: list[Lanes]  # eight times u8 [32], in the order of the weights
    mins: Lanes | None  # i16 [16]: minima, or offset * scale where d serves for both
    d_at: tuple[int, int] = (0, 1)


# --- blocks of 256 ------------------------------------------------------------------------------------------


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


class Raw(NamedTuple):
    """A block's bytes by their offset; in `panel_llvm` a few bytes each of several rows. Only their order
    matters: `x & 15` does not care whose bytes x has.
    """

    e: Emitter
    bytes_at: Callable[[int], Lanes]  # the 32 bytes there
    nibbles_at: Callable[[int], Lanes]  # the 32 nibbles of the 16 bytes there: low ones, then high ones

    def __call__(self, offset: int) -> Lanes:
        return self.bytes_at(offset)


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


IQ4 = iq4_nl.VALUES.tolist()  # what quants of IQ4_XS and IQ4_NL stand for
IQ4_ABOVE = [v + 128 - 256 * (v >= 0) for v in IQ4]  # 128 more, up to 241, as bytes with a sign


def _iq4_xs_weights(raw: Raw, part: int) -> list[Lanes]:
    """Weights 32 part to 32 part + 31: u8 [32], up to 241, 128 above what they stand for."""
    #     byte 8 + 16 part + i    | high: weight 16 + i | low: weight i |
    return [raw.e.look_up(IQ4_ABOVE, raw.nibbles_at(8 + 16 * part))]


# For each format the parts of a block that are read for themselves, and the vectors u8 of 32 weights, in
# their order, of one part.
WEIGHTS: dict[int, tuple[int, Callable[[Raw, int], list[Lanes]]]] = {
    q2_k.GGML_TYPE: (2, _q2_k_weights),
    q3_k.GGML_TYPE: (2, _q3_k_weights),
    q4_k.GGML_TYPE: (4, _q4_k_weights),
    q5_k.GGML_TYPE: (4, _q5_k_weights),
    q6_k.GGML_TYPE: (2, _q6_k_weights),
    iq4_xs.GGML_TYPE: (8, _iq4_xs_weights),
}


def weights(e: Emitter, module, p: ir.Value) -> list[Lanes]:
    """All of the block at p: eight times u8 [32]."""
    parts, of_part = WEIGHTS[module.GGML_TYPE]
    raw = Raw(e, lambda at: e.load(e.at(p, at), I8, 32), lambda at: _both(e.load(e.at(p, at), I8, 16)))
    return [q for part in range(parts) for q in of_part(raw, part)]


def _both(x: Lanes) -> Lanes:
    """u8 [16] -> u8 [32]: all low nibbles, then all high ones."""
    return (x & 15).take(range(32), x >> 4)


def block_q4_k(e: Emitter, p: ir.Value, s: Lanes, spread: Callable[[int], Lanes]) -> Block:
    """The Q4_K block at p: 144 bytes, a scale and a minimum of six bits for each 32 weights.

    `s` and `spread` are from `ScalesAhead`.
    """
    return Block(e.halves_at(p), spread, weights(e, q4_k, p), _of_32(s, 8))


def block_q5_k(e: Emitter, p: ir.Value, s: Lanes, spread: Callable[[int], Lanes]) -> Block:
    """The Q5_K block at p: 176 bytes, as Q4_K with a fifth bit for each weight.

    `s` and `spread` are from `ScalesAhead`.
    """
    return Block(e.halves_at(p), spread, weights(e, q5_k, p), _of_32(s, 8))


def block_q6_k(e: Emitter, p: ir.Value) -> Block:
    """The Q6_K block at p: 210 bytes, an i8 scale for each 16 weights."""
    scales = e.load(e.at(p, 192), I8, 16).take(HALVES).sext(I16)
    # d stands in the block's last two bytes; with the two before them it is the second of the halves there.
    d = e.halves_at(e.at(p, 206))
    return Block(d, partial(e.spread, scales), weights(e, q6_k, p), scales * 32, (1, 1))


def block_q2_k(e: Emitter, p: ir.Value) -> Block:
    """The Q2_K block at p: 84 bytes, a scale and a minimum of four bits for each 16 weights."""
    s = e.load(p, I8, 16).take(HALVES)  # | minimum: 4 bits | scale: 4 bits |
    d = e.halves_at(e.at(p, 80))
    scales = (s & 15).zext(I16)
    return Block(d, partial(e.spread, scales), weights(e, q2_k, p), (s >> 4).zext(I16))


def block_q3_k(e: Emitter, p: ir.Value) -> Block:
    """The Q3_K block at p: 110 bytes, a scale of six bits for each 16 weights."""
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
    return Block(d, partial(e.spread, scales), weights(e, q3_k, p), scales * 4, (1, 1))


def block_iq4_xs(e: Emitter, p: ir.Value) -> Block:
    """The IQ4_XS block at p: 136 bytes, a scale of six bits for each 32 weights, quants that are places in a
    table.
    """
    # The bytes are drawn in refimpl.formats.iq4_xs: two high bits of each scale, then four low ones.
    high = e.splat(e.load(p, I32), 8) >> e.constant(I32, range(16, 32, 2))
    low = e.splat(e.load(e.at(p, 4), I32), 8) >> e.constant(I32, range(0, 32, 4))
    scales = (((low & 15) | ((high & 3) << 4)) - 32).trunc(I16).take([*range(8)] * 2)
    q = [e.look_up(IQ4, _both(e.load(e.at(p, at), I8, 16))) for at in range(8, 136, 16)]
    return Block(e.halves_at(p), partial(e.pairs, scales), q, None, (0, 0))


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


# --- blocks of 32: the halves of q as i8 [16] ---------------------------------------------------------------


def halves_q4_0(e: Emitter, p: ir.Value) -> list[Lanes]:
    """The Q4_0 block at p, 18 bytes -> its weights but for d, i8 [16] twice."""
    #     byte 2 + i    | high: weight 16 + i | low: weight i |
    x = e.load(e.at(p, 2), I8, 16)
    return [(x & 15) - 8, (x >> 4) - 8]


def halves_q5_0(e: Emitter, p: ir.Value) -> list[Lanes]:
    """The Q5_0 block at p, 22 bytes -> its weights but for d, i8 [16] twice."""
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


def halves_q8_0(e: Emitter, p: ir.Value) -> list[Lanes]:
    """The Q8_0 block at p, 34 bytes -> its weights but for d, i8 [16] twice."""
    return [e.load(e.at(p, 2), I8, 16), e.load(e.at(p, 18), I8, 16)]


def halves_iq4_nl(e: Emitter, p: ir.Value) -> list[Lanes]:
    """The IQ4_NL block at p, 18 bytes -> its weights but for d, i8 [16] twice."""
    return _halves_of_table(e, IQ4, e.at(p, 2))


def halves_mxfp4(e: Emitter, p: ir.Value) -> list[Lanes]:
    """The MXFP4 block at p, 17 bytes -> its weights but for the scale, i8 [16] twice."""
    return _halves_of_table(e, mxfp4.VALUES.tolist(), e.at(p, 1))


def _halves_of_table(e: Emitter, table: list[int], p: ir.Value) -> list[Lanes]:
    """What the nibbles of the 16 bytes at p stand for, i8 [16] twice."""
    #     byte i        | high: place of weight 16 + i | low: place of weight i |
    x = e.load(p, I8, 16)
    return [e.look_up(table, x & 15), e.look_up(table, x >> 4)]


def scale_mxfp4(e: Emitter, p: ir.Value) -> ir.Value:
    """The scale of the MXFP4 block at p, 2 ** (e - 128) of its first byte, a float32 scalar."""
    b, code = e.b, e.b.zext(e.load(p, I8), I32)
    # An exponent of float32 is 127 above what it stands for; 0 and 1 are subnormal, one bit of the mantissa.
    subnormal = b.shl(I32(1 << 21), b.and_(code, I32(1)))
    normal = b.shl(b.sub(code, I32(1)), I32(23))
    return b.bitcast(b.select(b.icmp_unsigned("<", code, I32(2)), subnormal, normal), F32)
