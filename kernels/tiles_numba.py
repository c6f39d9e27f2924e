"""Reference: refimpl.reference.packed.linear for many tokens. How a strip of rows goes through tiles, with
the instructions of `tile_llvm`: its blocks are taken apart once for all tokens.
"""

from __future__ import annotations

from typing import Any

from refimpl.kernels.block_llvm import fetch
from refimpl.kernels.dot_llvm import Q8_K_BYTES
from refimpl.kernels.jit import floats, integers
from refimpl.kernels.panel_llvm import PANELS, ROWS, VECTOR
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

HEIGHT = 64  # rows of a strip: its tokens' activations are copied side by side once for all of them
AT_ONCE = (
    128  # tokens, whose activations of a block, and sums, lie in the first-level cache beside the weights
)

# These are given to each variant. Without tiles (SLOWLY, for tests) loops take their place.
KIND: Any = None
SLOWLY: Any = False
BLOCK_BYTES: Any = None  # of weights
AT_PLANES: Any = None  # byte offsets in a thread's scratch: behind the packed block of a panel
AT_SUMS: Any = None
AT_FLOATS: Any = None


def tile_strip(
    w,
    s,
    start,
    stop,
    rows,
    row_bytes,
    scale_bytes,
    columns,
    act_rows,
    count,
    acts,
    act_bytes,
    out,
    own,
    ahead,
):
    """Rows start to stop - 1 of a job with any number of tokens; arguments as of every strip of
    `linear_numba`. The last panel of a matrix begins early enough to be whole.

    Its tokens' activations must lie one behind the other, from the first on, and be memory also for the 15
    tokens behind the last, as tiles are loaded whole. What the strip behind this one needs is fetched
    meanwhile.

    There are sums of two tiles, which lie in one page of 4,096 bytes: a CPU takes what it loads for what it
    has just stored if their places in a page are the same, and waits.
    """
    x, out, sums = acts + integers(act_rows)[0] * act_bytes, floats(out), floats(own + AT_FLOATS)
    of_block, planes, blocks, share = (
        own + CONFIGURATION,
        own + AT_PLANES,
        columns // BLOCK,
        ROWS * BLOCK_BYTES,
    )
    if not SLOWLY:
        shapes_of_tiles(own)
        begin_tiles(own)
    for first in range(0, count, AT_ONCE):
        n = min(AT_ONCE, count - first)
        for i in range(HEIGHT * n):
            sums[i] = 0
        for b in range(blocks):
            block = x + first * act_bytes + b * Q8_K_BYTES
            for p in range(0, stop - start, ROWS):
                top = min(start + p, rows - ROWS)
                pack_tiles(KIND, w + top * row_bytes + b * BLOCK_BYTES, row_bytes, of_block, planes)
                fetch(ahead + (b * (HEIGHT // ROWS) + p // ROWS) * share, share)
                for t in range(0, n + TOKENS, TOKENS):
                    if t < n:
                        act, tile = block + t * act_bytes, own + AT_SUMS + t // TOKENS % 2 * 2 * SUMS
                        if SLOWLY:
                            multiply_tiles_slowly(act, act_bytes, planes, tile)
                        else:
                            multiply_tiles(act, act_bytes, planes, tile)
                    if t:  # the tokens before these, as tiles are multiplied beside other instructions
                        t -= TOKENS
                        act, tile = block + t * act_bytes, own + AT_SUMS + t // TOKENS % 2 * 2 * SUMS
                        y = own + AT_FLOATS + (n * p + ROWS * t) * 4
                        add_sums(KIND, of_block, act, act_bytes, tile, y, min(TOKENS, n - t))
        for p in range(0, stop - start, ROWS):
            top = min(start + p, rows - ROWS)
            for t in range(n):
                for r in range(ROWS):
                    out[(first + t) * rows + top + r] = sums[n * p + ROWS * t + r]
    if not SLOWLY:
        end_tiles()


def constants(kind: int, slowly: bool = False) -> dict[str, Any]:
    """What a variant of `tile_strip` for a format is given."""
    at_planes = CONFIGURATION + PANELS[kind].group * VECTOR
    at_sums = at_planes + 2 * PLANE
    places = {"AT_PLANES": at_planes, "AT_SUMS": at_sums, "AT_FLOATS": at_sums + 2 * 2 * SUMS}
    return {"KIND": kind, "SLOWLY": slowly, "BLOCK_BYTES": PANELS[kind].block_bytes, **places}


def tile_scratch_bytes(kind: int) -> int:
    """Bytes of scratch that `tile_strip` needs."""
    return constants(kind)["AT_FLOATS"] + AT_ONCE * HEIGHT * 4
