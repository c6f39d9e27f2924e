"""Reference: refimpl.reference.fp8.linear. On Hopper the products of codes. They are in Gluon, where we say
which warps do what: persistent programs that go through tiles one after the other.

    y[m, n] = sum over blocks b of 128 columns:
                  (sum over the block of x[m, k] w[n, k]) * scale_w[n // 128, b] * scale_x[m, b]

One warp fetches tiles by the copy engine (TMA) into a ring in shared memory. One or two groups of four warps,
64 tokens each, multiply and promote (times the scales, onto a float32 sum). While a group promotes, the
other's product runs, and its own next one, too (`fp8_overlap_gluon`).

    fetching warp   | tile 0, block 0 | block 1 | ...                     into a ring of STAGES stages
    group 0         | product 0 | product 1, promote 0 | product 2, promote 1 | ...
    group 1         |    product 0 | product 1, promote 0 | product 2, promote 1 | ...

With few tokens there are fewer tiles than programs, and programs share tiles. For many tokens there are tiles
of 256 outputs (`fp8_wide_gluon`).

The left operand of a product has 64 rows. Up to 16 tokens, which would be a quarter of them at most, operands
are exchanged: 64 outputs are on the left, and y comes out transposed, [64 outputs, 16 tokens].
"""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from refimpl.kernels.fp8_overlap_gluon import overlapped
from refimpl.kernels.fp8_shares_gluon import add_up, count, piece, place
from refimpl.kernels.fp8_tiles import Tiles

# Their names now, and in Triton 3.6.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


