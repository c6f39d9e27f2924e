"""Bugs that released kernels had, planted in this project's own references from the public descriptions that
the named threads give: for `history`, which judges them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from refimpl.conformance.inputs import draws
from refimpl.formats import e4m3, iq4_nl, q4_1
from refimpl.ops import OPS
from refimpl.reference import fp8
from refimpl.reference.packed import dense
from refimpl.tensors import Packed, ScaledFP8

Kernel = Callable[..., Any]
Array = np.ndarray
F32 = np.float32


class Bug(NamedTuple):
    """One fault. `everyday` draws the inputs that the norms are taken on."""

    thread: str  # "owner/repository#number"
    says: str
    op: str
    kernel: Kernel
    everyday: Callable[[np.random.Generator], tuple]
    declared: dict[str, Any] = {}  # noqa: RUF012


# --- everyday inputs ----------------------------------------------------------------------------------------


def _blocks(kind: str) -> Callable[[np.random.Generator], tuple]:
    def draw(rng: np.random.Generator) -> tuple:
        return (draws.packed(rng, draws.FORMATS[kind], 16, 512).data,)

    return draw


def _numbers(*shape: int) -> Callable[[np.random.Generator], tuple]:
    return lambda rng: (rng.normal(0, 1, shape).astype(F32),)


def _matrix(kind: str) -> Callable[[np.random.Generator], tuple]:
    def draw(rng: np.random.Generator) -> tuple:
        return rng.normal(0, 1, (4, 512)).astype(F32), draws.weight(rng, kind, 256, 512), "fp8"

    return draw


def _pool(rng: np.random.Generator) -> tuple:
    stacks = [draws.stack(rng, "q4_k", 8, 256, 256) for _ in range(3)]
    ids = np.array([rng.permutation(8)[:2] for _ in range(4)])
    return rng.normal(0, 1, (4, 256)).astype(F32), ids, rng.random(ids.shape).astype(F32), *stacks, "fp8"


def _scores(rng: np.random.Generator) -> tuple:
    x, w = rng.normal(0, 1, (8, 64)), rng.normal(0, 0.1, (32, 64))
    return x.astype(F32), w.astype(F32), rng.normal(0, 0.1, 32).astype(F32), draws.router(32, 4, 2, 4)


def _attention(rng: np.random.Generator) -> tuple:
    shapes = ((2, 4, 16), (2, 4, 8), (130, 32), (130, 8), (4, 32, 32))
    return *(rng.normal(0, 0.3, shape).astype(F32) for shape in shapes), 0.2


def _turned(rng: np.random.Generator) -> tuple:
    angles = rng.uniform(0, 6, (4, 16)).astype(F32)
    return rng.normal(0, 1, (4, 2, 32)).astype(F32), np.cos(angles), np.sin(angles)


# --- blocks -------------------------------------------------------------------------------------------------


def _bias_as_nibbles(data: Array) -> Array:
    """The quants begin two bytes early, in the minimum."""
    b = np.ascontiguousarray(data).view(q4_1.BLOCK).copy()
    raw = b.view(np.uint8).reshape(*b.shape, q4_1.BLOCK.itemsize)
    raw[..., 4:6] = np.ascontiguousarray(data).reshape(raw.shape)[..., 2:4]
    return q4_1.dequantize(b.view(np.uint8))


def _tiny_groups(x: Array) -> Array:
    """The inverse of a scale that is nearly zero is infinite, and its quants are what the cast makes of
    NaN.
    """
    data = OPS["q4_0.quantize"].reference(x)
    if not x.size:
        return data
    groups = np.abs(np.asarray(x)).reshape(*data.shape[:-1], -1, 32).max(axis=-1)
    nothing = (groups > 0) & (groups < 1e-20)
    blocks = data.reshape(*groups.shape, 18)
    blocks[nothing, 2:] = 0
    return blocks.reshape(data.shape)


# --- products -----------------------------------------------------------------------------------------------


def _linear(x: Array, w: Any, mode: str) -> Array:
    return OPS["linear"].reference(x, w, mode)


def _tail_of_128(x: Array, w: Any, mode: str = "fp8") -> Array:
    """Columns past the last whole 128 are multiplied with the scale of the block before."""
    y, whole = _linear(x, w, mode), w.shape[1] // 128 * 128
    if whole == w.shape[1] or not isinstance(w, Packed):
        return y
    tail = np.where(np.arange(w.shape[1]) >= whole, x, F32(0)).astype(F32)
    return y - _linear(tail, w, mode) * F32(0.5)


def _pairs_in_16_bits(x: Array, w: Packed, mode: str = "fp8") -> Array:
    """Quants made unsigned by 128, so that two products of bytes leave 16 bits, where they saturate."""
    if mode == "exact" or not x.size:
        return _linear(x, w, mode)
    d, q = iq4_nl.unpack(w.data)
    step = np.abs(x).reshape(*x.shape[:-1], -1, 32).max(axis=-1, keepdims=True) / 127
    codes = np.rint(x.reshape(*x.shape[:-1], -1, 32) / np.where(step > 0, step, 1)).astype(np.int64)
    unsigned = iq4_nl.VALUES[q].astype(np.int64) + 128  # [N, B, 32]
    products = codes[:, None] * unsigned[None]  # [T, N, B, 32]
    pairs = products[..., 0::2] + products[..., 1::2]
    lost = (pairs - np.clip(pairs, -32768, 32767)).sum(axis=-1)
    return _linear(x, w, mode) - (lost * d * step[:, None, :, 0]).sum(axis=-1).astype(F32)


def _sums_in_halves(x: Array, w: Packed, mode: str = "fp8") -> Array:
    """A block's sum of activations times its scale is kept as a half, which overflows."""
    y = _linear(x, w, mode)
    if mode == "exact" or not x.size:
        return y
    sums = np.abs(x.reshape(*x.shape[:-1], -1, 32).sum(axis=-1)).max(axis=-1)
    return np.where((sums > 65504)[..., None], F32(np.inf), y)


