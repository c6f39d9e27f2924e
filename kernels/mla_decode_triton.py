"""Reference: refimpl.reference.attention.mla_absorbed, for one new token on a GPU: flash-decoding over the
latent cache, four launches however long it is. `mla_long_triton` has other scores and mixing, for a cache in
bfloat16 with much room.

    absorb   q_latent[h] = q_nope[h] . W^UK[h]                                 reads half of kv_b
    score    scores[h, s] = (q_latent[h] . latent[s] + q_pe[h] . k_pe[s]) scale
    mix      of a share of the rows: max, sum of exponentials, and the latents in their proportion
    value    the shares together, times W^UV[h]                                reads the other half

Grids follow from the room the cache has, and what is there is a number on the device, so that a CUDA graph
can hold them; programs whose rows are not there yet do nothing, and no row behind the length is read. Sums
are float32. Float32 times bfloat16 goes to the tensor cores as three exact products, as in `fp8_gemm_triton`;
float32 times float32 to the ordinary units.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from refimpl.entered import entered
from refimpl.kernels.e4m3_triton import INTERPRETED, as_float32
from refimpl.kernels.fp8_gemm_triton import rest, top
from refimpl.kernels.mla_long_triton import EACH as MANY_EACH
from refimpl.kernels.mla_long_triton import SHARES as MANY
from refimpl.kernels.mla_long_triton import mixed_in_tiles, parts, present, share, takes

# How the kernels share out a cache of S rows, H heads and L latents; a program is a box:
#
#     absorb   q_latent [H, L]      | one head, BL columns |             loops over the n numbers of a query
#     score    scores [H, width]    | BH heads, BS rows    |             loops over L, then over r columns
#     mix      mixed [shares, H, L] | one share, BL columns, BH heads |  loops over the share's rows, BS each
#     value    y [H, v]             | one head, BV outputs |             loops over L, all shares at once
#
#     rows of the cache   | share 0: `each` rows | share 1 | ... |  room, nothing there  |
#                                                                ^ the number at `length`
#
# Shares are of the rows that are there: as long as makes SHARES of them, in whole multiples of ROWS.
# Rows from `length` on, heads from H on and columns beyond the last are masked: zeros where they are
# multiplied, -inf where they are scores.
SHARES = 16  # at most: a power of two
ROWS = 64  # of the cache that are mixed at once


@triton.jit
def multiply(x, w, total):
    """x f32 [M, K] times w [K, N], bf16 or f32, onto total f32 [M, N]."""
    if INTERPRETED or w.dtype == tl.float32:
        total = tl.dot(x, as_float32(w), total, input_precision="ieee")
    else:
        # Three bf16 hold all 24 bits of a float32's significand. The small parts are added first.
        high = top(x)
        low = rest(x, high)
        middle = top(low)
        total = tl.dot((low - middle).to(tl.bfloat16), w, total)
        total = tl.dot(middle.to(tl.bfloat16), w, total)
        total = tl.dot(high.to(tl.bfloat16), w, total)
    return total


@triton.jit(do_not_specialize=["n", "v"])
def absorb(
    q,
    q_pe,
    kv_b,
    q_latent,
    n,
    v,
    L,
    R,
    q_head,
    pe_head,
    PARTS: tl.constexpr,
    BN: tl.constexpr,
    BL: tl.constexpr,
    BR: tl.constexpr,
):
    """BL columns of a head's q_latent f32 [H, L]: q f32 [H, n], heads `q_head` apart, kv_b [H, n+v, L]. In
    PARTS: of q_latent bf16 [2, H, L+R], two numbers that add up to each, and behind them those of what is
    turned of a query, q_pe f32 [H, R], heads `pe_head` apart.
    """
    head = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BL + tl.arange(0, BL)
    keys = kv_b + head * (n + v) * L
    # BN rows of sums, added up once behind the loop.
    total = tl.zeros((BN, BL), tl.float32)
    for start in range(0, n, BN):
        inputs = start + tl.arange(0, BN)
        numbers = tl.load(q + head * q_head + inputs, mask=inputs < n, other=0.0)
        at = inputs[:, None] * L + columns[None, :]
        inside = (inputs < n)[:, None] & (columns < L)[None, :]
        total += numbers[:, None] * as_float32(tl.load(keys + at, mask=inside, other=0.0))
    whole = tl.sum(total, axis=0)
    if PARTS:
        at = q_latent + head * (L + R)
        low_at = at + tl.num_programs(0).to(tl.int64) * (L + R)
        high, low = parts(whole)
        tl.store(at + columns, high, mask=columns < L)
        tl.store(low_at + columns, low, mask=columns < L)
        if tl.program_id(1) == 0:
            turned = tl.arange(0, BR)
            # Names of their own: what a branch changes keeps its shape.
            more, less = parts(tl.load(q_pe + head * pe_head + turned, mask=turned < R, other=0.0))
            tl.store(at + L + turned, more, mask=turned < R)
            tl.store(low_at + L + turned, less, mask=turned < R)
    else:
        tl.store(q_latent + head * L + columns, whole, mask=columns < L)


@triton.jit
def onto(total, q, keys, heads, rows, H, count, width, q_head, row, BC: tl.constexpr):
    """Adds q f32 [H, width], heads `q_head` apart, times keys [count, width], rows `row` apart, to total f32
    [BH, BS], for those heads and rows.
    """
    for start in range(0, width, BC):
        columns = start + tl.arange(0, BC)
        inside = (columns < width)[None, :]
        at = heads[:, None].to(tl.int64) * q_head + columns[None, :]
        x = tl.load(q + at, mask=(heads < H)[:, None] & inside, other=0.0)
        at = rows[:, None].to(tl.int64) * row + columns[None, :]
        k = tl.load(keys + at, mask=(rows < count)[:, None] & inside, other=0.0)
        total = multiply(x, k.T, total)
    return total


@triton.jit(do_not_specialize=["S", "H"])
def score(
    q_latent,
    q_pe,
    latent,
    k_pe,
    length,
    scores,
    H,
    S,
    L,
    R,
    pe_head,
    latent_row,
    pe_row,
    width,
    scale,
    COUNTED: tl.constexpr,
    BH: tl.constexpr,
    BS: tl.constexpr,
    BL: tl.constexpr,
    BR: tl.constexpr,
):
    """BS columns of BH rows of scores f32 [H, width]: q_latent f32 [H, L], q_pe f32 [H, R], heads `pe_head`
    apart, latent [S, L] and k_pe [S, R], rows `latent_row` and `pe_row` apart. COUNTED: only as many rows as
    the integer at `length`.
    """
    rows = tl.program_id(0) * BS + tl.arange(0, BS)
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    count = present(length, S, COUNTED)
    # The grid is for the room that the cache has; most programs of a short text end here.
    if tl.program_id(0) * BS < count:
        total = tl.zeros((BH, BS), tl.float32)
        total = onto(total, q_latent, latent, heads, rows, H, count, L, L, latent_row, BL)
        total = onto(total, q_pe, k_pe, heads, rows, H, count, R, pe_head, pe_row, BR)
        mine = (heads < H)[:, None] & (rows < count)[None, :]
        tl.store(scores + heads[:, None] * width + rows[None, :], total * scale, mask=mine)


@triton.jit(do_not_specialize=["S", "H"])
def mix(
    scores,
    latent,
    length,
    mixed,
    highest,
    sums,
    H,
    S,
    L,
    latent_row,
    width,
    COUNTED: tl.constexpr,
    SHARES: tl.constexpr,
    EACH: tl.constexpr,
    BH: tl.constexpr,
    BS: tl.constexpr,
    BL: tl.constexpr,
):
    """A share of the rows, a multiple of EACH: highest f32 [shares, H] of their scores f32 [H, width],
    sums f32 [shares, H] of the exponentials of what the others are below it, and mixed f32 [shares, H, L],
    the sum of the latents [S, L] times these.
    """
    part = tl.program_id(0)
    columns = tl.program_id(1) * BL + tl.arange(0, BL)
    heads = tl.program_id(2) * BH + tl.arange(0, BH)
    count = present(length, S, COUNTED)
    each = share(count, SHARES, EACH)
    first = part * each
    end = tl.minimum(first + each, count)
    if first < end:
        # Softmax in one pass: when a larger score comes, what was summed up before is scaled down by
        # exp(old largest - new largest).
        largest = tl.full((BH,), float("-inf"), tl.float32)
        summed = tl.zeros((BH,), tl.float32)
        total = tl.zeros((BH, BL), tl.float32)
        for start in range(first, end, BS):
            rows = start + tl.arange(0, BS)
            at = heads[:, None] * width + rows[None, :]
            inside = (heads < H)[:, None] & (rows < end)[None, :]
            s = tl.load(scores + at, mask=inside, other=float("-inf"))
            larger = tl.maximum(largest, tl.max(s, axis=1))
            # Heads that are not there have scores of -inf alone, and -inf minus -inf would be NaN.
            base = tl.where(larger == float("-inf"), 0.0, larger)
            p = tl.exp(s - base[:, None])
            fewer = tl.exp(largest - base)  # what is left of the sums so far
            inside = (rows < end)[:, None] & (columns < L)[None, :]
            at = rows[:, None].to(tl.int64) * latent_row + columns[None, :]
            c = tl.load(latent + at, mask=inside, other=0.0)
            summed = summed * fewer + tl.sum(p, axis=1)
            total = multiply(p, c, total * fewer[:, None])
            largest = larger
        at = part * H + heads
        inside = (heads < H)[:, None] & (columns < L)[None, :]
        tl.store(mixed + at[:, None] * L + columns[None, :], total, mask=inside)
        if tl.program_id(1) == 0:  # the same for all columns
            tl.store(highest + at, largest, mask=heads < H)
            tl.store(sums + at, summed, mask=heads < H)


@triton.jit(do_not_specialize=["S", "n", "v"])
def value(
    mixed,
    highest,
    sums,
    kv_b,
    length,
    y,
    S,
    L,
    n,
    v,
    COUNTED: tl.constexpr,
    SHARES: tl.constexpr,
    EACH: tl.constexpr,
    BV: tl.constexpr,
    BL: tl.constexpr,
):
    """BV outputs of a head of y f32 [H, v], from what `mix` left and kv_b [H, n+v, L]."""
    head = tl.program_id(0).to(tl.int64)
    heads = tl.num_programs(0)
    outputs = tl.program_id(1) * BV + tl.arange(0, BV)
    shares = tl.arange(0, SHARES)
    count = present(length, S, COUNTED)
    there = shares < tl.cdiv(count, share(count, SHARES, EACH))
    tops = tl.load(highest + shares * heads + head, mask=there, other=float("-inf"))
    largest = tl.max(tops, axis=0)
    # Shares were summed up from their own maxima on: brought to that of all, then divided by the whole.
    parts = tl.exp(tops - tl.where(largest == float("-inf"), 0.0, largest))
    parts = parts / tl.sum(tl.load(sums + shares * heads + head, mask=there, other=0.0) * parts, axis=0)
    # A head's first n rows of kv_b make keys, the v behind them values.
    values = kv_b + (head * (n + v) + n) * L
    total = tl.zeros((BV, BL), tl.float32)
    for start in range(0, L, BL):
        columns = start + tl.arange(0, BL)
        inside = (columns < L)[None, :]
        at = shares[:, None] * heads * L + columns[None, :]
        pieces = tl.load(mixed + head * L + at, mask=there[:, None] & inside, other=0.0)
        whole = tl.sum(pieces * parts[:, None], axis=0)  # [BL]
        at = outputs[:, None] * L + columns[None, :]
        w = tl.load(values + at, mask=(outputs < v)[:, None] & inside, other=0.0)
        total += as_float32(w) * whole[None, :]
    tl.store(y + head * v + outputs, tl.sum(total, axis=1), mask=outputs < v)


def mla_absorbed(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    latent: torch.Tensor,
    k_pe: torch.Tensor,
    kv_b: torch.Tensor,
    scale: float,
    length: torch.Tensor | int | None = None,
    many: bool | None = None,
) -> torch.Tensor:
    """Arguments and result as refimpl.kernels.attention_torch.mla_absorbed, of one token: q_nope f32
    [1, H, n]. `many`: whether in large tiles of many heads; None: as is faster.
    """
    q_nope, q_pe, latent, k_pe, kv_b = map(_side_by_side, (q_nope, q_pe, latent, k_pe, kv_b.contiguous()))
    (heads, n), (rows, latents), r = q_nope.shape[1:], latent.shape, k_pe.shape[1]
    v, device = kv_b.shape[1] - n, q_nope.device
    counted = length is not None
    length = torch.as_tensor(length, device=device) if counted else latent  # which is not looked at
    many = takes(rows, heads, latent) if many is None else many

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    # Not cleared: what no program writes, no program reads.
    halves, y = (2, heads, latents + r), empty(1, heads, v)
    q_latent = empty(*halves, dtype=torch.bfloat16) if many else empty(heads, latents)
    use = sizes(latent.dtype, n, r, latents, v, many)
    absorb[(heads, triton.cdiv(latents, use["absorb"]["BL"]))](
        *(q_nope, q_pe, kv_b, q_latent, n, v, latents, r, q_nope.stride(1), q_pe.stride(1)), **use["absorb"]
    )
    if many:
        entered("the cache in large tiles")
        mixed = mixed_in_tiles(q_latent, latent, k_pe, float(scale), length, counted)
    else:
        mixed = _mixed(use, q_latent, q_pe, latent, k_pe, float(scale), length, counted)
    value[(heads, triton.cdiv(v, use["value"]["BV"]))](
        *(*mixed, kv_b, length, y, rows, latents, n, v), COUNTED=counted, **use["value"]
    )
    return y


def _mixed(
    use: dict[str, dict[str, Any]],
    q_latent: torch.Tensor,
    q_pe: torch.Tensor,
    latent: torch.Tensor,
    k_pe: torch.Tensor,
    scale: float,
    length: torch.Tensor,
    counted: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The latents in the proportion of the scores of q_latent f32 [H, L] and q_pe f32 [1, H, r], by shares:
    mixed f32 [shares, H, L], highest and sums f32 [shares, H]. Compiled as `use` says.
    """
    (heads, latents), (rows, r) = q_latent.shape, k_pe.shape
    shares, width = min(SHARES, triton.cdiv(rows, ROWS)), triton.cdiv(rows, ROWS) * ROWS
    entered("the cache in one share" if shares == 1 else "the cache in several shares")

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=latent.device)

    scores, mixed = empty(heads, width), empty(shares, heads, latents)
    highest, sums = empty(shares, heads), empty(shares, heads)
    blocks = triton.cdiv(heads, use["score"]["BH"])
    score[(triton.cdiv(rows, use["score"]["BS"]), blocks)](
        *(q_latent, q_pe, latent, k_pe, length, scores, heads, rows, latents, r),
        *(q_pe.stride(1), latent.stride(0), k_pe.stride(0), width, scale),
        COUNTED=counted,
        **use["score"],
    )
    mix[(shares, triton.cdiv(latents, use["mix"]["BL"]), blocks)](
        *(scores, latent, length, mixed, highest, sums, heads, rows, latents, latent.stride(0), width),
        COUNTED=counted,
        **use["mix"],
    )
    return mixed, highest, sums


