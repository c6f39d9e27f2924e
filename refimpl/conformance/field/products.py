"""Products of quantized matrices, and experts: ggml's, KTransformers' and torch's.

Called by the suite as `refimpl.conformance.field.products:ggml_vec_dot` and so on; each takes and gives what
the reference does. Packages are optional, so each is imported where it is judged.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from refimpl.bench import peers
from refimpl.reference import fp8
from refimpl.tensors import Packed, ScaledFP8

THREADS = 2


def _whole(w: Packed) -> Packed:
    return Packed(np.ascontiguousarray(w.data), w.ggml_type, w.shape)


def _mul_mat(x: np.ndarray, w: Packed, threads: int, repack: bool) -> np.ndarray:
    """ggml's MUL_MAT on its CPU backend: x f32 [..., K], w [N, K] -> f32 [..., N]."""
    flat = np.ascontiguousarray(x.reshape(-1, x.shape[-1]), np.float32)
    if not len(flat):
        return np.empty((*x.shape[:-1], w.shape[0]), np.float32)
    graph = peers.Graph(threads, repack).linear(_whole(w), len(flat))
    try:
        return graph(flat).reshape(*x.shape[:-1], w.shape[0]).copy()
    finally:
        graph.close()


def ggml_vec_dot(x: np.ndarray, w: Packed) -> np.ndarray:
    """One thread: products of rows by `vec_dot`, on activations that ggml quantizes itself."""
    return _mul_mat(x, w, 1, False)


def ggml_mul_mat(x: np.ndarray, w: Packed) -> np.ndarray:
    """Two threads, plain weights: whatever ggml's dispatch takes, tiles from some tokens on."""
    return _mul_mat(x, w, THREADS, False)


def ggml_repacked(x: np.ndarray, w: Packed) -> np.ndarray:
    """Two threads, weights interleaved by eight rows where ggml has such a kernel for the type."""
    return _mul_mat(x, w, THREADS, True)


def _mul_mat_id(
    x: np.ndarray, ids: np.ndarray, weights: np.ndarray, sides: tuple, repack: bool
) -> np.ndarray:
    if not ids.size:
        return np.zeros(x.shape, np.float32)
    gate, up, down = map(_whole, sides)
    graph = peers.Graph(THREADS, repack).experts(gate, up, down, len(x), ids.shape[1])
    try:
        parts = graph(np.ascontiguousarray(x), np.ascontiguousarray(ids, np.int32))
        return (parts * np.asarray(weights, np.float32)[..., None]).sum(axis=1, dtype=np.float32)
    finally:
        graph.close()


def ggml_experts(
    x: np.ndarray, ids: np.ndarray, weights: np.ndarray, gate: Packed, up: Packed, down: Packed
) -> np.ndarray:
    """ggml's MUL_MAT_ID for gate, up and down, and its SwiGLU; the weighted sum of a token's experts is
    numpy's.
    """
    return _mul_mat_id(x, ids, weights, (gate, up, down), False)


def ggml_experts_repacked(
    x: np.ndarray, ids: np.ndarray, weights: np.ndarray, gate: Packed, up: Packed, down: Packed
) -> np.ndarray:
    """`ggml_experts` with the weights interleaved by eight rows where ggml has such a kernel."""
    return _mul_mat_id(x, ids, weights, (gate, up, down), True)


def kt_experts(
    x: np.ndarray, ids: np.ndarray, weights: np.ndarray, gate: Packed, up: Packed, down: Packed
) -> np.ndarray:
    """kt_kernel's `moe.MOE` on GGUF blocks, its method LLAMAFILE: x in bfloat16, results in bfloat16, sums in
    float32 between.
    """
    if not ids.size:
        return np.zeros(x.shape, np.float32)
    sides = _whole(gate), _whole(up), _whole(down)
    run = peers.kt_experts(THREADS, max(16, len(x)), ids.shape[1], sides)
    assert run, "kt_kernel cannot be loaded"
    return run(np.ascontiguousarray(x), ids, np.ascontiguousarray(weights, np.float32))


@lru_cache(1)
def _scaled_mm() -> Callable[..., Any]:
    import torch

    return torch._scaled_mm


def torch_scaled_mm(x: np.ndarray, w: ScaledFP8) -> np.ndarray:
    """`torch._scaled_mm` once for each 128 columns, whose scales are multiplied in afterwards: x f32 [T, K],
    or quantized, w [N, K] -> f32 [T, N]. Activations are quantized by the reference.
    """
    import torch

    if not isinstance(x, ScaledFP8):
        codes, scale = fp8.act_quant(np.ascontiguousarray(x.reshape(-1, x.shape[-1])))
    else:
        codes, scale = x
    left, right = (torch.from_numpy(np.array(c)).view(torch.float8_e4m3fn) for c in (codes, w.codes))
    one, rows = torch.ones(()), np.arange(len(w.codes)) // 128
    y = np.zeros((len(codes), len(w.codes)), np.float32)
    for block, start in enumerate(range(0, codes.shape[1], 128)):
        a, b = left[:, start : start + 128].contiguous(), right[:, start : start + 128].contiguous()
        part = _scaled_mm()(a, b.T, scale_a=one, scale_b=one, out_dtype=torch.float32).numpy()
        y += part * scale[:, block, None] * w.scale[rows, block]
    return y.reshape(*x.shape[:-1], len(w.codes))


def deep_gemm_fp8(x: Any, w: Any) -> Any:
    """DeepGEMM's `fp8_gemm_nt` on tensors of a Hopper GPU: x f32 [..., K], or quantized, w [N, K] -> bf16
    [..., N]. Activations are quantized by this project's kernel.
    """
    import deep_gemm
    import torch

    from refimpl.kernels.act_quant_triton import act_quant  # fixes at import whether Triton interprets

    quantized: Any = x if isinstance(x, ScaledFP8) else act_quant(x.float().reshape(-1, x.shape[-1]))
    codes, scale = quantized
    y = torch.empty(len(codes), len(w.codes), dtype=torch.bfloat16, device=codes.device)
    if y.numel():
        # As it wants the scales: those of all tokens side by side in memory, at multiples of 16 bytes.
        scale = deep_gemm.get_mn_major_tma_aligned_tensor(scale.contiguous())
        pair = (codes.contiguous().view(torch.float8_e4m3fn), scale)
        weight = (w.codes.contiguous().view(torch.float8_e4m3fn), w.scale.contiguous())
        deep_gemm.fp8_gemm_nt(pair, weight, y)
    return y if isinstance(x, ScaledFP8) else y.reshape(*x.shape[:-1], len(w.codes))
