"""Reference: several outputs of refimpl.reference.packed.linear at once, the products of a strip of weight
rows and the tokens that want them.

`dot_numba` takes a row at a time, so it has to spread each scale over a register and to add up its lanes.
Here every lane is a row of its own: `interleave` takes a strip of L rows apart, once, into a scratch that
stays in the second-level cache, and `multiply` passes tokens over it, some at a time. A scale is then a
vector beside the weights, an activation the same four bytes in all lanes, and nothing is added across.

    256 columns of a strip in the scratch, in vectors of L words of 32 bits (L = 16 with AVX-512, else 8):
    d f32 | dmin f32 | minima, pairs of i16 | for each group of 32 or 16 columns: its scale i32, then its
    weights, four columns of u8 a word

Integer parts are exact, and the blocks' floats are added in their order.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from functools import reduce
from itertools import product
from typing import NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from refimpl.formats import q2_k, q3_k, q4_k, q5_k, q6_k
from refimpl.kernels.cpu_simd import F32, I8, I16, I32, I64, WORDS, Emitter, Lanes
from refimpl.kernels.dot_numba import LEVEL, NIBBLES, Q8_K_BYTES, WEIGHTS

ROWS = WORDS[LEVEL]  # of a strip
VECTOR = 4 * ROWS  # bytes
BYTES = 0x00FF00FF
Words = Callable[[int], list[Lanes]]  # byte offset in a block -> the four words there, each i32 [rows]


class Scales(NamedTuple):
    """What a block has beside its weights: w = d * scale * q - dmin * minimum, or d * (scale * q - minimum)
    where dmin is None.
    """

    d: Lanes  # f32
    dmin: Lanes | None
    scale: Callable[
        [int], Lanes
    ]  # i32, of each of 8 groups of 32 or 16 of 16; made when asked for, as registers are few
    mins: list[Lanes]  # two i16 a word: groups 0 and 2, 4 and 6, ..., then 1 and 3, 5 and 7, ...


# --- scales by format: the references' `unpack`, a word of every row in a vector ----------------------------


def _low_half(e: Emitter, word: Lanes) -> Lanes:
    return e.half(word.trunc(I16))


def _byte(words: list[Lanes]) -> Callable[[int], Lanes]:
    return lambda g: (words[g // 4] >> g % 4 * 8) & 0xFF


def _pairs(words: list[Lanes]) -> list[Lanes]:
    return [(w >> 8 * i) & BYTES for i in range(2) for w in words]


def _of_q4_k(e: Emitter, words: Words) -> Scales:
    """Also Q5_K's. The 12 bytes are drawn in refimpl.formats._blocks.unpack_scales."""
    head, a, b, c = words(0)
    scales = [a & 0x3F3F3F3F, (c & NIBBLES) | ((a >> 2) & 0x30303030)]
    mins = [b & 0x3F3F3F3F, ((c >> 4) & NIBBLES) | ((b >> 2) & 0x30303030)]
    return Scales(_low_half(e, head), _low_half(e, head >> 16), _byte(scales), _pairs(mins))


def _of_q2_k(e: Emitter, words: Words) -> Scales:
    both, head = words(0), words(68)[3]
    mins = _pairs([(w >> 4) & NIBBLES for w in both])
    return Scales(_low_half(e, head), _low_half(e, head >> 16), _byte([w & NIBBLES for w in both]), mins)


