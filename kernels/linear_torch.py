"""Reference: refimpl.reference.linear.linear and refimpl.reference.experts.swiglu, on torch tensors of any
device.

By what the weight is:

    ScaledFP8 of tensors   the Triton linear on a GPU, the reference's arithmetic in torch elsewhere
    bf16 tensor            float32 activations as three bf16 parts, 8 of a float32's 24 bits each, in one
    product: nothing is rounded away
    f32 tensor             torch's product
    numpy, GGML blocks     a linear left to the CPU: activations go there and back
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch

from refimpl.entered import entered
from refimpl.kernels import worker
from refimpl.reference.fp8 import BLOCK
from refimpl.tensors import ScaledFP8

# How, on a GPU, float32 x [T, K] meets bf16 weights [K, N] without losing a bit of either (`product`):
#
#     x         S EEEEEEEE (1)MMMMMMM mmmmmmmm MMMMMMMM        24 bits of significand
#     parts                high      | middle | low            bf16 each: every product is exact in float32
#
#     stacked   | high   [T, K] |                 | high w   |
#               | middle [T, K] |  times w  ->    | middle w |   -> added, the small ones first
#               | low    [T, K] |                 | low w    |
#
# Weights are read once for all three; from STACKED bytes of results on, part after part.
STACKED = 1 << 22  # bytes of results that a product of three parts may take at once


def linear(x: torch.Tensor | ScaledFP8, w: Any, activations: str = "fp8") -> torch.Tensor:
    """x [..., K] f32, or [M, K] quantized already, times the transpose of w [N, K] -> [..., N] f32, on x's
    device.
    """
    if accepts_fp8_activations(w):
        return _fp8(x, w, activations)
    if isinstance(x, ScaledFP8):
        raise TypeError("activations of E4M3 multiply weights of E4M3 only")
    if isinstance(w, torch.Tensor):
        return product(x.reshape(-1, w.shape[1]), w.T).reshape(*x.shape[:-1], len(w))
    return _on_the_cpu(x, w, activations)


def swiglu(
    x: torch.Tensor | ScaledFP8, gate: Any, up: Any, down: Any, activations: str = "fp8"
) -> torch.Tensor:
    """down(silu(gate(x)) * up(x)): x f32 [T, D], or quantized already, -> f32 [T, D]; gate and up [I, D],
    down [D, I].
    """
    g, u = linear(x, gate, activations), linear(x, up, activations)
    return linear(torch.nn.functional.silu(g, inplace=True) * u, down, activations)


def fused_swiglu(
    x: torch.Tensor | ScaledFP8, gate_up: FusedRows, down: Any, activations: str = "fp8"
) -> torch.Tensor:
    """down(silu(gate(x)) * up(x)), x [T, D] -> f32 [T, D], with one product for gate and up [2 I, D]; behind
    it what an FP8 `down` reads is quantized as it is made.
    """
    g_u = linear(x, gate_up.whole, activations)  # [T, 2 I]
    if activations != "exact" and accepts_fp8_activations(down):
        return linear(ScaledFP8(*swiglu_quant(g_u, activations == "ue8m0")), down)
    g, u = g_u.tensor_split(2, dim=-1)
    return linear(torch.nn.functional.silu(g, inplace=True) * u, down, activations)


def accepts_fp8_activations(w: Any) -> bool:
    """Whether a linear of this weight multiplies codes by codes, on torch's tensors."""
    return isinstance(w, ScaledFP8) and isinstance(w.codes, torch.Tensor)


