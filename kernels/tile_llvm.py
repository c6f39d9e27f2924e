"""Reference: refimpl.reference.packed.linear for many tokens, by the tile instructions of newer Xeons (AMX).

A tile is a register of 16 rows of 64 bytes, and one instruction adds up 16 x 64 x 16 products of two of them,
where one of VNNI's makes 64. The bytes must be integers of 8 bits. Activations in Q8_K are; a weight without
its float scale, scale * q, has up to 14 bits. So it is parted in two, which takes two products, and the sum
is the integer that `panel_llvm` finds:

    w = scale * q = 2**shift * high + low
    sum of w * a  = 2**shift * (sum of high * a) + (sum of low * a)

    Q4_K      scale 0 .. 63, q 0 .. 15: high = (scale >> 3) * q, low = (scale & 7) * q, shift 3
    others    high = w >> 7, low = w & 127, shift 7

Of a panel of 16 rows, 256 columns at a time:

    once            `pack_tiles`        d, dmin and minima, low and high of a block of every row
    each 16 tokens  `multiply_tiles`    sums of low * a and of high * a
    each token      `add_sums`          them times d, less the minima, to the floats of the row

          activations            low, or high; one row is a vector of `panel_llvm`       sums, i32
    a0  | k0  k1  ...  k63 |     | r0: k0  k1  k2  k3  | r1: k0 ...  | ... | r15 |        | r0  r1  ...  r15 |
    a1  | k0  k1  ...  k63 |     | r0: k4  k5  k6  k7  | r1: k4 ...  | ... | r15 |        | r0  r1  ...  r15 |
    ... | 16 tokens        |     | ...      16 rows make 64 columns              |        | ... 16 tokens    |

The floats are those of `panel_llvm`, added in its order: the results have the same bits.

Why assembly. A product of tiles names three of eight registers, which nothing may move in between, and Numba
has no type for them. So the instructions on tiles are one piece of assembly, from memory to memory. It does
what `multiply_tiles_slowly` does, which stands in its place where there are no tiles: in tests.
"""

from __future__ import annotations

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from refimpl.formats import q4_k
from refimpl.kernels.dot_llvm import Q8_K_BYTES
from refimpl.kernels.jit import integers, jit, signed_bytes, words
from refimpl.kernels.panel_llvm import (
    INTERLEAVED,
    VECTOR,
    add_block,
    block_floats,
    layout_of,
    store_floats,
    unpack_block,
)
from refimpl.kernels.simd_llvm import F32, I16, I32, I64, LEVEL, Emitter, Lanes

TOKENS = 16  # rows of a tile of activations
BLOCK = 256  # columns
PLANE = BLOCK // 4 * VECTOR  # bytes of `low`, or of `high`
SUMS = TOKENS * VECTOR  # bytes of a tile of sums
CONFIGURATION = 64  # bytes

if LEVEL == "amx":
    llvm.initialize_native_asmparser()  # else LLVM takes assembly for text


# --- weights in two parts -----------------------------------------------------------------------------------


