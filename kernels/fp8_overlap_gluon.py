"""Reference: refimpl.reference.fp8.linear. How a group of warps of `fp8_stream_gluon` goes through the blocks
of a tile of up to 128 outputs: a block's product runs while the one before is promoted.

    tensor cores | product 0 | product 1 | product 2 | product 3 |             | product 4 | ...
    the group    |           | promote 0 | promote 1 | promote 2 | promote 3   |           | ...

Two products under way take two sets of registers, in turns. At the end of AHEAD blocks none is under way: a
product that is still under way at the end of a loop's turn makes the assembler wait for every single one.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

# The scales of so many blocks are on their way from the second-level cache, each in registers of its own: to
# move one to another would be to wait for it. So loops are written out for so many blocks.
AHEAD = gl.constexpr(4)


@gluon.jit
def promote(total, product, scale):
    """total + product * scale, here and not later: f32 [64, columns], scale likewise or one of its axes 1."""
    product, scale = gl.broadcast(product, scale)
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;",
        "=f,f,f,f",
        [product, scale, total],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def half(w, START: gl.constexpr, WIDTH: gl.constexpr):
    """WIDTH rows of a weight tile [BN, 128] from START on, as the [128, WIDTH] that a product takes."""
    return w.slice(START, WIDTH).permute((1, 0))


@gluon.jit
def following(turn, STAGES: gl.constexpr):
    """The stage after this one and the phase its barriers are waited for in: once around, the other one."""
    stage, phase = turn
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def load_scales(at, b):
    """The scales of block b, or of the last one: of the tokens, f32 [64 or 16], and of the weights."""
    x_at, w_at, scale_group, blocks = at
    b = gl.minimum(b, blocks - 1)
    return gl.load(x_at + b * scale_group), gl.load(w_at + b)


@gluon.jit
def begin(GROUP: gl.constexpr, product, turn, ring, never, BN: gl.constexpr, EXCHANGED: gl.constexpr):
    """The product of a stage, as soon as it is full, under way into the registers of `product`."""
    x_ring, w_ring, full, _empty = ring
    stage, phase = turn
    mbarrier.wait(full.index(stage), phase)
    if EXCHANGED:
        left = w_ring.index(stage)
        right = x_ring.index(stage).permute((1, 0))
    else:
        left = x_ring.index(stage).slice(GROUP * 64, 64)
        right = half(w_ring.index(stage), 0, BN)
    return warpgroup_mma(left, right, product, use_acc=never, is_async=True)


@gluon.jit
def end(total, running, scales, turn, ring, LATER: gl.constexpr, EXCHANGED: gl.constexpr):
    """The product that is under way, times its scales, onto `total`; LATER others were begun after it.

    Returned are the sums, and the registers that are free now.
    """
    _x_ring, _w_ring, _full, empty = ring
    x_scale, w_scale = scales
    product = warpgroup_mma_wait(LATER, deps=(running,))
    # Read to the end: the stage may be filled again.
    mbarrier.arrive(empty.index(turn[0]), count=1)
    return promote(total, product, gl.expand_dims(x_scale * w_scale, 0 if EXCHANGED else 1)), product


@gluon.jit
def overlapped(
    GROUP: gl.constexpr,
    total,
    turn,
    at,
    start,
    stop,
    ring,
    never,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    EXCHANGED: gl.constexpr,
):
    """The blocks from start to stop, onto `total` f32 [64, BN], zeros; EXCHANGED: weights times tokens, onto
    [64, tokens].

    turn: the stage that is next, and its phase; at: where the scales are, as `load_scales` takes them; ring
    and never as in `fp8_stream_gluon`. Returned are the sums and the turn.
    """
    product = total
    idle = total
    first = start + (stop - start) % AHEAD
    for b in range(start, first):  # for V3's matrices none
        scales = load_scales(at, b)
        running = begin(GROUP, product, turn, ring, never, BN, EXCHANGED)
        total, product = end(total, running, scales, turn, ring, 0, EXCHANGED)
        turn = following(turn, STAGES)
    if first < stop:
        scales = (load_scales(at, first),)
        for i in gl.static_range(1, AHEAD):
            scales += (load_scales(at, first + i),)
        for b in range(first, stop, AHEAD):
            running = begin(GROUP, product, turn, ring, never, BN, EXCHANGED)
            for i in gl.static_range(1, AHEAD):
                after = following(turn, STAGES)
                begun = begin(GROUP, idle, after, ring, never, BN, EXCHANGED)
                total, idle = end(total, running, scales[0], turn, ring, 1, EXCHANGED)
                scales = scales[1:] + (load_scales(at, b + AHEAD + i - 1),)  # noqa: RUF005 - no stars here
                running, turn = begun, after
            total, last = end(total, running, scales[0], turn, ring, 0, EXCHANGED)
            scales = scales[1:] + (load_scales(at, b + 2 * AHEAD - 1),)  # noqa: RUF005
            product, idle = idle, last  # an even number of blocks: the registers of before
            turn = following(turn, STAGES)
    return total, turn