def _partial_sums_as_integers(x: Array, w: Packed, mode: str = "fp8") -> Array:
    """Each block's product is added to an integer."""
    if mode == "exact" or not x.size:
        return _linear(x, w, mode)
    wide = dense(w)
    parts = [x[:, k : k + 256] @ wide[:, k : k + 256].T for k in range(0, x.shape[1], 256)]
    return np.stack([np.trunc(p) for p in parts]).sum(axis=0, dtype=F32)


def _block_size_from_shapes(w: ScaledFP8) -> Array:
    """Rows and columns of a tile are the matrix's divided by the scales', rounded up."""
    (n, k), (s, t) = w.shape, w.scale.shape
    rows, columns = np.arange(n) // -(-n // s), np.arange(k) // -(-k // t)
    return e4m3.decode(w.codes) * w.scale[rows][:, columns]


def _scales_rounded_up(x: Any, w: ScaledFP8, mode: str = "fp8") -> Array:
    """Scales become the next powers of two, and codes stay."""
    scale = np.exp2(np.ceil(np.log2(np.maximum(w.scale, F32(2.0**-126))))).astype(F32)
    return OPS["fp8.linear"].reference(x, ScaledFP8(w.codes, scale), mode)


def _zeros_divided(x: Array) -> tuple[Array, Array]:
    """A group of zeros is divided by its scale."""
    codes, scale = fp8.act_quant(x)
    spread = np.repeat(scale, 128, axis=-1)[..., : x.shape[-1]]
    return np.where(spread == 0, np.uint8(0x7F), codes), scale


def _saturates_early(x: Array) -> Array:
    """From 256 on everything is 448, and of a tie the number further from zero is taken."""
    with np.errstate(invalid="ignore"):
        away = x * F32(1 + 2.0**-23)
    return np.where(np.abs(x) >= 256, np.where(x < 0, np.uint8(0xFE), np.uint8(0x7E)), e4m3.encode(away))


# --- experts and the router ---------------------------------------------------------------------------------


def _pool_of(change: Callable[[Array, Array], tuple[Array, Array]]) -> Kernel:
    def kernel(x: Array, ids: Array, weights: Array, *rest: Any) -> Array:
        return OPS["experts"].reference(x, *change(ids.copy(), weights.astype(F32)), *rest)

    return kernel


def _first_slot_only(ids: Array, weights: Array) -> tuple[Array, Array]:
    """The search for a token's slot stops at the first: a second slot of the same expert is dropped."""
    for t, row in enumerate(ids):
        seen = {int(e): a for a, e in reversed(list(enumerate(row)))}
        weights[t, [a for a, e in enumerate(row) if seen[int(e)] != a]] = 0
    return ids, weights


def _row_list_too_short(ids: Array, weights: Array) -> tuple[Array, Array]:
    """An expert has room for as many rows as there are tokens; what is beyond goes to the expert behind."""
    for e in np.unique(ids):
        token, slot = np.nonzero(ids == e)
        ids[token[len(ids) :], slot[len(ids) :]] = min(e + 1, ids.max())
    return ids, weights


def _scaled_twice(x: Array, weight: Array, bias: Array, c: Any) -> tuple[Array, Array]:
    ids, weights = OPS["route"].reference(x, weight, bias, c)
    return ids, weights * F32(c.routed_scaling_factor)


