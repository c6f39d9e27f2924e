"""Reference: rms_norm and rope of refimpl.reference.attention: small, but called hundreds of times a token by
a model of 61 layers.

Each is several calls of numpy, which for so few numbers take longer than the arithmetic; a compiled loop has
none. The rows of a prompt are shared out to a team: alone, a thread would spend as long on them as the whole
team does on a matrix. Letters in shapes are those of the reference: T tokens, D hidden, r numbers of a head
that are turned.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numba
import numpy as np

from refimpl.entered import entered
from refimpl.kernels.jit import callback, floats, integers, jit
from refimpl.kernels.team import done, region, workers

MANY = 1 << 17  # numbers, from which a team is asked: one thread needs 20 microseconds and more
ROWS = 4  # at least that a thread takes at a time
# What a call is, as words of int64: addresses, then sizes and steps in bytes.
X, OUT, WEIGHT, EPS, WIDTH = range(5)  # of rms_norm; EPS is the bits of a float32
COS, SIN, HEADS, PAIRS, TOKEN, HEAD = range(2, 8)  # of rope, X and OUT before them


@jit(reassociate=True)
def _mean_square(x):
    """The mean of x * x, x f32 [D], added in the order that the compiler finds fastest: a fixed one."""
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * x[i]
    return total / np.float32(len(x))


@jit
def _norm_row(x, weight, eps, out):
    """`rms_norm` of x f32 [D] into out."""
    scale = np.sqrt(_mean_square(x) + eps)
    for i in range(len(x)):
        out[i] = x[i] / scale * weight[i]


@jit
def _rms_norm(x, weight, eps, out):
    """`rms_norm` of x f32 [T, D] into out."""
    for t in range(len(x)):
        _norm_row(x[t], weight, np.float32(eps), out[t])


def _norm_rows(args, low, high, who):
    """Rows `low` to `high` - 1 of a call. A task of `team`."""
    a = integers(args)
    size, step = (a[WIDTH],), 4 * a[WIDTH]
    weight, eps = numba.carray(floats(a[WEIGHT]), size), np.int32(a[EPS]).view(np.float32)
    for t in range(low, high):
        x, out = numba.carray(floats(a[X] + t * step), size), numba.carray(floats(a[OUT] + t * step), size)
        _norm_row(x, weight, eps, out)
    return 1


@jit
def _turn(x, cos, sin, out):
    """`rope` of a head's x f32 [r] by cos and sin f32 [r/2] into out."""
    for i in range(len(cos)):
        a = x[2 * i]
        b = x[2 * i + 1]
        c = cos[i]
        s = sin[i]
        out[2 * i] = a * c - b * s
        out[2 * i + 1] = b * c + a * s


@jit
def _rope(x, cos, sin, out):
    """`rope` of x f32 [T, heads, r] by cos and sin f32 [T, r/2] into out."""
    for t in range(len(x)):
        for h in range(x.shape[1]):
            _turn(x[t, h], cos[t], sin[t], out[t, h])


def _turn_rows(args, low, high, who):
    """All heads of tokens `low` to `high` - 1 of a call. A task of `team`."""
    a = integers(args)
    half, size = (a[PAIRS],), (2 * a[PAIRS],)
    for t in range(low, high):
        cos = numba.carray(floats(a[COS] + 4 * t * a[PAIRS]), half)
        sin = numba.carray(floats(a[SIN] + 4 * t * a[PAIRS]), half)
        for h in range(a[HEADS]):
            x = numba.carray(floats(a[X] + t * a[TOKEN] + h * a[HEAD]), size)
            out = numba.carray(floats(a[OUT] + 8 * (t * a[HEADS] + h) * a[PAIRS]), size)
            _turn(x, cos, sin, out)
    return 1


@jit
def _run(team, task, words, rows):
    return region(team, task, words, rows, ROWS)


@cache
def _task(function: Any) -> int:
    return callback(function, answers=True).address


def compile_rows() -> None:
    """Compile what shares out rows."""
    _task(_norm_rows)
    _task(_turn_rows)


def _shared_out(function: Any, rows: int, numbers: int, *words: int) -> None:
    """A task on all rows of a call, by a team where there are enough numbers."""
    with workers(numbers << 4) as team:  # a number takes about as long as so many products
        entered("a team" if team else "one thread")
        done(_run(team, _task(function), np.array(words, np.int64), rows))


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis: x f32 [..., D], weight f32 [D] -> f32
    [..., D].
    """
    # No `reshape` for the usual [T, D]: this is called hundreds of times a token.
    flat = np.ascontiguousarray(x if x.ndim == 2 else x.reshape(-1, x.shape[-1]))
    out = np.empty(flat.shape, np.float32)  # [T, D]
    if flat.size < MANY:
        entered("one thread")
        _rms_norm(flat, weight, eps, out)
    else:
        flat, weight = flat.astype(np.float32, copy=False), np.ascontiguousarray(weight, np.float32)
        given = flat.ctypes.data, out.ctypes.data, weight.ctypes.data, int(np.float32(eps).view(np.int32))
        _shared_out(_norm_rows, len(flat), flat.size, *given, flat.shape[1])
    return out if x.ndim == 2 else out.reshape(x.shape)


def rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Turn the interleaved pairs (x0, x1), (x2, x3), ... of the last axis: f32 [T, ..., r], tables f32
    [T, r/2] -> f32 [T, ..., r].
    """
    out = np.empty(x.shape, np.float32)
    if x.size >= MANY and x.ndim == 3 and x.dtype == np.float32 and x.strides[2] == x.itemsize:
        cos, sin = (np.ascontiguousarray(a, np.float32) for a in (cos, sin))
        given = x.ctypes.data, out.ctypes.data, cos.ctypes.data, sin.ctypes.data
        _shared_out(_turn_rows, len(x), x.size, *given, x.shape[1], cos.shape[1], *x.strides[:2])
        return out
    entered("one thread")
    # [T, heads, r] whatever the axes between are; queries have heads, the shared key none.
    flat = np.ascontiguousarray(x).reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1])
    _rope(flat, cos, sin, out.reshape(flat.shape))
    return out
