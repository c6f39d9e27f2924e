"""Reference: refimpl.reference.fp8.linear. The matrix product below `fp8_linear_triton`, as the GPU runs it;
`fp8_stream_gluon` has the one for codes on Hopper.

    y[m, n] = sum over blocks b of 128 columns:
                  (sum over the block of x[m, k] w[n, k]) * scale_w[n // 128, b]  [* scale_x[m, b]]

The sum within a block belongs to the tensor cores, the promotion (times the scales, onto a float32 sum) to
the ordinary ones. A tile has a divisor of 128 outputs, so a block's weight scale is one number. Codes come as
E4M3, or as bytes where the chip (or the interpreter) does not know E4M3.

A tile's columns are shared out among several programs, so that enough of them read weights at once however
few tiles there are:

                 columns   0 .. 128 blocks_each ..                   K
    outputs      | part 0             | part 1             | ...     |      each leaves f32 [BN, BM]; the last
    of a tile    | program (n, 0, m)  | program (n, 1, m)  | ...     |      to arrive adds them up, in order

The weights are the left operand: 64 rows is what a warpgroup multiplies at least, where tokens, the columns
of the right one, may be as few as 8.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from refimpl.kernels.e4m3_triton import INTERPRETED, as_bfloat16, as_float32, narrow


@triton.jit
def top(x):
    """f32, any shape -> f32 that is exactly a bf16: the leading eight bits of the significand (NaN and
    infinities stay).
    """
    return (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def rest(x, part):
    """What `part` leaves of x, f32 of any shape: nothing where x is infinite or NaN, for that part says it
    all.
    """
    return tl.where((x.to(tl.uint32, bitcast=True) & 0x7F800000) == 0x7F800000, 0.0, x - part)


@triton.jit
def multiply(w, x):
    """Codes [BN, 128] times the transpose of activations [BM, 128], E4M3, bf16 or f32 -> f32 [BN, BM]."""
    # Float32 activations are cut into three bf16, eight bits of the significand each: every product is exact
    # and nothing of x is lost.
    #
    #     x  S EEEEEEEE (1)MMMMMMM mmmmmmmm MMMMMMMM
    #                   high     | middle | low          small parts are added first
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


@triton.jit
def prefetch(at):
    """The 128 bytes at each of these addresses, into the second-level cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


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
    FOLLOWS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One tile of BN outputs and BM tokens, `blocks_each` blocks of its columns. The last program of a tile
    to arrive adds all parts up, in order.

    x [M, K] codes, bf16 or f32, its rows `x_row` apart; x_scale f32, element (m, b) at m * scale_row +
    b * scale_group; w codes [N, K], w_scale f32 [ceil(N/128), ceil(K/128)], both contiguous; y [M, N] bf16
    or f32. SPLIT: there is more than one part, and partial f32 [parts, M, N] and arrived i32 [tiles], zeros,
    are used. SCALED: x are codes with scales. EVEN: 128 divides K. FOLLOWS: it may be launched before the
    kernel before it has ended (programmatic dependent launch), and asks for EARLY blocks of its weights then.
    """
    # Neighbouring programs have neighbouring outputs, the same tokens and the same part of the columns.
    n_tile = tl.program_id(0)
    part = tl.program_id(1)
    m_tile = tl.program_id(2)
    outputs = n_tile * BN + tl.arange(0, BN)
    tokens = m_tile * BM + tl.arange(0, BM)
    columns = tl.arange(0, 128)
    # Rows beyond the last are read from row 0, which is there, and not stored.
    rows = tl.where(outputs < N, outputs, 0).to(tl.int64)
    used = tokens < M
    blocks = tl.cdiv(K, 128)  # 128 = the block of the scales, of which each tile lies in one row
    first = part * blocks_each
    w_at = w + rows[:, None] * K + columns[None, :]  # [BN, 128]
    x_at = x + tokens[:, None].to(tl.int64) * x_row + columns[None, :]  # [BM, 128]
    w_scale_at = w_scale + (n_tile * BN // 128) * blocks
    x_scale_at = x_scale + tokens * scale_row

    if FOLLOWS:
        if EARLY > 0:  # into the second-level cache: memory has little to do while the kernel before ends
            ahead = tl.minimum(first + tl.arange(0, EARLY), blocks - 1)
            prefetch(w + rows[:, None] * K + ahead[None, :] * 128)
        gdc_wait()  # for what the kernel before this one writes

    # What a turn of the loop loads and what it masks:
    #
    #     weights   [BN, 128]   rows from N on are row 0 again; columns from K on zeros, unless EVEN
    #     x         [BM, 128]   tokens from M on zeros; columns likewise
    #     scales    one of the weights, [BM] of x: zeros for tokens from M on
    total = tl.zeros((BN, BM), tl.float32)
    for b in tl.range(first, tl.minimum(first + blocks_each, blocks), num_stages=STAGES):
        # As in all linears of DeepSeek-V3: 128 divides K, and weights need no mask.
        if EVEN:
            codes = tl.load(w_at + b * 128)
            values = tl.load(x_at + b * 128, mask=used[:, None], other=0.0)
        else:
            inside = (columns < K - b * 128)[None, :]
            codes = tl.load(w_at + b * 128, mask=inside, other=0.0)
            values = tl.load(x_at + b * 128, mask=used[:, None] & inside, other=0.0)
        scale = tl.load(w_scale_at + b)  # one number: a tile has one row of scales
        if SCALED:
            scales = tl.load(x_scale_at + b * scale_group, mask=used, other=0.0) * scale
            total += multiply(codes, values) * scales[None, :]
        else:
            total += multiply(codes, values) * scale

    if FOLLOWS:
        gdc_launch_dependents()  # the next one may take the places of programs that are done

    # The tile is transposed: outputs go down, and neighbours of them lie side by side in y.
    here = tokens[None, :].to(tl.int64) * N + outputs[:, None]
    mine = (outputs < N)[:, None] & used[None, :]
    if not SPLIT:
        tl.store(y + here, narrow(total, y.dtype.element_ty), mask=mine)
    else:
        size = M.to(tl.int64) * N  # of a part
        # Parts in memory, added in their order by whoever comes last: the same bits whoever that is.
        tl.store(partial + part * size + here, total, mask=mine)
        tl.debug_barrier()  # all of the program's stores come before its arrival
        counter = arrived + m_tile * tl.num_programs(0) + n_tile
        if tl.atomic_add(counter, 1, sem="acq_rel") == tl.num_programs(1) - 1:
            UNROLL: tl.constexpr = 8 if BN * BM <= 1024 else 2  # loads under way at once
            total = tl.zeros((BN, BM), tl.float32)
            for i in tl.range(0, tl.num_programs(1), loop_unroll_factor=UNROLL):
                # ".cg" reads the second-level cache, where other processors have written.
                total += tl.load(partial + i * size + here, mask=mine, other=0.0, cache_modifier=".cg")
            tl.store(y + here, narrow(total, y.dtype.element_ty), mask=mine)
            tl.store(counter, 0)  # for the next launch
