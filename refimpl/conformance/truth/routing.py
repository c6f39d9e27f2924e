"""Is a choice of experts defensible? Scores are known within a bound; what the bound leaves open may fall
either way, and nothing else may.
"""

from __future__ import annotations

import numpy as np

from refimpl.config import DeepSeekConfig
from refimpl.conformance.manifest import Manifest
from refimpl.conformance.truth.bounds import EXP, F32, gamma
from refimpl.conformance.truth.compare import Mismatch, form, number_of, within
from refimpl.conformance.truth.likely import growth

SMALLEST = 2.0**-126  # normal f32: what is smaller may be lost


class Scores:
    """Affinities f64 [T, E], the biased ones that choose, and how far a kernel's may be off."""

    def __init__(
        self,
        x: np.ndarray,
        weight: np.ndarray,
        bias: np.ndarray,
        c: DeepSeekConfig,
        m: Manifest,
        exact: bool,
        likely: bool = False,
    ):
        wide = [a.astype(np.float64) for a in (x, weight, bias)]
        logits = wide[0] @ wide[1].T
        if likely:
            error = growth(x.shape[-1] + 1, m.unit) * np.sqrt(wide[0] ** 2 @ (wide[1] ** 2).T)
        else:
            error = gamma(x.shape[-1] + 1, m.unit) * (np.abs(wide[0]) @ np.abs(wide[1]).T)
        error *= not exact
        make = _softmax if c.scoring_func == "softmax" else _sigmoid
        self.affinity, self.relative = make(logits, error)
        self.biased = self.affinity + wide[2]
        self.error = self.affinity * self.relative + SMALLEST + F32 * np.abs(self.biased)


def _sigmoid(logits: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sigmoid of logits f64 [T, E] that may be off by `error`, and its own relative error."""
    y = 1 / (1 + np.exp(-logits))
    # sigmoid(l + e) / sigmoid(l) - 1 is at most (1 - sigmoid(l)) (e^e - 1); exponential, sum and quotient
    # round, and perhaps a product.
    return y, (1 - y) * np.expm1(error) + gamma(EXP + 3)


def _softmax(logits: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Softmax of logits f64 [T, E], which may be off by `error`, over all experts, and how far it may be off
    itself, relatively. The largest logit is taken from all of them, which rounds; then a power of e and the
    sum of all are each off as their exponents are.
    """
    gap = logits.max(axis=-1, keepdims=True) - logits
    e = np.exp(-gap)
    y = e / e.sum(axis=-1, keepdims=True)
    off = error + error.max(axis=-1, keepdims=True) + F32 * gap  # of an exponent, the largest one's error too
    whole = np.expm1(off)
    whole = whole + (y * whole).sum(axis=-1, keepdims=True)
    return y, whole * (1 + whole) + gamma(2 * EXP + logits.shape[-1] + 3)


def check_route(
    m: Manifest,
    got: tuple,
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    c: DeepSeekConfig,
    likely: bool = False,
) -> Mismatch | None:
    """Ids distinct, from groups that can be among the best, none certainly worse than one left out or one
    behind; weights those of these ids.

    Where x and weight are small integers logits are exact, and equal ones must give equal scores: then the
    lower index comes first.
    """
    if wrong := number_of(got, ("ids", "weights")):
        return wrong
    ids, weights = got
    shape = (len(x), c.num_experts_per_tok)
    if wrong := form(ids, shape, np.dtype(np.int64), "ids") or form(
        weights, shape, np.dtype(np.float32), "weights"
    ):
        return wrong
    if not len(x):
        return None
    if ids.min() < 0 or ids.max() >= len(weight):
        return Mismatch("an id is no expert's", got=str(ids.tolist()))
    exact = (
        all(np.array_equal(a, np.rint(a)) for a in (x, weight))
        and float((np.abs(x) @ np.abs(weight).T).max()) < 2**20
    )
    s = Scores(x, weight, bias, c, m, exact, likely)
    for t in range(len(x)):
        lowest = exact and m.ties == "lowest"
        if why := _token(ids[t], s.biased[t], s.error[t], c, lowest, m.order == "best first"):
            return Mismatch(
                f"token {t}: {why}", (t,), str(ids[t].tolist()), "the best of the best groups, in order"
            )
    return _weights(weights, ids, s, c)


def _worse(a: int, b: int, score: np.ndarray, error: np.ndarray, exact: bool) -> bool:
    """a is certainly ranked behind b."""
    return score[a] + error[a] < score[b] - error[b] or (exact and score[a] == score[b] and a > b)


def _token(
    ids: np.ndarray, score: np.ndarray, error: np.ndarray, c: DeepSeekConfig, exact: bool, ordered: bool
) -> str | None:
    if len(set(ids.tolist())) < len(ids):
        return "an expert is chosen twice"
    certain, possible = _groups(score, error, c, exact)
    width = len(score) // c.n_group
    if any(i // width not in possible for i in ids):
        return "an expert of a group that is not among the best is chosen"
    for a, b in zip(ids[1:], ids) if ordered else ():
        if _worse(b, a, score, error, exact):
            return f"expert {b} stands before {a}, which is better"
    for left in set(range(len(score))) - set(ids.tolist()):
        worse = [i for i in (ids[-1:] if ordered else ids) if _worse(i, left, score, error, exact)]
        if left // width in certain and worse:
            return f"expert {worse[0]} is chosen instead of {left}, which is better"
    return None


def _groups(
    score: np.ndarray, error: np.ndarray, c: DeepSeekConfig, exact: bool
) -> tuple[set[int], set[int]]:
    """Groups that are certainly among the kept ones, and those that may be."""
    count = 1 if c.topk_method == "group_limited_greedy" else 2
    best = np.sort(score.reshape(c.n_group, -1), axis=-1)[:, -count:]
    pairs = best.sum(axis=-1)
    slack = 2 * error.reshape(c.n_group, -1).max(axis=-1) + F32 * np.abs(pairs)

    def worse(g: int, h: int) -> bool:
        return g != h and _worse(g, h, pairs, slack, exact and np.array_equal(best[g], best[h]))

    certain, possible = set(), set()
    for g in range(c.n_group):
        ahead, behind = (
            sum(worse(*pair) for pair in order)
            for order in zip(*(((g, h), (h, g)) for h in range(c.n_group)))
        )
        possible |= {g} if ahead < c.topk_group else set()
        certain |= {g} if c.n_group - 1 - behind < c.topk_group else set()
    return certain, possible


def _weights(weights: np.ndarray, ids: np.ndarray, s: Scores, c: DeepSeekConfig) -> Mismatch | None:
    """The unbiased affinities of the chosen, normalized, times the factor."""
    lost = SMALLEST * c.routed_scaling_factor
    chosen, relative = (np.take_along_axis(a, ids, axis=-1) for a in (s.affinity, s.relative))
    if c.norm_topk_prob:  # the sum of A positive numbers, each with its own error, and a quotient
        relative = relative + relative.max(axis=-1, keepdims=True) + gamma(ids.shape[1] + 2)
        whole = chosen.sum(axis=-1, keepdims=True) + 1e-20
        chosen, lost = chosen / whole, lost / whole
    true = chosen * c.routed_scaling_factor
    return within(weights, true, true * (relative * (1 + relative) + gamma(2)) + lost, "weights")
