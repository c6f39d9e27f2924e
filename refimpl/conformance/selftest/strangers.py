"""Kernels of other projects as the suite takes them, to be judged by one command each; the verdicts stand in
`docs/conformance.md`.

    python -m refimpl.conformance --op q4_k.dequantize --kernel refimpl.conformance.peers:gguf_q4_k

`gguf_*` are gguf-py's decoders and encoders, `ggml_*` llama.cpp's (extra `peers`), `ggml_linear` its graph on
a packed weight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from refimpl import formats
from refimpl.bench import peers
from refimpl.tensors import Packed


def torch_e4m3(x: np.ndarray) -> np.ndarray:
    """torch's cast of float32 to float8_e4m3fn."""
    import torch

    return torch.from_numpy(np.array(x, np.float32)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def torch_e4m3_decode(codes: np.ndarray) -> np.ndarray:
    """torch's cast of float8_e4m3fn to float32."""
    import torch

    return torch.from_numpy(np.array(codes)).view(torch.float8_e4m3fn).float().numpy()


def ml_dtypes_e4m3(x: np.ndarray) -> np.ndarray:
    """ml_dtypes' cast of float32 to float8_e4m3fn."""
    import ml_dtypes

    return np.ascontiguousarray(x).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def ml_dtypes_e4m3_decode(codes: np.ndarray) -> np.ndarray:
    """ml_dtypes' cast of float8_e4m3fn to float32."""
    import ml_dtypes

    return np.ascontiguousarray(codes).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def triton_e4m3(x: Any) -> Any:
    """Triton's cast of float32 to float8e4nv, tensors in and out; TRITON_INTERPRET=1 must be set before
    Python starts.
    """
    import torch

    from refimpl.conformance.selftest.strangers_triton import cast

    flat = x.reshape(-1).contiguous()
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=x.device)
    if len(flat):
        cast[(-(-len(flat) // 1024),)](flat, codes, len(flat), BLOCK=1024)
    return codes.reshape(x.shape)


# --- GGML's formats -----------------------------------------------------------------------------------------


def _gguf(kind: int, data: np.ndarray) -> np.ndarray:
    import gguf

    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType(kind)).astype(np.float32)


def _gguf_quantize(kind: int, x: np.ndarray) -> np.ndarray:
    import gguf

    return gguf.quants.quantize(x, gguf.GGMLQuantizationType(kind))


def _ggml(kind: int, data: np.ndarray) -> np.ndarray:
    module = formats.get(kind)
    out = np.empty((*data.shape[:-1], data.shape[-1] // module.BLOCK.itemsize * module.WEIGHTS), np.float32)
    return peers.dequantize(kind, np.ascontiguousarray(data), out) if out.size else out


def _ggml_quantize(kind: int, x: np.ndarray) -> np.ndarray:
    flat = peers.quantize(kind, x.reshape(-1, x.shape[-1]))
    return flat.reshape(*x.shape[:-1], flat.shape[-1])


def ggml_linear(x: np.ndarray, w: Packed) -> np.ndarray:
    """x times the transpose of w by ggml's mul_mat on the CPU, one thread: its vec_dot, on activations that
    it quantizes itself.
    """
    if not len(x):
        return np.empty((0, w.shape[0]), np.float32)
    graph = peers.Graph(1).linear(Packed(np.ascontiguousarray(w.data), w.ggml_type, w.shape), len(x))
    try:
        return graph(np.ascontiguousarray(x, np.float32)).copy()
    finally:
        graph.close()


_MAKERS: dict[str, Callable[..., Any]] = {
    "gguf_quantize": _gguf_quantize,
    "ggml_quantize": _ggml_quantize,
    "gguf": _gguf,
    "ggml": _ggml,
}


def __getattr__(name: str) -> Callable[..., Any]:
    """`gguf_q4_k`, `ggml_quantize_q8_0` and so on, for every type there is."""
    for prefix, maker in _MAKERS.items():
        for kind, module in formats.FORMATS.items():
            if name == f"{prefix}_{module.NAME.lower()}":
                return partial(maker, kind)
    raise AttributeError(name)
