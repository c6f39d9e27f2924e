"""How the K-quants choose scales: least squares over candidate steps, then integer scales tuned with what
rounding left of them.

For fixed integers q the best scale (and minimum) of a group is a linear regression; for a fixed scale the
best q is rounding. So a ladder of candidate steps is tried, each followed by the regression, and the best
kept. The scales of a block are then rounded to integers of a common half-precision unit, and each is tried
one step up and down. The idea is ggml's `make_qkx2_quants`; the error minimized here is the plain squared
one, and the last step is ours.

Every machine chooses the same: all is float32, and sums over a group are Python's `sum`, one number after
another. So the compiled codec, which searches sixteen groups side by side, has the same bits. Inside, the
axis of a group's numbers comes first: [L, ..., J].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

# Candidates for "how many levels the range of a group is given", around all of them.
STEPS = np.linspace(-0.9, 0.9, 13)
CHUNK = 1 << 17  # weights at a time: the temporaries stay in the cache

HALF_MAX = np.float32(65504)
ZERO = np.float32(0)


def scales_and_minima(x: np.ndarray, levels: int, scale_levels: int) -> tuple[np.ndarray, ...]:
    """x f32 [..., J groups, L] ~ (d*sc) * q - dmin*m. Returns d, dmin f16 [...]; sc, m u8 [..., J] up to
    scale_levels; q u8 [..., J, L] up to levels.

    ValueError when x holds NaN or infinity.
    """

    def block(x: np.ndarray) -> tuple[np.ndarray, ...]:
        scale, minimum = _fit_line(x, levels)
        d, dmin = _unit(scale.max(axis=-1), scale_levels), _unit(minimum.max(axis=-1), scale_levels)
        sc, m = _integers(scale, d, 0, scale_levels), _integers(minimum, dmin, 0, scale_levels)
        sc, m = _tune(x, d, dmin, sc, m, levels, scale_levels)
        q = _levels(x, _times(d, sc), _times(dmin, m), 0, levels)
        return d, dmin, sc.astype(np.uint8), m.astype(np.uint8), np.moveaxis(q, 0, -1).astype(np.uint8)

    return _in_chunks(block, x)


def signed_scales(x: np.ndarray, levels: int, scale_levels: int) -> tuple[np.ndarray, ...]:
    """x f32 [..., J groups, L] ~ (d*sc) * q. Returns d f16 [...]; sc i8 [..., J] in
    -scale_levels-1..scale_levels; q i8 in -levels..levels-1.

    ValueError when x holds NaN or infinity.
    """

    def block(x: np.ndarray) -> tuple[np.ndarray, ...]:
        scale = _fit_slope(x, levels)
        largest = np.take_along_axis(scale, np.abs(scale).argmax(axis=-1)[..., None], axis=-1)[..., 0]
        d = _unit(
            -largest, scale_levels + 1
        )  # the largest scale becomes the integer with one more step, the negative one
        sc = _integers(scale, d, -scale_levels - 1, scale_levels)
        chosen, error = sc, np.full(sc.shape, np.inf, np.float32)
        for step in (0, -1, 1):
            tried = np.clip(sc + step, -scale_levels - 1, scale_levels)
            error, best = _better(error, _error(x, _times(d, tried), ZERO, -levels, levels - 1))
            chosen = np.where(best, tried, chosen)
        q = _levels(x, _times(d, chosen), ZERO, -levels, levels - 1)
        return d, chosen.astype(np.int8), np.moveaxis(q, 0, -1).astype(np.int8)

    return _in_chunks(block, x)


def _in_chunks(
    block: Callable[[np.ndarray], tuple[np.ndarray, ...]], x: np.ndarray
) -> tuple[np.ndarray, ...]:
    """What `block` makes of x f32 [..., J, L], some of it at a time as f32 [L, n, J], put together again.
    ValueError when x holds NaN or infinity.
    """
    if not np.isfinite(x).all():
        raise ValueError("cannot quantize NaN or infinity")
    lead, group = x.shape[:-2], x.shape[-2:]
    flat = x.reshape(math.prod(lead), *group)
    size = max(1, CHUNK // (group[0] * group[1]))
    starts = range(0, max(1, len(flat)), size)  # one piece at least, for the shapes
    parts = [block(np.ascontiguousarray(np.moveaxis(flat[i : i + size], -1, 0))) for i in starts]
    return tuple(j.reshape(*lead, *j.shape[1:]) for j in map(np.concatenate, zip(*parts)))


def _fit_line(x: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Best scale >= 0 and minimum >= 0 of each group of x f32 [L, ..., J] for x ~ scale*q - minimum, q in
    0..levels: f32 [..., J] twice.
    """
    low, high = np.minimum(x.min(axis=0), 0), x.max(axis=0)
    n, sum_x = np.float32(len(x)), sum(x)
    error = np.full(low.shape, np.inf, np.float32)
    scale, minimum = np.zeros_like(low), np.zeros_like(low)
    for step in STEPS:
        q = np.clip(np.rint((x - low) * _divide(np.float32(levels + step), high - low)), 0, levels)
        sum_q, sum_qq, sum_xq = sum(q), sum(q * q), sum(x * q)
        spread = n * sum_qq - sum_q * sum_q
        s, m = _divide(n * sum_xq - sum_x * sum_q, spread), _divide(sum_q * sum_xq - sum_qq * sum_x, spread)
        # Else the regression wants to start above zero, which the format cannot say: through the origin then.
        below = m > 0
        s, m = np.where(below, s, _divide(sum_xq, sum_qq)), np.where(below, m, ZERO)
        error, best = _better(error, _squares(q * s - m - x))
        scale, minimum = np.where(best, s, scale), np.where(best, m, minimum)
    return np.where(scale > 0, scale, ZERO), minimum


