"""Reference: refimpl.reference.fp8.linear. On Hopper the products of many tokens: the persistent kernel of
`fp8_stream_gluon` with tiles of 128 tokens and 256 outputs, of which each program gets whole ones.

With many tokens, what stands in the way is the second-level cache: a tile of 128 tokens and 128 outputs reads
a byte for 64 multiplications. A tile of 256 outputs reads a quarter less. Its sums take 128 registers of each
of 256 threads, and a block's product, before it is promoted, may take 64 more, not another 128. So a group
takes 256 outputs in halves, one after the other, and the other group's product runs while it promotes:

    group 0         |     left: product | promote | right: product | promote | ...
    group 1         |               left: product | promote | right: product | promote | ...

The compiler must not bring a half's promotion and the next half's product together, or a second product needs
registers that are not there. Two things hold them apart. The promotion is `fma` as volatile assembly, whose
order stays. And a product overwrites the one before in place: it adds to it on a condition that is never
true, which the compiler cannot know.

What a group does between a promotion and its next product, the tensor cores wait for. So it does all else
while a product of its own runs: it gives back the stage that it has read, loads the scales of later blocks,
also those of the tile that comes next, waits for the next stage, and stores the left half of a whole tile.
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

from refimpl.kernels.fp8_overlap_gluon import AHEAD, following, half, promote
from refimpl.kernels.fp8_shares_gluon import count, place
from refimpl.kernels.fp8_stream_gluon import fetch, write


@gluon.jit
def spot(i, sizes, deal, scale_row, GROUP: gl.constexpr, registers: gl.constexpr):
    """Tile i of this program: this group's first token, the first output, and where scales begin: of the
    tokens, i32 [64], and of the weights of the left and the right half.
    """
    M, N, K = sizes
    blocks = gl.cdiv(K, 128)
    m_tile, n_tile = place(gl.program_id(0) + i * gl.num_programs(0), sizes, deal, 128, 256)
    first = m_tile * 128 + GROUP * 64
    tokens = gl.minimum(first + gl.arange(0, 64, gl.SliceLayout(1, registers)), M - 1)
    right = gl.minimum(n_tile * 2 + 1, gl.cdiv(N, 128) - 1)  # clamped where there is no second half
    return first, n_tile * 256, tokens * scale_row, n_tile * 2 * blocks, right * blocks


@gluon.jit
def load_scales(scales, here, coming, b, blocks):
    """The scales of block b of this tile, or, behind its end, of the one that comes next."""
    x_scale, w_scale, _scale_row, scale_group = scales
    inside = b < blocks
    b = gl.where(inside, b, b - blocks)
    tokens = gl.where(inside, here[2], coming[2])
    left = gl.where(inside, here[3], coming[3])
    right = gl.where(inside, here[4], coming[4])
    return (
        gl.load(x_scale + (tokens + b * scale_group)),
        gl.load(w_scale + left + b),
        gl.load(w_scale + right + b),
    )


@gluon.jit
def step(
    GROUP: gl.constexpr,
    MAY_END: gl.constexpr,
    b,
    sums,
    scales,
    turn,
    tile,
    ring,
    never,
    y_tiles,
    buffer,
    STAGES: gl.constexpr,
):
    """Block b: the product of the left half, times its scales, onto its sums; then the right. Its stage is
    full already. MAY_END: this may be the last block of a tile, and then the left half is written.

    sums: of both halves, and registers of a product; turn: the block's stage and its phase, blocks done
    before and all of this program; tile: as `multiply` makes it. Returned are the sums, the scales of the
    block AHEAD of b, and the next turn.
    """
    x_ring, w_ring, full, empty = ring
    left, right, product = sums
    x_scale, w_scale, right_scale = scales
    stage, phase, done, mine = turn
    all_scales, here, coming, blocks = tile
    x = x_ring.index(2 * stage + GROUP)
    w = w_ring.index(stage)
    product = warpgroup_mma(x, half(w, 0, 128), product, use_acc=never, is_async=True)
    # The block before has been read to the end: its stage may be filled again.
    mbarrier.arrive(empty.index(gl.where(stage == 0, STAGES - 1, stage - 1)), count=1, pred=done > 0)
    scale = x_scale * w_scale
    right_scale = x_scale * right_scale
    scales = load_scales(all_scales, here, coming, b + AHEAD, blocks)
    product = warpgroup_mma_wait(0, deps=(product,))
    left = promote(left, product, gl.expand_dims(scale, 1))
    product = warpgroup_mma(x, half(w, 128, 128), product, use_acc=never, is_async=True)
    after, after_phase = following((stage, phase), STAGES)
    done += 1
    # Behind the last block of all there is none, so its own stage is waited for, which is full. Under a
    # condition, the assembler would no longer know that all warps go the same way.
    goes_on = done < mine
    mbarrier.wait(full.index(gl.where(goes_on, after, stage)), gl.where(goes_on, after_phase, phase))
    if MAY_END and b + 1 == blocks:
        write(y_tiles, buffer, left, here[0], here[1])
    product = warpgroup_mma_wait(0, deps=(product,))
    right = promote(right, product, gl.expand_dims(right_scale, 1))
    return (left, right, product), scales, (after, after_phase, done, mine)


@gluon.jit
def multiply(GROUP: gl.constexpr, y_tiles, scales, ring, buffer, sizes, deal, STAGES: gl.constexpr):
    """What a group of four warps does: 64 tokens of each tile, from 64 GROUP on, all its outputs.

    y_tiles as `fp8_stream_gluon.describe` makes them; scales: x_scale f32, w_scale f32 [ceil(N/128),
    ceil(K/128)], strides of x_scale; ring: shared tiles of x u8 [2 STAGES, 64, 128] and w [STAGES, 256, 128],
    barriers for full and empty; buffer [64, 128] of y's type, shared; sizes (M, N, K), K of a multiple of
    AHEAD blocks.
    """
    M, _N, K = sizes
    # Four warps one below the other, 16 tokens each, 128 outputs, 32 columns an instruction.
    registers: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    blocks = gl.cdiv(K, 128)
    tiles = count(deal, blocks)
    never = M < 0  # which the compiler cannot know
    product = gl.zeros((64, 128), gl.float32, registers)
    gdc_wait()  # what follows reads the scales of x and writes
    here = spot(0, sizes, deal, scales[2], GROUP, registers)
    scales_0 = load_scales(scales, here, here, 0, blocks)
    scales_1 = load_scales(scales, here, here, 1, blocks)
    scales_2 = load_scales(scales, here, here, 2, blocks)
    scales_3 = load_scales(scales, here, here, 3, blocks)
    turn = (0, 0, 0, tiles * blocks)
    mbarrier.wait(ring[2].index(0), 0)  # each program has a tile
    for i in range(tiles):
        coming = spot(gl.minimum(i + 1, tiles - 1), sizes, deal, scales[2], GROUP, registers)
        tile = (scales, here, coming, blocks)
        left = gl.zeros((64, 128), gl.float32, registers)
        sums = (left, left, product)
        # The conditions keep the assembler from bringing blocks together, for which it lacks registers.
        for b in range(0, blocks, AHEAD):
            sums, scales_0, turn = step(
                GROUP, False, b, sums, scales_0, turn, tile, ring, never, y_tiles, buffer, STAGES
            )
            if b + 1 < blocks:
                sums, scales_1, turn = step(
                    GROUP, False, b + 1, sums, scales_1, turn, tile, ring, never, y_tiles, buffer, STAGES
                )
            if b + 2 < blocks:
                sums, scales_2, turn = step(
                    GROUP, False, b + 2, sums, scales_2, turn, tile, ring, never, y_tiles, buffer, STAGES
                )
            if b + 3 < blocks:
                sums, scales_3, turn = step(
                    GROUP, True, b + 3, sums, scales_3, turn, tile, ring, never, y_tiles, buffer, STAGES
                )
        left, right, product = sums
        write(y_tiles, buffer, right, here[0], here[1] + 128)
        here = coming
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "scale_group", "rounds", "rest", "each", "band"])
def stream(
    x_tiles,
    w_tiles,
    y_tiles,
    x_scale,
    w_scale,
    M,
    N,
    K,
    scale_row,
    scale_group,
    rounds,
    rest,
    each,
    band,
    STAGES: gl.constexpr,
):
    """y [M, N], in tiles of 128 tokens and 256 outputs. The arguments are those of `fp8_stream_gluon.stream`;
    K has a multiple of AHEAD blocks, and a program whole tiles, one at least.
    """
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)  # both groups
    fence_async_shared()
    x_ring = gl.allocate_shared_memory(x_tiles.dtype, [2 * STAGES, 64, 128], x_tiles.layout)
    w_ring = gl.allocate_shared_memory(w_tiles.dtype, [STAGES, 256, 128], w_tiles.layout)
    buffers = gl.allocate_shared_memory(y_tiles.dtype, [2, 64, 128], y_tiles.layout)
    ring = (x_ring, w_ring, full, empty)
    sizes = (M, N, K)
    scales = (x_scale, w_scale, scale_row, scale_group)
    deal = (rounds, rest, each, band)
    gl.warp_specialize(
        [
            (multiply, (0, y_tiles, scales, ring, buffers.index(0), sizes, deal, STAGES)),
            (multiply, (1, y_tiles, scales, ring, buffers.index(1), sizes, deal, STAGES)),
            (fetch, (x_tiles, w_tiles, ring, sizes, deal, 128, 256, STAGES, False)),
        ],
        [4, 1],  # warps of the second and third
        [240, 24],  # registers of a thread there; the first gets the rest, as many as the second
    )