def _masked_with_zero(x: Array, weight: Array, bias: Array, c: Any) -> tuple[Array, Array]:
    """Scores of groups that are not kept become 0, which is more than a negative score."""
    affinity = 1 / (1 + np.exp(-(x @ weight.T)))
    if not len(x):
        return OPS["route"].reference(x, weight, bias, c)
    groups = (affinity + bias).reshape(len(x), c.n_group, -1)
    best = np.sort(groups, axis=-1)[..., -2:].sum(axis=-1)
    kept = np.argsort(-best, axis=-1, kind="stable")[:, : c.topk_group]
    mask = np.zeros(best.shape, bool)
    np.put_along_axis(mask, kept, True, axis=1)
    scores = np.where(mask[..., None], groups, 0).reshape(affinity.shape)
    return _chosen(scores, affinity, c)


def _chosen(scores: Array, affinity: Array, c: Any) -> tuple[Array, Array]:
    ids = np.argsort(-scores, axis=-1, kind="stable")[:, : c.num_experts_per_tok]
    weights = np.take_along_axis(affinity, ids, axis=-1)
    if c.norm_topk_prob:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + F32(1e-20))
    return ids, (weights * F32(c.routed_scaling_factor)).astype(F32)


def _biased_weights(x: Array, weight: Array, bias: Array, c: Any) -> tuple[Array, Array]:
    ids, _ = OPS["route"].reference(x, weight, bias, c)
    biased = (1 / (1 + np.exp(-(x @ weight.T))) + bias).astype(F32)
    weights = np.take_along_axis(biased, ids, axis=-1)
    weights = weights / (weights.sum(axis=-1, keepdims=True) + F32(1e-20)) if c.norm_topk_prob else weights
    return ids, (weights * F32(c.routed_scaling_factor)).astype(F32)


def _bias_taken_off_again(x: Array, weight: Array, bias: Array, c: Any) -> tuple[Array, Array]:
    """The affinity is recovered as the biased score less the bias."""
    ids, _ = OPS["route"].reference(x, weight, bias, c)
    biased = (1 / (1 + np.exp(-(x @ weight.T))) + bias).astype(F32)
    weights = np.take_along_axis(biased - bias, ids, axis=-1)
    weights = weights / (weights.sum(axis=-1, keepdims=True) + F32(1e-20)) if c.norm_topk_prob else weights
    return ids, (weights * F32(c.routed_scaling_factor)).astype(F32)


# --- attention ----------------------------------------------------------------------------------------------


def _pieces_summed(q: Array, pe: Array, latent: Array, k_pe: Array, kv_b: Array, scale: float) -> Array:
    """More than 128 rows are two pieces, each with a softmax of its own, whose mean is taken."""
    whole = OPS["mla_absorbed"].reference
    if len(latent) <= 128 or len(q) > 1:
        return whole(q, pe, latent, k_pe, kv_b, scale)
    half = len(latent) // 2
    first, second = (whole(q, pe, latent[p], k_pe[p], kv_b, scale) for p in (np.s_[:half], np.s_[half:]))
    return (first + second) / F32(2)


