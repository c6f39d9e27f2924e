"""Reference: refimpl.reference.fp8.linear with activations that are not quantized. On Hopper the products of
more than 32 tokens in bf16: the persistent kernel of `fp8_stream_gluon` with its operands exchanged.

    y[m, n] = sum over blocks b of 128 columns:
                  (sum over the block of w[n, k] x[m, k]) * scale_w[n // 128, b]

The matrix unit takes its left operand from registers. So the weights are on the left: a group of four warps
reads the codes of 64 outputs from shared memory, widens them to bf16 in registers, and multiplies them by the
tokens, which stay in shared memory. Two groups share a tile of 128 outputs, and while one widens, the other's
product runs. Tiles of 64 outputs and 64 tokens have one group, and two programs run on a processor.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

from refimpl.kernels.fp8_overlap_gluon import following, promote
from refimpl.kernels.fp8_shares_gluon import add_up, count, piece, place
from refimpl.kernels.fp8_stream_gluon import fetch, write


@gluon.jit
def multiply(
    GROUP: gl.constexpr,
    y_tiles,
    w_scale,
    ring,
    buffers,
    parts,
    sizes,
    deal,
    BM: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
):
    """What a group of four warps does: 64 outputs of each tile, from 64 GROUP on, all its tokens.

    w_scale f32 [ceil(N/128), ceil(K/128)]; buffers [groups, BM, 64] of y's type, shared; the others as in
    `fp8_stream_gluon.multiply`, x in bf16.
    """
    x_ring, w_ring, full, empty = ring
    M, _N, K = sizes
    # Four warps one below the other, 16 outputs each, BM tokens, 16 columns an instruction.
    registers: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, registers, 2)
    blocks = gl.cdiv(K, 128)
    never = M < 0  # which the compiler cannot know
    turn = (0, 0)  # the stage that is next, and its barrier's phase
    gdc_wait()  # what follows writes
    for i in range(count(deal, blocks)):
        tile, start, stop = piece(i, deal, blocks)
        m_tile, n_tile = place(tile, sizes, deal, BM, BN)
        w_at = w_scale + (n_tile * BN // 128) * blocks
        total = gl.zeros((64, BM), gl.float32, registers)
        product = total
        scale = gl.load(w_at + start)
        for b in range(start, stop):
            later = gl.load(w_at + gl.minimum(b + 1, blocks - 1))
            stage, phase = turn
            mbarrier.wait(full.index(stage), phase)
            codes = w_ring.index(stage).slice(GROUP * 64, 64).load(left)
            # By way of float32, for the chip turns float16, which E4M3 becomes first, into bf16 slowly.
            wide = codes.to(gl.float32).to(gl.bfloat16)
            x = x_ring.index(stage).permute((1, 0))
            product = warpgroup_mma(wide, x, product, use_acc=never, is_async=True)
            product = warpgroup_mma_wait(0, deps=(product,))
            mbarrier.arrive(empty.index(stage), count=1)
            total = promote(total, product, gl.full((64, BM), scale, gl.float32, registers))
            scale = later
            turn = following(turn, STAGES)
        last = True
        if stop - start < blocks:
            # The rows of this sum are outputs, all of them.
            total, last = add_up(GROUP, total, parts, 0, 64, tile, start, deal, blocks, BN, BM, registers)
        if last:
            write(y_tiles, buffers.index(GROUP), total, m_tile * BM, n_tile * BN + GROUP * 64, True)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "rounds", "rest", "each", "band"])
def stream(
    x_tiles,
    w_tiles,
    y_tiles,
    w_scale,
    partial,
    arrived,
    M,
    N,
    K,
    rounds,
    rest,
    each,
    band,
    BM: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    EARLY: gl.constexpr,
):
    """y [M, N], in tiles of BM = 64 or 128 tokens and BN = 64 or 128 outputs, shared out among the programs.

    The arguments are those of `fp8_stream_gluon.stream`, x in bf16 and without scales.
    """
    gl.static_assert(BM == 64 or BM == 128)
    gl.static_assert(BN == 64 or BN == 128)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=BN // 64)  # all groups
    fence_async_shared()
    x_ring = gl.allocate_shared_memory(x_tiles.dtype, [STAGES, BM, 128], x_tiles.layout)
    w_ring = gl.allocate_shared_memory(w_tiles.dtype, [STAGES, BN, 128], w_tiles.layout)
    buffers = gl.allocate_shared_memory(y_tiles.dtype, [BN // 64, BM, 64], y_tiles.layout)
    ring = (x_ring, w_ring, full, empty)
    sizes = (M, N, K)
    parts = (partial, arrived)
    deal = (rounds, rest, each, band)
    if BN == 128:
        gl.warp_specialize(
            [
                (multiply, (0, y_tiles, w_scale, ring, buffers, parts, sizes, deal, BM, BN, STAGES)),
                (multiply, (1, y_tiles, w_scale, ring, buffers, parts, sizes, deal, BM, BN, STAGES)),
                (fetch, (x_tiles, w_tiles, ring, sizes, deal, BM, BN, STAGES, EARLY)),
            ],
            [4, 1],  # warps of the second and third
            [240, 24],  # registers of a thread there; the first gets the rest, 240 too
        )
    else:
        gl.warp_specialize(
            [
                (multiply, (0, y_tiles, w_scale, ring, buffers, parts, sizes, deal, BM, BN, STAGES)),
                (fetch, (x_tiles, w_tiles, ring, sizes, deal, BM, BN, STAGES, EARLY)),
            ],
            [1],
            [24],
        )
