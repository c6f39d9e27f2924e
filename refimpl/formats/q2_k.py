"""Q2_K: 256 weights in 84 bytes, 2.625 bits each: sixteen groups of 16 with a 4-bit scale and a 4-bit
minimum.

    byte 0                              16                80      82         84
         | scales: 16 x (mmmm ssss)      | qs: 64 bytes    | d:f16 | dmin:f16 |

    w[j, i] = (d * sc[j]) * q[j, i]  -  (dmin * m[j])          j = 0..15 groups, i = 0..15

qs in two halves of 32 bytes: bits 0-1 of byte l hold weight l of the half, bits 2-3 weight l+32, and so on.
Source: ggml `block_q2_K`.
"""

from __future__ import annotations

import numpy as np

from refimpl.formats._blocks import blocks, flat, in_blocks, pack_two_bits, to_bytes, two_bits
from refimpl.formats._search import scales_and_minima

NAME, GGML_TYPE, WEIGHTS = "Q2_K", 10, 256
BLOCK = np.dtype([("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2")])
assert BLOCK.itemsize == 84
PARTS = ("d", "dmin", "sc", "m", "q")
FORMULA = "(d * sc[j]) * q[j, i] - dmin * m[j]"
"""A weight, from the numbers of `unpack`: [j] is a group, [i] a weight of the block or group."""


def unpack(data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """d, dmin f32 [..., n]; sc, m u8 [..., n, 16] in 0..15; q u8 [..., n, 16, 16] in 0..3."""
    b = blocks(data, BLOCK)
    q = two_bits(b["qs"]).reshape(*b.shape, 16, 16)
    return b["d"].astype(np.float32), b["dmin"].astype(np.float32), b["scales"] & 15, b["scales"] >> 4, q


def dequantize(data: np.ndarray) -> np.ndarray:
    """u8 [..., n*84] -> f32 [..., n*256]."""
    d, dmin, sc, m, q = unpack(data)
    scale = d[..., None] * sc.astype(np.float32)  # [..., n, 16]
    minimum = dmin[..., None] * m.astype(np.float32)
    return flat(scale[..., None] * q.astype(np.float32) - minimum[..., None], 3)


def quantize(x: np.ndarray) -> np.ndarray:
    """f32 [..., n*256] -> u8 [..., n*84], scales and minima chosen by least squares (see `_search`)."""
    x = in_blocks(x, WEIGHTS)
    b = np.zeros(x.shape[:-1], BLOCK)
    b["d"], b["dmin"], sc, m, q = scales_and_minima(x.reshape(*b.shape, 16, 16), levels=3, scale_levels=15)
    b["scales"], b["qs"] = sc | m << 4, pack_two_bits(flat(q, 2))
    return to_bytes(b)
