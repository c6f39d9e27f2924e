"""Reference: refimpl.reference.fp8.act_quant and refimpl.reference.fp8.weight_dequant;
refimpl.reference.quantizing.rms_norm_quant and refimpl.reference.quantizing.swiglu_quant.

Tensors of one device in and out. Scales lie group by group in memory, the tokens of a group side by side: f32
[..., groups] with strides (1, tokens), which is how the matrix products read them.

    codes   | token 0: group 0 | group 1 | ... | token 1: group 0 | group 1 | ...
    scale   | group 0: token 0 | token 1 | ... | group 1: token 0 | token 1 | ...

Every group of 128 is quantized by itself, so a result does not depend on how many tokens there are.

A linear comes next. On Hopper and later its programs are let in at once (FOLLOWS), and fetch weights while
numbers are quantized. They wait for the codes, as these kernels do for what they read (`follow`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from refimpl.entered import entered
from refimpl.kernels.e4m3_triton import (
    INTERPRETED,
    as_float32,
    converts_right,
    follows,
    narrow,
    native,
    quantize,
)
from refimpl.reference.fp8 import BLOCK
from refimpl.tensors import ScaledFP8


@triton.jit
def follow(FOLLOWS: tl.constexpr):
    """Let the next kernel in, and wait for the end of the one before, if FOLLOWS: it was let in likewise."""
    if FOLLOWS:
        gdc_launch_dependents()
        gdc_wait()


# How `_act_quant` shares out x [M, K]; a program is a box of ROWS tokens and 128 columns:
#
#                  group 0        group 1        last group
#     tokens 0..   | (0, 0)       | (1, 0)       | (G-1, 0)  |.....|    masked: columns from K on
#     tokens ROWS..| (0, 1)       | (1, 1)       | (G-1, 1)  |.....|
#                  .......................................              masked: rows from M on
#
# A program finds ROWS scales and needs nothing of another. M is not specialized: Triton would
# compile the kernel anew for 1 and for multiples of 16, and M changes with every prompt.
@triton.jit(do_not_specialize=["M"])
def _act_quant(
    x,
    codes,
    scale,
    M,
    K,
    x_row,
    ROWS: tl.constexpr,
    UE8M0: tl.constexpr,
    NATIVE: tl.constexpr,
    FOLLOWS: tl.constexpr,
):
    """ROWS tokens of one group: x f32 or bf16 [M, K], rows `x_row` apart -> codes u8 [M, K], scale f32
    [groups, M]. UE8M0 and NATIVE as in `e4m3_triton.quantize`, FOLLOWS as in `follow`.
    """
    follow(FOLLOWS)
    # The group is the first axis of the grid: neighbouring programs read on in the same rows.
    group = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = group * 128 + tl.arange(0, 128)
    inside = (rows < M)[:, None] & (columns < K)[None, :]  # [ROWS, 128]
    # Zeros beyond K make no magnitude the larger.
    values = tl.load(x + rows[:, None].to(tl.int64) * x_row + columns[None, :], mask=inside, other=0.0)
    q, s = quantize(values.to(tl.float32), UE8M0, NATIVE)
    tl.store(codes + rows[:, None].to(tl.int64) * K + columns[None, :], q, mask=inside)
    # 64 bits for what may lie beyond 2 GB, here and below.
    tl.store(scale + group.to(tl.int64) * M + rows, s, mask=rows < M)


@triton.jit(do_not_specialize=["M"])
def _swiglu_quant(
    gate_up,
    codes,
    scale,
    M,
    K,
    row,
    ROWS: tl.constexpr,
    UE8M0: tl.constexpr,
    NATIVE: tl.constexpr,
    FOLLOWS: tl.constexpr,
):
    """ROWS tokens of one group of silu(gate) * up: gate_up f32 or bf16 [M, 2 K], rows `row` apart, gate
    first -> codes u8 [M, K], scale f32 [groups, M]. The constants are those of `_act_quant`.
    """
    follow(FOLLOWS)
    group = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = group * 128 + tl.arange(0, 128)
    inside = (rows < M)[:, None] & (columns < K)[None, :]
    # Gate and up of a number are K columns apart.
    at = gate_up + rows[:, None].to(tl.int64) * row + columns[None, :]
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + K, mask=inside, other=0.0).to(tl.float32)
    # Triton's own exp rounds the exponent, and is off by more the larger that is.
    e = tl.exp(-gate) if INTERPRETED else libdevice.exp(-gate)
    q, s = quantize(tl.div_rn(gate, 1.0 + e) * up, UE8M0, NATIVE)
    tl.store(codes + rows[:, None].to(tl.int64) * K + columns[None, :], q, mask=inside)
    tl.store(scale + group.to(tl.int64) * M + rows, s, mask=rows < M)


# One program has a whole token, since the mean is over all of it; its groups are rows of one array.
@triton.jit(do_not_specialize=["M"])
def _rms_norm_quant(
    x,
    weight,
    y,
    codes,
    scale,
    M,
    K,
    eps,
    x_row,
    KEEP: tl.constexpr,
    GROUPS: tl.constexpr,
    UE8M0: tl.constexpr,
    NATIVE: tl.constexpr,
    FOLLOWS: tl.constexpr,
):
    """One token, normed, all its groups [GROUPS, 128]: x f32 or bf16 [M, K], rows `x_row` apart, weight f32
    [K] -> codes u8 [M, K], scale f32 [groups, M]. KEEP: y f32 [M, K] gets the numbers. The other constants
    are those of `_act_quant`.
    """
    follow(FOLLOWS)
    row = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, GROUPS)
    columns = groups[:, None] * 128 + tl.arange(0, 128)[None, :]  # [GROUPS, 128]
    inside = columns < K
    values = tl.load(x + row * x_row + columns, mask=inside, other=0.0).to(tl.float32)
    factors = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    # The columns beyond K are zeros: they add nothing, and are not counted.
    mean_square = tl.sum(tl.sum(values * values, axis=1), axis=0) / K
    normed = values * tl.rsqrt(mean_square + eps) * factors
    # y is for consumers that take float32, such as the router; the others read codes alone.
    if KEEP:
        tl.store(y + row * K + columns, normed, mask=inside)
    q, s = quantize(normed, UE8M0, NATIVE)  # [GROUPS, 128], [GROUPS]
    tl.store(codes + row * K + columns, q, mask=inside)
    tl.store(scale + groups.to(tl.int64) * M + row, s, mask=groups * 128 < K)


@triton.jit
def _weight_dequant(codes, scale, y, N, K, ROWS: tl.constexpr):
    """ROWS rows, a divisor of 128, of one tile: codes [N, K], scale f32 [ceil(N/128), ceil(K/128)] -> y f32
    or bf16 [N, K].
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    columns = tile * 128 + tl.arange(0, 128)
    inside = (rows < N)[:, None] & (columns < K)[None, :]
    at = rows[:, None].to(tl.int64) * K + columns[None, :]
    # ROWS divides 128, so all rows are of one tile, with one scale.
    s = tl.load(scale + (tl.program_id(0) * ROWS // 128) * tl.cdiv(K, 128) + tile)
    values = as_float32(tl.load(codes + at, mask=inside, other=0.0)) * s
    tl.store(y + at, narrow(values, y.dtype.element_ty), mask=inside)


def act_quant(x: torch.Tensor, ue8m0: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each group of 128 along the last axis: f32 or bf16 [..., K] -> codes u8 [..., K], scale f32
    [..., ceil(K/128)]. `ue8m0`: scales are powers of two.
    """
    flat = _rows(x)
    codes, scale = _outputs(len(flat), flat.shape[1], x.device)
    if flat.numel():
        rows = _rows_at_once(len(flat))
        # scale is [groups, M] here, so its length is the number of groups.
        grid = (len(scale), triton.cdiv(len(flat), rows))
        _act_quant[grid](
            flat,
            codes,
            scale,
            *flat.shape,
            flat.stride(0),
            ROWS=rows,
            num_warps=_warps(rows),
            **_options(ue8m0, x.device),
        )
    # The scales' two axes are exchanged in the view alone; memory stays group by group.
    return codes.view(x.shape), scale.T.view(*x.shape[:-1], len(scale))


def act_quant_ue8m0(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`act_quant` with scales that are powers of two, a row of `ops.OPS` by itself: f32 or bf16 [..., K] ->
    codes u8 [..., K], scale f32 [..., ceil(K/128)].
    """
    return act_quant(x, ue8m0=True)


def swiglu_quant(gate_up: torch.Tensor, ue8m0: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) * up, quantized as `act_quant` does: f32 or bf16 [..., 2 I], gate first -> codes u8
    [..., I], scale f32 [..., ceil(I/128)].
    """
    flat = _rows(gate_up)
    m = len(flat)
    k = flat.shape[1] // 2
    codes, scale = _outputs(m, k, flat.device)
    if codes.numel():
        rows = _rows_at_once(m)
        grid = (len(scale), triton.cdiv(m, rows))
        _swiglu_quant[grid](
            flat,
            codes,
            scale,
            m,
            k,
            flat.stride(0),
            ROWS=rows,
            num_warps=_warps(rows),
            **_options(ue8m0, flat.device),
        )
    return codes.view(*gate_up.shape[:-1], k), scale.T.view(*gate_up.shape[:-1], len(scale))


def rms_norm_quant(
    x: torch.Tensor, weight: torch.Tensor, eps: float, keep: bool = True, ue8m0: bool = False
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, quantized as `act_quant` does: x f32 or bf16
    [..., K], weight f32 [K] -> the numbers f32 [..., K], or None unless `keep`; codes u8 [..., K], scale f32
    [..., ceil(K/128)].
    """
    flat = _rows(x)
    codes, scale = _outputs(len(flat), flat.shape[1], x.device)
    normed = torch.empty(x.shape, dtype=torch.float32, device=x.device) if keep else None
    if flat.numel():
        constants = {
            "KEEP": keep,
            "GROUPS": triton.next_power_of_2(len(scale)),
            "num_warps": 16 if len(flat) <= 64 else 8,  # few tokens: more of them reading one row
        }
        _rms_norm_quant[(len(flat),)](
            flat,
            weight.contiguous(),
            normed if keep else flat,  # not written to
            codes,
            scale,
            *flat.shape,
            eps,
            flat.stride(0),
            **constants,
            **_options(ue8m0, x.device),
        )
    return normed, codes.view(x.shape), scale.T.view(*x.shape[:-1], len(scale))


def weight_dequant(w: ScaledFP8, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Each code's value times its tile's scale, with one rounding: codes u8 [N, K], scale f32 [ceil(N/128),
    ceil(K/128)] -> [N, K] of `dtype`, f32 or bf16.
    """
    codes = native(w.codes)
    scale = torch.as_tensor(w.scale).contiguous()
    n, k = codes.shape
    y = torch.empty(n, k, dtype=dtype, device=codes.device)
    if y.numel():
        _weight_dequant[(triton.cdiv(n, 32), triton.cdiv(k, BLOCK))](codes, scale, y, n, k, ROWS=32)
    return y


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] as [M, K] with neighbouring columns side by side in memory."""
    # `reshape` cannot find the number of rows where there are no elements.
    flat = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(x.shape[:-1].numel(), x.shape[-1])
    return flat if flat.stride(-1) == 1 or not flat.numel() else flat.contiguous()


def _outputs(m: int, k: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty codes u8 [m, k] and scales f32 [groups, m]. There is room for whole tiles of 16, 64 or 128
    tokens, so that the copy engine need not fill them up.
    """
    tokens = 16 if m <= 16 else 64 if m <= 64 else 128
    rows = triton.cdiv(m, tokens) * tokens
    codes = torch.empty(rows, k, dtype=torch.uint8, device=device)[:m]
    return codes, torch.empty(triton.cdiv(k, BLOCK), m, dtype=torch.float32, device=device)


def _options(ue8m0: bool, device: torch.device) -> dict[str, Any]:
    """What all quantizers are compiled and launched with."""
    early = follows(device)
    made = {"UE8M0": ue8m0, "NATIVE": converts_right(device), "FOLLOWS": early}
    return made | ({"launch_pdl": True} if early else {})


def _rows_at_once(m: int) -> int:
    """Tokens a program takes, of m: fewer where there would be too few programs to fill the GPU."""
    rows = 1 if m == 1 else 8 if m <= 256 else 32
    entered(f"{rows} rows a program")
    return rows


def _warps(rows: int) -> int:
    """Warps of a program that takes so many tokens."""
    return 1 if rows == 1 else 4
