"""Families of sums over weights: embedding, linear layers, SwiGLU, experts."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from refimpl.conformance.families import relations
from refimpl.conformance.families.family import SEEDS, Family, Recipe, Strategies
from refimpl.conformance.inputs import draws
from refimpl.conformance.manifest import Manifest
from refimpl.conformance.truth import bounds, quantizers
from refimpl.conformance.truth.bounds import Sum
from refimpl.reference import fp8
from refimpl.reference.experts import pick
from refimpl.reference.packed import dense
from refimpl.tensors import FileWeight, Packed, Weight


def _kinds(op: str, m: Manifest) -> tuple[str, ...]:
    known = ("fp8",) if op.startswith("fp8.") else draws.WEIGHTS
    return tuple(k for k in known if not m.weights or k in m.weights)


def _linear_variants(op: str, m: Manifest) -> list[Recipe]:
    return [{"kind": k, "activations": a} for k in _kinds(op, m) for a in _modes(m, k)]


def _modes(m: Manifest, *kinds: str) -> list[str]:
    """The modes that tell apart what these weights are multiplied by: "ue8m0" is of FP8 alone."""
    return [a for a in m.modes if a != "ue8m0" or "fp8" in kinds]


def _linear_recipe(op: str, m: Manifest) -> Strategies:
    return {
        "tokens": st.integers(max(1, m.tokens), max(9, m.tokens)),
        "rows": st.integers(1, 40) | st.integers(100, 300),
        "blocks": st.integers(1, 3),
        "more": st.integers(0, 100),
        "x": st.sampled_from(list(draws.ACTIVATIONS)),
        "seed": SEEDS,
    }


def columns(kind: str, r: Recipe, m: Manifest) -> int:
    """K: whole blocks; for FP8 and plain floats any number."""
    unit = draws.unit_columns(kind)
    k = r["blocks"] * unit if unit > 1 else 128 * r["blocks"] - r["more"]
    return -(-k // m.columns) * m.columns


def _linear(op: str, r: Recipe, m: Manifest) -> tuple:
    rng = np.random.default_rng(r["seed"])
    rows, k = -(-r["rows"] // m.rows) * m.rows, columns(r["kind"], r, m)
    w = draws.weight(rng, r["kind"], rows, k)
    return draws.activations(rng, r["x"], r["tokens"], k), w, r["activations"]


def _linear_edges(op: str, m: Manifest) -> list[Recipe]:
    found = []
    for v in _linear_variants(op, m):
        for tokens, rows, blocks, more in (
            (0, 5, 1, 0),
            (1, 1, 1, 96),
            (2, 127, 2, 32),
            (3, 129, 1, 1),
            (4, 128, 1, 0),
            (5, 257, 2, 127),
            (8, 33, 3, 0),
            (41, 1, 1, 0),
            (2, 2, 1, 64),
            (10, 131, 2, 0),  # several rows and several columns of tiles
        ):
            if tokens >= m.tokens and not (more % 32 and draws.unit_columns(v["kind"]) > 1):
                found.append(
                    {
                        **v,
                        "tokens": tokens,
                        "rows": rows,
                        "blocks": blocks,
                        "more": more,
                        "x": "normal",
                        "seed": 7,
                    }
                )
    return found


def _linear_large(op: str, m: Manifest) -> list[Recipe]:
    """Work for several threads: one token of the widest, and many; an odd number of rows."""
    base = {"rows": 1031, "more": 0, "x": "normal", "seed": 43, "activations": m.modes[0]}
    return [
        {**base, "kind": kind, "tokens": tokens, "blocks": blocks}
        for kind in ("fp8", "q4_k", "q8_0", "plain")
        for tokens, blocks in ((1, 9 if draws.unit_columns(kind) == 256 else 17), (17, 4))
        if kind in _kinds(op, m) and tokens >= m.tokens
    ]


def _linear_truth(op: str, args: tuple, m: Manifest) -> list[Sum]:
    return [bounds.linear(m, *args)]


LINEAR = Family(
    ("linear", "*.linear"),
    _linear_recipe,
    _linear,
    _linear_truth,
    variants=_linear_variants,
    edges=_linear_edges,
    large=_linear_large,
    relations={
        "power_of_two": relations.scaled_x,
        "permutation": relations.permuted_linear,
        "batch": relations.tokens_alone,
        "split_k": relations.split_k,
        "nan_reach": relations.nan_in_a_token,
    },
    fixed={"exhaustive": "every_code", "one_hot": "one_hot", "integers": "integers"},
    real={
        "dyadic": ("dyadic_linear", "ties"),
        "real_sizes": ("likely_linear",),
        "threads": ("linear_teams",),
        "extremes": (
            "saturated",
            "beyond_halves",
            "scales_of_nothing",
            "same_bytes",
            "quantized_x",
            "three_dimensions",
            "growing",
        ),
    },
)


def _embed_variants(op: str, m: Manifest) -> list[Recipe]:
    return [{"kind": k} for k in _kinds(op, m)]


def _embed_recipe(op: str, m: Manifest) -> Strategies:
    return {
        "rows": st.integers(1, 200),
        "blocks": st.integers(1, 3),
        "more": st.integers(0, 100),
        "tokens": st.integers(1, 9),
        "seed": SEEDS,
    }


def _embed(op: str, r: Recipe, m: Manifest) -> tuple:
    rng = np.random.default_rng(r["seed"])
    table = draws.weight(rng, r["kind"], r["rows"], columns(r["kind"], r, m))
    return table, rng.integers(0, r["rows"], r["tokens"])


def _embed_edges(op: str, m: Manifest) -> list[Recipe]:
    return [
        {**v, "rows": n, "blocks": 1, "more": 0, "tokens": t, "seed": 41}
        for v in _embed_variants(op, m)
        for n, t in ((1, 1), (130, 0), (130, 300))
    ]


EMBED = Family(
    ("embed",),
    _embed_recipe,
    _embed,
    variants=_embed_variants,
    edges=_embed_edges,
    real={"real_sizes": ("embed",)},
)

# Gate, up and down: one of each layout of activations, and mixes of them.
STACKS = {
    "q4_k": ("q4_k", "q4_k", "q4_k"),
    "q4_k, q6_k": ("q4_k", "q4_k", "q6_k"),
    "q5_k, q8_0": ("q5_k", "q8_0", "q8_0"),  # x is quantized in two ways
    "q2_k, q3_k": ("q2_k", "q2_k", "q3_k"),
    "fp8": ("fp8", "fp8", "fp8"),
    "q4_0, q5_0": ("q4_0", "q5_0", "q5_0"),
    "mxfp4": ("mxfp4", "mxfp4", "mxfp4"),
    "iq4_xs, iq4_nl": ("iq4_xs", "iq4_xs", "iq4_nl"),
    "iq4_xs": ("iq4_xs", "iq4_xs", "iq4_xs"),
    "bf16": ("bf16", "bf16", "bf16"),
    "int4": ("int4", "int4", "int4"),
    "plain": ("plain", "plain", "plain"),
}


def _stack_variants(op: str, m: Manifest) -> list[Recipe]:
    names = [name for name, kinds in STACKS.items() if not m.weights or set(kinds) <= set(m.weights)]
    return [{"kind": name, "activations": a} for name in names for a in _modes(m, *STACKS[name])]


def _swiglu_recipe(op: str, m: Manifest) -> Strategies:
    return {
        "tokens": st.integers(max(1, m.tokens), max(6, m.tokens)),
        "blocks": st.just(1),
        "hidden": st.integers(1, 2),
        "less": st.sampled_from([0, 0, 32, 96, 5]),
        "x": st.sampled_from(["one", "normal", "outliers"]),
        "seed": SEEDS,
    }


def _widths(r: Recipe, m: Manifest) -> tuple[int, int]:
    """D and I: so many times 256, less what is to be less, as nearly as whole blocks allow."""
    unit = max(m.rows, m.columns, *map(draws.unit_columns, STACKS[r["kind"]]))
    d, i = 256 * r["blocks"] - r.get("less", 0), 256 * r["hidden"] - r.get("less", 0)
    return -(-d // unit) * unit, -(-i // unit) * unit


def _sides(rng: np.random.Generator, r: Recipe, count: int, m: Manifest) -> tuple:
    """gate, up [E, I, D] and down [E, D, I] of a recipe."""
    (gate, up, down), (d, i) = STACKS[r["kind"]], _widths(r, m)
    found = (
        draws.stack(rng, gate, count, i, d),
        draws.stack(rng, up, count, i, d),
        draws.stack(rng, down, count, d, i),
    )
    if r.get("listed"):
        return tuple(map(_otherwise, found))
    if r.get("mixed"):
        return tuple([s[0], _plain(s[1]), *s[2:]] if isinstance(s, list) else s for s in found)
    return found


def _otherwise(stack: Packed | list[FileWeight]) -> list[FileWeight] | np.ndarray:
    """A stack in one piece as a list of matrices, and plain ones, which are a list, in one piece."""
    if isinstance(stack, Packed):
        return [stack.expert(e) for e in range(len(stack.data))]
    plain = [w for w in stack if isinstance(w, np.ndarray)]
    return np.stack(plain) if plain else stack


def _plain(w: FileWeight) -> FileWeight:
    """A matrix of another kind with the same numbers, or nearly: float32, or of that FP8."""
    return fp8.weight_quant(w) if isinstance(w, np.ndarray) else dense(w)


def _small(rng: np.random.Generator, r: Recipe, m: Manifest) -> np.ndarray:
    """x f32 [T, D], of a size that leaves silu curved."""
    x = draws.activations(rng, r["x"], r["tokens"], _widths(r, m)[0])
    return np.clip(x, -10, 10) * np.float32(0.25)


def _swiglu(op: str, r: Recipe, m: Manifest) -> tuple:
    rng = np.random.default_rng(r["seed"])
    x, (gate, up, down) = _small(rng, r, m), (pick(s, 0) for s in _sides(rng, r, 1, m))
    return _large_gates(x, r, gate), gate, up, down, r["activations"]


def _large_gates(x: np.ndarray, r: Recipe, gate: Weight) -> np.ndarray:
    """x of such a size that gates go from -`gates` to `gates` and further, where the recipe has that."""
    if "gates" not in r:
        return x
    found = x @ dense(gate).T
    return x * np.float32(r["gates"] / min(found.max(), -found.min()))


def _swiglu_edges(op: str, m: Manifest) -> list[Recipe]:
    return [
        {**v, "tokens": t, "blocks": 1, "hidden": 1, "x": "normal", "seed": 11, **more}
        for v in _stack_variants(op, m)
        # Each number that strips are chosen by, and of experts too; widths that tiles do not divide.
        for t, more in (
            *((t, {"less": less}) for less in (32, 5) for t in (1, 9)),
            *((t, {}) for t in (0, 1, 2)),
            (3, {"gates": 100}),  # an exponential of them is infinite, or nothing
            (17, {}),
        )
        if t >= m.tokens and ("less" not in more or max(map(draws.unit_columns, STACKS[v["kind"]])) < 256)
    ]


def _swiglu_large(op: str, m: Manifest) -> list[Recipe]:
    """Work for several threads: many tokens, of every kind of weight."""
    return [
        {**v, "tokens": 17, "blocks": 1, "hidden": 2, "x": "normal", "seed": 47}
        for v in _stack_variants(op, m)
        if v["activations"] == m.modes[0]
    ]


def _swiglu_truth(op: str, args: tuple, m: Manifest) -> list[Sum]:
    return [bounds.swiglu(m, *args)]


SWIGLU = Family(
    ("swiglu",),
    _swiglu_recipe,
    _swiglu,
    _swiglu_truth,
    variants=_stack_variants,
    edges=_swiglu_edges,
    large=_swiglu_large,
    relations={
        "power_of_two": relations.scaled_down,
        "batch": relations.tokens_alone,
        "nan_reach": relations.nan_in_a_token,
    },
    real={
        "dyadic": ("dyadic_experts",),
        "threads": ("dyadic_experts_teams",),
        "extremes": ("growing",),
    },
)


def _hidden_recipe(op: str, m: Manifest) -> Strategies:
    return {
        "tokens": st.integers(max(1, m.tokens), 5),
        "hidden": st.integers(1, 400),
        "power": st.integers(-20, 3),
        "x": st.sampled_from(["one", "normal", "outliers"]),
        "seed": SEEDS,
    }


def _hidden(op: str, r: Recipe, m: Manifest) -> tuple:
    hidden = -(-r["hidden"] // m.columns) * m.columns
    x = draws.activations(np.random.default_rng(r["seed"]), r["x"], r["tokens"], 2 * hidden)
    return (np.ldexp(x, r["power"]),)


def _hidden_edges(op: str, m: Manifest) -> list[Recipe]:
    sizes = ((0, 8), (1, 1), (1, 128), (3, 129), (2, 2048), (40, 64))
    return [
        {"tokens": t, "hidden": i, "power": 0, "x": "normal", "seed": 53} for t, i in sizes if t >= m.tokens
    ]


SWIGLU_QUANT = Family(
    ("swiglu_quant",),
    _hidden_recipe,
    _hidden,
    edges=_hidden_edges,
    results=("codes", "scale"),
    demand=lambda op, args, m, got: quantizers.check_codes(got, bounds.silu_times(*bounds.halves(args[0]))),
    relations={"power_of_two": relations.scaled_up, "nan_reach": relations.nan_in_a_half},
    real={"real_sizes": ("hidden",), "extremes": ("quantized_ue8m0", "large_gates", "dimensions")},
)


def _experts_recipe(op: str, m: Manifest) -> Strategies:
    return _swiglu_recipe(op, m) | {"count": st.integers(1, 4), "chosen": st.integers(1, 3)}


def _experts(op: str, r: Recipe, m: Manifest) -> tuple:
    rng = np.random.default_rng(r["seed"])
    x, count = _small(rng, r, m), r["count"]
    ids = np.argsort(rng.random((r["tokens"], count)), axis=1)[:, : min(r["chosen"], count)]
    shares, sides = rng.random(ids.shape).astype(np.float32), _sides(rng, r, count, m)
    return _large_gates(x, r, pick(sides[0], 0)), ids, shares, *sides, r["activations"]


def _experts_edges(op: str, m: Manifest) -> list[Recipe]:
    found = [{**r, "count": 4, "chosen": 2} for r in _swiglu_edges(op, m)]
    base = {"blocks": 1, "hidden": 1, "x": "normal", "seed": 13}
    sizes = (
        {"count": 1, "chosen": 1},
        {"count": 3, "chosen": 0},
        {"count": 5, "chosen": 5},
        *({"count": 4, "chosen": 2, kind: True} for kind in ("listed", "mixed") if m.lists and not m.prepare),
    )
    found += [
        {**base, **v, "tokens": max(t, m.tokens), **size}
        for v in _stack_variants(op, m)
        for i, size in enumerate(sizes)
        for t in ((2, 11, 2, 11, 11)[i],)
        if "mixed" not in size or _takes_both(v, m)
    ]
    # Two of four experts come last, as laws that try one edge of each variant take the last.
    return sorted(found, key=lambda r: (r["count"], r["chosen"], "listed" in r, "mixed" in r) == (4, 2, 0, 0))


def _takes_both(v: Recipe, m: Manifest) -> bool:
    """Whether matrices of float32 and of FP8 can be among such a list."""
    return set(STACKS[v["kind"]]) <= {"fp8", "int4", "plain"} and (not m.weights or "plain" in m.weights)


def _experts_truth(op: str, args: tuple, m: Manifest) -> list[Sum]:
    x, ids, weights, gate, up, down, mode = args
    return [bounds.experts(m, x, ids, weights, lambda e: (pick(gate, e), pick(up, e), pick(down, e)), mode)]


EXPERTS = Family(
    ("experts", "*.experts"),
    _experts_recipe,
    _experts,
    _experts_truth,
    variants=_stack_variants,
    edges=_experts_edges,
    large=lambda op, m: [
        {
            "kind": "q4_k, q6_k",
            "activations": "fp8",
            "tokens": t,
            "blocks": 2,
            "hidden": 5,
            "x": "normal",
            "seed": 47,
            "count": 8,
            "chosen": 8,
        }
        for t in (1, 9)
    ],
    relations={
        "power_of_two": relations.scaled_shares,
        "permutation": relations.relabelled_experts,
        "batch": relations.tokens_alone,
        "nan_reach": relations.nan_in_a_token,
        "unread": relations.unread_experts,
    },
    fixed={"large_offset": "big_stacks"},
    real={
        "dyadic": ("dyadic_experts",),
        "real_sizes": ("many_experts",),
        "extremes": ("chosen", "growing"),
        "threads": ("dyadic_experts_teams", "many_experts_teams"),
    },
)
