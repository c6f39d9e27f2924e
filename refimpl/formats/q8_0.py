"""Q8_0: 32 weights in 34 bytes, 8.5 bits each.

    byte 0      2                                34
         | d:f16 | qs: 32 signed bytes            |        w[i] = d * q[i]

Source: ggml `block_q8_0`.
"""

from __future__ import annotations

import numpy as np

from refimpl.formats._blocks import blocks, flat, in_blocks, round_away, to_bytes

NAME, GGML_TYPE, WEIGHTS = "Q8_0", 8, 32
BLOCK = np.dtype([("d", "<f2"), ("qs", "i1", 32)])
assert BLOCK.itemsize == 34
PARTS = ("d", "q")
FORMULA = "d * q[i]"
"""A weight, from the numbers of `unpack`: [j] is a group, [i] a weight of the block or group."""


def unpack(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """d f32 [..., n], q i8 [..., n, 32]."""
    b = blocks(data, BLOCK)
    return b["d"].astype(np.float32), b["qs"]


def dequantize(data: np.ndarray) -> np.ndarray:
    """u8 [..., n*34] -> f32 [..., n*32]."""
    d, q = unpack(data)
    return flat(d[..., None] * q.astype(np.float32), 2)


def quantize(x: np.ndarray) -> np.ndarray:
    """f32 [..., n*32] -> u8 [..., n*34]: the largest magnitude becomes 127, ties round away from zero (C's
    roundf).

    A scale beyond the largest half, 65504, becomes infinity.
    """
    x = in_blocks(x, WEIGHTS)
    d = np.abs(x).max(axis=-1) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(d == 0, np.float32(0), np.float32(1) / d)
    b = np.zeros(d.shape, BLOCK)
    with np.errstate(over="ignore"):
        b["d"] = d
    b["qs"] = round_away(x * inverse[..., None])
    return to_bytes(b)
