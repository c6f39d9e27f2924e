"""Metamorphic laws: other inputs whose results follow from the first ones, whatever the truth is.

A relation names the other inputs and how their results become comparable with the first. Where arithmetic
makes it exact, bits are compared; else both sides may be off by their own bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from refimpl import formats
from refimpl.conformance.inputs import arrays, draws
from refimpl.formats import int4
from refimpl.reference.int4 import scales
from refimpl.tensors import Packed, ScaledFP8, ScaledInt4

Rng = np.random.Generator
View = Callable[[np.ndarray], np.ndarray]


def _same(y: np.ndarray) -> np.ndarray:
    return y


class Relation(NamedTuple):
    """`back` of each result of f(args) equals `view` of that result of the first call; a result with neither
    is not compared.
    """

    args: tuple
    back: View | tuple[View, ...] = _same
    view: View = _same
    exact: bool = False
    first: tuple | None = None  # the first inputs, where they are not the drawn ones


class Reach(NamedTuple):
    """With these inputs exactly the elements of the mask are not finite, and the others are what they
    were.
    """

    args: tuple
    masks: tuple[np.ndarray, ...]


# --- powers of two: no rounding changes ---------------------------------------------------------------------


def _times(power: int) -> np.float32:
    return np.float32(2.0**power)


def _power(rng: Rng) -> int:
    return int(rng.choice([-3, -1, 1, 2, 4]))


def scaled_blocks(op: str, args: tuple, rng: Rng, m: Any) -> list[Relation]:
    """All scales of the blocks times a power of two; scales that would leave the normal halves are replaced
    first.
    """
    module = draws.FORMATS[op.partition(".")[0]]
    if not draws.scale_fields(module):
        return []
    first = args[0].copy()
    b = first.view(module.BLOCK)
    for name in draws.scale_fields(module):
        b[name] = np.ldexp(rng.integers(-1024, 1025, b.shape), -8)
    power, second = _power(rng), first.copy()
    for name in draws.scale_fields(module):
        second.view(module.BLOCK)[name] *= 2.0**power
    return [Relation((second,), lambda y: y / _times(power), exact=True, first=(first,))]


def scaled_first(op: str, args: tuple, rng: Rng, m: Any) -> list[Relation]:
    """The first argument times a power of two."""
    power = _power(rng)
    return [Relation((args[0] * _times(power), *args[1:]), lambda y: y / _times(power), exact=True)]


def scaled_x(op: str, args: tuple, rng: Rng, m: Any) -> list[Relation]:
    """Activations times a power of two: their scales take it, their codes stay. Then the scales of the
    weight.
    """
    x, w, mode = args
    power = _power(rng)
    x = np.where(x == 0, 0, np.copysign(np.clip(np.abs(x), 2.0**-3, 2.0**6), x)).astype(
        np.float32
    )  # scales stay normal halves
    found = [
        Relation((x * _times(power), w, mode), lambda y: y / _times(power), exact=True, first=(x, w, mode))
    ]
    if can_be_scaled(w):
        found.append(
            Relation((x, scaled_weight(w, 3), mode), lambda y: y / 8, exact=True, first=(x, w, mode))
        )
    return found


def can_be_scaled(w: Any) -> bool:
    """Whether `scaled_weight` knows how: not for blocks without a float that are only decoded."""
    module = formats.get(w.ggml_type) if isinstance(w, Packed) else None
    return module is None or bool(draws.scale_fields(module)) or hasattr(module, "quantize")


def scaled_weight(w: Any, power: int) -> Any:
    """A weight times a power of two: exact for positive powers, and for others where no half becomes
    subnormal.
    """
    if isinstance(w, ScaledFP8):
        return ScaledFP8(w.codes, w.scale * _times(power))
    if isinstance(w, ScaledInt4):
        return ScaledInt4(w.codes, draws.bf16_bits(scales(w) * _times(power)))
    if not isinstance(w, Packed):
        return w * _times(power) if isinstance(w, np.ndarray) else [scaled_weight(e, power) for e in w]
    module = formats.get(w.ggml_type)
    if not draws.scale_fields(module):
        return Packed(module.quantize(module.dequantize(w.data) * _times(power)), w.ggml_type, w.shape)
    data = w.data.copy()
    for name in draws.scale_fields(module):
        data.view(module.BLOCK)[name] *= 2.0**power
    return Packed(data, w.ggml_type, w.shape)


def scaled_down(op: str, args: tuple, rng: Rng, m: Any) -> list[Relation]:
    """The last matrix times a power of two."""
    x, gate, up, down, mode = args
    return [Relation((x, gate, up, scaled_weight(down, 3), mode), lambda y: y / 8, exact=True)]


def scaled_shares(op: str, args: tuple, rng: Rng, m: Any) -> list[Relation]:
    """Routing weights times a power of two."""
    power = _power(rng)
    return [
        Relation(
            (args[0], args[1], args[2] * _times(power), *args[3:]), lambda y: y / _times(power), exact=True
        )
    ]


def scaled_norm(op: str, args: tuple, rng: Rng, m: Any) -> list[Relation]:
    """x times 2^k, eps times 4^k: the same result."""
    x, weight, eps = args
    power, eps = _power(rng), 2.0**-20
    return [Relation((x * _times(power), weight, eps * 4.0**power), exact=True, first=(x, weight, eps))]


def scaled_up(op: str, args: tuple, rng: Rng, m: Any) -> list[Relation]:
    """The second half of the columns times a power of two: the same codes, scales times the power."""
    power, (x,) = _power(rng), args
    turned = np.concatenate([x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :] * _times(power)], axis=1)
    return [Relation((turned,), (_same, lambda s: s / _times(power)), exact=True)]


def scaled_query(op: str, args: tuple, rng: Rng, m: Any) -> list[Relation]:
    """Queries times a power of two, the scale divided by it: the same scores."""
    power = _power(rng)
    return [
        Relation(
            (args[0] * _times(power), args[1] * _times(power), *args[2:5], args[5] / 2.0**power, *args[6:]),
            exact=m.scaling == "scores",
        )
    ]


def scaled_groups(op: str, args: tuple, rng: Rng, m: Any) -> list[Relation]:
    """All of x times a power of two: codes stay as they are, and scales are multiplied by that power. There
    is no relation where the kernel has a least scale, or a power might leave the normal numbers.
    """
    power, size = _power(rng), np.abs(args[0])
    if m.least or not ((size == 0) | ((size > 2.0**-60) & (size < 2.0**60))).all():
        return []
    return [Relation((args[0] * _times(power),), (_same, lambda s: s / _times(power)), exact=True)]


def scaled_tiles(op: str, args: tuple, rng: Rng, m: Any) -> list[Relation]:
    """The scales of an FP8 matrix times a power of two."""
    power = _power(rng)
    return [Relation((scaled_weight(args[0], power),), lambda y: y / _times(power), exact=True)]


# --- permutations and stacks --------------------------------------------------------------------------------


def permuted_blocks(op: str, args: tuple, rng: Rng, m: Any) -> list[Relation]:
    """Blocks of a row in another order."""
    module = draws.FORMATS[op.partition(".")[0]]
    size = module.BLOCK.itemsize
    blocks = (
        args[0].reshape(*args[0].shape[:-1], -1, size)
        if args[0].size
        else args[0].reshape(*args[0].shape[:-1], 0, size)
    )
    order = rng.permutation(blocks.shape[-2])

    def permute(y: np.ndarray) -> np.ndarray:
        return y.reshape(*y.shape[:-1], len(order), y.shape[-1] // max(1, len(order)))[..., order, :].reshape(
            y.shape
        )

    return (
        [Relation((blocks[..., order, :].reshape(args[0].shape),), view=permute, exact=True)]
        if args[0].size
        else []
    )


def permuted_last(op: str, args: tuple, rng: Rng, m: Any) -> list[Relation]:
    """Elements of the last axis in another order give the same results in that order."""
    order = rng.permutation(args[0].shape[-1])
    return [Relation((args[0][..., order],), view=lambda y: y[..., order], exact=True)]


def permuted_linear(op: str, args: tuple, rng: Rng, m: Any) -> list[Relation]:
    """Rows of the weight in another order (FP8: whole rows of tiles), and blocks of columns together with
    those of x.
    """
    x, w, mode = args
    found = []
    if not isinstance(w, ScaledFP8):
        order = rng.permutation(w.shape[0])
        turned = _taken(w, order)
        found.append(Relation((x, turned, mode), view=lambda y: y[..., order]))
    elif not w.shape[0] % 128:
        tiles = rng.permutation(w.shape[0] // 128)
        rows = (tiles[:, None] * 128 + np.arange(128)).reshape(-1)
        found.append(
            Relation((x, ScaledFP8(w.codes[rows], w.scale[tiles]), mode), view=lambda y: y[..., rows])
        )
    return found + _permuted_columns(x, w, mode, rng)


def _taken(w: Any, rows: np.ndarray) -> Any:
    """Rows of a weight that is not FP8, in this order."""
    if isinstance(w, ScaledInt4):
        return ScaledInt4(w.codes[rows], w.scale[rows])
    return Packed(w.data[rows], w.ggml_type, w.shape) if isinstance(w, Packed) else w[rows]


def _permuted_columns(x: np.ndarray, w: Any, mode: str, rng: Rng) -> list[Relation]:
    width = (
        128
        if isinstance(w, ScaledFP8)
        else max(32, formats.get(w.ggml_type).WEIGHTS)
        if isinstance(w, Packed)
        else int4.GROUP
        if isinstance(w, ScaledInt4)
        else 1
    )
    if x.shape[-1] % width or x.shape[-1] == width:
        return []
    order = rng.permutation(x.shape[-1] // width)
    columns = (order[:, None] * width + np.arange(width)).reshape(-1)
    if isinstance(w, ScaledFP8):
        turned: Any = ScaledFP8(w.codes[:, columns], w.scale[:, order])
    elif isinstance(w, ScaledInt4):
        codes = w.codes.reshape(len(w.codes), len(order), -1)[:, order].reshape(w.codes.shape)
        turned = ScaledInt4(codes, np.ascontiguousarray(w.scale[:, order]))
    elif isinstance(w, Packed):
        turned = Packed(
            w.data.reshape(len(w.data), len(order), -1)[:, order].reshape(w.data.shape), w.ggml_type, w.shape
        )
    else:
        turned = w[:, columns]
    return [Relation((np.ascontiguousarray(x[..., columns]), turned, mode))]


def permuted_heads(op: str, args: tuple, rng: Rng, m: Any) -> list[Relation]:
    """Attention's heads in another order give the same results in that order. There is no relation where
    tiles of kv_b lie across heads.
    """
    if isinstance(args[4], ScaledFP8):
        return []
    order = rng.permutation(args[0].shape[1])
    return [
        Relation(
            (args[0][:, order], args[1][:, order], args[2], args[3], args[4][order], *args[5:]),
            view=lambda y: y[:, order],
        )
    ]


def relabelled_experts(op: str, args: tuple, rng: Rng, m: Any) -> list[Relation]:
    """Experts stored in another order, ids to match: the same result."""
    x, ids, weights, *sides, mode = args
    count = len(sides[0].data) if isinstance(sides[0], Packed) else len(sides[0])
    order = rng.permutation(count)
    turned = [
        Packed(s.data[order], s.ggml_type, s.shape) if isinstance(s, Packed) else [s[e] for e in order]
        for s in sides
    ]
    return [Relation((x, np.argsort(order)[ids], weights, *turned, mode))]


def rows_alone(op: str, args: tuple, rng: Rng, m: Any) -> list[Relation]:
    """A row by itself, or as many as the kernel takes at least, gives what it gives among the others."""
    if args[0].ndim < 2 or not args[0].size:
        return []
    at = int(rng.integers(len(args[0])))
    return [
        Relation(
            (args[0][at : at + max(1, m.tokens)].copy(),),
            view=lambda y: y[at : at + max(1, m.tokens)],
            exact=True,
        )
    ]


def tokens_alone(op: str, args: tuple, rng: Rng, m: Any) -> list[Relation]:
    """One token (or as few as the kernel takes) out of the batch, with its own ids and shares."""
    few = max(1, m.tokens)
    if len(args[0]) <= few:
        return []
    at = int(rng.integers(len(args[0]) - few + 1))
    mine = slice(at, at + few)
    rest = (args[1][mine], args[2][mine], *args[3:]) if op.endswith("experts") else args[1:]
    return [Relation((args[0][mine].copy(), *rest), view=lambda y: y[mine])]


def rope_alone(op: str, args: tuple, rng: Rng, m: Any) -> list[Relation]:
    """One token with its own angles."""
    at = int(rng.integers(len(args[0])))
    return (
        [Relation(tuple(a[at : at + 1].copy() for a in args), view=lambda y: y[at : at + 1])]
        if m.tokens <= 1
        else []
    )


def queries_alone(op: str, args: tuple, rng: Rng, m: Any) -> list[Relation]:
    """A query with only the tokens it may look at."""
    t, s = len(args[0]), len(args[2])
    at = int(rng.integers(t))
    end = s - t + at + 1
    alone = (args[0][at : at + 1], args[1][at : at + 1], args[2][:end], args[3][:end], *args[4:6])
    alone += tuple(rows[at : at + 1, :end] for rows in args[6:])
    return [Relation(alone, view=lambda y: y[at : at + 1])] if m.tokens <= 1 else []


# --- parts of sums ------------------------------------------------------------------------------------------


def split_k(op: str, args: tuple, rng: Rng, m: Any) -> list[tuple[tuple, tuple]]:
    """x cut in two at a border of blocks: zeros quantize to zeros, so both parts add up to the whole."""
    x, w, mode = args
    at = 256 * int(rng.integers(1, 3))
    if at >= x.shape[-1]:
        at = 128 if isinstance(w, ScaledFP8) and x.shape[-1] > 128 else 0
    if not at:
        return []
    low, high = x.copy(), x.copy()
    low[..., at:], high[..., :at] = 0, 0
    return [((low, w, mode), (high, w, mode))]


def later_tokens(op: str, args: tuple, rng: Rng, m: Any) -> list[Relation]:
    """Tokens behind a query do not reach it."""
    t, s = len(args[0]), len(args[2])
    if t < 2:
        return []
    at = int(rng.integers(t - 1))
    latent, k_pe = args[2].copy(), args[3].copy()
    latent[s - t + at + 1 :] *= -3
    k_pe[s - t + at + 1 :] += 5
    return [Relation((*args[:2], latent, k_pe, *args[4:]), lambda y: y[: at + 1], lambda y: y[: at + 1])]


def unread_experts(op: str, args: tuple, rng: Rng, m: Any) -> list[Relation]:
    """Experts nobody chose may hold anything: NaN scales reach no result. One expert is picked, and the
    tokens that did not choose it stay.
    """
    x, ids, weights, *sides, mode = args
    count = len(sides[0].data) if isinstance(sides[0], Packed) else len(sides[0])
    stay = (ids != rng.integers(count)).all(axis=1)
    unused = sorted(set(range(count)) - set(ids[stay].reshape(-1).tolist()))
    if not unused or stay.sum() < max(1, m.tokens):
        return []
    few = x[stay], ids[stay], weights[stay]
    return [Relation((*few, *(_spoiled(s, unused) for s in sides), mode), first=(*few, *sides, mode))]


def _spoiled(stack: Any, which: list[int]) -> Any:
    if isinstance(stack, Packed):
        data = stack.data.copy()
        data[which] = 255
        return Packed(data, stack.ggml_type, stack.shape)
    return [_nothing(w) if e in which else w for e, w in enumerate(stack)]


def _nothing(w: Any) -> Any:
    if isinstance(w, Packed):
        return Packed(np.full_like(w.data, 255), w.ggml_type, w.shape)
    if isinstance(w, ScaledInt4):
        return ScaledInt4(w.codes, draws.bf16_bits(np.full(w.scale.shape, np.nan)))
    return (
        ScaledFP8(np.full_like(w.codes, 0x7F), w.scale)
        if isinstance(w, ScaledFP8)
        else np.full_like(w, np.nan)
    )


# --- what is no number --------------------------------------------------------------------------------------

NOT_FINITE = (np.nan, np.inf, -np.inf)


def _spoilt(
    args: tuple, where: tuple, masks: tuple[np.ndarray, ...], values: tuple[float, ...] = NOT_FINITE
) -> list[Reach]:
    """args[0] with each of these values at `where`."""
    found = []
    for value in values:
        x = args[0].copy()
        x[where] = value
        found.append(Reach((x, *args[1:]), masks))
    return found


def nan_in_a_token(op: str, args: tuple, rng: Rng, m: Any) -> list[Reach]:
    """A NaN or an infinity in one token shows in all its results, and in no other token's."""
    x = args[0]
    if not x.size or len(x) < max(2, m.tokens):
        return []
    t = int(rng.integers(len(x)))
    mask = np.zeros((len(x), _width(op, args)), bool)
    mask[t] = True
    # Divided by an infinite root, a token's other numbers are zeros.
    return _spoilt(
        args, (t, rng.integers(x.shape[-1])), (mask,), NOT_FINITE[:1] if op == "rms_norm" else NOT_FINITE
    )


