"""Families of sparse attention: the norm of the indexer's keys, its rotary embedding, and the rows that it
chooses.
"""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from refimpl.conformance.families import relations
from refimpl.conformance.families.family import SEEDS, Family, Recipe, Strategies
from refimpl.conformance.inputs import draws
from refimpl.conformance.manifest import Manifest
from refimpl.conformance.truth import bounds, chosen_rows


def _norm_recipe(op: str, m: Manifest) -> Strategies:
    widths = st.integers(1, 300)
    return {
        "tokens": st.integers(max(1, m.tokens), 5),
        "width": widths,
        "power": st.integers(-8, 8),
        "shift": st.sampled_from([0, 0, -2, 4096]),
        "eps": st.sampled_from([1e-6, 1e-5, 0.25]),
        "seed": SEEDS,
    }


def _norm(op: str, r: Recipe, m: Manifest) -> tuple:
    rng, width = np.random.default_rng(r["seed"]), r["width"]
    x = draws.activations(rng, "normal", r["tokens"], width) + np.float32(r.get("shift", 0))
    weight, bias = rng.normal(0, 1, (2, width)).astype(np.float32)
    return x * np.float32(2.0 ** r["power"]), weight, bias, r.get("eps", 1e-6)


def _norm_edges(op: str, m: Manifest) -> list[Recipe]:
    sizes = ((0, 8), (1, 1), (1, 128), (3, 7), (40, 64))
    found = [{"tokens": t, "width": w, "power": 0, "seed": 61} for t, w in sizes if t >= m.tokens]
    # A mean thousands of times the deviation, where a difference of squares has no bit that is right.
    far = [{"tokens": 3, "width": w, "power": p, "shift": 4096} for w, p in ((8, 0), (96, -3), (512, 0))]
    return [{**r, "tokens": max(r["tokens"], m.tokens), "seed": 62} for r in far] + found


LAYER_NORM = Family(
    ("layer_norm",),
    _norm_recipe,
    _norm,
    lambda op, args, m: [bounds.layer_norm(m, *args)],
    edges=_norm_edges,
    real={"real_sizes": ("layer_norm",), "extremes": ("dimensions",)},
)


def _rope_recipe(op: str, m: Manifest) -> Strategies:
    size = {"pairs": st.integers(1, 20), "rest": st.integers(0, 9), "heads": st.integers(0, 3)}
    return {"tokens": st.integers(max(1, m.tokens), 5), **size, "interleaved": st.booleans(), "seed": SEEDS}


def _rope(op: str, r: Recipe, m: Manifest) -> tuple:
    rng = np.random.default_rng(r["seed"])
    angles = rng.uniform(0, 100, (r["tokens"], r["pairs"])).astype(np.float32)
    heads = [r["heads"]] if r["heads"] else []
    x = draws.activations(rng, "normal", r["tokens"], *heads, 2 * r["pairs"] + r["rest"])
    return x, np.cos(angles), np.sin(angles), r["interleaved"]


def _rope_edges(op: str, m: Manifest) -> list[Recipe]:
    sizes = ((0, 2, 4, 1), (1, 0, 32, 64), (2, 64, 32, 64), (3, 1, 1, 0))
    return [
        {"tokens": t, "heads": h, "pairs": p, "rest": rest, "interleaved": kind, "seed": 67}
        for t, h, p, rest in sizes
        if t >= m.tokens
        for kind in (False, True)
    ]


INDEX_ROPE = Family(
    ("index_rope",),
    _rope_recipe,
    _rope,
    lambda op, args, m: [bounds.index_rope(*args)],
    edges=_rope_edges,
    relations={"power_of_two": relations.scaled_first},
    real={"real_sizes": ("index_rope",), "extremes": ("heads",)},
)


def _rows_recipe(op: str, m: Manifest) -> Strategies:
    return {
        "tokens": st.integers(max(1, m.tokens), 5),
        "past": st.integers(0, 60),
        "heads": st.integers(1, 6),
        "d": st.sampled_from([1, 4, 16, 64, 24]),
        "topk": st.integers(1, 40),
        "x": st.sampled_from(["normal", "integers", "ties"]),
        "activations": st.sampled_from(["exact", "fp8", "ue8m0"]),
        "seed": SEEDS,
    }


def _rows(op: str, r: Recipe, m: Manifest) -> tuple:
    rng, total = np.random.default_rng(r["seed"]), r["tokens"] + r["past"]
    d = (
        r["d"] if r["activations"] == "exact" else 1 << r["d"].bit_length() - 1
    )  # of `hadamard` a power of two
    shapes = (r["tokens"], r["heads"], d), (total, d), (r["tokens"], r["heads"])
    q: np.ndarray
    k: np.ndarray
    weights: np.ndarray
    q, k, weights = (rng.normal(0, 1, shape) for shape in shapes)
    activations = r["activations"]
    if r["x"] != "normal":
        q, k, weights = (rng.integers(-2, 3, shape) for shape in shapes)
    elif activations != "exact":  # codes hang on the last bit of a sum, which is free: whole numbers then
        q, k = (rng.integers(-3, 4, shape) for shape in shapes[:2])
    if r["x"] == "ties":
        k[:] = k[:1]
    if r.get("lost"):  # the scores of a row for all tokens, and of all rows for the first
        q, k = q.astype(np.float32), k.astype(np.float32)
        k[len(k) // 2, -1] = np.nan
        (weights if r["lost"] == "weights" else q)[0, ..., 0] = np.nan
    return *(a.astype(np.float32) for a in (q, k, weights)), r["topk"], None, activations


def _rows_edges(op: str, m: Manifest) -> list[Recipe]:
    base = {"heads": 4, "d": 16, "seed": 71}
    sizes = ((0, 0, 3), (1, 0, 1), (1, 50, 7), (1, 3, 40), (4, 0, 2), (70, 9, 11), (5, 64, 64))
    return (
        [
            {**base, "heads": 1, "d": d, "tokens": max(t, m.tokens), "past": 7, "topk": 1, "x": x}
            | {"activations": activations}
            for t, d, x in ((2, 1, "integers"), (1, 128, "ties"), (3, 256, "normal"))
            for activations in ("exact", "fp8")
        ]
        + [
            {**base, "tokens": t, "past": p, "topk": k, "x": x, "activations": activations}
            for t, p, k in sizes
            if t >= m.tokens
            for x in ("normal", "integers", "ties")
            for activations in ("exact", "fp8", "ue8m0")
        ]
        + [  # scores of NaN, where equals are ordered as the reference does it
            {**base, "tokens": t, "past": p, "topk": k, "x": "normal", "activations": activations}
            | {"lost": lost}
            for t, p, k in ((1, 9, 9), (6, 3, 5), (6, 3, 9))
            if t >= m.tokens and m.ties == "lowest" and m.shows_nan
            for activations, lost in (("exact", "q"), ("exact", "weights"), ("fp8", "weights"))
        ]
    )


INDEX_ROWS = Family(
    ("index_rows",),
    _rows_recipe,
    _rows,
    edges=_rows_edges,
    results=("rows",),
    demand=lambda op, args, m, got: chosen_rows.check_rows(m, got, *args),
    real={"real_sizes": ("index_rows",), "extremes": ("index_length",)},
)
