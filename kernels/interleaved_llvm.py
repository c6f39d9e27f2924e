"""Reference: sixteen outputs of refimpl.reference.packed.linear at once, from rows that lie side by side
(refimpl.reference.interleaved).

What `panel_llvm` makes of sixteen rows in its scratch, a row in every lane, these rows are as they lie in
memory. So a load of 64 bytes serves sixteen rows, whether there is one token or many: nothing is turned, no
scratch is written, nothing is added across lanes, and memory is read in one stream.

    words of a block of Q4_K, each a vector with a lane for every row
    w0           | dmin | d |                         unpacked once for all tokens
    w1 .. w3     | scales and minima, 6 bits each |   likewise
    w4 .. w11    | four columns of group 1 in the high nibbles, of group 0 in the low ones |
    w12 .. w35   the same of groups 3 and 2, 5 and 4, 7 and 6

    words of a block of Q6_K, in their order there
    w0 .. w3     | scales of 16 groups, 8 bits each |   unpacked once for all tokens
    w4, w5       | low bits of four columns of the first 32, third 32 |, | of the second, fourth 32 |
    w6           | high bits of these sixteen columns |
    w7 .. w51    the same of the next four columns of each 32, and so on; then of columns 128 to 255
    behind them  | d |, halves of words

The ten lines of Numba that do the same are `q4_k_panel` in `panel_llvm`. One thing is done otherwise than
there: where a CPU multiplies bytes up to 255, a high nibble stays where it is in its byte, 16 times what it
stands for. The sum of its products is 16 times too large then, exactly, and one shift for the whole group
puts that right.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from refimpl.formats import q4_k, q6_k
from refimpl.kernels.dot_llvm import Q8_K_BYTES
from refimpl.kernels.panel_llvm import (
    INTERLEAVED,
    ROWS,
    TILE,
    VECTOR,
    Scales,
    add_block,
    everywhere,
    layout_of,
    word_of_tile,
)
from refimpl.kernels.simd_llvm import F32, I8, I32, I64, LEVEL, Emitter, Lanes

AHEAD = 1 << 14  # bytes: how far ahead weights are asked for
# With so many tokens and more they are. With fewer the CPU's own guesses do better alone, and what is asked
# for besides is in their way.
FETCH_FROM = {q4_k.GGML_TYPE: 3, q6_k.GGML_TYPE: 6}
PARTS = TILE // ROWS  # vectors that a word of all rows takes


# Integer sums of scale * q * activation, i32 [ROWS] for each token, of the weights of ROWS rows.
Weights = Callable[[int], Lanes]  # byte offset in a block -> four bytes there of every row, i32 [ROWS]


def _zeros(e: Emitter, tokens: int) -> list[Lanes]:
    return [e.constant(I32, [0] * ROWS)] * tokens


def _pair_of_q4_k(e: Emitter, raw: Weights, pair: int, acts: list[ir.Value]) -> list[tuple[int, list[Lanes]]]:
    """Groups 2 pair and 2 pair + 1, of 32 columns: (group, sums of q * activation of each token)."""
    # Two chains of additions for each group where a single token would wait for each of them.
    chains = 2 if len(acts) == 1 else 1
    low, high = ([_zeros(e, chains) for _ in acts] for _ in range(2))
    for k in range(8):
        x = raw(16 + 32 * pair + 4 * k).bits(I8, VECTOR)
        # `wide` says that bytes are larger than 63, which costs nothing with VNNI.
        wide, chain = e.vnni, k % chains
        first, second = x & 0x0F, x & 0xF0 if wide else x >> 4
        for t, a in enumerate(acts):
            a0, a1 = (everywhere(e, a, 64 * pair + 4 * k + at, I8) for at in (0, 32))
            low[t][chain] = e.dot_fours(low[t][chain], first, a0)
            high[t][chain] = e.dot_fours(high[t][chain], second, a1, wide)
    lows, highs = ([reduce(operator.add, x) for x in sums] for sums in (low, high))
    return [(2 * pair, lows), (2 * pair + 1, [x.sar(4) if e.vnni else x for x in highs])]


def _planes_of_q6_k(
    e: Emitter, raw: Weights, step: int, acts: list[ir.Value]
) -> list[tuple[int, list[Lanes]]]:
    """Four groups of 16 columns that are 32 columns apart, as `_pair_of_q4_k`: those of one half, the first
    or the last words, of each plane of 32 columns. Step 0 and 1 are of columns 0 to 127, 2 and 3 of the rest.
    """
    part, half = step // 2, step % 2
    sums = [_zeros(e, len(acts)) for _ in range(4)]
    for k in range(4 * half, 4 * half + 4):
        first, second = raw(64 * part + 4 * k), raw(64 * part + 32 + 4 * k)
        high = raw(128 + 32 * part + 4 * k)  # two bits of a weight of each plane
        for plane, (low, upper) in enumerate(
            ((first, high << 4), (second, high << 2), (first >> 4, high), (second >> 4, high >> 2))
        ):
            q = ((low & 0x0F0F0F0F) | (upper & 0x30303030)).bits(I8, VECTOR)
            for t, a in enumerate(acts):
                x = everywhere(e, a, 128 * part + 32 * plane + 4 * k, I8)
                sums[plane][t] = e.dot_fours(sums[plane][t], q, x)
    return [(8 * part + 2 * plane + half, of_tokens) for plane, of_tokens in enumerate(sums)]


STEPS = {q4_k.GGML_TYPE: _pair_of_q4_k, q6_k.GGML_TYPE: _planes_of_q6_k}  # four of them are a block


def _add_rows(
    e: Emitter, kind: int, p: ir.Value, part: int, acts: list[ir.Value], totals: list[Lanes]
) -> list[Lanes]:
    """totals f32 [ROWS] for each token + the part of a block, whose words begin at p: of rows part * ROWS to
    part * ROWS + ROWS - 1.
    """
    layout = layout_of(kind)

    def word(offset: int) -> Lanes:
        return word_of_tile(e, layout, p, offset, part)

    def words(offset: int) -> list[Lanes]:
        return [word(offset + 4 * i) for i in range(4)]

    # A CPU guesses which bytes are wanted next, and best if they are wanted from the first to the last. LLVM
    # would load words where it has a use for them, many at once, and two of Q4_K's first four behind all
    # others.
    def raw(offset: int) -> Lanes:
        return e.in_order([word(offset)])[0]

    first = e.in_order(words(0)) if kind % INTERLEAVED == q4_k.GGML_TYPE else None

    def scales() -> Scales:
        return layout.scales(e, lambda offset: first or words(offset))

    x, dots = scales(), _zeros(e, len(acts))
    for step in range(4):
        for group, sums in STEPS[kind % INTERLEAVED](e, raw, step, acts):
            scale = x.scale(group)
            dots = [d + s * scale for d, s in zip(dots, sums)]
        # In order, or LLVM would begin with the products of all groups, for which registers do not suffice.
        dots = e.in_order(dots)
    x = scales()  # once more: d of Q6_K lies behind the weights, and is read after them
    return [add_block(e, layout, a, x.d, x.dmin, x.mins, d, y) for a, d, y in zip(acts, dots, totals)]


def _multiply(
    e: Emitter,
    kind: int,
    w: ir.Value,
    blocks: ir.Value,
    tokens: list[ir.Value],
    sums: list[list[Lanes]],
    fetch: ir.Value,
) -> list[list[Lanes]]:
    """`sums`, PARTS vectors f32 [ROWS] for each token, + the tile at w times the activations there. Where
    `fetch` is not 0 and tokens are several, the weights AHEAD are asked for.
    """
    b, nbytes, count = e.b, layout_of(kind).step_bytes, len(tokens)
    wanted = b.icmp_signed("!=", fetch, I64(0))

    def block(i: ir.Value, sums: list[Lanes]) -> list[Lanes]:
        p = e.at(w, b.mul(i, I64(nbytes)))
        acts = [e.at(t, b.mul(i, I64(Q8_K_BYTES))) for t in tokens]
        if count > 1:
            with b.if_then(wanted):
                for offset in range(0, nbytes, 64):
                    e.prefetch(e.at(p, AHEAD + offset))
        after: list[Lanes] = []
        for part in range(PARTS):
            totals = sums[part * count : (part + 1) * count]
            after += _add_rows(e, kind, p, part, acts, totals)
        return after

    after = e.loop(blocks, [of_token[part] for part in range(PARTS) for of_token in sums], block)
    return [after[t::count] for t in range(count)]


@intrinsic(prefer_literal=True)
def multiply_tile(typingctx, kind, w, blocks, tokens, out, more, fetch):
    """multiply_tile(kind, w, blocks, tokens, out, more, fetch) inside a Numba function: the tile of so many
    blocks at the address w times the activations (Q8_K) at the addresses `tokens`; TILE float32 for each go
    to its address in `out`, added to what is there where `more` is not 0. `kind` is a constant, a format's
    number + INTERLEAVED. Where `fetch` is not 0 and tokens are several, the CPU is asked for what lies AHEAD.
    """
    if not isinstance(kind, types.IntegerLiteral) or not isinstance(tokens, types.UniTuple):
        return None

    def codegen(context, b, signature, args):
        _, w, blocks, tokens, out, more, fetch = args
        e, count = Emitter(b, LEVEL), signature.args[3].count
        addresses = [b.extract_value(tokens, i) for i in range(count)]
        # Where the parts of each token's sums lie.
        places = [[e.at(b.extract_value(out, t), VECTOR * i) for i in range(PARTS)] for t in range(count)]
        again, zeros = b.icmp_signed("!=", more, I64(0)), e.constant(F32, [0.0] * ROWS)
        before = [
            [Lanes(b, b.select(again, e.load(p, F32, ROWS).value, zeros.value)) for p in of_token]
            for of_token in places
        ]
        sums = _multiply(e, signature.args[0].literal_value, w, blocks, addresses, before, fetch)
        for of_token, parts in zip(places, sums):
            for p, part in zip(of_token, parts):
                e.store(part, p)
        return context.get_dummy_value()

    tuples = types.UniTuple(types.int64, tokens.count)
    return types.none(kind, types.int64, types.int64, tuples, tuples, types.int64, types.int64), codegen
