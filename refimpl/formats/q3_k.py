"""Q3_K: 256 weights in 110 bytes, 3.4375 bits each: sixteen groups of 16 with a signed 6-bit scale.

    byte 0                      32             96                  108     110
         | hmask: the third bits | qs: two bits | scales: 12 bytes  | d:f16 |

    w[j, i] = (d * (sc[j] - 32)) * q[j, i]                     j = 0..15 groups, i = 0..15

qs as in Q2_K. Bit k of hmask byte l belongs to weight 32k + l; where it is 0, 4 is taken away, so q is in
-4..3. Letters are the bits of scale 0..15 (A..P):

    byte 0  IIIIAAAA    byte 4  MMMMEEEE    byte  8  MMIIEEAA
    byte 1  JJJJBBBB    byte 5  NNNNFFFF    byte  9  NNJJFFBB
    byte 2  KKKKCCCC    byte 6  OOOOGGGG    byte 10  OOKKGGCC
    byte 3  LLLLDDDD    byte 7  PPPPHHHH    byte 11  PPLLHHDD

Source: ggml `block_q3_K`.
"""

from __future__ import annotations

import numpy as np

from refimpl.formats._blocks import blocks, flat, two_bits

NAME, GGML_TYPE, WEIGHTS = "Q3_K", 11, 256
BLOCK = np.dtype([("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2")])
assert BLOCK.itemsize == 110
PARTS = ("d", "sc", "q")
FORMULA = "(d * sc[j]) * q[j, i]"
"""A weight, from the numbers of `unpack`: [j] is a group, [i] a weight of the block or group."""


def unpack(data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """d f32 [..., n], sc i8 [..., n, 16] in -32..31, q i8 [..., n, 16, 16] in -4..3."""
    b = blocks(data, BLOCK)
    low = np.concatenate([b["scales"][..., :8] & 15, b["scales"][..., :8] >> 4], axis=-1)
    high = flat((b["scales"][..., None, 8:] >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3, 2)
    sc = (low | high << 4).astype(np.int8) - np.int8(32)
    third = flat((b["hmask"][..., None, :] >> np.arange(8, dtype=np.uint8)[:, None]) & 1, 2)  # [..., n, 256]
    q = two_bits(b["qs"]).astype(np.int8) - (np.int8(4) - (third << 2).astype(np.int8))
    return b["d"].astype(np.float32), sc, q.reshape(*b.shape, 16, 16)


def dequantize(data: np.ndarray) -> np.ndarray:
    """u8 [..., n*110] -> f32 [..., n*256]."""
    d, sc, q = unpack(data)
    return flat((d[..., None] * sc.astype(np.float32))[..., None] * q.astype(np.float32), 3)
