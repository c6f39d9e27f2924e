"""Faults that only real sizes show: each is right for small shapes, and has been seen in kernels like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl import ops
from refimpl.conformance.selftest.mutant import Mutant

Kernel = Callable[..., Any]
Array = np.ndarray


def _linear(change: Callable[[Kernel, Array, Any, tuple], Array]) -> Callable[[Kernel], Kernel]:
    """A kernel of x and a weight, from what a fault makes of both."""
    return lambda f: lambda x, w, *mode: change(f, x, w, mode)


def _columns(x: Array, part: slice) -> Array:
    """x, with zeros outside these columns."""
    y = np.zeros_like(x)
    y[..., part] = x[..., part]
    return y


def _cut(f: Kernel, x: Array, w: Any, mode: tuple) -> Array:
    """Columns from 1,024 on are not read."""
    return f(_columns(x, np.s_[:1024]), w, *mode)


def _half_partials(f: Kernel, x: Array, w: Any, mode: tuple) -> Array:
    """From 4,096 columns on two parts are added, the first in half precision."""
    k = x.shape[-1]
    if k < 4096:
        return f(x, w, *mode)
    first = f(_columns(x, np.s_[: k // 2]), w, *mode).astype(np.float16).astype(np.float32)
    return first + f(_columns(x, np.s_[k // 2 :]), w, *mode)


def _tail(f: Kernel, x: Array, w: Any, mode: tuple) -> Array:
    """Rows past the first 2,048 are left over."""
    y = f(x, w, *mode)
    y[..., 2048:] = 0
    return y


def _fifteenth(f: Kernel, x: Array, w: Any, mode: tuple) -> Array:
    """Tokens in sixteens; of fifteen the last is the one before it."""
    y = f(x, w, *mode)
    if len(x) % 16 == 15:
        y[-1] = y[-2]
    return y


def _sixty_fourth(f: Kernel, x: Array, w: Any, mode: tuple) -> Array:
    """From 64 tokens on the last tile is not masked."""
    y = f(x, w, *mode)
    if len(x) >= 64:
        y[-1] = 0
    return y


def _split_twice(f: Kernel, x: Array, w: Any, mode: tuple) -> Array:
    """Two parts of an odd number of blocks, more than three, share one."""
    y, blocks = f(x, w, *mode), x.shape[-1] // 128
    if blocks > 3 and blocks % 2 and not x.shape[-1] % 128:
        y = y + f(_columns(x, np.s_[blocks // 2 * 128 : blocks // 2 * 128 + 128]), w, *mode)
    return y


def _ulp(f: Kernel, x: Array, w: Any, mode: tuple) -> Array:
    """From 2,048 columns on every 97th result is one unit in the last place too large."""
    y = f(x, w, *mode)
    if x.shape[-1] >= 2048:
        y.reshape(-1)[::97] = np.nextafter(y.reshape(-1)[::97], np.float32(np.inf))
    return y


def _percent(f: Kernel, x: Array, w: Any, mode: tuple) -> Array:
    """A ten-thousandth too large, as a wrong constant makes it."""
    return f(x, w, *mode) * np.float32(1.0001)


def _sixteen_bits(f: Kernel) -> Kernel:
    """Blocks of 256 are counted in 16 bits."""

    def kernel(data: Array) -> Array:
        y = f(data)
        y = y.copy()
        y[..., 2**24 :] = 0
        return y

    return kernel


def _ids_in_16_bits(f: Kernel) -> Kernel:
    """Token ids are kept in 16 bits: of a vocabulary of 129,280 the second half is read from the first."""
    return lambda table, ids: f(table, np.asarray(ids) & 0xFFFF)


def _rows_in_16_bits(f: Kernel) -> Kernel:
    """Rows past the 65,536th are not written."""

    def kernel(x: Array, *rest: Any) -> Any:
        y = f(x, *rest)
        for part in y if isinstance(y, tuple) else (y,):
            part[65536:] = 0
        return y

    return kernel


def _experts(change: Callable[[Array, Array], tuple[Array, Array]]) -> Callable[[Kernel], Kernel]:
    """A kernel of experts, from what a fault makes of ids and weights."""
    return lambda f: lambda x, ids, weights, *rest: f(x, *change(ids.copy(), weights.copy()), *rest)


def _seven_bits(ids: Array, weights: Array) -> tuple[Array, Array]:
    """Ids in signed bytes, whose sign is dropped."""
    return ids & 127, weights


def _sixty_four(ids: Array, weights: Array) -> tuple[Array, Array]:
    """An expert has room for 64 tokens; the others are dropped."""
    for e in np.unique(ids):
        token, slot = np.nonzero(ids == e)
        weights[token[64:], slot[64:]] = 0
    return ids, weights


def _pairs_of_choices(ids: Array, weights: Array) -> tuple[Array, Array]:
    """Choices two by two; the last of five and of seven is left over."""
    if ids.shape[1] > 4 and ids.shape[1] % 2:
        weights[:, -1] = 0
    return ids, weights


def _positive(ids: Array, weights: Array) -> tuple[Array, Array]:
    """Weights are taken for probabilities."""
    return ids, np.maximum(weights, 0)


def _attention(change: Callable[..., Array]) -> Callable[[Kernel], Kernel]:
    """A kernel of attention, from what a fault makes of its arguments."""
    return lambda f: lambda *args: change(f, *args)


def _half_of_the_latents(f: Kernel, q: Array, q_pe: Array, c: Array, k: Array, b: Array, s: float) -> Array:
    """Attention reads 256 of 512 latents."""
    b = b.copy()
    b[..., 256:] = 0
    return f(q, q_pe, c, k, b, s)


def _not_rescaled(f: Kernel, q: Array, q_pe: Array, c: Array, k: Array, b: Array, s: float) -> Array:
    """Pieces of 256 keys are joined as if they weighed the same."""
    if len(c) <= 256 + len(q):
        return f(q, q_pe, c, k, b, s)
    early = len(c) - 256
    return (f(q, q_pe, c[:early], k[:early], b, s) + f(q, q_pe, c[early:], k[early:], b, s)) / 2


def _last_of_128(f: Kernel, q: Array, q_pe: Array, c: Array, k: Array, b: Array, s: float) -> Array:
    """Queries of 128 are split at 127."""
    q = q.copy()
    q[..., 127:] = 0
    return f(q, q_pe, c, k, b, s)


def _recent(f: Kernel, q: Array, q_pe: Array, c: Array, k: Array, b: Array, s: float) -> Array:
    """Only the last 1,024 rows of the cache are seen."""
    return f(q, q_pe, c[-1024:], k[-1024:], b, s)


def _heads_in_64(f: Kernel, q: Array, q_pe: Array, c: Array, k: Array, b: Array, s: float) -> Array:
    """Heads past the 64th read the matrices of the first."""
    return f(q, q_pe, c, k, b[np.arange(len(b)) % 64], s)


def _seven_angles(f: Kernel) -> Kernel:
    """A table of angles for forty tokens."""

    def turned(table: Array) -> Array:
        places = np.arange(len(table))
        return table[np.where(places < 40, places, 0)]

    return lambda x, cos, sin: f(x, turned(cos), turned(sin))


def _last_group(f: Kernel) -> Kernel:
    """The last group is never chosen where there are more than 128 experts."""

    def kernel(x: Array, weight: Array, bias: Array, c: Any) -> Any:
        bias = np.where(np.arange(len(bias)) < 224, bias, np.float32(-1e9)) if len(bias) > 128 else bias
        return f(x, weight, bias.astype(np.float32), c)

    return kernel


def _norm_of_4096(f: Kernel) -> Kernel:
    """The squares of the first 4,096 columns."""

    def kernel(x: Array, weight: Array, eps: float) -> Array:
        if x.shape[-1] <= 4096:
            return f(x, weight, eps)
        mean = np.mean(np.square(x[..., :4096]), axis=-1, keepdims=True, dtype=np.float32)
        return (x / np.sqrt(mean + np.float32(eps)) * weight).astype(np.float32)

    return kernel


def _at_size(name: str, op: str, wrap: Callable[[Kernel], Kernel], **declared: Any) -> Mutant:
    return Mutant(name, op, lambda: wrap(ops.load(op, "cpu")), declared)


SIZE_FAULTS = (
    _at_size("columns past 1,024 cut off", "linear", _linear(_cut), weights=("fp8",)),
    _at_size("half precision from 4,096 columns", "linear", _linear(_half_partials), weights=("q4_k",)),
    _at_size("rows past 2,048 left over", "linear", _linear(_tail), weights=("q4_k",)),
    _at_size("fifteen tokens of sixteen", "linear", _linear(_fifteenth), weights=("fp8",)),
    _at_size("last tile of 64 tokens", "linear", _linear(_sixty_fourth), weights=("q4_k",)),
    _at_size("middle block of an odd number twice", "linear", _linear(_split_twice), weights=("fp8",)),
    _at_size("one unit in the last place", "linear", _linear(_ulp), weights=("fp8",)),
    _at_size("a ten-thousandth too large", "linear", _linear(_percent), weights=("q4_k",)),
    _at_size("blocks counted in 16 bits", "q4_k.dequantize", _sixteen_bits),
    _at_size("tokens in 16 bits", "embed", _ids_in_16_bits, weights=("fp8",)),
    _at_size("rows counted in 16 bits", "fp8.act_quant", _rows_in_16_bits),
    _at_size("tokens counted in 16 bits", "rms_norm", _rows_in_16_bits),
    _at_size("angles counted in 16 bits", "rope", _rows_in_16_bits),
    _at_size("ids in seven bits", "experts", _experts(_seven_bits)),
    _at_size("an expert's tokens past 64 dropped", "experts", _experts(_sixty_four)),
    _at_size("an odd last choice dropped", "experts", _experts(_pairs_of_choices)),
    _at_size("negative weights are zero", "experts", _experts(_positive)),
    _at_size("half of 512 latents", "mla_absorbed", _attention(_half_of_the_latents)),
    _at_size("pieces of keys joined without rescaling", "mla_absorbed", _attention(_not_rescaled)),
    _at_size("128 split at 127", "mla_absorbed", _attention(_last_of_128)),
    _at_size("rows past 1,024 forgotten", "mla_absorbed", _attention(_recent)),
    _at_size("heads past 64 read the first ones", "mla_absorbed", _attention(_heads_in_64)),
    _at_size("angles of the first token from the fortieth on", "rope", _seven_angles),
    _at_size("last group of 256 experts never chosen", "route", _last_group),
    _at_size("mean of the first 4,096 squares", "rms_norm", _norm_of_4096),
)