def sizes(
    latent: torch.dtype, n: int, r: int, latents: int, v: int, many: bool = False
) -> dict[str, dict[str, Any]]:
    """What each kernel is compiled with; with `many` rows of room, what `absorb` and `value` are. They follow
    from the model and from that alone, so that a cache that grows compiles once more at most. Products of
    float32 keep their operands in registers, and take fewer columns at once.
    """
    columns = _power(latents, 16, 64 if latent == torch.bfloat16 else 32)
    shared = {"SHARES": MANY, "EACH": MANY_EACH} if many else {"SHARES": SHARES, "EACH": ROWS}
    # A program for each head reads many shares once.
    whole = {"BV": _power(v, 1, 128), "num_warps": 8} if many else {"BV": _power(v, 1, 32)}
    narrow = {"BL": _power(latents, 16, 64)}
    return {
        "absorb": {"PARTS": many, "BN": _power(n, 1, 64), **narrow, "BR": _power(r, 1, 1 << 20)},
        "score": {"BH": 16, "BS": 32, "BL": columns, "BR": _power(r, 16, columns)},
        "mix": {**shared, "BH": 16, "BS": ROWS if latent == torch.bfloat16 else 32, "BL": columns},
        "value": {**shared, **whole, **narrow},
    }


def _power(size: int, least: int, most: int) -> int:
    """The power of two from `size` on, between two others."""
    return min(max(triton.next_power_of_2(size), least), most)


def _side_by_side(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] with neighbours of the last axis side by side in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()
