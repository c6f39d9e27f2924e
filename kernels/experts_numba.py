"""Reference: refimpl.reference.experts.swiglu and refimpl.reference.experts.experts. The whole stack of a
layer in five regions of a team (`team`), without Python between the first four.

    quantize x      once a token, however many experts it goes to
    gate, up        the rows of all experts in use
    silu(g) * u     and quantized again
    down            likewise
    sum             of each token's experts, weighted, in routed order

Weights are read where they lie in the mapped file. A pair is one token at one of its experts; pairs are
sorted by expert.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import numba
import numpy as np

from refimpl.entered import entered, listened_to
from refimpl.kernels.activations_numba import PIECE, quantize
from refimpl.kernels.atomic import ask
from refimpl.kernels.jit import callback, floats, integers, jit
from refimpl.kernels.linear_numba import (
    PAIRS_FROM,
    JobLayout,
    Matrix,
    activation_layout,
    activations_of,
    job_layout,
    matrix,
    say,
    scratch,
    side_by_side,
)
from refimpl.kernels.strips_numba import BLOCKS_FROM, multiply_jobs
from refimpl.kernels.team import done, region, workers
from refimpl.kernels.workspace import WORKSPACE
from refimpl.reference import experts as reference
from refimpl.reference.experts import pick
from refimpl.tensors import Interleaved, Packed, Stack, Weight

# Two tokens with two experts each, as `_plan` sorts their four pairs (P = 4) by expert:
#
#     ids       token 0: 7, 3 | token 1: 3, 5
#     used      3             | 5   | 7             experts in use
#     first     0             | 2   | 3             where an expert's pairs begin
#     counts    2             | 1   | 1             how many it has
#     tokens    0      1      | 1   | 0             the token of pairs 0, 1, 2, 3
#     pairs     [[3, 0], [1, 2]]                    the pair of each choice, in the order of ids
#
# Outputs of gate and up lie in one array, f32 [2 P, I], whether they are one list of jobs or two:
#
#     | gate of pair 0 | ... | gate of pair P - 1 | up of pair 0 | ... | up of pair P - 1 |
SILUS, SUMS = 2, 4  # pieces that a thread takes at least: some microseconds


@jit
def _silu_times_row(gate, up, out):
    for i in range(len(gate)):
        out[i] = gate[i] / (np.float32(1) + np.exp(-gate[i])) * up[i]


def _silu_pieces(args, low, high, who):
    """silu(gate) * up of pieces of PIECE columns, all of the first pair, then of the next, ...; and then the
    task that quantizes them. A task of `team`.
    """
    a = integers(args)
    gates, ups, hidden, width, quantizer, more = a[0], a[1], a[2], a[3], a[4], a[5]
    pieces = -(-width // PIECE)
    for i in range(low, high):
        start = i % pieces * PIECE
        n, at = min(PIECE, width - start), 4 * (i // pieces * width + start)
        gate, up = numba.carray(floats(gates + at), n), numba.carray(floats(ups + at), n)
        _silu_times_row(gate, up, numba.carray(floats(hidden + at), n))
    # PIECE is whole blocks of every layout, so these pieces are quantized at once, while they are in this
    # core's cache, and without a region of their own.
    return ask(quantizer, (more, low, high, who)) if quantizer else 1


@jit
def _weighted_row(parts, pairs, weights, start, out):
    # In routed order, one term after the other: the same additions whatever other tokens are in the batch.
    out[:] = np.float32(0)
    for a in range(len(pairs)):
        w, part = weights[a], parts[pairs[a]]
        for i in range(len(out)):
            out[i] += w * part[start + i]


def _weighted_pieces(args, low, high, who):
    """out[t] = sum over a of weights[t, a] * parts[pairs[t, a]], in the order of a, for pieces of PIECE
    columns. A task of `team`.
    """
    a = integers(args)
    width, chosen, every = a[4], a[5], a[6]
    parts = numba.carray(floats(a[0]), (every, width))
    pieces = -(-width // PIECE)
    for i in range(low, high):
        t, start = i // pieces, i % pieces * PIECE
        pairs = numba.carray(integers(a[1] + 8 * t * chosen), chosen)
        weights = numba.carray(floats(a[2] + 4 * t * chosen), chosen)
        out = numba.carray(floats(a[3] + 4 * (t * width + start)), min(PIECE, width - start))
        _weighted_row(parts, pairs, weights, start, out)
    return 1


@cache
def _task(function: Any) -> int:
    return callback(function, answers=True).address


@jit
def _weighted_sum(team, task, parts, pairs, weights, out):
    args = np.empty(7, np.int64)
    args[0], args[1] = parts.ctypes.data, pairs.ctypes.data
    args[2], args[3] = weights.ctypes.data, out.ctypes.data
    args[4], args[5], args[6] = out.shape[1], pairs.shape[1], len(parts)
    return region(team, task, args, len(out) * (-(-out.shape[1] // PIECE)), SUMS)


def compile_part(name: str) -> None:
    """Compile what all experts share: "plan", "silu", "weighted", or the "sum" that calls the last."""
    ids, sums = np.zeros((2, 1), np.int64), np.zeros((2, 1), np.float32)
    parts = {
        "plan": lambda: _plan(ids, 1),
        "silu": lambda: _task(_silu_pieces),
        "weighted": lambda: _task(_weighted_pieces),
        "sum": lambda: _weighted_sum(0, 0, sums, ids, sums, sums[:0]),
    }
    parts[name]()


@jit
def _layer(team, silu, x, tokens, first, counts, inner, gate_up, hidden, down, parts, own, side_by_side):
    """From x f32 [T, D] to the outputs of all pairs, parts f32 [P, D], by way of gate_up f32 [2 P, I] and
    hidden f32 [P, I].

    `inner` is one group of matrices, gate and up, or two, and `down` another: each (address of what quantizes
    its activations, memory for them, `JobLayout.words`, addresses of the matrices, of their tile scales).
    """
    well, n = 1, len(gate_up) // len(inner)
    for i in range(len(inner)):
        quantizer, acts, words, data, scales = inner[i]
        # One group of gate and up: n = 2 P rows, 2 E jobs. Two groups: P rows and E jobs each.
        out, jobs = gate_up[i * n : i * n + n], len(data)
        # Two groups quantize x twice, as their formats may want different layouts.
        well &= quantize(team, quantizer, x, acts)
        well &= multiply_jobs(
            team, words, data, scales, first[:jobs], counts[:jobs], tokens, acts, out, own, side_by_side
        )
    quantizer, acts, words, data, scales = down
    (pairs, width), jobs = hidden.shape, len(data)
    # What the quantizer's task reads, for `_silu_pieces` to pass on.
    more = np.array((hidden.ctypes.data, width, acts.ctypes.data, pairs), np.int64)
    args = np.empty(6, np.int64)
    args[0], args[1], args[2] = gate_up.ctypes.data, gate_up[pairs:].ctypes.data, hidden.ctypes.data
    args[3], args[4], args[5] = width, quantizer, more.ctypes.data
    well &= region(team, silu, args, pairs * (-(-width // PIECE)), SILUS)
    everyone = np.arange(pairs)
    well &= multiply_jobs(
        team, words, data, scales, first[:jobs], counts[:jobs], everyone, acts, parts, own, side_by_side
    )
    # Numba frees an array after its last use, and a task has only the address of this one.
    return well * min(1, more[1])  # `more` must live until here


class ExpertMatrices(NamedTuple):
    """Gate, up or down matrices of the E experts in use, all of one kind and shape."""

    layout: Matrix  # one of them
    data: np.ndarray  # int64 [E]: addresses
    scales: np.ndarray  # int64 [E]: addresses of tile scales, E4M3 only


class MlpMatrices(NamedTuple):
    """All matrices of the experts in use. Gate and up are one list of jobs where they are of one kind, and
    two where they are not.
    """

    inner: tuple[ExpertMatrices, ...]
    down: ExpertMatrices


def _mlp_matrices(gate: ExpertMatrices, up: ExpertMatrices, down: ExpertMatrices) -> MlpMatrices:
    if gate.layout.kind != up.layout.kind:
        return MlpMatrices((gate, up), down)
    # One list of jobs is one region instead of two, and each region's end waits for its slowest thread.
    data, scales = np.concatenate((gate.data, up.data)), np.concatenate((gate.scales, up.scales))
    return MlpMatrices((ExpertMatrices(gate.layout, data, scales),), down)


def _expert_matrices(stack: Stack, used: np.ndarray, activations: str) -> ExpertMatrices | None:
    """The matrices of the experts `used`, int64 [E]; None unless the kernel takes all, and they are of one
    kind.
    """
    if isinstance(stack, Packed | Interleaved):
        m = matrix(stack)
        if m is None or activation_layout(m, activations) is None:
            return None
        # The stack is one array [E, N, bytes]: all addresses at once, without a numpy object for each expert.
        return ExpertMatrices(m, used * stack.data.strides[0] + m.data, np.zeros(len(used), np.int64))
    found = [m for e in used if (m := matrix(pick(stack, e))) is not None]
    if (
        not found
        or len(found) < len(used)
        or len({m.kind for m in found}) > 1
        or activation_layout(found[0], activations) is None
    ):
        return None
    data, scales = np.array([m.data for m in found]), np.array([m.scale for m in found])
    return ExpertMatrices(found[0], data, scales)


@lru_cache(1024)
def _alone(gate: Matrix, up: Matrix, down: Matrix, activations: str) -> MlpMatrices | None:
    """The matrices of one expert; None where the reference has to multiply one of them."""
    if any(activation_layout(m, activations) is None for m in (gate, up, down)):
        return None
    return _mlp_matrices(
        *(ExpertMatrices(m, np.array([m.data]), np.array([m.scale])) for m in (gate, up, down))
    )


class MlpLayout(NamedTuple):
    """What `_layer` needs to know of groups of matrices of these kinds and shapes."""

    inner: tuple[JobLayout, ...]
    down: JobLayout
    scratch_bytes: int  # of a thread
    blocks: int  # as in JobLayout, the most of any group


@lru_cache(4096)
def _mlp_layout(
    inner: tuple[Matrix, ...], down: Matrix, activations: str, many: bool, pairs: bool
) -> MlpLayout:
    """Of one matrix of each group, as `job_layout`."""
    hows = [str(activation_layout(m, activations)) for m in (*inner, down)]
    *first, last = (job_layout(m, how, many, pairs) for m, how in zip((*inner, down), hows))
    groups = (*first, last)
    return MlpLayout(
        tuple(first), last, max(of.scratch_bytes for of in groups), max(of.blocks for of in groups)
    )


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
    # Said before the next loop moves `starts` on.
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
    team: int,
    x: np.ndarray,
    tokens: np.ndarray,
    first: np.ndarray,
    counts: np.ndarray,
    matrices: MlpMatrices,
    activations: str,
) -> np.ndarray:
    """SwiGLU of expert e on the counts[e] tokens at tokens[first[e]:] -> f32 [P, D] in shared memory. first
    and counts are twice as long.
    """
    pairs, width = len(tokens), matrices.inner[0].layout.rows
    hidden = WORKSPACE.array("hidden", (pairs, width))
    many = len(x) >= BLOCKS_FROM
    of_inner = tuple([m.layout for m in matrices.inner])
    # Experts in use are half of `counts`.
    often = 2 * pairs >= PAIRS_FROM * len(counts)
    layout = _mlp_layout(of_inner, matrices.down.layout, activations, many, often)
    if listened_to():
        entered("gate and up as one list" if len(of_inner) == 1 else "gate and up as two lists")
        for of in (*layout.inner, layout.down):
            say(team, of, counts[: len(counts) // 2])
    parts = WORKSPACE.array("parts", (pairs, matrices.down.layout.rows))
    done(
        _layer(
            team,
            _task(_silu_pieces),
            x,
            tokens,
            first,
            counts,
            tuple([_given(*of, x=x) for of in zip(NAMES, layout.inner, matrices.inner)]),
            WORKSPACE.array("gate and up", (2 * pairs, width)),
            hidden,
            _given("hidden quantized", layout.down, matrices.down, hidden),
            parts,
            scratch(team, layout.scratch_bytes),
            side_by_side(pairs, layout.blocks),
        )
    )
    return parts


NAMES = ("x for gate", "x for up")  # of memory for x quantized; the first also where both are one group


def _given(name: str, of: JobLayout, group: ExpertMatrices, x: np.ndarray) -> tuple:
    """A group of matrices as `_layer` wants it, with memory under this name for x f32 [T, K] quantized."""
    return of.quantizer, activations_of(name, x, of), of.words, group.data, group.scales


def _products(matrices: MlpMatrices, pairs: int) -> int:
    return 3 * pairs * matrices.down.layout.rows * matrices.down.layout.columns


def swiglu(x: np.ndarray, gate: Weight, up: Weight, down: Weight, activations: str = "fp8") -> np.ndarray:
    """down(silu(gate(x)) * up(x)): f32 [T, D] -> [T, D], as the reference; what the kernel does not take goes
    there.
    """
    g, u, d = matrix(gate), matrix(up), matrix(down)
    matrices = None if g is None or u is None or d is None or not len(x) else _alone(g, u, d, activations)
    if matrices is None:
        entered("reference")
        return reference.swiglu(x, gate, up, down, activations)
    first, counts, tokens = _everywhere(len(x))
    with workers(_products(matrices, len(x))) as team:
        # A copy, because the workspace's memory belongs to the next call of this thread.
        return _mlp(team, np.ascontiguousarray(x), tokens, first, counts, matrices, activations).copy()


@lru_cache(64)
def _everywhere(tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All T tokens in gate's job, and again in up's: first and counts int64 [2], tokens int64 [T]."""
    return np.zeros(2, np.int64), np.full(2, tokens), np.arange(tokens)


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
    count = len(gate.data) if isinstance(gate, Packed | Interleaved) else len(gate)
    used, first, counts, tokens, pairs = _plan(np.ascontiguousarray(ids, np.int64), count)
    g, u, d = (_expert_matrices(stack, used, activations) for stack in (gate, up, down))
    if g is None or u is None or d is None:
        entered("reference")
        return reference.experts(x, ids, weights, gate, up, down, activations)
    matrices, out = _mlp_matrices(g, u, d), np.empty(x.shape, np.float32)
    with workers(_products(matrices, len(tokens))) as team:
        parts = _mlp(team, np.ascontiguousarray(x), tokens, first, counts, matrices, activations)
        weights = np.ascontiguousarray(weights, np.float32)
        done(_weighted_sum(team, _task(_weighted_pieces), parts, pairs, weights, out))
    return out
