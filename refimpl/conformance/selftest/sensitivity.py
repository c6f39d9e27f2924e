"""How wrong a kernel may be at DeepSeek-V3's sizes before a bound notices: `python -m refimpl.conformance
--sensitivity`.

Two errors are made on purpose, on random normal numbers. Every element of the result is multiplied by 1 + c;
and what one block of 128 columns adds to the result is multiplied by 1 + b. The table has the largest c and b
that pass, under the bound that holds for any numbers and under that of random ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from refimpl.conformance.laws.real_sizes import random_matrix
from refimpl.conformance.manifest import Manifest
from refimpl.conformance.truth import bounds, likely
from refimpl.conformance.truth.bounds import Sum
from refimpl.conformance.truth.dyadic import DISTINCT, product


class Room(NamedTuple):
    """What passes: a factor of 1 + `constant`, and 1 + `block` of one block; None where there are none."""

    what: str
    strict: tuple[float, float | None]
    likely: tuple[float, float | None]


def _passes(s: Sum, part: np.ndarray) -> float:
    """The largest share of `part` that may be added to every element of the result."""
    with np.errstate(divide="ignore"):
        return float(np.min(np.broadcast_to(s.bound, part.shape) / np.abs(part)))


def _linear(kind: str, mode: str) -> Room:
    rng, m = np.random.default_rng(137), Manifest()
    w = random_matrix(rng, kind, DISTINCT, 7168)
    x = rng.normal(0, 1, (4, 7168)).astype(np.float32)
    taken = bounds.rounded(x, bounds.layout(w.weight, mode))
    block = taken * (np.arange(7168) >= 7168 - 128)
    part = product(block, w)
    sums = bounds.linear(m, x, w.weight, mode), likely.linear(m, x, w, mode)
    (a, b), (c, d) = ((_passes(s, s.true), _passes(s, part)) for s in sums)
    return Room(f"linear, {kind}, {mode}, K = 7168", (a, b), (c, d))


def _norm() -> Room:
    rng, m = np.random.default_rng(139), Manifest()
    args = rng.normal(0, 1, (4, 7168)).astype(np.float32), np.ones(7168, np.float32), 1e-6
    sums = bounds.rms_norm(m, *args), likely.rms_norm(m, *args)
    a, b = (_passes(s, s.true) for s in sums)
    return Room("rms_norm, 7168 columns", (a, None), (b, None))


def _attention() -> Room:
    """The block is the last 128 of 512 latents, in the values alone."""
    rng, m = np.random.default_rng(149), Manifest()
    shapes = (1, 16, 128), (1, 16, 64), (2000, 512), (2000, 64), (16, 256, 512)
    q, q_pe, latent, k_pe, kv_b = (rng.normal(0, 1, shape).astype(np.float32) for shape in shapes)
    kv_b /= np.float32(np.sqrt(512))
    args = q, q_pe, latent, k_pe, kv_b, 0.1
    part = kv_b.copy()
    part[:, 128:, :-128] = 0
    some = likely.attention(m, q, q_pe, latent, k_pe, part, 0.1).true
    sums = bounds.attention(m, *args), likely.attention(m, *args)
    (a, b), (c, d) = ((_passes(s, s.true), _passes(s, some)) for s in sums)
    return Room("mla, 2,000 rows, 512 latents", (a, b), (c, d))


def table() -> Iterator[Room]:
    """Each operation whose sums are long."""
    for kind in ("fp8", "q4_k", "plain"):
        for mode in ("fp8", "exact") if kind != "plain" else ("exact",):
            yield _linear(kind, mode)
    yield _attention()
    yield _norm()


def markdown() -> str:
    """The table of `docs/conformance.md` that says how small an error is found."""
    head = (
        "| operation | strict: all elements | strict: one block | random: all elements | random: one block |"
    )
    rows = [head, "|---|---|---|---|---|"]
    for room in table():
        cells = [f"{e:.1e}" if e is not None else "" for e in (*room.strict, *room.likely)]
        rows.append(f"| {room.what} | {' | '.join(cells)} |")
    return "\n".join(rows)
