"""Reference: refimpl.reference.packed.linear for many tokens. How a strip of rows goes through tiles, with
the instructions of `tile_llvm`: its blocks are taken apart once for all tokens.
"""

from __future__ import annotations

from typing import Any

from refimpl.kernels.block_llvm import fetch
from refimpl.kernels.dot_llvm import Q8_K_BYTES
from refimpl.kernels.interleaved_numba import block_at
from refimpl.kernels.jit import floats, integers
from refimpl.kernels.panel_llvm import ROWS, VECTOR, layout_of
from refimpl.kernels.strip_words import (
    ACT_BYTES,
    ACTS,
    COLUMNS,
    COUNT,
    END,
    FIRST,
    NEXT,
    OUT,
    OWN,
    ROW_BYTES,
    SIZE,
    W,
)
from refimpl.kernels.tile_llvm import (
    BLOCK,
    CONFIGURATION,
    PLANE,
    SUMS,
    TOKENS,
    add_sums,
    begin_tiles,
    end_tiles,
    multiply_tiles,
    multiply_tiles_slowly,
    pack_tiles,
    shapes_of_tiles,
)

# A thread's scratch behind the words of the strip, in bytes from OWN on:
#
#     0                CONFIGURATION      AT_PLANES        AT_SUMS                  AT_FLOATS
#     | tiles' shapes  | d, dmin, minima  | low   | high   | sums, two places       | f32 sums of the strip |
#     |                | of a panel       | i8 [64, 16, 4] | i32 [2, low/high,      | [panels, n tokens,    |
#     |                | (`pack_tiles`)   | each           |      16 tokens, 16]    |  ROWS]                |
HEIGHT = 64  # rows of a strip: activations come from the second-level cache once for all of them
AT_ONCE = 128  # tokens, whose sums of a strip take 32 kB
BEHIND = TOKENS - 1  # tokens that the last tile may have too few

# These are given to each variant. Without tiles (SLOWLY, for tests) loops take their place.
KIND: Any = None
SLOWLY: Any = False
BLOCK_BYTES: Any = None  # of weights
BESIDE: Any = None  # whether rows lie side by side
AT_PLANES: Any = None  # byte offsets in a thread's scratch: behind the packed block of a panel
AT_SUMS: Any = None
AT_FLOATS: Any = None


def blocks_side_by_side(args, low, high, who):
    """Q8_K blocks of tokens in rows, u8 [T, act_bytes], to one row for each block of columns: u8
    [act_bytes / 320, all, 320], in the order of rows int64 [P]. A task of `team`.

    A tile takes 16 tokens. In rows each of them would be in another page of memory.
    """
    a = integers(args)
    acts, act_bytes, rows, to, every = a[0], a[1], integers(a[2]), a[3], a[4]
    for i in range(low, high):
        for b in range(act_bytes // Q8_K_BYTES):
            source = integers(acts + rows[i] * act_bytes + b * Q8_K_BYTES)
            block = integers(to + (b * every + i) * Q8_K_BYTES)
            for k in range(Q8_K_BYTES // 8):
                block[k] = source[k]
    return 1


def tile_strip(strip):
    """The rows of the strip at this address with any number of tokens. The last panel of a matrix begins
    early enough to be whole.

    Its tokens' activations lie side by side, as `blocks_side_by_side` copies them: their first blocks from
    ACTS on, their second ones ACT_BYTES further, ... What the strip behind this one needs is fetched
    meanwhile.

    There are sums of two tiles, which lie in one page of 4,096 bytes: a CPU takes what it loads for what it
    has just stored if their places in a page are the same, and waits.
    """
    a = integers(strip)
    w, start, stop, rows, row_bytes = a[W], a[FIRST], a[END], a[SIZE], a[ROW_BYTES]
    columns, count, acts, act_bytes, own, ahead = a[COLUMNS], a[COUNT], a[ACTS], a[ACT_BYTES], a[OWN], a[NEXT]
    out, sums = floats(a[OUT]), floats(own + AT_FLOATS)
    of_block, planes, blocks, share = (
        own + CONFIGURATION,
        own + AT_PLANES,
        columns // BLOCK,
        ROWS * BLOCK_BYTES,
    )
    if not SLOWLY:
        shapes_of_tiles(own)
        begin_tiles(own)
    # Blocks are unpacked again for each AT_ONCE tokens, which is little beside that many products.
    for first in range(0, count, AT_ONCE):
        n = min(AT_ONCE, count - first)
        for i in range(HEIGHT * n):
            sums[i] = 0
        # Panels inside of blocks: a block of columns of all tokens is read from the second-level cache, for
        # every panel of the strip before the next one comes.
        for b in range(blocks):
            block = acts + b * act_bytes + first * Q8_K_BYTES
            for p in range(0, stop - start, ROWS):
                top = min(start + p, rows - ROWS)
                at_block = top * row_bytes + b * BLOCK_BYTES
                if BESIDE:
                    at_block = block_at(top, b, rows, blocks) * BLOCK_BYTES
                pack_tiles(KIND, w + at_block, row_bytes, of_block, planes)
                fetch(ahead + (b * (HEIGHT // ROWS) + p // ROWS) * share, share)
                for t in range(0, n + TOKENS, TOKENS):
                    if t < n:
                        # Two places in turns: sums are added up from one while the tiles write the other.
                        act, tile = block + t * Q8_K_BYTES, own + AT_SUMS + t // TOKENS % 2 * 2 * SUMS
                        if SLOWLY:
                            multiply_tiles_slowly(act, planes, tile)
                        else:
                            multiply_tiles(act, planes, tile)
                    if t:  # the tokens before these, as tiles are multiplied beside other instructions
                        u = t - TOKENS
                        act, tile = block + u * Q8_K_BYTES, own + AT_SUMS + u // TOKENS % 2 * 2 * SUMS
                        y = own + AT_FLOATS + (n * p + ROWS * u) * 4
                        add_sums(KIND, of_block, act, tile, y, min(TOKENS, n - u))
        for p in range(0, stop - start, ROWS):
            top = min(start + p, rows - ROWS)
            # Rows that two panels share are written twice, with the same bits.
            for t in range(n):
                for r in range(ROWS):
                    out[(first + t) * rows + top + r] = sums[n * p + ROWS * t + r]
    if not SLOWLY:
        end_tiles()


def constants(kind: int, slowly: bool = False) -> dict[str, Any]:
    """What a variant of `tile_strip` for a format is given."""
    at_planes = CONFIGURATION + layout_of(kind).group * VECTOR
    at_sums = at_planes + 2 * PLANE
    places = {"AT_PLANES": at_planes, "AT_SUMS": at_sums, "AT_FLOATS": at_sums + 2 * 2 * SUMS}
    layout = layout_of(kind)
    given = {"KIND": kind, "SLOWLY": slowly, "BLOCK_BYTES": layout.block_bytes}
    return given | places | {"BESIDE": layout.interleaved}


def tile_scratch_bytes(kind: int) -> int:
    """Bytes of scratch that `tile_strip` needs."""
    return constants(kind)["AT_FLOATS"] + AT_ONCE * HEIGHT * 4