# A stage of the ring and the hands it goes through:
#
#     empty  ──(fetch waits)──> TMA writes x [BM, 128] and w [BN, 128] ──(bytes counted)──> full
#       ^                                                                                    │
#       └──(all groups arrive)── products read it <──(multiply waits)────────────────────────┘
@gluon.jit
def fetch(
    x_tiles,
    w_tiles,
    ring,
    sizes,
    deal,
    BM: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    EARLY: gl.constexpr,
):
    """The warp that fetches: every block of every piece of this program, as soon as a stage of the ring is
    empty. The first weights are fetched while the kernel before this one still runs, for they do not depend
    on it. EARLY: the kernel after this one may do so from now on, and otherwise when all has been asked for.
    """
    x_ring, w_ring, full, empty = ring
    _M, _N, K = sizes
    blocks = gl.cdiv(K, 128)
    COPIES: gl.constexpr = BM // x_tiles.block_type.shape[0]  # of x, one below the other
    BYTES: gl.constexpr = COPIES * x_tiles.block_type.nbytes + w_tiles.block_type.nbytes
    if EARLY:
        gdc_launch_dependents()
    ahead = 0
    for i in range(count(deal, blocks)):
        tile, start, stop = piece(i, deal, blocks)
        m_tile, n_tile = place(tile, sizes, deal, BM, BN)
        for b in range(start, gl.minimum(stop, start + STAGES - ahead)):
            mbarrier.expect(full.index(ahead), BYTES)
            load_tile(w_tiles, [n_tile * BN, b * 128], full.index(ahead), w_ring.index(ahead))
            ahead += 1
    gdc_wait()
    stage = 0
    phase = 1  # an empty ring's stages count as emptied before
    for i in range(count(deal, blocks)):
        tile, start, stop = piece(i, deal, blocks)
        m_tile, n_tile = place(tile, sizes, deal, BM, BN)
        for b in range(start, stop):
            if ahead > 0:  # the weights are on their way
                ahead -= 1
            else:
                mbarrier.wait(empty.index(stage), phase)
                mbarrier.expect(full.index(stage), BYTES)
                load_tile(w_tiles, [n_tile * BN, b * 128], full.index(stage), w_ring.index(stage))
            for part in gl.static_range(COPIES):
                row = m_tile * BM + part * (BM // COPIES)
                load_tile(x_tiles, [row, b * 128], full.index(stage), x_ring.index(stage * COPIES + part))
            stage += 1
            if stage == STAGES:  # once around, barriers are waited for in their other phase
                stage = 0
                phase ^= 1
    if not EARLY:
        gdc_launch_dependents()


@gluon.jit
def multiply(
    GROUP: gl.constexpr,
    y_tiles,
    scales,
    ring,
    buffers,
    parts,
    sizes,
    deal,
    BM: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
):
    """What a group of four warps does: 64 tokens of each tile, from 64 GROUP on, all its outputs; of a tile
    of 16 tokens and 64 outputs all.

    y_tiles as `describe` makes them; scales: x_scale f32 with its strides, w_scale f32 [ceil(N/128),
    ceil(K/128)]; ring: shared tiles of x u8 [STAGES, BM, 128] and w [STAGES, BN, 128], barriers for full and
    empty; buffers [groups, min(BM, 64), BN] of y's type, shared; parts: where parts of tiles are left and
    counted; sizes (M, N, K).
    """
    x_scale, w_scale, scale_row, scale_group = scales
    M, _N, K = sizes
    EXCHANGED: gl.constexpr = BM < 64
    # Four warps one below the other, 16 tokens each, BN outputs, 32 columns an instruction. EXCHANGED: 16
    # outputs each, BM tokens.
    WIDTH: gl.constexpr = BM if EXCHANGED else BN
    registers: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    HEIGHT: gl.constexpr = min(BM, 64)  # tokens of this group
    places: gl.constexpr = gl.SliceLayout(0 if EXCHANGED else 1, registers)
    blocks = gl.cdiv(K, 128)
    never = M < 0  # which the compiler cannot know
    turn = (0, 0)  # the stage that is next, and its barrier's phase
    gdc_wait()  # what follows reads the scales of x and writes
    for i in range(count(deal, blocks)):
        tile, start, stop = piece(i, deal, blocks)
        m_tile, n_tile = place(tile, sizes, deal, BM, BN)
        first = m_tile * BM + GROUP * 64
        tokens = gl.minimum(first + gl.arange(0, HEIGHT, places), M - 1)
        x_at = x_scale + tokens * scale_row
        w_at = w_scale + (n_tile * BN // 128) * blocks
        at = (x_at, w_at, scale_group, blocks)
        total = gl.zeros((64, WIDTH), gl.float32, registers)
        total, turn = overlapped(GROUP, total, turn, at, start, stop, ring, never, BN, STAGES, EXCHANGED)
        last = True
        if stop - start < blocks:
            # The rows of a sum are tokens, up to M; EXCHANGED: outputs, all of them.
            row, end = (0, 64) if EXCHANGED else (first, M)
            total, last = add_up(
                GROUP, total, parts, row, end, tile, start, deal, blocks, max(BM, 64), WIDTH, registers
            )
        if last:
            write(y_tiles, buffers.index(GROUP), total, first, n_tile * BN, EXCHANGED)
    tma.store_wait(0)


@gluon.jit
def write(y_tiles, buffer, total, row, column, EXCHANGED: gl.constexpr = False):
    """total f32 [64, outputs], or EXCHANGED [64, tokens], to y from (row, column) on, by way of the shared
    `buffer`, once what was written from there before has left it.
    """
    tma.store_wait(0)
    if EXCHANGED:
        buffer.permute((1, 0)).store(total.to(y_tiles.dtype))
    else:
        buffer.store(total.to(y_tiles.dtype))
    fence_async_shared()
    store_tile(y_tiles, [row, column], buffer)


@gluon.jit(do_not_specialize=["M", "scale_group", "rounds", "rest", "each", "band"])
def stream(
    x_tiles,
    w_tiles,
    y_tiles,
    x_scale,
    w_scale,
    partial,
    arrived,
    M,
    N,
    K,
    scale_row,
    scale_group,
    rounds,
    rest,
    each,
    band,
    BM: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    EARLY: gl.constexpr,
):
    """y [M, N], in tiles of BM = 64 or 128 tokens and BN = 64 or 128 outputs, or of 16 and 64, shared out
    among the programs.

    The tiles of x, w and y as `describe` makes them; x_scale f32, element (m, b) at m * scale_row + b *
    scale_group; w_scale f32 [ceil(N/128), ceil(K/128)]; partial and arrived as in `add_up`. STAGES as
    `stages` gives them, EARLY as in `fetch`. `rounds` whole tiles a program, `each` blocks of the `rest`
    tiles, and `band` as in `place`.
    """
    gl.static_assert(BM == 64 or BM == 128 or (BM == 16 and BN == 64))
    gl.static_assert(BN == 64 or BN == 128)
    GROUPS: gl.constexpr = max(BM // 64, 1)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    fence_async_shared()
    x_ring = gl.allocate_shared_memory(x_tiles.dtype, [STAGES, BM, 128], x_tiles.layout)
    w_ring = gl.allocate_shared_memory(w_tiles.dtype, [STAGES, BN, 128], w_tiles.layout)
    buffers = gl.allocate_shared_memory(y_tiles.dtype, [GROUPS, min(BM, 64), BN], y_tiles.layout)
    ring = (x_ring, w_ring, full, empty)
    sizes = (M, N, K)
    scales = (x_scale, w_scale, scale_row, scale_group)
    parts = (partial, arrived)
    deal = (rounds, rest, each, band)
    if BM == 128:
        gl.warp_specialize(
            [
                (multiply, (0, y_tiles, scales, ring, buffers, parts, sizes, deal, BM, BN, STAGES)),
                (multiply, (1, y_tiles, scales, ring, buffers, parts, sizes, deal, BM, BN, STAGES)),
                (fetch, (x_tiles, w_tiles, ring, sizes, deal, BM, BN, STAGES, EARLY)),
            ],
            [4, 1],  # warps of the second and third
            # Registers of a thread there; the first gets the rest, as many as the second.
            [232, 40] if BN == 64 else [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (multiply, (0, y_tiles, scales, ring, buffers, parts, sizes, deal, BM, BN, STAGES)),
                (fetch, (x_tiles, w_tiles, ring, sizes, deal, BM, BN, STAGES, EARLY)),
            ],
            [1],
            [24],
        )


def describe(
    x: Any,
    w: Any,
    y: Any,
    shape: tuple[int, int, int],
    tile: Tiles,
    result: tuple[int, int],
    device: torch.device,
) -> list[TensorDescriptor]:
    """What the copy engine must know of x [M, K] (E4M3 or bf16), w [N, K] (E4M3) and y [M, N] (f32 or bf16).

    `result`: what a group of warps writes of y at a time, (tokens, outputs). Dtypes stand in for tensors
    where the kernel is only to be compiled.
    """
    # Made here: a program that makes them itself loses some microseconds.
    m, n, k = shape
    described = []
    tokens = 64 if tile.kernel == "wide" else tile.tokens  # there x comes in a part for each group
    for tensor, size, box in (
        (x, (_rows(x, m, k, tile.tokens), k), (tokens, 128)),
        (w, (n, k), (tile.outputs, 128)),
        (y, (m, n), result),
    ):
        base = torch.empty(0, dtype=tensor, device=device) if isinstance(tensor, torch.dtype) else tensor
        layout = gl.NVMMASharedLayout(128, 8 * base.element_size(), 2)
        # y may be columns of a wider one; a single row's stride says nothing
        row = base.stride(0) if tensor is y and base.ndim == 2 and m > 1 else size[1]
        described.append(TensorDescriptor(base, list(size), [row, 1], list(box), layout))
    return described


def _rows(x: Any, m: int, k: int, tokens: int) -> int:
    """Rows of x [M, K] that the copy engine may read: whole tiles of so many tokens, if its memory goes on.

    What lies there changes no result. For rows that are not there the engine writes zeros, and slowly: a
    linear of 96 or 192 tokens takes up to a third longer.
    """
    if isinstance(x, torch.dtype):
        return m
    there = (x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()) // k
    whole = -(-m // tokens) * tokens
    return whole if there >= whole else m
