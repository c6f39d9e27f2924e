"""How far a correct result may be from the truth, element by element. Constants count roundings;
`docs/conformance.md` derives them.

Truth is the same quantized numbers in float64. A sum of n terms, taken in any order, in any blocks, with or
without fused multiply-add, is within gamma(n) * (sum of the magnitudes of the terms) of its true value: n
counts the roundings that any one term goes through on its way (Higham, Accuracy and Stability of Numerical
Algorithms, lemma 3.1 and section 4.2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from refimpl import formats
from refimpl.conformance.manifest import UNITS, Manifest
from refimpl.formats import bf16, e4m3, q3_k, q4_0, q5_0, q6_k, q8_0, q8_k
from refimpl.reference import fp8, int4, packed
from refimpl.tensors import FileWeight, Packed, ScaledFP8, ScaledInt4

F32 = UNITS["float32"]
EXP = 4  # units roundoff of an exponential: 2 ulp, as the vendors' libraries and vector units state
TINY = 2.0**-126  # below it numbers lose bits, or become zero where subnormals are flushed


def gamma(n: float, unit: float = F32) -> float:
    """What n roundings do to a product, relatively: n u / (1 - n u); infinite where nothing can be said."""
    return n * unit / (1 - n * unit) if n * unit < 1 else np.inf


class Sum(NamedTuple):
    """What is true, and how far a result may be from it."""

    true: np.ndarray  # f64
    bound: np.ndarray  # f64


def stored(m: Manifest, s: Sum) -> Sum:
    """The sum once it is rounded to the dtype that a kernel declares for its results."""
    if m.output == "float32":
        return s
    least = np.float64(np.finfo(np.float16).smallest_subnormal) if m.output == "float16" else TINY
    return Sum(s.true, s.bound + UNITS[m.output] * (np.abs(s.true) + s.bound) + least)


def taken(m: Manifest, x: np.ndarray) -> np.ndarray:
    """x f32 in the numbers of the dtype that a kernel declares for its activations, as f32."""
    if m.input == "float16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float32)
    return bf16.dequantize(bf16.quantize(x)) if m.input == "bfloat16" else x


def says_nothing(s: Sum) -> bool:
    """Whether the bound is no demand at all: infinite somewhere, or as a rule above the result's own size."""
    known = np.isfinite(s.true)
    size = np.sqrt(np.mean(np.square(s.true[known]))) if known.any() else 0.0
    bound = np.broadcast_to(s.bound, s.true.shape)[known]
    return bool(size > 0 and (not np.isfinite(bound).all() or np.median(bound) > size))


# --- weights and activations --------------------------------------------------------------------------------


def terms(w: FileWeight) -> tuple[np.ndarray, np.ndarray | None]:
    """A weight is scale*q plus perhaps a minimum: both parts f64 [N, K], exact; None where there is none."""
    if isinstance(w, np.ndarray):
        return w.astype(np.float64), None
    if isinstance(w, ScaledFP8):
        columns = np.repeat(w.scale.astype(np.float64), 128, axis=1)[:, : w.shape[1]]
        return e4m3.decode(w.codes) * np.repeat(columns, 128, axis=0)[: w.shape[0]], None
    if isinstance(w, ScaledInt4):
        return int4.weight_dequant(w).astype(np.float64), None
    module = formats.get(w.ggml_type)
    if not {"m", "dmin"} & set(
        getattr(module, "PARTS", ())
    ):  # a product of few bits: decoding rounds nothing
        return module.dequantize(w.data).reshape(w.shape).astype(np.float64), None
    part = {name: p.astype(np.float64) for name, p in zip(module.PARTS, module.unpack(w.data))}
    scale, codes = _scale_and_q(w)
    q = scale[..., None] * codes
    low = -(part["dmin"][..., None] * part["m"])[..., None] if "dmin" in part else part["m"][..., None]
    return q.reshape(w.shape), np.broadcast_to(low, q.shape).reshape(w.shape)


