"""Laws at the sizes of real models. `dyadic`: sums that are exact in any order, asked for to the bit.
`real_sizes`: random numbers within a bound that holds with a stated probability, and more rows, blocks,
tokens or experts than 16 bits count.

The quick level has odd shapes about DeepSeek-V3's, the full level all of its own. A recipe names its kind,
its shape and its seed, so that one case can be run again by itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from refimpl.conformance.families.attention import takes_bf16
from refimpl.conformance.families.linear import STACKS
from refimpl.conformance.inputs import arrays, cached, draws
from refimpl.conformance.truth import bounds, dyadic, likely, routing
from refimpl.conformance.truth.compare import Mismatch, number_of, same_bits, within
from refimpl.conformance.truth.dyadic import Matrix
from refimpl.formats import e4m3
from refimpl.tensors import Packed, ScaledFP8, ScaledInt4

if TYPE_CHECKING:
    from refimpl.conformance.trial import Trial

Recipe = dict[str, Any]
MANY = 2**16 + 65  # rows, blocks or tokens

PRIMARY = ("fp8", "q4_k", "plain")
Shapes = tuple[tuple[int, int, int], ...]
SHAPES: Shapes = (
    (7, 2051, 2048),
    (1, 301, 7168),
    (15, 521, 7168),
    (64, 301, 2048),
    (65, 2051, 1440),
    (3, 131, 1440),
    (131, 130, 2176),
    (127, 2051, 2176),
    (1, 2051, 1024),
    (1, 301, 7296),
    (1, MANY, 256),
    (MANY, 3, 128),
)
"""(M, N, K) of the primary kinds of weights: N odd and beyond 2,048 with few and many tokens, odd numbers
of blocks of 128, and a rest of 32 behind them, and more rows and more tokens than 16 bits count.
"""
OTHERS: Shapes = ((1, 301, 7168), (64, 301, 2048), (15, 131, 7168), (7, 2051, 512))
TEAMS: Shapes = ((7, 2051, 2048), (127, 2051, 2176), (15, 131, 7168), (64, 301, 2048))
TEAM_KINDS = ("fp8", "q4_k", "q8_0", "bf16", "int4")
"""What is tried with several numbers of threads: a kind of weight for each way of multiplying. Plain matrices
are BLAS's, whose threads wait by spinning.
"""
PERSISTENT: Shapes = (
    (131, 4352, 1024),
    (200, 8452, 2176),
    (200, 8452, 2048),
    (512, 8452, 2048),
    (64, 2112, 7168),
    (128, 2112, 7168),
    (512, 16904, 2048),
    (2100, 520, 2432),
    (1, 2112, 7168),
    (16, 2120, 6016),
    (13, 17032, 512),
    (60, 2120, 6016),
    (120, 2120, 6016),
)
"""Of FP8 on a GPU, where kernels stay on their processor: whole tiles of 128 outputs, and of 256, also with
others in a second launch; tiles of 64 outputs that programs share, of 64 tokens and of 128; several tiles of
256 for a program; more tokens than go through all outputs together; few tokens, in tiles that are shared and
in whole ones; and a program that ends one shared tile and begins the next, of 16, 64 and 128 tokens.
"""
TALL: Shapes = ((1027, 8209, 32),)
"""Of FP8, and from the level full on of BF16: so many rows that tokens are not parted, and more of these than
sums are kept for at once, with a tail of either.
"""
INTERPRETED: Shapes = ((66, 61, 3500), (1, 130, 7296))
"""Tiles so few that programs share the columns of each: several of tokens, with columns that 128 does not
divide; and several of outputs.
"""
V3 = (
    (1536, 7168),
    (24576, 1536),
    (576, 7168),
    (32768, 512),
    (7168, 16384),
    (18432, 7168),
    (7168, 18432),
    (2048, 7168),
    (7168, 2048),
)
"""(N, K) of DeepSeek-V3's matrices: queries, latents, output, dense layers, experts."""


def cases(name: str) -> Callable[[Trial], Iterator[Recipe]]:
    """The recipes of one of the two laws; at the smoke level the first."""

    def enumerate_(trial: Trial) -> Iterator[Recipe]:
        for kind in trial.family.real.get(name, ()):
            for recipe in KINDS[kind][0](trial):
                yield {"real": kind, **recipe}
                if trial.level == "smoke":
                    return

    return enumerate_


