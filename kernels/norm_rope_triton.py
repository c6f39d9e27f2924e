"""Reference: rms_norm and rope of refimpl.reference.attention.

And what a decoded token does beside its products, each in one launch where torch takes three to seven: the
row that goes into the latent cache, and the experts' questions and answers in pinned memory. A launch in a
CUDA graph costs about two microseconds however little it does, and a token has 61 layers of them.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from refimpl.kernels.e4m3_triton import narrow


# One program has a whole token, since the mean is over all of it.
@triton.jit
def _rms_norm(x, weight, y, K, eps, x_row, COLUMNS: tl.constexpr):
    """One token: x f32 or bf16 [M, K], rows `x_row` apart, weight f32 [K] -> y f32 [M, K]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = columns < K
    values = tl.load(x + row * x_row + columns, mask=inside, other=0.0).to(tl.float32)
    factors = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    # The columns beyond K are zeros: they add nothing, and are not counted.
    mean_square = tl.sum(values * values, axis=0) / K
    tl.store(y + row * K + columns, values * tl.rsqrt(mean_square + eps) * factors, mask=inside)


# How `_rope` shares out x [T, H, r]; a program is a box of HEADS heads of one token:
#
#     x, a head   | x0  x1 | x2  x3 | ...   pair i at columns 2 i and 2 i + 1
#     cos, sin    | c0     | c1     | ...   [T, r/2], the same for all heads
@triton.jit(do_not_specialize=["H"])
def _rope(x, cos, sin, y, H, R, x_row, x_head, HEADS: tl.constexpr, PAIRS: tl.constexpr):
    """x f32 [T, H, r], tokens `x_row` and heads `x_head` apart, R = r/2, cos and sin f32 [T, R] -> y f32
    [T, H, r].
    """
    token = tl.program_id(0).to(tl.int64)
    heads = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None].to(tl.int64)
    pairs = tl.arange(0, PAIRS)
    c = tl.load(cos + token * R + pairs, mask=pairs < R, other=0.0)[None, :]
    s = tl.load(sin + token * R + pairs, mask=pairs < R, other=0.0)[None, :]
    columns = tl.arange(0, 2 * PAIRS)[None, :]
    inside = (heads < H) & (columns < 2 * R)
    # Whole heads are loaded and stored, and pairs are taken apart in registers.
    both = tl.load(x + token * x_row + heads * x_head + columns, mask=inside, other=0.0)
    a, b = tl.split(tl.reshape(both, (HEADS, PAIRS, 2)))
    turned = tl.reshape(tl.join(a * c - b * s, b * c + a * s), (HEADS, 2 * PAIRS))
    tl.store(y + (token * H + heads) * 2 * R + columns, turned, mask=inside)


@triton.jit
def _write_row(latent, k_pe, rows, place, L, R, row, COLUMNS: tl.constexpr):
    """latent f32 [L] and behind it k_pe f32 [R] to the row of `rows`, f32 or bf16, whose number is at
    `place`; rows are `row` apart.
    """
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = rows + tl.load(place) * row
    first = tl.load(latent + columns, mask=columns < L, other=0.0)
    second = tl.load(k_pe + columns - L, mask=(columns >= L) & (columns < L + R), other=0.0)
    values = narrow(tl.where(columns < L, first, second), rows.dtype.element_ty)
    tl.store(there + columns, values, mask=columns < L + R)


@triton.jit
def _ask(x, ids, weights, to_x, to_ids, to_weights, D, A, COLUMNS: tl.constexpr, CHOSEN: tl.constexpr):
    """x f32 [D], ids i64 [A] and weights f32 [A] to memory of the host."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(to_x + columns, tl.load(x + columns, mask=columns < D), mask=columns < D)
    if tl.program_id(0) == 0:
        chosen = tl.arange(0, CHOSEN)
        tl.store(to_ids + chosen, tl.load(ids + chosen, mask=chosen < A), mask=chosen < A)
        tl.store(to_weights + chosen, tl.load(weights + chosen, mask=chosen < A), mask=chosen < A)


@triton.jit
def _add(x, other, y, D, COLUMNS: tl.constexpr):
    """y = x + other, f32 [D] all. x may be memory of the host, so that it is read past the GPU's own caches,
    which is called volatile.
    """
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < D
    here = tl.load(x + columns, mask=inside, volatile=True)
    tl.store(y + columns, here + tl.load(other + columns, mask=inside), mask=inside)


COLUMNS = 512  # of a row, for a program of the last three


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis: x f32 or bf16 [..., D], weight f32 [D] -> f32
    [..., D].
    """
    width = x.shape[-1]
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if y.numel():
        flat = x.reshape(-1, width)
        flat = flat if flat.stride(1) == 1 else flat.contiguous()
        columns = triton.next_power_of_2(width)
        _rms_norm[(len(flat),)](
            *(flat, weight.contiguous(), y, width, eps, flat.stride(0)),
            COLUMNS=columns,
            num_warps=min(16, max(1, columns // 256)),
        )
    return y


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the interleaved pairs of the last axis: x f32 [T, ..., r], tables f32 [T, r/2] -> f32
    [T, ..., r].
    """
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if y.numel():
        tokens, width = len(x), x.shape[-1]
        flat = x[:, None] if x.ndim == 2 else x.reshape(tokens, math.prod(x.shape[1:-1]), width)
        flat = flat if flat.stride(2) == 1 else flat.contiguous()
        heads = min(32, triton.next_power_of_2(flat.shape[1]))
        _rope[(tokens, triton.cdiv(flat.shape[1], heads))](
            *(flat, cos.contiguous(), sin.contiguous(), y, flat.shape[1], width // 2),
            *(flat.stride(0), flat.stride(1)),
            HEADS=heads,
            PAIRS=triton.next_power_of_2(width // 2),
        )
    return y


def write_row(latent: torch.Tensor, k_pe: torch.Tensor, rows: torch.Tensor, place: torch.Tensor) -> None:
    """latent f32 [1, L] and behind it k_pe f32 [1, r], rounded to the type of `rows` [S, L+r or wider], into
    the row whose number is `place`, int64 [1] on the device.
    """
    both = latent.shape[1] + k_pe.shape[1]
    _write_row[(triton.cdiv(both, COLUMNS),)](
        *(latent.contiguous(), k_pe.contiguous(), rows, place),
        *(latent.shape[1], k_pe.shape[1], rows.stride(0)),
        COLUMNS=COLUMNS,
    )


def ask(inputs: tuple[torch.Tensor, ...], shared: tuple[torch.Tensor, ...]) -> None:
    """x f32 [1, D], ids i64 [1, A] and weights f32 [1, A] into pinned memory of the same shapes."""
    x, ids, weights = (a.contiguous() for a in inputs)
    _ask[(triton.cdiv(x.numel(), COLUMNS),)](
        *(x, ids, weights, *shared[:3], x.numel(), ids.numel()),
        COLUMNS=COLUMNS,
        CHOSEN=triton.next_power_of_2(ids.numel()),
    )


def add(pinned: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """pinned, f32 [1, D] in pinned memory or the GPU's, plus other f32 [1, D] -> f32 [1, D]."""
    y = torch.empty_like(other)
    _add[(triton.cdiv(y.numel(), COLUMNS),)](pinned, other.contiguous(), y, y.numel(), COLUMNS=COLUMNS)
    return y
