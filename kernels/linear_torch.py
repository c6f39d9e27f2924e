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
from typing import Any

import numpy as np
import torch

from refimpl.kernels import worker
from refimpl.reference.fp8 import BLOCK
from refimpl.tensors import ScaledFP8

STACKED = 1 << 22  # bytes of results that a product of three parts may take at once


def linear(x: torch.Tensor | ScaledFP8, w: Any, activations: str = "fp8") -> torch.Tensor:
    """x [..., K] f32, or [M, K] quantized already, times the transpose of w [N, K] -> [..., N] f32, on x's
    device.
    """
    if takes_codes(w):
        return _fp8(x, w, activations)
    if isinstance(x, ScaledFP8):
        raise TypeError("activations of E4M3 multiply weights of E4M3 only")
    if isinstance(w, torch.Tensor):
        return product(x.reshape(-1, w.shape[1]), w.T).reshape(*x.shape[:-1], len(w))
    return _on_the_cpu(x, w, activations)


def swiglu(
    x: torch.Tensor | ScaledFP8, gate: Any, up: Any, down: Any, activations: str = "fp8"
) -> torch.Tensor:
    """down(silu(gate(x)) * up(x)): f32 [T, D] -> [T, D]. Gate and up are one product where they lie in one
    piece; then the product of both can be quantized for an FP8 `down` as it is made.
    """
    both = joined(gate, up)
    if both is None:
        g, u = linear(x, gate, activations), linear(x, up, activations)
    else:
        gate_up = linear(x, both, activations)
        if activations == "fp8" and takes_codes(down):
            return linear(ScaledFP8(*swiglu_quant(gate_up)), down)
        g, u = gate_up.tensor_split(2, dim=-1)
    return linear(torch.nn.functional.silu(g, inplace=True) * u, down, activations)


def takes_codes(w: Any) -> bool:
    """Whether a linear of this weight multiplies codes by codes, on torch's tensors."""
    return isinstance(w, ScaledFP8) and isinstance(w.codes, torch.Tensor)


def swiglu_quant(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results as refimpl.reference.quantizing.swiglu_quant."""
    if by_triton(gate_up):
        return triton_quantizers().swiglu_quant(gate_up)
    gate, up = gate_up.tensor_split(2, dim=-1)
    return act_quant(torch.nn.functional.silu(gate) * up)


def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x [..., T, K] f32 times w [..., K, N], f32 or bf16 -> [..., T, N] f32, as exact as a float32
    product.
    """
    if not x.is_cuda:  # numpy's BLAS: torch's has other bits with another number of threads
        return torch.from_numpy(np.matmul(x.numpy(), w.float().numpy()))
    if w.dtype == torch.float32:
        return x @ w
    multiply = partial(torch.bmm if x.ndim == 3 else torch.mm, out_dtype=torch.float32)
    if 12 * x.shape[:-1].numel() * w.shape[-1] > STACKED:
        return _one_by_one(x, w, multiply)
    stacked = x.new_empty(*x.shape[:-2], 3, *x.shape[-2:], dtype=torch.bfloat16)
    high, middle, low = stacked.unbind(-3)
    rest = x - high.copy_(x)
    rest -= middle.copy_(rest)
    low.copy_(rest)
    y = multiply(stacked.flatten(-3, -2), w)  # [..., 3T, N]: the weights are read once
    high, middle, low = y.unflatten(-2, (3, x.shape[-2])).unbind(-3)
    return high + middle.add_(low)


def _one_by_one(x: torch.Tensor, w: torch.Tensor, multiply: Callable) -> torch.Tensor:
    """The same with less memory: three products, one after the other."""
    part = x.to(torch.bfloat16)
    y, rest = multiply(part, w), x - part
    for _ in range(2):
        part = rest.to(torch.bfloat16)
        y += multiply(part, w)
        rest -= part
    return y


# --- matrices side by side ----------------------------------------------------------------------------------


def side_by_side(first: Any, second: Any) -> tuple[Any, Any]:
    """The two matrices copied into one piece of memory, each a view of its part. As they are, where kinds or
    tiles do not fit together.
    """
    if (
        isinstance(first, ScaledFP8)
        and isinstance(second, ScaledFP8)
        and isinstance(first.codes, torch.Tensor)
        and isinstance(second.codes, torch.Tensor)
    ):
        if len(first.codes) % BLOCK or first.codes.device != second.codes.device:
            return first, second
        codes, scales = (side_by_side(a, b) for a, b in zip(first, second))
        return ScaledFP8(codes[0], scales[0]), ScaledFP8(codes[1], scales[1])
    if not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)) or (
        first.dtype,
        first.device,
    ) != (second.dtype, second.device):
        return first, second
    whole = torch.cat((first, second))
    return whole[: len(first)], whole[len(first) :]


