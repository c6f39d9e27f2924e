"""Reference: refimpl.reference.linear.linear on BF16 and F16, a block of columns of some tokens and a panel
of up to 64 rows at a time, in float32.

Activations of these weights stay float32 numbers, so products are those of float32. The kernel has the shape
of `pair_llvm`'s, with one column of sixteen rows in a register. The ten lines of Numba that do the same are
these:

    def wide(weights, acts):  # f32 [64, R], f32 [T, 64] -> f32 [T, R]
        y = np.zeros((len(acts), weights.shape[1]), np.float32)
        for t in range(len(acts)):
            for k in range(len(weights)):
                for r in range(weights.shape[1]):
                    y[t, r] += weights[k, r] * acts[t, k]
        return y

A panel of 64 columns and 64 rows takes 16 kB, half of a first-level cache:

    panel, f32    | column 0 of rows 0 .. 15 | of rows 16 .. 31 | ... | column 1 of rows 0 .. 15 | ...

`block_llvm` does the same where registers are fewer or narrower than AVX-512's.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from refimpl.formats import bf16, f16
from refimpl.kernels.simd_llvm import F32, I16, I64, LEVEL, WORDS, Emitter, Lanes

WIDE = (bf16.GGML_TYPE, f16.GGML_TYPE) if WORDS[LEVEL] == 16 and LEVEL != "generic" else ()
BLOCK = 64  # columns
BYTES = 2  # of a weight
ROWS = 16  # of a register
VECTOR = 4 * ROWS  # bytes
MOST_ROWS = 4 * ROWS  # of a panel
PANEL_BYTES = BLOCK * 4 * MOST_ROWS


def _two_columns(e: Emitter, kind: int, words: Lanes) -> list[Lanes]:
    """Two weights of each of 16 rows, i32 [16] -> f32 [16] of the first, of the second."""
    if kind == bf16.GGML_TYPE:
        return [(words << 16).bits(F32, ROWS), (words & 0xFFFF0000).bits(F32, ROWS)]
    return [e.half(words.trunc(I16)), e.half((words >> 16).trunc(I16))]


@intrinsic(prefer_literal=True)
def pack_wide(typingctx, kind, rows, row_bytes, count, columns, panel, step):
    """pack_wide(kind, rows, row_bytes, count, columns, panel, step) inside a Numba function: columns of up to
    16 rows of weights, `row_bytes` apart, to float32 at the address `panel`, a register each `step` bytes. In
    place of rows from `count` on the last is taken again; columns are a multiple of 8.

    `kind` is a constant of WIDE.
    """
    if not isinstance(kind, types.IntegerLiteral):
        return None

    def codegen(context, b, signature, args):
        _, rows, row_bytes, count, columns, panel, step = args
        e, last, of = Emitter(b, LEVEL), b.sub(count, I64(1)), signature.args[0].literal_value
        places = [b.select(b.icmp_signed("<", I64(r), last), I64(r), last) for r in range(ROWS)]
        at = [e.at(rows, b.mul(place, row_bytes)) for place in places]

        def eight(i: ir.Value, nothing: list[Lanes]) -> list[Lanes]:
            words = e.words_at([e.at(row, b.mul(i, I64(16))) for row in at])
            to = e.at(panel, b.mul(b.mul(i, I64(8)), step))
            for j, column in enumerate(x for two in words for x in _two_columns(e, of, two)):
                e.store(column, e.at(to, b.mul(step, I64(j))))
            return nothing

        e.loop(b.sdiv(columns, I64(8)), [], eight)
        return context.get_dummy_value()

    return types.none(kind, *[types.int64] * 6), codegen


@intrinsic(prefer_literal=True)
def multiply_wide(typingctx, vectors, columns, panel, tokens, start, step, to, ahead):
    """multiply_wide(vectors, columns, panel, tokens, start, step, to, ahead) inside a Numba function: so many
    columns of a panel, times those of two or four tokens, f32 at these addresses. The sums and what is at
    `start`, f32 [16 * vectors], `step` bytes further for each token, go to the addresses `to`.

    `vectors` is a constant: of the panel. `ahead` as in `pair_llvm.multiply_pairs`.
    """
    if not isinstance(vectors, types.IntegerLiteral):
        return None

    def codegen(context, b, signature, args):
        _, columns, panel, tokens, start, step, to, ahead = args
        e, many, count = Emitter(b, LEVEL), signature.args[0].literal_value, signature.args[3].count
        tokens, to = ([b.extract_value(x, i) for i in range(count)] for x in (tokens, to))

        def column(i: ir.Value, sums: list[Lanes]) -> list[Lanes]:
            at = e.at(panel, b.mul(i, I64(many * VECTOR)))
            weights = [e.load(e.at(at, VECTOR * v), F32, ROWS) for v in range(many)]
            soon = e.at(b.extract_value(ahead, 0), b.mul(b.extract_value(ahead, 1), i))
            for line in range(0, BYTES * BLOCK + 64, 64):
                e.prefetch(e.at(soon, line))
            acts = [e.splat(e.load(e.at(t, b.mul(i, I64(4))), F32), ROWS) for t in tokens]
            return [e.fma(w, x, y) for y, (w, x) in zip(sums, [(w, x) for x in acts for w in weights])]

        sums = e.loop(columns, [e.constant(F32, [0.0] * ROWS)] * (many * count), column)
        for i, y in enumerate(sums):
            before = e.at(start, b.add(b.mul(step, I64(i // many)), I64(VECTOR * (i % many))))
            e.store(y + e.load(before, F32, ROWS), e.at(to[i // many], VECTOR * (i % many)))
        return context.get_dummy_value()

    two, each = (types.UniTuple(types.int64, n) for n in (2, tokens.count))
    given = types.int64, types.int64, each, types.int64, types.int64, each, two
    return types.none(vectors, *given), codegen
