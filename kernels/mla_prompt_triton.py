"""Reference: refimpl.reference.attention.mla_naive, for prompts on a GPU whose cache is bfloat16: flash
attention over keys and values of some heads, which were expanded from the latents.

The tensor cores multiply bfloat16, and float32 keys, values, queries and shares are two of them each, 16 bits
of the significand. Three of the four products of halves are computed; the fourth, of both small halves, lies
below what is kept:

    q     high | low              q . k = high high + high low + low high
    k     high | low

The turned key of a row is bfloat16 in the cache, and is whole. `split` cuts keys and values once for all
blocks of queries, so that `attend` may load them ahead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from refimpl.kernels.e4m3_triton import INTERPRETED, as_float32, capability, narrow
from refimpl.kernels.fp8_gemm_triton import rest, top

LOG2E = tl.constexpr(1.4426950408889634)

# How `attend` shares out T queries of H heads and S rows; a program is BM queries of a head, and loops over
# blocks of BN rows up to the last that its last query may see:
#
#     rows      0 ........................ S-T ............. S
#     query 0   | seen by all queries      | 0 |
#     query 1   |                          | 0   1 |             masked beyond its own row
#     query T-1 |                          | ............. T-1 |
#
# Keys and values of a long cache take too much memory for all rows at once, and come in pieces of rows. Each
# is joined to those before it: the sums of values wait in `out`, the largest scores and the sums of shares in
# a buffer of their own, and the last piece divides.


class Shape(NamedTuple):
    """What `attend` is compiled with."""

    queries: int  # BM
    rows: int  # BN
    warps: int
    stages: int  # of keys and values on their way


def shape(chip: tuple[int, int]) -> Shape:
    """The shape for a compute capability: of those that fit into its shared memory (227 KB on Hopper and
    later, 99 KB elsewhere) the fastest of six on an H100 with 1,024 and 2,048 tokens.
    """
    return Shape(128, 32, 8, 3) if chip[0] in (9, 10) else Shape(64, 32, 4, 2)


@triton.jit
def _halves(x):
    """f32, any shape -> two bf16 that add up to its first 16 bits. What is not finite is all in the first."""
    high = top(x)
    return high.to(tl.bfloat16), rest(x, high).to(tl.bfloat16)


@triton.jit(do_not_specialize=["S"])
def split(keys_values, keys, keys_low, values, values_low, S, H, N, V, BC: tl.constexpr, BR: tl.constexpr):
    """keys_values f32 [S, H, n+v] -> keys and keys_low bf16 [H, S, n], values and values_low bf16 [H, S, v],
    n and v multiples of BC. A program has BR rows and BC columns of a head.
    """
    head = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) * BR + tl.arange(0, BR))[:, None].to(tl.int64)
    column = tl.program_id(2) * BC
    columns = (column + tl.arange(0, BC))[None, :]
    x = tl.load(keys_values + (rows * H + head) * (N + V) + columns, mask=rows < S, other=0.0)
    high = top(x)
    low = narrow(rest(x, high), tl.bfloat16)
    high = high.to(tl.bfloat16)
    if column < N:
        at = (head * S + rows) * N + columns
        tl.store(keys + at, high, mask=rows < S)
        tl.store(keys_low + at, low, mask=rows < S)
    else:
        at = (head * S + rows) * V + columns - N
        tl.store(values + at, high, mask=rows < S)
        tl.store(values_low + at, low, mask=rows < S)


@triton.jit
def _onto(total, x, x_high, x_low, y_high, y_low):
    """x f32 [M, K], cut into two, times the transpose of [N, K] in two parts, onto total f32 [M, N]."""
    if INTERPRETED:
        total += tl.dot(x, (as_float32(y_high) + as_float32(y_low)).T, input_precision="ieee")
    else:
        # The small parts are added first.
        total = tl.dot(x_low, y_high.T, total)
        total = tl.dot(x_high, y_low.T, total)
        total = tl.dot(x_high, y_high.T, total)
    return total


@triton.jit(do_not_specialize=["T", "S", "first", "whole"])
def attend(
    q_nope,
    q_pe,
    keys,
    keys_low,
    k_pe,
    values,
    values_low,
    out,
    so_far,
    T,
    S,
    first,
    whole,
    scale,
    nope_row,
    nope_head,
    pe_row,
    pe_head,
    k_row,
    out_row,
    out_head,
    N: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PIECES: tl.constexpr,
):
    """BM queries of a head: q_nope f32 [T, H, n], q_pe f32 [T, H, r], keys and values of `split`, k_pe bf16
    [S, r] -> out f32 [T, H, v]. Strides are in elements. Queries and rows that are not there are zeros.

    The S rows are those from `first` on of `whole`. PIECES: these are more than S; `so_far` f32 [H, 2, T] has
    each query's largest score and sum of shares from piece to piece.
    """
    # The last queries see most rows: they begin first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    queries = block * BM + tl.arange(0, BM)
    n, r, v = tl.arange(0, N), tl.arange(0, R), tl.arange(0, V)
    there = (queries < T)[:, None]
    wide = queries[:, None].to(tl.int64)
    q = tl.load(q_nope + wide * nope_row + head * nope_head + n[None, :], mask=there, other=0.0)
    turned = tl.load(q_pe + wide * pe_row + head * pe_head + r[None, :], mask=there, other=0.0)
    q_high, q_low = _halves(q)
    turned_high, turned_low = _halves(turned)
    largest = tl.full((BM,), float("-inf"), tl.float32)
    summed = tl.zeros((BM,), tl.float32)
    total = tl.zeros((BM, V), tl.float32)
    before = whole - T - first  # rows of the piece that all queries see: none where negative
    last = before + queries  # that a query sees
    end = tl.minimum(S, before + (block + 1) * BM)
    for start in range(0, end, BN):
        rows = start + tl.arange(0, BN)
        inside = (rows < S)[:, None]
        at = (head * S + rows)[:, None] * N + n[None, :]
        k_high = tl.load(keys + at, mask=inside, other=0.0)
        k_low = tl.load(keys_low + at, mask=inside, other=0.0)
        k = tl.load(k_pe + rows[:, None].to(tl.int64) * k_row + r[None, :], mask=inside, other=0.0)
        s = tl.zeros((BM, BN), tl.float32)
        if INTERPRETED:
            s += tl.dot(turned, as_float32(k).T, input_precision="ieee")
        else:
            s = tl.dot(turned_low, k.T, s)
            s = tl.dot(turned_high, k.T, s)
        s = _onto(s, q, q_high, q_low, k_high, k_low) * scale
        s = tl.where(rows[None, :] <= last[:, None], s, float("-inf"))
        larger = tl.maximum(largest, tl.max(s, axis=1))
        base = tl.where(larger == float("-inf"), 0.0, larger)  # -inf minus -inf would be NaN
        p = tl.exp2((s - base[:, None]) * LOG2E)
        fewer = tl.exp2((largest - base) * LOG2E)
        summed = summed * fewer + tl.sum(p, axis=1)
        at = (head * S + rows)[:, None] * V + v[None, :]
        high = tl.load(values + at, mask=inside, other=0.0)
        low = tl.load(values_low + at, mask=inside, other=0.0)
        total = total * fewer[:, None]
        p_high, p_low = _halves(p)
        if INTERPRETED:
            total += tl.dot(p, as_float32(high) + as_float32(low), input_precision="ieee")
        else:
            total = tl.dot(p_low, high, total)
            total = tl.dot(p_high, low, total)
            total = tl.dot(p_high, high, total)
        largest = larger
    at_out = out + wide * out_row + head * out_head + v[None, :]
    if PIECES:
        so_far += head * 2 * T + queries
        if first > 0:  # joined here and not before the loop, which has no register to spare
            earlier = tl.load(so_far, mask=queries < T, other=float("-inf"))
            larger = tl.maximum(largest, earlier)
            base = tl.where(larger == float("-inf"), 0.0, larger)
            fewer = tl.exp2((largest - base) * LOG2E)
            fewer_earlier = tl.exp2((earlier - base) * LOG2E)
            summed = summed * fewer + tl.load(so_far + T, mask=queries < T, other=0.0) * fewer_earlier
            total = total * fewer[:, None]
            total += tl.load(at_out, mask=there, other=0.0) * fewer_earlier[:, None]
            largest = larger
        tl.store(so_far, largest, mask=queries < T)
        tl.store(so_far + T, summed, mask=queries < T)
        summed = tl.where(first + S < whole, 1.0, summed)
    y = total / summed[:, None]
    tl.store(at_out, y, mask=there)


def takes(n: int, r: int, v: int, latent: torch.Tensor) -> bool:
    """Whether `attention` can: sizes of a head that are powers of two, and a cache in bfloat16."""
    return latent.dtype == torch.bfloat16 and all(16 <= x <= 128 and x & (x - 1) == 0 for x in (n, r, v))


def attention(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    keys_values: torch.Tensor,
    k_pe: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    first: int = 0,
    so_far: torch.Tensor | None = None,
) -> None:
    """q_nope f32 [T, H, n], q_pe f32 [T, H, r] (turned), keys_values f32 [S, H, n+v] and k_pe bf16 [S, r]
    (turned), the last T rows those of the queries, into out f32 [T, H, v].

    Where `so_far`, f32 [H, 2, T], is given, k_pe has the keys of all rows and keys_values a piece of them,
    from `first` on. Pieces come one after the other, with the same `so_far` and `out`, which hold the result
    after the last.
    """
    (tokens, heads, n), rows, device = q_nope.shape, len(keys_values), q_nope.device
    v = keys_values.shape[2] - n
    q_nope, q_pe, k_pe = (a if a.stride(-1) == 1 else a.contiguous() for a in (q_nope, q_pe, k_pe))
    keys_values = keys_values.contiguous()

    def halves(width: int) -> tuple[torch.Tensor, torch.Tensor]:
        high, low = torch.empty(2, heads, rows, width, dtype=torch.bfloat16, device=device)
        return high, low

    (keys, keys_low), (values, values_low) = halves(n), halves(v)
    columns = min(n, v)
    each = 512 if INTERPRETED.value else 32  # rows of a program; to the interpreter their number is all one
    split[(triton.cdiv(rows, each), heads, (n + v) // columns)](
        keys_values, keys, keys_low, values, values_low, rows, heads, n, v, BC=columns, BR=each
    )
    use = shape(capability(device))
    attend[(triton.cdiv(tokens, use.queries), heads)](
        *(q_nope, q_pe, keys, keys_low, k_pe[first:], values, values_low, out, so_far),
        *(tokens, rows, first, len(k_pe), float(scale)),
        *(*q_nope.stride()[:2], *q_pe.stride()[:2], k_pe.stride(0), *out.stride()[:2]),
        N=n,
        R=q_pe.shape[2],
        V=v,
        BM=use.queries,
        BN=use.rows,
        PIECES=so_far is not None,
        num_warps=use.warps,
        num_stages=use.stages,
    )
