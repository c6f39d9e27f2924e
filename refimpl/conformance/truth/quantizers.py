"""Is a quantizer that is fused behind other arithmetic right? Its results are those of `act_quant` of some
numbers within the bound of what stands before it: each code and each scale lies between those that the ends
of the bound give.
"""

from __future__ import annotations

import numpy as np

from refimpl.conformance.truth.bounds import TINY, Sum, gamma
from refimpl.conformance.truth.compare import Mismatch, form, number_of, within
from refimpl.formats import e4m3
from refimpl.reference import fp8


def check_codes(got: tuple, h: Sum, kept: bool = False) -> Mismatch | None:
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


def nearest(got: tuple, x: np.ndarray, rows: int, least: float) -> Mismatch | None:
    """codes u8 [T, K] and scales f32 [ceil(T/rows), ceil(K/128)] of x f32 [T, K], groups of `rows` by 128
    numbers, by any arithmetic that is four roundings long: the scale divided by or its reciprocal multiplied
    with. The largest magnitude of a group counts as `least` or more; a group of zeros may have any scale.
    """
    if wrong := number_of(got, ("codes", "scale")):
        return wrong
    (codes, scale), (high, wide), pad = got, x.shape, fp8.BLOCK
    shape = (-(-high // rows), -(-wide // pad))
    if wrong := form(codes, x.shape, np.dtype(np.uint8), "codes") or form(
        scale, shape, np.dtype(np.float32), "scale"
    ):
        return wrong
    if not x.size:
        return None
    size = np.pad(np.abs(x.astype(np.float64)), ((0, -high % rows), (0, -wide % pad)))
    largest = size.reshape(shape[0], rows, shape[1], pad).max(axis=(1, 3))
    true = np.maximum(largest, least) / 448
    free = (true == 0) & np.isfinite(scale)
    if wrong := within(np.where(free, np.float32(0), scale), true, gamma(4) * true + TINY, "scale"):
        return wrong
    spread = np.repeat(np.repeat(scale, rows, axis=0)[:high], pad, axis=1)[:, :wide]
    low, above = (x * np.float32(1 + sign * 2.0**-21) for sign in (-1, 1))
    return _codes(codes, spread, np.minimum(low, above), np.maximum(low, above))


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
