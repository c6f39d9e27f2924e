"""Decoders and encoders of GGML's formats: gguf-py's, ggml's, transformers' and torchao's.

Called by the suite as `refimpl.conformance.field.blocks:gguf_q4_k`, `ggml_quantize_q8_0` and so on; each
takes and gives what the reference does. Packages are optional, so each is imported where it is judged.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from refimpl import formats
from refimpl.bench import peers
from refimpl.formats import mxfp4


def _gguf(kind: int, data: np.ndarray) -> np.ndarray:
    """`gguf.quants.dequantize`: u8 [..., n bytes] -> f32 [..., n weights]."""
    import gguf

    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType(kind)).astype(np.float32)


def _gguf_quantize(kind: int, x: np.ndarray) -> np.ndarray:
    """`gguf.quants.quantize`: f32 [..., n weights] -> u8 [..., n bytes]."""
    import gguf

    return gguf.quants.quantize(x, gguf.GGMLQuantizationType(kind))


def _numbers(kind: int, data: np.ndarray) -> tuple[int, ...]:
    module = formats.get(kind)
    return (*data.shape[:-1], data.shape[-1] // module.BLOCK.itemsize * module.WEIGHTS)


def _ggml(kind: int, data: np.ndarray) -> np.ndarray:
    """`ggml_type_traits.to_float`: u8 [..., n bytes] -> f32 [..., n weights]."""
    out = np.empty(_numbers(kind, data), np.float32)
    return peers.dequantize(kind, np.ascontiguousarray(data), out) if out.size else out


def _ggml_quantize(kind: int, x: np.ndarray) -> np.ndarray:
    """`ggml_quantize_chunk`: f32 [..., n weights] -> u8 [..., n bytes]."""
    flat = peers.quantize(kind, x.reshape(-1, x.shape[-1]))
    return flat.reshape(*x.shape[:-1], flat.shape[-1])


def _transformers(kind: int, data: np.ndarray) -> np.ndarray:
    """`transformers.integrations.gguf.dequant.dequantize`: u8 [..., n bytes] -> f32 [..., n weights]."""
    import torch
    from transformers.integrations.gguf.dequant import dequantize

    flat = torch.from_numpy(np.array(data).reshape(-1))
    return dequantize(flat, kind).numpy().reshape(_numbers(kind, data))


def torchao_mxfp4(data: np.ndarray) -> np.ndarray:
    """`torchao.prototype.mx_formats.mx_tensor.to_dtype` on the quants and scales of GGML's blocks: u8
    [..., n*17] -> f32 [..., n*32]. torchao's bytes hold neighbours, GGML's hold a number and the sixteenth
    after it.
    """
    import torch
    from torchao.prototype.mx_formats.mx_tensor import to_dtype

    e, q = mxfp4.unpack(np.ascontiguousarray(data))
    pairs = q[..., 0::2] | q[..., 1::2] << 4
    codes, scales = (torch.from_numpy(np.ascontiguousarray(a)) for a in (pairs, e))
    floats = scales.view(torch.float8_e8m0fnu)
    y = to_dtype(codes, floats, torch.float4_e2m1fn_x2, 32, torch.float32)
    return y.numpy().reshape(*data.shape[:-1], -1)


def torchao_quantize_mxfp4(x: np.ndarray) -> np.ndarray:
    """`torchao.prototype.mx_formats.mx_tensor.to_mx`, scales rounded down: f32 [..., n*32] -> u8
    [..., n*17].
    """
    import torch
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    given = torch.from_numpy(np.array(x, np.float32, order="C"))
    scales, codes = to_mx(given, torch.float4_e2m1fn_x2, 32)
    pairs = codes.view(torch.uint8).numpy().reshape(*x.shape[:-1], -1, 16)
    q = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*pairs.shape[:-1], 32)
    b = np.zeros(pairs.shape[:-1], mxfp4.BLOCK)
    b["e"] = scales.view(torch.uint8).numpy().reshape(b.shape)
    b["qs"] = q[..., :16] | q[..., 16:] << 4
    return b.view(np.uint8).reshape(*x.shape[:-1], -1)


_MAKERS: dict[str, Callable[..., Any]] = {
    "gguf_quantize": _gguf_quantize,
    "ggml_quantize": _ggml_quantize,
    "gguf": _gguf,
    "ggml": _ggml,
    "transformers": _transformers,
}


def __getattr__(name: str) -> Callable[..., Any]:
    """`gguf_q4_k`, `ggml_quantize_q8_0` and so on, for every type there is."""
    for prefix, maker in _MAKERS.items():
        for kind, module in formats.FORMATS.items():
            if name == f"{prefix}_{module.NAME.lower()}":
                return partial(maker, kind)
    raise AttributeError(name)