def _width(op: str, args: tuple) -> int:
    return args[1].shape[0] if op.endswith("linear") else args[0].shape[-1]


def nan_in_a_group(op: str, args: tuple, rng: Rng, m: Any) -> list[Reach]:
    """act_quant: scale and code of that group alone; the other codes of the group are anything, so only the
    scale is asked for.
    """
    x = args[0]
    t, at = int(rng.integers(len(x))), int(rng.integers(x.shape[-1]))
    scales = np.zeros((len(x), -(-x.shape[-1] // 128)), bool)
    scales[t, at // 128] = True
    return _spoilt(args, (t, at), (scales,))


def nan_in_a_norm(op: str, args: tuple, rng: Rng, m: Any) -> list[Reach]:
    """rms_norm_quant: all scales of that token."""
    x = args[0]
    t = int(rng.integers(len(x)))
    scales = np.zeros((len(x), -(-x.shape[-1] // 128)), bool)
    scales[t] = True
    return _spoilt(args, (t, rng.integers(x.shape[-1])), (scales,), NOT_FINITE[:1])


def nan_in_a_half(op: str, args: tuple, rng: Rng, m: Any) -> list[Reach]:
    """swiglu_quant: the scale of the group in which gate and up meet."""
    x = args[0]
    hidden, t, at = x.shape[-1] // 2, int(rng.integers(len(x))), int(rng.integers(x.shape[-1]))
    scales = np.zeros((len(x), -(-hidden // 128)), bool)
    scales[t, at % hidden // 128] = True
    return _spoilt(args, (t, at), (scales,))


def nan_in_a_pair(op: str, args: tuple, rng: Rng, m: Any) -> list[Reach]:
    """rope: both numbers of the pair."""
    x = args[0]
    mask = np.zeros(x.shape, bool)
    pair = int(rng.integers(x.size // 2))
    mask.reshape(-1, 2)[pair] = True
    return _spoilt(args, np.unravel_index(2 * pair + int(rng.integers(2)), x.shape), (mask,))


def nan_in_a_query(op: str, args: tuple, rng: Rng, m: Any) -> list[Reach]:
    """Attention: that head of that query; a NaN in a key or a latent that all queries see all of them; one in
    a row of kv_b that makes keys all results of its head, and one in a row that makes values that number.
    """
    q, latent, k_pe, kv_b = args[0], args[2].copy(), args[3].copy(), args[4]
    heads, n = q.shape[1:]
    of_head = kv_b.shape[0] // heads if isinstance(kv_b, ScaledFP8) else kv_b.shape[1]
    t, h, row, key, value = (
        int(rng.integers(size)) for size in (*q.shape[:2], len(k_pe) - len(q) + 1, n, of_head - n)
    )
    one, head, number = (np.zeros((len(q), heads, of_head - n), bool) for _ in range(3))
    one[t, h], head[:, h], number[:, h, value] = True, True, True
    k_pe[row, rng.integers(k_pe.shape[1])] = latent[row, rng.integers(latent.shape[1])] = np.nan
    found = _spoilt(args, (t, h, rng.integers(n)), (one,))
    every = (np.ones(one.shape, bool),)
    found += [Reach((*args[:3], k_pe, *args[4:]), every), Reach((*args[:2], latent, *args[3:]), every)]
    for at, mask in ((key, head), (n + value, number)):
        spoilt = arrays.copy(kv_b)
        numbers = spoilt.codes if isinstance(spoilt, ScaledFP8) else spoilt.reshape(heads * of_head, -1)
        numbers[h * of_head + at, rng.integers(numbers.shape[1])] = (
            0x7F if isinstance(spoilt, ScaledFP8) else np.nan
        )
        found.append(Reach((*args[:4], spoilt, *args[5:]), (mask,)))
    return found


def nan_in_a_choice(op: str, args: tuple, rng: Rng, m: Any) -> list[Reach]:
    """The router: all weights of that token. An infinity may be a score of one."""
    x, chosen = args[0], args[3].num_experts_per_tok
    if not x.size:
        return []
    mask = np.zeros((len(x), chosen), bool)
    mask[t := int(rng.integers(len(x)))] = True
    return _spoilt(args, (t, int(rng.integers(x.shape[1]))), (mask,), (np.nan,))
