"""Q6_K: 256 weights in 210 bytes, 6.5625 bits each: sixteen groups of 16 with a signed 8-bit scale.

    byte 0                128              192                208      210
         | ql: low 4 bits  | qh: high 2 bits | scales: 16 x i8  | d:f16 |

    w[j, i] = (d * sc[j]) * (q[j, i] - 32)                     j = 0..15 groups, i = 0..15

Two halves of 128 weights. In a half, byte l = 0..31 of its 32 qh bytes holds the high bits of weights l,
l+32, l+64, l+96 (bits 0-1, 2-3, 4-5, 6-7); its 64 ql bytes hold the low bits of weights 0..63 in their low
nibbles and of 64..127 in their high ones. Source: ggml `block_q6_K`.
"""

from __future__ import annotations

import numpy as np

from refimpl.formats._blocks import blocks, flat, in_blocks, nibbles, pack_nibbles, to_bytes
from refimpl.formats._search import signed_scales

NAME, GGML_TYPE, WEIGHTS = "Q6_K", 14, 256
BLOCK = np.dtype([("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")])
assert BLOCK.itemsize == 210
PARTS = ("d", "sc", "q")
FORMULA = "(d * sc[j]) * q[j, i]"
"""A weight, from the numbers of `unpack`: [j] is a group, [i] a weight of the block or group."""
_SHIFTS = np.array([0, 2, 4, 6], np.uint8)[:, None]


def unpack(data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """d f32 [..., n], sc i8 [..., n, 16], q i8 [..., n, 16, 16] in -32..31."""
    b = blocks(data, BLOCK)
    low = nibbles(b["ql"].reshape(*b.shape, 2, 64)).reshape(*b.shape, 2, 4, 32)
    high = (b["qh"].reshape(*b.shape, 2, 1, 32) >> _SHIFTS) & 3
    q = (low | high << 4).astype(np.int8) - np.int8(32)
    return b["d"].astype(np.float32), b["scales"], q.reshape(*b.shape, 16, 16)


def dequantize(data: np.ndarray) -> np.ndarray:
    """u8 [..., n*210] -> f32 [..., n*256]."""
    d, sc, q = unpack(data)
    return flat((d[..., None] * sc.astype(np.float32))[..., None] * q.astype(np.float32), 3)


def quantize(x: np.ndarray) -> np.ndarray:
    """f32 [..., n*256] -> u8 [..., n*210], scales chosen by least squares (see `_search`)."""
    x = in_blocks(x, WEIGHTS)
    b = np.zeros(x.shape[:-1], BLOCK)
    b["d"], b["scales"], q = signed_scales(x.reshape(*b.shape, 16, 16), levels=32, scale_levels=127)
    q = (q + 32).astype(np.uint8).reshape(*b.shape, 2, 4, 32)
    b["ql"] = pack_nibbles((q & 15).reshape(*b.shape, 2, 2, 64)).reshape(*b.shape, 128)
    b["qh"] = ((q >> 4) << _SHIFTS).sum(axis=-2, dtype=np.uint8).reshape(*b.shape, 64)
    return to_bytes(b)
