"""Reference: one output of refimpl.reference.packed.linear and refimpl.fp8.linear, the product of a weight
row and a few tokens' activations.

`dot` reads the row as it lies in the file. A block is unpacked into registers once, however many tokens there
are; each token then costs its products alone. Integer parts are exact, and floats are added in one fixed
order. Activations come in three layouts, made in `linear_numba`:

    Q8_K    for Q2_K to Q6_K   blocks of 320 bytes:  q i8 [256] | sums of 16 q, i16 [16], in HALVES order | d
    f32 | unused
    Q8_0    for Q4_0 Q5_0 Q8_0 blocks of 40 bytes:   q i8 [32] | d f32 | unused
    floats  for E4M3, BF16 and F16                   float32
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
from refimpl.kernels.cpu_simd import F32, I8, I16, I32, I64, WORDS, Emitter, Lanes, choose

LEVEL = choose()
E4M3 = 256  # beside ggml's type numbers
Q8_K_BYTES, Q8_0_BYTES = 320, 40
AHEAD = (
    1 << 14
)  # bytes: how far before their use weights are asked for, beyond what the CPU guesses by itself
NIBBLES = 0x0F0F0F0F
HALVES = (
    *range(0, 16, 2),
    *range(1, 16, 2),
)  # what is of the first 16 weights of each 32, then what is of the others


class Block(NamedTuple):
    """w[i] = d * scale * (q[i] - offset) - dmin * minimum, with a scale and a minimum for each 16 weights, in
    HALVES order.
    """

    d: Lanes  # f32 [2]: d and dmin, in the order `d_at`
    spread: Callable[[int], Lanes]  # the scales of 32 weights as `Emitter.scaled_dot` wants them
    q: list[Lanes]  # eight times u8 [32], in the order of the weights
    mins: Lanes  # i16 [16]: minima, or offset * scale where d serves for both
    d_at: tuple[int, int] = (0, 1)


# --- blocks of 256, by format: the references' `unpack` in registers ----------------------------------------


def _of_32(x: Lanes, start: int) -> Lanes:
    """Eight bytes, one for 32 weights -> i16 [16]."""
    return x.take([*range(start, start + 8)] * 2).zext(I16)


def _six_bits(e: Emitter, p: ir.Value) -> Lanes:
    """The 12 bytes of Q4_K and Q5_K -> u8 [16], eight scales and eight minima. Drawn in
    refimpl.formats._blocks.unpack_scales.
    """
    x = e.load(p, I32, 4)  # the fourth is not used
    low = (x.take([0, 2, 1, 2]) >> e.constant(I32, [0, 0, 0, 4])) & e.constant(I32, [0x3F3F3F3F, NIBBLES] * 2)
    high = (x.take([0, 0, 1, 1]) >> 2) & e.constant(I32, [0, 0x30303030] * 2)
    return (low | high).bits(I8, 16)


Raw = Callable[
    [int], Lanes
    # byte offset in a block -> the 32 bytes there, or of several rows a few of them each: only their order
    # matters
]


def _q4_k_weights(raw: Raw, part: int) -> list[Lanes]:
    x = raw(16 + 32 * part)
    return [x & 15, x >> 4]


def _q5_k_weights(raw: Raw, part: int) -> list[Lanes]:
    x, fifth = raw(48 + 32 * part), raw(16)
    return [(x & 15) | (((fifth >> 2 * part) & 1) << 4), (x >> 4) | (((fifth >> 2 * part + 1) & 1) << 4)]


def _q6_k_weights(raw: Raw, part: int) -> list[Lanes]:
    first, second, high = raw(64 * part), raw(64 * part + 32), raw(128 + 32 * part)
    low = [first & 15, second & 15, first >> 4, second >> 4]
    return [x | (((high >> 2 * plane) & 3) << 4) for plane, x in enumerate(low)]


def _q2_k_weights(raw: Raw, part: int) -> list[Lanes]:
    x = raw(16 + 32 * part)
    return [(x >> 2 * plane) & 3 for plane in range(4)]


def _q3_k_weights(raw: Raw, part: int) -> list[Lanes]:
    x, third = raw(32 + 32 * part), raw(0)
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
    parts, of_part = WEIGHTS[module.GGML_TYPE]
    return [q for part in range(parts) for q in of_part(lambda offset: e.load(e.at(p, offset), I8, 32), part)]


def _q4_k(e: Emitter, p: ir.Value, s: Lanes, spread: Callable[[int], Lanes]) -> Block:
    return Block(e.halves_at(p), spread, _weights(e, q4_k, p), _of_32(s, 8))


def _q5_k(e: Emitter, p: ir.Value, s: Lanes, spread: Callable[[int], Lanes]) -> Block:
    return Block(e.halves_at(p), spread, _weights(e, q5_k, p), _of_32(s, 8))


def _q6_k(e: Emitter, p: ir.Value) -> Block:
    scales = e.load(e.at(p, 192), I8, 16).take(HALVES).sext(I16)
    return Block(
        e.halves_at(e.at(p, 206)), partial(e.spread, scales), _weights(e, q6_k, p), scales * 32, (1, 1)
    )


def _q2_k(e: Emitter, p: ir.Value) -> Block:
    s = e.load(p, I8, 16).take(HALVES)
    return Block(
        e.halves_at(e.at(p, 80)),
        partial(e.spread, (s & 15).zext(I16)),
        _weights(e, q2_k, p),
        (s >> 4).zext(I16),
    )


def _q3_k(e: Emitter, p: ir.Value) -> Block:
    low = (e.load(e.at(p, 96), I32, 2).take([0, 1, 0, 1]) >> e.constant(I32, [0, 0, 4, 4])) & NIBBLES
    high = (e.splat(e.load(e.at(p, 104), I32), 4) >> e.constant(I32, [0, 2, 4, 6])) & 0x03030303
    scales = (low | (high << 4)).bits(I8, 16).take(HALVES).zext(I16) - 32
    return Block(
        e.halves_at(e.at(p, 106)), partial(e.spread, scales), _weights(e, q3_k, p), scales * 4, (1, 1)
    )


class Early:
    """Q4_K's and Q5_K's scales, unpacked a block early and put into memory, from where a load spreads each
    over a register.

    Without `vpdpwssd` to feed, a shuffle does as well. It would here too, but for waiting its turn with the
    products; and a load that comes too soon after the store waits longer than that, so there are two places,
    used in turns.
    """

    def __init__(self, e: Emitter, w: ir.Value, nbytes: int, blocks: ir.Value):
        self.e, self.w, self.nbytes, self.last = e, w, nbytes, e.b.sub(blocks, I64(1))
        self.places = e.room(64)

    def unpack(self, i: ir.Value) -> Lanes:
        """Scales and minima u8 [16] of block i, or of the last."""
        b = self.e.b
        i = b.select(b.icmp_signed("<", i, self.last), i, self.last)
        s = _six_bits(self.e, self.e.at(self.w, b.add(b.mul(i, I64(self.nbytes)), I64(4))))
        if self.e.vnni:
            self.e.store(s.take(range(8)).zext(I32), self._place(i))
        return s

    def spread(self, i: ir.Value, s: Lanes) -> Callable[[int], Lanes]:
        """Of block i."""
        if not self.e.vnni:
            return partial(self.e.spread, _of_32(s, 0))
        return lambda group: self.e.splat(self.e.load(self.e.at(self._place(i), 4 * group), I32), 8).bits(
            I16, 16
        )

    def _place(self, i: ir.Value) -> ir.Value:
        return self.e.at(self.places, self.e.b.mul(self.e.b.and_(i, I64(1)), I64(32)))


def _q8_k_dot(unpack: Callable[..., Block], nbytes: int):
    def dot(
        e: Emitter, w: ir.Value, scale: ir.Value, columns: ir.Value, tokens: list[ir.Value], ahead: ir.Value
    ) -> list[ir.Value]:
        b, blocks = e.b, e.b.sdiv(columns, I64(256))
        early = Early(e, w, nbytes, blocks) if unpack in (_q4_k, _q5_k) else None

        def block(i: ir.Value, carried: list[Lanes]) -> list[Lanes]:
            totals, s = carried[: len(tokens)], carried[len(tokens) :]
            p = e.at(w, b.mul(i, I64(nbytes)))
            for offset in range(0, nbytes, 64):
                e.prefetch(e.at(e.at(p, ahead), offset))
            x = unpack(e, p, s[0], early.spread(i, s[0])) if early else unpack(e, p)
            then = [early.unpack(b.add(i, I64(1)))] if early else []
            acts = [e.at(t, b.mul(i, I64(Q8_K_BYTES))) for t in tokens]
            return [
                *(
                    _add_block(e, x, a, y, total)
                    for a, y, total in zip(acts, _scaled_dots(e, x, acts), totals)
                ),
                *then,
            ]

        carried = [*[e.constant(F32, [0.0] * 8)] * len(tokens), *([early.unpack(I64(0))] if early else [])]
        return [e.total(t) for t in e.loop(blocks, carried, block)[: len(tokens)]]

    return dot


def _scaled_dots(e: Emitter, x: Block, acts: list[ir.Value]) -> list[Lanes]:
    """i32 [8] for each token, to be added up: scale * q * activation."""
    chains = 2 if len(acts) == 1 else 1  # of additions that wait for each other
    dots = [[e.constant(I32, [0] * 8)] * len(acts) for _ in range(chains)]
    for group, q in enumerate(x.q):
        now, spread = dots[group % chains], x.spread(group)
        now[:] = e.in_order(
            [e.scaled_dot(y, q, e.load(e.at(a, 32 * group), I8, 32), spread) for y, a in zip(now, acts)]
        )
    return [reduce(operator.add, y) for y in zip(*dots)]


def _add_block(e: Emitter, x: Block, a: ir.Value, dots: Lanes, total: Lanes) -> Lanes:
    low = e.madd(x.mins, e.load(e.at(a, 256), I16, 16))
    d = x.d * e.splat(e.load(e.at(a, 288), F32), 2)
    first, second = (d.take([i] * 8) for i in x.d_at)
    if x.d_at[0] == x.d_at[1]:
        return e.fma(first, (dots - low).floats(), total)
    return e.fma(second.negative(), low.floats(), e.fma(first, dots.floats(), total))


# --- blocks of 32: the halves of q as i8 [16] ---------------------------------------------------------------


def _q4_0(e: Emitter, p: ir.Value) -> list[Lanes]:
    x = e.load(e.at(p, 2), I8, 16)
    return [(x & 15) - 8, (x >> 4) - 8]


def _q5_0(e: Emitter, p: ir.Value) -> list[Lanes]:
    x, fifth = e.load(e.at(p, 6), I8, 16), e.load(e.at(p, 2), I8, 4)
    missing = [
        (fifth.take([at] * 8 + [at + 1] * 8) & e.constant(I8, [1 << i for i in range(8)] * 2)).equals(0)
        for at in (0, 2)
    ]
    sixteens = [m.where(e.constant(I8, [-16] * 16), e.constant(I8, [0] * 16)) for m in missing]
    return [(x & 15) + sixteens[0], (x >> 4) + sixteens[1]]


def _q8_0(e: Emitter, p: ir.Value) -> list[Lanes]:
    return [e.load(e.at(p, 2), I8, 16), e.load(e.at(p, 18), I8, 16)]


def _q8_0_dot(unpack: Callable[[Emitter, ir.Value], list[Lanes]], nbytes: int):
    def dot(
        e: Emitter, w: ir.Value, scale: ir.Value, columns: ir.Value, tokens: list[ir.Value], ahead: ir.Value
    ) -> list[ir.Value]:
        b = e.b

        def block(i: ir.Value, totals: list[Lanes]) -> list[Lanes]:
            p = e.at(w, b.mul(i, I64(nbytes)))
            d, (low, high) = e.half_at(p), (q.sext(I16) for q in unpack(e, p))
            after = []
            for t, total in zip(tokens, totals):
                a = e.at(t, b.mul(i, I64(Q8_0_BYTES)))
                dots = e.madd(low, e.load(a, I8, 16).sext(I16)) + e.madd(
                    high, e.load(e.at(a, 16), I8, 16).sext(I16)
                )
                after.append(e.fma(e.splat(b.fmul(d, e.load(e.at(a, 32), F32)), 8), dots.floats(), total))
            return after

        return [
            e.total(t)
            for t in e.loop(b.sdiv(columns, I64(32)), [e.constant(F32, [0.0] * 8)] * len(tokens), block)
        ]

    return dot


# --- floats: 32 weights at a time, sums of 128 columns times the tile's scale -------------------------------


def _e4m3(e: Emitter, p: ir.Value) -> tuple[list[Lanes], Lanes]:
    """Weights, and the codes without their sign, of which 0x7F is NaN.

    S EEEE MMM are the bits of the half S 0EEEE MMM0000000 but for the bias of the exponent: weights are 2**-8
    of what they stand for (`_float_dot` makes up for it). Without an instruction for halves it is the same
    with floats, whose bias differs by 120.
    """
    n = WORDS[e.level]
    codes = [e.load(e.at(p, at), I8, n) for at in range(0, 32, n)]
    if e.level == "generic":
        weights = [((c.sext(I32) << 20) & 0x87F00000).bits(F32, n) * 2.0**112 for c in codes]
    else:
        weights = [e.half((c.sext(I16) << 7) & 0xBF80) for c in codes]
    return weights, e.load(p, I8, 32) & 0x7F


def _bf16(e: Emitter, p: ir.Value) -> tuple[list[Lanes], None]:
    n = WORDS[e.level]
    return [(e.load(e.at(p, at), I16, n).zext(I32) << 16).bits(F32, n) for at in range(0, 64, 2 * n)], None


def _f16(e: Emitter, p: ir.Value) -> tuple[list[Lanes], None]:
    n = WORDS[e.level]
    return [e.half(e.load(e.at(p, at), I16, n)) for at in range(0, 64, 2 * n)], None


def _float_dot(decode: Callable, nbytes: int, factor: float | None):
    """`factor` is for formats with tile scales: what it takes to make weights right. `columns` must be a
    multiple of 32.
    """

    def dot(
        e: Emitter, w: ir.Value, scale: ir.Value, columns: ir.Value, tokens: list[ir.Value], ahead: ir.Value
    ) -> list[ir.Value]:
        b, n, count = e.b, WORDS[e.level], len(tokens)
        chains = 4 if count == 1 else 2  # sums of a token, for additions not to wait for each other
        zeros, clean = [e.constant(F32, [0.0] * n)] * count, e.constant(I8, [0] * 32)
        nothing = [*zeros * chains, clean]

        def step(start: ir.Value, carried: list[Lanes], first: int = 0) -> list[Lanes]:
            *parts, worst = carried
            weights, sizes = decode(e, e.at(w, b.mul(start, I64(nbytes))))
            for i, x in enumerate(weights):
                at, chain = b.mul(b.add(start, I64(n * i)), I64(4)), (first + i) % chains
                parts[chain::chains] = e.in_order(
                    [e.fma(x, e.load(e.at(t, at), F32, n), y) for t, y in zip(tokens, parts[chain::chains])]
                )
            return [*parts, worst if sizes is None else worst.umax(sizes)]

        def finish(tile: ir.Value, totals: list[Lanes], parts: list[Lanes]) -> list[Lanes]:
            sums = [reduce(operator.add, parts[t * chains : (t + 1) * chains]) for t in range(count)]
            if factor is None:
                return [total + s for total, s in zip(totals, sums)]
            s = e.splat(e.load(e.at(scale, b.mul(tile, I64(4))), F32), n)
            return [e.fma(x * factor, s, total) for total, x in zip(totals, sums)]

        def tile(i: ir.Value, carried: list[Lanes]) -> list[Lanes]:
            *totals, worst = carried
            start, parts = b.mul(i, I64(128)), [*nothing[:-1], worst]
            for offset in range(0, 128 * nbytes, 64):
                e.prefetch(e.at(e.at(e.at(w, ahead), b.mul(start, I64(nbytes))), offset))
            for c in range(4):
                parts = step(b.add(start, I64(32 * c)), parts, c * 32 // n)
            return [*finish(i, totals, parts[:-1]), parts[-1]]

        full = b.sdiv(columns, I64(128))
        *totals, worst = e.loop(full, [*zeros, clean], tile)
        start = b.mul(full, I64(128))
        rest = b.sdiv(b.sub(columns, start), I64(32))
        *parts, worst = e.loop(
            rest, [*nothing[:-1], worst], lambda i, p: step(b.add(start, b.mul(i, I64(32))), p)
        )
        with_rest = finish(
            b.select(b.icmp_signed(">", rest, I64(0)), full, I64(0)), totals, parts
        )  # tile 0 is there, and is multiplied by zeros
        nan = e.any(worst.equals(0x7F).sext(I8))
        return [b.select(nan, F32(float("nan")), e.total(t)) for t in with_rest]

    return dot


def _float_decoder(decode: Callable, nbytes: int, factor: float | None):
    """Store rows as float32."""

    def run(e: Emitter, w: ir.Value, scale: ir.Value, columns: ir.Value, out: ir.Value) -> None:
        b, n = e.b, WORDS[e.level]

        def step(i: ir.Value, nothing: list[Lanes]) -> list[Lanes]:
            numbers, sizes = decode(e, e.at(w, b.mul(i, I64(32 * nbytes))))
            for k, x in enumerate(numbers):
                if factor is not None:
                    x = x * factor * e.splat(e.load(e.at(scale, b.mul(b.sdiv(i, I64(4)), I64(4))), F32), n)
                    nan = sizes.take(range(n * k, n * k + n)).equals(0x7F).sext(I32)
                    x = (x.bits(I32, n) | nan).bits(F32, n)  # all bits are a NaN
                e.store(x, e.at(out, b.add(b.mul(i, I64(128)), I64(4 * n * k))))
            return nothing

        e.loop(b.sdiv(columns, I64(32)), [], step)

    return run


class Kind(NamedTuple):
    """How rows of a format are multiplied: their activations' layout, the columns in one step, and the
    code.
    """

    acts: str  # "q8_k", "q8_0" or "f32"
    columns: int
    dot: Callable


def _k(module, unpack: Callable[..., Block]) -> tuple[int, Kind]:
    return module.GGML_TYPE, Kind("q8_k", 256, _q8_k_dot(unpack, module.BLOCK.itemsize))


def _0(module, unpack: Callable[[Emitter, ir.Value], list[Lanes]]) -> tuple[int, Kind]:
    return module.GGML_TYPE, Kind("q8_0", 32, _q8_0_dot(unpack, module.BLOCK.itemsize))


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
    """decode(kind, w, scale, columns, out) inside a Numba function: the float32 of a row at address w, to
    address `out`; kinds of floats only.
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

    return result(
        kind, types.int64, types.int64, types.int64, types.UniTuple(types.int64, tokens.count), types.int64
    ), codegen