def _fit_slope(x: np.ndarray, levels: int) -> np.ndarray:
    """Best scale of either sign of each group of x f32 [L, ..., J] for x ~ scale*q, q in -levels..levels-1:
    f32 [..., J].
    """
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=0)[None], axis=0)[0]
    error = np.full(largest.shape, np.inf, np.float32)
    scale = np.zeros_like(error)
    for step in STEPS:
        q = np.clip(np.rint(x * _divide(-np.float32(levels + step), largest)), -levels, levels - 1)
        s = _divide(sum(x * q), sum(q * q))
        error, best = _better(error, _squares(q * s - x))
        scale = np.where(best, s, scale)
    return scale


def _tune(
    x: np.ndarray, d: np.ndarray, dmin: np.ndarray, sc: np.ndarray, m: np.ndarray, levels: int, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """Integer scales and minima f32 [..., J] of groups of x f32 [L, ..., J] under units d and dmin f16 [...]:
    each as it was, or a neighbour if that leaves less error; f32 [..., J] twice.
    """
    error = np.full(sc.shape, np.inf, np.float32)
    best_sc, best_m = sc, m
    for step in (0, -1, 1):
        for shift in (0, -1, 1):
            tried_sc, tried_m = np.clip(sc + step, 0, top), np.clip(m + shift, 0, top)
            error, best = _better(error, _error(x, _times(d, tried_sc), _times(dmin, tried_m), 0, levels))
            best_sc, best_m = np.where(best, tried_sc, best_sc), np.where(best, tried_m, best_m)
    return best_sc, best_m


def _unit(largest: np.ndarray, top: int) -> np.ndarray:
    """The common unit f16 [...] of integers up to `top`, of which the largest number f32 [...] becomes one; a
    zero has no sign.
    """
    return (np.clip(largest / np.float32(top), -HALF_MAX, HALF_MAX) + ZERO).astype(np.float16)


def _integers(value: np.ndarray, unit: np.ndarray, low: int, high: int) -> np.ndarray:
    """value f32 [..., J] in units f16 [...], rounded to whole numbers low..high: f32 [..., J]."""
    return np.clip(np.rint(_divide(value, unit.astype(np.float32)[..., None])), low, high)


def _times(unit: np.ndarray, integer: np.ndarray) -> np.ndarray:
    """unit f16 [...] times whole numbers [..., J]: f32 [..., J]."""
    return unit.astype(np.float32)[..., None] * integer.astype(np.float32)


def _levels(
    x: np.ndarray, scale: np.ndarray, minimum: np.ndarray | np.floating, low: int, high: int
) -> np.ndarray:
    """The levels low..high nearest to x f32 [L, ..., J] ~ scale * level - minimum: f32 [L, ..., J]."""
    return np.clip(np.rint((x + minimum) * _divide(np.float32(1), scale)), low, high)


def _error(
    x: np.ndarray, scale: np.ndarray, minimum: np.ndarray | np.floating, low: int, high: int
) -> np.ndarray:
    """The squared error f32 [..., J] of each group of x f32 [L, ..., J] at its nearest levels."""
    return _squares(_levels(x, scale, minimum, low, high) * scale - minimum - x)


def _squares(left: np.ndarray) -> np.ndarray:
    """Sums of squares over the first axis, one number after another: f32 [L, ...] -> f32 [...]."""
    return sum(left * left)


def _better(error: np.ndarray, tried: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lesser of two errors f32 [..., J], and where it is the one tried: bool [..., J]."""
    best = tried < error
    return np.where(best, tried, error), best


def _divide(a: np.ndarray | np.floating, b: np.ndarray) -> np.ndarray:
    """a / b, f32 [...] each, and 0 where b is 0 or so small that the quotient overflows."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        quotient = np.divide(a, b, dtype=np.float32)
    return np.where(np.isfinite(quotient), quotient, np.float32(0))
