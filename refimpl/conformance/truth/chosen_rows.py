"""Is an indexer's choice of rows defensible? Scores are known within a bound; what the bound leaves open may
fall either way, and nothing else may.
"""

from __future__ import annotations

import numpy as np

from refimpl.conformance.manifest import Manifest
from refimpl.conformance.truth.bounds import F32, gamma
from refimpl.conformance.truth.compare import Mismatch, form, number_of
from refimpl.reference.indexer import hadamard, rounded


def scores(
    m: Manifest, q: np.ndarray, k: np.ndarray, weights: np.ndarray, activations: str
) -> tuple[np.ndarray, np.ndarray]:
    """Equation 1 in float64 [T, S], and how far a kernel's may be off. Codes are those of the reference."""
    if activations != "exact":
        q, k = (rounded(hadamard(x), activations == "ue8m0") for x in (q, k))
    wide = [a.astype(np.float64) for a in (q, k, weights)]
    products = np.maximum(np.einsum("tjd,sd->tjs", wide[0], wide[1], optimize=True), 0)
    size = np.einsum("tjd,sd->tjs", *map(np.abs, wide[:2]), optimize=True)
    true = np.einsum("tj,tjs->ts", wide[2], products)
    # A sum of d products, and one of J such sums times a weight each; codes times their scales round again.
    error = gamma(q.shape[-1] + q.shape[1] + 4, m.unit) * np.einsum("tj,tjs->ts", np.abs(wide[2]), size)
    return true, error + F32 * np.abs(true)


def check_rows(
    m: Manifest,
    got: tuple,
    q: np.ndarray,
    k: np.ndarray,
    weights: np.ndarray,
    topk: int,
    length: int | None = None,
    activations: str = "fp8",
) -> Mismatch | None:
    """What is wrong with the rows that an indexer chose: there must be as many as there are to choose, none
    behind the token, none certainly worse than one left out. A score of NaN counts as -inf. Where all numbers
    are small and whole, equal scores are equal, and then the lower row comes first.
    """
    if wrong := number_of(got, ("rows",)):
        return wrong
    (rows,) = got
    k = k[:length]
    if wrong := form(rows, (len(q), len(k)), np.dtype(bool), "rows"):
        return wrong
    whole = activations == "exact" and all(np.array_equal(a, np.rint(a)) for a in (q, k, weights))
    true, error = scores(m, q, k, weights, activations)
    error = error * (not whole)
    if m.shows_nan:
        lost = np.isnan(true)
        true, error = np.where(lost, -np.inf, true), np.where(lost, 0, error)
    for t in range(len(q)):
        end = len(k) - len(q) + t + 1
        if rows[t, end:].any():
            return Mismatch(f"token {t} attends to a later one", (t,))
        chosen, left = np.flatnonzero(rows[t, :end]), np.flatnonzero(~rows[t, :end])
        if len(chosen) != min(topk, end):
            return Mismatch(f"token {t} has {len(chosen)} rows, not {min(topk, end)}", (t,))
        if not len(left):
            continue
        worst = chosen[np.argmin(true[t, chosen] + error[t, chosen])]
        best = left[np.argmax(true[t, left] - error[t, left])]
        if true[t, worst] + error[t, worst] < true[t, best] - error[t, best]:
            return Mismatch(f"token {t}: row {worst} is chosen instead of {best}, which is better", (t,))
        if whole and true[t, worst] == true[t, best]:
            tied = np.flatnonzero(true[t, :end] == true[t, worst])
            wanted = tied[: rows[t, tied].sum()]
            if not rows[t, wanted].all():
                return Mismatch(f"token {t}: of rows with one score not the first are chosen", (t,))
    return None
