"""Reference: refimpl.reference.fp8.linear, on CPUs with products of bfloat16: a strip of rows of E4M3 codes
with any number of tokens, by the kernels of `pair_llvm`, and what quantizes the tokens for them.

    for tokens, AT_ONCE at a time
        for each block of 128 columns
            for each 64 of the strip's rows
                take them apart                    a panel, in the first-level cache
                for each four of the tokens        multiply, scale, add to their totals

CPUs with AMX take sixteen tokens in place of four, by the tiles of `pair_tile_llvm`.

Two panels share a block's activations, which so come from memory half as often; and while one multiplies,
what the other needs of the next block has time to arrive.
"""

from __future__ import annotations

from typing import Any

from refimpl.kernels.block_llvm import fetch
from refimpl.kernels.jit import floats, integers, jit, variant
from refimpl.kernels.pair_llvm import (
    BLOCK,
    BLOCK_BYTES,
    MOST_ROWS,
    PANEL_BYTES,
    ROWS,
    VECTOR,
    multiply_pairs,
    pack_pairs,
    quantize_pairs,
)
from refimpl.kernels.pair_tile_llvm import (
    SUMS,
    TOKENS,
    WIDE,
    add_pair_sums,
    multiply_pair_tiles,
    multiply_pair_tiles_slowly,
)
from refimpl.kernels.pair_tile_llvm import (
    TILED as HAS_TILES,
)
from refimpl.kernels.strip_words import (
    ACTS,
    ALL,
    COLUMNS,
    COUNT,
    END,
    FIRST,
    NEXT,
    OUT,
    OWN,
    ROW_BYTES,
    SCALE_BYTES,
    SCALES,
    SIZE,
    TOKENS_AT,
    W,
)
from refimpl.kernels.tile_llvm import CONFIGURATION, begin_tiles, end_tiles, shapes_of_tiles

# All tokens' activations of a block of columns lie side by side, so that those who take four tokens at a time
# read one stream; behind all blocks are the scales, in the same order:
#
#     acts      | block 0: bf16 [ALL tokens, 128] | block 1 | ... | f32 [ALL] of block 0 | of block 1 | ...
TOKEN_BYTES = BLOCK_BYTES + 4  # of each block
AT_ONCE = 1024  # tokens, whose totals of a strip take 256 kB of the second-level cache

# A thread's scratch memory from OWN on:
#
#     0            PANEL_BYTES    AT_TOTALS
#     | panel      | zeros        | totals of the first panel: f32 [AT_ONCE, its rows] | of the second
#
# and with tiles, behind these:
#
#     AT_SUMS                               AT_ACTS                       AT_SHAPES
#     | sums of two halves of a panel, f32  | a block of 16 tokens, bf16  | tiles' shapes
HEIGHT = 2 * MOST_ROWS  # rows of a strip at most: all of a tile
AT_TOTALS = PANEL_BYTES + 4 * MOST_ROWS
TOTALS = AT_ONCE * 4 * MOST_ROWS
AT_SUMS = AT_TOTALS + 2 * TOTALS
AT_ACTS = AT_SUMS + 2 * SUMS
AT_SHAPES = AT_ACTS + TOKENS * BLOCK_BYTES
PAIR_SCRATCH = AT_SHAPES + CONFIGURATION
PIECE = 256  # columns that a thread quantizes at once, as `activations_numba.PIECE`

POWER_OF_TWO: Any = None  # given to each of two variants


