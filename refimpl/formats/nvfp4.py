"""NVFP4: 64 weights in 36 bytes, 4.5 bits each: E2M1 floats in four groups of 16, each under an E4M3 scale.

    byte 0           4                                  36
         | d: 4 x u8 | qs: 4 x 8 bytes, low, then high  |        w[j, i] = SCALES[d[j]] * VALUES[q[j, i]]

Bytes 8j..8j+7 of qs hold weights 0..7 of group j in their low nibbles and 8..15 in their high ones. SCALES
are half of E4M3's numbers, since VALUES are twice E2M1's (see `mxfp4`); a scale has no sign. NVIDIA's format
has one float32 more for the whole tensor, which is no part of these blocks. Source: ggml `block_nvfp4`,
`ggml_ue4m3_to_fp32`.
"""

from __future__ import annotations

import numpy as np

from refimpl.formats import e4m3
from refimpl.formats._blocks import blocks, flat, nibbles
from refimpl.formats.mxfp4 import VALUES

NAME, GGML_TYPE, WEIGHTS = "NVFP4", 40, 64
BLOCK = np.dtype([("d", "u1", 4), ("qs", "u1", 32)])
assert BLOCK.itemsize == 36
PARTS = ("d", "q")
FORMULA = "SCALES[d[j]] * VALUES[q[j, i]]"
"""A weight, from the numbers of `unpack`: [j] is a group, [i] a weight of the block or group."""


def _scales() -> np.ndarray:
    """f32 [256]: half of E4M3 without its sign. ggml reads the NaN 0x7f as zero and 0xff, which no writer
    makes, as 480 / 2.
    """
    scales = np.abs(e4m3.TABLE) / np.float32(2)
    scales[0x7F], scales[0xFF] = 0, 240
    return scales


SCALES = _scales()
"""f32 [256]: the scale of every code."""


def unpack(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """d u8 [..., n, 4], E4M3 codes; q u8 [..., n, 4, 16] in 0..15."""
    b = blocks(data, BLOCK)
    return b["d"], nibbles(b["qs"].reshape(*b.shape, 4, 8)).reshape(*b.shape, 4, 16)


def dequantize(data: np.ndarray) -> np.ndarray:
    """u8 [..., n*36] -> f32 [..., n*64], exactly."""
    d, q = unpack(data)
    return flat(SCALES[d][..., None] * VALUES[q].astype(np.float32), 3)
