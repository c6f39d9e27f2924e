"""Numbers of which sums are exact: small integers times powers of two, so few and so small that no partial
sum reaches 2^24. Whatever the order, the blocking or the width of the accumulator, the result has the same
bits, at any size; so it is asked for with no tolerance at all.

Matrices of real sizes have few distinct rows, drawn anew for every row of the result: their truth costs that
of the distinct ones.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refimpl.conformance.inputs import draws
from refimpl.conformance.truth.bounds import dense
from refimpl.formats import e4m3, int4, iq4_xs, mxfp4, nvfp4, q4_0, q4_k, q6_k, q8_0
from refimpl.formats._blocks import pack_nibbles, pack_scales, to_bytes
from refimpl.tensors import FileWeight, Packed, ScaledFP8, ScaledInt4

Rng = np.random.Generator
DISTINCT = 67  # rows of a matrix
LIMIT = 2**24  # no sum of magnitudes reaches it, in units of the smallest step
PIN = {"e4m3": (128, 448), "e4m3_ue8m0": (128, 448), "q8_k": (256, 127), "q8_0": (32, 127)}
"""Of each layout of activations the group, and the code of its largest magnitude: with this number in a group
the step of its codes is one.
"""


ONES = {mxfp4: {"e": 128}, nvfp4: {"d": 0x40}}
"""Codes of a scale of one, of formats that store scales as codes."""


class Matrix(NamedTuple):
    """A weight [N, K]; `rows` f64 [R, K] its distinct rows without the scales of FP8 tiles, `which` [N] of
    them is each row; `sizes` as `rows`, magnitudes of what kernels may sum apart.
    """

    weight: FileWeight
    rows: np.ndarray
    sizes: np.ndarray
    which: np.ndarray


def activations(rng: Rng, layout: str, tokens: int, columns: int, density: float = 0.5) -> np.ndarray:
    """f32 [T, K]: integers from -3 to 3, half of them zero. Where they will be quantized, each group of each
    token has a power of two of its own, and a number that fixes its step.
    """
    x = rng.integers(-3, 4, (tokens, columns)) * (rng.random((tokens, columns)) < density)
    if layout == "exact":
        return x.astype(np.float32)
    width, top = PIN[layout]
    groups = -(-columns // width)
    at = np.minimum(np.arange(groups) * width + rng.integers(0, width, (tokens, groups)), columns - 1)
    np.put_along_axis(x, at, top * rng.choice([-1, 1], at.shape), axis=1)
    powers = np.repeat(rng.integers(-1, 1, (tokens, groups)), width, axis=1)[:, :columns]
    return np.ldexp(x.astype(np.float32), powers)


def ties(rng: Rng, layout: str, tokens: int, columns: int) -> np.ndarray:
    """f32 [T, K] that lie between two codes, beside a number in each group that makes the step one: of E4M3
    all codes up to 4, the subnormal ones too. What they are rounded to is exact, and so are sums of that.
    """
    width, top = PIN[layout]
    if layout in ("e4m3", "e4m3_ue8m0"):
        codes = e4m3.TABLE[:127][e4m3.TABLE[:127] <= 4]
        between = (codes[1:] + codes[:-1]) / 2
    else:
        between = np.arange(20) + 0.5
    x = rng.choice(between, (tokens, columns)) * rng.choice([-1, 1], (tokens, columns))
    for start in range(0, columns, width):
        x[np.arange(tokens), start + rng.integers(0, width, tokens)] = top * rng.choice([-1, 1], tokens)
    return x.astype(np.float32)


def matrix(rng: Rng, kind: str, rows: int, columns: int) -> Matrix:
    """A weight of that kind with DISTINCT rows of small integers, or of random codes under scales of 1/8."""
    which = rng.integers(0, DISTINCT, rows)
    if kind in ("fp8", "plain") or (kind != "int4" and not draws.FORMATS[kind].BLOCK.names):
        base = rng.integers(-3, 4, (DISTINCT, columns))
        return _of(kind, base, which, rng)
    if kind == "int4":
        codes = rng.integers(0, 256, (DISTINCT, columns // 2), np.uint8)
        powers = np.ldexp(1.0, rng.integers(-1, 2, (DISTINCT, columns // int4.GROUP)))
        few = ScaledInt4(codes, draws.bf16_bits(powers))
        return Matrix(ScaledInt4(few.codes[which], few.scale[which]), *dense(few), which)
    module = draws.FORMATS[kind]
    w = draws.packed(rng, module, DISTINCT, columns)
    blocks = w.data.view(module.BLOCK)
    for name in draws.scale_fields(module):
        blocks[name] = 2.0**-3
    for name, code in ONES.get(module, {}).items():
        blocks[name] = code
    if module is q6_k:
        blocks["scales"] //= 8  # else sums of magnitudes reach 2^24
    if module is iq4_xs:
        blocks["scales_h"], blocks["scales_l"] = 0xAAAA, blocks["scales_l"] & 0x77  # from 0 to 7, likewise
    exact, sizes = dense(w)
    return Matrix(Packed(w.data[which], w.ggml_type, (rows, columns)), exact, sizes, which)


def _of(kind: str, base: np.ndarray, which: np.ndarray, rng: Rng | None = None) -> Matrix:
    wide = base.astype(np.float64)
    return Matrix(of_integers(kind, base, which, rng), wide, np.abs(wide), which)


def of_integers(kind: str, base: np.ndarray, which: np.ndarray, rng: Rng | None = None) -> FileWeight:
    """The weight whose row n is exactly base[which[n]], integers from -7 to 7 [R, K]. With `rng` the tiles of
    FP8 have scales of 1/2, 1 and 2, else of 1.
    """
    shape = len(which), base.shape[1]
    if kind == "plain":
        return base.astype(np.float32)[which]
    if kind == "fp8":
        tiles = -(-shape[0] // 128), -(-shape[1] // 128)
        powers = rng.integers(-1, 2, tiles) if rng else np.zeros(tiles, int)
        return ScaledFP8(e4m3.encode(base.astype(np.float32))[which], np.ldexp(np.float32(1), powers))
    if kind == "int4":
        ones = draws.bf16_bits(np.ones((shape[0], shape[1] // int4.GROUP)))
        return ScaledInt4(int4.encode(base)[which], ones)
    module = draws.FORMATS[kind]
    pack = PACKERS.get(module)
    data = pack(base) if pack else module.quantize(base.astype(np.float32))
    return Packed(data[which], module.GGML_TYPE, shape)


def _q4_k(q: np.ndarray) -> np.ndarray:
    b = np.zeros((len(q), q.shape[1] // 256), q4_k.BLOCK)
    ones = np.ones((*b.shape, 8), np.uint8)
    b["d"], b["dmin"], b["scales"] = 1, 1, pack_scales(ones, 8 * ones)
    codes = (q + 8).astype(np.uint8).reshape(*b.shape, 4, 2, 32)
    b["qs"] = pack_nibbles(codes).reshape(*b.shape, 128)
    return to_bytes(b)


def _q6_k(q: np.ndarray) -> np.ndarray:
    b = np.zeros((len(q), q.shape[1] // 256), q6_k.BLOCK)
    b["d"], b["scales"] = 1, 1
    codes = (q + 32).astype(np.uint8).reshape(*b.shape, 2, 4, 32)
    b["ql"] = pack_nibbles((codes & 15).reshape(*b.shape, 2, 2, 64)).reshape(*b.shape, 128)
    high = (codes >> 4) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    b["qh"] = high.sum(axis=-2, dtype=np.uint8).reshape(*b.shape, 64)
    return to_bytes(b)


def _q8_0(q: np.ndarray) -> np.ndarray:
    b = np.zeros((len(q), q.shape[1] // 32), q8_0.BLOCK)
    b["d"], b["qs"] = 1, q.reshape(*b.shape, 32)
    return to_bytes(b)


def _q4_0(q: np.ndarray) -> np.ndarray:
    b = np.zeros((len(q), q.shape[1] // 32), q4_0.BLOCK)
    codes = (q + 8).astype(np.uint8).reshape(*b.shape, 2, 16)
    b["d"], b["qs"] = 1, codes[..., 0, :] | codes[..., 1, :] << 4
    return to_bytes(b)


PACKERS = {q4_k: _q4_k, q6_k: _q6_k, q8_0: _q8_0, q4_0: _q4_0}
"""Integers from -7 to 7 [R, K] -> u8 [R, bytes]: blocks that stand for exactly these."""


def product(rounded: np.ndarray, m: Matrix) -> np.ndarray:
    """f64 [T, N]: x [T, K] times the transpose of the matrix."""
    return _times(rounded, m.rows, m)


def magnitudes(rounded: np.ndarray, m: Matrix) -> np.ndarray:
    """f64 [T, N]: the sums of the magnitudes of what `product` adds up."""
    return _times(np.abs(rounded), m.sizes, m)


def _times(x: np.ndarray, rows: np.ndarray, m: Matrix) -> np.ndarray:
    """x [T, K] times the transpose of the distinct rows, under the scales of the matrix."""
    if not isinstance(m.weight, ScaledFP8):
        return (x @ rows.T)[:, m.which]
    y, tile = np.zeros((len(x), len(m.which))), np.arange(len(m.which)) // 128
    for block in range(m.weight.scale.shape[1]):
        part = np.s_[:, 128 * block : 128 * block + 128]
        y += (x[part] @ rows[part].T)[:, m.which] * m.weight.scale[tile, block].astype(np.float64)
    return y


# --- experts ------------------------------------------------------------------------------------------------

GATE = 32  # silu of 18 and more is the number itself in float32


class Expert(NamedTuple):
    """gate, up [I, D] and down [D, I], and their integers f64: up's and down's distinct rows."""

    gate: FileWeight
    up: FileWeight
    down: FileWeight
    up_rows: np.ndarray
    up_which: np.ndarray
    down_matrix: Matrix


class Twins(NamedTuple):
    """Columns of x in pairs that hold the same number for every token, and what else a row may read."""

    first: np.ndarray
    second: np.ndarray
    free: np.ndarray  # columns of -1, 0, 1
    gate: int  # a column of 8
    hidden: int  # a column that fixes the step of hidden numbers


FREE = 14


def twins(rng: Rng, columns: int) -> Twins:
    """A random pairing of all columns but a few."""
    order = rng.permutation(columns)
    free, (gate, hidden), rest = order[:FREE], order[FREE : FREE + 2], order[FREE + 2 :]
    half = len(rest) // 2
    return Twins(rest[:half], rest[half : 2 * half], free, int(gate), int(hidden))


def tokens_of_twins(
    rng: Rng, layout: str, down_layout: str, count: int, columns: int, t: Twins
) -> np.ndarray:
    """f32 [T, D]: whatever the layout its codes are these integers."""
    x = np.zeros((count, columns))
    pairs = rng.integers(-2, 3, (count, len(t.first)))
    x[:, t.first] = x[:, t.second] = pairs
    x[:, t.free] = rng.integers(-1, 2, (count, FREE))
    x[:, t.gate] = 8
    x[:, t.hidden] = PIN.get(down_layout, (0, 1))[1] / GATE if PIN.get(down_layout, (0, 0))[1] == 448 else 127
    if layout in PIN:  # a pin in each group, in both columns of a pair
        width, top = PIN[layout]
        for start in range(0, columns, width):
            inside = np.flatnonzero((t.first >= start) & (t.first < start + width))
            place = inside[rng.integers(len(inside))] if len(inside) else None
            if place is None:
                inside = np.flatnonzero((t.second >= start) & (t.second < start + width))
                place = inside[rng.integers(len(inside))]
            x[:, t.first[place]] = x[:, t.second[place]] = top
    return x.astype(np.float32)


def expert(
    rng: Rng, kinds: tuple[str, str, str], hidden: int, columns: int, down_layout: str, t: Twins
) -> Expert:
    """An expert whose gate is GATE for every token: pairs of columns cancel, dense as they are. Its hidden
    numbers are GATE times small integers, one in each group large enough to make the step of their codes
    GATE.
    """
    gate_rows = _cancelling(rng, t, columns)
    gate_rows[:, t.gate] = GATE // 8
    up_rows = _cancelling(rng, t, columns)
    up_rows[1:, t.free] = rng.integers(-1, 2, (DISTINCT - 1, FREE))
    up_rows[0] = 0
    up_rows[0, t.hidden] = 1
    which = rng.integers(1, DISTINCT, hidden)
    which[:: PIN.get(down_layout, (hidden, 0))[0]] = 0
    down = matrix_of_integers(rng, kinds[2], columns, hidden)
    gate = of_integers(kinds[0], gate_rows, rng.integers(0, DISTINCT, hidden))
    up = of_integers(kinds[1], up_rows, which)
    return Expert(gate, up, down.weight, up_rows.astype(np.float64), which, down)


def _cancelling(rng: Rng, t: Twins, columns: int) -> np.ndarray:
    rows = np.zeros((DISTINCT, columns), np.int64)
    rows[:, t.first] = rng.integers(-3, 4, (DISTINCT, len(t.first)))
    rows[:, t.second] = -rows[:, t.first]
    return rows


def matrix_of_integers(rng: Rng, kind: str, rows: int, columns: int) -> Matrix:
    """A matrix [rows, columns] of integers from -3 to 3, exact in every format that PACKERS know."""
    return _of(kind, rng.integers(-3, 4, (DISTINCT, columns)), rng.integers(0, DISTINCT, rows), rng)


def expert_of(x: np.ndarray, e: Expert) -> np.ndarray:
    """f64 [T, D]: the expert's result."""
    h = GATE * (x.astype(np.float64) @ e.up_rows.T)[:, e.up_which]
    return product(h, e.down_matrix)


