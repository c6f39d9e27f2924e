"""Operations that end in codes: what the next FP8 linear reads, quantized by the operation before it instead
of by one of its own.
"""

from __future__ import annotations

import numpy as np

from refimpl.reference.attention import rms_norm
from refimpl.reference.experts import silu
from refimpl.reference.fp8 import act_quant


def rms_norm_quant(
    x: np.ndarray, weight: np.ndarray, eps: float, keep: bool = True, ue8m0: bool = False
) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    """`rms_norm` of x, and `act_quant` of that: x f32 [..., D], weight f32 [D] -> f32 [..., D], codes u8
    [..., D], scale f32 [..., ceil(D/128)].

    keep=False: None instead of the numbers, where nobody reads them. `ue8m0` as in `act_quant`.
    """
    normed = rms_norm(x, weight, eps)
    return normed if keep else None, *act_quant(normed, ue8m0)


def swiglu_quant(gate_up: np.ndarray, ue8m0: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """silu(gate) * up, quantized by `act_quant`: f32 [..., 2 I], gate first -> codes u8 [..., I], scale f32
    [..., ceil(I/128)]. `ue8m0` as in `act_quant`.
    """
    gate, up = np.split(gate_up, 2, axis=-1)
    return act_quant(silu(gate) * up, ue8m0)
