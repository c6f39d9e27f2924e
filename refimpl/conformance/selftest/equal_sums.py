"""Rewrites of sums, and of linear layers and experts made of them: orders, lanes, parts, accumulators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from refimpl.conformance.selftest.rewrite import F32, F64, Array, Rewrite
from refimpl.conformance.truth import bounds
from refimpl.formats import e4m3
from refimpl.reference import experts as mlp
from refimpl.reference import packed
from refimpl.tensors import ScaledFP8

# --- sums of K terms, f32 [..., K] -> f32 [...] -------------------------------------------------------------


def _sequential(t: Array) -> Array:
    return np.cumsum(t, axis=-1, dtype=F32)[..., -1]


def _lanes(n: int, t: Array) -> Array:
    padded = np.pad(t, [(0, 0)] * (t.ndim - 1) + [(0, -t.shape[-1] % n)])
    return _sequential(
        _sequential(np.swapaxes(padded.reshape(*t.shape[:-1], padded.shape[-1] // n, n), -1, -2))
    )


def _parts(n: int, t: Array) -> Array:
    return _sequential(
        np.stack(
            [p.sum(axis=-1, dtype=F32) for p in np.array_split(t, min(n, t.shape[-1]), axis=-1)], axis=-1
        )
    )


def _kahan(t: Array) -> Array:
    total, lost = np.zeros(t.shape[:-1], F32), np.zeros(t.shape[:-1], F32)
    for k in range(t.shape[-1]):
        y = t[..., k] - lost
        after = total + y
        total, lost = after, (after - total) - y
    return total


def _by_size(t: Array) -> Array:
    return _sequential(np.take_along_axis(t, np.argsort(np.abs(t), axis=-1), axis=-1))


def _by_sign(t: Array) -> Array:
    return np.maximum(t, 0).sum(axis=-1, dtype=F32) + np.minimum(t, 0).sum(axis=-1, dtype=F32)


def _shuffled(t: Array) -> Array:
    return _sequential(t[..., np.random.default_rng(3).permutation(t.shape[-1])])


SUMS: dict[str, Callable[[Array], Array]] = {
    "one after the other": _sequential,
    "from the end": lambda t: _sequential(t[..., ::-1]),
    "in pairs": lambda t: t.sum(axis=-1, dtype=F32),
    "in float64": lambda t: t.sum(axis=-1, dtype=F64).astype(F32),
    "in 8 lanes": partial(_lanes, 8),
    "in 16 lanes": partial(_lanes, 16),
    "in 2 parts (split K)": partial(_parts, 2),
    "in 7 parts (split K)": partial(_parts, 7),
    "with compensation": _kahan,
    "smallest first": _by_size,
    "positive and negative apart": _by_sign,
    "in a shuffled order": _shuffled,
}

Product = Callable[[Array, Array], Array]  # x [T, K], w [N, K] -> [T, N], all f32


def _summed(total: Callable[[Array], Array], x: Array, w: Array) -> Array:
    y = np.empty((len(x), len(w)), F32)
    for t in range(len(x)):
        y[t] = total(x[t] * w)
    return y


def _fused(x: Array, w: Array) -> Array:
    """Each step one rounding, as an FMA has."""
    y = np.zeros((len(x), len(w)), F32)
    for k in range(x.shape[1]):
        y = (y.astype(F64) + x[:, k, None].astype(F64) * w[:, k]).astype(F32)
    return y


def _by_blocks(x: Array, w: Array) -> Array:
    y = np.zeros((len(x), len(w)), F32)
    for k in range(0, x.shape[1], 32):
        y += x[:, k : k + 32] @ w[:, k : k + 32].T
    return y


PRODUCTS: dict[str, Product] = {name: partial(_summed, total) for name, total in SUMS.items()} | {
    "with fused multiply-add": _fused,
    "weights on the left": lambda x, w: (w @ x.T).T.copy(),
    "products in float64": lambda x, w: (x.astype(F64) @ w.T).astype(F32),
    "a block of 32 columns at a time": _by_blocks,
}


BY_BLAS = ("weights on the left", "products in float64", "a block of 32 columns at a time")
"""BLAS promises no bits with another number of threads."""


def dense_linear(product: Product, x: Array | ScaledFP8, w: Any, activations: str = "fp8") -> Array:
    """Both sides as float32 numbers, then that product."""
    if isinstance(x, ScaledFP8):  # quantized already
        rounded = e4m3.decode(x.codes) * np.repeat(x.scale, 128, axis=-1)[..., : x.codes.shape[-1]]
        return product(rounded.astype(F32), packed.dense(w))
    flat = x.reshape(-1, x.shape[-1])
    rounded = bounds.rounded(flat, bounds.layout(w, activations)).astype(F32)
    return product(rounded, packed.dense(w)).reshape(*x.shape[:-1], w.shape[0])


def scaled_first(x: Array, w: ScaledFP8, activations: str = "fp8") -> Array:
    """The weight's scale goes into the activations, block by block, instead of into the sum."""
    rounded = bounds.rounded(x, bounds.layout(w, activations)).astype(F32)
    codes, rows = e4m3.decode(w.codes), np.arange(len(w.codes)) // 128
    y = np.zeros((len(x), len(codes)), F32)
    for t in range(len(w.scale)):
        mine = rows == t
        y[:, mine] = (rounded * np.repeat(w.scale[t], 128)[: x.shape[1]]) @ codes[mine].T
    return y