# --- attention ----------------------------------------------------------------------------------------------


def attention(
    rng: Rng, tokens: int, heads: int, past: int, n: int = 128, r: int = 64, v: int = 128, latent: int = 512
) -> tuple[tuple, np.ndarray]:
    """Arguments of latent attention and their exact result f64 [T, H, v]: every query looks at one key, whose
    score is above all others by more than an exponential of float32 can tell from zero.

    Rope keys are random signs, so no two are alike; a query is eight times the key that it looks at, which
    may be any that it sees. Keys that it must not see, after it, would score twice as high.
    """
    s = past + tokens
    latents = rng.integers(-1, 2, (s, latent))
    k_pe = rng.choice([-1, 1], (s, r))
    last = np.arange(past, s)[:, None]
    target = (rng.random((tokens, heads)) * (last + 1)).astype(np.int64)
    target[:, 0], target[:, -1] = last[:, 0], 0
    q_pe = 8 * k_pe[target]
    q_nope = rng.integers(-1, 2, (tokens, heads, n)) * (rng.random((tokens, heads, n)) < 6 / n)
    q_nope[..., -1] = rng.choice([-1, 1], (tokens, heads))
    kv_b = rng.integers(-1, 2, (heads, n + v, latent))
    kv_b[:, :n] *= rng.random((heads, n, latent)) < 12 / latent
    args = tuple(a.astype(np.float32) for a in (q_nope, q_pe, latents, k_pe, kv_b))
    true = np.empty((tokens, heads, v))
    for h in range(heads):
        true[:, h] = latents[target[:, h]].astype(np.float64) @ kv_b[h, n:].T
    return (*args, 1.0), true


def margin(args: tuple) -> float:
    """By how much the best score of each query beats all others that it sees, at least."""
    q_nope, q_pe, latent, k_pe, kv_b, scale = (np.asarray(a, np.float64) for a in args)
    t, _, n = q_nope.shape
    s = len(latent)
    seen = np.arange(s)[None, :] <= np.arange(s - t, s)[:, None]
    least = np.inf
    for h in range(q_nope.shape[1]):
        z = scale * ((q_nope[:, h] @ kv_b[h, :n]) @ latent.T + q_pe[:, h] @ k_pe.T)
        z = np.sort(np.where(seen, z, -np.inf), axis=-1)
        if s > 1:
            least = min(least, float((z[:, -1] - z[:, -2]).min()))
    return least
