"""Q4_0: 32 weights in 18 bytes, 4.5 bits each.

    byte 0      2                                          18
         | d:f16 | qs: low nibbles q[0..15], high q[16..31] |        w[i] = d * (q[i] - 8)

Source: ggml `block_q4_0`.
"""

from __future__ import annotations

import numpy as np

from refimpl.formats._blocks import blocks, flat, in_blocks, nibbles, pack_nibbles, to_bytes

NAME, GGML_TYPE, WEIGHTS = "Q4_0", 2, 32
BLOCK = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
assert BLOCK.itemsize == 18
PARTS = ("d", "q")
FORMULA = "d * q[i]"
"""A weight, from the numbers of `unpack`: [j] is a group, [i] a weight of the block or group."""


def unpack(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """d f32 [..., n], q i8 [..., n, 32] in -8..7."""
    b = blocks(data, BLOCK)
    return b["d"].astype(np.float32), flat(nibbles(b["qs"]), 2).astype(np.int8) - np.int8(8)


def dequantize(data: np.ndarray) -> np.ndarray:
    """u8 [..., n*18] -> f32 [..., n*32]."""
    d, q = unpack(data)
    return flat(d[..., None] * q.astype(np.float32), 2)


def quantize(x: np.ndarray) -> np.ndarray:
    """f32 [..., n*32] -> u8 [..., n*18]: the signed value of largest magnitude becomes -8."""
    x = in_blocks(x, WEIGHTS)
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=-1)[..., None], axis=-1)
    d = largest / np.float32(-8)
    with np.errstate(divide="ignore"):
        inverse = np.where(d == 0, np.float32(0), np.float32(1) / d)
    q = np.clip(np.trunc(x * inverse + np.float32(8.5)), 0, 15).astype(np.uint8)
    b = np.zeros(x.shape[:-1], BLOCK)
    b["d"], b["qs"] = d[..., 0], pack_nibbles(q.reshape(*b.shape, 2, 16))
    return to_bytes(b)
