"""BF16: the upper half of a float32, `S EEEEEEEE MMMMMMM`."""

from __future__ import annotations

import numpy as np

from refimpl.formats._blocks import blocks, in_blocks

NAME, GGML_TYPE, WEIGHTS = "BF16", 30, 1
BLOCK = np.dtype("<u2")


def dequantize(data: np.ndarray) -> np.ndarray:
    """u8 [..., n*2] -> f32 [..., n], exactly."""
    return decode(blocks(data, BLOCK))


def quantize(x: np.ndarray) -> np.ndarray:
    """f32 [..., n] -> u8 [..., n*2], round to nearest even; NaN stays NaN."""
    return encode(in_blocks(x, WEIGHTS)[..., 0]).view(np.uint8)


def decode(halves: np.ndarray) -> np.ndarray:
    """Patterns u16 [...] -> f32 [...], exactly: the upper half of a float32."""
    return (halves.astype(np.uint32) << 16).view(np.float32)


def encode(x: np.ndarray) -> np.ndarray:
    """f32 [...] -> u16 [...]: round to nearest even; NaN becomes quiet and keeps its sign."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype(np.uint16)