OFFSETS = {q3_k: 4, q4_0: 8, q5_0: 16, q6_k: 32}
"""Formats that store q + offset: kernels may sum codes and offsets apart, as ggml's do."""


class Dense(NamedTuple):
    """A weight matrix as exact numbers, and the magnitudes its rounding errors are relative to."""

    exact: np.ndarray
    size: np.ndarray


def dense(w: FileWeight) -> Dense:
    """f64 [N, K] twice: scale*q + minimum, and |scale*q| + |minimum|, or |scale| (stored code + offset)."""
    a, b = terms(w)
    size = np.abs(a) if b is None else np.abs(a) + np.abs(b)
    if isinstance(w, Packed) and (offset := OFFSETS.get(formats.get(w.ggml_type))):
        scale, q = _scale_and_q(w)
        size = (np.abs(scale[..., None]) * (q + 2 * offset)).reshape(w.shape)
    return Dense(a if b is None else a + b, size)


def _scale_and_q(w: Packed) -> tuple[np.ndarray, np.ndarray]:
    """f64 [..., groups] and [..., groups, L]."""
    module = formats.get(w.ggml_type)
    part = {name: p.astype(np.float64) for name, p in zip(module.PARTS, module.unpack(w.data))}
    return (part["d"][..., None] * part["sc"] if "sc" in part else part["d"]), part["q"]


