"""F16: IEEE half precision, `S EEEEE MMMMMMMMMM`."""

from __future__ import annotations

import numpy as np

NAME, GGML_TYPE, WEIGHTS = "F16", 1, 1
BLOCK = np.dtype("<f2")


def dequantize(data: np.ndarray) -> np.ndarray:
    """u8 [..., n*2] -> f32 [..., n], exactly."""
    return np.ascontiguousarray(data).view(BLOCK).astype(np.float32)


def quantize(x: np.ndarray) -> np.ndarray:
    """f32 [..., n] -> u8 [..., n*2], round to nearest even; beyond 65504 infinity, as IEEE says."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(x, np.float32).astype(BLOCK).view(np.uint8)
