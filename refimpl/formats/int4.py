"""INT4 in groups of 32, as the library compressed-tensors packs it (`pack-quantized`, symmetric): the routed
experts of Kimi-K2-Thinking. 4.5 bits a weight, in two tensors of a safetensors file instead of blocks:

    weight_packed  I32  [N, K/8]     eight weights a word, the first in the lowest four bits; stored is q + 8
    weight_scale   BF16 [N, K/32]    a scale for each group of 32 columns of a row
    weight_shape   I64  [2]          N and K

    w[n, k] = scale[n, k // 32] * q[n, k]                  q in -8..7

In memory a word's four bytes lie lowest first, so the words are bytes of two weights each, the even column in
the low nibble. Activations are not rounded: the checkpoint says so (`input_activations` null). Source:
compressed-tensors 0.20, `compressors/pack_quantized`.
"""

from __future__ import annotations

import numpy as np

GROUP = 32


def decode(codes: np.ndarray) -> np.ndarray:
    """Bytes of packed words u8 [..., K/2] -> q i8 [..., K] in -8..7."""
    both = np.stack([codes & 15, codes >> 4], axis=-1)
    return both.reshape(*codes.shape[:-1], 2 * codes.shape[-1]).astype(np.int8) - np.int8(8)


def encode(q: np.ndarray) -> np.ndarray:
    """q, integers [..., K] in -8..7 -> bytes of packed words u8 [..., K/2]. ValueError for an odd K."""
    if q.shape[-1] % 2:
        raise ValueError(f"expected an even number of columns, got shape {q.shape}")
    stored = (np.asarray(q, np.int16) + 8).astype(np.uint8)
    return stored[..., 0::2] | stored[..., 1::2] << 4