def _twice(scale: Lanes) -> Lanes:
    """Scales i32 [rows] in both halves of their words, i16 [2 rows]."""
    return ((scale & 0xFFFF) | (scale << 16)).bits(I16, VECTOR // 2)


def _parts(kind: int, q: Lanes, scale: Lanes) -> tuple[Lanes, Lanes]:
    """low and high of scale * q, i8 [4 rows] each: q u8 [4 rows], a word of four columns for each row, and
    scale i32 [rows].
    """
    pairs = q.bits(I16, VECTOR // 2)  # | odd column | even column |
    if _small(kind):  # a product of at most 7 * 15 stays in its byte: two at once
        return pairs * _twice(scale & 7), pairs * _twice(scale >> 3)
    # Elsewhere a product takes up to 14 bits: even and odd columns apart, then low and high of both woven
    # into bytes again, | odd | even |.
    even, odd = (pairs & 0xFF) * _twice(scale), (pairs >> 8) * _twice(scale)
    return (even & 127) | ((odd & 127) << 8), (even.sar(7) & 0xFF) | (odd.sar(7) << 8)


def _small(kind: int) -> bool:
    """Whether q is up to 15 and a scale up to 63."""
    return kind % INTERLEAVED == q4_k.GGML_TYPE


def _shift(kind: int) -> int:
    return 3 if _small(kind) else 7


@intrinsic(prefer_literal=True)
def pack_tiles(typingctx, kind, w, row_bytes, floats, planes):
    """pack_tiles(kind, w, row_bytes, floats, planes) inside a Numba function: the blocks of the ROWS rows at
    the address w, `row_bytes` apart. Their d, dmin and minima go to the address `floats`, as `panel_llvm` has
    them; low and high of their weights, i8 [64, rows, 4] one behind the other, to the address `planes`.
    `kind` is a constant that `layout_of` takes.
    """
    if not isinstance(kind, types.IntegerLiteral):
        return None

    def codegen(context, b, signature, args):
        _, w, row_bytes, floats, planes = args
        kind = signature.args[0].literal_value
        e, layout = Emitter(b, LEVEL), layout_of(kind)
        scales, weights = unpack_block(e, layout, w, row_bytes)
        store_floats(e, scales, floats)
        # Vector `four` of a plane is columns 4 four to 4 four + 3 of all rows: as it is drawn above.
        for g, k, q in weights:
            four = g * (64 // layout.groups) + k  # of the block's 64 times four columns
            for i, part in enumerate(_parts(kind, q, scales.scale(g))):
                e.store(part, e.at(planes, i * PLANE + four * VECTOR))
        return context.get_dummy_value()

    return types.none(kind, *[types.int64] * 4), codegen


# --- products -----------------------------------------------------------------------------------------------


@jit
def multiply_tiles_slowly(acts, planes, sums):
    """What `multiply_tiles` does, by loops."""
    for t in range(TOKENS):
        a = signed_bytes(acts + t * Q8_K_BYTES)
        for part in range(2):
            to = words(sums + part * SUMS + t * VECTOR)
            for row in range(VECTOR // 4):
                w, total = signed_bytes(planes + part * PLANE + 4 * row), np.int32(0)
                for k in range(BLOCK):
                    total += np.int32(a[k]) * np.int32(w[k // 4 * VECTOR + k % 4])
                to[row] = total


def _assembly() -> str:
    """Operands: 0 activations, 1 bytes from one token to the next, 2 planes, 3 bytes from one of their rows
    to the next, and of sums, 4 sums. Tiles 0 and 1 are sums, 2 and 3 activations, 4 to 7 low and high.
    """
    # Four steps of 64 columns. Steps take turns in registers, so that loads need not wait for products:
    #
    #     tile   0           1            2, 3              4, 6         5, 7
    #            | low sums  | high sums  | activations     | low        | high       of even, odd steps
    lines = ["tilezero %tmm0", "tilezero %tmm1"]
    for step in range(BLOCK // 64):
        a, w = 2 + step % 2, 4 + step % 2 * 2
        lines += [f"tileloadd {64 * step}($0,$1,1), %tmm{a}"]
        for part in (0, 1):
            lines += [
                f"tileloadd {16 * VECTOR * step + PLANE * part}($2,$3,1), %tmm{w + part}",
                f"tdpbssd %tmm{w + part}, %tmm{a}, %tmm{part}",
            ]
    lines += ["tilestored %tmm0, ($4,$3,1)", f"tilestored %tmm1, {SUMS}($4,$3,1)"]
    return "\n".join(lines)


def write(b: ir.IRBuilder, text: str, *operands: ir.Value) -> None:
    """A piece of assembly, with operands in general registers."""
    kind = ir.FunctionType(ir.VoidType(), [I64] * len(operands))
    # "~{memory}": LLVM keeps no memory in registers across it, as the tiles' are loaded and stored there.
    constraints = ",".join(["r"] * len(operands) + ["~{memory}"])
    b.call(ir.InlineAsm(kind, text, constraints, side_effect=True), operands)


@intrinsic
def multiply_tiles(typingctx, acts, planes, sums):
    """multiply_tiles(acts, planes, sums) inside a Numba function: the activations of 16 tokens, whose Q8_K
    blocks lie side by side at the address `acts`, times low and high at the address `planes`, i8
    [64, 16, 4] each. Their sums, i32 [2, 16 tokens, 16 rows], go to the address `sums`.
    """

    def codegen(context, b, signature, args):
        acts, planes, sums = args
        write(b, _assembly(), acts, I64(Q8_K_BYTES), planes, I64(VECTOR), sums)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 3), codegen


@jit
def shapes_of_tiles(address):
    """Write what `begin_tiles` reads: each of the eight tiles is 16 rows of 64 bytes.

    byte  0        1            16                   32           48        56       64
        | 1 = the kind | 0      | bytes a row, eight | 0          | rows    | 0      |
                                | 16-bit numbers                  | bytes
    """
    at = integers(address)
    for i in range(8):
        at[i] = 0
    at[0] = 1
    at[2] = at[3] = 0x0040_0040_0040_0040
    at[6] = 0x1010_1010_1010_1010


@intrinsic
def begin_tiles(typingctx, shapes):
    """begin_tiles(shapes) inside a Numba function: this thread uses tiles of the shapes at that address."""

    def codegen(context, b, signature, args):
        write(b, "ldtilecfg ($0)", args[0])
        return context.get_dummy_value()

    return types.none(types.int64), codegen


@intrinsic
def end_tiles(typingctx):
    """end_tiles() inside a Numba function: this thread is done with tiles, which cost the system time at each
    change of threads.
    """

    def codegen(context, b, signature, args):
        write(b, "tilerelease")
        return context.get_dummy_value()

    return types.none(), codegen


# --- floats -------------------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def add_sums(typingctx, kind, floats, acts, sums, out, tokens):
    """add_sums(kind, floats, acts, sums, out, tokens) inside a Numba function: for up to 16 tokens, whose
    Q8_K blocks lie side by side at the address `acts`. out f32 [tokens, rows] += the
    block's part, from the sums of low * a, i32 [16, rows] at the address `sums`, those of high * a behind
    them, and what `pack_tiles` has written to `floats`. `kind` is a constant that `layout_of` takes.
    """
    if not isinstance(kind, types.IntegerLiteral):
        return None

    def codegen(context, b, signature, args):
        _, floats, acts, sums, out, tokens = args
        kind = signature.args[0].literal_value
        e, layout = Emitter(b, LEVEL), layout_of(kind)
        of_block = block_floats(e, layout, floats)

        def token(t: ir.Value, nothing: list[Lanes]) -> list[Lanes]:
            here = b.mul(t, I64(VECTOR))
            low, high = (e.load(e.at(e.at(sums, here), i * SUMS), I32, VECTOR // 4) for i in (0, 1))
            act, total = e.at(acts, b.mul(t, I64(Q8_K_BYTES))), e.load(e.at(out, here), F32, VECTOR // 4)
            total = add_block(e, layout, act, *of_block, low + (high << _shift(kind)), total)
            e.store(total, e.at(out, here))
            return nothing

        e.loop(tokens, [], token)
        return context.get_dummy_value()

    return types.none(kind, *[types.int64] * 5), codegen
