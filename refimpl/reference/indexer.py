"""The lightning indexer of DeepSeek-V3.2's sparse attention in plain numpy: which rows of the cache a token
attends to.

    I[t, s] = sum over heads j of w[t, j] relu(q[t, j] . k[s])        (1)
    u[t] = attention(h[t], {c[s] : I[t, s] is among the k largest of I[t, :]})        (2)

Source: DeepSeek-V3.2-Exp's report, section 2.1; in FP8 as in the code published with it. Letters: T new
tokens, S tokens so far, J heads of the indexer, d numbers of a head.
"""

from __future__ import annotations

import numpy as np

from refimpl.formats import e4m3
from refimpl.reference import fp8
from refimpl.reference.attention import causal_mask, rope, top


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis: f32 [..., d] -> f32 [..., d] (Ba
    et al. 2016). The indexer's keys are normed so, unlike all else in the model.
    """
    centred = x - np.mean(x, axis=-1, keepdims=True, dtype=np.float32)
    variance = np.mean(np.square(centred), axis=-1, keepdims=True, dtype=np.float32)
    return centred / np.sqrt(variance + np.float32(eps)) * weight + bias


def index_rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool) -> np.ndarray:
    """Turn the first r numbers of the last axis and leave the others: f32 [T, ..., d], tables f32 [T, r/2] ->
    f32 [T, ..., d].

    Pairs are (x0, x1), (x2, x3), ... where `interleaved` (GLM-5), as everywhere else in the model; and
    (x0, x[r/2]), (x1, x[r/2 + 1]), ... where not (DeepSeek-V3.2).
    """
    r = 2 * cos.shape[1]
    out = x.copy()
    if interleaved:
        out[..., :r] = rope(x[..., :r], cos, sin)
        return out
    pairs = np.stack((x[..., : r // 2], x[..., r // 2 : r]), axis=-1).reshape(*x.shape[:-1], r)
    turned = rope(pairs, cos, sin)
    out[..., : r // 2], out[..., r // 2 : r] = turned[..., 0::2], turned[..., 1::2]
    return out


def hadamard(x: np.ndarray) -> np.ndarray:
    """The last axis times the Walsh-Hadamard matrix over sqrt(d), d a power of two: f32 [..., d] -> f32
    [..., d].

    The matrix is orthogonal, so products of turned queries and keys are those of unturned ones; but a large
    number is spread over all d, and FP8, which has one scale for them all, loses less.
    """
    d = x.shape[-1]
    out, half = np.array(x, np.float32), 1
    while half < d:
        pairs = out.reshape(*x.shape[:-1], d // (2 * half), 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        out = np.stack((a + b, a - b), axis=-2).reshape(x.shape)
        half *= 2
    return out * np.float32(d**-0.5)


def index_scores(q: np.ndarray, k: np.ndarray, weights: np.ndarray, activations: str = "fp8") -> np.ndarray:
    """I[t, s] of equation 1: q f32 [T, J, d], k f32 [S, d], weights f32 [T, J] -> f32 [T, S].

    "fp8": queries and keys are turned by `hadamard` and rounded to E4M3 with a scale for 128 numbers, as the
    published code does ("ue8m0": with scales that are powers of two). "exact": float32 as they are.
    """
    if activations != "exact":
        q, k = (rounded(hadamard(x), activations == "ue8m0") for x in (q, k))
    scores = np.maximum(np.einsum("tjd,sd->tjs", q, k, optimize=True), np.float32(0))
    return np.einsum("tj,tjs->ts", weights, scores, optimize=True)


def index_rows(
    q: np.ndarray,
    k: np.ndarray,
    weights: np.ndarray,
    topk: int,
    length: int | None = None,
    activations: str = "fp8",
) -> np.ndarray:
    """The rows that each token attends to, equation 2: bool [T, S]. Of the rows up to itself a token chooses
    the `topk` with the largest scores, the lower row first among equals; all of them where they are fewer. A
    score of NaN counts as -inf.

    Arguments as `index_scores`; the T queries are the last T of the S tokens. `length`: rows of k that are
    there, where a cache gives all it has room for.
    """
    k = k[:length]
    causal = causal_mask(len(q), len(k))
    scores = index_scores(q, k, weights, activations) + causal
    ids = top(np.where(np.isnan(scores), -np.inf, scores), topk)  # [T, topk] or fewer
    rows = np.zeros(causal.shape, bool)
    np.put_along_axis(rows, ids, True, axis=-1)
    return rows & (causal == 0)


def rounded(x: np.ndarray, ue8m0: bool) -> np.ndarray:
    """x f32 [..., d] by way of E4M3 codes and their scales, which are powers of two with `ue8m0`."""
    codes, scale = fp8.act_quant(x, ue8m0)
    return e4m3.decode(codes) * np.repeat(scale, fp8.BLOCK, axis=-1)[..., : x.shape[-1]]
