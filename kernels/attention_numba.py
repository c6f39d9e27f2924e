"""Reference: mla_absorbed and route of refimpl.reference.attention.

For one token each is ten calls of numpy, which for so few numbers take longer than the arithmetic; a compiled
loop has none. Letters in shapes are those of the reference: T new tokens, S tokens attended to, D hidden, H
heads, L kv_lora_rank, n, r and v the dimensions of a head, E experts, A activated.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from refimpl.config import DeepSeekConfig
from refimpl.entered import entered
from refimpl.kernels import expanded_numba
from refimpl.kernels.jit import floats, jit
from refimpl.kernels.latent_numba import attend
from refimpl.kernels.linear_numba import linear
from refimpl.tensors import ScaledFP8


@jit(reassociate=True)
def _dot(a, b):
    """The sum of a * b, f32 [K] each, added in a fixed order."""
    total = np.float32(0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@jit
def _row(a, s):
    """Row s of a f32 [S, K] -> f32 [K], which the compiler knows to be contiguous though a may not be: the
    cache's rows hold latent and key side by side.
    """
    return numba.carray(floats(a.ctypes.data + s * a.strides[0]), (a.shape[1],))


@jit
def _one_head(q_nope, q_pe, latent, k_pe, w_k, w_v, scale, q_latent, p, mixed, out):
    """One query of one head, refimpl.reference.attention.mla_absorbed step by step: q_nope [n], q_pe [r],
    latent [S, L], k_pe [S, r], w_k [n, L], w_v [v, L] -> out [v], f32 all. q_latent [L], p [S] and mixed [L]
    are room for what is in between.
    """
    # The query, turned into the space of the latents: all heads then share the cached latents as keys.
    q_latent[:] = np.float32(0)
    # Rows outside, columns inside: w_k [n, L] is read as it lies, and the sum over i stays in its order.
    for i in range(len(q_nope)):
        for j in range(len(q_latent)):
            q_latent[j] += q_nope[i] * w_k[i, j]
    # Softmax of the scores. One query sees all tokens, so nothing is masked.
    largest = np.float32(-np.inf)
    for s in range(len(latent)):
        p[s] = (_dot(q_latent, _row(latent, s)) + _dot(q_pe, _row(k_pe, s))) * scale
        largest = max(largest, p[s])
    total = np.float32(0)
    for s in range(len(latent)):
        p[s] = np.exp(p[s] - largest)  # at most 1: nothing overflows
        total += p[s]
    # The latents mixed by their shares, and out of the space of latents again.
    mixed[:] = np.float32(0)
    for s in range(len(latent)):
        share = p[s] / total
        row = _row(latent, s)
        for j in range(len(mixed)):
            mixed[j] += share * row[j]
    for v in range(len(out)):
        out[v] = _dot(mixed, w_v[v])


@jit
def _one_query(q_nope, q_pe, latent, k_pe, kv_b, scale, out):
    """One query of all heads: q_nope [H, n], q_pe [H, r], latent [S, L], k_pe [S, r], kv_b [H, n+v, L] -> out
    [H, v], f32 all.
    """
    # Room for one head at a time, made once for all of them.
    q_latent = np.empty(latent.shape[1], np.float32)
    mixed = np.empty(latent.shape[1], np.float32)
    p = np.empty(len(latent), np.float32)
    n = q_nope.shape[1]  # kv_b's first n rows of a head make keys, the others values
    for h in range(len(q_nope)):
        _one_head(
            q_nope[h], q_pe[h], latent, k_pe, kv_b[h, :n], kv_b[h, n:], scale, q_latent, p, mixed, out[h]
        )


def mla_absorbed(
    q_nope: np.ndarray,
    q_pe: np.ndarray,
    latent: np.ndarray,
    k_pe: np.ndarray,
    kv_b: np.ndarray | ScaledFP8,
    scale: float,
    rows: np.ndarray | None = None,
    length: int | None = None,
) -> np.ndarray:
    """Latent attention without expanding the cache: q_nope f32 [T, H, n], q_pe [T, H, r] (turned), latent
    [S, L], k_pe [S, r] (turned), kv_b f32 [H, n+v, L], or its codes with scales, [H * (n+v), L] -> f32
    [T, H, v]. `rows` bool [T, S]: the only ones that are attended to. `length`: rows of latent and k_pe that
    are there.

    `latent_numba` does it, or for many tokens `expanded_numba`, unless there is so little to do that their
    regions would cost the most.
    """
    # Rows from `length` on are room of the cache, with nothing in it yet.
    latent = latent[:length]
    k_pe = k_pe[:length]
    if rows is not None and len(q_nope) == 1:  # one token reads none but its own rows
        chosen = np.flatnonzero(rows[0])
        latent, k_pe, rows = latent[chosen], k_pe[chosen], None
    tokens, heads, n = q_nope.shape
    seen, width = latent.shape
    if tokens > 1:
        v = math.prod(kv_b.shape) // (heads * width) - n
        many = expanded_numba.pays(tokens, heads, seen, n, q_pe.shape[2], v, width)
        return (expanded_numba.attend if many else attend)(q_nope, q_pe, latent, k_pe, kv_b, scale, rows)
    # 2**20 multiplications: a fraction of a millisecond for one thread.
    if not tokens or isinstance(kv_b, ScaledFP8) or heads * (n + seen) * width > 1 << 20:
        return attend(q_nope, q_pe, latent, k_pe, kv_b, scale, rows)
    entered("one query")
    out = np.empty((1, heads, kv_b.shape[1] - n), np.float32)
    # Rows may be far apart, numbers in a row may not: `_row`.
    latent, k_pe = (
        a if a.strides[1] == a.itemsize == 4 else np.ascontiguousarray(a, np.float32) for a in (latent, k_pe)
    )
    _one_query(
        np.ascontiguousarray(q_nope[0]),
        np.ascontiguousarray(q_pe[0]),
        latent,
        k_pe,
        kv_b,
        np.float32(scale),
        out[0],
    )
    return out


@jit
def _least(scores, chosen):
    """The first index of scores f32 [N] that is not among those chosen: of a number, or else of NaN."""
    for lost in (False, True):
        for i in range(len(scores)):
            fresh = np.isnan(scores[i]) == lost
            for c in chosen:
                fresh &= c != i
            if fresh:
                return i
    return 0


@jit
def _best(scores, k, chosen):
    """Indices of the k largest of scores f32 [N] into chosen int64 [k], largest first, the lower index first
    among equals, NaN last.
    """
    left = np.where(np.isnan(scores), np.float32(-np.inf), scores)
    for a in range(k):  # few of them, so that a sort would cost more
        best = 0
        for i in range(1, len(left)):
            if left[i] > left[best]:
                best = i
        if left[best] == -np.inf:  # what is left has no order by numbers
            best = _least(scores, chosen[:a])
        chosen[a] = best
        left[best] = -np.inf


@jit
def _sigmoids(x, y):
    """Sigmoid of x f32 [E] into y f32 [E], in the form that takes exp of negative numbers only."""
    for e in range(len(x)):
        small = np.exp(-abs(x[e]))
        if x[e] >= 0:
            y[e] = np.float32(1) / (np.float32(1) + small)
        else:
            y[e] = small / (np.float32(1) + small)


@jit
def _softmax(x, y):
    """Softmax of x f32 [E] into y f32 [E]. A NaN anywhere makes all of them NaN."""
    most = x[0]
    for e in range(len(x)):
        if x[e] > most or x[e] != x[e]:
            most = x[e]
    total = np.float32(0)
    for e in range(len(x)):
        y[e] = np.exp(x[e] - most)
        total += y[e]
    for e in range(len(x)):
        y[e] /= total


@jit
def _route(logits, bias, groups, kept, normalize, factor, softmax, pairs, ids, weights):
    """`route` from the products logits = x @ weight.T, f32 [T, E], on: ids int64 [T, A] and weights f32
    [T, A] are filled in. Experts of the `kept` best groups of `groups` can be chosen, which count as much as
    their two best experts, or without `pairs` their best.
    """
    experts = logits.shape[1]
    width = experts // groups
    affinity = np.empty(experts, np.float32)
    biased = np.empty(experts, np.float32)
    group_scores = np.empty(groups, np.float32)
    best_groups = np.empty(kept, np.int64)
    open_groups = np.empty(groups, np.bool_)
    for t in range(len(logits)):
        if softmax:
            _softmax(logits[t], affinity)
        else:
            _sigmoids(logits[t], affinity)
        # The bias steers the choice alone.
        for e in range(experts):
            biased[e] = affinity[e] + bias[e]
        for g in range(groups):
            first = np.float32(-np.inf)
            second = np.float32(-np.inf)
            lost = False
            for e in range(g * width, (g + 1) * width):
                lost |= np.isnan(biased[e])
                if biased[e] > first:
                    second = first
                    first = biased[e]
                elif biased[e] > second:
                    second = biased[e]
            # Added in the reference's order, the lesser first.
            group_scores[g] = second + first if pairs else first
            if lost:  # a group with a NaN is the last, and its expert too
                group_scores[g] = np.nan
        _best(group_scores, kept, best_groups)
        open_groups[:] = False
        for g in best_groups:
            open_groups[g] = True
        for e in range(experts):
            if not open_groups[e // width]:
                biased[e] = -np.inf
        _best(biased, ids.shape[1], ids[t])
        # Weights are the scores without the bias.
        total = np.float32(1e-20)  # for all of them to be zero
        for a in range(ids.shape[1]):
            weights[t, a] = affinity[ids[t, a]]
            total += weights[t, a]
        for a in range(ids.shape[1]):
            share = weights[t, a] / total if normalize else weights[t, a]
            weights[t, a] = share * factor


def route(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, config: DeepSeekConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Choose A experts for every token, best first: x f32 [T, D], weight f32 [E, D], bias f32 [E] -> ids
    int64 [T, A], weights f32 [T, A].
    """
    c = config
    ids = np.empty((len(x), c.num_experts_per_tok), np.int64)
    weights = np.empty(ids.shape, np.float32)
    factor = np.float32(c.routed_scaling_factor)
    pairs = c.topk_method != "group_limited_greedy" and len(weight) > c.n_group
    # A group counts as much as its two best experts (DeepSeek-V3), or as its best one (DeepSeek-V2's method,
    # or groups of one expert).
    how = (c.norm_topk_prob, factor, c.scoring_func == "softmax", pairs)
    _route(linear(x, weight), bias, c.n_group, c.topk_group, *how, ids, weights)
    return ids, weights
