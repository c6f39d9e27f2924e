"""Reference: refimpl.reference.fp8.linear. The products of many tokens on Hopper, in Gluon, where we say
which warps do what: persistent programs, one a processor, that go through tiles one after the other.

    y[m, n] = sum over blocks b of 128 columns:
                  (sum over the block of x[m, k] w[n, k]) * scale_w[n // 128, b] * scale_x[m, b]

What stands in the way there is the second-level cache: a tile of 128 tokens and 128 outputs reads a byte for
64 multiplications. A tile of 256 outputs reads a quarter less. Its sums take 128 registers of each of 256
threads, and a block's product, before it is promoted, may take 64 more, not another 128. So one warp fetches
tiles (TMA) into a ring in shared memory, and two groups of four warps, 64 tokens each, take the outputs in
halves of 128, one after the other: multiply, wait, promote. While a group promotes, the other's product runs.

    fetching warp   | tile 0, block 0 | block 1 | ...                     into a ring of STAGES stages
    group 0         |     left: product | promote | right: product | promote | ...
    group 1         |               left: product | promote | right: product | promote | ...

The compiler must not bring a half's promotion and the next half's product together, or a second product needs
registers that are not there. Two things hold them apart. The promotion is `fma` as volatile assembly, whose
order stays. And a product overwrites the one before in place: it adds to it on a condition that is never
true, which the compiler cannot know.
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
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Their names now, and in Triton 3.6.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def place(tile, M, N, BN: gl.constexpr, BAND: gl.constexpr):
    """The `tile`-th tile's place among those of tokens and of outputs, (m, n).

    They are taken in bands of BAND tiles of tokens, so that neighbours share what the cache holds; with 2:

        n        0   1   2
        m = 0    0   2   4        band 0
        m = 1    1   3   5
        m = 2    6   7   8        band 1, the last, is lower
    """
    m_tiles = gl.cdiv(M, 128)
    n_tiles = gl.cdiv(N, BN)
    band = tile // (BAND * n_tiles)
    inside = tile % (BAND * n_tiles)
    height = gl.minimum(m_tiles - band * BAND, BAND)
    return band * BAND + inside % height, inside // height


# A stage of the ring and the hands it goes through:
#
#     empty  ──(fetch waits)──> TMA writes x [128, 128] and w [BN, 128] ──(bytes counted)──> full
#       ^                                                                                    │
#       └──(both groups arrive: count 2)── products read it <──(multiply waits)──────────────┘
@gluon.jit
def fetch(
    x_tiles, w_tiles, ring, sizes, programs, BN: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr
):
    """The warp that fetches: every block of every tile of this program, as soon as a stage of the ring is
    empty.
    """
    x_ring, w_ring, full, empty = ring
    M, N, K = sizes
    stage = 0
    phase = 1  # an empty ring's stages count as emptied before
    for tile in range(gl.program_id(0), gl.cdiv(M, 128) * gl.cdiv(N, BN), programs):
        m_tile, n_tile = place(tile, M, N, BN, BAND)
        for b in range(gl.cdiv(K, 128)):
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), (128 + BN) * 128)  # bytes
            load_tile(x_tiles, [m_tile * 128, b * 128], full.index(stage), x_ring.index(stage))
            load_tile(w_tiles, [n_tile * BN, b * 128], full.index(stage), w_ring.index(stage))
            stage += 1
            if stage == STAGES:  # once around, barriers are waited for in their other phase
                stage = 0
                phase ^= 1


@gluon.jit
def promote(total, product, scale):
    """total + product * scale of each token, f32 [64, 128], here and not later."""
    product, scale = gl.broadcast(product, gl.expand_dims(scale, 1))
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;",
        "=f,f,f,f",
        [product, scale, total],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def half(w, START: gl.constexpr):
    """128 of the rows [BN, 128] of a weight tile from START on, as the [128, 128] that a product takes."""
    return w.slice(START, 128).permute((1, 0))


@gluon.jit
def multiply(
    GROUP: gl.constexpr,
    y_tiles,
    scales,
    ring,
    buffers,
    sizes,
    programs,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    BAND: gl.constexpr,
):
    """What one of two groups of four warps does: 64 tokens of each tile, from 64 GROUP on, all its outputs.

    y_tiles as `describe` makes them; scales: x_scale f32 with its strides, w_scale f32 [ceil(N/128),
    ceil(K/128)]; ring: shared tiles of x u8 [STAGES, 128, 128] and w [STAGES, BN, 128], barriers for full and
    empty; buffers [2, 64, 128] of y's type, shared; sizes (M, N, K).
    """
    x_scale, w_scale, scale_row, scale_group = scales
    x_ring, w_ring, full, empty = ring
    M, N, K = sizes
    # Four warps one below the other, 16 tokens each, 128 outputs, 32 columns an instruction.
    registers: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    blocks = gl.cdiv(K, 128)
    never = M < 0  # which the compiler cannot know
    product = gl.zeros((64, 128), gl.float32, registers)
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), gl.cdiv(M, 128) * gl.cdiv(N, BN), programs):
        m_tile, n_tile = place(tile, M, N, BN, BAND)
        first = m_tile * 128 + GROUP * 64
        tokens = gl.minimum(first + gl.arange(0, 64, gl.SliceLayout(1, registers)), M - 1)
        x_at = x_scale + tokens * scale_row
        w_at = w_scale + (n_tile * BN // 128) * blocks
        # Of the second half of 256 outputs; clamped where there is none.
        right_at = w_scale + gl.minimum(n_tile * BN // 128 + 1, gl.cdiv(N, 128) - 1) * blocks
        # Sums of 256 outputs; of 128, `left` alone.
        # Per thread of the group's 128: 64 registers for each of left, right and product.
        left = gl.zeros((64, 128), gl.float32, registers)
        right = gl.zeros((64, 128), gl.float32, registers)
        x_next = gl.load(x_at)
        w_next = gl.load(w_at)
        right_next = gl.load(right_at)
        for b in range(blocks):
            scale = x_next * w_next
            right_scale = x_next * right_next
            # The next block's scales arrive while this one's products are made.
            ahead = gl.minimum(b + 1, blocks - 1)
            x_next = gl.load(x_at + ahead * scale_group)
            w_next = gl.load(w_at + ahead)
            right_next = gl.load(right_at + ahead)
            mbarrier.wait(full.index(stage), phase)
            x = x_ring.index(stage).slice(GROUP * 64, 64)
            w = w_ring.index(stage)
            # Left half of the outputs, then the right: one product's registers for both.
            product = warpgroup_mma(x, half(w, 0), product, use_acc=never, is_async=True)
            product = warpgroup_mma_wait(0, deps=(product,))
            if BN == 256:
                left = promote(left, product, scale)
                product = warpgroup_mma(x, half(w, 128), product, use_acc=never, is_async=True)
                product = warpgroup_mma_wait(0, deps=(product,))
            # Read to the end: the stage may be filled again while the last half is promoted.
            mbarrier.arrive(empty.index(stage), count=1)
            if BN == 256:
                right = promote(right, product, right_scale)
            else:
                left = promote(left, product, scale)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        write(y_tiles, buffers.index(GROUP), left, first, n_tile * BN)
        if BN == 256:
            write(y_tiles, buffers.index(GROUP), right, first, n_tile * BN + 128)
    tma.store_wait(0)


@gluon.jit
def write(y_tiles, buffer, total, row, column):
    """total f32 [64, 128] to y from (row, column) on, by way of the shared `buffer`, once what was written
    from there before has left it.
    """
    tma.store_wait(0)
    buffer.store(total.to(y_tiles.dtype))
    fence_async_shared()
    store_tile(y_tiles, [row, column], buffer)


@gluon.jit(do_not_specialize=["M", "scale_group", "programs"])
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
    programs,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    BAND: gl.constexpr,
):
    """y [M, N], in tiles of 128 tokens and BN = 128 or 256 outputs, shared out among the programs.

    The tiles of x, w and y as `describe` makes them; x_scale f32, element (m, b) at m * scale_row + b *
    scale_group; w_scale f32 [ceil(N/128), ceil(K/128)]. STAGES as `stages` gives them.
    """
    gl.static_assert(BN == 128 or BN == 256)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)  # both groups
    fence_async_shared()
    x_ring = gl.allocate_shared_memory(x_tiles.dtype, [STAGES, 128, 128], x_tiles.layout)
    w_ring = gl.allocate_shared_memory(w_tiles.dtype, [STAGES, BN, 128], w_tiles.layout)
    buffers = gl.allocate_shared_memory(y_tiles.dtype, [2, 64, 128], y_tiles.layout)
    ring = (x_ring, w_ring, full, empty)
    sizes = (M, N, K)
    scales = (x_scale, w_scale, scale_row, scale_group)
    gl.warp_specialize(
        [
            (multiply, (0, y_tiles, scales, ring, buffers, sizes, programs, BN, STAGES, BAND)),
            (multiply, (1, y_tiles, scales, ring, buffers, sizes, programs, BN, STAGES, BAND)),
            (fetch, (x_tiles, w_tiles, ring, sizes, programs, BN, STAGES, BAND)),
        ],
        [4, 1],  # warps of the second and third
        [240, 24],  # registers of a thread there; the first gets the rest, 240 too
    )


def describe(
    x: Any, w: Any, y: Any, shape: tuple[int, int, int], outputs: int, device: torch.device
) -> list[TensorDescriptor]:
    """What the copy engine must know of x [M, K], w [N, K] (E4M3) and y [M, N] (f32 or bf16) for tiles of so
    many outputs. Dtypes stand in for tensors where the kernel is only to be compiled.
    """
    # Made here: a program that makes them itself loses some microseconds.
    m, n, k = shape
    tiles = []
    for tensor, size, tile in ((x, (m, k), 128), (w, (n, k), outputs), (y, (m, n), 64)):
        base = torch.empty(0, dtype=tensor, device=device) if isinstance(tensor, torch.dtype) else tensor
        layout = gl.NVMMASharedLayout(128, 8 * base.element_size(), 2)
        tiles.append(TensorDescriptor(base, list(size), [size[1], 1], [tile, 128], layout))
    return tiles


def stages(outputs: int, itemsize: int) -> int:
    """Stages of the ring, 128 tokens and so many outputs each, that fit a processor's 227 KiB of shared
    memory beside two buffers of results of `itemsize` bytes.
    """
    return (232448 - 2 * 64 * 128 * itemsize - 256) // ((128 + outputs) * 128)
