"""Rewrites that change no result beyond its bound: other orders of summation, other blockings, fused
multiply-add, wider accumulators, tables for arithmetic. `python -m refimpl.conformance --equivalents` judges
them all; a law that one of them breaks is a false alarm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from refimpl import ops
from refimpl.conformance.inputs import draws
from refimpl.conformance.manifest import Manifest
from refimpl.conformance.trial import Trial
from refimpl.conformance.truth import bounds, e4m3_by_search
from refimpl.formats import e4m3
from refimpl.reference import attention, fp8, packed
from refimpl.reference import experts as mlp
from refimpl.reference.attention import sigmoid
from refimpl.tensors import ScaledFP8

F32, F64 = np.float32, np.float64
Array = np.ndarray
Kernel = Callable[..., Any]


class Rewrite(NamedTuple):
    """A kernel that is right, written otherwise."""

    name: str
    op: str
    kernel: Kernel
    declared: dict[str, Any] = {}  # noqa: RUF012

    def trial(self) -> Trial:
        """To be judged under the project's own promises."""
        manifest = Manifest().with_values(self.declared, self.name)
        return Trial(self.op, self.kernel, manifest, self.name, brief=True)


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


def dense_linear(product: Product, x: Array, w: Any, activations: str = "fp8") -> Array:
    """Both sides as float32 numbers, then that product."""
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


# --- formats ------------------------------------------------------------------------------------------------

MOST_CALLS = 300


def _terms(kind: str, data: Array) -> dict[str, Array]:
    module = draws.FORMATS[kind]
    parts = dict(zip(module.PARTS, module.unpack(data)))
    return parts | ({"q": module.VALUES[parts["q"]]} if hasattr(module, "VALUES") else {})


def _low(p: dict[str, Array], dtype: type) -> Array | None:
    """What is added to every weight of a group; None where there is nothing."""
    if "dmin" in p:
        return -(p["dmin"][..., None].astype(dtype) * p["m"])[..., None]
    return p["m"][..., None].astype(dtype) if "m" in p else None


def _rounded_once(kind: str, data: Array) -> Array:
    p = _terms(kind, data)
    scale = p["d"][..., None].astype(F64) * p["sc"] if "sc" in p else p["d"].astype(F64)
    low = _low(p, F64)
    y = scale[..., None] * p["q"] if low is None else scale[..., None] * p["q"] + low
    return y.astype(F32).reshape(*data.shape[:-1], p["d"].shape[-1] * draws.FORMATS[kind].WEIGHTS)


def _products_first(kind: str, data: Array) -> Array:
    p = _terms(kind, data)
    q = p["sc"][..., None].astype(F32) * p["q"].astype(F32) if "sc" in p else p["q"].astype(F32)
    y = p["d"].reshape(p["d"].shape + (1,) * (q.ndim - p["d"].ndim)) * q
    if (low := _low(p, F32)) is not None:
        y = y + low
    return y.reshape(*data.shape[:-1], p["d"].shape[-1] * draws.FORMATS[kind].WEIGHTS)


def _from_the_end(count: int) -> list[slice]:
    """Blocks one by one from the last, or in as many pieces where they are many: a call of numpy's each."""
    step = 1 + count // MOST_CALLS
    return [slice(at, at + step) for at in reversed(range(0, count, step))]


