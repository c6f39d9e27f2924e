"""IQ4_NL: 32 weights in 18 bytes, 4.5 bits each: four bits that are places in a table of uneven steps.

    byte 0      2                                          18
         | d:f16 | qs: low nibbles q[0..15], high q[16..31] |        w[i] = d * VALUES[q[i]]

The bytes lie as in Q4_0. VALUES is fine near zero, where most weights are, and coarse far from it. Source:
ggml `block_iq4_nl` and `kvalues_iq4nl`.
"""

from __future__ import annotations

import numpy as np

from refimpl.formats._blocks import blocks, flat, nibbles

NAME, GGML_TYPE, WEIGHTS = "IQ4_NL", 20, 32
BLOCK = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
assert BLOCK.itemsize == 18
PARTS = ("d", "q")
FORMULA = "d * VALUES[q[i]]"
"""A weight, from the numbers of `unpack`: [j] is a group, [i] a weight of the block or group."""
VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
"""i8 [16]: the number of every quant."""


def unpack(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """d f32 [..., n], q u8 [..., n, 32] in 0..15."""
    b = blocks(data, BLOCK)
    return b["d"].astype(np.float32), flat(nibbles(b["qs"]), 2)


def dequantize(data: np.ndarray) -> np.ndarray:
    """u8 [..., n*18] -> f32 [..., n*32]."""
    d, q = unpack(data)
    return flat(d[..., None] * VALUES[q].astype(np.float32), 2)
