"""Reference: index_rows of refimpl.reference.indexer.

The scores of all heads, f32 [T, J, S], are never held: a row's score is added up head by head, and of a
token's scores the best are marked as they lie.
"""

from __future__ import annotations

import numpy as np

from refimpl.kernels.attention_numba import _dot
from refimpl.kernels.jit import jit
from refimpl.reference.indexer import hadamard, rounded


@jit
def _scores(q, k, weights, out):
    """I[t, s] into out f32 [T, S] for the rows up to each token, -inf for others and in place of NaN:
    q [T, J, d], k [S, d], weights [T, J].
    """
    tokens, heads, _d = q.shape
    # The new tokens are the last of the S: token t sees rows 0 to first + t.
    #
    #     s    0 1 2 | 3 4 5        S = 6 rows, T = 3 new tokens
    #     t=0  x x x | x . .        . is -inf: later than the token
    #     t=1  x x x | x x .
    #     t=2  x x x | x x x
    first = len(k) - tokens
    for t in range(tokens):
        for s in range(len(k)):
            total = np.float32(0)
            if s > first + t:
                total = np.float32(-np.inf)
            else:
                for j in range(heads):
                    score = _dot(q[t, j], k[s])
                    # relu: a negative score of a head counts as none, one of NaN as NaN.
                    total += weights[t, j] * (np.float32(0) if score < 0 else score)
            out[t, s] = -np.inf if np.isnan(total) else total


def index_rows(
    q: np.ndarray,
    k: np.ndarray,
    weights: np.ndarray,
    topk: int,
    length: int | None = None,
    activations: str = "fp8",
) -> np.ndarray:
    """The `topk` rows with the largest scores, of those up to each token, the lower row first among equals:
    q f32 [T, J, d], k f32 [S, d], weights f32 [T, J] -> bool [T, S].
    """
    k = k[:length]
    if activations != "exact":
        q, k = (rounded(hadamard(x), activations == "ue8m0") for x in (q, k))
    scores = np.empty((len(q), len(k)), np.float32)
    _scores(*(np.ascontiguousarray(a, np.float32) for a in (q, k, weights)), scores)
    # Where a token sees fewer than topk rows, some of those chosen lie behind it: they go in the last line.
    rows = np.zeros(scores.shape, bool)
    np.put_along_axis(rows, _best(scores, topk), True, axis=-1)
    return rows & (np.arange(len(k)) <= np.arange(len(k) - len(q), len(k))[:, None])


def _best(scores: np.ndarray, topk: int) -> np.ndarray:
    """Indices int64 [T, topk], or fewer, of the topk largest of each row of scores f32 [T, S], best first."""
    return np.argsort(-scores, axis=-1, kind="stable")[:, :topk]