def check(trial: Trial, r: Recipe) -> Mismatch | None:
    """Judge one case at the sizes of a real model; None where it is right."""
    return KINDS[r["real"]][1](trial, r)


def _deep(trial: Trial) -> bool:
    return trial.level not in ("smoke", "quick")


def _judge(trial: Trial, r: Recipe, make: Callable[[], tuple]) -> Mismatch | None:
    """`make` gives arguments, the truth f64, and how far from it a result may be; once for all kernels."""
    m = trial.manifest
    *args, true, bound = cached.arguments(("real", trial.op, m, json.dumps(r)), make)
    got = trial(*args)
    if wrong := number_of(got, trial.family.results):
        return wrong
    allowed = bounds.stored(m, bounds.Sum(true, bound))
    if bound.any() and bounds.says_nothing(allowed):
        trial.silent += 1
    return within(got[0], true, allowed.bound)


# --- linear layers ------------------------------------------------------------------------------------------


def _linear_cases(trial: Trial) -> Iterator[Recipe]:
    m, found = trial.manifest, trial.family.variants(trial.op, trial.manifest)
    found = sorted(found, key=lambda v: v["kind"] not in PRIMARY)
    for i, v in enumerate(found):
        every = SHAPES if v["kind"] in PRIMARY else OTHERS
        shapes: Shapes = (OTHERS[i % len(OTHERS)],) if trial.brief else every
        shapes = shapes if m.concurrent else INTERPRETED
        tall = v["kind"] in (("fp8", "bf16") if _deep(trial) else ("fp8",)) and v["activations"] == m.modes[0]
        shapes += TALL if tall and m.concurrent and not trial.brief else ()
        shapes += PERSISTENT if v["kind"] == "fp8" and m.device != "cpu" else ()
        if _deep(trial) and v["kind"] in PRIMARY and m.concurrent:
            shapes += tuple((t, *shape) for shape in V3 for t in (1, 16, 127))
        for tokens, rows, columns in shapes:
            if tokens == MANY and v["activations"] != m.modes[0]:  # it counts tokens, whatever these are
                continue
            yield {**v, "tokens": max(tokens, m.tokens), "rows": rows, "columns": columns, "seed": 61}


