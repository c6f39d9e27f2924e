"""Reference: refimpl.fp8.linear. The two matrix products below `fp8_linear_triton`, as the GPU runs them.

    y[m, n] = sum over blocks b of 128 columns:  (sum over the block of x[m, k] w[n, k]) * scale_w[n // 128,
    b]  [* scale_x[m, b]]

The sum within a block belongs to the tensor cores, the promotion (times the scales, onto a float32 sum) to
the ordinary ones. A tile has a divisor of 128 outputs, so a block's weight scale is one number. Codes come as
E4M3, or as bytes where the chip (or the interpreter) does not know E4M3.

    split   few tokens: a tile's columns are shared out among SPLITS programs, so that enough of them read
        weights at once. The weights are the left
            operand (64 rows is what a warpgroup multiplies at least; tokens may be as few as 8), pointers,
            any activations.
    stream  many tokens on Hopper: persistent programs, tiles fetched by the copy engine (TMA) in a warp of
        its own; E4M3 activations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from refimpl.kernels.e4m3_triton import INTERPRETED, as_bfloat16, as_float32, narrow


@triton.jit
def top(x):
    """f32 -> the leading eight bits of its significand, as f32 that is exactly a bf16 (NaN and infinities
    stay).
    """
    return (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def rest(x, part):
    """What `part` leaves of x; nothing where x is infinite or NaN, for that part says it all."""
    return tl.where((x.to(tl.uint32, bitcast=True) & 0x7F800000) == 0x7F800000, 0.0, x - part)


@triton.jit
def multiply(w, x):
    """Codes [BN, 128] times the transpose of activations [BM, 128] -> f32 [BN, BM].

    Float32 activations are cut into three bf16, eight bits of the significand each: every product is exact
    and nothing of x is lost.
    """
    if INTERPRETED:
        y = tl.dot(as_float32(w), as_float32(x).T, input_precision="ieee")
    elif x.dtype == tl.float8e4nv:
        y = tl.dot(w, x.T)
    elif x.dtype == tl.float32:
        wide = as_bfloat16(w)
        high = top(x)
        low = rest(x, high)
        middle = top(low)
        y = tl.dot(wide, (low - middle).to(tl.bfloat16).T)
        y = tl.dot(wide, middle.to(tl.bfloat16).T, y)
        y = tl.dot(wide, high.to(tl.bfloat16).T, y)
    else:
        y = tl.dot(as_bfloat16(w), as_bfloat16(x).T)
    return y


@triton.jit(do_not_specialize=["M", "scale_group", "blocks_each"])
def split(
    x,
    x_scale,
    w,
    w_scale,
    y,
    partial,
    arrived,
    M,
    N,
    K,
    x_row,
    scale_row,
    scale_group,
    blocks_each,
    BN: tl.constexpr,
    BM: tl.constexpr,
    SPLIT: tl.constexpr,
    SCALED: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of BN outputs and BM tokens, `blocks_each` blocks of its columns. The last program of a tile
    to arrive adds all parts up, in order.

    SPLIT: there is more than one part. SCALED: x are codes with scales. EVEN: 128 divides K.
    """
    n_tile, part, m_tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    outputs, tokens, columns = (
        n_tile * BN + tl.arange(0, BN),
        m_tile * BM + tl.arange(0, BM),
        tl.arange(0, 128),
    )
    rows = tl.where(outputs < N, outputs, 0).to(tl.int64)
    used = tokens < M
    blocks = tl.cdiv(K, 128)
    first = part * blocks_each
    w_at = w + rows[:, None] * K + columns[None, :]
    x_at = x + tokens[:, None].to(tl.int64) * x_row + columns[None, :]
    w_scale_at = w_scale + (n_tile * BN // 128) * blocks
    x_scale_at = x_scale + tokens * scale_row

    total = tl.zeros((BN, BM), tl.float32)
    for b in tl.range(first, tl.minimum(first + blocks_each, blocks), num_stages=STAGES):
        if EVEN:
            codes = tl.load(w_at + b * 128)
            values = tl.load(x_at + b * 128, mask=used[:, None], other=0.0)
        else:
            inside = (columns < K - b * 128)[None, :]
            codes = tl.load(w_at + b * 128, mask=inside, other=0.0)
            values = tl.load(x_at + b * 128, mask=used[:, None] & inside, other=0.0)
        scale = tl.load(w_scale_at + b)
        if SCALED:
            scales = tl.load(x_scale_at + b * scale_group, mask=used, other=0.0) * scale
            total += multiply(codes, values) * scales[None, :]
        else:
            total += multiply(codes, values) * scale

    here = tokens[None, :].to(tl.int64) * N + outputs[:, None]
    mine = (outputs < N)[:, None] & used[None, :]
    if not SPLIT:
        tl.store(y + here, narrow(total, y.dtype.element_ty), mask=mine)
    else:
        size = M.to(tl.int64) * N
        tl.store(partial + part * size + here, total, mask=mine)
        tl.debug_barrier()  # all of the program's stores come before its arrival
        counter = arrived + m_tile * tl.num_programs(0) + n_tile
        if tl.atomic_add(counter, 1, sem="acq_rel") == tl.num_programs(1) - 1:
            UNROLL: tl.constexpr = 8 if BN * BM <= 1024 else 2  # loads under way at once
            total = tl.zeros((BN, BM), tl.float32)
            for i in tl.range(0, tl.num_programs(1), loop_unroll_factor=UNROLL):
                total += tl.load(partial + i * size + here, mask=mine, other=0.0, cache_modifier=".cg")
            tl.store(y + here, narrow(total, y.dtype.element_ty), mask=mine)
            tl.store(counter, 0)  # for the next launch


@triton.jit(do_not_specialize=["M", "scale_group", "programs"])
def stream(
    x,
    x_scale,
    w,
    w_scale,
    y,
    M,
    N,
    K,
    scale_row,
    scale_group,
    programs,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    BAND: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    """Tiles of BM tokens and BN outputs, one after the other, in bands of BAND tiles of tokens so that
    neighbours share what the cache holds.
    """
    x_tiles = tl.make_tensor_descriptor(x, [M, K], [K, 1], [BM, 128])
    w_tiles = tl.make_tensor_descriptor(w, [N, K], [K, 1], [BN, 128])
    y_tiles = tl.make_tensor_descriptor(y, [M, N], [N, 1], [BM, BN])
    m_tiles, n_tiles, blocks = tl.cdiv(M, BM), tl.cdiv(N, BN), tl.cdiv(K, 128)
    for tile in tl.range(tl.program_id(0), m_tiles * n_tiles, programs, warp_specialize=SPECIALIZE):
        band = tile // (BAND * n_tiles)
        height = tl.minimum(m_tiles - band * BAND, BAND)
        m_tile = band * BAND + (tile % (BAND * n_tiles)) % height
        n_tile = (tile % (BAND * n_tiles)) // height
        # A start of its own: the compiler deals each of two groups of warps half of a tile's rows, and moves
        # the copies' index, m_tile * BM.
        start = m_tile.to(tl.int64) * BM
        x_scale_at = (
            x_scale
            + start * scale_row
            + tl.where(tl.arange(0, BM) < M - start, tl.arange(0, BM), 0) * scale_row
        )
        w_scale_at = w_scale + (n_tile * BN // 128) * blocks
        total = tl.zeros((BM, BN), tl.float32)
        scale = tl.load(x_scale_at) * tl.load(w_scale_at)
        for b in tl.range(0, blocks, num_stages=STAGES):
            values = x_tiles.load([m_tile * BM, b * 128])
            codes = w_tiles.load([n_tile * BN, b * 128])
            ahead = tl.minimum(
                b + 1, blocks - 1
            )  # the next block's scales arrive while this one's products are made
            x_next, w_next = tl.load(x_scale_at + ahead * scale_group), tl.load(w_scale_at + ahead)
            if INTERPRETED:
                product = tl.dot(as_float32(values), as_float32(codes).T, input_precision="ieee")
            else:
                product = tl.dot(values, codes.T)
            total += product * scale[:, None]
            scale = x_next * w_next
        y_tiles.store([m_tile * BM, n_tile * BN], narrow(total, y.dtype.element_ty))
