"""Rewrites of norms, rotary positions, attention, the router, and of what is quantized behind them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from refimpl.conformance.selftest.equal_sums import SUMS, quotient_silu, wide_silu
from refimpl.conformance.selftest.rewrite import F32, F64, Array, Kernel, Rewrite
from refimpl.reference import attention, fp8
from refimpl.reference.attention import sigmoid

# --- attention ----------------------------------------------------------------------------------------------


def _norm(total: Callable[[Array], Array], x: Array, weight: Array, eps: float) -> Array:
    if not x.size:
        return x * weight
    return x * (F32(1) / np.sqrt(total(x * x)[..., None] / F32(x.shape[-1]) + F32(eps))) * weight


def _norm_weight_first(x: Array, weight: Array, eps: float) -> Array:
    return x * weight / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True, dtype=F32) + F32(eps))


def _norm_in_float64(x: Array, weight: Array, eps: float) -> Array:
    return (
        x / np.sqrt(np.mean(np.square(x.astype(F64)), axis=-1, keepdims=True) + F32(eps)) * weight
    ).astype(F32)


def _rope_complex(x: Array, cos: Array, sin: Array) -> Array:
    between = (1,) * (x.ndim - 2)
    turn = (cos + 1j * sin).astype(np.complex64).reshape(len(cos), *between, cos.shape[-1])
    return (np.ascontiguousarray(x).view(np.complex64) * turn).view(F32)


def _rope_fused(x: Array, cos: Array, sin: Array) -> Array:
    between = (1,) * (x.ndim - 2)
    c, s = (t.reshape(len(t), *between, t.shape[-1]) for t in (cos, sin))
    even, odd, out = x[..., 0::2], x[..., 1::2], np.empty_like(x)
    out[..., 0::2] = even.astype(F64) * c - (odd * s).astype(F64)
    out[..., 1::2] = odd.astype(F64) * c + (even * s).astype(F64)
    return out


def _flash(
    width: int,
    q_nope: Array,
    q_pe: Array,
    latent: Array,
    k_pe: Array,
    kv_b: Array,
    scale: float,
    rows: Any = None,
) -> Array:
    """Softmax in pieces of that many keys: largest, sum and result so far, rescaled when a larger score
    comes.
    """
    t, heads, n = q_nope.shape
    q = np.matmul(q_nope.transpose(1, 0, 2), kv_b[:, :n])
    mask = attention.rows_mask(rows, t, len(latent))
    top, total, out = (
        np.full((heads, t, 1), -np.inf, F32),
        np.zeros((heads, t, 1), F32),
        np.zeros((heads, t, latent.shape[1]), F32),
    )
    for at in range(0, len(latent), width):
        piece = np.s_[at : at + width]
        z = (q @ latent[piece].T + q_pe.transpose(1, 0, 2) @ k_pe[piece].T) * F32(scale) + mask[:, piece]
        new = np.maximum(top, z.max(axis=-1, keepdims=True))
        known = np.where(np.isneginf(new), F32(0), new)  # no key that may be seen so far
        p, shrink = np.exp(z - known), np.exp(top - known)
        top, total, out = (
            new,
            total * shrink + p.sum(axis=-1, keepdims=True),
            out * shrink + p @ latent[piece],
        )
    return np.matmul(out / total, kv_b[:, n:].transpose(0, 2, 1)).transpose(1, 0, 2).copy()


def _mla_in_float64(
    q_nope: Array, q_pe: Array, latent: Array, k_pe: Array, kv_b: Array, scale: float, rows: Any = None
) -> Array:
    q_nope, q_pe, latent, k_pe, kv_b = (a.astype(F64) for a in (q_nope, q_pe, latent, k_pe, kv_b))
    return attention.mla_naive(q_nope, q_pe, latent, k_pe, kv_b, scale, rows).astype(F32)


def _mla_by_head(
    q_nope: Array, q_pe: Array, latent: Array, k_pe: Array, kv_b: Array, scale: float, rows: Any = None
) -> Array:
    heads = [
        attention.mla_naive(
            q_nope[:, h : h + 1], q_pe[:, h : h + 1], latent, k_pe, kv_b[h : h + 1], scale, rows
        )
        for h in range(q_nope.shape[1])
    ]
    return np.concatenate(heads, axis=1)


def _mla_scaled_query(
    q_nope: Array, q_pe: Array, latent: Array, k_pe: Array, kv_b: Array, scale: float, rows: Any = None
) -> Array:
    return attention.mla_absorbed(q_nope * F32(scale), q_pe * F32(scale), latent, k_pe, kv_b, 1.0, rows=rows)


def _mla_base_two(
    q_nope: Array, q_pe: Array, latent: Array, k_pe: Array, kv_b: Array, scale: float, rows: Any = None
) -> Array:
    n = q_nope.shape[-1]
    z = np.matmul(q_nope.transpose(1, 0, 2), kv_b[:, :n]) @ latent.T + q_pe.transpose(1, 0, 2) @ k_pe.T
    z = z * F32(scale) + attention.rows_mask(rows, len(q_nope), len(latent))
    p = np.exp2((z - z.max(axis=-1, keepdims=True)) * F32(np.log2(np.e)))
    return np.matmul((p / p.sum(axis=-1, keepdims=True)) @ latent, kv_b[:, n:].transpose(0, 2, 1)).transpose(
        1, 0, 2
    )


def _route(
    affinity: Callable[[Array], Array], x: Array, weight: Array, bias: Array, c: Any
) -> tuple[Array, Array]:
    """A loop over tokens, groups and experts; `affinity` in place of the sigmoid."""
    affinity = attention.softmax if c.scoring_func == "softmax" else affinity
    best = 1 if c.topk_method == "group_limited_greedy" else 2
    ids = np.zeros((len(x), c.num_experts_per_tok), np.int64)
    shares = np.zeros(ids.shape, F32)
    for t, scores in enumerate(affinity(x @ weight.T)):
        biased = scores + bias
        groups = biased.reshape(c.n_group, len(weight) // c.n_group)
        # An expert whose score is NaN is the last, and so is its group.
        ranks = [F32(-np.inf) if np.isnan(g).any() else sum(sorted(g)[-best:], F32(0)) for g in groups]
        biased = np.where(np.isnan(biased), F32(-np.inf), biased)
        kept = sorted(range(c.n_group), key=lambda g: (-ranks[g], g))[: c.topk_group]
        open_ = [e for e in range(len(biased)) if e // groups.shape[1] in kept]
        ids[t] = sorted(open_, key=lambda e: (-biased[e], e))[: ids.shape[1]]
        mine = scores[ids[t]]
        shares[t] = mine / (mine.sum() + F32(1e-20)) if c.norm_topk_prob else mine
    return ids, shares * F32(c.routed_scaling_factor)


def _then_quant(f: Kernel, kept: bool, *args: Any) -> tuple:
    """A quantizer behind f, with its numbers too where they are `kept`."""
    y = f(*args)
    return (*([y] if kept else []), *fp8.act_quant(y))


def _gated(act: Callable[[Array], Array], gate_up: Array) -> Array:
    half = gate_up.shape[-1] // 2
    return act(gate_up[..., :half]) * gate_up[..., half:]


FUSED = (
    *(
        Rewrite(
            f"sum of squares {name}", "rms_norm_quant", partial(_then_quant, partial(_norm, SUMS[name]), True)
        )
        for name in SUMS
    ),
    Rewrite("weight first", "rms_norm_quant", partial(_then_quant, _norm_weight_first, True)),
    Rewrite("in float64", "rms_norm_quant", partial(_then_quant, _norm_in_float64, True)),
    Rewrite(
        "silu as a quotient", "swiglu_quant", partial(_then_quant, partial(_gated, quotient_silu), False)
    ),
    Rewrite("silu in float64", "swiglu_quant", partial(_then_quant, partial(_gated, wide_silu), False)),
)

ATTENTION = (
    *(Rewrite(f"sum of squares {name}", "rms_norm", partial(_norm, SUMS[name])) for name in SUMS),
    Rewrite("weight first", "rms_norm", _norm_weight_first),
    Rewrite("in float64", "rms_norm", _norm_in_float64),
    Rewrite("as complex numbers", "rope", _rope_complex),
    Rewrite("with fused multiply-add", "rope", _rope_fused),
    *(
        Rewrite(f"softmax in pieces of {n}", op, partial(_flash, n))
        for n in (16, 64)
        for op in ("mla_naive", "mla_absorbed")
    ),
    Rewrite("in float64", "mla_naive", _mla_in_float64),
    Rewrite("head by head", "mla_naive", _mla_by_head),
    Rewrite("absorbed for naive", "mla_naive", attention.mla_absorbed),
    Rewrite("naive for absorbed", "mla_absorbed", attention.mla_naive),
    Rewrite("scale in the query", "mla_absorbed", _mla_scaled_query),
    Rewrite("powers of two for exponentials", "mla_absorbed", _mla_base_two),
    Rewrite("in loops", "route", partial(_route, sigmoid)),
    Rewrite("sigmoid as a quotient", "route", partial(_route, lambda z: F32(1) / (F32(1) + np.exp(-z)))),
    Rewrite(
        "sigmoid in float64",
        "route",
        partial(_route, lambda z: (1 / (1 + np.exp(-z.astype(F64)))).astype(F32)),
    ),
)