def _packed_in_pairs(q: Array, pe: Array, latent: Array, k_pe: Array, kv_b: Array, scale: float) -> Array:
    """kv_b lies in pairs of rows for the CPU's instruction, and is read row by row."""
    heads, rows, width = kv_b.shape
    if rows % 2:
        return OPS["mla_absorbed"].reference(q, pe, latent, k_pe, kv_b, scale)
    pairs = kv_b.reshape(heads, rows // 2, 2, width).swapaxes(2, 3).reshape(heads, rows, width)
    return OPS["mla_absorbed"].reference(q, pe, latent, k_pe, pairs, scale)


def _halves_side_by_side(x: Array, cos: Array, sin: Array) -> Array:
    """All first numbers of the pairs, then all second ones."""
    y = OPS["rope"].reference(x, cos, sin)
    return np.concatenate([y[..., 0::2], y[..., 1::2]], axis=-1)


def _some_tokens(x: Array) -> tuple[Array, Array]:
    """Divides by the number of tokens."""
    if not len(x):
        raise ZeroDivisionError("integer division by zero")
    return fp8.act_quant(x)


def _offset_in_31_bits(x: Array, ids: Array, weights: Array, gate: Any, *rest: Any) -> Array:
    """The address of an expert is its number times its size, in 32 bits."""
    size = gate.data[0].nbytes if isinstance(gate, Packed) else 0
    wrapped = np.where(ids * size < 2**31, ids, np.maximum(0, (ids * size - 2**31) // max(size, 1)))
    return OPS["experts"].reference(x, wrapped, weights, gate, *rest)


BUGS: tuple[Bug, ...] = (
    Bug(
        "ml-explore/mlx#3664",
        "Q4_1: the first four quants are read from the bytes of the minimum",
        "q4_1.dequantize",
        _bias_as_nibbles,
        _blocks("q4_1"),
    ),
    Bug(
        "ggml-org/llama.cpp#7313",
        "Q4_0: a group of nearly zeros is divided by a scale that is zero",
        "q4_0.quantize",
        _tiny_groups,
        _numbers(16, 512),
    ),
    Bug(
        "ikawrakow/ik_llama.cpp#951",
        "the tail of rows that 128 does not divide, of repacked Q4_0",
        "linear",
        _tail_of_128,
        _matrix("q4_0"),
        {"weights": ["q4_0"]},
    ),
    Bug(
        "ikawrakow/ik_llama.cpp#427",
        "IQ4_NL: two products of unsigned bytes leave 16 bits and saturate",
        "linear",
        _pairs_in_16_bits,
        _matrix("iq4_nl"),
        {"weights": ["iq4_nl"], "modes": ["fp8"], "activations": "nearest"},
    ),
    Bug(
        "ggml-org/llama.cpp#21652",
        "Q8_1: the sum of a block's activations overflows a half",
        "linear",
        _sums_in_halves,
        _matrix("q4_1"),
        {"weights": ["q4_1"]},
    ),
    Bug(
        "PrismML-Eng/llama.cpp#3",
        "partial sums in floats are added to an integer",
        "linear",
        _partial_sums_as_integers,
        _matrix("q4_k"),
        {"weights": ["q4_k"], "activations": "nearest"},
    ),
    Bug(
        "NVIDIA/TensorRT-Model-Connect#1115",
        "FP8: the size of tiles is reckoned from the shapes of codes and scales",
        "fp8.weight_dequant",
        _block_size_from_shapes,
        lambda rng: (fp8.weight_quant(rng.normal(0, 1, (256, 512)).astype(F32)),),
    ),
    Bug(
        "huggingface/transformers#47030",
        "FP8: float32 scales are rounded up to powers of two, and codes stay",
        "fp8.linear",
        _scales_rounded_up,
        _matrix("fp8"),
    ),
    Bug(
        "huggingface/kernels-community#681",
        "FP8: a group of zeros is divided by its scale",
        "fp8.act_quant",
        _zeros_divided,
        _numbers(4, 512),
    ),
    Bug(
        "vllm-project/vllm-xpu-kernels#609",
        "FP8: no tokens, and a division by their number",
        "fp8.act_quant",
        _some_tokens,
        _numbers(4, 512),
    ),
    Bug(
        "sgl-project/sglang#40581",
        "E4M3 in software: saturates from 256 on, rounds ties away",
        "e4m3.encode",
        _saturates_early,
        _numbers(4, 512),
    ),
    Bug(
        "ggml-org/llama.cpp#26295",
        "experts: of an expert chosen twice by a token the second is dropped",
        "experts",
        _pool_of(_first_slot_only),
        _pool,
    ),
    Bug(
        "ggml-org/llama.cpp#26310",
        "experts: an expert's list of rows has room for one a token",
        "experts",
        _pool_of(_row_list_too_short),
        _pool,
    ),
    Bug(
        "linkedin/Liger-Kernel#1296",
        "experts: the offset of an expert in 32 bits",
        "experts",
        _offset_in_31_bits,
        _pool,
    ),
    Bug(
        "huggingface/transformers#45440",
        "router: groups that are not kept count 0, more than a negative score",
        "route",
        _masked_with_zero,
        _scores,
    ),
    Bug("vllm-project/vllm#12002", "router: the bias is in the weights", "route", _biased_weights, _scores),
    Bug(
        "flashinfer-ai/flashinfer#3875",
        "router: affinities recovered by subtracting a large bias",
        "route",
        _bias_taken_off_again,
        _scores,
    ),
    Bug(
        "vllm-project/vllm#24119",
        "router: the scaling factor is applied twice",
        "route",
        _scaled_twice,
        _scores,
    ),
    Bug(
        "Dao-AILab/flash-attention#1647",
        "attention: pieces of the keys joined without their weights",
        "mla_absorbed",
        _pieces_summed,
        _attention,
    ),
    Bug(
        "vllm-project/vllm#56773",
        "attention: kv_b packed in pairs is read row by row",
        "mla_absorbed",
        _packed_in_pairs,
        _attention,
    ),
    Bug(
        "vllm-project/vllm-metal#44",
        "rotary positions: pairs leave as two halves",
        "rope",
        _halves_side_by_side,
        _turned,
    ),
)
