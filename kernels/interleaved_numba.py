"""Reference: refimpl.reference.packed.linear, of rows that lie side by side (refimpl.reference.interleaved).
How a strip of such rows is multiplied, by the instructions of `interleaved_llvm`.
"""

from __future__ import annotations

from typing import Any

from refimpl.kernels.dot_llvm import Q8_K_BYTES
from refimpl.kernels.interleaved_llvm import multiply_tile
from refimpl.kernels.jit import integers, jit
from refimpl.kernels.panel_llvm import TILE
from refimpl.kernels.strip_words import (
    ACT_BYTES,
    ACTS,
    COLUMNS,
    COUNT,
    END,
    FIRST,
    OUT,
    SIZE,
    TOKENS_AT,
    W,
)
from refimpl.reference.interleaved import GROUP, PART

KIND: Any = None  # these three are given to each variant
BLOCK_BYTES: Any = None
FETCH_FROM: Any = None  # tokens


@jit
def group_rows(row, rows):
    """Rows of the group that begins at `row`, of a matrix of so many: a whole group, or a single tile."""
    return GROUP if row // GROUP < rows // GROUP else TILE


@jit
def block_at(row, block, rows, blocks):
    """Blocks that lie before a block of the tile with this first row, in a matrix of so many rows and blocks
    of a row.
    """
    height = group_rows(row, rows)
    group = row // height * height
    each = -(-blocks // -(-blocks // PART))
    part = block // each * each
    long = min(each, blocks - part)
    return group * blocks + part * height + (row - group) * long + (block - part) * TILE


def interleaved_strip(strip):
    """The tiles of the strip at this address, with up to four of its tokens at a time. Rows are whole tiles,
    and strips begin with a group.
    """
    a = integers(strip)
    w, rows, blocks, end = a[W], a[SIZE], a[COLUMNS] // 256, a[END]
    acts, act_bytes, act_rows, count = a[ACTS], a[ACT_BYTES], integers(a[TOKENS_AT]), a[COUNT]
    last, step, each = count - 1, rows * 4, -(-blocks // -(-blocks // PART))
    group, fetch = a[FIRST], int(count >= FETCH_FROM)
    while group < end:
        below = group + group_rows(group, rows)
        for part in range(0, blocks, each):
            n, x = min(each, blocks - part), acts + part * Q8_K_BYTES
            for row in range(group, below, TILE):
                tile, y0 = w + block_at(row, part, rows, blocks) * BLOCK_BYTES, a[OUT] + row * 4
                # From the fifth token on a tile comes from this core's caches.
                for at in range(0, count, 4):
                    left, b0 = count - at, x + act_rows[at] * act_bytes
                    b1, y1 = x + act_rows[min(at + 1, last)] * act_bytes, y0 + min(1, left - 1) * step
                    if left == 1:
                        multiply_tile(KIND, tile, n, (b0,), (y0,), part, fetch)
                    elif left == 2:
                        multiply_tile(KIND, tile, n, (b0, b1), (y0, y1), part, fetch)
                    else:  # of three the last counts twice, and is written twice
                        b2 = x + act_rows[min(at + 2, last)] * act_bytes
                        b3, y3 = x + act_rows[min(at + 3, last)] * act_bytes, y0 + min(3, left - 1) * step
                        y = (y0, y1, y0 + 2 * step, y3)
                        multiply_tile(KIND, tile, n, (b0, b1, b2, b3), y, part, fetch)
                    y0 += 4 * step
        group = below
