"""Reference: refimpl.reference.linear.linear, on CPUs with AVX-512: a strip of rows of BF16 or F16 with many
tokens, by the kernels of `wide_llvm`. It is done in the order of `pairs_numba`, with its scratch memory.
"""

from __future__ import annotations

from typing import Any

from refimpl.kernels.block_llvm import fetch
from refimpl.kernels.jit import floats, integers, jit, variant
from refimpl.kernels.pairs_numba import AT_ONCE, AT_TOTALS, TOTALS, copy_totals, vectors_of
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
    TOKENS_AT,
    W,
)
from refimpl.kernels.wide_llvm import BLOCK, BYTES, MOST_ROWS, PANEL_BYTES, ROWS, multiply_wide, pack_wide

KIND: Any = None  # given to a variant for each format
VECTORS: Any = None  # of a panel, given to each of three variants


def _multiply_panel(own, acts, act_bytes, columns, act_rows, count, start, step, to, to_step, last, ahead):
    """A panel times the tokens with these numbers; arguments as `pairs_numba._multiply_panel`."""
    rows = integers(act_rows)
    for t in range(0, count, 4):
        for i in range(t + 4, min(t + 8, count)):
            fetch(acts + rows[i] * act_bytes, 4 * BLOCK + 64)
        t1, t3, before = min(t + 1, count - 1), min(t + 3, count - 1), start + t * step
        a0, a1 = acts + rows[t] * act_bytes, acts + rows[t1] * act_bytes
        y0, y1 = to + t * to_step, to + min(t + 1, last) * to_step
        if count - t <= 2:  # one counts twice
            multiply_wide(VECTORS, columns, own, (a0, a1), before, step, (y0, y1), ahead)
        else:  # of three the last counts twice
            a2, a3 = acts + rows[t + 2] * act_bytes, acts + rows[t3] * act_bytes
            y2, y3 = to + (t + 2) * to_step, to + min(t + 3, last) * to_step
            multiply_wide(VECTORS, columns, own, (a0, a1, a2, a3), before, step, (y0, y1, y2, y3), ahead)
        ahead = own, 0  # the panel, which is here


_one, _two, _four = (jit(variant(_multiply_panel, f"{n}", VECTORS=n)) for n in (1, 2, 4))


def wide_strip(strip):
    """The rows of the strip at this address, at most `pairs_numba.HEIGHT`, with any number of tokens. What is
    taken apart next is fetched meanwhile.
    """
    a = integers(strip)
    first, end, columns, count, own = a[FIRST], a[END], a[COLUMNS], a[COUNT], a[OWN]
    rows, row_bytes = a[SIZE], a[ROW_BYTES]
    zeros = floats(own + PANEL_BYTES)
    for i in range(MOST_ROWS):
        zeros[i] = 0
    for t in range(0, count, AT_ONCE):
        n = min(AT_ONCE, count - t)
        for c in range(0, columns, BLOCK):
            part = min(BLOCK, columns - c)
            for top in range(first, end, MOST_ROWS):
                height = min(MOST_ROWS, end - top)
                vectors, source = vectors_of(height), a[W] + top * row_bytes + BYTES * c
                width = 4 * ROWS * vectors
                for v in range(vectors):
                    at, left = source + v * ROWS * row_bytes, height - v * ROWS
                    pack_wide(KIND, at, row_bytes, left, part, own + v * 4 * ROWS, width)
                # The same rows' next block, or the first one of the next strip, or of these for more tokens.
                ahead = source + BYTES * BLOCK
                if c + BLOCK >= columns:
                    ahead = source - BYTES * c if t + n < count else a[NEXT] + (top - first) * row_bytes
                totals = own + AT_TOTALS + (top - first) // MOST_ROWS * TOTALS
                start, step = (totals, width) if c else (own + PANEL_BYTES, 0)
                to, to_step, last = totals, width, n + 3
                if c + BLOCK >= columns and height == vectors * ROWS:
                    to, to_step, last = a[OUT] + 4 * (t * rows + top), 4 * rows, n - 1
                acts, numbers = a[ACTS] + 4 * c, a[TOKENS_AT] + 8 * t
                given = own, acts, a[ACT_BYTES], part, numbers, n, start, step, to, to_step, last
                if vectors == 4:
                    _four(*given, (ahead, row_bytes))
                elif vectors == 2:
                    _two(*given, (ahead, row_bytes))
                else:
                    _one(*given, (ahead, row_bytes))
        for top in range(first, end, MOST_ROWS):
            copy_totals(a, top, min(MOST_ROWS, end - top), t, n)