def _one_by_one(kind: str, data: Array) -> Array:
    module = draws.FORMATS[kind]
    blocks = np.ascontiguousarray(data).reshape(-1, module.BLOCK.itemsize)
    out = np.empty((len(blocks), module.WEIGHTS), F32)
    for i in _from_the_end(len(blocks)):
        out[i] = module.dequantize(blocks[i].reshape(-1)).reshape(-1, module.WEIGHTS)
    return out.reshape(*data.shape[:-1], data.shape[-1] // module.BLOCK.itemsize * module.WEIGHTS)


def _by_table(kind: str, data: Array) -> Array:
    """A table of every value a group can have, looked up by its codes."""
    p = _terms(kind, data)
    scale = p["d"][..., None] * p["sc"].astype(F32) if "sc" in p else p["d"]
    codes = np.arange(int(p["q"].min(initial=0)), int(p["q"].max(initial=0)) + 1)
    table = scale[..., None] * codes.astype(F32)
    if (low := _low(p, F32)) is not None:
        table = table + low
    y = np.take_along_axis(table, p["q"].astype(np.int64) - codes[0], axis=-1)
    return y.reshape(*data.shape[:-1], p["d"].shape[-1] * draws.FORMATS[kind].WEIGHTS)


ALONE = "block by block from the end"
DECODERS = {
    "rounded once from float64 (fused multiply-add)": _rounded_once,
    "sub-scale times quant first": _products_first,
    ALONE: _one_by_one,
    "by a table for each group": _by_table,
}


def _encode_one_by_one(kind: str, x: Array) -> Array:
    module = draws.FORMATS[kind]
    blocks = np.ascontiguousarray(x, F32).reshape(-1, module.WEIGHTS)
    out = np.empty((len(blocks), module.BLOCK.itemsize), np.uint8)
    for i in _from_the_end(len(blocks)):
        out[i] = module.quantize(blocks[i].reshape(-1)).reshape(-1, module.BLOCK.itemsize)
    return out.reshape(*x.shape[:-1], x.shape[-1] // module.WEIGHTS * module.BLOCK.itemsize)


def _encode_through_float64(kind: str, x: Array) -> Array:
    return draws.FORMATS[kind].quantize(np.asfortranarray(x.astype(F64)))


def _formats() -> Iterator[Rewrite]:
    for op in ops.OPS:
        kind, _, verb = op.partition(".")
        module = draws.FORMATS.get(kind)
        if module is None or not module.BLOCK.names:
            continue
        if verb == "dequantize":
            # The others know a half-precision or single-precision scale called d.
            known = DECODERS if "d" in draws.scale_fields(module) else {ALONE: _one_by_one}
            yield from (Rewrite(name, op, partial(f, kind)) for name, f in known.items())
        else:
            yield Rewrite(ALONE, op, partial(_encode_one_by_one, kind))
            yield Rewrite("from float64, by columns", op, partial(_encode_through_float64, kind))


# --- FP8 ----------------------------------------------------------------------------------------------------


def _decode_by_arithmetic(codes: Array) -> Array:
    size, exponent = (codes & 7).astype(F64), (codes >> 3 & 15).astype(int)
    y = np.where(exponent > 0, np.ldexp(8 + size, exponent - 10), np.ldexp(size, -9))
    return np.where((codes & 127) == 127, np.nan, np.copysign(y, np.where(codes > 127, -1.0, 1.0))).astype(
        F32
    )


def _decode_through_half(codes: Array) -> Array:
    """A code is the top of a half whose exponent is eight too small."""
    half = ((codes.astype(np.uint16) & 0x80) << 8 | (codes.astype(np.uint16) & 0x7F) << 7).view(np.float16)
    return np.where((codes & 127) == 127, F32(np.nan), half.astype(F32) * F32(256))


def _act_quant_by_group(x: Array) -> tuple[Array, Array]:
    codes, scale = np.empty(x.shape, np.uint8), np.empty((*x.shape[:-1], -(-x.shape[-1] // 128)), F32)
    for g in reversed(range(scale.shape[-1])):
        codes[..., 128 * g : 128 * g + 128], scale[..., g : g + 1] = fp8.act_quant(
            np.ascontiguousarray(x[..., 128 * g : 128 * g + 128])
        )
    return codes, scale


def _act_quant_in_float64(x: Array) -> tuple[Array, Array]:
    """Quotients of two float32 rounded to float64 and then to float32 are those rounded at once."""
    starts = np.arange(0, x.shape[-1], 128)
    if not len(starts) or not len(x):
        return fp8.act_quant(x)
    scale = (np.maximum.reduceat(np.abs(x.astype(F64)), starts, axis=-1) / 448).astype(F32)
    spread = np.repeat(scale, 128, axis=-1)[..., : x.shape[-1]]
    with np.errstate(all="ignore"):
        return np.where(
            spread == 0, np.uint8(0), e4m3_by_search.e4m3_codes((x.astype(F64) / spread).astype(F32))
        ), scale


def _dequant_by_tile(w: ScaledFP8) -> Array:
    y = np.empty(w.shape, F32)
    for i, j in np.ndindex(*w.scale.shape):
        tile = np.s_[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
        y[tile] = w.scale[i, j] * e4m3.decode(w.codes[tile])
    return y


def _dequant_in_float64(w: ScaledFP8) -> Array:
    return bounds.terms(w)[0].astype(F32)


FP8 = (
    Rewrite("by arithmetic in float64", "e4m3.decode", _decode_by_arithmetic),
    Rewrite("through half precision", "e4m3.decode", _decode_through_half),
    Rewrite("by looking for the nearest", "e4m3.encode", e4m3_by_search.e4m3_codes),
    Rewrite(
        "one row after the other",
        "e4m3.encode",
        lambda x: np.array([e4m3.encode(row) for row in x], np.uint8).reshape(x.shape),
    ),
    Rewrite("group by group from the end", "fp8.act_quant", _act_quant_by_group),
    Rewrite("in float64", "fp8.act_quant", _act_quant_in_float64),
    Rewrite("tile by tile", "fp8.weight_dequant", _dequant_by_tile),
    Rewrite("in float64", "fp8.weight_dequant", _dequant_in_float64),
)

# --- linear layers and experts ------------------------------------------------------------------------------


def _linears() -> Iterator[Rewrite]:
    for name, product in PRODUCTS.items():
        for kind in ("q4_k", "q6_k", "q8_0", "bf16", "q5_k", "q2_k"):
            yield Rewrite(f"{kind}: {name}", "linear", partial(dense_linear, product), {"weights": [kind]})
        yield Rewrite(name, "fp8.linear", partial(dense_linear, product))
    yield Rewrite("weight scales in the activations", "fp8.linear", scaled_first)


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


def _quotient_silu(x: Array) -> Array:
    return x / (F32(1) + np.exp(-x))


def _wide_silu(x: Array) -> Array:
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
    Rewrite("silu as a quotient", "swiglu", partial(_swiglu, PRODUCTS["in pairs"], _quotient_silu)),
    Rewrite("silu in float64", "swiglu", partial(_swiglu, PRODUCTS["in 8 lanes"], _wide_silu)),
    Rewrite("sums in 7 parts", "swiglu", partial(_swiglu, PRODUCTS["in 7 parts (split K)"], mlp.silu)),
    Rewrite(
        "sums with fused multiply-add",
        "swiglu",
        partial(_swiglu, PRODUCTS["weights on the left"], _quotient_silu),
    ),
    Rewrite("token by token", "experts", partial(_experts, lambda a: a, F32)),
    Rewrite("last choice first", "experts", partial(_experts, lambda a: a[::-1], F32)),
    Rewrite("summed in float64", "experts", partial(_experts, lambda a: a, F64)),
)

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
    width: int, q_nope: Array, q_pe: Array, latent: Array, k_pe: Array, kv_b: Array, scale: float
) -> Array:
    """Softmax in pieces of that many keys: largest, sum and result so far, rescaled when a larger score
    comes.
    """
    t, heads, n = q_nope.shape
    q = np.matmul(q_nope.transpose(1, 0, 2), kv_b[:, :n])
    mask = attention.causal_mask(t, len(latent))
    top, total, out = (
        np.full((heads, t, 1), -np.inf, F32),
        np.zeros((heads, t, 1), F32),
        np.zeros((heads, t, latent.shape[1]), F32),
    )
    for at in range(0, len(latent), width):
        piece = np.s_[at : at + width]
        z = (q @ latent[piece].T + q_pe.transpose(1, 0, 2) @ k_pe[piece].T) * F32(scale) + mask[:, piece]
        new = np.maximum(top, z.max(axis=-1, keepdims=True))
        p, shrink = np.exp(z - new), np.exp(top - new)
        top, total, out = (
            new,
            total * shrink + p.sum(axis=-1, keepdims=True),
            out * shrink + p @ latent[piece],
        )
    return np.matmul(out / total, kv_b[:, n:].transpose(0, 2, 1)).transpose(1, 0, 2).copy()


def _mla_in_float64(
    q_nope: Array, q_pe: Array, latent: Array, k_pe: Array, kv_b: Array, scale: float
) -> Array:
    q_nope, q_pe, latent, k_pe, kv_b = (a.astype(F64) for a in (q_nope, q_pe, latent, k_pe, kv_b))
    return attention.mla_naive(q_nope, q_pe, latent, k_pe, kv_b, scale).astype(F32)


def _mla_by_head(q_nope: Array, q_pe: Array, latent: Array, k_pe: Array, kv_b: Array, scale: float) -> Array:
    heads = [
        attention.mla_naive(q_nope[:, h : h + 1], q_pe[:, h : h + 1], latent, k_pe, kv_b[h : h + 1], scale)
        for h in range(q_nope.shape[1])
    ]
    return np.concatenate(heads, axis=1)


def _mla_scaled_query(
    q_nope: Array, q_pe: Array, latent: Array, k_pe: Array, kv_b: Array, scale: float
) -> Array:
    return attention.mla_absorbed(q_nope * F32(scale), q_pe * F32(scale), latent, k_pe, kv_b, 1.0)


def _mla_base_two(q_nope: Array, q_pe: Array, latent: Array, k_pe: Array, kv_b: Array, scale: float) -> Array:
    n = q_nope.shape[-1]
    z = np.matmul(q_nope.transpose(1, 0, 2), kv_b[:, :n]) @ latent.T + q_pe.transpose(1, 0, 2) @ k_pe.T
    z = z * F32(scale) + attention.causal_mask(len(q_nope), len(latent))
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
        ranks = [sum(sorted(g)[-best:], F32(0)) for g in groups]
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
        "silu as a quotient", "swiglu_quant", partial(_then_quant, partial(_gated, _quotient_silu), False)
    ),
    Rewrite("silu in float64", "swiglu_quant", partial(_then_quant, partial(_gated, _wide_silu), False)),
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


def everything() -> list[Rewrite]:
    """All of them."""
    return [*_formats(), *FP8, *_linears(), *POOL, *FUSED, *ATTENTION]