def act_bytes(columns: int) -> int:
    """Bytes of a token's activations, on average."""
    return -(-columns // BLOCK) * TOKEN_BYTES


def quantize_pieces(args, low, high, who):
    """Pieces of PIECE columns of x f32 [ALL, K], all of the first token, then of the next, ..., to the layout
    above. A task of `team`.
    """
    a = integers(args)
    x, columns, acts, tokens = a[0], a[1], a[2], a[3]
    pieces, scales = -(-columns // PIECE), acts + -(-columns // BLOCK) * tokens * BLOCK_BYTES
    for i in range(low, high):
        t, start = i // pieces, i % pieces * PIECE
        for c in range(start, min(start + PIECE, columns), BLOCK):
            at = c // BLOCK * tokens + t
            source, n = x + 4 * (t * columns + c), min(BLOCK, columns - c)
            quantize_pairs(POWER_OF_TWO, source, n, acts + at * BLOCK_BYTES, scales + 4 * at)
    return 1


VECTORS: Any = None  # of a panel, given to each of three variants
BY_TILES: Any = False  # given to each of two variants: whether 16 tokens at a time go through tiles
SLOWLY: Any = False  # loops in place of these
PANEL: Any = None  # the `_panel` that is meant


def _multiply_panel(of, columns, act_rows, count, start, step, to, to_step, last, ahead):
    """A panel times so many tokens, whose numbers are int64 at `act_rows`. The totals from `start` on, `step`
    bytes a token, with this block's sums go to `to`, `to_step` bytes a token, none further than `last`.

    `ahead` is what `multiply_pairs` fetches, with the first tokens.
    """
    rows, pairs = integers(act_rows), columns // 2
    for t in range(0, count, 4):
        for i in range(t + 4, min(t + 8, count)):
            fetch(of[1] + rows[i] * BLOCK_BYTES, BLOCK_BYTES)
        t1, t3, before = min(t + 1, count - 1), min(t + 3, count - 1), start + t * step
        y0, y1 = to + t * to_step, to + min(t + 1, last) * to_step
        if count - t <= 2:  # one counts twice
            multiply_pairs(VECTORS, pairs, of, (rows[t], rows[t1]), before, step, (y0, y1), ahead)
        else:  # of three the last counts twice
            four = rows[t], rows[t1], rows[t + 2], rows[t3]
            y2, y3 = to + (t + 2) * to_step, to + min(t + 3, last) * to_step
            multiply_pairs(VECTORS, pairs, of, four, before, step, (y0, y1, y2, y3), ahead)
        ahead = of[0], 0  # the panel, which is here


_one, _two, _four = (jit(variant(_multiply_panel, f"{n}", VECTORS=n)) for n in (1, 2, 4))


def pair_strip(strip):
    """The rows of the strip at this address, at most HEIGHT and all of one row of tiles, with any number of
    tokens. What is taken apart next is fetched meanwhile.
    """
    a = integers(strip)
    first, end, columns, count, own = a[FIRST], a[END], a[COLUMNS], a[COUNT], a[OWN]
    zeros, blocks = floats(own + PANEL_BYTES), -(-columns // BLOCK)
    for i in range(MOST_ROWS):
        zeros[i] = 0
    if BY_TILES and not SLOWLY:
        shapes_of_tiles(own + AT_SHAPES)
        begin_tiles(own + AT_SHAPES)
    for t in range(0, count, AT_ONCE):
        n = min(AT_ONCE, count - t)
        for b in range(blocks):
            for top in range(first, end, MOST_ROWS):
                PANEL(a, b, blocks, top, min(MOST_ROWS, end - top), t, n)
        for top in range(first, end, MOST_ROWS):
            copy_totals(a, top, min(MOST_ROWS, end - top), t, n)
    if BY_TILES and not SLOWLY:
        end_tiles()


@jit
def vectors_of(height):
    """Registers of a panel of so many rows: 1, 2 or 4. Where rows are missing, some are computed in vain."""
    return 4 if height > 2 * ROWS else 2 if height > ROWS else 1


def _panel(a, b, blocks, top, height, t, n):
    """Block b of the `height` rows from `top` on, for n tokens from the strip's t on."""
    rows, row_bytes, every, own = a[SIZE], a[ROW_BYTES], a[ALL], a[OWN]
    source, part = a[W] + top * row_bytes + b * BLOCK, min(BLOCK, a[COLUMNS] - b * BLOCK)
    vectors = vectors_of(height)
    width = 4 * ROWS * vectors
    for v in range(vectors):
        at, left = source + v * ROWS * row_bytes, height - v * ROWS
        pack_pairs(at, row_bytes, left, part, own + v * 4 * ROWS, width)
    # The same rows' next block, or the first one of the next strip, or of these rows for more tokens.
    ahead = source + BLOCK
    if b + 1 == blocks:
        ahead = source - b * BLOCK if t + n < a[COUNT] else a[NEXT] + (top - a[FIRST]) * row_bytes
    totals = own + AT_TOTALS + (top - a[FIRST]) // MOST_ROWS * TOTALS
    start, step = (totals, width) if b else (own + PANEL_BYTES, 0)
    # The last sums go to their place at once, unless a panel has more rows than there are (`copy_totals`).
    to, to_step, last = totals, width, n + 3
    if b + 1 == blocks and height == vectors * ROWS:
        to, to_step, last = a[OUT] + 4 * (t * rows + top), 4 * rows, n - 1
    acts, scales = a[ACTS] + b * every * BLOCK_BYTES, a[ACTS] + every * (blocks * BLOCK_BYTES + 4 * b)
    of = own, acts, scales, a[SCALES] + top // BLOCK * a[SCALE_BYTES] + 4 * b
    numbers, asked, done = a[TOKENS_AT] + 8 * t, (ahead, row_bytes), 0
    if BY_TILES and part == BLOCK and n >= TOKENS:
        done = n // TOKENS * TOKENS
        if vectors == 4:
            _tiles_of_four(of, numbers, done, start, step, to, to_step, own, asked)
        elif vectors == 2:
            _tiles_of_two(of, numbers, done, start, step, to, to_step, own, asked)
        else:
            _tiles_of_one(of, numbers, done, start, step, to, to_step, own, asked)
        if done == n:
            return
        numbers, start, to, last = numbers + 8 * done, start + done * step, to + done * to_step, last - done
        asked = own, 0  # the panel, which is here
    given = of, part, numbers, n - done, start, step, to, to_step, last, asked
    if vectors == 4:
        _four(*given)
    elif vectors == 2:
        _two(*given)
    else:
        _one(*given)


def constants(by_tiles: bool) -> dict[str, Any]:
    """What a variant of `pair_strip` is given."""
    return {"BY_TILES": by_tiles, "SLOWLY": not HAS_TILES, "PANEL": _tiled if by_tiles else _plain}


def _by_tiles(of, numbers, count, start, step, to, to_step, own, ahead):
    """A panel times `count` tokens, a multiple of 16; arguments as `_multiply_panel`, and a thread's scratch
    memory. Half of a panel of four registers at a time. There are two places for sums, in turns: they are
    added up from one while the tiles write the other.
    """
    halves = 2 if VECTORS == 4 else 1
    units, act = count // TOKENS * halves, of[1]
    for u in range(units + 1):
        if u < units:
            half, sums = u % halves, own + AT_SUMS + u % 2 * SUMS
            if half == 0:
                act = _side_by_side(of[1], numbers + 8 * (u // halves * TOKENS), own + AT_ACTS)
            if SLOWLY:
                multiply_pair_tiles_slowly(VECTORS, act, of[0] + half * WIDE * VECTOR, sums)
            else:
                multiply_pair_tiles(VECTORS, act, of[0] + half * WIDE * VECTOR, sums)
            for row in range(u * BLOCK // 2 // units, (u + 1) * BLOCK // 2 // units):
                fetch(ahead[0] + row * ahead[1], BLOCK)
        if u:  # those before, as tiles are multiplied beside other instructions
            v = u - 1
            t, places = v // halves * TOKENS, v % halves * WIDE * VECTOR
            at, sums = numbers + 8 * t, own + AT_SUMS + v % 2 * SUMS
            before, after = start + t * step + places, to + t * to_step + places
            add_pair_sums(VECTORS, sums, at, of[2], of[3], before, step, after, to_step)


@jit
def _side_by_side(acts, numbers, room):
    """The address of a block of 16 tokens: where they lie, or in `room`, copied there."""
    rows = integers(numbers)
    for i in range(1, TOKENS):
        if rows[i] != rows[0] + i:
            for t in range(TOKENS):
                source, to = integers(acts + rows[t] * BLOCK_BYTES), integers(room + t * BLOCK_BYTES)
                for k in range(BLOCK_BYTES // 8):
                    to[k] = source[k]
            return room
    return acts + rows[0] * BLOCK_BYTES


@jit
def copy_totals(a, top, height, t, n):
    """Totals of a panel that has more rows than there are, to their place."""
    vectors = vectors_of(height)
    if height == vectors * ROWS:
        return
    totals = floats(a[OWN] + AT_TOTALS + (top - a[FIRST]) // MOST_ROWS * TOTALS)
    out = floats(a[OUT] + 4 * (t * a[SIZE] + top))
    for i in range(n):
        for r in range(height):
            out[i * a[SIZE] + r] = totals[i * vectors * ROWS + r]


_plain = jit(variant(_panel, "plain"))
_tiles_of_one, _tiles_of_two, _tiles_of_four = (
    jit(variant(_by_tiles, f"{n}", VECTORS=n, SLOWLY=not HAS_TILES)) for n in (1, 2, 4)
)
_tiled = jit(variant(_panel, "tiled", BY_TILES=True))