# --- linear layers and experts ------------------------------------------------------------------------------


def linears() -> Iterator[Rewrite]:
    """Equivalent rewrites of linear layers, one for each way to sum and kind of weight."""
    for name, product in PRODUCTS.items():
        for kind in ("q4_k", "q6_k", "q8_0", "bf16", "q5_k", "q2_k"):
            declared = {"weights": [kind], "threads": name not in BY_BLAS}
            yield Rewrite(f"{kind}: {name}", "linear", partial(dense_linear, product), declared)
        alone = {"threads": name not in BY_BLAS}
        yield Rewrite(name, "fp8.linear", partial(dense_linear, product), alone)
    yield Rewrite("weight scales in the activations", "fp8.linear", scaled_first, {"threads": False})


def _swiglu(
    product: Product,
    act: Callable[[Array], Array],
    x: Array,
    gate: Any,
    up: Any,
    down: Any,
    activations: str = "fp8",
) -> Array:
    g, u = dense_linear(product, x, gate, activations), dense_linear(product, x, up, activations)
    return dense_linear(product, act(g) * u, down, activations)


def quotient_silu(x: Array) -> Array:
    """x / (1 + e^-x), f32 [...]."""
    return x / (F32(1) + np.exp(-x))


def wide_silu(x: Array) -> Array:
    """silu by float64, f32 [...]."""
    return (x / (1 + np.exp(-x.astype(F64)))).astype(F32)


def _experts(
    order: Callable[[Array], Array],
    dtype: type,
    x: Array,
    ids: Array,
    weights: Array,
    gate: Any,
    up: Any,
    down: Any,
    *mode: str,
) -> Array:
    """Token by token, its experts in some order."""
    y: Array = np.zeros(x.shape, dtype)
    for t in range(len(x)):
        for a in order(np.arange(ids.shape[1])):
            e = ids[t, a]
            part = mlp.swiglu(x[t : t + 1], mlp.pick(gate, e), mlp.pick(up, e), mlp.pick(down, e), *mode)[0]
            y[t] = y[t] + weights[t, a] * part
    return y.astype(F32)


POOL = (
    Rewrite("silu as a quotient", "swiglu", partial(_swiglu, PRODUCTS["in pairs"], quotient_silu)),
    Rewrite("silu in float64", "swiglu", partial(_swiglu, PRODUCTS["in 8 lanes"], wide_silu)),
    Rewrite("sums in 7 parts", "swiglu", partial(_swiglu, PRODUCTS["in 7 parts (split K)"], mlp.silu)),
    Rewrite(
        "sums with fused multiply-add",
        "swiglu",
        partial(_swiglu, PRODUCTS["weights on the left"], quotient_silu),
        {"threads": False},
    ),
    Rewrite("token by token", "experts", partial(_experts, lambda a: a, F32)),
    Rewrite("last choice first", "experts", partial(_experts, lambda a: a[::-1], F32)),
    Rewrite("summed in float64", "experts", partial(_experts, lambda a: a, F64)),
)