def roundings(columns: int) -> int:
    """The roundings of one term on its way through a dot product of so many columns, whatever the order.

    The weight's own subtraction or scaling 1, the activation's scaling 1, their product 1, an integer
    becoming a float 1, and additions: one a column, and one a minimum (every 16 columns) for those who sum
    these apart.
    """
    return columns + -(-columns // 16) + 4


E4M3 = ("e4m3", "e4m3_ue8m0")


def layout(w: FileWeight, mode: str, m: Manifest | None = None) -> str:
    """What activations are rounded to before they meet w: "exact" (not at all), "e4m3", "e4m3_ue8m0", "q8_k"
    or "q8_0", or what is declared instead of these. It can be declared beside all blocks under scales, those
    too that the reference multiplies without (Q4_1 meets Q8_1 in ggml).
    """
    how = _paired(w, mode)
    if not m or not m.quantized or mode == "exact":
        return how
    blocks = isinstance(w, Packed) and formats.get(w.ggml_type).BLOCK.names
    return m.quantized if how != "exact" or blocks else how


def _paired(w: FileWeight, mode: str) -> str:
    if mode == "exact" or isinstance(w, np.ndarray | ScaledInt4):
        return "exact"
    if isinstance(w, ScaledFP8):
        return "e4m3_ue8m0" if mode == "ue8m0" else "e4m3"
    module = formats.get(w.ggml_type)
    return "q8_k" if module in packed.Q8_K_PARTNERS else "q8_0" if module in packed.Q8_0_PARTNERS else "exact"


def rounded(x: np.ndarray, how: str) -> np.ndarray:
    """x through the reference's quantizer of activations, f64."""
    if how in E4M3:
        codes, scale = fp8.act_quant(x, ue8m0=how == "e4m3_ue8m0")
        return e4m3.decode(codes) * np.repeat(scale, 128, axis=-1)[..., : x.shape[-1]].astype(np.float64)
    if how == "exact":
        return x.astype(np.float64)
    module = q8_k if how == "q8_k" else q8_0
    d, q = module.unpack(module.quantize(x))[:2]
    return (d[..., None].astype(np.float64) * q).reshape(x.shape)


def _half(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float64)


def _power_of_two(s: np.ndarray) -> np.ndarray:
    """The smallest power of two from 2^-126 up that is not below s."""
    mantissa, exponent = np.frexp(s)
    return np.ldexp(1.0, np.maximum(exponent - (mantissa == 0.5), -126))


def _round_away(x: np.ndarray) -> np.ndarray:
    return np.trunc(x + np.copysign(0.5, x))


QUANTIZERS: dict[str, tuple[int, float, Callable, Callable]] = {
    # group, the code of the largest magnitude, how a ratio becomes a code, how a scale is stored; each step
    # never decreases
    "q8_k": (256, 127.0, np.rint, lambda s: s),
    "q8_0": (32, 127.0, _round_away, _half),
    "q8_0 float": (32, 127.0, np.rint, lambda s: s),
    "q8_1": (32, 127.0, np.rint, _half),
    "e4m3": (128, 448.0, lambda r: e4m3.decode(e4m3.encode(r)).astype(np.float64), lambda s: s),
}
QUANTIZERS["e4m3_ue8m0"] = QUANTIZERS["e4m3"]


def requantized(h: np.ndarray, error: np.ndarray | float, how: str) -> Sum:
    """What numbers within `error` of h [T, K] can become when they are quantized: the middle of that range,
    and half its width.

    Quantizing is a chain of steps that never decrease, so the ends of the range come from the ends of h. Only
    where a tie lies inside [h - error, h + error] do the ends fall on different codes; everywhere else the
    range is as narrow as the scale is known.
    """
    if how == "exact":
        return Sum(h, np.broadcast_to(np.asarray(error, np.float64), h.shape))
    width, top, code, stored = QUANTIZERS[how]
    columns, pad = h.shape[-1], -h.shape[-1] % width
    low, high = (
        np.pad(v, ((0, 0), (0, pad))).reshape(len(h), (columns + pad) // width, width)
        for v in (h - error, h + error)
    )
    least, most = (
        np.where((low <= 0) & (high >= 0), 0, np.minimum(np.abs(low), np.abs(high))),
        np.maximum(np.abs(low), np.abs(high)),
    )
    # Dividing for the scale, inverting it and multiplying: four roundings.
    s_low, s_high = (
        m.max(axis=-1, keepdims=True) / top * (1 + sign * gamma(4)) for m, sign in ((least, -1), (most, 1))
    )
    if how == "e4m3_ue8m0":
        s_low, s_high = _power_of_two(s_low), _power_of_two(s_high)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = [
            np.nan_to_num(v / s * (1 + sign * gamma(4)), nan=0.0, posinf=top, neginf=-top)
            for v in (low, high)
            for s in (s_low, s_high)
            for sign in (-1, 1)
        ]
    q_low, q_high = (
        code(np.clip(np.minimum.reduce(ratios), -top, top)),
        code(np.clip(np.maximum.reduce(ratios), -top, top)),
    )
    ends = [q * s for q in (q_low, q_high) for s in (stored(s_low), stored(s_high))]
    ends_low, ends_high = (
        f.reduce(ends).reshape(len(h), columns + pad)[:, :columns] for f in (np.minimum, np.maximum)
    )
    return Sum((ends_low + ends_high) / 2, (ends_high - ends_low) / 2)


# --- sums of products ---------------------------------------------------------------------------------------


def _product(x: Sum, w: Dense, roundings_: float, unit: float) -> Sum:
    """x times the transpose of w, where x itself is only known within a bound."""
    sizes = (np.abs(x.true) + x.bound) @ w.size.T
    bound = gamma(roundings_, unit) * sizes + TINY * 2**19 * x.true.shape[-1]
    if np.any(x.bound):
        bound += x.bound @ np.abs(w.exact).T
    return Sum(x.true @ w.exact.T, bound)


def _sums(m: Manifest, x: Sum, w: FileWeight, how: str) -> Sum:
    """The product of x, rounded as `how` says, in the arithmetic that is declared."""
    matrix = dense(w)
    found = _product(x, matrix, roundings(x.true.shape[-1]), m.unit)
    if how == "q8_1":
        found = Sum(found.true, found.bound + halved_sums(x, w))
    if m.accumulation != "tensor-core" or how not in E4M3:
        return found
    blocks = [np.s_[:, start : start + 128] for start in range(0, x.true.shape[-1], 128)]
    lost = (tensor_core_error(x.true[b], matrix.exact[b], x.bound[b]) for b in blocks)
    return Sum(found.true, found.bound + sum(lost))


def halved_sums(x: Sum, w: FileWeight) -> np.ndarray:
    """f64 [T, N]: what minima lose where the sums of 32 activations that they multiply are kept as halves, of
    codes times a scale that need not be the half that is stored beside them.
    """
    low, (tokens, columns) = terms(w)[1], x.true.shape
    if low is None:
        return np.zeros((tokens, w.shape[0]))
    groups = tokens, columns // 32, 32
    sums = np.abs(x.true.reshape(groups).sum(axis=-1)) + x.bound.reshape(groups).sum(axis=-1)
    minima = np.abs(low).reshape(len(low), columns // 32, 32).max(axis=-1)
    # A half below 2^-14 is off by up to 2^-25, whatever its size, and meets the sum of 32 codes up to 127.
    small = (np.abs(x.true) + x.bound).reshape(groups).max(axis=-1) < 128 * 2.0**-14
    return (2.0**-10 * sums + 2.0**-24 + small * 32 * 127 * 2.0**-25) @ minima.T


def tensor_core_error(x: np.ndarray, w: np.ndarray, unsure: np.ndarray | float = 0.0) -> np.ndarray:
    """f64 [T, N]: what summing the products of one block, [T, 128] and [N, 128], may lose where the E4M3
    units do it.

    They line 32 products and the sum so far up to the largest of them and keep 13 bits below it (DeepSeek-V3,
    section 3.3.2, counted 14 in all). Each of x is only known within `unsure`.
    """
    sizes, unsure = np.abs(x) + unsure, np.broadcast_to(unsure, x.shape)
    largest = sizes.max(axis=1)[:, None] * np.abs(w).max(axis=1)
    so_far, error = np.zeros_like(largest), np.zeros_like(largest)
    for k in range(0, x.shape[1], 32):
        part = np.s_[:, k : k + 32]
        after = so_far + x[part] @ w[part].T
        spread = unsure[:, : k + 32] @ np.abs(w[:, : k + 32]).T
        error += (
            33
            * 2.0**-13
            * np.maximum(np.maximum(largest, np.abs(after) + spread), np.abs(so_far) + spread + error)
        )
        so_far = after
    return error


def inputs(m: Manifest, x: np.ndarray | ScaledFP8, w: FileWeight, mode: str) -> Sum:
    """The activations that are really multiplied: known to the bit, or within what the declared quantization
    leaves open.
    """
    if isinstance(x, ScaledFP8):  # quantized already
        return Sum(
            e4m3.decode(x.codes) * np.repeat(x.scale, 128, axis=-1)[..., : x.shape[-1]].astype(np.float64),
            np.zeros(x.shape),
        )
    how, x = layout(w, mode, m), taken(m, x)
    if how == "exact" or (m.activations == "bits" and not m.quantized):
        return Sum(rounded(x, how), np.zeros(x.shape))
    return requantized(x.astype(np.float64), 0.0, how)


def linear(m: Manifest, x: np.ndarray, w: FileWeight, mode: str) -> Sum:
    """x [T, K] times the transpose of w [N, K]."""
    return _sums(m, inputs(m, x, w, mode), w, layout(w, mode, m))


def one_hot(m: Manifest, x: np.ndarray, w: FileWeight, mode: str) -> Sum:
    """The bound of `linear` where each row of x f32 [T, K] has one number that is not zero: adding zeros does
    not round, so six roundings are left.
    """
    return _product(inputs(m, x, w, mode), dense(w), 6, F32)


def silu_times(g: Sum, u: Sum) -> Sum:
    """silu(g) * u. The slope of silu is below 1.1; exponential, sum, quotient and two products round."""
    true = g.true / (1 + np.exp(-g.true))
    bound = (
        1.1 * g.bound * (np.abs(u.true) + u.bound)
        + np.abs(true) * u.bound
        + gamma(EXP + 4) * (np.abs(true) + 1.1 * g.bound) * (np.abs(u.true) + u.bound)
    )
    # Where the exponential of 88.8 and more overflows a result of at most 89 / e^88.7 may become zero.
    return Sum(true * u.true, bound + 2.0**-121 * (np.abs(u.true) + u.bound + 1))


def halves(gate_up: np.ndarray) -> list[Sum]:
    """Gate and up, side by side in [..., 2 I], as they are."""
    return [Sum(part.astype(np.float64), np.zeros(part.shape)) for part in np.split(gate_up, 2, axis=-1)]


def swiglu(m: Manifest, x: np.ndarray, gate: FileWeight, up: FileWeight, down: FileWeight, mode: str) -> Sum:
    """down(silu(gate(x)) * up(x)). Between the two products the hidden numbers are quantized:
    `requantized`.
    """
    with np.errstate(over="ignore"):
        h = silu_times(linear(m, x, gate, mode), linear(m, x, up, mode))
    how = layout(down, mode, m)
    return _sums(m, requantized(h.true, h.bound, how), down, how)


def experts(m: Manifest, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, pick, mode: str) -> Sum:
    """Sum over a of weights[t, a] * swiglu of expert ids[t, a]; `pick(e)` gives gate, up and down of expert
    e.
    """
    true, bound, size = (np.zeros(x.shape) for _ in range(3))
    for e in np.unique(ids):
        token, slot = np.nonzero(ids == e)
        y = swiglu(m, *(x[token], *pick(int(e)), mode))
        share = weights[token, slot, None].astype(np.float64)
        np.add.at(true, token, share * y.true)
        np.add.at(bound, token, np.abs(share) * y.bound)
        np.add.at(size, token, np.abs(share) * (np.abs(y.true) + y.bound))
    return Sum(true, bound + gamma(ids.shape[1] + 1, m.unit) * size + TINY)


# --- attention ----------------------------------------------------------------------------------------------


def rms_norm(m: Manifest, x: np.ndarray, weight: np.ndarray, eps: float) -> Sum:
    """Squares and their sum are all positive: D + 1 roundings, halved by the root; then mean, eps, root (2
    ulp), quotient and product.
    """
    wide = taken(m, x).astype(np.float64)
    true = wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + np.float64(np.float32(eps))) * weight
    return Sum(true, gamma((x.shape[-1] + 3) / 2, m.unit) * np.abs(true) + gamma(6) * np.abs(true) + TINY)


def rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> Sum:
    """Two products and their sum: every term is rounded twice."""
    between = (1,) * (x.ndim - 2)
    c, s = (t.astype(np.float64).reshape(len(t), *between, t.shape[-1]) for t in (cos, sin))
    even, odd = x[..., 0::2].astype(np.float64), x[..., 1::2].astype(np.float64)
    true, size = np.empty(x.shape), np.empty(x.shape)
    true[..., 0::2], true[..., 1::2] = even * c - odd * s, odd * c + even * s
    size[..., 0::2], size[..., 1::2] = np.abs(even * c) + np.abs(odd * s), np.abs(odd * c) + np.abs(even * s)
    return Sum(true, gamma(2) * size + TINY)


def layer_norm(m: Manifest, x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> Sum:
    """The mean is off by D + 1 roundings of the mean size; what is left by that and one more. Squares of it,
    their sum, eps, root, quotient and product as in `rms_norm`, and a sum with the bias.
    """
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    off = gamma(x.shape[-1] + 1, m.unit) * np.abs(wide).mean(axis=-1, keepdims=True) + F32 * np.abs(centred)
    variance = np.mean(centred**2, axis=-1, keepdims=True) + np.float64(np.float32(eps))
    relative = np.mean(2 * np.abs(centred) * off + off**2, axis=-1, keepdims=True) / variance
    root = np.sqrt(variance)
    spread = relative / 2 + relative**2 + gamma((x.shape[-1] + 3) / 2 + 6, m.unit)
    size = np.abs(weight) * (off + np.abs(centred) * spread) / root
    true = centred / root * weight + bias
    return Sum(true, size * (1 + spread) + F32 * (np.abs(true) + size) + TINY)


def index_rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool) -> Sum:
    """The bound of turning the first r numbers of x [..., K] by tables cos and sin [T, r/2], as `rope` does;
    the numbers behind them are untouched.
    """
    r = 2 * cos.shape[1]
    order = np.arange(r) if interleaved else np.arange(r).reshape(2, -1).T.ravel()
    found = rope(x[..., order], cos, sin)
    true, bound = x.astype(np.float64), np.zeros(x.shape)
    true[..., order], bound[..., order] = found.true, found.bound
    return Sum(true, bound)


def scalings(m: Manifest) -> int:
    """Roundings of a score beside those of its sums: a product with the scale, or three with parts of it."""
    return 4 if m.scaling == "scores" else 7


def attention(
    m: Manifest,
    q_nope: np.ndarray,
    q_pe: np.ndarray,
    latent: np.ndarray,
    k_pe: np.ndarray,
    kv_b: np.ndarray | ScaledFP8,
    scale: float,
    rows: np.ndarray | None = None,
) -> Sum:
    """Naive and absorbed alike: the same terms, multiplied in another order.

    An error e of the scores multiplies every share by at most exp(2 e). Shares are positive, so their sum
    keeps relative errors; a softmax in pieces rescales at most once for 16 keys, an exponential and a product
    each.
    """
    if isinstance(kv_b, ScaledFP8):  # what it stands for, rounded once as the reference does
        kv_b = fp8.weight_dequant(kv_b).reshape(q_nope.shape[1], -1, latent.shape[1])
    qn, qr, c, kr, b = (a.astype(np.float64) for a in (q_nope, q_pe, latent, k_pe, kv_b))
    t, _, n = qn.shape
    s, width = c.shape
    keys, key_size = (
        np.einsum("sl,hnl->hsn", c, b[:, :n], optimize=True),
        np.einsum("sl,hnl->hsn", np.abs(c), np.abs(b[:, :n]), optimize=True),
    )
    z = scale * (
        np.einsum("thn,hsn->hts", qn, keys, optimize=True) + np.einsum("thr,sr->hts", qr, kr, optimize=True)
    )
    size = abs(scale) * (
        np.einsum("thn,hsn->hts", np.abs(qn), key_size, optimize=True)
        + np.einsum("thr,sr->hts", np.abs(qr), np.abs(kr), optimize=True)
    )
    allowed = np.arange(s)[None, :] <= np.arange(s - t, s)[:, None] if rows is None else rows
    z = np.where(allowed, z, -np.inf)
    top = z.max(axis=-1, keepdims=True) if s else z
    p = np.exp(z - top)
    sums = gamma(n + width + qr.shape[-1] + scalings(m), m.unit) * size
    error = np.where(allowed, sums + F32 * np.where(allowed, top - z, 0), 0).max(axis=-1)  # [H, T]
    p = p / p.sum(axis=-1, keepdims=True)
    values, value_size = (
        np.einsum("sl,hvl->hsv", c, b[:, n:], optimize=True),
        np.einsum("sl,hvl->hsv", np.abs(c), np.abs(b[:, n:]), optimize=True),
    )
    relative = (
        np.expm1(2 * error) + gamma(s + (EXP + 1) * (-(-s // 16) + 2), m.unit) + gamma(s + width + 2, m.unit)
    )
    mixed = np.einsum("hts,hsv->thv", p, value_size, optimize=True)
    return Sum(
        np.einsum("hts,hsv->thv", p, values, optimize=True),
        relative.T[..., None] * (1 + relative.T[..., None]) * mixed + TINY * s,
    )
