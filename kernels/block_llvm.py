"""Reference: sixteen outputs of refimpl.reference.linear.linear at once, a part of four rows of float32 times
that of four tokens.

`dot` of `dot_llvm` decodes a weight for each four tokens anew. With many tokens it pays to decode a strip of
rows once, into float32 that stay in the second-level cache; what is left is a product of two blocks of
float32. The ten lines of Numba that do the same are these:

    def block(rows, tokens):  # f32 [4, K], f32 [4, K] -> f32 [4 tokens, 4 rows]
        y = np.zeros((4, 4), np.float32)
        for t in range(4):
            for r in range(4):
                for k in range(rows.shape[1]):
                    y[t, r] += rows[r, k] * tokens[t, k]
        return y

They are written in instructions (`simd_llvm`) because LLVM may not turn a sum of floats into a vector of sums
by itself: that changes the order of additions, and with it the last bits. Leave to take any order would let
the result depend on what the compiler chose. Here the order is fixed: lane by lane over the columns, and then
the lanes in halves. Each of the sixteen outputs has a register of its own for its sums: a step loads a
register of each row and each token and makes sixteen multiplications of it, so that loads do not hold them
up.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from refimpl.kernels.simd_llvm import F32, I64, LEVEL, WORDS, Emitter, Lanes

FOUR = range(4)
# of them at a time: without AVX-512 there are sixteen registers, and half of all sums fill eight
TOKENS_AT_ONCE = 4 if WORDS[LEVEL] == 16 else 2


def _sums(vectors: list[Lanes]) -> list[Lanes]:
    """The sum of each vector's lanes, f32 [n] -> all sums in the order of the vectors, in as many vectors f32
    [n] as it takes.
    """
    lanes = vectors[0].value.type.count
    width = lanes
    # With lanes of 4, two vectors x and y become one, then two of those:
    #
    #     x   x0 x1 x2 x3                 x0+x2 x1+x3 y0+y2 y1+y3
    #     y   y0 y1 y2 y3      ---->      and then, with z and w:  | sum x | sum y | sum z | sum w |
    while width > 1:  # of the lanes that belong together; two vectors' halves are added to make one
        half = width // 2
        low = [i for start in range(0, 2 * lanes, width) for i in range(start, start + half)]
        high = [i + half for i in low]
        vectors = [x.take(low, y) + x.take(high, y) for x, y in zip(vectors[::2], vectors[1::2])]
        width = half
    return vectors


def _multiply(e: Emitter, rows: list[ir.Value], tokens: list[ir.Value], columns: ir.Value) -> list[Lanes]:
    """Products of rows and tokens, f32 [columns] at their addresses, added up lane by lane: f32 [n] for each
    row of the first token, then of the next.
    """
    n = WORDS[e.level]

    def step(i: ir.Value, sums: list[Lanes]) -> list[Lanes]:
        at = e.b.mul(i, I64(4 * n))
        weights = [e.load(e.at(r, at), F32, n) for r in rows]
        acts = [e.load(e.at(t, at), F32, n) for t in tokens]
        # Tokens outside, rows inside: the order in which outputs are stored.
        pairs = [(a, w) for a in acts for w in weights]
        return [e.fma(w, a, s) for (a, w), s in zip(pairs, sums)]

    zeros = [e.constant(F32, [0.0] * n)] * (len(rows) * len(tokens))
    return e.loop(e.b.sdiv(columns, I64(n)), zeros, step)


@intrinsic
def multiply_block(typingctx, rows, row_bytes, columns, tokens, out):
    """multiply_block(rows, row_bytes, columns, (a0, a1, a2, a3), out) inside a Numba function: four rows of
    float32 from the address `rows` on, times four tokens' at theirs; f32 [token, row] to the address `out`.

    With one token, (a0,), so many rows as a register has lanes are multiplied by it. `columns` must be a
    multiple of 32.
    """
    if not isinstance(tokens, types.BaseTuple):
        return None
    count = tokens.count

    def codegen(context, b, signature, args):
        rows, row_bytes, columns, tokens, out = args
        e = Emitter(b, LEVEL)
        rows = [e.at(rows, b.mul(row_bytes, I64(r))) for r in (FOUR if count == 4 else range(WORDS[LEVEL]))]
        tokens = [b.extract_value(tokens, t) for t in range(count)]
        # Each turn has TOKENS_AT_ONCE times four registers of sums, which its loop over the columns keeps.
        for first in range(0, count, TOKENS_AT_ONCE):
            sums = _multiply(e, rows, tokens[first : first + TOKENS_AT_ONCE], columns)
            # 16 bytes a token (its four rows); a vector holds several tokens' sums.
            for i, v in enumerate(_sums(sums)):
                e.store(v, e.at(out, 16 * first + 4 * WORDS[LEVEL] * i))
        return context.get_dummy_value()

    return types.none(*[types.int64] * 3, types.UniTuple(types.int64, count), types.int64), codegen


@intrinsic
def fetch(typingctx, address, nbytes):
    """fetch(address, nbytes) inside a Numba function: ask for memory to be brought to the second-level
    cache.
    """

    def codegen(context, b, signature, args):
        e = Emitter(b, LEVEL)

        def line(i, nothing):
            e.prefetch(e.at(args[0], b.mul(i, I64(64))))
            return nothing

        e.loop(b.sdiv(b.add(args[1], I64(63)), I64(64)), [], line)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), codegen
