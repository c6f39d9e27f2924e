"""Reference: refimpl.reference.fp8.linear. The plain way, to measure the others against and to start reading
from: quantize, then multiply, two launches.

One program quantizes one group of 128; one multiplies one tile, all its columns one block after the other,
however few tokens there are. DeepSeek's published kernels and those of KTransformers are of this design. No
model runs on this.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from refimpl.kernels.e4m3_triton import as_float32, converts_right, narrow, native, quantize
from refimpl.tensors import ScaledFP8


@triton.jit
def _quantize_group(x, codes, scale, NATIVE: tl.constexpr):
    """One group of x f32 or bf16 [M, K], contiguous -> codes u8 [M, K], scale f32 [M, K/128]."""
    at = tl.program_id(0).to(tl.int64) * 128 + tl.arange(0, 128)[None, :]
    q, s = quantize(tl.load(x + at).to(tl.float32), False, NATIVE)
    tl.store(codes + at, q)
    tl.store(scale + tl.program_id(0) + tl.arange(0, 1), s)


@triton.jit(do_not_specialize=["M"])
def _multiply(x, x_scale, w, w_scale, y, M, N, K, BM: tl.constexpr, BN: tl.constexpr, WIDEN: tl.constexpr):
    """One tile y [BM, BN] of x [M, K] times the transpose of w [N, K], codes both, with scales f32 [M, K/128]
    and [ceil(N/128), K/128]. WIDEN: codes are bytes.
    """
    # A program's tile, and what a turn of its loop loads:
    #
    #     x   [BM, 128]    rows are tokens                y [BM, BN], sums in registers until the end
    #     w   [128, BN]    columns are outputs            scales [BM] and [BN], of this block alone
    tokens = tl.program_id(0) * BM + tl.arange(0, BM)
    outputs = tl.program_id(1) * BN + tl.arange(0, BN)
    columns = tl.arange(0, 128)
    blocks = K // 128
    # What lies beyond the matrices is read from their beginning, and not stored.
    x_at = x + (tokens % M)[:, None].to(tl.int64) * K + columns[None, :]
    w_at = w + (outputs % N)[None, :].to(tl.int64) * K + columns[:, None]
    total = tl.zeros((BM, BN), tl.float32)
    # Block by block: sums of 128 products on the tensor cores, promoted by both scales onto float32.
    for b in range(blocks):
        values = tl.load(x_at + b * 128)
        codes = tl.load(w_at + b * 128)
        if WIDEN:
            product = tl.dot(as_float32(values), as_float32(codes), input_precision="ieee")
        else:
            product = tl.dot(values, codes)
        a = tl.load(x_scale + (tokens % M) * blocks + b)  # [BM]
        c = tl.load(w_scale + (outputs % N) // 128 * blocks + b)  # [BN], the same 128 times
        total += product * a[:, None] * c[None, :]
    inside = (tokens < M)[:, None] & (outputs < N)[None, :]
    tl.store(
        y + tokens[:, None].to(tl.int64) * N + outputs[None, :],
        narrow(total, y.dtype.element_ty),
        mask=inside,
    )


def linear(x: torch.Tensor, w: ScaledFP8, tokens: int = 16, outputs: int = 64) -> torch.Tensor:
    """x bf16 or f32 [M, K] times the transpose of w [N, K] -> [M, N] of x's dtype, in tiles of so many tokens
    and outputs. 128 divides K, `outputs` 128.
    """
    (m, k), n = x.shape, len(w.codes)
    right = converts_right(x.device)
    codes = torch.empty(m, k, dtype=torch.uint8, device=x.device)
    scale = torch.empty(m, k // 128, dtype=torch.float32, device=x.device)
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    _quantize_group[(scale.numel(),)](x, codes, scale, NATIVE=right, num_warps=1)
    grid = (triton.cdiv(m, tokens), triton.cdiv(n, outputs))
    a = native(codes)
    b = native(w.codes)
    _multiply[grid](
        a,
        scale,
        b,
        w.scale,
        y,
        m,
        n,
        k,
        BM=tokens,
        BN=outputs,
        WIDEN=a.dtype == torch.uint8,
        num_warps=8,
        num_stages=4,
    )
    return y
