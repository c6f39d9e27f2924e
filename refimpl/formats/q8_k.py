"""Q8_K: 256 activations in 292 bytes; never stored in a file, the partner of the K-quants in an integer
product.

    byte 0      4                        260                          292
         | d:f32 | qs: 256 signed bytes   | bsums: 16 x i16, sums of 16 |        x[i] = d * q[i]

The scale is float32 and may be negative: the largest magnitude maps to -127, whatever its sign. Source: ggml
`block_q8_K`.
"""

from __future__ import annotations

import numpy as np

from refimpl.formats._blocks import blocks, flat, in_blocks, to_bytes

NAME, GGML_TYPE, WEIGHTS = "Q8_K", 15, 256
BLOCK = np.dtype([("d", "<f4"), ("qs", "i1", 256), ("bsums", "<i2", 16)])
assert BLOCK.itemsize == 292
PARTS = ("d", "q", "bsums")
FORMULA = "d * q[i]"
"""A weight, from the numbers of `unpack`: [j] is a group, [i] a weight of the block or group."""


def unpack(data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """d f32 [..., n], q i8 [..., n, 256], bsums i16 [..., n, 16]."""
    b = blocks(data, BLOCK)
    return b["d"], b["qs"], b["bsums"]


def dequantize(data: np.ndarray) -> np.ndarray:
    """u8 [..., n*292] -> f32 [..., n*256]."""
    d, q, _ = unpack(data)
    return flat(d[..., None] * q.astype(np.float32), 2)


def quantize(x: np.ndarray) -> np.ndarray:
    """f32 [..., n*256] -> u8 [..., n*292]: q = rint(-127/max * x), ties to even, at most 127; max is the
    signed value of largest magnitude.
    """
    x = in_blocks(x, WEIGHTS)
    at = np.abs(x).argmax(axis=-1)[..., None]
    largest = np.take_along_axis(x, at, axis=-1)
    with np.errstate(divide="ignore"):
        inverse = np.where(largest == 0, np.float32(0), np.float32(-127) / largest)
        # Infinite where a number is, so that it shows.
        d = np.where(largest == 0, np.float32(0), np.float32(1) / inverse)
    b = np.zeros(x.shape[:-1], BLOCK)
    b["d"], b["qs"] = d[..., 0], np.minimum(np.rint(inverse * x), 127)
    b["bsums"] = b["qs"].reshape(*b.shape, 16, 16).sum(axis=-1, dtype=np.int16)
    return to_bytes(b)
