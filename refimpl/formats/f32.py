"""F32: IEEE single precision, so that plain tensors of a GGUF are read like any other."""

from __future__ import annotations

import numpy as np

NAME, GGML_TYPE, WEIGHTS = "F32", 0, 1
BLOCK = np.dtype("<f4")


def dequantize(data: np.ndarray) -> np.ndarray:
    """u8 [..., n*4] -> f32 [..., n]."""
    return np.ascontiguousarray(data).view(BLOCK).astype(np.float32)


def quantize(x: np.ndarray) -> np.ndarray:
    """f32 [..., n] -> u8 [..., n*4]."""
    return np.ascontiguousarray(x, BLOCK).view(np.uint8)
