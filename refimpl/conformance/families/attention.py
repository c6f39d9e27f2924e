"""Families of attention: RMSNorm, RoPE, latent attention, the router."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from refimpl.conformance.families import relations
from refimpl.conformance.families.family import SEEDS, Family, Recipe, Strategies
from refimpl.conformance.inputs import arrays, draws
from refimpl.conformance.manifest import Manifest
from refimpl.conformance.truth import bounds, quantizers, routing
from refimpl.reference import fp8
from refimpl.tensors import ScaledFP8


def _norm_recipe(op: str, m: Manifest) -> Strategies:
    return {
        "tokens": st.integers(max(1, m.tokens), 5),
        "width": st.integers(1, 600),
        "x": st.sampled_from(list(draws.ACTIVATIONS)),
        "shift": st.sampled_from([0, 0, 0, 3000]),
        "power": st.sampled_from([0, 0, 0, -40, 20]),
        "eps": st.sampled_from([1e-6, 1e-5, 0.25]),
        "seed": SEEDS,
    }


def _norm(op: str, r: Recipe, m: Manifest) -> tuple:
    rng = np.random.default_rng(r["seed"])
    width = -(-r["width"] // m.columns) * m.columns
    x = draws.activations(rng, r["x"], r["tokens"], width) + np.float32(r.get("shift", 0))
    x = x * np.float32(2.0 ** r.get("power", 0))
    return x, rng.normal(0, 1, width).astype(np.float32), r.get("eps", 1e-6)


def _norm_edges(op: str, m: Manifest) -> list[Recipe]:
    sizes = [(0, 8), (1, 1), (1, 256), (3, 7), (2, 7168), (40, 64)]
    found = [{"tokens": t, "width": w, "x": "normal", "seed": 13} for t, w in sizes if t >= m.tokens]
    # Work for several threads, which comes last so that laws of layouts try it, under an eps that shows.
    more = {"tokens": max(33, m.tokens), "width": 4096, "x": "normal", "eps": 0.25, "seed": 13}
    return [*found, more] if m.concurrent and op == "rms_norm" else found


RMS_NORM = Family(
    ("rms_norm",),
    _norm_recipe,
    _norm,
    lambda op, args, m: [bounds.rms_norm(m, *args)],
    edges=_norm_edges,
    large=lambda op, m: [{"tokens": 20, "width": 7168, "x": "normal", "seed": 15}],
    relations={
        "power_of_two": relations.scaled_norm,
        "batch": relations.tokens_alone,
        "nan_reach": relations.nan_in_a_token,
    },
    real={"real_sizes": ("norm",), "extremes": ("dimensions",)},
)

RMS_NORM_QUANT = Family(
    ("rms_norm_quant",),
    _norm_recipe,
    _norm,
    edges=_norm_edges,
    results=("result", "codes", "scale"),
    demand=lambda op, args, m, got: quantizers.check_codes(got, bounds.rms_norm(m, *args), kept=True),
    relations={"power_of_two": relations.scaled_norm, "nan_reach": relations.nan_in_a_norm},
    real={"real_sizes": ("norm",), "extremes": ("quantized_ue8m0", "dimensions")},
)


def _rope_recipe(op: str, m: Manifest) -> Strategies:
    return {
        "tokens": st.integers(max(1, m.tokens), 5),
        "heads": st.integers(0, 3),
        "pairs": st.integers(1, 40),
        "seed": SEEDS,
    }


def _rope(op: str, r: Recipe, m: Manifest) -> tuple:
    rng = np.random.default_rng(r["seed"])
    angles = rng.uniform(0, 100, (r["tokens"], r["pairs"])).astype(np.float32)
    shape = (r["tokens"], *([r["heads"]] if r["heads"] else []), 2 * r["pairs"])
    return draws.activations(rng, "normal", *shape), np.cos(angles), np.sin(angles)


def _rope_edges(op: str, m: Manifest) -> list[Recipe]:
    # 83 heads are whole pieces of 16, 32 or 64 and some more.
    sizes = [(0, 2, 4), (1, 0, 1), (1, 3, 32), (7, 0, 32), (2, 128, 32), (2, 83, 4)]
    sizes += [(33, 67, 32)] if m.concurrent else []  # work for several threads; an interpreter has one
    return [{"tokens": t, "heads": h, "pairs": p, "seed": 17} for t, h, p in sizes if t >= m.tokens]


ROPE = Family(
    ("rope",),
    _rope_recipe,
    _rope,
    lambda op, args, m: [bounds.rope(*args)],
    edges=_rope_edges,
    large=lambda op, m: [{"tokens": 33, "heads": 67, "pairs": 32, "seed": 19}],
    relations={
        "power_of_two": relations.scaled_first,
        "batch": relations.rope_alone,
        "nan_reach": relations.nan_in_a_pair,
    },
    real={"dyadic": ("dyadic_rope",), "extremes": ("heads",)},
)


def takes_bf16(m: Manifest) -> bool:
    """Whether a kernel of tensors declares to take a cache and kv_b in bfloat16 too."""
    return m.array == "torch" and "bf16" in m.weights


def takes_fp8(m: Manifest) -> bool:
    """Whether a kernel of arrays declares to take kv_b as codes of E4M3 with scales too."""
    return m.array == "numpy" and "fp8" in m.weights


def _mla_recipe(op: str, m: Manifest) -> Strategies:
    size = {
        "heads": st.integers(1, 5),
        "n": st.sampled_from([1, 5, 8, 16, 20]),
        "r": st.sampled_from([2, 6, 8]),
        "v": st.sampled_from([1, 7, 12, 16, 18]),
    }
    size |= {"bf16": st.booleans()} if takes_bf16(m) else {}
    size |= {"fp8": st.booleans()} if takes_fp8(m) else {}
    rest = {"latent": st.sampled_from([7, 16, 32, 160]), "seed": SEEDS, "power": st.integers(0, 5)}
    tokens = st.integers(max(1, m.tokens), 4) | st.sampled_from([17, 40])  # few, or a prompt
    return {"tokens": tokens, "past": st.integers(0, 60), **size, **rest}


def _mla(op: str, r: Recipe, m: Manifest) -> tuple:
    rng = np.random.default_rng(r["seed"])
    t, h, n, pe, v, latent, s = (r[k] for k in ("tokens", "heads", "n", "r", "v", "latent", "past"))
    s += t
    q_nope, q_pe, rows = (
        draws.activations(rng, "normal", *shape) for shape in ((t, h, n), (t, h, pe), (s, latent + pe))
    )
    numbers, size = draws.activations(rng, "normal", h, n + v, latent), np.float32(2.0 ** r["power"])
    if r.get("bf16"):
        rows, numbers = arrays.narrow(rows), arrays.narrow(numbers)
    kv_b: np.ndarray | ScaledFP8 = numbers
    if r.get("fp8"):
        codes, scale = fp8.weight_quant(numbers.reshape(h * (n + v), latent))
        # Tiles of normal numbers have much the same scale: others, so that each is seen.
        kv_b = ScaledFP8(codes, scale * np.ldexp(np.float32(1), rng.integers(-4, 2, scale.shape)))
    q_pe = q_pe * size
    if r.get("below"):  # all scores, by 205: their exponentials are nothing but beside the largest
        q_pe[..., 0], rows[:, latent] = -1024, 1
    # the cache's rows hold latent and key side by side
    args = q_nope * size, q_pe, rows[:, :latent], rows[:, latent:], kv_b, 0.2
    if not r.get("rows"):
        return args
    causal = np.arange(s)[None, :] <= np.arange(s - t, s)[:, None]
    rank = np.argsort(np.argsort(np.where(causal, -rng.random(causal.shape), 1)))
    return *args, causal & (rank < r["rows"])


def _mla_edges(op: str, m: Manifest) -> list[Recipe]:
    base = {"heads": 3, "n": 8, "r": 4, "v": 6, "latent": 16, "seed": 19, "power": 0}
    small = {**base, "n": 4, "r": 2, "v": 4, "latent": 8}
    # Rows of a head cross borders of tiles; keys, behind the latents, those of pieces of 64 numbers.
    odd = {**base, "heads": 11, "n": 12, "v": 9, "latent": 160, "r": 70, "power": -2}
    wide = {**odd, "n": 128, "v": 128, "r": 64, "latent": 256, "heads": 2, "power": -5}
    return (
        [  # sizes that nothing divides, also in several tiles of each, and one of each
            {**base, "heads": h, "n": n, "r": r, "v": v, "latent": latent, "tokens": t, "past": 40}
            | {"power": -4 if n > 20 else 0}
            for h, n, r, v, latent in ((3, 69, 70, 45, 200), (1, 1, 2, 1, 1), (17, 20, 2, 18, 7))
            for t in (1, 3, 70)
            if t >= m.tokens and (m.concurrent or t == 1 or h == 3)  # an interpreter takes a second for one
        ]
        + [
            {**size, "tokens": t, "past": 40, "fp8": True}
            for size in ({**odd, "latent": 24, "n": 30}, wide, odd)
            for t in (1, 3, 20)
            if t >= m.tokens and takes_fp8(m)
        ]
        + [
            {**base, "tokens": t, "past": p}
            # the last: a token sees whole tiles of 32 rows, and the next one more
            for t, p in ((0, 5), (1, 0), (1, 1), (1, 200), (3, 0), (5, 7), (2, 63))
            if t >= m.tokens
        ]
        + [{**base, "v": 8, "tokens": t, "past": p} for t, p in ((17, 1), (33, 0), (64, 70))]
        + [{**base, "tokens": t, "past": 20, "below": True} for t in (1, 3, 20) if t >= m.tokens]
        + [  # whole tiles of rows are hidden, of prompts and of a few tokens
            {**base, "tokens": t, "past": p, "rows": 3, "below": True}
            for t, p in ((20, 100), (3, 1500))
            if t >= m.tokens
        ]
        + [  # other rows for each token, and so many heads that kernels take tokens in pieces
            {**small, "heads": 128, "tokens": 5, "past": 2100, "rows": 700}
        ]
        + [  # prompts
            # sparse attention: few rows of all
            {**base, "tokens": t, "past": p, "rows": 3}
            for t, p in ((1, 0), (1, 40), (4, 9))
            if t >= m.tokens
        ]
        + [{**base, "tokens": t, "past": 20, "rows": 1} for t in (1, 70) if t >= m.tokens]
        + [  # many heads behind so many rows that a GPU's kernels take large tiles
            {**base, "heads": 40, "r": 8, "v": 8, "latent": 128, "tokens": 1, "past": 4300, "bf16": True}
            for _ in range(m.tokens <= 1 and takes_bf16(m))
        ]
        + [  # a cache of bfloat16, and sizes of a head as the tensor cores want them
            {**base, "n": 32, "r": 16, "v": 16, "tokens": t, "past": p, "bf16": True}
            for t, p in ((1, 70), (3, 5), (130, 61))
            if t >= m.tokens and takes_bf16(m)
        ]
        + [  # few rows of all, also of so many tokens that kernels take them in pieces
            {**base, "tokens": t, "past": p, "rows": 3}
            for t, p in ((130, 3), (70, 20), (20, 30))
            if m.concurrent or t < 130
        ]
        + [  # so long a cache that its latents are not expanded for so few tokens
            {**base, "heads": 8, "tokens": 70, "past": 1500, "rows": 3} for _ in range(m.concurrent)
        ]
        + [
            {**base, "n": 32, "r": 16, "v": 16, "tokens": 17, "past": 0, "bf16": True}
            for _ in range(takes_bf16(m))
        ]
    )


def _mla_large(op: str, m: Manifest) -> list[Recipe]:
    """Work for several threads: more heads than a panel has, and a cache in pieces."""
    base = {"heads": 67, "n": 16, "r": 8, "v": 16, "latent": 64, "past": 400, "seed": 47, "power": 0}
    found = [{**base, "tokens": t} for t in (1, 5) if t >= m.tokens]
    return found + [{**r, "fp8": True} for r in found if takes_fp8(m)]


def _of_all_rows(relation: Callable[..., list]) -> Callable[..., list]:
    """The relation where tokens attend to all rows; none where they attend to chosen ones."""
    return lambda op, args, rng, m: [] if len(args) > 6 else relation(op, args, rng, m)


MLA = Family(
    ("mla_*",),
    _mla_recipe,
    _mla,
    lambda op, args, m: [bounds.attention(m, *args)],
    edges=_mla_edges,
    large=_mla_large,
    relations={
        "power_of_two": _of_all_rows(relations.scaled_query),
        "permutation": _of_all_rows(relations.permuted_heads),
        "batch": _of_all_rows(relations.queries_alone),
        "nan_reach": _of_all_rows(relations.nan_in_a_query),
        "causal": _of_all_rows(relations.later_tokens),
    },
    real={
        "dyadic": ("dyadic_attention",),
        "real_sizes": ("likely_attention",),
        "extremes": ("length", "growing"),
    },
)


def _route_recipe(op: str, m: Manifest) -> Strategies:
    return {
        "tokens": st.integers(max(1, m.tokens), 6),
        "groups": st.sampled_from([1, 2, 3, 4, 8]),
        "width": st.integers(m.group_of, 6),
        "columns": st.sampled_from([32, 1, 7, 100]),
        "factor": st.sampled_from([2.5, 1.0]),
        "kept": st.integers(1, 4),
        "chosen": st.integers(1, 4),
        "normalize": st.booleans(),
        "x": st.sampled_from(["integers", "ties", "normal", "far"]),
        "bias": st.sampled_from([0, 2, -2]),
        "kind": st.sampled_from(draws.routers(m.scores)),
        "seed": SEEDS,
    }


def _route(op: str, r: Recipe, m: Manifest) -> tuple:
    rng = np.random.default_rng(r["seed"])
    kept = min(r["kept"], r["groups"])
    count = r["groups"] * r["width"]
    chosen = min(r["chosen"], kept * r["width"])
    c = draws.router(count, r["groups"], kept, chosen, r["normalize"], r["kind"], r.get("factor", 2.5))
    columns = r.get("columns", 32)
    x: np.ndarray = rng.normal(0, 1, (r["tokens"], columns))
    weight: np.ndarray = rng.normal(0, 0.3 * min(1, 10 / np.sqrt(columns)), (count, columns))
    bias = rng.normal(0, 0.1, count) * (r["kind"] == "sigmoid")  # DeepSeek-V2's router has none
    if r["x"] == "far":  # logits of some hundreds, all of one sign, near each other
        x[:, 0], weight[:, 0] = 1, rng.choice([-300, 300])
    elif r["x"] != "normal":
        x, weight, bias = rng.integers(-2, 3, x.shape), rng.integers(-1, 2, weight.shape), bias * 0
    if r["x"] == "ties":
        weight[:] = weight[0]
    if r["kind"] == "sigmoid":
        bias = bias + r.get("bias", 0)  # beside scores between 0 and 1: chosen whatever x is, or all negative
    return x.astype(np.float32), weight.astype(np.float32), bias.astype(np.float32), c


ROUTES = (  # groups, experts of one, groups that are kept, experts that are chosen
    (12, 1, 5, 5),
    (12, 1, 5, 2),
    (1, 1, 1, 1),
    (1, 9, 1, 9),
    (5, 3, 5, 4),
    (5, 3, 1, 3),
    (4, 2, 2, 1),
    (8, 5, 7, 33),
)
"""Odd shapes: groups of one expert, one group, all groups or one kept, one expert is chosen or all."""


def _route_edges(op: str, m: Manifest) -> list[Recipe]:
    base = {"groups": 8, "width": 4, "kept": 4, "chosen": 8, "normalize": True, "seed": 23}
    shapes = [
        dict(zip(("groups", "width", "kept", "chosen"), shape)) for shape in ROUTES if shape[1] >= m.group_of
    ]
    sizes = ((2, "normal"), (11, "ties"))  # few tokens and many: GPUs have kernels for each
    kinds = draws.routers(m.scores)
    odd = [
        {**base, **shape, "normalize": i % 2 == 0, "tokens": max(t, m.tokens), "x": x}
        | {"kind": kinds[(i + j) % len(kinds)]}
        for i, shape in enumerate(shapes)
        for j, (t, x) in enumerate(sizes)
        if m.concurrent or i % 2 == j  # an interpreter takes a second for one
    ]
    return odd + [
        {**base, "tokens": t, "x": x, "bias": bias, "kind": kind}
        # More columns and more experts than a program takes at once, of few tokens.
        | ({"columns": 1100, "width": 9} if (t, bias) == (3, 0) else {})
        for t, bias, kind in (
            (0, 0, "sigmoid"),
            (1, 2, "sigmoid"),
            (3, 0, "sigmoid"),
            (3, -2, "sigmoid"),
            *((4, 0, kind) for kind in draws.ROUTERS if kind != "sigmoid"),
        )
        if t >= m.tokens and kind in draws.routers(m.scores)
        for x in (*(["far"] if t == 4 else []), "normal", "integers", "ties")
    ]


ROUTE = Family(
    ("route",),
    _route_recipe,
    _route,
    edges=_route_edges,
    results=("ids", "weights"),
    demand=lambda op, args, m, got: routing.check_route(m, got, *args),
    relations={"nan_reach": relations.nan_in_a_choice},
    real={"real_sizes": ("route",), "extremes": ("lost", "nothing")},
)
