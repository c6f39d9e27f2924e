"""Is a quantizer that is fused behind other arithmetic right? Its results are those of `act_quant` of some
numbers within the bound of what stands before it: each code and each scale lies between those that the ends
of the bound give.
"""

from __future__ import annotations

import numpy as np

from refimpl.conformance.truth.bounds import Sum
from refimpl.conformance.truth.compare import Mismatch, form, number_of, within
from refimpl.formats import e4m3
from refimpl.reference import fp8


def check(got: tuple, h: Sum, kept: bool = False) -> Mismatch | None:
    """codes u8 [T, K] and scale f32 [T, ceil(K/128)] of numbers that are h [T, K], known within a bound;
    `kept`: these numbers come first.

    Dividing by 448 and by a scale, rounding, and encoding never decrease: what a number between the ends
    becomes lies between what the ends become.
    """
    if wrong := number_of(got, ("result", "codes", "scale")[not kept :]):
        return wrong
    *numbers, codes, scale = got
    groups = -(-h.true.shape[-1] // fp8.BLOCK)
    if wrong := form(codes, h.true.shape, np.dtype(np.uint8), "codes") or form(
        scale, (len(h.true), groups), np.dtype(np.float32), "scale"
    ):
        return wrong
    if wrong := next((bad for y in numbers if (bad := within(y, h.true, h.bound))), None):
        return wrong
    low, high = (h.true - h.bound).astype(np.float32), (h.true + h.bound).astype(np.float32)
    least = np.where((low <= 0) & (high >= 0), np.float32(0), np.minimum(np.abs(low), np.abs(high)))
    s_low, s_high = (fp8.act_quant(size)[1] for size in (least, np.maximum(np.abs(low), np.abs(high))))
    return _between(scale, s_low, s_high, "scale") or _codes(
        codes, np.repeat(scale, fp8.BLOCK, axis=-1)[:, : low.shape[-1]], low, high
    )


def _codes(codes: np.ndarray, scale: np.ndarray, low: np.ndarray, high: np.ndarray) -> Mismatch | None:
    """Under the scale that was returned. A zero has the sign of what was rounded to it, where that is
    known.
    """
    low, high = (np.where(scale == 0, np.float32(0), end) for end in (low, high))
    with np.errstate(divide="ignore", invalid="ignore"):
        first, last = (
            e4m3.decode(e4m3.encode(np.where(scale == 0, np.float32(0), end / scale))) for end in (low, high)
        )
    if wrong := _between(e4m3.decode(codes), first, last, "codes"):
        return wrong
    zeros = (codes == 0x80) & (low > 0) | (codes == 0) & (high < 0)
    return (
        Mismatch(
            f"{int(zeros.sum())} zeros have the wrong sign", tuple(int(i) for i in np.argwhere(zeros)[0])
        )
        if zeros.any()
        else None
    )


def _between(got: np.ndarray, low: np.ndarray, high: np.ndarray, name: str) -> Mismatch | None:
    """Both ends included: a part in 2^40 lets no other float32 in."""
    a, b = low.astype(np.float64), high.astype(np.float64)
    return within(got, (a + b) / 2, (b - a) / 2 + 2.0**-40 * np.abs(b), name)
