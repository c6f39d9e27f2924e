"""The linear layer, by what its weight is."""

from __future__ import annotations

import numpy as np

from refimpl.reference import fp8, int4, interleaved, packed
from refimpl.tensors import Interleaved, Packed, ScaledFP8, ScaledInt4, Weight


def linear(x: np.ndarray | ScaledFP8, w: Weight, activations: str = "fp8") -> np.ndarray:
    """x f32 [..., K] times the transpose of w [N, K] -> f32 [..., N], by what w is: FP8 tiles (x may be
    quantized already, [M, K]), INT4 in groups, GGML blocks or plain float32.

    `activations` "fp8" rounds x to the format that goes with w's, "ue8m0" too, with scales of E4M3 that are
    powers of two, and "exact" leaves it in float32. TypeError for
    a quantized x and a weight that is not FP8.
    """
    if isinstance(w, ScaledFP8):
        return fp8.linear(x, w, activations)
    if isinstance(x, ScaledFP8):
        raise TypeError("activations of E4M3 multiply weights of E4M3 only")
    if isinstance(w, ScaledInt4):
        return int4.linear(x, w)
    if isinstance(w, Interleaved):
        w = interleaved.plain(w)
    if isinstance(w, Packed):
        return packed.linear(x, w, activations)
    return x @ w.T
