"""Reference: several outputs of refimpl.reference.packed.linear at once, the products of a panel of weight
rows and the tokens that want them.

`dot_llvm` takes a row at a time, so it has to spread each scale over a register and to add up its lanes. Here
every lane is a row of its own: `pack_panel` takes a panel of L rows apart, once, into a scratch that stays in
the second-level cache, and `multiply` passes tokens over it, some at a time. A scale is then a vector beside
the weights, an activation the same four bytes in all lanes, and nothing is added across.

    256 columns of a panel in the scratch, in vectors of L words of 32 bits (L = 16 with AVX-512, else 8):

        vector 0   1      2               2 + G/2     G = 8 groups of 32 columns, or 16 of 16
             | d    | dmin | minima         | group 0         | group 1         | ... | group G - 1     |
             | f32  | f32  | two i16 a word |

        a group   0       1               2               ...
             | scale | columns 0..3  | columns 4..7  | ... |        a word for each row
             | i32   | u8, a word    | u8, a word    | ... |

        a vector of weights, lane by lane (w02 is column 2 of row 0):
             | w00 w01 w02 w03 | w10 w11 w12 w13 | w20 ...
        an activation beside it:
             | a0  a1  a2  a3  | a0  a1  a2  a3  | a0  ...

It is written in instructions for the reason that `simd_llvm` gives. For Q4_K, the ten lines of Numba that a
test compares it with, on B blocks of a panel that somebody has unpacked with rows last:

    def q4_k_panel(d, dmin, sc, m, q, d_a, a):
        y = np.zeros(d.shape[1], np.float32)  # d, dmin f32 [B, L]; sc, m i32 [B, 8, L]; q i32 [B, 8, 32, L]
        for b in range(len(d)):  # d_a f32 [B]; a i32 [B, 8, 32]
            for r in range(d.shape[1]):
                dots, low = 0, 0
                for j in range(8):
                    for i in range(32):
                        dots += sc[b, j, r] * q[b, j, i, r] * a[b, j, i]
                        low += m[b, j, r] * a[b, j, i]
                y[r] += d[b, r] * d_a[b] * np.float32(dots) - dmin[b, r] * d_a[b] * np.float32(low)
        return y

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

from refimpl.formats import iq4_xs, q2_k, q3_k, q4_k, q5_k, q6_k
from refimpl.kernels.dot_llvm import Q8_K_BYTES
from refimpl.kernels.simd_llvm import F32, I8, I16, I32, I64, LEVEL, WORDS, Emitter, Lanes
from refimpl.kernels.unpack_llvm import NIBBLES, WEIGHTS, Raw
from refimpl.reference import interleaved

ROWS = WORDS[LEVEL]  # of a panel
TILE = interleaved.ROWS
INTERLEAVED = 512  # added to ggml's type number where rows lie side by side
VECTOR = 4 * ROWS  # bytes
BYTES = 0x00FF00FF  # the first and third of four
Words = Callable[[int], list[Lanes]]  # byte offset in a block -> the four words there, each i32 [rows]


class Scales(NamedTuple):
    """What a block of every row has beside its weights: w = d * scale * q - dmin * minimum, or
    d * (scale * q - minimum) where dmin is None.
    """

    d: Lanes  # f32 [rows]
    dmin: Lanes | None  # f32 [rows]
    # Number of a group (8 of 32 columns, 16 of 16) -> i32 [rows]; made when asked for, as registers are few.
    scale: Callable[[int], Lanes]
    # Two i16 a word, i32 [rows] each: groups 0 and 2, 4 and 6, ..., then 1 and 3, 5 and 7, ... (`_pairs`).
    mins: list[Lanes]


# --- scales by format: the references' `unpack`, a word of every row in a vector ----------------------------


def _low_half(e: Emitter, word: Lanes) -> Lanes:
    """The halves in the low 16 bits of words i32 [rows], as f32 [rows]."""
    return e.half(word.trunc(I16))


def _byte(words: list[Lanes]) -> Callable[[int], Lanes]:
    """Number of a byte among words i32 [rows] -> i32 [rows], unsigned."""
    return lambda g: (words[g // 4] >> g % 4 * 8) & 0xFF


def _pairs(words: list[Lanes]) -> list[Lanes]:
    """Bytes in words i32 [rows] -> two i16 a word, in the order that `Scales.mins` has:

        words      | 3 2 1 0 | 7 6 5 4 |        bytes of a lane, the lowest on the right
        & BYTES    |   2   0 |   6   4 |
        >> 8 & ... |   3   1 |   7   5 |

    Sums of 16 activations in HALVES order, and those of 32, stand in memory in the same order of pairs.
    """
    return [(w >> 8 * i) & BYTES for i in range(2) for w in words]


def _of_q4_k(e: Emitter, words: Words) -> Scales:
    """Scales of Q4_K and of Q5_K, whose blocks begin alike."""
    # The bytes are drawn in `unpack_llvm._six_bits`: a, b and c are x[0], x[1] and x[2] there, of every row.
    head, a, b, c = words(0)  # head: | dmin: f16 | d: f16 |
    scales = [a & 0x3F3F3F3F, (c & NIBBLES) | ((a >> 2) & 0x30303030)]
    mins = [b & 0x3F3F3F3F, ((c >> 4) & NIBBLES) | ((b >> 2) & 0x30303030)]
    return Scales(_low_half(e, head), _low_half(e, head >> 16), _byte(scales), _pairs(mins))


def _of_q2_k(e: Emitter, words: Words) -> Scales:
    pairs = words(0)  # of four bits: | minimum | scale |
    head = words(68)[3]  # the word at byte 80: | dmin: f16 | d: f16 |
    mins = _pairs([(w >> 4) & NIBBLES for w in pairs])
    return Scales(_low_half(e, head), _low_half(e, head >> 16), _byte([w & NIBBLES for w in pairs]), mins)


def _of_q6_k(e: Emitter, words: Words) -> Scales:
    signed = words(192)
    # Bytes 0 and 2, then 1 and 3, of each word, shifted to the top of 16 bits and back with their sign; q is
    # 32 too large.
    mins = [(w << 8 * (1 - i)).bits(I16, 2 * ROWS).sar(8) * 32 for i in range(2) for w in signed]
    return Scales(
        _low_half(e, words(194)[3] >> 16),  # the word at byte 206: | d: f16 | two scales |
        None,
        lambda g: (signed[g // 4] << 24 - g % 4 * 8).sar(24),
        [m.bits(I32, ROWS) for m in mins],
    )


def _of_q3_k(e: Emitter, words: Words) -> Scales:
    # The bytes are drawn in `unpack_llvm.block_q3_k`: a, b and high are the words at 96, 100 and 104.
    _, a, b, high = words(92)
    low = (a, b, a >> 4, b >> 4)
    six = [(w & NIBBLES) | (((high >> 2 * i) & 0x03030303) << 4) for i, w in enumerate(low)]
    mins = [((m.bits(I16, 2 * ROWS) - 32) * 4).bits(I32, ROWS) for m in _pairs(six)]  # q is 4 too large
    return Scales(_low_half(e, words(94)[3] >> 16), None, lambda g: _byte(six)(g) - 32, mins)


def _of_iq4_xs(e: Emitter, words: Words) -> Scales:
    head, low = words(0)[:2]  # head: | high bits of the scales: u16 | d: f16 |

    def scale(g: int) -> Lanes:
        return (((low >> 4 * g) & 15) | (((head >> 16 + 2 * g) & 3) << 4)) - 32

    # Weights are 128 above what they stand for; the pairs of groups are those of `_pairs`.
    pairs = ((0, 2), (4, 6), (1, 3), (5, 7))
    mins = [((scale(g) << 7) & 0xFFFF) | (scale(h) << 23) for g, h in pairs]
    return Scales(_low_half(e, head), None, scale, mins)


# --- the scratch --------------------------------------------------------------------------------------------


class PanelLayout(NamedTuple):
    """How panels of a format are laid out in the scratch; places and sizes are in vectors, see above."""

    block_bytes: int  # in the file
    scales: Callable[[Emitter, Words], Scales]
    weights: tuple[int, Callable]  # unpack_llvm.WEIGHTS
    groups: int  # 8 or 16
    # Where the words of a block are in tiles of TILE rows side by side; None for the file's order.
    places: tuple[int, ...] | None = None

    @property
    def interleaved(self) -> bool:
        """Whether rows lie side by side, in tiles of TILE rows."""
        return self.places is not None

    @property
    def group(self) -> int:
        """The place of group 0 in a block: behind d, dmin and two minima a vector."""
        return 2 + self.groups // 2

    @property
    def step(self) -> int:
        """From group to group: one vector of scales, and one for each four of its columns."""
        return 1 + 64 // self.groups

    @property
    def wide(self) -> bool:
        """Whether weights are bytes above 63."""
        return self.scales is _of_iq4_xs

    @property
    def step_bytes(self) -> int:
        """From a block of all rows to their next one."""
        return self.block_bytes * TILE if self.interleaved else self.block_bytes

    @property
    def lines(self) -> int:
        """Lines of the cache, 64 bytes each, that a block of every row of a panel takes in the file."""
        return ROWS * self.block_bytes // 64

    @property
    def size(self) -> int:
        """Vectors of a block of 256 columns."""
        return self.group + self.groups * self.step


PANELS = {
    module.GGML_TYPE: PanelLayout(module.BLOCK.itemsize, scales, WEIGHTS[module.GGML_TYPE], groups)
    for module, scales, groups in (
        (q2_k, _of_q2_k, 16),
        (q3_k, _of_q3_k, 16),
        (q4_k, _of_q4_k, 8),
        (q5_k, _of_q4_k, 8),
        (q6_k, _of_q6_k, 16),
        (iq4_xs, _of_iq4_xs, 8),
    )
}


def layout_of(kind: int) -> PanelLayout:
    """The row of PANELS for a format's number, or for that of its interleaved rows."""
    layout = PANELS[kind % INTERLEAVED]
    if kind < INTERLEAVED:
        return layout
    order = interleaved.word_order(kind % INTERLEAVED)
    return layout._replace(places=tuple(order.index(word) for word in range(len(order))))


