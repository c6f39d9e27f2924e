"""Q4_K: 256 weights in 144 bytes, 4.5 bits each: eight groups of 32 with a 6-bit scale and a 6-bit minimum.

    byte 0      2         4                  16                                        144
         | d:f16 | dmin:f16 | scales: 12 bytes | qs: 4 x 32 bytes, low nibbles, then high |

    w[j, i] = (d * sc[j]) * q[j, i]  -  (dmin * m[j])          j = 0..7 groups, i = 0..31

Bytes 32c..32c+31 of qs hold group 2c in their low nibbles and group 2c+1 in their high ones. The 12 scale
bytes are drawn in `_blocks.unpack_scales`. Source: ggml `block_q4_K`.
"""

from __future__ import annotations

import numpy as np

from refimpl.formats._blocks import (
    blocks,
    flat,
    in_blocks,
    nibbles,
    pack_nibbles,
    pack_scales,
    to_bytes,
    unpack_scales,
)
from refimpl.formats._search import scales_and_minima

NAME, GGML_TYPE, WEIGHTS = "Q4_K", 12, 256
BLOCK = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)])
assert BLOCK.itemsize == 144
PARTS = ("d", "dmin", "sc", "m", "q")
FORMULA = "(d * sc[j]) * q[j, i] - dmin * m[j]"
"""A weight, from the numbers of `unpack`: [j] is a group, [i] a weight of the block or group."""


def unpack(data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """d, dmin f32 [..., n]; sc, m u8 [..., n, 8] in 0..63; q u8 [..., n, 8, 32] in 0..15."""
    b = blocks(data, BLOCK)
    sc, m = unpack_scales(b["scales"])
    q = nibbles(b["qs"].reshape(*b.shape, 4, 32)).reshape(*b.shape, 8, 32)
    return b["d"].astype(np.float32), b["dmin"].astype(np.float32), sc, m, q


def dequantize(data: np.ndarray) -> np.ndarray:
    """u8 [..., n*144] -> f32 [..., n*256]."""
    d, dmin, sc, m, q = unpack(data)
    scale = d[..., None] * sc.astype(np.float32)  # [..., n, 8]
    minimum = dmin[..., None] * m.astype(np.float32)
    return flat(scale[..., None] * q.astype(np.float32) - minimum[..., None], 3)


def quantize(x: np.ndarray) -> np.ndarray:
    """f32 [..., n*256] -> u8 [..., n*144], scales and minima chosen by least squares (see `_search`)."""
    x = in_blocks(x, WEIGHTS)
    b = np.zeros(x.shape[:-1], BLOCK)
    b["d"], b["dmin"], sc, m, q = scales_and_minima(x.reshape(*b.shape, 8, 32), levels=15, scale_levels=63)
    b["scales"] = pack_scales(sc, m)
    b["qs"] = pack_nibbles(q.reshape(*b.shape, 4, 2, 32)).reshape(*b.shape, 128)
    return to_bytes(b)