def _of_q6_k(e: Emitter, words: Words) -> Scales:
    signed = words(192)
    mins = [(w << 8 * (1 - i)).bits(I16, 2 * ROWS).sar(8) * 32 for i in range(2) for w in signed]
    return Scales(
        _low_half(e, words(194)[3] >> 16),
        None,
        lambda g: (signed[g // 4] << 24 - g % 4 * 8).sar(24),
        [m.bits(I32, ROWS) for m in mins],
    )


def _of_q3_k(e: Emitter, words: Words) -> Scales:
    _, a, b, high = words(92)
    six = [
        (w & NIBBLES) | (((high >> 2 * i) & 0x03030303) << 4) for i, w in enumerate((a, b, a >> 4, b >> 4))
    ]
    mins = [((m.bits(I16, 2 * ROWS) - 32) * 4).bits(I32, ROWS) for m in _pairs(six)]
    return Scales(_low_half(e, words(94)[3] >> 16), None, lambda g: _byte(six)(g) - 32, mins)


# --- the scratch --------------------------------------------------------------------------------------------


class Strip(NamedTuple):
    """How strips of a format are laid out; offsets are in vectors."""

    block_bytes: int  # in the file
    scales: Callable[[Emitter, Words], Scales]
    weights: tuple[int, Callable]  # dot_numba.WEIGHTS
    groups: int  # 8 or 16

    @property
    def group(self) -> int:
        """Of the first group."""
        return 2 + self.groups // 2

    @property
    def step(self) -> int:
        """From group to group: a scale, and four columns in each of the others."""
        return 1 + 64 // self.groups

    @property
    def lines(self) -> int:
        """Of the cache, in a block of every row."""
        return ROWS * self.block_bytes // 64

    @property
    def size(self) -> int:
        """Of a block."""
        return self.group + self.groups * self.step


STRIPS = {
    module.GGML_TYPE: Strip(module.BLOCK.itemsize, scales, WEIGHTS[module.GGML_TYPE], groups)
    for module, scales, groups in (
        (q2_k, _of_q2_k, 16),
        (q3_k, _of_q3_k, 16),
        (q4_k, _of_q4_k, 8),
        (q5_k, _of_q4_k, 8),
        (q6_k, _of_q6_k, 16),
    )
}


def scratch_bytes(kind: int, columns: int) -> int:
    """Of a strip taken apart."""
    return columns // 256 * STRIPS[kind].size * VECTOR


def _block(
    e: Emitter, strip: Strip, p: ir.Value, row_bytes: ir.Value
) -> tuple[Scales, Iterator[tuple[int, int, Lanes]]]:
    """The block at p and those of the rows below it: scales, and (group, k, u8) for columns 4k, ... of each
    group, group by group as they lie.
    """
    known: dict[int, list[Lanes]] = {}

    def words(offset: int) -> list[Lanes]:
        if offset not in known:
            known[offset] = e.words(e.at(p, offset), row_bytes, ROWS)
        return known[offset]

    def weights() -> Iterator[tuple[int, int, Lanes]]:
        parts, of_part = strip.weights
        for part, four in product(range(parts), range(8)):  # columns 4 * four, ... of each 32
            for i, q in enumerate(
                of_part(lambda offset: words(offset + four // 4 * 16)[four % 4].bits(I8, VECTOR), part)  # noqa: B023
            ):
                g = part * (8 // parts) + i
                yield (g, four, q) if strip.groups == 8 else (2 * g + four // 4, four % 4, q)

    return strip.scales(e, words), weights()


def _interleave(
    e: Emitter, strip: Strip, w: ir.Value, row_bytes: ir.Value, columns: ir.Value, scratch: ir.Value
) -> None:
    def block(i: ir.Value, nothing: list[Lanes]) -> list[Lanes]:
        to = e.at(scratch, e.b.mul(i, I64(strip.size * VECTOR)))
        x, weights = _block(e, strip, e.at(w, e.b.mul(i, I64(strip.block_bytes))), row_bytes)
        for at, v in enumerate([x.d, x.dmin or x.d, *x.mins]):
            e.store(v, e.at(to, at * VECTOR))
        for g in range(strip.groups):
            e.store(x.scale(g), e.at(to, (strip.group + g * strip.step) * VECTOR))
        for g, k, q in weights:
            e.store(q, e.at(to, (strip.group + g * strip.step + 1 + k) * VECTOR))
        return nothing

    e.loop(e.b.sdiv(columns, I64(256)), [], block)


def _everywhere(e: Emitter, a: ir.Value, offset: int, element: ir.Type) -> Lanes:
    """The four bytes at an address in every word."""
    return e.splat(e.load(e.at(a, offset), I32), ROWS).bits(element, VECTOR // (element.width // 8))


def _add_block(
    e: Emitter,
    strip: Strip,
    a: ir.Value,
    d: Lanes,
    dmin: Lanes | None,
    mins: list[Lanes],
    dots: Lanes,
    total: Lanes,
) -> Lanes:
    """total + the block's part for activations at a: dots is the sum of scale * q * activation."""
    sums = 256 if strip.groups == 16 else 292  # of 16 activations, or of 32
    low, scale = e.constant(I32, [0] * ROWS), e.splat(e.load(e.at(a, 288), F32), ROWS)
    for j, m in enumerate(mins):
        low = e.dot_pairs(low, m.bits(I16, 2 * ROWS), _everywhere(e, a, sums + 4 * j, I16))
    if dmin is None:
        return e.fma(d * scale, (dots - low).floats(), total)
    return e.fma(d * scale, dots.floats(), e.fma(dmin * scale * -1.0, low.floats(), total))


def _multiply(
    e: Emitter,
    strip: Strip,
    scratch: ir.Value,
    columns: ir.Value,
    ahead: ir.Value,
    lines: ir.Value,
    tokens: list[ir.Value],
) -> list[Lanes]:
    b, chains = (
        e.b,
        {1: 4, 2: 2, 3: 2}.get(len(tokens), 1),
    )  # of additions that wait for each other: four for the whole keep the adder busy
    minima = strip.scales not in (_of_q3_k, _of_q6_k)

    def vector(p: ir.Value, at: int, element: ir.Type = I32) -> Lanes:
        return e.load(e.at(p, at * VECTOR), element, VECTOR if element is I8 else ROWS)

    def fetch(line: ir.Value) -> list[Lanes]:
        e.prefetch(e.at(ahead, b.mul(line, I64(64))))
        return []

    def block(i: ir.Value, sums: list[Lanes]) -> list[Lanes]:
        p = e.at(scratch, b.mul(i, I64(strip.size * VECTOR)))
        acts = [e.at(t, b.mul(i, I64(Q8_K_BYTES))) for t in tokens]

        def group(g: ir.Value, totals: list[Lanes]) -> list[Lanes]:
            n = b.add(b.mul(i, I64(strip.groups)), g)
            first, last = (
                b.lshr(b.mul(lines, b.add(n, I64(k))), I64(strip.groups.bit_length() - 1)) for k in (0, 1)
            )
            e.loop(b.sub(last, first), [], lambda l, _: fetch(b.add(first, l)))
            here = e.at(p, b.mul(b.add(b.mul(g, I64(strip.step)), I64(strip.group)), I64(VECTOR)))
            columns = [e.at(a, b.mul(g, I64(256 // strip.groups))) for a in acts]
            dots = [[e.constant(I32, [0] * ROWS) for _ in range(chains)] for _ in tokens]
            for k in range(strip.step - 1):
                q, chain = vector(here, 1 + k, I8), k % chains
                for dot, a in zip(dots, columns):
                    dot[chain] = e.dot_fours(dot[chain], q, _everywhere(e, a, 4 * k, I8))
            scale = vector(here, 0)
            return [total + reduce(operator.add, dot) * scale for total, dot in zip(totals, dots)]

        totals = e.loop(I64(strip.groups), [e.constant(I32, [0] * ROWS) for _ in tokens], group)
        d, dmin = vector(p, 0, F32), vector(p, 1, F32) if minima else None
        mins = [vector(p, 2 + j) for j in range(strip.groups // 2)]
        return [_add_block(e, strip, a, d, dmin, mins, *both) for a, *both in zip(acts, totals, sums)]

    return e.loop(b.sdiv(columns, I64(256)), [e.constant(F32, [0.0] * ROWS) for _ in tokens], block)


@intrinsic(prefer_literal=True)
def interleave(typingctx, kind, w, row_bytes, columns, scratch):
    """interleave(kind, w, row_bytes, columns, scratch) inside a Numba function: the ROWS rows at address w,
    taken apart, to address `scratch`.
    """
    if not isinstance(kind, types.IntegerLiteral):
        return None

    def codegen(context, b, signature, args):
        _interleave(Emitter(b, LEVEL), STRIPS[signature.args[0].literal_value], *args[1:])
        return context.get_dummy_value()

    return types.none(kind, *[types.int64] * 4), codegen


@intrinsic(prefer_literal=True)
def multiply(typingctx, kind, scratch, columns, ahead, lines, tokens, out):
    """multiply(kind, scratch, columns, tokens, out) inside a Numba function: an interleaved strip with the
    activations at the addresses `tokens`.

    ROWS float32 for each token go to its address in `out`.
    """
    if not isinstance(kind, types.IntegerLiteral) or not isinstance(tokens, types.UniTuple):
        return None

    def codegen(context, b, signature, args):
        _, scratch, columns, ahead, lines, tokens, out = args
        e, count = Emitter(b, LEVEL), signature.args[5].count
        sums = _multiply(
            e,
            STRIPS[signature.args[0].literal_value],
            scratch,
            columns,
            ahead,
            lines,
            [b.extract_value(tokens, i) for i in range(count)],
        )
        for i, s in enumerate(sums):
            e.store(s, b.extract_value(out, i))
        return context.get_dummy_value()

    tuples = types.UniTuple(types.int64, tokens.count)
    return types.none(kind, types.int64, types.int64, types.int64, types.int64, tuples, tuples), codegen