def _sizes(r: Recipe, m: Any) -> tuple[int, int]:
    unit = max(m.columns, draws.unit_columns(r["kind"]))
    return -(-r["rows"] // m.rows) * m.rows, -(-r["columns"] // unit) * unit


def _dyadic_linear_cases(trial: Trial) -> Iterator[Recipe]:
    """None where sums of 24 bits are not exact."""
    sums_of_halves = trial.manifest.quantized == "q8_1"
    if trial.manifest.unit <= bounds.UNITS["tensor-core"] and not sums_of_halves:
        yield from _linear_cases(trial)


def _dyadic_linear(trial: Trial, r: Recipe) -> Mismatch | None:
    def make() -> tuple:
        rng, (rows, columns) = np.random.default_rng(r["seed"]), _sizes(r, trial.manifest)
        m = dyadic.matrix(rng, r["kind"], rows, columns)
        layout = bounds.layout(m.weight, r["activations"], trial.manifest)
        x = dyadic.activations(rng, layout.partition(" ")[0], r["tokens"], columns)
        wide = x.astype(np.float64)
        # Codes that are only declared to be the nearest may have scales four roundings away.
        off = (trial.manifest.activations == "nearest" or trial.manifest.quantized) and layout != "exact"
        bound = bounds.gamma(8) * dyadic.magnitudes(wide, m) if off else np.zeros(1)
        return x, m.weight, r["activations"], dyadic.product(wide, m), bound

    return _judge(trial, r, make)


def _linear_team_cases(trial: Trial) -> Iterator[Recipe]:
    """Few and many tokens of every way that a matrix is cut into work."""
    for r in _dyadic_linear_cases(trial):
        shape = r["tokens"], r["rows"], r["columns"]
        if r["kind"] in TEAM_KINDS and r["activations"] == trial.manifest.modes[0] and shape in TEAMS:
            yield r


def _ties_cases(trial: Trial) -> Iterator[Recipe]:
    """One, few and many tokens of every kind of weight whose activations are quantized to the bit."""
    m, seen = trial.manifest, set()
    for v in trial.family.variants(trial.op, m):
        layout = bounds.layout(draws.weight(np.random.default_rng(0), v["kind"], 1, 256), v["activations"])
        known = m.activations == "bits" and not m.quantized
        if layout == "exact" or not known or m.unit > bounds.UNITS["tensor-core"]:
            continue
        for tokens in (1, 3, 33) if layout not in seen or not trial.brief else (3,):
            columns = 128 if layout in bounds.E4M3 else 512
            yield {**v, "tokens": max(tokens, m.tokens), "rows": 131, "columns": columns, "seed": 63}
        seen.add(layout)


def _ties(trial: Trial, r: Recipe) -> Mismatch | None:
    """Numbers halfway between two codes. The units of tensor cores may lose what they do of any E4M3, which
    is less than a step of the largest numbers.
    """

    def make() -> tuple:
        rng, (rows, columns) = np.random.default_rng(r["seed"]), _sizes(r, trial.manifest)
        m = dyadic.matrix(rng, r["kind"], rows, columns)
        layout = bounds.layout(m.weight, r["activations"])
        x = dyadic.ties(rng, layout, r["tokens"], columns)
        rounded = bounds.rounded(x, layout)
        units = trial.manifest.accumulation == "tensor-core" and layout in bounds.E4M3
        lost = likely.tensor_core(bounds.Sum(rounded, np.zeros(x.shape)), m) if units else np.zeros(1)
        return x, m.weight, r["activations"], dyadic.product(rounded, m), lost

    return _judge(trial, r, make)


def _likely_linear_cases(trial: Trial) -> Iterator[Recipe]:
    """One shape of each kind and mode, 7168 columns wide."""
    for v in trial.family.variants(trial.op, trial.manifest):
        if v["kind"] in PRIMARY or _deep(trial):
            yield {**v, "tokens": max(5, trial.manifest.tokens), "rows": 301, "columns": 7168, "seed": 67}


def _likely_linear(trial: Trial, r: Recipe) -> Mismatch | None:
    def make() -> tuple:
        rng, (rows, columns) = np.random.default_rng(r["seed"]), _sizes(r, trial.manifest)
        w = random_matrix(rng, r["kind"], rows, columns)
        x = rng.normal(0, 1, (r["tokens"], columns)).astype(np.float32)
        true, bound = likely.linear(trial.manifest, x, w, r["activations"])
        return x, w.weight, r["activations"], true, bound

    return _judge(trial, r, make)


def random_matrix(rng: np.random.Generator, kind: str, rows: int, columns: int) -> Matrix:
    """Random weights, of which few rows are distinct; FP8 tiles under scales of their own."""
    which, w = rng.integers(0, dyadic.DISTINCT, rows), draws.weight(rng, kind, dyadic.DISTINCT, columns)
    if isinstance(w, ScaledFP8):
        scale = w.scale * rng.uniform(0.5, 2, (-(-rows // 128), w.scale.shape[1])).astype(np.float32)
        codes = e4m3.decode(w.codes).astype(np.float64)
        return Matrix(ScaledFP8(w.codes[which], scale), codes, np.abs(codes), which)
    exact, sizes = bounds.dense(w)
    if isinstance(w, ScaledInt4):
        return Matrix(ScaledInt4(w.codes[which], w.scale[which]), exact, sizes, which)
    data = Packed(w.data[which], w.ggml_type, (rows, columns)) if isinstance(w, Packed) else w[which]
    return Matrix(data, exact, sizes, which)


# --- experts ------------------------------------------------------------------------------------------------

EXACT = {
    "fp8": (7168, 2048),
    "q4_k, q6_k": (7168, 2048),
    "q4_k": (2048, 512),
    "bf16": (2048, 768),
    "mxfp4": (2048, 512),
    "int4": (2048, 512),
}
DENSE = ("fp8", "q4_k, q6_k")
"""Kinds that `swiglu` is also given as wide as DeepSeek-V3's dense layers."""


def _dyadic_experts_cases(trial: Trial) -> Iterator[Recipe]:
    m = trial.manifest
    for v in trial.family.variants(trial.op, m):
        known = (m.activations == "bits" and not m.quantized) or v["activations"] == "exact"
        if v["kind"] in EXACT and known and m.unit <= bounds.UNITS["tensor-core"]:
            columns, hidden = EXACT[v["kind"]] if m.concurrent else (512, 256)
            case = {**v, "columns": columns, "hidden": hidden, "tokens": max(3, m.tokens), "seed": 71}
            yield case
            if trial.op == "swiglu" and v["kind"] in DENSE and v["activations"] == "fp8" and m.concurrent:
                yield {**case, "columns": 512, "hidden": 18432}


def _dyadic_experts(trial: Trial, r: Recipe) -> Mismatch | None:
    """Two experts (one for `swiglu`) whose gates are the identity and whose codes are exact."""

    def make() -> tuple:
        rng, kinds = np.random.default_rng(r["seed"]), STACKS[r["kind"]]
        first, _, last = (
            bounds.layout(dyadic.of_integers(k, np.zeros((1, 256), int), np.zeros(1, int)), r["activations"])
            for k in kinds
        )
        t = dyadic.twins(rng, r["columns"])
        x = dyadic.tokens_of_twins(rng, first, last, r["tokens"], r["columns"], t)
        count = 1 if trial.op == "swiglu" else 2
        pool = [dyadic.expert(rng, kinds, r["hidden"], r["columns"], last, t) for _ in range(count)]
        true = np.stack([dyadic.expert_of(x, e) for e in pool])
        if trial.op == "swiglu":
            (e,) = pool
            return x, e.gate, e.up, e.down, r["activations"], true[0], np.zeros(1)
        ids = np.array([rng.permutation(2) for _ in x])
        shares = rng.choice([-1.0, 0.0, 0.25, 0.5, 2.0], ids.shape).astype(np.float32)
        summed = (shares[..., None] * np.take_along_axis(true, ids.T[..., None], axis=0).swapaxes(0, 1)).sum(
            1
        )
        stacks = [_stacked([getattr(e, side) for e in pool]) for side in ("gate", "up", "down")]
        return x, ids, shares, *stacks, r["activations"], summed, np.zeros(1)

    return _judge(trial, r, make)


def _stacked(matrices: list[Any]) -> Any:
    first = matrices[0]
    if not isinstance(first, Packed):
        return matrices
    return Packed(np.stack([m.data for m in matrices]), first.ggml_type, (len(matrices), *first.shape))


def _many_experts_cases(trial: Trial) -> Iterator[Recipe]:
    """256 experts, eight a token, one met by a hundred tokens and one by none; then odd counts of choices."""
    found = trial.family.variants(trial.op, trial.manifest)
    for i, v in enumerate(found if _deep(trial) else found[:1]):
        chosen = 8 if trial.level != "smoke" else 3
        yield {**v, "tokens": 130, "count": 256, "chosen": chosen, "seed": 73 + i}
    for i, v in enumerate(found[:2] if trial.brief else found):
        yield {**v, "tokens": 9, "count": 11, "chosen": (9, 5, 7, 1, 6)[i % 5], "seed": 79 + i}


def _some(cases: Callable[[Trial], Iterator[Recipe]], count: int) -> Callable[[Trial], Iterator[Recipe]]:
    """So many of the cases whose activations are quantized: others are often BLAS's, see TEAM_KINDS."""
    return lambda trial: islice((r for r in cases(trial) if r["activations"] == "fp8"), count)


def _many_experts(trial: Trial, r: Recipe) -> Mismatch | None:
    """Expert 3 has the first hundred tokens, the last but one has none."""
    small = {"blocks": 1, "hidden": 1, "x": "normal"}
    x, _, _, *stacks, mode = trial.build({**r, **small})
    rng, count = np.random.default_rng(r["seed"]), r["count"]
    score = rng.random((len(x), count))
    score[:100, 3], score[:, count - 2] = 2, -1
    ids = np.argsort(-score, axis=1)[:, : r["chosen"]]
    ids = rng.permuted(ids, axis=1)
    shares = rng.uniform(-1, 1, ids.shape).astype(np.float32)
    shares[rng.random(ids.shape) < 0.1] = 0
    args = (x, ids, shares, *stacks, mode)
    return trial.judge(args, trial(*args))


# --- attention and the router -------------------------------------------------------------------------------


def _attention_cases(trial: Trial) -> Iterator[Recipe]:
    naive = trial.op == "mla_naive"  # which makes keys and values of all heads
    heads = 16 if naive else 32 if trial.level == "smoke" else 128
    sizes = [(2, heads, 2000), (17, 5, 300)]
    if not naive:  # one query: a case for compiled loops, one for BLAS; or a short one for an interpreter
        sizes += [(1, 2, 700), (1, heads, 2000)] if trial.manifest.concurrent else [(1, 2, 1100)]
    if not (naive or trial.brief):  # so much that kernels take it in pieces
        sizes += [(7, heads, 2000), (33, 40, 2000)]
        sizes += [(200, heads, 400), (700, 2, 400)] if trial.manifest.concurrent else []  # not interpreted
    for i, (tokens, heads, past) in enumerate(sizes):
        if tokens >= trial.manifest.tokens:
            yield {"tokens": tokens, "heads": heads, "past": past, "seed": 83 + i}
    if takes_bf16(trial.manifest):
        heads = 128 if trial.manifest.concurrent else 8
        prompt = (200, 300) if trial.manifest.concurrent else (40, 100)
        for tokens, past in ((1, 2000), (2, 2000), prompt):
            tokens = max(tokens, trial.manifest.tokens)
            yield {"tokens": tokens, "heads": heads, "past": past, "seed": 85, "bf16": True}
        # Large tiles of a long cache, which `_dyadic_attention_cases` has for the interpreter.
        if trial.manifest.concurrent and not naive and trial.manifest.tokens <= 1:
            yield {"tokens": 1, "heads": 128, "past": 20000, "seed": 87, "bf16": True}


def _dyadic_attention_cases(trial: Trial) -> Iterator[Recipe]:
    yield from _attention_cases(trial)
    interpreted = takes_bf16(trial.manifest) and not trial.manifest.concurrent
    if interpreted and trial.op != "mla_naive" and trial.level != "smoke":
        if trial.manifest.tokens <= 1:  # large tiles of a long cache
            yield {"tokens": 1, "heads": 36, "past": 4200, "seed": 87, "bf16": True}
        # A prompt behind so many rows that these come in pieces. An interpreter needs ten seconds for each.
        tokens = max(17, trial.manifest.tokens)
        yield {"tokens": tokens, "heads": 2, "past": 15000, "seed": 89, "bf16": True}


def _dyadic_attention(trial: Trial, r: Recipe) -> Mismatch | None:
    """Each query looks at one key of all of them."""

    def make() -> tuple:
        rng = np.random.default_rng(r["seed"])
        args, true = dyadic.attention(rng, r["tokens"], r["heads"], r["past"])
        return *_stored(r, args), true, np.zeros(1)

    return _judge(trial, r, make)


def _stored(r: Recipe, args: tuple) -> tuple:
    """The arguments of attention with cache and kv_b in the type that the recipe names."""
    return (*args[:2], *map(arrays.narrow, args[2:5]), args[5]) if r.get("bf16") else args


def _likely_attention(trial: Trial, r: Recipe) -> Mismatch | None:
    def make() -> tuple:
        rng, t, h = np.random.default_rng(r["seed"]), r["tokens"], r["heads"]
        shapes = ((t, h, 128), (t, h, 64), (r["past"] + t, 512), (r["past"] + t, 64), (h, 256, 512))
        q, q_pe, latent, k_pe, kv_b = (rng.normal(0, 1, shape).astype(np.float32) for shape in shapes)
        kv_b /= np.float32(np.sqrt(512))
        args = _stored(r, (q, q_pe, latent, k_pe, kv_b, 0.1))
        return *args, *likely.attention(trial.manifest, *args)

    return _judge(trial, r, make)


def _route_cases(trial: Trial) -> Iterator[Recipe]:
    """DeepSeek-V3's 256 experts in eight groups, and the 160 of DeepSeek-V2."""
    v3 = {"experts": 256, "kept": 4, "chosen": 8, "kind": "sigmoid", "seed": 89}
    v2 = {"experts": 160, "kept": 3, "chosen": 6, "kind": "softmax, groups by their best", "seed": 91}
    for x in ("normal", "integers"):
        for shape in (v3, v2):
            if shape["kind"] in draws.routers(trial.manifest.scores):
                yield {"tokens": 65, "groups": 8, "x": x, **shape}


def _route(trial: Trial, r: Recipe) -> Mismatch | None:
    """Experts in eight groups, 7168 columns: random scores, or small integers with many ties."""
    rng, shape = np.random.default_rng(r["seed"]), (r["tokens"], 7168)
    kind = r.get("kind", "sigmoid")
    c = draws.router(r["experts"], r["groups"], r["kept"], r["chosen"], kind=kind)
    x: np.ndarray = rng.normal(0, 1, shape)
    w: np.ndarray = rng.normal(0, 0.02, (r["experts"], 7168))
    bias = np.asarray(rng.normal(0, 2, r["experts"])) * (kind == "sigmoid")
    if r["x"] == "integers":
        x = rng.integers(-1, 2, shape) * (rng.random(shape) < 0.002)
        w, bias = rng.integers(-1, 2, w.shape), rng.integers(-1, 2, bias.shape) * (kind == "sigmoid")
    x, w, bias = (a.astype(np.float32) for a in (x, w, bias))
    return routing.check_route(trial.manifest, trial(x, w, bias, c), x, w, bias, c, likely=True)


# --- more than 16 bits count --------------------------------------------------------------------------------


def _rope_cases(trial: Trial) -> Iterator[Recipe]:
    # The interpreter runs a program for each token.
    sizes: Shapes = ((300, 3, 32),)
    if trial.manifest.concurrent:
        sizes = (300, 128, 32), (MANY, 1, 1), (2051, 3, 2)
    yield from ({"tokens": t, "heads": h, "pairs": p, "seed": 97} for t, h, p in sizes)


def _dyadic_rope(trial: Trial, r: Recipe) -> Mismatch | None:
    """Sines and cosines of eighths."""

    def make() -> tuple:
        rng, heads = np.random.default_rng(r["seed"]), [r["heads"]] if r["heads"] else []
        x = rng.integers(-9, 10, (r["tokens"], *heads, 2 * r["pairs"])).astype(np.float32)
        cos, sin = (rng.integers(-8, 9, (r["tokens"], r["pairs"])).astype(np.float32) / 8 for _ in range(2))
        return x, cos, sin, bounds.rope(x, cos, sin).true, np.zeros(1)

    return _judge(trial, r, make)


def _norm_cases(trial: Trial) -> Iterator[Recipe]:
    yield {"tokens": 65, "width": 7168, "x": "normal", "seed": 101}
    if trial.manifest.concurrent:
        yield {"tokens": MANY, "width": 8, "x": "normal", "seed": 103}


def _layer_norm_cases(trial: Trial) -> Iterator[Recipe]:
    yield from ({"tokens": t, "width": w, "power": 0, "seed": 137} for t, w in ((9, 7168), (MANY, 8)))


def _index_rope_cases(trial: Trial) -> Iterator[Recipe]:
    wide, many = (64, MANY) if trial.manifest.concurrent else (3, 261)  # a program each in the interpreter
    for tokens, heads, pairs, rest in ((300, wide, 32, 64), (many, 0, 1, 1)):
        size = {"tokens": tokens, "heads": heads, "pairs": pairs, "rest": rest}
        yield {**size, "interleaved": heads == 0, "seed": 139}


def _index_rows_cases(trial: Trial) -> Iterator[Recipe]:
    """64 heads of 128 and 2,048 of 4,000 rows, as in DeepSeek-V3.2."""
    base = {"past": 4000, "heads": 64, "d": 128, "topk": 2048, "seed": 149}
    yield {**base, "tokens": 66, "x": "normal", "activations": "exact"}
    yield {**base, "tokens": 2, "x": "integers", "activations": "fp8"}


def _norm(trial: Trial, r: Recipe) -> Mismatch | None:
    args = trial.build(r)
    if r["width"] < 1024 or trial.op != "rms_norm":
        return trial.judge(args, trial(*args))
    allowed = bounds.stored(trial.manifest, likely.rms_norm(trial.manifest, *args))
    got = trial(*args)
    return number_of(got, trial.family.results) or within(got[0], allowed.true, allowed.bound)


def _hidden_cases(trial: Trial) -> Iterator[Recipe]:
    sizes = ((15, 18432), (MANY, 8)) if trial.manifest.concurrent else ((15, 2048), (261, 129))
    yield from ({"tokens": t, "hidden": i, "power": 0, "x": "normal", "seed": 107} for t, i in sizes)


def _equal(trial: Trial, r: Recipe) -> Mismatch | None:
    args = trial.build(r)
    return trial.judge(args, trial(*args))


def _embed_cases(trial: Trial) -> Iterator[Recipe]:
    """DeepSeek-V3's vocabulary, and more tokens than 16 bits count."""
    base = {"blocks": 1, "more": 0, "seed": 109}
    found = trial.family.variants(trial.op, trial.manifest)
    for i, v in enumerate(found if _deep(trial) else found[:4]):
        yield {**v, **base, "rows": 129280, "tokens": 301}
        if i < 2:
            yield {**v, **base, "rows": 131, "tokens": MANY}


def _block_cases(trial: Trial) -> Iterator[Recipe]:
    yield {"blocks": MANY, "seed": 113}


def _many_blocks(trial: Trial, r: Recipe) -> Mismatch | None:
    """A few hundred blocks again and again, in an order of their own."""
    module, rng = draws.FORMATS[trial.op.partition(".")[0]], np.random.default_rng(r["seed"])
    order = rng.integers(0, 257, r["blocks"])
    if trial.op.endswith(".dequantize"):
        few = draws.block_bytes(rng, module, [257, 1], 0.1)
    else:
        few = rng.normal(0, 1, (257, module.WEIGHTS)).astype(np.float32)
    (wanted,) = trial.family.exact(trial.op, (few,), trial.manifest)
    got = trial(few[order].reshape(-1))
    return number_of(got, ("result",)) or same_bits(got[0], wanted[order].reshape(-1), trial.manifest.nan)


def _row_cases(trial: Trial) -> Iterator[Recipe]:
    if trial.manifest.concurrent:
        yield {"rows": MANY, "columns": 129 if _deep(trial) else 17, "seed": 127}
    few = trial.level == "smoke" and not trial.manifest.concurrent  # in an interpreter, where all are slow
    yield {"rows": 9 if few else 65, "columns": 7168, "seed": 127}
    yield {"rows": 261, "columns": 129, "seed": 128}


def _many_rows(trial: Trial, r: Recipe) -> Mismatch | None:
    """Codes or numbers in many rows."""
    rng, m = np.random.default_rng(r["seed"]), trial.manifest
    shape = r["rows"], -(-r["columns"] // m.columns) * m.columns
    if trial.op.endswith(".decode"):
        args: tuple = (rng.integers(0, 256, shape, np.uint8),)
    else:
        powers = rng.choice([-7, 0, 7], (r["rows"], 1))
        args = (np.ldexp(rng.normal(0, 1, shape), powers).astype(np.float32),)
    return trial.judge(args, trial(*args))


def _tile_cases(trial: Trial) -> Iterator[Recipe]:
    rows, columns = (2051, 1408) if trial.manifest.concurrent else (300, 1408)
    drawn = {"codes": "any"} if trial.op.endswith("dequant") else {"power": 0}
    yield {"rows": rows, "columns": columns, "seed": 131, **drawn}


KINDS: dict[str, tuple[Callable[[Trial], Iterator[Recipe]], Callable[[Trial, Recipe], Mismatch | None]]] = {
    "dyadic_linear": (_dyadic_linear_cases, _dyadic_linear),
    "ties": (_ties_cases, _ties),
    "likely_linear": (_likely_linear_cases, _likely_linear),
    "linear_teams": (_linear_team_cases, _dyadic_linear),
    "dyadic_experts": (_dyadic_experts_cases, _dyadic_experts),
    "dyadic_experts_teams": (_some(_dyadic_experts_cases, 3), _dyadic_experts),
    "many_experts_teams": (_some(_many_experts_cases, 1), _many_experts),
    "many_experts": (_many_experts_cases, _many_experts),
    "dyadic_attention": (_dyadic_attention_cases, _dyadic_attention),
    "likely_attention": (_attention_cases, _likely_attention),
    "route": (_route_cases, _route),
    "dyadic_rope": (_rope_cases, _dyadic_rope),
    "norm": (_norm_cases, _norm),
    "layer_norm": (_layer_norm_cases, _equal),
    "index_rope": (_index_rope_cases, _equal),
    "index_rows": (_index_rows_cases, _equal),
    "hidden": (_hidden_cases, _equal),
    "embed": (_embed_cases, _equal),
    "many_blocks": (_block_cases, _many_blocks),
    "many_rows": (_row_cases, _many_rows),
    "tiles": (_tile_cases, _equal),
}