def scratch_bytes(kind: int, columns: int) -> int:
    """Bytes that a packed panel of a format takes, for rows of so many columns."""
    return columns // 256 * PANELS[kind].size * VECTOR


def word_of_tile(e: Emitter, layout: PanelLayout, p: ir.Value, offset: int, part: int = 0) -> Lanes:
    """The word at a byte offset, i32 [ROWS], of a block of rows that lie side by side from the address p on:
    of rows part * ROWS to part * ROWS + ROWS - 1 of their tile. Of a word with one half in the block, its
    last two bytes, that is the upper one.
    """
    assert layout.places is not None
    if offset % 4:
        p = e.at(p, len(layout.places) * 4 * TILE + part * VECTOR // 2)
        return e.load(p, I16, ROWS).zext(I32) << 16
    return e.load(e.at(p, layout.places[offset // 4] * 4 * TILE + part * VECTOR), I32, ROWS)


def unpack_block(
    e: Emitter, layout: PanelLayout, p: ir.Value, row_bytes: ir.Value
) -> tuple[Scales, Iterator[tuple[int, int, Lanes]]]:
    """The block at p and those of the rows below it, or beside it: scales, and (group, k, u8 [4 rows]) for
    columns 4 k to 4 k + 3 of each group, in the order in which they are read.
    """
    known: dict[int, list[Lanes]] = {}  # what was loaded and turned already, by offset

    def words(offset: int) -> list[Lanes]:
        # Groups of one block share bytes (nibbles, high bits): each four words are loaded and turned once.
        if offset not in known:
            known[offset] = (
                [word_of_tile(e, layout, p, offset + 4 * i) for i in range(4)]
                if layout.interleaved
                else e.words(e.at(p, offset), row_bytes, ROWS)
            )
        return known[offset]

    def weights() -> Iterator[tuple[int, int, Lanes]]:
        parts, of_part = layout.weights
        for part, four in product(range(parts), range(8)):  # columns 4 * four, ... of each 32

            def raw(offset: int, four: int = four) -> Lanes:
                """Four of the 32 bytes that `dot_llvm` would load, of every row: u8 [4 rows]."""
                return words(offset + four // 4 * 16)[four % 4].bits(I8, VECTOR)

            def nibbles(offset: int, four: int = four) -> Lanes:
                """Four of the 32 nibbles of 16 bytes, of every row: u8 [4 rows]."""
                x = words(offset)[four % 4].bits(I8, VECTOR)
                return x & 15 if four < 4 else x >> 4

            for i, q in enumerate(of_part(Raw(e, raw, nibbles), part)):
                g = part * (8 // parts) + i  # the group of 32
                yield (g, four, q) if layout.groups == 8 else (2 * g + four // 4, four % 4, q)

    return layout.scales(e, words), weights()


def store_floats(e: Emitter, x: Scales, to: ir.Value) -> None:
    """d, dmin and minima of a block, side by side at the address `to`, as `block_floats` finds them."""
    for at, v in enumerate([x.d, x.dmin or x.d, *x.mins]):
        e.store(v, e.at(to, at * VECTOR))


def _pack_panel(
    e: Emitter, layout: PanelLayout, w: ir.Value, row_bytes: ir.Value, columns: ir.Value, scratch: ir.Value
) -> None:
    """The ROWS rows from address w on, `row_bytes` apart, into the scratch, block by block."""

    def block(i: ir.Value, nothing: list[Lanes]) -> list[Lanes]:
        to = e.at(scratch, e.b.mul(i, I64(layout.size * VECTOR)))
        x, weights = unpack_block(e, layout, e.at(w, e.b.mul(i, I64(layout.block_bytes))), row_bytes)
        store_floats(e, x, to)
        for g in range(layout.groups):
            e.store(x.scale(g), e.at(to, (layout.group + g * layout.step) * VECTOR))
        for g, k, q in weights:
            e.store(q, e.at(to, (layout.group + g * layout.step + 1 + k) * VECTOR))
        return nothing

    e.loop(e.b.sdiv(columns, I64(256)), [], block)


# --- products -----------------------------------------------------------------------------------------------


def everywhere(e: Emitter, a: ir.Value, offset: int, element: ir.Type) -> Lanes:
    """The four bytes at an address in every word of a vector: `element` [VECTOR / its bytes]."""
    return e.splat(e.load(e.at(a, offset), I32), ROWS).bits(element, VECTOR // (element.width // 8))


def block_floats(e: Emitter, layout: PanelLayout, p: ir.Value) -> tuple[Lanes, Lanes | None, list[Lanes]]:
    """Load what the packed block at address p has beside its weights: d f32 [rows], dmin f32 [rows] or None,
    and its minima, two i16 a word in vectors i32 [rows].
    """

    def vector(at: int, element: ir.Type = I32) -> Lanes:
        return e.load(e.at(p, at * VECTOR), element, ROWS)

    minima = layout.scales not in (_of_q3_k, _of_q6_k, _of_iq4_xs)
    mins = [vector(2 + j) for j in range(layout.groups // 2)]
    return vector(0, F32), vector(1, F32) if minima else None, mins


def add_block(
    e: Emitter,
    layout: PanelLayout,
    a: ir.Value,
    d: Lanes,
    dmin: Lanes | None,
    mins: list[Lanes],
    dots: Lanes,
    total: Lanes,
) -> Lanes:
    """total f32 [rows] + the block's part for the Q8_K block at `a`; dots i32 [rows] is the sum of
    scale * q * activation.
    """
    # Sums of 16 activations, or of 32, two i16 a word: the order is that of `_pairs`.
    sums = 256 if layout.groups == 16 else 292
    low = e.constant(I32, [0] * ROWS)
    scale = e.splat(e.load(e.at(a, 288), F32), ROWS)
    for j, m in enumerate(mins):
        low = e.dot_pairs(low, m.bits(I16, 2 * ROWS), everywhere(e, a, sums + 4 * j, I16))
    if dmin is None:
        return e.fma(d * scale, (dots - low).floats(), total)
    return e.fma(d * scale, dots.floats(), e.fma(dmin * scale * -1.0, low.floats(), total))


def _multiply(
    e: Emitter,
    layout: PanelLayout,
    scratch: ir.Value,
    columns: ir.Value,
    ahead: ir.Value,
    lines: ir.Value,
    tokens: list[ir.Value],
) -> list[Lanes]:
    """f32 [rows] for each token: the packed panel times the activations at the addresses `tokens`.

    With every block of columns, `lines` lines of the cache from the address `ahead` on are fetched.
    """
    b = e.b
    # Additions that wait for each other: four chains for all tokens together keep the adder busy.
    chains = {1: 4, 2: 2, 3: 2}.get(len(tokens), 1)

    def vector(p: ir.Value, at: int, element: ir.Type = I32) -> Lanes:
        return e.load(e.at(p, at * VECTOR), element, VECTOR if element is I8 else ROWS)

    def fetch(line: ir.Value) -> list[Lanes]:
        e.prefetch(e.at(ahead, b.mul(line, I64(64))))
        return []

    def fetch_share(i: ir.Value, g: ir.Value) -> None:
        """The lines that group g of block i is to fetch: lines * n / groups for n = i * groups + g on."""
        n = b.add(b.mul(i, I64(layout.groups)), g)
        log2 = I64(layout.groups.bit_length() - 1)
        first, last = (b.lshr(b.mul(lines, b.add(n, I64(k))), log2) for k in (0, 1))
        e.loop(b.sub(last, first), [], lambda line, _: fetch(b.add(first, line)))

    def block(i: ir.Value, sums: list[Lanes]) -> list[Lanes]:
        p = e.at(scratch, b.mul(i, I64(layout.size * VECTOR)))
        acts = [e.at(t, b.mul(i, I64(Q8_K_BYTES))) for t in tokens]

        def group(g: ir.Value, totals: list[Lanes]) -> list[Lanes]:
            """totals i32 [rows] + scale * q * activation of a group's columns, for each token."""
            fetch_share(i, g)
            here = e.at(p, b.mul(b.add(b.mul(g, I64(layout.step)), I64(layout.group)), I64(VECTOR)))
            columns = [e.at(a, b.mul(g, I64(256 // layout.groups))) for a in acts]
            dots = [[e.constant(I32, [0] * ROWS) for _ in range(chains)] for _ in tokens]
            for k in range(layout.step - 1):
                q = vector(here, 1 + k, I8)
                # Columns of a group go to the chains in turn; integers are added exactly, in whatever order.
                chain = k % chains
                for dot, a in zip(dots, columns):
                    dot[chain] = e.dot_fours(dot[chain], q, everywhere(e, a, 4 * k, I8), layout.wide)
            scale = vector(here, 0)
            return [total + reduce(operator.add, dot) * scale for total, dot in zip(totals, dots)]

        totals = e.loop(I64(layout.groups), [e.constant(I32, [0] * ROWS) for _ in tokens], group)
        floats = block_floats(e, layout, p)
        return [add_block(e, layout, a, *floats, dots, total) for a, dots, total in zip(acts, totals, sums)]

    return e.loop(b.sdiv(columns, I64(256)), [e.constant(F32, [0.0] * ROWS) for _ in tokens], block)


# --- inside Numba functions ---------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def pack_panel(typingctx, kind, w, row_bytes, columns, scratch):
    """pack_panel(kind, w, row_bytes, columns, scratch) inside a Numba function: the ROWS rows from address w
    on, `row_bytes` apart, taken apart, to the `scratch_bytes(kind, columns)` bytes at address `scratch`.

    `kind` is a constant of PANELS.
    """
    if not isinstance(kind, types.IntegerLiteral):
        return None

    def codegen(context, b, signature, args):
        _pack_panel(Emitter(b, LEVEL), PANELS[signature.args[0].literal_value], *args[1:])
        return context.get_dummy_value()

    return types.none(kind, *[types.int64] * 4), codegen


@intrinsic(prefer_literal=True)
def multiply(typingctx, kind, scratch, columns, ahead, lines, tokens, out):
    """multiply(kind, scratch, columns, ahead, lines, tokens, out) inside a Numba function: a packed panel
    times the activations (Q8_K) at the addresses `tokens`; ROWS float32 for each go to its address in `out`.

    `kind` is a constant of PANELS. Meanwhile memory from the address `ahead` on is fetched, `lines` lines of
    64 bytes for each 256 columns.
    """
    if not isinstance(kind, types.IntegerLiteral) or not isinstance(tokens, types.UniTuple):
        return None

    def codegen(context, b, signature, args):
        _, scratch, columns, ahead, lines, tokens, out = args
        e = Emitter(b, LEVEL)
        layout = PANELS[signature.args[0].literal_value]
        addresses = [b.extract_value(tokens, i) for i in range(signature.args[5].count)]
        sums = _multiply(e, layout, scratch, columns, ahead, lines, addresses)
        for i, s in enumerate(sums):
            e.store(s, b.extract_value(out, i))
        return context.get_dummy_value()

    tuples = types.UniTuple(types.int64, tokens.count)
    return types.none(kind, types.int64, types.int64, types.int64, types.int64, tuples, tuples), codegen
