"""What operations have in common, by the pattern of their names: their inputs, their truth, and which laws hold for them.

A row of OPS finds its family by name; a new `*.dequantize` needs nothing here. Recipes are dicts of JSON values: hypothesis draws and shrinks
them, `build` makes the arguments, always the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refimpl import fp8
from refimpl.conformance import bounds, inputs, memo, relations, routing
from refimpl.conformance.bounds import Sum
from refimpl.conformance.compare import Mismatch, same_bits, shown, within
from refimpl.conformance.manifest import Manifest
from refimpl.conformance.policies import e4m3_codes
from refimpl.errors import MismatchError
from refimpl.experts import pick
from refimpl.ops import OPS
from refimpl.tensors import ScaledFP8

Recipe = dict[str, Any]
Strategies = dict[str, st.SearchStrategy]
SEEDS = st.integers(0, 2**32 - 1)


@dataclass(frozen=True)
class Family:
    """Operations alike. `variants` are tried one by one, `recipe` is drawn, `build` makes arguments of both."""

    patterns: tuple[str, ...]
    recipe: Callable[[str, Manifest], Strategies]
    build: Callable[[str, Recipe, Manifest], tuple]
    truth: Callable[[str, tuple, Manifest], list[Sum]] | None = None  # of those whose demand is "bound"
    demand: Callable[[str, tuple, Manifest, tuple], Mismatch | None] | None = None  # where neither bits nor a bound say it
    want: Callable[[str, tuple, Manifest], Any] | None = None  # exact results, where a manifest can change them; else the reference's
    variants: Callable[[str, Manifest], list[Recipe]] = lambda op, m: [{}]
    edges: Callable[[str, Manifest], list[Recipe]] = lambda op, m: []  # shapes that are always tried
    large: tuple[Recipe, ...] = ()  # inputs so large that kernels give them to several threads
    relations: Mapping[str, Callable[..., Any]] = field(default_factory=dict)  # metamorphic laws, see `relations`
    fixed: Mapping[str, str] = field(default_factory=dict)  # laws with enumerated inputs, see `exhaustive`
    results: tuple[str, ...] = ("result",)
    codes: tuple[bool, ...] = (False,)  # results whose bytes are E4M3
    elementwise: bool = False  # each result is of the one number at its place

    def laws(self) -> set[str]:
        """Names of the laws that this family adds to those of every operation."""
        return {*self.relations, *self.fixed}

    def check(self, op: str, args: tuple, m: Manifest, got: tuple) -> Mismatch | None:
        """Whether the results are what they must be."""
        if self.demand:
            return self.demand(op, args, m, got)
        if len(got) != len(self.results):
            return Mismatch(f"{len(got)} results instead of {len(self.results)}")
        if self.truth:
            sums = self.sums(op, args, m)
            return next((bad for g, s, n in zip(got, sums, self.results) if (bad := within(g, s.true, s.bound, n))), None)
        wanted = self.exact(op, args, m)
        bad = next((bad for g, w, n, c in zip(got, wanted, self.results, self.codes) if (bad := same_bits(g, w, m.nan, c, n))), None)
        return bad._replace(what=f"{bad.what}; that of {shown(args[0][bad.where])}") if bad and bad.where and self.elementwise else bad

    def sums(self, op: str, args: tuple, m: Manifest) -> list[Sum]:
        """The truth of each result of an operation whose demand is "bound", and how far from it a result may be."""
        find = self.truth
        return [Sum(*s) for s in memo.truth((op, m), args, lambda: find(op, args, m))] if find else []  # type: ignore[arg-type, return-value]

    def exact(self, op: str, args: tuple, m: Manifest) -> tuple:
        """The results of an operation whose demand is "bits"."""
        return memo.truth((op, m), args, lambda: [self._exact(op, args, m)])[0]

    def _exact(self, op: str, args: tuple, m: Manifest) -> tuple:
        made = self.want(op, args, m) if self.want else OPS[op].reference(*args)
        return tuple(np.array(y) for y in (made if isinstance(made, tuple) else (made,)))  # not a view of the arguments


def family(op: str) -> Family:
    """MismatchError E8003 for an operation that has none."""
    found = next((f for f in FAMILIES if any(fnmatchcase(op, p) for p in f.patterns)), None)
    if found is None:
        raise MismatchError("E8003", op, "no inputs are known for this operation", hint="add it to refimpl/conformance/families.py")
    return found


def reseeded(r: Recipe, seed: int) -> Recipe:
    """The same shapes, other numbers."""
    data = r.get("data")
    if isinstance(data, dict):
        return {**r, "data": {**data, "seed": seed}}
    if isinstance(data, str):
        return {**r, "data": np.random.default_rng(seed).bytes(len(data) // 2).hex()}
    return {**r, "seed": seed}


def module_of(op: str):
    """The format that an operation such as "q4_k.dequantize" is named after; None for codes of one byte."""
    return inputs.FORMATS.get(op.partition(".")[0])


# --- formats --------------------------------------------------------------------------------------------------------------------------------------

SHAPES = st.lists(st.integers(1, 3), max_size=2)


def _bytes_recipe(op: str, m: Manifest) -> Strategies:
    size = module_of(op).BLOCK.itemsize
    explicit = st.integers(1, 3).flatmap(lambda n: st.binary(min_size=n * size, max_size=n * size)).map(bytes.hex)
    drawn = st.fixed_dictionaries({"shape": SHAPES, "blocks": st.integers(min(1, m.tokens), 4), "seed": SEEDS, "nasty": st.sampled_from([0.0, 0.5])})
    return {"data": explicit | drawn}


def _bytes(op: str, r: Recipe, m: Manifest) -> tuple:
    data = r["data"]
    if isinstance(data, str):
        return (np.frombuffer(bytes.fromhex(data), np.uint8).copy(),)
    return (inputs.block_bytes(np.random.default_rng(data["seed"]), module_of(op), [*data["shape"], data["blocks"]], data["nasty"]),)


def _byte_edges(op: str, m: Manifest) -> list[Recipe]:
    sizes: tuple[tuple[list[int], int], ...] = (([3], 0), ([], 1), ([], 33), ([1], 2), ([2, 3], 7), ([5], 3))
    return [{"data": {"shape": s, "blocks": n, "seed": 1, "nasty": 0.0}} for s, n in sizes if n or not m.tokens]


def _codes_recipe(op: str, m: Manifest) -> Strategies:
    return {"data": st.binary(max_size=40).map(bytes.hex)}


def _codes(op: str, r: Recipe, m: Manifest) -> tuple:
    return (np.frombuffer(bytes.fromhex(r["data"]), np.uint8).copy(),)


def _code_edges(op: str, m: Manifest) -> list[Recipe]:
    return [{"data": "".join(f"{i % 256:02x}" for i in range(n))} for n in (0, 1, 255, 256, 1000)]


def _float_kinds(op: str) -> list[str]:
    return list(inputs.FLOATS) if op.endswith(".encode") else [k for k in inputs.FLOATS if k != "patterns"]


# The scale of a block is stored as a half; far beyond its range nothing is left to compare.
_POWERS = {"encode": (-149, 127), "act_quant": (-100, 100), "weight_quant": (-100, 100), "quantize": (-24, 14)}


def _floats_recipe(op: str, m: Manifest) -> Strategies:
    powers = st.integers(*_POWERS[op.partition(".")[2]]) if not op.startswith(("q8_k", "f32", "bf16")) else st.integers(-100, 100)
    row = st.tuples(st.sampled_from(_float_kinds(op)), powers)
    return {"rows": st.lists(row.map(list), min_size=1, max_size=4), "blocks": st.integers(1, 3), "more": st.integers(0, 40), "seed": SEEDS}


def float_unit(op: str) -> int:
    """Numbers of a row come in multiples of this."""
    module = module_of(op)
    return module.WEIGHTS if module else 1


def _floats(op: str, r: Recipe, m: Manifest) -> tuple:
    unit = float_unit(op)
    ragged = op.partition(".")[2] in ("act_quant", "weight_quant", "encode") and m.columns == 1
    columns = r["blocks"] * (unit if unit > 1 else 128) - (r["more"] if ragged or (unit == 1 and m.columns == 1) else 0)
    columns = -(-columns // m.columns) * m.columns
    kinds, powers = zip(*r["rows"]) if r["rows"] else ((), ())
    return (inputs.floats(np.random.default_rng(r["seed"]), list(kinds), list(powers), columns),)


def _float_edges(op: str, m: Manifest) -> list[Recipe]:
    rows = [["normal", 0], ["zeros", 0], ["uneven", 2], ["alone", -3], ["ties of 127", 0]]
    return [{"rows": rows[: max(n, m.tokens)], "blocks": b, "more": more, "seed": 3} for n in (0, 1, 5) for b in (1, 2, 9) for more in (0, 1)]


def _encoded(op: str, args: tuple, m: Manifest) -> np.ndarray:
    return e4m3_codes(args[0], m.rounding, m.overflow)


DECODE = Family(
    ("*.dequantize",), _bytes_recipe, _bytes, edges=_byte_edges, large=({"data": {"shape": [64], "blocks": 64, "seed": 2, "nasty": 0.1}},),
    relations={"power_of_two": relations.scaled_blocks, "permutation": relations.permuted_blocks, "batch": relations.rows_alone},
    fixed={"exhaustive": "blocks"},
)  # fmt: skip
DECODE_CODES = Family(
    ("*.decode",),
    _codes_recipe,
    _codes,
    edges=_code_edges,
    relations={"permutation": relations.permuted_last},
    fixed={"exhaustive": "codes"},
    elementwise=True,
)
ENCODE_CODES = Family(
    ("e4m3.encode",), _floats_recipe, _floats, want=_encoded, edges=_float_edges, codes=(True,), elementwise=True,
    relations={"permutation": relations.permuted_last, "batch": relations.rows_alone}, fixed={"exhaustive": "floats"},
)  # fmt: skip
ENCODE = Family(
    ("*.quantize",), _floats_recipe, _floats, edges=_float_edges, relations={"batch": relations.rows_alone}, fixed={"exhaustive": "scales"}
)
ACT_QUANT = Family(
    ("fp8.act_quant",), _floats_recipe, _floats, edges=_float_edges, results=("codes", "scale"), codes=(True, False),
    relations={"power_of_two": relations.scaled_groups, "batch": relations.rows_alone, "nan_reach": relations.nan_in_a_group},
    fixed={"exhaustive": "groups"},
)  # fmt: skip


# --- FP8 matrices ---------------------------------------------------------------------------------------------------------------------------------


def _tiles_recipe(op: str, m: Manifest) -> Strategies:
    return {"rows": st.integers(1, 300), "columns": st.integers(1, 300), "seed": SEEDS, "codes": st.sampled_from(["quantised", "any"])}


def _tiles(op: str, r: Recipe, m: Manifest) -> tuple:
    rng = np.random.default_rng(r["seed"])
    n, k = (-(-r[name] // multiple) * multiple for name, multiple in (("rows", m.rows), ("columns", m.columns)))
    if r["codes"] == "quantised":
        return (fp8.weight_quant(rng.normal(0, 1, (n, k)).astype(np.float32)),)
    scale = np.ldexp(rng.normal(0, 1, (-(-n // 128), -(-k // 128))), rng.integers(-20, 20)).astype(np.float32)
    return (ScaledFP8(rng.integers(0, 256, (n, k), np.uint8), scale),)


def _tile_edges(op: str, m: Manifest) -> list[Recipe]:
    sizes = ((1, 1), (127, 129), (128, 128), (129, 127), (300, 130), (1, 257))
    return [{"rows": n, "columns": k, "seed": 5, "codes": "any"} for n, k in sizes]


def _matrix_recipe(op: str, m: Manifest) -> Strategies:
    return {"rows": st.integers(1, 300), "columns": st.integers(1, 300), "seed": SEEDS, "power": st.integers(-40, 40)}


def _matrix(op: str, r: Recipe, m: Manifest) -> tuple:
    n, k = (-(-r[name] // multiple) * multiple for name, multiple in (("rows", m.rows), ("columns", m.columns)))
    return (np.ldexp(np.random.default_rng(r["seed"]).normal(0, 1, (n, k)), r["power"]).astype(np.float32),)


def _matrix_edges(op: str, m: Manifest) -> list[Recipe]:
    return [{"rows": n, "columns": k, "seed": 5, "power": 0} for n, k in ((1, 1), (127, 129), (128, 128), (129, 127), (300, 130))]


def _pair(op: str, args: tuple, m: Manifest) -> tuple:
    return tuple(OPS[op].reference(*args))


WEIGHT_DEQUANT = Family(
    ("fp8.weight_dequant",), _tiles_recipe, _tiles, edges=_tile_edges, relations={"power_of_two": relations.scaled_tiles},
    fixed={"exhaustive": "tile"},
)  # fmt: skip
WEIGHT_QUANT = Family(
    ("fp8.weight_quant",), _matrix_recipe, _matrix, want=_pair, edges=_matrix_edges, results=("codes", "scale"), codes=(True, False)
)


# --- linear layers and experts --------------------------------------------------------------------------------------------------------------------


def _kinds(op: str, m: Manifest) -> tuple[str, ...]:
    known = ("fp8",) if op.startswith("fp8.") else inputs.WEIGHTS
    return tuple(k for k in known if not m.weights or k in m.weights)


def _linear_variants(op: str, m: Manifest) -> list[Recipe]:
    return [{"kind": k, "activations": a} for k in _kinds(op, m) for a in m.modes]


def _linear_recipe(op: str, m: Manifest) -> Strategies:
    return {
        "tokens": st.integers(max(1, m.tokens), max(9, m.tokens)), "rows": st.integers(1, 40) | st.integers(100, 300), "blocks": st.integers(1, 3),
        "more": st.integers(0, 100), "x": st.sampled_from(list(inputs.ACTIVATIONS)), "seed": SEEDS,
    }  # fmt: skip


def columns(kind: str, r: Recipe, m: Manifest) -> int:
    """K: whole blocks; for FP8 and plain floats any number."""
    unit = inputs.unit_columns(kind)
    k = r["blocks"] * unit if unit > 1 else 128 * r["blocks"] - r["more"]
    return -(-k // m.columns) * m.columns


def _linear(op: str, r: Recipe, m: Manifest) -> tuple:
    rng = np.random.default_rng(r["seed"])
    rows, k = -(-r["rows"] // m.rows) * m.rows, columns(r["kind"], r, m)
    w = inputs.weight(rng, r["kind"], rows, k)
    return inputs.activations(rng, r["x"], r["tokens"], k), w, r["activations"]


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
        ):
            if tokens >= m.tokens and not (more % 32 and inputs.unit_columns(v["kind"]) > 1):
                found.append({**v, "tokens": tokens, "rows": rows, "blocks": blocks, "more": more, "x": "normal", "seed": 7})
    return found


def _linear_truth(op: str, args: tuple, m: Manifest) -> list[Sum]:
    return [bounds.linear(m, *args)]


LINEAR = Family(
    ("linear", "*.linear"), _linear_recipe, _linear, _linear_truth, variants=_linear_variants, edges=_linear_edges,
    large=({"kind": "fp8", "activations": "fp8", "tokens": 5, "rows": 300, "blocks": 4, "more": 0, "x": "normal", "seed": 43},),
    relations={
        "power_of_two": relations.scaled_x, "permutation": relations.permuted_linear, "batch": relations.tokens_alone, "split_k": relations.split_k,
        "nan_reach": relations.nan_in_a_token,
    },
    fixed={"exhaustive": "every_code", "one_hot": "one_hot", "integers": "integers"},
)  # fmt: skip


def _embed_variants(op: str, m: Manifest) -> list[Recipe]:
    return [{"kind": k} for k in _kinds(op, m)]


def _embed_recipe(op: str, m: Manifest) -> Strategies:
    return {"rows": st.integers(1, 200), "blocks": st.integers(1, 3), "more": st.integers(0, 100), "tokens": st.integers(1, 9), "seed": SEEDS}


def _embed(op: str, r: Recipe, m: Manifest) -> tuple:
    rng = np.random.default_rng(r["seed"])
    table = inputs.weight(rng, r["kind"], r["rows"], columns(r["kind"], r, m))
    return table, rng.integers(0, r["rows"], r["tokens"])


def _embed_edges(op: str, m: Manifest) -> list[Recipe]:
    return [
        {**v, "rows": n, "blocks": 1, "more": 0, "tokens": t, "seed": 41} for v in _embed_variants(op, m) for n, t in ((1, 1), (130, 0), (130, 300))
    ]


EMBED = Family(("embed",), _embed_recipe, _embed, variants=_embed_variants, edges=_embed_edges)

# Gate and up, down: one of each layout of activations, and mixes of them.
STACKS = {
    "q4_k": ("q4_k", "q4_k"), "q4_k, q6_k": ("q4_k", "q6_k"), "q5_k, q8_0": ("q5_k", "q8_0"), "q2_k, q3_k": ("q2_k", "q3_k"), "fp8": ("fp8", "fp8"),
    "q4_0, q5_0": ("q4_0", "q5_0"), "bf16": ("bf16", "bf16"), "plain": ("plain", "plain"),
}  # fmt: skip


def _stack_variants(op: str, m: Manifest) -> list[Recipe]:
    names = [name for name, kinds in STACKS.items() if not m.weights or set(kinds) <= set(m.weights)]
    return [{"kind": name, "activations": a} for name in names for a in m.modes]


def _swiglu_recipe(op: str, m: Manifest) -> Strategies:
    return {
        "tokens": st.integers(max(1, m.tokens), max(6, m.tokens)), "blocks": st.just(1), "hidden": st.integers(1, 2),
        "x": st.sampled_from(["one", "normal", "outliers"]), "seed": SEEDS,
    }  # fmt: skip


def _sides(rng: np.random.Generator, r: Recipe, count: int) -> tuple:
    """gate, up [E, I, D] and down [E, D, I] of a recipe."""
    first, last = STACKS[r["kind"]]
    d, i = 256 * r["blocks"], 256 * r["hidden"]
    return inputs.stack(rng, first, count, i, d), inputs.stack(rng, first, count, i, d), inputs.stack(rng, last, count, d, i)


def _small(rng: np.random.Generator, r: Recipe) -> np.ndarray:
    """x f32 [T, D], of a size that leaves silu curved."""
    x = inputs.activations(rng, r["x"], r["tokens"], 256 * r["blocks"])
    return np.clip(x, -10, 10) * np.float32(0.25)


def _swiglu(op: str, r: Recipe, m: Manifest) -> tuple:
    rng = np.random.default_rng(r["seed"])
    return _small(rng, r), *(pick(s, 0) for s in _sides(rng, r, 1)), r["activations"]


def _swiglu_edges(op: str, m: Manifest) -> list[Recipe]:
    return [
        {**v, "tokens": t, "blocks": 1, "hidden": 1, "x": "normal", "seed": 11} for v in _stack_variants(op, m) for t in (0, 1, 3) if t >= m.tokens
    ]


def _swiglu_truth(op: str, args: tuple, m: Manifest) -> list[Sum]:
    return [bounds.swiglu(m, *args)]


SWIGLU = Family(
    ("swiglu",), _swiglu_recipe, _swiglu, _swiglu_truth, variants=_stack_variants, edges=_swiglu_edges,
    relations={"power_of_two": relations.scaled_down, "batch": relations.tokens_alone, "nan_reach": relations.nan_in_a_token},
)  # fmt: skip


def _experts_recipe(op: str, m: Manifest) -> Strategies:
    return _swiglu_recipe(op, m) | {"count": st.integers(1, 4), "chosen": st.integers(1, 3)}


def _experts(op: str, r: Recipe, m: Manifest) -> tuple:
    rng = np.random.default_rng(r["seed"])
    x, count = _small(rng, r), r["count"]
    ids = np.argsort(rng.random((r["tokens"], count)), axis=1)[:, : min(r["chosen"], count)]
    return x, ids, rng.random(ids.shape).astype(np.float32), *_sides(rng, r, count), r["activations"]


def _experts_edges(op: str, m: Manifest) -> list[Recipe]:
    return [{**r, "count": 4, "chosen": 2} for r in _swiglu_edges(op, m)]


def _experts_truth(op: str, args: tuple, m: Manifest) -> list[Sum]:
    x, ids, weights, gate, up, down, mode = args
    return [bounds.experts(m, x, ids, weights, lambda e: (pick(gate, e), pick(up, e), pick(down, e)), mode)]


EXPERTS = Family(
    ("experts",), _experts_recipe, _experts, _experts_truth, variants=_stack_variants, edges=_experts_edges,
    large=tuple(
        {"kind": "q4_k, q6_k", "activations": "fp8", "tokens": t, "blocks": 2, "hidden": 2, "x": "normal", "seed": 47, "count": 8, "chosen": 3}
        for t in (1, 9)
    ),
    relations={
        "power_of_two": relations.scaled_shares, "permutation": relations.relabelled_experts, "batch": relations.tokens_alone,
        "nan_reach": relations.nan_in_a_token, "unread": relations.unread_experts,
    },
    fixed={"large_offset": "big_stacks"},
)  # fmt: skip


# --- attention ------------------------------------------------------------------------------------------------------------------------------------


def _norm_recipe(op: str, m: Manifest) -> Strategies:
    return {"tokens": st.integers(max(1, m.tokens), 5), "width": st.integers(1, 600), "x": st.sampled_from(list(inputs.ACTIVATIONS)), "seed": SEEDS}


def _norm(op: str, r: Recipe, m: Manifest) -> tuple:
    rng = np.random.default_rng(r["seed"])
    width = -(-r["width"] // m.columns) * m.columns
    return inputs.activations(rng, r["x"], r["tokens"], width), rng.normal(0, 1, width).astype(np.float32), 1e-6


def _norm_edges(op: str, m: Manifest) -> list[Recipe]:
    return [{"tokens": t, "width": w, "x": "normal", "seed": 13} for t, w in ((0, 8), (1, 1), (1, 256), (3, 7), (2, 7168), (40, 64)) if t >= m.tokens]


RMS_NORM = Family(
    ("rms_norm",), _norm_recipe, _norm, lambda op, args, m: [bounds.rms_norm(m, *args)], edges=_norm_edges,
    relations={"power_of_two": relations.scaled_norm, "batch": relations.tokens_alone, "nan_reach": relations.nan_in_a_token},
)  # fmt: skip


def _rope_recipe(op: str, m: Manifest) -> Strategies:
    return {"tokens": st.integers(max(1, m.tokens), 5), "heads": st.integers(0, 3), "pairs": st.integers(1, 40), "seed": SEEDS}


def _rope(op: str, r: Recipe, m: Manifest) -> tuple:
    rng = np.random.default_rng(r["seed"])
    angles = rng.uniform(0, 100, (r["tokens"], r["pairs"])).astype(np.float32)
    shape = (r["tokens"], *([r["heads"]] if r["heads"] else []), 2 * r["pairs"])
    return inputs.activations(rng, "normal", *shape), np.cos(angles), np.sin(angles)


def _rope_edges(op: str, m: Manifest) -> list[Recipe]:
    sizes = ((0, 2, 4), (1, 0, 1), (1, 3, 32), (7, 0, 32), (2, 128, 32))
    return [{"tokens": t, "heads": h, "pairs": p, "seed": 17} for t, h, p in sizes if t >= m.tokens]


ROPE = Family(
    ("rope",), _rope_recipe, _rope, lambda op, args, m: [bounds.rope(*args)], edges=_rope_edges,
    relations={"power_of_two": relations.scaled_first, "batch": relations.rope_alone, "nan_reach": relations.nan_in_a_pair},
)  # fmt: skip


def _mla_recipe(op: str, m: Manifest) -> Strategies:
    size = {"heads": st.integers(1, 5), "n": st.sampled_from([1, 8, 16]), "r": st.sampled_from([2, 8]), "v": st.sampled_from([1, 12, 16])}
    rest = {"latent": st.sampled_from([16, 32]), "seed": SEEDS, "power": st.integers(0, 5)}
    return {"tokens": st.integers(max(1, m.tokens), 4), "past": st.integers(0, 60), **size, **rest}


def _mla(op: str, r: Recipe, m: Manifest) -> tuple:
    rng = np.random.default_rng(r["seed"])
    t, h, n, pe, v, latent, s = (r[k] for k in ("tokens", "heads", "n", "r", "v", "latent", "past"))
    s += t
    q_nope, q_pe, rows = (inputs.activations(rng, "normal", *shape) for shape in ((t, h, n), (t, h, pe), (s, latent + pe)))
    kv_b, size = inputs.activations(rng, "normal", h, n + v, latent), np.float32(2.0 ** r["power"])
    return q_nope * size, q_pe * size, rows[:, :latent], rows[:, latent:], kv_b, 0.2  # the cache's rows hold latent and key side by side


def _mla_edges(op: str, m: Manifest) -> list[Recipe]:
    base = {"heads": 3, "n": 8, "r": 4, "v": 6, "latent": 16, "seed": 19, "power": 0}
    return [{**base, "tokens": t, "past": p} for t, p in ((1, 0), (1, 1), (1, 200), (3, 0), (5, 7)) if t >= m.tokens]


MLA = Family(
    ("mla_*",), _mla_recipe, _mla, lambda op, args, m: [bounds.attention(m, *args)], edges=_mla_edges,
    relations={
        "power_of_two": relations.scaled_query, "permutation": relations.permuted_heads, "batch": relations.queries_alone,
        "nan_reach": relations.nan_in_a_query, "causal": relations.later_tokens,
    },
)  # fmt: skip


def _route_recipe(op: str, m: Manifest) -> Strategies:
    return {
        "tokens": st.integers(max(1, m.tokens), 6), "groups": st.sampled_from([1, 2, 4, 8]), "width": st.integers(2, 6), "kept": st.integers(1, 4),
        "chosen": st.integers(1, 4), "normalise": st.booleans(), "x": st.sampled_from(["integers", "ties", "normal"]), "seed": SEEDS,
    }  # fmt: skip


def _route(op: str, r: Recipe, m: Manifest) -> tuple:
    rng = np.random.default_rng(r["seed"])
    kept = min(r["kept"], r["groups"])
    count = r["groups"] * r["width"]
    c = inputs.router(count, r["groups"], kept, min(r["chosen"], kept * r["width"]), r["normalise"])
    x: np.ndarray = rng.normal(0, 1, (r["tokens"], 32))
    weight: np.ndarray = rng.normal(0, 0.3, (count, 32))
    bias = rng.normal(0, 0.1, count)
    if r["x"] != "normal":
        x, weight, bias = rng.integers(-2, 3, x.shape), rng.integers(-1, 2, weight.shape), bias * 0
    if r["x"] == "ties":
        weight[:] = weight[0]
    return x.astype(np.float32), weight.astype(np.float32), bias.astype(np.float32), c


def _route_edges(op: str, m: Manifest) -> list[Recipe]:
    base = {"groups": 8, "width": 4, "kept": 4, "chosen": 8, "normalise": True, "seed": 23}
    return [{**base, "tokens": t, "x": x} for t in (0, 1, 3) if t >= m.tokens for x in ("normal", "integers", "ties")]


ROUTE = Family(
    ("route",), _route_recipe, _route, edges=_route_edges, results=("ids", "weights"),
    demand=lambda op, args, m, got: routing.check(m, got, *args),
)  # fmt: skip

FAMILIES = (
    DECODE, DECODE_CODES, ENCODE_CODES, ENCODE, ACT_QUANT, WEIGHT_DEQUANT, WEIGHT_QUANT, EMBED, LINEAR, SWIGLU, EXPERTS, RMS_NORM, ROPE, MLA, ROUTE
)  # fmt: skip