def swiglu_quant(gate_up: torch.Tensor, ue8m0: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) * up, quantized: f32 [..., 2 I], gate first -> codes u8 [..., I], scale f32
    [..., ceil(I/128)], powers of two where `ue8m0`.
    """
    if by_triton(gate_up):
        entered("in Triton")
        return triton_quantizers().swiglu_quant(gate_up, ue8m0)
    entered("in torch")
    gate, up = gate_up.tensor_split(2, dim=-1)
    return act_quant(torch.nn.functional.silu(gate) * up, ue8m0)


def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x [..., T, K] times w [..., K, N], each f32 or bf16 -> [..., T, N] f32, as exact as a float32
    product.
    """
    entered(f"{'host' if not x.is_cuda else 'device'}, {w.dtype}".replace("torch.", ""))
    if not x.is_cuda:  # numpy's BLAS: torch's has other bits with another number of threads
        return torch.from_numpy(np.matmul(x.float().numpy(), w.float().numpy()))
    if w.dtype == torch.float32:
        return x.float() @ w
    multiply = partial(torch.bmm if x.ndim == 3 else torch.mm, out_dtype=torch.float32)
    if x.dtype == torch.bfloat16:
        return multiply(x, w)
    if 12 * x.shape[:-1].numel() * w.shape[-1] > STACKED:
        entered("three products")
        return _one_by_one(x, w, multiply)
    entered("three parts in one product")
    stacked = x.new_empty(*x.shape[:-2], 3, *x.shape[-2:], dtype=torch.bfloat16)
    high, middle, low = stacked.unbind(-3)
    rest = x - high.copy_(x)
    rest -= middle.copy_(rest)
    low.copy_(rest)
    y = multiply(stacked.flatten(-3, -2), w)  # [..., 3T, N]: the weights are read once
    high, middle, low = y.unflatten(-2, (3, x.shape[-2])).unbind(-3)
    return high + middle.add_(low)


def _one_by_one(x: torch.Tensor, w: torch.Tensor, multiply: Callable) -> torch.Tensor:
    """x f32 [..., T, K] times w bf16 [..., K, N] in three bf16 products, one after the other, to hold one
    part of x at a time -> f32 [..., T, N].
    """
    part = x.to(torch.bfloat16)
    y, rest = multiply(part, w), x - part
    for _ in range(2):
        part = rest.to(torch.bfloat16)
        y += multiply(part, w)
        rest -= part
    return y


# --- several matrices of one x ------------------------------------------------------------------------------


class FusedRows(NamedTuple):
    """Matrices that multiply the same x, one below the other in one piece of memory: made once, when a model
    is loaded.
    """

    whole: Any  # [N1 + N2 + ..., K], a tensor or ScaledFP8
    parts: tuple  # the matrices [N1, K], [N2, K], ... that were put together, views of `whole`

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of each part: N1, N2, ..."""
        return tuple(part.shape[0] for part in self.parts)


def fuse_rows(*weights: Any) -> FusedRows | None:
    """The matrices copied into one. None where they do not fit together: other kinds of weights, dtypes or
    devices, a matrix on the host, or FP8 tiles of 128 rows that would not meet.
    """
    first = weights[0]
    if all(map(accepts_fp8_activations, weights)):
        # A tile has one scale for 128 rows, which must not belong to two matrices.
        if any(len(w.codes) % BLOCK for w in weights[:-1]) or len({w.codes.device for w in weights}) > 1:
            return None
        whole: Any = ScaledFP8(*map(torch.cat, zip(*weights)))
    elif all(isinstance(w, torch.Tensor) for w in weights):
        if any((w.dtype, w.device) != (first.dtype, first.device) for w in weights):
            return None
        whole = torch.cat(weights)
    else:
        return None
    parts, end = [], 0
    for w in weights:
        end += w.shape[0]
        parts.append(fused_view(whole, end - w.shape[0], end))
    return FusedRows(whole, tuple(parts))


def fused_view(whole: Any, start: int, end: int) -> Any:
    """Rows start to end of a matrix [N, K] that others were put together into; `start` of an FP8 matrix is a
    multiple of 128.
    """
    if isinstance(whole, ScaledFP8):
        return ScaledFP8(whole.codes[start:end], whole.scale[start // BLOCK : -(-end // BLOCK)])
    return whole[start:end]


def fused_linear(
    x: torch.Tensor | ScaledFP8, fused: FusedRows, activations: str = "fp8"
) -> tuple[torch.Tensor, ...]:
    """`linear` of x [T, K] and each part, as one product: f32 [T, N1], [T, N2], ..."""
    return linear(x, fused.whole, activations).split(fused.rows, dim=-1)


# --- below --------------------------------------------------------------------------------------------------


def _fp8(x: torch.Tensor | ScaledFP8, w: ScaledFP8, activations: str) -> torch.Tensor:
    if isinstance(w.codes, torch.Tensor) and w.codes.is_cuda:
        entered("fp8 in Triton")
        return triton_linear()(x, w, activations, torch.float32)
    entered(f"fp8 in torch, {'quantized' if isinstance(x, ScaledFP8) else activations}")
    return fp8_linear(x, w, activations)


@cache
def triton_linear() -> Callable:
    """The Triton row; it is imported where a GPU is first used, as it fixes then whether Triton interprets or
    compiles.
    """
    return importlib.import_module("refimpl.kernels.fp8_linear_triton").linear


@cache
def triton_quantizers() -> Any:
    """The Triton quantizers, imported likewise."""
    return importlib.import_module("refimpl.kernels.act_quant_triton")


@cache
def launches() -> Any:
    """The Triton kernels of small operations, imported where a GPU is first used: see `triton_linear`."""
    return importlib.import_module("refimpl.kernels.norm_rope_triton")


def by_triton(x: torch.Tensor) -> bool:
    """Whether Triton's kernels run on such a tensor: it is on a GPU, or Triton interprets."""
    return x.is_cuda or bool(os.environ.get("TRITON_INTERPRET"))


