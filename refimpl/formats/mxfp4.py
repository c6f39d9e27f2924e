"""MXFP4: 32 weights in 17 bytes, 4.25 bits each: floats of four bits under a power of two.

    byte 0      1                                          17
         | e:u8 | qs: low nibbles q[0..15], high q[16..31] |        w[i] = 2 ** (e - 128) * VALUES[q[i]]

A quant is an E2M1 float, S EE M: sign, two bits of exponent, one of mantissa. VALUES holds their doubles,
which are whole numbers, and the scale is half of what the E8M0 code e says, 2^(e - 127). Source: ggml
`block_mxfp4`, `ggml_e8m0_to_fp32_half`; OCP Microscaling Formats (MX) v1.0, sections 5.3.3 and 6.3.
"""

from __future__ import annotations

import numpy as np

from refimpl.formats._blocks import blocks, flat, in_blocks, nibbles, pack_nibbles, to_bytes

NAME, GGML_TYPE, WEIGHTS = "MXFP4", 39, 32
BLOCK = np.dtype([("e", "u1"), ("qs", "u1", 16)])
assert BLOCK.itemsize == 17
PARTS = ("e", "q")
FORMULA = "2 ** (e - 128) * VALUES[q[i]]"
"""A weight, from the numbers of `unpack`: [j] is a group, [i] a weight of the block or group."""
VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
"""i8 [16]: twice the number of every E2M1 code; code 8, minus zero, is ggml's zero."""
SCALES = np.ldexp(np.float32(1), np.arange(256) - 128)
"""f32 [256]: the scale of every code."""
_TIES = (VALUES[:7] + VALUES[1:8]).astype(np.float32) / np.float32(2)


def unpack(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """e u8 [..., n], q u8 [..., n, 32] in 0..15."""
    b = blocks(data, BLOCK)
    return b["e"], flat(nibbles(b["qs"]), 2)


def dequantize(data: np.ndarray) -> np.ndarray:
    """u8 [..., n*17] -> f32 [..., n*32]. As in ggml e = 255 is a number, 2^127; the OCP calls it NaN."""
    e, q = unpack(data)
    with np.errstate(over="ignore"):  # 12 * 2^126 is infinite
        return flat(SCALES[e][..., None] * VALUES[q].astype(np.float32), 2)


def quantize(x: np.ndarray) -> np.ndarray:
    """f32 [..., n*32] -> u8 [..., n*17]: the exponent of the largest magnitude becomes that of E2M1's largest
    number, 6 = 1.5 * 2^2; each weight becomes the nearest number, of two the smaller, and what lies beyond 6
    becomes 6.

    So llama.cpp rounds; the OCP leaves the rounding open. ValueError for NaN and infinity.
    """
    x = in_blocks(x, WEIGHTS)
    size = np.abs(x)
    largest = size.max(axis=-1)
    if not np.isfinite(largest).all():
        raise ValueError("cannot quantize NaN or infinity")
    exponent = np.frexp(largest)[1] - 1  # floor(log2): 2^exponent <= largest < 2^(exponent + 1)
    e = np.where(largest > 0, np.maximum(exponent - 2 + 127, 0), 0)
    doubled = np.ldexp(size, 128 - e[..., None])
    q = np.searchsorted(_TIES, doubled)  # of a tie itself the number below
    q = np.where(np.signbit(x) & (q > 0), q + 8, q).astype(np.uint8)
    b = np.zeros(e.shape, BLOCK)
    b["e"], b["qs"] = e, pack_nibbles(q.reshape(*b.shape, 2, 16))
    return to_bytes(b)
