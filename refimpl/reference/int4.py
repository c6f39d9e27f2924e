"""The linear layer on weights of INT4 in groups of 32 (refimpl/formats/int4.py): activations stay as they
are, and weights are what they stand for (W4A16 in the libraries' words).
"""

from __future__ import annotations

import numpy as np

from refimpl.formats import bf16, int4
from refimpl.tensors import ScaledInt4


def weight_dequant(w: ScaledInt4) -> np.ndarray:
    """Each integer times its group's scale, exactly: codes u8 [N, K/2], scale u16 [N, K/32], bit patterns of
    BF16 -> f32 [N, K].

    compressed-tensors gives the same numbers rounded to bfloat16.
    """
    return int4.decode(w.codes).astype(np.float32) * np.repeat(scales(w), int4.GROUP, axis=-1)


def scales(w: ScaledInt4) -> np.ndarray:
    """The scale of every group, f32 [N, K/32]."""
    return bf16.dequantize(np.ascontiguousarray(w.scale).view(np.uint8)).reshape(w.scale.shape)


def linear(x: np.ndarray, w: ScaledInt4) -> np.ndarray:
    """x f32 [..., K] times the transpose of w [N, K] -> f32 [..., N]."""
    return x @ weight_dequant(w).T