def fp8_linear(x: torch.Tensor | ScaledFP8, w: ScaledFP8, activations: str = "fp8") -> torch.Tensor:
    """x f32 [..., K] or quantized, times the transpose of w [N, K] -> f32 [..., N]: refimpl.fp8.linear step
    by step, on tensors of any device.
    """
    codes, scale = decode(w.codes), w.scale
    if activations == "exact" and isinstance(x, torch.Tensor):
        return x @ (codes * spread(scale, *codes.shape)).T
    a_codes, a_scale = (
        x if isinstance(x, ScaledFP8) else act_quant(x.reshape(-1, x.shape[-1]), activations == "ue8m0")
    )
    a = decode(a_codes)
    y = a.new_zeros(len(a), len(codes))
    rows = torch.arange(len(codes), device=a.device) // BLOCK
    # Block by block, as the scales change with each: sums within one are of codes alone.
    for block, start in enumerate(range(0, a.shape[1], BLOCK)):
        part = a[:, start : start + BLOCK] @ codes[:, start : start + BLOCK].T
        y += part * a_scale[:, block, None] * scale[rows, block]
    return y.reshape(*x.shape[:-1], len(codes))


def act_quant(x: torch.Tensor, ue8m0: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """refimpl.fp8.act_quant of x f32 [..., K]: codes u8 [..., K], scale f32 [..., ceil(K/128)]."""
    # Zeros to whole groups: they make no magnitude the larger, and are cut off again.
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % BLOCK))
    padded = padded.reshape(*x.shape[:-1], padded.shape[-1] // BLOCK, BLOCK)
    # By a tensor: a plain number is divided by on a GPU as its reciprocal is multiplied by, and rounds twice.
    scale = padded.abs().amax(dim=-1) / x.new_full((), 448)
    if ue8m0:
        bits = scale.view(torch.int32)
        exponent = ((bits >> 23) + ((bits & 0x7FFFFF) != 0)).clamp(min=1)
        scale = torch.where(exponent < 255, (exponent << 23).view(torch.float32), scale)
    codes = (padded / scale[..., None]).to(torch.float8_e4m3fn).view(torch.uint8)
    # 0 / 0 was NaN: a group of zeros has codes of zero.
    codes = torch.where(scale[..., None] == 0, 0, codes)
    return codes.flatten(-2)[..., : x.shape[-1]], scale


def decode(codes: torch.Tensor) -> torch.Tensor:
    """E4M3 codes u8 [...] -> their values f32 [...]."""
    return codes.view(torch.float8_e4m3fn).float()


def spread(scale: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Tile scales f32 [ceil(n/128), ceil(k/128)] -> the scale of each element of a matrix, f32 [n, k]."""
    return scale.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]


def on_host(w: Any) -> Any:
    """A weight of numpy arrays."""
    return (
        type(w)(*(v.cpu().numpy() if isinstance(v, torch.Tensor) else v for v in w))
        if isinstance(w, tuple)
        else w
    )


def _on_the_cpu(x: torch.Tensor, w: Any, activations: str) -> torch.Tensor:
    from refimpl.kernels import linear_numba  # Numba: seconds, and only where a weight is on the CPU

    y = worker.submit(linear_numba.linear, x.cpu().numpy(), on_host(w), activations).result()
    return torch.from_numpy(y).to(x.device)
