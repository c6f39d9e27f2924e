"""Reference: refimpl.reference.linear.linear, and below it refimpl.reference.packed.linear and
refimpl.fp8.linear.

One kernel multiplies everything: `multiply_jobs` takes a list of jobs, each a matrix and the activations that
go through it, and has a team of threads (`team`) take their rows, in strips. Every output is computed by one
thread in one order, so results do not depend on the number of threads.

A strip goes one of seven ways, by its format and the number of its tokens:

    rows          a row at a time with up to four tokens (`dot_llvm`): any format
    lanes         a panel of rows, a lane each, from three tokens on (`panel_llvm`): K-quants and IQ4_XS
    interleaved   a tile of rows, a lane each, that lie side by side in memory (`interleaved_numba`)
    tiles         several panels with many tokens (`tiles_numba`): these, where the CPU has AMX
    blocks        rows decoded to float32 once, four of them times four tokens (`block_llvm`): floats, many
                  tokens
    wide          panels of float32, 64 rows high (`wide_numba`): BF16 and F16 with many tokens, with AVX-512
    pairs         panels of pairs of bfloat16 (`pairs_numba`): E4M3 with some tokens in E4M3, where the CPU
                  multiplies these
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from refimpl.kernels.activations_numba import PIECES
from refimpl.kernels.block_llvm import fetch, multiply_block
from refimpl.kernels.dot_llvm import AHEAD, Q8_K_BYTES, dot
from refimpl.kernels.floats_llvm import FLOATS, decode
from refimpl.kernels.int4_llvm import INT4
from refimpl.kernels.interleaved_llvm import FETCH_FROM
from refimpl.kernels.interleaved_numba import interleaved_strip
from refimpl.kernels.jit import call, callback, floats, integers, jit, variant
from refimpl.kernels.pairs_numba import constants as of_pairs
from refimpl.kernels.pairs_numba import pair_strip
from refimpl.kernels.panel_llvm import INTERLEAVED, PANELS, ROWS, layout_of, multiply, pack_panel
from refimpl.kernels.simd_llvm import LEVEL
from refimpl.kernels.strip_words import (
    ACT_BYTES,
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
    STRIP_BYTES,
    TOKENS_AT,
    W,
)
from refimpl.kernels.team import region
from refimpl.kernels.tiles_numba import BEHIND, blocks_side_by_side, tile_strip
from refimpl.kernels.tiles_numba import constants as tile_constants
from refimpl.kernels.wide_numba import wide_strip

BLOCKS_FROM = 8  # tokens, from where strips go the way of many: blocks or tiles
PART = 1024  # columns decoded at a time, and
BLOCK_ROWS = 64  # rows, 256 KB of the second-level cache, where a job's activations would fill
ACTS_BYTES = 1 << 20  # of it: they pass by once for all of these rows
GRAIN = 1 << 16  # bytes of weights a thread takes at least, with one token

# The jobs of a call, and what a chunk of the team's region is. Strips are numbered through all jobs:
#
#               job 0, its matrix         job 1                     ...
#     rows      | 0..h-1 | h.. | .. |     | 0..h-1 | h.. | .. |     h = height, the last may be lower
#     strip       0        1     2          3        4     5
#
#     out       | tokens of job 0: f32 [counts[0], rows] | tokens of job 1 | ...
#
# A thread that takes strips 4 and 5 reads job 1's rows from h on, in one run of the file.
KIND: Any = None  # these are given to each variant of the functions below
LINES: Any = None
BYTES: Any = None
TILE_ROWS: Any = None  # that have the same scales


@jit
def _part(columns, tokens):
    """Columns of a part of a row, of `columns` with so many tokens: as few parts of equal length as leave
    half of a first-level cache of 32 kB to the weights.
    """
    parts = -(-columns * tokens // 4096)
    return -(-columns // parts // 128) * 128


def _row_strip(strip):
    """The rows of the strip at this address, one at a time with up to four of its tokens.

    Activations in float32 would fill the first-level cache, and go through it once for each row; so rows are
    taken in parts that leave room.
    """
    a = integers(strip)
    w, s, first, end = a[W], a[SCALES], a[FIRST], a[END]
    rows, row_bytes, scale_bytes, columns = a[SIZE], a[ROW_BYTES], a[SCALE_BYTES], a[COLUMNS]
    acts, act_bytes, act_rows, count = a[ACTS], a[ACT_BYTES], integers(a[TOKENS_AT]), a[COUNT]
    out, t = floats(a[OUT]), 0
    while t < count:
        last, four = count - 1, count - t > 2  # four at once; of three the last counts twice
        t1, t2, t3 = min(t + 1, last), min(t + 2, last), min(t + 3, last)
        a0, a1 = acts + act_rows[t] * act_bytes, acts + act_rows[t1] * act_bytes
        a2, a3 = acts + act_rows[t2] * act_bytes, acts + act_rows[t3] * act_bytes
        step = columns  # quantized weights; and one token's E4M3, which waits for arithmetic
        if BYTES == 2 or (BYTES and four):
            step = _part(columns, 4 if four else 1)
        for c in range(0, columns, step):
            n, x, after = min(step, columns - c), 4 * c, step if c + step < columns else -c
            # All rows before the next part: the activations' part stays in the first-level cache.
            for r in range(first, end):
                # Two rows on, in this part of the strip, in its next part, or in the next strip.
                further = (2 if r + 2 < end or after < 0 else 2 + first - end) * row_bytes + (
                    0 if r + 2 < end else after * BYTES
                )
                # FP8's scales stand for tiles of TILE_ROWS rows and 128 columns.
                p, tile = w + r * row_bytes + c * BYTES, s + r // TILE_ROWS * scale_bytes + c // 128 * 4
                further = AHEAD if step == columns else further
                if four:
                    y0, y1, y2, y3 = dot(KIND, p, tile, n, (a0 + x, a1 + x, a2 + x, a3 + x), further)
                    o0, o1, o2, o3 = t * rows + r, t1 * rows + r, t2 * rows + r, t3 * rows + r
                    if c:
                        y0, y1, y2, y3 = out[o0] + y0, out[o1] + y1, out[o2] + y2, out[o3] + y3
                    out[o0], out[o1], out[o2], out[o3] = y0, y1, y2, y3
                else:
                    y0 = dot(KIND, p, tile, n, (a0 + x,), further)[0]
                    out[t * rows + r] = out[t * rows + r] + y0 if c else y0
        t += 4 if four else 1


def _lane_strip(strip):
    """Panels of ROWS rows of the strip at this address, side by side from three tokens on. The last panel of
    a matrix begins early enough to be whole.

    One or two tokens are not worth taking a strip apart: the time goes to memory, which is fastest when read
    row by row.
    """
    a = integers(strip)
    w, rows, row_bytes, columns = a[W], a[SIZE], a[ROW_BYTES], a[COLUMNS]
    first, end, own, ahead, out = a[FIRST], a[END], a[OWN], a[NEXT], a[OUT]
    acts, act_bytes, act_rows, count = a[ACTS], a[ACT_BYTES], integers(a[TOKENS_AT]), a[COUNT]
    y, last = floats(out), count - 1
    a0, a1 = acts + act_rows[0] * act_bytes, acts + act_rows[min(1, last)] * act_bytes
    for panel in range(first, end, ROWS):
        # Rows that two panels share are computed twice, to the same bits.
        top = min(panel, rows - ROWS)
        if count == 1:
            for r in range(top, top + ROWS):
                y[r] = dot(KIND, w + r * row_bytes, 0, columns, (a0,), AHEAD)[0]
            continue
        if count == 2:
            for r in range(top, top + ROWS):
                y[r], y[rows + r] = dot(KIND, w + r * row_bytes, 0, columns, (a0, a1), AHEAD)
            continue
        pack_panel(KIND, w + top * row_bytes, row_bytes, columns, own)
        # While tokens pass, the next panel is fetched at the pace at which memory delivers: LINES of the
        # cache for each block of columns.
        fetched, lines = 0, min(LINES, -(-4 * LINES // count))
        further = w + (panel + ROWS) * row_bytes if panel + ROWS < end else ahead
        step, y0 = rows * 4, out + top * 4
        # Four tokens share each load of weights.
        for at in range(0, count, 4):
            left, b0 = count - at, acts + act_rows[at] * act_bytes
            b1 = acts + act_rows[min(at + 1, last)] * act_bytes
            b2 = acts + act_rows[min(at + 2, last)] * act_bytes
            y1 = y0 + min(1, left - 1) * step
            if left == 1:
                multiply(KIND, own, columns, further, lines, (b0,), (y0,))
            elif left == 2:
                multiply(KIND, own, columns, further, lines, (b0, b1), (y0, y1))
            else:  # of three the last counts twice
                b3, y3 = acts + act_rows[min(at + 3, last)] * act_bytes, y0 + min(3, left - 1) * step
                multiply(KIND, own, columns, further, lines, (b0, b1, b2, b3), (y0, y1, y0 + 2 * step, y3))
            y0 += 4 * step
            fetched, further = fetched + lines, further + columns // 256 * lines * 64
            lines = min(lines, LINES - fetched)


def _block_strip(strip):
    """The rows of the strip at this address, floats with many tokens: decoded once for all of them, PART
    columns at a time, into the way's own memory, and multiplied there, four rows by four tokens. What is
    decoded next is fetched meanwhile, a row for each of the first products.
    """
    a = integers(strip)
    w, s, first, end = a[W], a[SCALES], a[FIRST], a[END]
    rows, row_bytes, scale_bytes, columns = a[SIZE], a[ROW_BYTES], a[SCALE_BYTES], a[COLUMNS]
    acts, act_bytes, act_rows, count = a[ACTS], a[ACT_BYTES], integers(a[TOKENS_AT]), a[COUNT]
    own, ahead, out, last, height = a[OWN], a[NEXT], floats(a[OUT]), count - 1, end - first
    at_sums = own + BLOCK_ROWS * PART * 4
    # The way's own memory, f32: what is decoded, then the sums of one product.
    #
    #     own       | row 0: PART columns | row 1 | ... | row BLOCK_ROWS - 1 |
    #     at_sums   | token 0: rows 0 1 2 3 | token 1 | token 2 | token 3 |
    sums, row_part = floats(at_sums), min(PART, columns) * BYTES
    for c in range(0, columns, PART):
        n, x, fetched = min(PART, columns - c), acts + 4 * c, 0
        for r in range(first, end):
            tile = s + r // 128 * scale_bytes + c // 128 * 4
            decode(KIND, w + r * row_bytes + c * BYTES, tile, n, own + (r - first) * PART * 4)
        then = w + first * row_bytes + (c + PART) * BYTES if c + PART < columns else ahead
        # Rows to fetch with each product, so that all are asked for before the products end.
        each = -(-height // (-(-height // 4) * -(-count // 4)))
        for t in range(0, count, 4):
            a0, a1 = x + act_rows[t] * act_bytes, x + act_rows[min(t + 1, last)] * act_bytes
            a2 = x + act_rows[min(t + 2, last)] * act_bytes
            a3 = x + act_rows[min(t + 3, last)] * act_bytes
            for r in range(0, height, 4):
                for _ in range(min(each, height - fetched)):
                    fetch(then + fetched * row_bytes, row_part)
                    fetched += 1
                multiply_block(own + r * PART * 4, PART * 4, n, (a0, a1, a2, a3), at_sums)
                for i in range(min(4, count - t)):
                    for j in range(min(4, height - r)):
                        at = (t + i) * rows + first + r + j
                        out[at] = sums[4 * i + j] + (out[at] if c else np.float32(0))


def _strips(args, low, high, who):
    """Strips low to high - 1 of all that the jobs have, one job after the other: a task of `team`, with the
    arguments that `multiply_jobs` makes.
    """
    a = integers(args)
    # The 21 arguments, as `multiply_jobs` fills them:
    #
    #     0, 1      the way of few tokens, of many                    11       tokens' numbers, int64
    #     2         rows of a strip                                   12, 13   activations, bytes of a token's
    #     3 .. 6    rows, bytes of a row, of a row of scales,         14       outputs
    #               columns                                           15, 16   scratch, bytes of a thread's
    #     7, 8      addresses of matrices, of their tile scales       17       jobs
    #     9, 10     first token and number of tokens of each job      18, 19   activations side by side or 0,
    #                                                                          and how many are there
    #                                                                 20       tokens with activations
    scratch = a[15] + who * a[16]
    few, many, height, rows, row_bytes, jobs = a[0], a[1], a[2], a[3], a[4], a[17]
    data, scales, firsts, counts = integers(a[7]), integers(a[8]), integers(a[9]), integers(a[10])
    strip = integers(scratch)
    for word in range(4):
        strip[SIZE + word] = a[3 + word]
    strip[OWN], strip[ALL], side_by_side = scratch + STRIP_BYTES, a[20], a[18]
    strips, act_rows, out = -(-rows // height), a[11], a[14]
    j, i = low // strips, low % strips
    # A thread's first strip may be in any job: its outputs stand behind those of the jobs before.
    for before in range(j):
        out += counts[before] * rows * 4
    for t in range(low, high):
        w, first, end = data[j], i * height, min(i * height + height, rows)
        ahead = w + end * row_bytes if i + 1 < strips else data[min(j + 1, jobs - 1)]
        if t + 1 == high:  # the next strip is another thread's
            ahead = w + first * row_bytes
        strip[ACTS], strip[ACT_BYTES] = a[12], a[13]
        # Tiles find block b of all tokens together: the step from token to token is a block, ACT_BYTES the
        # way from one block of columns to the next.
        if side_by_side and counts[j] >= BLOCKS_FROM:
            strip[ACTS], strip[ACT_BYTES] = side_by_side + firsts[j] * Q8_K_BYTES, a[19] * Q8_K_BYTES
        strip[W], strip[SCALES], strip[FIRST], strip[END] = w, scales[j], first, end
        strip[TOKENS_AT], strip[COUNT] = act_rows + 8 * firsts[j], counts[j]
        strip[OUT], strip[NEXT] = out, ahead
        call(few if counts[j] < BLOCKS_FROM else many, (scratch,))
        i += 1
        if i == strips:
            out += counts[j] * rows * 4
            j, i = j + 1, 0
    return 1


@jit
def multiply_jobs(team, layout, data, scales, first, counts, act_rows, acts, out, scratch, side_by_side):
    """Job j multiplies the matrix at data[j], whose tile scales are at scales[j], with the activations
    act_rows[first[j] : first[j] + counts[j]]; these five are int64. What the matrices have in common is
    `layout`, int64 [11], from `linear_numba.JobLayout.words`.

    Its outputs stand behind those of the jobs before it in out f32 [sum of counts, rows]. acts u8 [T, bytes],
    scratch u8 [threads, bytes]. side_by_side u8 [bytes] is memory for the activations as tiles want them,
    empty where there are none. Returns what `region` does.
    """
    height, rows, row_bytes, jobs = layout[3], layout[4], layout[5], len(data)
    most = layout[8] if len(out) // jobs * 4 * layout[7] > layout[9] else ROWS
    # Higher strips read activations less often; but with four for each thread none waits long for the last.
    for higher in (ROWS, most // 4, most // 2, most):  # as long as there are enough strips for all threads
        if height < higher and jobs * (-(-rows // higher)) >= 4 * len(scratch):
            height = higher
    args = np.empty(21, np.int64)
    args[0], args[1], args[2] = layout[1], layout[2], height
    for word in range(4):  # no slices: what they are checked by takes Numba long to compile
        args[3 + word] = layout[4 + word]
    args[7], args[8] = data.ctypes.data, scales.ctypes.data
    args[9], args[10], args[11] = first.ctypes.data, counts.ctypes.data, act_rows.ctypes.data
    args[12], args[13], args[14] = acts.ctypes.data, acts.shape[1], out.ctypes.data
    args[15], args[16], args[17] = scratch.ctypes.data, scratch.shape[1], jobs
    well, args[18], args[19], args[20] = 1, 0, len(act_rows) + BEHIND, len(acts)
    if side_by_side.size and layout[10]:
        args[18] = side_by_side.ctypes.data
        copy = np.array((args[12], args[13], args[11], args[18], args[19]), np.int64)
        well = region(team, layout[10], copy, len(act_rows), PIECES)
    # With one or two tokens a strip is little work beside taking it: GRAIN bytes are taken at least.
    least = max(1, GRAIN // (height * row_bytes)) if len(out) <= 2 * jobs else 1
    return well & region(team, layout[0], args, jobs * (-(-rows // height)), least)


@cache
def strips_task() -> Any:
    """The compiled task whose chunks are strips, for `region`."""
    return callback(_strips, answers=True)


@cache
def copies_task() -> Any:
    """The compiled task that copies activations for tiles, for `region`."""
    return callback(blocks_side_by_side, answers=True)


@cache
def strip(kind: int, way: str) -> Any:
    """What multiplies a strip of a format: "lanes", "interleaved", "tiles", "rows", "blocks", "wide",
    "pairs" or "pair tiles". `say` knows it by its address.
    """
    found = _strip(kind, way)
    WAYS[found.address] = way
    return found


WAYS: dict[int, str] = {}


def _strip(kind: int, way: str) -> Any:
    if way == "lanes":
        return callback(variant(_lane_strip, f"{kind}", KIND=kind, LINES=PANELS[kind].lines))
    if way == "interleaved":
        given = {"BLOCK_BYTES": layout_of(kind).block_bytes, "FETCH_FROM": FETCH_FROM[kind % INTERLEAVED]}
        return callback(variant(interleaved_strip, f"{kind}", KIND=kind, **given))
    if way == "tiles":
        return callback(variant(tile_strip, f"{kind}", **tile_constants(kind, slowly=LEVEL != "amx")))
    if way in ("pairs", "pair tiles"):
        return callback(variant(pair_strip, way.replace(" ", "_"), **of_pairs(way == "pair tiles")))
    if way == "wide":
        return callback(variant(wide_strip, f"{kind}", KIND=kind))
    function = _row_strip if way == "rows" else _block_strip
    given = {"BYTES": FLOATS[kind][1] if kind in FLOATS else 0, "TILE_ROWS": 1 if kind == INT4 else 128}
    return callback(variant(function, f"{kind}", KIND=kind, **given))
