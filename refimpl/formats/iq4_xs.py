"""IQ4_XS: 256 weights in 136 bytes, 4.25 bits each: eight groups of 32 with a signed 6-bit scale, quants as
in IQ4_NL.

    byte 0      2               4                 8                                          136
         | d:f16 | scales_h: u16 | scales_l: 4 x u8 | qs: 8 x 16 bytes, low nibbles, then high |

    w[j, i] = (d * sc[j]) * VALUES[q[j, i]]          j = 0..7 groups, i = 0..31

The low four bits of scale j are nibble j of scales_l, its high two are bits 2j and 2j+1 of scales_h; stored
is sc + 32. Letters are the bits of scale 0..7 (A..H):

    byte 2  DDCCBBAA        byte 4  BBBBAAAA        byte 6  FFFFEEEE
    byte 3  HHGGFFEE        byte 5  DDDDCCCC        byte 7  HHHHGGGG

Bytes 16j..16j+15 of qs hold weights 0..15 of group j in their low nibbles and 16..31 in their high ones.
Source: ggml `block_iq4_xs`.
"""

from __future__ import annotations

import numpy as np

from refimpl.formats._blocks import blocks, flat, nibbles
from refimpl.formats.iq4_nl import VALUES

NAME, GGML_TYPE, WEIGHTS = "IQ4_XS", 23, 256
BLOCK = np.dtype([("d", "<f2"), ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", 128)])
assert BLOCK.itemsize == 136
PARTS = ("d", "sc", "q")
FORMULA = "(d * sc[j]) * VALUES[q[j, i]]"
"""A weight, from the numbers of `unpack`: [j] is a group, [i] a weight of the block or group."""
_PAIRS = np.arange(0, 16, 2, dtype=np.uint16)


def unpack(data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """d f32 [..., n], sc i8 [..., n, 8] in -32..31, q u8 [..., n, 8, 32] in 0..15."""
    b = blocks(data, BLOCK)
    low = np.stack([b["scales_l"] & 15, b["scales_l"] >> 4], axis=-1).reshape(*b.shape, 8)
    high = ((b["scales_h"][..., None] >> _PAIRS) & 3).astype(np.uint8)
    sc = (low | high << 4).astype(np.int8) - np.int8(32)
    q = nibbles(b["qs"].reshape(*b.shape, 8, 16)).reshape(*b.shape, 8, 32)
    return b["d"].astype(np.float32), sc, q


def dequantize(data: np.ndarray) -> np.ndarray:
    """u8 [..., n*136] -> f32 [..., n*256]."""
    d, sc, q = unpack(data)
    return flat((d[..., None] * sc.astype(np.float32))[..., None] * VALUES[q].astype(np.float32), 3)
