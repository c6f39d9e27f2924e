"""Block-scaled FP8 as DeepSeek-V3 trains and stores it: E4M3 codes with one float32 scale per 128x128 weights
and per 1x128 activations.

    w ~ value(code) * weight_scale_inv[row // 128, column // 128]
    x ~ value(code) * scale[token, column // 128]

`weight_scale_inv` is the multiplier, in spite of its name. Source: DeepSeek-V3 (arXiv 2412.19437) section
3.3.2 and figure 7.
"""

from __future__ import annotations

import numpy as np

from refimpl.formats import e4m3
from refimpl.tensors import ScaledFP8

BLOCK = 128


def act_quant(x: np.ndarray, ue8m0: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Quantize each group of 128 along the last axis: f32 [..., K] -> codes u8 [..., K], scale f32 [...,
    ceil(K/128)].

    scale = amax / 448 and code = encode(x / scale), both IEEE float32 divisions rounded to nearest. A group
    of zeros (or one so small that amax / 448 underflows) gets scale 0 and codes 0, so it decodes to zeros.
    NaN or infinity in a group makes the scale NaN or infinite and so shows in the result; the code of a
    quotient that is NaN is 0x7f. A last group shorter than 128 is a group like any other.

    `ue8m0`: the scale is the smallest power of two from 2^-126 up that is not below amax / 448, as
    DeepSeek-V3.1 is trained with. It has no zero.
    """
    x = np.asarray(x, np.float32)
    starts = np.arange(0, x.shape[-1], BLOCK)
    if not len(starts):
        return np.zeros(x.shape, np.uint8), np.zeros((*x.shape[:-1], 0), np.float32)
    scale = np.maximum.reduceat(np.abs(x), starts, axis=-1) / e4m3.MAX
    if ue8m0:
        scale = _power_of_two(scale)
    return _encode(x, np.repeat(scale, BLOCK, axis=-1)[..., : x.shape[-1]]), scale


def act_quant_ue8m0(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`act_quant` with scales that are powers of two, a row of `ops.OPS` by itself: f32 [..., K] -> codes u8
    [..., K], scale f32 [..., ceil(K/128)].
    """
    return act_quant(x, ue8m0=True)


def weight_quant(w: np.ndarray) -> ScaledFP8:
    """Quantize a matrix in tiles of 128x128, ragged at the edges: f32 [N, K] -> codes u8 [N, K], scale f32
    [ceil(N/128), ceil(K/128)].

    Each tile has scale = amax / 448 and code = encode(w / scale); zeros, NaN and infinity are treated as
    `act_quant` says.
    """
    w = np.asarray(w, np.float32)
    n, k = w.shape
    rows = np.maximum.reduceat(np.abs(w), np.arange(0, n, BLOCK), axis=0)
    scale = np.maximum.reduceat(rows, np.arange(0, k, BLOCK), axis=1) / e4m3.MAX
    return ScaledFP8(_encode(w, _spread(scale, n, k)), scale)


def weight_dequant(w: ScaledFP8) -> np.ndarray:
    """Each code's value times its tile's scale, with one rounding: codes u8 [N, K], scale f32 [ceil(N/128),
    ceil(K/128)] -> f32 [N, K].
    """
    return e4m3.decode(w.codes) * _spread(w.scale, *w.codes.shape)


def linear(x: np.ndarray | ScaledFP8, w: ScaledFP8, activations: str = "fp8") -> np.ndarray:
    """x f32 [..., K], or codes u8 [M, K] that `act_quant` made of it with their scales f32 [M, ceil(K/128)],
    times the transpose of w [N, K] -> f32 [..., N].

    "fp8" (W8A8): x goes through `act_quant`; products of code values are summed over 128 columns in float32,
    times both scales, then summed over the blocks in float32. "ue8m0": the same, with scales of x
    that are powers of two (DeepSeek-V3.1). "exact": x of float32 stays so and meets the
    dequantized weights.
    """
    if activations == "exact" and isinstance(x, np.ndarray):
        return x @ weight_dequant(w).T
    codes, scale = (
        x if isinstance(x, ScaledFP8) else act_quant(x.reshape(-1, x.shape[-1]), ue8m0=activations == "ue8m0")
    )
    a, b = e4m3.decode(codes), e4m3.decode(w.codes)  # [M, K], [N, K]
    y = np.zeros((len(a), len(b)), np.float32)
    rows = np.arange(len(b)) // BLOCK
    for block, start in enumerate(range(0, a.shape[1], BLOCK)):
        part = a[:, start : start + BLOCK] @ b[:, start : start + BLOCK].T
        y += part * scale[:, block, None] * w.scale[rows, block]
    return y.reshape(*x.shape[:-1], len(b))


def _encode(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Codes u8 of x / scale, f32 of one shape; 0 where the scale is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient = x / scale
    quotient = np.where(
        np.isnan(quotient), np.float32(np.nan), quotient
    )  # processors give that of two infinities different signs
    return np.where(scale == 0, np.uint8(0), e4m3.encode(quotient))


def _power_of_two(scale: np.ndarray) -> np.ndarray:
    """Scales f32 of any shape rounded up to powers of two, by the bits: one exponent more where there is a
    mantissa.
    """
    bits = scale.view(np.uint32)
    exponent = np.maximum((bits >> 23) + ((bits & 0x7FFFFF) != 0), 1).astype(np.uint32)
    return np.where(exponent < 255, (exponent << 23).view(np.float32), scale)


def _spread(scale: np.ndarray, n: int, k: int) -> np.ndarray:
    """Scales of tiles, f32 [ceil(n/128), ceil(k/128)] -> that of each weight, f32 [n, k]."""
    return np.repeat(np.repeat(scale, BLOCK, axis=0)[:n], BLOCK, axis=1)[:, :k]
