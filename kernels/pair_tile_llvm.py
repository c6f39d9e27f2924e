"""Reference: refimpl.reference.fp8.linear, a block of 128 columns of sixteen tokens and of up to 32 rows of
a panel of `pair_llvm` at a time, by the tile instructions of newer Xeons (AMX) on pairs of bfloat16.

A tile has 16 rows of 64 bytes. One instruction, tdpbf16ps, multiplies sixteen tokens' pairs with the same
pairs of sixteen rows, sixteen pairs each: 8,192 multiplications, where vdpbf16ps makes 32. The panel that
`pack_pairs` writes for vdpbf16ps is what it wants of its second operand, with a step from pair to pair:

          activations, bf16               panel, a pair of bf16 in 32 bits           sums, f32
    a0  | k0 k1 | k2 k3 | ... |      | r0: k0 k1 | r1: k0 k1 | ... | r15 |      | r0  r1  ...  r15 |
    a1  | k0 k1 | k2 k3 | ... |      | r0: k2 k3 | r1: k2 k3 | ... | r15 |      | r0  r1  ...  r15 |
    ... | 16 tokens           |      | ...  16 rows make 32 columns              |  | ... 16 tokens    |

Of a block's four tiles of 32 columns, each adds up its even and its odd columns apart, then both, to the sums
of those before. All products are exact: codes of E4M3 have four bits of significand. The instruction takes
numbers below 2**-126 for zero, and no sum of products of codes is so small unless it is zero. Behind the
block, sums are multiplied by the scales and added to the totals, as `multiply_pairs` does.

Why assembly: as in `tile_llvm`. `multiply_pair_tiles_slowly` does the same by loops, and stands in its place
where there are no tiles: in tests.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from refimpl.kernels.jit import floats, jit, words
from refimpl.kernels.pair_llvm import BLOCK, BLOCK_BYTES, ROWS, VECTOR
from refimpl.kernels.simd_llvm import F32, I64, LEVEL, Emitter, Lanes
from refimpl.kernels.tile_llvm import write

TILED = LEVEL == "amx"  # whether this CPU has the instructions
TOKENS = 16  # rows of a tile of activations
WIDE = 2  # registers' width of a panel at a time, at most
SUMS = TOKENS * WIDE * VECTOR  # bytes
TILE_PAIRS = 16  # of columns


@intrinsic
def float_of(typingctx, bits):
    """float_of(bits) inside a Numba function: the float32 with these bits, i32."""
    return types.float32(types.int32), lambda context, b, signature, args: b.bitcast(args[0], F32)


@jit
def multiply_pair_tiles_slowly(vectors, acts, panel, sums):
    """What `multiply_pair_tiles` does, by loops."""
    for t in range(TOKENS):
        a, to = words(acts + t * BLOCK_BYTES), floats(sums + t * WIDE * VECTOR)
        for row in range(min(vectors, WIDE) * ROWS):
            w, total = words(panel + 4 * row), float_of(0)
            for first in range(0, BLOCK // 2, TILE_PAIRS):
                even, odd = float_of(0), float_of(0)
                for k in range(first, first + TILE_PAIRS):
                    x, y = a[k], w[k * vectors * ROWS]
                    even += float_of(x << 16) * float_of(y << 16)
                    odd += float_of(x & -65536) * float_of(y & -65536)
                total += even + odd
            to[row] = total


def assembly(vectors: int) -> str:
    """Operands: 0 activations, 1 bytes from one token to the next, 2 the panel of so many registers, 3 bytes
    from one of its pairs to the next, 4 sums, 5 bytes from one token's sums to the next. Tiles 0 and 1 are
    sums, 2 and 3 activations, 4 to 7 rows.
    """
    parts = range(min(vectors, WIDE))
    lines = [f"tilezero %tmm{part}" for part in parts]
    for step in range(BLOCK // 2 // TILE_PAIRS):  # they take turns in registers, so that loads need not wait
        a, w, at = 2 + step % 2, 4 + step % 2 * 2, TILE_PAIRS * vectors * VECTOR * step
        lines += [f"tileloadd {VECTOR * step}($0,$1,1), %tmm{a}"]
        for part in parts:
            lines += [
                f"tileloadd {at + VECTOR * part}($2,$3,1), %tmm{w + part}",
                f"tdpbf16ps %tmm{w + part}, %tmm{a}, %tmm{part}",
            ]
    return "\n".join(lines + [f"tilestored %tmm{part}, {VECTOR * part}($4,$5,1)" for part in parts])


@intrinsic(prefer_literal=True)
def multiply_pair_tiles(typingctx, vectors, acts, panel, sums):
    """multiply_pair_tiles(vectors, acts, panel, sums) inside a Numba function: the activations of 16 tokens,
    bf16 [16, 128] at the address `acts`, times the first 32 rows from the address `panel` on. Their sums, f32
    [16 tokens, 32 rows], go to the address `sums`.

    `vectors` is a constant: of the panel. Of one alone there are 16 rows, and every other 16 sums.
    """
    if not isinstance(vectors, types.IntegerLiteral):
        return None

    def codegen(context, b, signature, args):
        _, acts, panel, sums = args
        many = signature.args[0].literal_value
        steps = I64(BLOCK_BYTES), I64(many * VECTOR), I64(WIDE * VECTOR)
        write(b, assembly(many), acts, steps[0], panel, steps[1], sums, steps[2])
        return context.get_dummy_value()

    return types.none(vectors, *[types.int64] * 3), codegen


@intrinsic(prefer_literal=True)
def add_pair_sums(typingctx, vectors, sums, tokens, scales, scale, start, step, to, to_step):
    """add_pair_sums(vectors, sums, tokens, scales, scale, start, step, to, to_step) inside a Numba function:
    what `multiply_pair_tiles` left at `sums`, times the scales f32 of 16 tokens, whose numbers are int64 at
    `tokens`, from `scales` on, and that of the tile, f32 at `scale`. They and what is at `start`, `step`
    bytes further for each token, go to `to`, `to_step` bytes further for each token. `vectors` is a constant:
    of the panel.
    """
    if not isinstance(vectors, types.IntegerLiteral):
        return None

    def codegen(context, b, signature, args):
        many = min(signature.args[0].literal_value, WIDE)
        _, sums, tokens, scales, scale, start, step, to, to_step = args
        e = Emitter(b, LEVEL)
        of_tile = e.splat(e.load(scale, F32), ROWS)

        def token(i: ir.Value, nothing: list[Lanes]) -> list[Lanes]:
            number = e.load(e.at(tokens, b.mul(i, I64(8))), I64)
            both = e.splat(e.load(e.at(scales, b.mul(number, I64(4))), F32), ROWS) * of_tile
            found, before, after = (
                e.at(at, b.mul(i, by))
                for at, by in ((sums, I64(WIDE * VECTOR)), (start, step), (to, to_step))
            )
            for v in range(many):
                y, total = (e.load(e.at(at, VECTOR * v), F32, ROWS) for at in (found, before))
                e.store(e.fma(y, both, total), e.at(after, VECTOR * v))
            return nothing

        e.loop(I64(TOKENS), [], token)
        return context.get_dummy_value()

    return types.none(vectors, *[types.int64] * 8), codegen
