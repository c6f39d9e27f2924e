"""Casts to and from E4M3, and quantizers to scaled E4M3: torch's, ml_dtypes', Triton's, torchao's and
transformers'.

Called by the suite as `refimpl.conformance.field.floats:torch_e4m3` and so on; arrays in and out, tensors for
Triton's. Packages are optional, so each is imported where it is judged.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from refimpl.tensors import ScaledFP8


def torch_e4m3(x: np.ndarray) -> np.ndarray:
    """torch's cast of float32 to float8_e4m3fn: f32 [...] -> u8 [...]."""
    import torch

    return torch.from_numpy(np.array(x, np.float32)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def torch_e4m3_decode(codes: np.ndarray) -> np.ndarray:
    """torch's cast of float8_e4m3fn to float32: u8 [...] -> f32 [...]."""
    import torch

    return torch.from_numpy(np.array(codes)).view(torch.float8_e4m3fn).float().numpy()


def torch_bf16(x: np.ndarray) -> np.ndarray:
    """torch's cast of float32 to bfloat16, as bytes: f32 [..., n] -> u8 [..., 2 n]."""
    import torch

    flat = torch.from_numpy(np.array(x, np.float32, order="C").reshape(-1)).to(torch.bfloat16)
    return flat.view(torch.uint8).numpy().reshape(*x.shape[:-1], 2 * x.shape[-1])


def ml_dtypes_e4m3(x: np.ndarray) -> np.ndarray:
    """ml_dtypes' cast of float32 to float8_e4m3fn: f32 [...] -> u8 [...]."""
    import ml_dtypes

    return np.ascontiguousarray(x).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def ml_dtypes_e4m3_decode(codes: np.ndarray) -> np.ndarray:
    """ml_dtypes' cast of float8_e4m3fn to float32: u8 [...] -> f32 [...]."""
    import ml_dtypes

    return np.ascontiguousarray(codes).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def ml_dtypes_bf16(x: np.ndarray) -> np.ndarray:
    """ml_dtypes' cast of float32 to bfloat16, as bytes: f32 [..., n] -> u8 [..., 2 n]."""
    import ml_dtypes

    return np.ascontiguousarray(x).astype(ml_dtypes.bfloat16).view(np.uint8)


def triton_e4m3(x: Any) -> Any:
    """Triton's cast of float32 to float8e4nv, tensors f32 [...] -> u8 [...]; TRITON_INTERPRET=1 must be set
    before Python starts.
    """
    import torch

    from refimpl.conformance.field.triton_cast import cast  # compiled, or interpreted, when it is imported

    flat = x.reshape(-1).contiguous()
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=x.device)
    if len(flat):
        cast[(-(-len(flat) // 1024),)](flat, codes, len(flat), BLOCK=1024)
    return codes.reshape(x.shape)


def _codes(codes: Any, scale: Any) -> tuple[np.ndarray, np.ndarray]:
    import torch

    return codes.view(torch.uint8).numpy(), scale.float().contiguous().numpy()


def torchao_act_quant(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`torch_blockwise_scale_act_quant_lhs`: f32 [T, K] -> codes u8 [T, K], scales f32 [T, K/128]."""
    import torch
    from torchao.prototype.blockwise_fp8_training.kernels import torch_blockwise_scale_act_quant_lhs as quant

    return _codes(*quant(torch.from_numpy(np.array(x, order="C"))))


def torchao_weight_quant(w: np.ndarray) -> ScaledFP8:
    """`torch_blockwise_scale_weight_quant`: f32 [N, K] -> codes u8 [N, K], scales f32 [N/128, K/128]."""
    import torch
    from torchao.prototype.blockwise_fp8_training.kernels import torch_blockwise_scale_weight_quant as quant

    return ScaledFP8(*_codes(*quant(torch.from_numpy(np.array(w, order="C")))))


def transformers_weight_quant(w: np.ndarray) -> ScaledFP8:
    """`Fp8Quantize` of transformers' fine-grained FP8: f32 [N, K] -> codes u8 [N, K], scales f32
    [N/128, K/128].
    """
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    config = SimpleNamespace(weight_block_size=(128, 128), scale_fmt=None)
    quantizer = Fp8Quantize(SimpleNamespace(quantization_config=config))
    made = quantizer._quantize_one("a.weight", torch.from_numpy(np.array(w, order="C")))
    return ScaledFP8(*_codes(made["a.weight"], made["a.weight_scale_inv"]))


def transformers_weight_dequant(w: ScaledFP8) -> np.ndarray:
    """`_dequantize_fp8_weight`: codes u8 [N, K], scales f32 [ceil(N/128), ceil(K/128)] -> f32 [N, K]."""
    import torch
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    codes = torch.from_numpy(np.array(w.codes)).view(torch.float8_e4m3fn)
    scale = torch.from_numpy(np.array(w.scale))
    return _dequantize_fp8_weight(codes, scale, [128, 128], torch.float32).numpy()


def transformers_load_dequant(w: ScaledFP8) -> np.ndarray:
    """`Fp8Dequantize`, which checkpoints are loaded with: codes u8 [N, K], scales f32 [N/128, K/128] -> f32
    [N, K].
    """
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes = torch.from_numpy(np.array(w.codes)).view(torch.float8_e4m3fn)
    quantizer = Fp8Dequantize(SimpleNamespace(quantization_config=None))
    return quantizer._dequantize_one(codes, torch.from_numpy(np.array(w.scale)), torch.float32).numpy()