def joined(first: Any, second: Any) -> Any:
    """The matrix that two matrices `side_by_side` are parts of; None when they are not."""
    if isinstance(first, ScaledFP8) and isinstance(second, ScaledFP8):
        parts = [joined(a, b) for a, b in zip(first, second)]
        return None if parts[0] is None or parts[1] is None else ScaledFP8(*parts)
    if (
        not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor))
        or first.dtype != second.dtype
    ):
        return None
    if (
        first.data_ptr() + first.nbytes != second.data_ptr()
        or first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    ):
        return None
    return first.as_strided((len(first) + len(second), first.shape[1]), first.stride())


# --- below --------------------------------------------------------------------------------------------------


def _fp8(x: torch.Tensor | ScaledFP8, w: ScaledFP8, activations: str) -> torch.Tensor:
    if isinstance(w.codes, torch.Tensor) and w.codes.is_cuda:
        return triton_linear()(x, w, activations, torch.float32)
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


def by_triton(x: torch.Tensor) -> bool:
    """Whether Triton's kernels run on such a tensor."""
    return x.is_cuda or bool(os.environ.get("TRITON_INTERPRET"))


def fp8_linear(x: torch.Tensor | ScaledFP8, w: ScaledFP8, activations: str = "fp8") -> torch.Tensor:
    """refimpl.fp8.linear step by step, on tensors of any device."""
    codes, scale = decode(w.codes), w.scale
    if activations == "exact" and isinstance(x, torch.Tensor):
        return x @ (codes * spread(scale, *codes.shape)).T
    a_codes, a_scale = x if isinstance(x, ScaledFP8) else act_quant(x.reshape(-1, x.shape[-1]))
    a = decode(a_codes)
    y = a.new_zeros(len(a), len(codes))
    rows = torch.arange(len(codes), device=a.device) // BLOCK
    for block, start in enumerate(range(0, a.shape[1], BLOCK)):
        part = a[:, start : start + BLOCK] @ codes[:, start : start + BLOCK].T
        y += part * a_scale[:, block, None] * scale[rows, block]
    return y.reshape(*x.shape[:-1], len(codes))


def act_quant(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """refimpl.fp8.act_quant of x f32 [T, K]: codes u8 [T, K], scale f32 [T, ceil(K/128)]."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % BLOCK))
    padded = padded.reshape(len(x), padded.shape[1] // BLOCK, BLOCK)
    scale = padded.abs().amax(dim=-1) / 448
    codes = (padded / scale[..., None]).to(torch.float8_e4m3fn).view(torch.uint8)
    codes = torch.where(scale[..., None] == 0, 0, codes)
    return codes.flatten(1)[:, : x.shape[1]], scale


def decode(codes: torch.Tensor) -> torch.Tensor:
    """The float32 values of E4M3 codes."""
    return codes.view(torch.float8_e4m3fn).float()


def spread(scale: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """The scale of each element of a matrix [n, k]."""
    return scale.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]


def on_host(w: Any) -> Any:
    """A weight of numpy arrays."""
    return (
        type(w)(*(v.cpu().numpy() if isinstance(v, torch.Tensor) else v for v in w))
        if isinstance(w, tuple)
        else w
    )


def _on_the_cpu(x: torch.Tensor, w: Any, activations: str) -> torch.Tensor:
    from refimpl.kernels import linear_numba

    y = worker.submit(linear_numba.linear, x.cpu().numpy(), on_host(w), activations).result()
    return torch.from_numpy(y).to(x.device)
