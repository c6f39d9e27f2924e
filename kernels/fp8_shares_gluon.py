"""Reference: refimpl.reference.fp8.linear. How the programs of `fp8_stream_gluon` share its tiles, as in
stream-K (Osama et al., 2023), and add up those of which several have a part.

Each program gets `rounds` whole tiles. The tiles that are left are one row of blocks, of which each program
takes `each`:

    tiles      | 0 | 1 | 2 | ... whole ... |       first left      |      second left      | ...
    programs   | 0 | 1 | 2 | ...           |  0     |  1     |  2       |  3     |  4     |  5  ...
                                                                   ^ 2 ends one tile and begins the next

`fp8_tiles.deal` chooses these numbers.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Its name in Triton 3.6, and now.
group_barrier = getattr(gl, "thread_barrier", None) or gl.barrier


@gluon.jit
def place(tile, sizes, deal, BM: gl.constexpr, BN: gl.constexpr):
    """The `tile`-th tile's place among those of tokens and of outputs, (m, n).

    They are taken in bands of `band` tiles of tokens, so that neighbours share what the cache holds; with 2:

        n        0   1   2
        m = 0    0   2   4        band 0
        m = 1    1   3   5
        m = 2    6   7   8        band 1, the last, is lower
    """
    M, N, _K = sizes
    _rounds, _rest, _each, band = deal
    n_tiles = gl.cdiv(N, BN)
    first = tile // (band * n_tiles) * band
    inside = tile % (band * n_tiles)
    height = gl.minimum(gl.cdiv(M, BM) - first, band)
    return first + inside % height, inside // height


@gluon.jit
def count(deal, blocks):
    """How many pieces of work this program has: whole tiles, and parts of tiles."""
    rounds, rest, each, _band = deal
    first = gl.program_id(0) * each
    last = gl.minimum(first + each, rest * blocks)
    parts = gl.where(last > first, gl.cdiv(last, blocks) - first // blocks, 0)
    return rounds + parts


@gluon.jit
def piece(i, deal, blocks):
    """Piece i of this program: its tile, and its first and its last block + 1."""
    rounds, rest, each, _band = deal
    programs = gl.num_programs(0)
    first = gl.program_id(0) * each
    last = gl.minimum(first + each, rest * blocks)
    shared = first // blocks + i - rounds  # the how manyth of those that are left
    whole = i < rounds
    tile = gl.where(whole, gl.program_id(0) + i * programs, rounds * programs + shared)
    start = gl.where(whole, 0, gl.maximum(first - shared * blocks, 0))
    stop = gl.where(whole, blocks, gl.minimum(last - shared * blocks, blocks))
    return tile, start, stop


@gluon.jit
def add_up(
    GROUP: gl.constexpr,
    total,
    parts,
    first,
    M,
    tile,
    start,
    deal,
    blocks,
    BM: gl.constexpr,
    BN: gl.constexpr,
    registers: gl.constexpr,
):
    """A part of a tile, left for the program that is the last to arrive with one; there all parts are added
    up in their order, so that the sum has the same bits whichever that is.

    Returned are the sums and whether this is the last. total f32 [64, BN]; parts: f32 [programs, 2, groups,
    64, BN], a program's part of a tile that another has begun and its part of one that it begins; i32 [tiles
    that are left, groups], zeros, arrivals.
    """
    partial, arrived = parts
    rounds, _rest, each, _band = deal
    SIZE: gl.constexpr = 64 * BN
    rows = gl.arange(0, 64, gl.SliceLayout(1, registers))
    columns = gl.arange(0, BN, gl.SliceLayout(0, registers))
    here = gl.expand_dims(rows, 1) * BN + gl.expand_dims(columns, 0)
    here, used = gl.broadcast(here, gl.expand_dims(first + rows < M, 1))
    shared = tile - rounds * gl.num_programs(0)
    mine = partial + ((2 * gl.program_id(0) + (start == 0)) * (BM // 64) + GROUP) * SIZE
    gl.store(mine + here, total, mask=used)
    group_barrier()  # all of the group's stores come before its arrival
    counter = arrived + shared * (BM // 64) + GROUP
    first_program = shared * blocks // each
    last_program = ((shared + 1) * blocks - 1) // each
    last = gl.atomic_add(counter, 1, sem="acq_rel") == last_program - first_program
    if last:
        total = gl.zeros((64, BN), gl.float32, registers)
        TOGETHER: gl.constexpr = 128 // BN  # parts on their way at the same time, as registers allow
        for p in range(first_program, last_program + 1, TOGETHER):
            for i in gl.static_range(TOGETHER):
                q = p + i
                slot = 2 * q + (q * each <= shared * blocks)
                theirs = partial + (slot * (BM // 64) + GROUP) * SIZE
                there = used & (q <= last_program)
                # ".cg" reads the second-level cache, where other processors have written.
                total += gl.load(theirs + here, mask=there, other=0.0, cache_modifier=".cg")
        gl.store(counter, 0)  # for the next launch
    return total, last
