"""Reference: refimpl.reference.experts.swiglu and refimpl.reference.experts.experts. The whole stack of a
layer in five passes over all its tokens.

    quantize x      once a token, however many experts it goes to
    gate, up        one launch over the rows of all experts in use
    silu(g) * u     and quantized again
    down            one launch
    sum             of each token's experts, weighted, in routed order

Weights are read where they lie in the mapped file. A pair is one token at one of its experts; pairs are
sorted by expert.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numba import prange

from refimpl.kernels.jit import jit
from refimpl.kernels.linear_numba import (
    WORKSPACE,
    Matrix,
    alone,
    layout,
    matrix,
    prepare,
    run_jobs,
    together,
    worthwhile,
)
from refimpl.reference import experts as reference
from refimpl.reference.experts import pick
from refimpl.tensors import Packed, Stack, Weight


@jit
def _silu_times_row(gate, up, out):
    for i in range(len(gate)):
        out[i] = gate[i] / (np.float32(1) + np.exp(-gate[i])) * up[i]


@jit(parallel=True)
def _silu_times(gate, up, out, parallel):
    """silu(gate) * up, f32 [P, I] each."""
    if parallel:
        for p in prange(len(gate)):
            _silu_times_row(gate[p], up[p], out[p])
    else:
        for p in range(len(gate)):
            _silu_times_row(gate[p], up[p], out[p])


@jit
def _weighted_row(parts, pairs, weights, out):
    out[:] = np.float32(0)
    for a in range(len(pairs)):
        w, part = weights[a], parts[pairs[a]]
        for i in range(len(out)):
            out[i] += w * part[i]


@jit(parallel=True)
def _weighted_sum(parts, pairs, weights, out, parallel):
    """out[t] = sum over a of weights[t, a] * parts[pairs[t, a]], in the order of a."""
    if parallel:
        for t in prange(len(out)):
            _weighted_row(parts, pairs[t], weights[t], out[t])
    else:
        for t in range(len(out)):
            _weighted_row(parts, pairs[t], weights[t], out[t])


class Side(NamedTuple):
    """Gate, up or down matrices of the experts in use: what they are like, their addresses, and those of
    their tile scales.
    """

    like: Matrix
    data: np.ndarray
    scales: np.ndarray


class Sides(NamedTuple):
    """All matrices of the experts in use. Gate and up are one list of jobs where they are of one kind, and
    two where they are not.
    """

    inner: tuple[Side, ...]
    down: Side


def _sides(gate: Side, up: Side, down: Side) -> Sides:
    if gate.like.kind != up.like.kind:
        return Sides((gate, up), down)
    return Sides(
        (Side(gate.like, np.concatenate((gate.data, up.data)), np.concatenate((gate.scales, up.scales))),),
        down,
    )


def _side(stack: Stack, used: np.ndarray, activations: str) -> Side | None:
    """None unless the kernel takes all matrices, and they are of one kind."""
    if isinstance(stack, Packed):
        m = matrix(stack)
        if m is None or layout(m, activations) is None:
            return None
        return Side(m, used * stack.data.strides[0] + m.data, np.zeros(len(used), np.int64))
    found = [m for e in used if (m := matrix(pick(stack, e))) is not None]
    if (
        not found
        or len(found) < len(used)
        or len({m.kind for m in found}) > 1
        or layout(found[0], activations) is None
    ):
        return None
    return Side(found[0], np.array([m.data for m in found]), np.array([m.scale for m in found]))


@lru_cache(1024)
def _alone(gate: Matrix, up: Matrix, down: Matrix, activations: str) -> Sides | None:
    """The sides of one expert; None as `_side`."""
    if any(layout(m, activations) is None for m in (gate, up, down)):
        return None
    return _sides(*(Side(m, *alone(m.data, m.scale)) for m in (gate, up, down)))


@jit
def _plan(ids, experts):
    """Pairs sorted by expert, from ids int64 [T, A]: experts in use, pairs before and of each, the token of
    each pair, the pair of each choice.

    Pairs before and of each are said twice: gate and up are one list of jobs.
    """
    totals = np.zeros(experts + 1, np.int64)
    for t in range(ids.shape[0]):
        for a in range(ids.shape[1]):
            totals[ids[t, a] + 1] += 1
    used = np.nonzero(totals[1:])[0]
    starts = np.cumsum(totals)
    first, counts = np.empty(2 * len(used), np.int64), np.empty(2 * len(used), np.int64)
    for i in range(2 * len(used)):
        first[i], counts[i] = starts[used[i % len(used)]], totals[used[i % len(used)] + 1]
    tokens, pairs = np.empty(ids.size, np.int64), np.empty(ids.shape, np.int64)
    for t in range(ids.shape[0]):
        for a in range(ids.shape[1]):
            place = starts[ids[t, a]]
            starts[ids[t, a]] += 1
            tokens[place], pairs[t, a] = t, place
    return used, first, counts, tokens, pairs


def _mlp(
    x: np.ndarray, tokens: np.ndarray, first: np.ndarray, counts: np.ndarray, sides: Sides, activations: str
) -> np.ndarray:
    """SwiGLU of expert e on the counts[e] tokens at tokens[first[e]:] -> f32 [P, D] in shared memory. first
    and counts are twice as long.
    """
    experts, pairs, width = len(sides.down.data), len(tokens), sides.inner[0].like.rows
    both = WORKSPACE.array("gate and up", (2 * pairs, width))
    gates, ups = both[:pairs], both[pairs:]
    if len(sides.inner) == 1:
        _launch(sides.inner[0], first, counts, tokens, x, activations, both)
    else:
        for side, out in zip(sides.inner, (gates, ups)):
            _launch(side, first[:experts], counts[:experts], tokens, x, activations, out)
    hidden = WORKSPACE.array("hidden", (pairs, width))
    _silu_times(gates, ups, hidden, worthwhile(hidden.size))
    parts = WORKSPACE.array("parts", (pairs, sides.down.like.rows))
    _launch(sides.down, first[:experts], counts[:experts], together(pairs)[2], hidden, activations, parts)
    return parts


def _launch(
    side: Side,
    first: np.ndarray,
    counts: np.ndarray,
    rows: np.ndarray,
    x: np.ndarray,
    activations: str,
    out: np.ndarray,
) -> None:
    run_jobs(
        side.like,
        side.data,
        side.scales,
        first,
        counts,
        rows,
        prepare("x", x, layout(side.like, activations)),
        out,
    )


def swiglu(x: np.ndarray, gate: Weight, up: Weight, down: Weight, activations: str = "fp8") -> np.ndarray:
    """down(silu(gate(x)) * up(x)): f32 [T, D] -> [T, D], as the reference; what the kernel does not take goes
    there.
    """
    g, u, d = matrix(gate), matrix(up), matrix(down)
    sides = None if g is None or u is None or d is None or not len(x) else _alone(g, u, d, activations)
    if sides is None:
        return reference.swiglu(x, gate, up, down, activations)
    first, counts, tokens = together(len(x), 2)
    return _mlp(np.ascontiguousarray(x), tokens, first, counts, sides, activations).copy()


def experts(
    x: np.ndarray,
    ids: np.ndarray,
    weights: np.ndarray,
    gate: Stack,
    up: Stack,
    down: Stack,
    activations: str = "fp8",
) -> np.ndarray:
    """y[t] = sum over a of weights[t, a] * expert[ids[t, a]](x[t]), f32 [T, D], as the reference; what the
    kernel does not take goes there.
    """
    used, first, counts, tokens, pairs = _plan(
        np.ascontiguousarray(ids, np.int64), len(gate.data) if isinstance(gate, Packed) else len(gate)
    )
    g, u, d = (_side(stack, used, activations) for stack in (gate, up, down))
    if g is None or u is None or d is None:
        return reference.experts(x, ids, weights, gate, up, down, activations)
    parts = _mlp(np.ascontiguousarray(x), tokens, first, counts, _sides(g, u, d), activations)
    out = np.empty(x.shape, np.float32)
    _weighted_sum(parts, pairs, np.ascontiguousarray(weights, np.float32), out, worthwhile(parts.size))
    return out
