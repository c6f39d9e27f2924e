"""Attention and routing of DeepSeek-V3 in plain numpy: RMSNorm, YaRN RoPE, multi-head latent attention, the
group-limited router.

Sources: DeepSeek-V2 (arXiv 2405.04434) section 2.1 for MLA, DeepSeek-V3 (arXiv 2412.19437) section 2.1.2 for
the router, YaRN (arXiv 2309.00071) section 3 for the frequencies. Letters in shape comments:

    T new tokens   S tokens attended to   D hidden   H heads   L kv_lora_rank   n qk_nope_head_dim   r
    qk_rope_head_dim   v v_head_dim
    E routed experts   G groups   A experts a token activates
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from refimpl.config import DeepSeekConfig, YarnScaling


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis: x f32 [..., D], weight f32 [D] -> f32 [..., D]
    (Zhang and Sennrich 2019).
    """
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True, dtype=np.float32)
    return x / np.sqrt(mean_square + np.float32(eps)) * weight


def softmax(scores: np.ndarray) -> np.ndarray:
    """exp(x) / sum(exp(x)) over the last axis, f32 [..., S] -> f32 [..., S]. Rows may hold -inf (masked) but
    not only -inf.
    """
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


# --- positions ----------------------------------------------------------------------------------------------


@cache
def rope_frequencies(dim: int, theta: float, yarn: YarnScaling | None) -> np.ndarray:
    """Radians per position of each of the dim/2 pairs: f32 [dim/2], computed once and not to be written to.

    Plain RoPE turns pair i by theta^(-2i/dim). YaRN keeps the fast pairs (more than beta_fast turns within
    the original context), slows the slow ones (fewer than beta_slow turns) by `factor`, and ramps linearly in
    between.
    """
    plain = 1.0 / theta ** (np.arange(0, dim, 2) / dim)
    if yarn is None:
        return plain.astype(np.float32)

    def pair_with(
        turns: float,
    ) -> float:  # the (fractional) pair that turns so often within the original context
        return (
            dim
            * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi))
            / (2 * math.log(theta))
        )

    low = max(math.floor(pair_with(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with(yarn.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    return (plain / yarn.factor * ramp + plain * (1 - ramp)).astype(np.float32)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature: 0.1 * mscale * ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 and mscale else 1.0


def softmax_scale(config: DeepSeekConfig) -> float:
    """1/sqrt(qk_head_dim), times YaRN's temperature squared (once for q, once for k). 0.1352338 for
    DeepSeek-V3.
    """
    scale = config.qk_head_dim**-0.5
    yarn = config.rope_scaling
    return scale * yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2 if yarn else scale


def rope_size(yarn: YarnScaling) -> float:
    """What YaRN multiplies cosines and sines by: the temperature of mscale over that of mscale_all_dim, as in
    DeepSeek's own code (1 in DeepSeek-V3), or `attention_factor` where a config gives one.
    """
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    return yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)


def rope_tables(config: DeepSeekConfig, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of every position and pair: positions int [T] -> two f32 [T, r/2]. YaRN scales them by
    `rope_size`.
    """
    yarn = config.rope_scaling
    angles = positions[:, None].astype(np.float32) * rope_frequencies(
        config.qk_rope_head_dim, config.rope_theta, yarn
    )  # [T, r/2]
    size = rope_size(yarn) if yarn else 1.0
    return np.cos(angles) * np.float32(size), np.sin(angles) * np.float32(size)


def rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Turn the interleaved pairs (x0, x1), (x2, x3), ... of the last axis: f32 [T, ..., r], tables f32
    [T, r/2] -> f32 [T, ..., r].

    Pairs lie interleaved in DeepSeek's checkpoints. Implementations that first sort them into halves permute
    q and k alike, which leaves every score as it is; here nothing is permuted.
    """
    between = (1,) * (x.ndim - 2)
    cos, sin = (t.reshape(len(t), *between, t.shape[-1]) for t in (cos, sin))
    even, odd = x[..., 0::2], x[..., 1::2]
    out = np.empty_like(x)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = odd * cos + even * sin
    return out


# --- multi-head latent attention ----------------------------------------------------------------------------


def causal_mask(new: int, total: int) -> np.ndarray:
    """Additive mask f32 [new, total] for the last `new` of `total` tokens: 0 where a token may look, -inf at
    later tokens.
    """
    allowed = np.arange(total)[None, :] <= np.arange(total - new, total)[:, None]
    return np.where(allowed, np.float32(0), np.float32(-np.inf))


def rows_mask(rows: np.ndarray | None, new: int, total: int) -> np.ndarray:
    """The causal mask, or one of the rows that an indexer chose, bool [new, total]: additive, f32
    [new, total].
    """
    return causal_mask(new, total) if rows is None else np.where(rows, np.float32(0), np.float32(-np.inf))


def mla_naive(
    q_nope: np.ndarray,
    q_pe: np.ndarray,
    latent: np.ndarray,
    k_pe: np.ndarray,
    kv_b: np.ndarray,
    scale: float,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """Latent attention as the paper defines it: expand every latent into per-head keys and values, then
    attend.

    f32 all: q_nope [T, H, n], q_pe [T, H, r] (turned), latent [S, L], k_pe [S, r] (turned, shared by all
    heads), kv_b [H, n+v, L] -> [T, H, v]. The T queries are the last T of the S tokens. DeepSeek-V2 section
    2.1.2, equations 9 to 19. `rows` bool [T, S]: the only rows that a token attends to, of those up to its
    own (sparse attention, `reference/indexer.py`).
    """
    n = q_nope.shape[-1]
    keys_values = np.einsum("sl,hdl->shd", latent, kv_b, optimize=True)  # [S, H, n+v]
    keys, values = keys_values[..., :n], keys_values[..., n:]
    scores = np.einsum("thn,shn->hts", q_nope, keys, optimize=True)  # [H, T, S]
    scores += np.einsum("thr,sr->hts", q_pe, k_pe, optimize=True)
    p = softmax(scores * np.float32(scale) + rows_mask(rows, len(q_nope), len(latent)))
    return np.einsum("hts,shv->thv", p, values, optimize=True)


def mla_absorbed(
    q_nope: np.ndarray,
    q_pe: np.ndarray,
    latent: np.ndarray,
    k_pe: np.ndarray,
    kv_b: np.ndarray,
    scale: float,
    rows: np.ndarray | None = None,
    length: int | None = None,
) -> np.ndarray:
    """Latent attention, the numbers of `mla_naive`, without expanding the cache: kv_b's key half is
    multiplied into the query, its value half into the result.

    f32 all: q_nope [T, H, n], q_pe [T, H, r] (turned), latent [S, L], k_pe [S, r] (turned), kv_b [H, n+v, L]
    -> [T, H, v]. The T queries are the last T of the S tokens. `rows` as there. `length`: rows of latent and
    k_pe that are there, where a cache gives all it has room for.

    q . (W_k c) = (W_k^T q) . c, so all heads share the one cached latent as key and as value.
    """
    latent, k_pe = latent[:length], k_pe[:length]
    n = q_nope.shape[-1]
    w_k, w_v = kv_b[:, :n], kv_b[:, n:]  # [H, n, L], [H, v, L]
    q_latent = np.matmul(q_nope.transpose(1, 0, 2), w_k)  # [H, T, L]
    scores = q_latent @ latent.T + q_pe.transpose(1, 0, 2) @ k_pe.T  # [H, T, S]
    p = softmax(scores * np.float32(scale) + rows_mask(rows, len(q_nope), len(latent)))
    return np.matmul(p @ latent, w_v.transpose(0, 2, 1)).transpose(1, 0, 2)  # [T, H, v]


# --- router -------------------------------------------------------------------------------------------------


def top(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest along the last axis, largest first, the lower index first among equals, NaN
    last: f32 [..., N] -> int64 [..., k].
    """
    return np.argsort(-scores, axis=-1, kind="stable")[..., :k]


def route(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, config: DeepSeekConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Choose A experts for every token: ids int64 [T, A] and weights f32 [T, A], best expert first.

    x f32 [T, D], weight f32 [E, D] (`mlp.gate.weight`), bias f32 [E] (`e_score_correction_bias`). The bias
    steers who is chosen and not how much they count: weights are the unbiased scores, normalized and times
    `routed_scaling_factor`. Groups are ranked by the sum of their two best biased scores, and only experts of
    the best `topk_group` groups can be chosen. DeepSeek-V3 equations 12 to 16.

    DeepSeek-V2's router (its equations 20 to 22) has softmax for sigmoid, no bias (zeros here), and with
    `topk_method` "group_limited_greedy" ranks groups by their best expert alone.
    """
    scores = softmax if config.scoring_func == "softmax" else sigmoid
    affinity = scores(x @ weight.T)  # [T, E]
    biased = affinity + bias
    grouped = biased.reshape(len(x), config.n_group, len(weight) // config.n_group)  # [T, G, E/G]
    best = 1 if config.topk_method == "group_limited_greedy" else 2
    group_scores = np.sort(grouped, axis=-1)[..., -best:].sum(axis=-1)  # [T, G]
    kept = np.zeros(group_scores.shape, bool)
    np.put_along_axis(kept, top(group_scores, config.topk_group), True, axis=-1)
    eligible = np.where(kept[..., None], grouped, -np.inf).reshape(biased.shape)
    ids = top(eligible, config.num_experts_per_tok)  # [T, A]
    weights = np.take_along_axis(affinity, ids, axis=-1)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + np.float32(1e-20))
    return ids, weights * np.float32(config.routed_scaling_factor)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), f32 of any shape, without overflow: exp is only taken of negative numbers."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e)).astype(np.float32)
