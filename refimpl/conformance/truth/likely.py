"""Bounds for random numbers at real sizes, which hold with a stated probability.

The bounds of `bounds` hold for any numbers, and say little of thousands: they grow as n, while the error of
a sum of random terms grows as the root of n, because roundings go up as often as down. Where terms are random
and of either sign, and roundings behave as independent ones of mean zero, the error of a sum in any order is
within LAMBDA * sqrt(n) * u times the 2-norm of its terms, but for a probability of 2 exp(-LAMBDA^2 / 2) for
each element (Higham and Mary 2019 and 2020: probabilistic rounding error analysis, with random data).
"""

from __future__ import annotations

import numpy as np

from refimpl.conformance.manifest import Manifest
from refimpl.conformance.truth import bounds
from refimpl.conformance.truth.bounds import EXP, F32, TINY, Sum, gamma
from refimpl.conformance.truth.dyadic import Matrix, magnitudes, product
from refimpl.tensors import ScaledFP8

LAMBDA = 7.0
PROBABILITY = 2 * np.exp(-(LAMBDA**2) / 2)
"""Of one element outside its bound: 4.6e-11."""


def growth(n: float, unit: float = F32) -> float:
    """What n roundings do to a random sum, relatively to its 2-norm."""
    return LAMBDA * np.sqrt(n) * unit


def linear(m: Manifest, x: np.ndarray, w: Matrix, mode: str) -> Sum:
    """x f32 [T, K] of either sign times the transpose of a matrix [N, K] of few distinct rows."""
    how = bounds.layout(w.weight, mode, m)
    taken = bounds.inputs(m, x, w.weight, mode)
    squares = _squared(w)
    norm = np.sqrt(magnitudes(np.square(np.abs(taken.true) + taken.bound), squares))
    unsure = magnitudes(taken.bound, w) if np.any(taken.bound) else 0.0
    bound = growth(bounds.roundings(x.shape[-1]), m.unit) * norm + unsure
    if how == "q8_1":
        bound = bound + bounds.halved_sums(taken, w.weight)
    if m.accumulation == "tensor-core" and how in bounds.E4M3:
        bound = bound + tensor_core(taken, w)
    return Sum(product(taken.true, w), bound + TINY * 2**19 * x.shape[-1])


def _squared(w: Matrix) -> Matrix:
    weight = ScaledFP8(w.weight.codes, w.weight.scale**2) if isinstance(w.weight, ScaledFP8) else w.weight
    return Matrix(weight, w.rows**2, w.sizes**2, w.which)


def tensor_core(x: Sum, w: Matrix) -> np.ndarray:
    """f64 [T, N], for x [T, K] and a matrix of E4M3 [N, K]: what `bounds.tensor_core_error` says of each
    block, under the scales of the tiles.
    """
    assert isinstance(w.weight, ScaledFP8)
    tile, total = np.arange(len(w.which)) // 128, np.zeros((len(x.true), len(w.which)))
    for block in range(w.weight.scale.shape[1]):
        part = np.s_[:, 128 * block : 128 * block + 128]
        error = bounds.tensor_core_error(
            x.true[part], w.rows[part], np.broadcast_to(x.bound, x.true.shape)[part]
        )
        total += error[:, w.which] * w.weight.scale[tile, block]
    return total


def rms_norm(m: Manifest, x: np.ndarray, weight: np.ndarray, eps: float) -> Sum:
    """The likely error of `rms_norm` of x f32 [..., D], weight f32 [D]: the sum of squares has relative
    errors, halved by the root.
    """
    true = bounds.rms_norm(m, x, weight, eps).true
    return Sum(true, (growth(x.shape[-1] + 3, m.unit) / 2 + gamma(6)) * np.abs(true) + TINY)


def attention(
    m: Manifest,
    q_nope: np.ndarray,
    q_pe: np.ndarray,
    latent: np.ndarray,
    k_pe: np.ndarray,
    kv_b: np.ndarray,
    scale: float,
) -> Sum:
    """Latent attention of random numbers, at widths where keys and values of all heads are too many to make.

    Errors of scores are random sums too; those of the shares of a query meet random values, so that their sum
    is again as the 2-norm of what is summed.
    """
    qn, qr, c, kr, b = (a.astype(np.float64) for a in (q_nope, q_pe, latent, k_pe, kv_b))
    t, heads, n = qn.shape
    s, width = c.shape
    allowed = np.arange(s)[None, :] <= np.arange(s - t, s)[:, None]
    w_k, w_v = b[:, :n], b[:, n:]

    def scores(q: np.ndarray, w: np.ndarray, pe: np.ndarray, rows: np.ndarray, keys: np.ndarray):
        """[H, T, S], of all heads in one product: the latent rows are read once."""
        inner = np.matmul(q.transpose(1, 0, 2), w).reshape(heads * t, width)
        outer = pe.transpose(1, 0, 2).reshape(heads * t, -1)
        return (inner @ rows.T + outer @ keys.T).reshape(heads, t, s)

    z = np.where(allowed, scale * scores(qn, w_k, qr, c, kr), -np.inf)
    norm = abs(scale) * np.sqrt(scores(qn**2, w_k**2, qr**2, c**2, kr**2))
    top = z.max(axis=-1, keepdims=True)
    sums = growth(n + width + qr.shape[-1] + bounds.scalings(m), m.unit) * norm
    unsure = sums + F32 * np.where(allowed, top - z, 0)
    summed = growth(s + width + (EXP + 1) * (-(-s // 16) + 2), m.unit)
    relative = np.expm1(2 * np.where(allowed, unsure, 0).max(axis=-1)) + summed  # [H, T]
    p = np.exp(z - top)
    p = (p / p.sum(axis=-1, keepdims=True)).reshape(heads * t, s)
    true, squares = (
        np.matmul((share @ rows).reshape(heads, t, width), w.transpose(0, 2, 1)).transpose(1, 0, 2)
        for share, rows, w in ((p, c, w_v), (p**2, c**2, w_v**2))
    )
    return Sum(true, LAMBDA * relative.T[..., None] * np.sqrt(squares) + TINY * s)
