"""Q5_1: 32 weights in 24 bytes, 6 bits each.

    byte 0      2      4                      8                                          24
         | d:f16 | m:f16 | qh: bit i is q[i]'s 5th | qs: low nibbles q[0..15], high q[16..31] |

    w[i] = d * q[i] + m

Source: ggml `block_q5_1`.
"""

from __future__ import annotations

import numpy as np

from refimpl.formats._blocks import blocks, flat, in_blocks, nibbles, pack_nibbles, to_bytes

NAME, GGML_TYPE, WEIGHTS = "Q5_1", 7, 32
BLOCK = np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
assert BLOCK.itemsize == 24
PARTS = ("d", "m", "q")
FORMULA = "d * q[i] + m"
"""A weight, from the numbers of `unpack`: [j] is a group, [i] a weight of the block or group."""


def unpack(data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """d, m f32 [..., n]; q u8 [..., n, 32] in 0..31."""
    b = blocks(data, BLOCK)
    high = np.unpackbits(b["qh"], axis=-1, bitorder="little")
    return b["d"].astype(np.float32), b["m"].astype(np.float32), flat(nibbles(b["qs"]), 2) | high << 4


def dequantize(data: np.ndarray) -> np.ndarray:
    """u8 [..., n*24] -> f32 [..., n*32]."""
    d, m, q = unpack(data)
    # Not + m: of two NaN a difference keeps the first, a sum the one that the compiler put first.
    return flat(d[..., None] * q.astype(np.float32) - -m[..., None], 2)


def quantize(x: np.ndarray) -> np.ndarray:
    """f32 [..., n*32] -> u8 [..., n*24]: the smallest value becomes 0, the largest 31."""
    x = in_blocks(x, WEIGHTS) + np.float32(0)  # a zero has no sign
    low = x.min(axis=-1)
    d = (x.max(axis=-1) - low) / np.float32(31)
    with np.errstate(divide="ignore"):
        inverse = np.where(d == 0, np.float32(0), np.float32(1) / d)
    q = np.clip(np.trunc((x - low[..., None]) * inverse[..., None] + np.float32(0.5)), 0, 31).astype(np.uint8)
    b = np.zeros(d.shape, BLOCK)
    b["d"], b["m"], b["qs"] = d, low, pack_nibbles((q & 15).reshape(*b.shape, 2, 16))
    b["qh"] = np.packbits(q >> 4, axis=-1, bitorder="little")
    return to_bytes(b)
