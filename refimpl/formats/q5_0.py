"""Q5_0: 32 weights in 22 bytes, 5.5 bits each.

    byte 0      2                      6                                          22
         | d:f16 | qh: bit i is q[i]'s 5th | qs: low nibbles q[0..15], high q[16..31] |

    w[i] = d * (q[i] - 16)

Source: ggml `block_q5_0`.
"""

from __future__ import annotations

import numpy as np

from refimpl.formats._blocks import blocks, flat, in_blocks, nibbles, pack_nibbles, to_bytes

NAME, GGML_TYPE, WEIGHTS = "Q5_0", 6, 32
BLOCK = np.dtype([("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
assert BLOCK.itemsize == 22
PARTS = ("d", "q")
FORMULA = "d * q[i]"
"""A weight, from the numbers of `unpack`: [j] is a group, [i] a weight of the block or group."""


def unpack(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """d f32 [..., n], q i8 [..., n, 32] in -16..15."""
    b = blocks(data, BLOCK)
    high = np.unpackbits(b["qh"], axis=-1, bitorder="little")
    return b["d"].astype(np.float32), (flat(nibbles(b["qs"]), 2) | high << 4).astype(np.int8) - np.int8(16)


def dequantize(data: np.ndarray) -> np.ndarray:
    """u8 [..., n*22] -> f32 [..., n*32]."""
    d, q = unpack(data)
    return flat(d[..., None] * q.astype(np.float32), 2)


def quantize(x: np.ndarray) -> np.ndarray:
    """f32 [..., n*32] -> u8 [..., n*22]: the signed value of largest magnitude becomes -16."""
    x = in_blocks(x, WEIGHTS)
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=-1)[..., None], axis=-1)
    d = largest / np.float32(-16)
    with np.errstate(divide="ignore"):
        inverse = np.where(d == 0, np.float32(0), np.float32(1) / d)
    q = np.clip(np.trunc(x * inverse + np.float32(16.5)), 0, 31).astype(np.uint8)
    b = np.zeros(x.shape[:-1], BLOCK)
    b["d"], b["qs"] = d[..., 0], pack_nibbles((q & 15).reshape(*b.shape, 2, 16))
    b["qh"] = np.packbits(q >> 4, axis=-1, bitorder="little")
    return to_bytes(b)
