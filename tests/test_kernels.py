"""The fast paths whose demand is "bound", against their references: per element, with bounds derived from what was rounded, never a global norm.

|fast - true| <= gamma_n * sum |w| |x|        true: the same quantised numbers, multiplied and added in float64
"""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refimpl
from refimpl import attention, formats, fp8, ops
from refimpl.config import DeepSeekConfig
from refimpl.formats import bf16, e4m3, f16, q2_k, q3_k, q4_0, q4_k, q5_0, q5_k, q6_k, q8_0, q8_k
from refimpl.ops import OPS
from refimpl.packed import Q8_K_PARTNERS, dense
from refimpl.tensors import Packed, ScaledFP8
from refimpl.tiny import FP8_DIR
from refimpl.tiny.problems import problems
from refimpl.tiny.tokens import Encoder

numba = pytest.importorskip("numba", reason="the cpu backend's kernels are compiled by Numba")
from refimpl.kernels import cpu_simd, dot_numba, experts_numba, linear_numba, tile_numba  # noqa: E402

PACKED = [q2_k, q3_k, q4_k, q5_k, q6_k, q4_0, q5_0, q8_0, bf16, f16]
UNIT = 2.0**-24


def gamma(n: int) -> float:
    """What n roundings of float32 do to a sum, relative to the sum of magnitudes (Higham, lemma 3.1)."""
    return n * UNIT / (1 - n * UNIT)


def packed(rng, module, *shape: int) -> Packed:
    """Random bits with scales of a sane size."""
    data = rng.integers(0, 256, (*shape[:-1], formats.row_bytes(module.GGML_TYPE, shape[-1])), np.uint8)
    if hasattr(module, "PARTS"):
        blocks = data.view(module.BLOCK)
        for name in {"d", "dmin", "m"} & set(module.BLOCK.names):
            blocks[name] = rng.normal(0, 0.01, blocks.shape)
    else:
        data = module.quantize(rng.normal(0, 1, shape).astype(np.float32)).reshape(data.shape)
    return Packed(data, module.GGML_TYPE, shape)


def magnitudes(w) -> np.ndarray:
    """Sums of the magnitudes of a weight's terms: |scale * q| + |minimum|, which its rounding errors are relative to."""
    if not isinstance(w, Packed) or formats.get(w.ggml_type) not in (q2_k, q4_k, q5_k):
        return np.abs(dense(w)).astype(np.float64)
    d, dmin, sc, m, q = formats.get(w.ggml_type).unpack(w.data)
    scale, low = np.abs(d)[..., None] * sc, np.abs(dmin)[..., None] * m
    return (scale[..., None] * q + low[..., None]).astype(np.float64).reshape(w.shape)


def quantised(x: np.ndarray, w, activations: str) -> np.ndarray:
    """The activations that are really multiplied."""
    if activations == "exact":
        return x
    if isinstance(w, ScaledFP8):
        codes, scale = fp8.act_quant(x)
        return e4m3.decode(codes) * np.repeat(scale, 128, axis=-1)[..., : x.shape[-1]]
    module = formats.get(w.ggml_type)
    if module in Q8_K_PARTNERS:
        return q8_k.dequantize(q8_k.quantize(x))
    return q8_0.dequantize(q8_0.quantize(x)) if module in (q4_0, q5_0, q8_0) else x


def activations(rng, tokens: int, columns: int) -> np.ndarray:
    """Rows of different sizes, some with outliers, one of zeros."""
    x = rng.normal(0, 1, (tokens, columns)) * 10.0 ** rng.integers(-3, 3, (tokens, 1))
    x[rng.random(x.shape) < 0.01] *= 50
    x[rng.integers(tokens)] *= rng.integers(0, 2)
    return x.astype(np.float32)


def check_linear(fast, x, w, how) -> None:
    before = x.copy()
    y = fast(x, w, how)
    x_hat = quantised(x, w, how).astype(np.float64)
    true = x_hat @ dense(w).astype(np.float64).T
    # A step is a product of two scales, a multiplication by it, and an addition; a column counts as one.
    bound = gamma(x.shape[-1] + 8) * (np.abs(x_hat) @ magnitudes(w).T) + 1e-37
    assert y.shape == true.shape and y.dtype == np.float32
    assert (np.abs(y - true) <= bound).all(), f"{np.max(np.abs(y - true) / bound):.3g} times the bound"
    np.testing.assert_array_equal(x, before)


# --- linear ------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["fp8", "exact"])
@pytest.mark.parametrize("module", PACKED, ids=lambda m: m.NAME)
@given(seed=st.integers(0, 2**32), tokens=st.integers(1, 9), rows=st.integers(1, 40), blocks=st.integers(1, 3))
def test_linear_on_ggml_blocks(module, how, seed, tokens, rows, blocks):
    rng = np.random.default_rng(seed)
    columns = blocks * max(module.WEIGHTS, 32)
    check_linear(ops.load("linear", "cpu"), activations(rng, tokens, columns), packed(rng, module, rows, columns), how)


@pytest.mark.parametrize("how", ["fp8", "exact"])
@given(
    seed=st.integers(0, 2**32),
    tokens=st.integers(1, 9),
    rows=st.integers(1, 300),
    columns=st.integers(1, 12).map(lambda n: 32 * n) | st.integers(1, 400),
)
def test_linear_on_fp8_tiles(how, seed, tokens, rows, columns):
    rng = np.random.default_rng(seed)
    w = fp8.weight_quant(rng.normal(0, 1, (rows, columns)).astype(np.float32))
    check_linear(ops.load("linear", "cpu"), activations(rng, tokens, columns), w, how)


@pytest.mark.parametrize("module", PACKED[:8], ids=lambda m: m.NAME)
def test_integer_parts_are_exact(module):
    """With one block, scales of powers of two and integer activations everything is an integer: the result has no error at all."""
    rng = np.random.default_rng(1)
    columns = module.WEIGHTS
    w = packed(rng, module, 64, columns)
    for name in {"d", "dmin"} & set(module.BLOCK.names):
        w.data.view(module.BLOCK)[name] = 2.0**-3
    x = rng.integers(-127, 128, (5, columns)).astype(np.float32)
    x[:, 7] = 127  # so that the step of the activations is one
    if module.WEIGHTS == 256:
        x[:, 7] = -127
    true = x.astype(np.float64) @ dense(w).astype(np.float64).T
    y = ops.load("linear", "cpu")(x, w)
    np.testing.assert_array_equal(y, true.astype(np.float32))


def test_every_fp8_code_counts_as_it_decodes():
    codes = np.arange(256, dtype=np.uint8)[:, None].repeat(32, axis=1)
    w = ScaledFP8(codes, np.full((2, 1), 0.5, np.float32))
    x = np.zeros((1, 32), np.float32)
    x[0, 3] = 2.0
    np.testing.assert_array_equal(ops.load("linear", "cpu")(x, w, "exact")[0], e4m3.TABLE)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("module", PACKED, ids=lambda m: m.NAME)
def test_a_number_that_is_none_shows_in_the_result(module, bad):
    rng = np.random.default_rng(2)
    w, x = packed(rng, module, 3, 256), activations(rng, 5, 256) + 1
    x[2, 100] = bad
    y = ops.load("linear", "cpu")(x, w)
    assert not np.isfinite(y[2]).any() and np.isfinite(y[[0, 1, 3, 4]]).all()


def test_what_the_kernel_does_not_take_goes_to_the_reference():
    rng = np.random.default_rng(3)
    w = packed(rng, q4_k, 8, 512)
    scattered = Packed(np.asfortranarray(w.data), w.ggml_type, w.shape)
    x = activations(rng, 2, 512)
    for weight in (scattered, packed(rng, formats.get(3), 8, 512), rng.normal(0, 1, (8, 512)).astype(np.float32)):
        np.testing.assert_array_equal(ops.load("linear", "cpu")(x, weight), OPS["linear"].reference(x, weight))
    assert ops.load("linear", "cpu")(x[:0], w).shape == (0, 8)


# --- activations --------------------------------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32), tokens=st.integers(1, 4), power=st.integers(-30, 30))
def test_activations_are_quantised_to_the_reference_s_bits(seed, tokens, power):
    x = (np.random.default_rng(seed).normal(0, 1, (tokens, 512)) * 10.0**power).astype(np.float32)
    d, q, sums = q8_k.unpack(q8_k.quantize(x))
    ours = linear_numba.prepare("test", x, "q8_k")
    for name, true in (("d", d), ("q", q), ("sums", sums[..., dot_numba.HALVES])):
        np.testing.assert_array_equal(ours[name], true)
    d, q = q8_0.unpack(q8_0.quantize(x))
    ours = linear_numba.prepare("test", x, "q8_0")
    np.testing.assert_array_equal(ours["d"], d)
    np.testing.assert_array_equal(ours["q"][np.isfinite(d) & (d > 0)], q[np.isfinite(d) & (d > 0)])
    codes, scale = fp8.act_quant(x)
    np.testing.assert_array_equal(linear_numba.prepare("test", x, "e4m3"), e4m3.decode(codes) * np.repeat(scale, 128, axis=-1))


# --- experts ------------------------------------------------------------------------------------------------------------------------------------

STACKS = {
    "Q4_K": (q4_k, q4_k, q4_k),
    "Q4_K and Q6_K": (q4_k, q4_k, q6_k),
    "Q5_K, Q8_0, Q3_K": (q5_k, q8_0, q3_k),
    "Q2_K": (q2_k, q2_k, q2_k),
    "FP8": (None, None, None),
}


def stack(rng, module, *shape: int):
    if module is not None:
        return packed(rng, module, *shape)
    return [fp8.weight_quant(rng.normal(0, 0.1, shape[1:]).astype(np.float32)) for _ in range(shape[0])]


def hidden_step(h: np.ndarray, w) -> np.ndarray:
    """The distance of neighbouring quantised values of the hidden activations: a rounding that falls the other way moves one by this much."""
    if isinstance(w, ScaledFP8):
        return np.maximum(np.abs(h) / 8, np.repeat(fp8.act_quant(h)[1], 128, axis=-1)[..., : h.shape[-1]] * 2.0**-9)
    width = 256 if formats.get(w.ggml_type) in Q8_K_PARTNERS else 32
    top = np.abs(h.reshape(len(h), -1, width)).max(axis=-1) / 127
    return np.repeat(top * 1.01, width, axis=-1)


@pytest.mark.parametrize("name", STACKS)
@given(seed=st.integers(0, 2**32), tokens=st.integers(1, 12), chosen=st.integers(1, 3))
def test_experts(name, seed, tokens, chosen):
    rng = np.random.default_rng(seed)
    hidden, width, count = 256, 512, 5
    gate, up, down = (stack(rng, m, count, *s) for m, s in zip(STACKS[name], ((width, hidden), (width, hidden), (hidden, width))))
    x = activations(rng, tokens, hidden) * 0.1
    ids = np.argsort(rng.random((tokens, count)), axis=1)[:, :chosen]
    weights = rng.random((tokens, chosen)).astype(np.float32)
    y, true = (f(x, ids, weights, gate, up, down) for f in (ops.load("experts", "cpu"), OPS["experts"].reference))
    assert y.dtype == np.float32 and np.isfinite(true).all()
    bound = np.zeros(y.shape)
    for (t, a), e in np.ndenumerate(ids):
        g, u, d = (s.expert(int(e)) if isinstance(s, Packed) else s[int(e)] for s in (gate, up, down))
        linear = OPS["linear"].reference
        h = attention.sigmoid(linear(x[t : t + 1], g)) * linear(x[t : t + 1], g) * linear(x[t : t + 1], u)
        # Most roundings fall the same way, but none is promised to; then the sums' own error, on top of what each side made of x.
        sides = np.abs(quantised(x[t : t + 1], g, "fp8")) @ magnitudes(g).T, np.abs(quantised(x[t : t + 1], u, "fp8")) @ magnitudes(u).T
        h_error = gamma(hidden + 16) * (sides[0] * np.abs(linear(x[t : t + 1], u)) * 2 + sides[1] * np.abs(linear(x[t : t + 1], g)))
        moved = hidden_step(h, d) + h_error
        bound[t] += weights[t, a] * ((moved @ np.abs(dense(d)).T) + gamma(width + 24) * (np.abs(h) @ magnitudes(d).T))[0]
    assert (np.abs(y - true) <= bound + 1e-30).all(), f"{np.max(np.abs(y - true) / bound):.3g} times the bound"
    # And seen as a whole nearly all roundings do fall the same way: a bug that hides under a step a weight does not hide here.
    assert np.linalg.norm(y - true) <= 1e-2 * np.linalg.norm(true) + 1e-30


@given(seed=st.integers(0, 2**32))
def test_one_expert_of_weight_one_is_swiglu(seed):
    rng = np.random.default_rng(seed)
    gate, up, down = packed(rng, q4_k, 1, 256, 256), packed(rng, q4_k, 1, 256, 256), packed(rng, q6_k, 1, 256, 256)
    x = activations(rng, 5, 256)
    alone = ops.load("swiglu", "cpu")(x, gate.expert(0), up.expert(0), down.expert(0))
    np.testing.assert_array_equal(alone, ops.load("experts", "cpu")(x, np.zeros((5, 1), int), np.ones((5, 1), np.float32), gate, up, down))


def test_an_expert_nobody_chose_is_not_read():
    rng = np.random.default_rng(4)
    gate, up, down = (packed(rng, q4_k, 4, 256, 256) for _ in range(3))
    x, ids, weights = activations(rng, 3, 256), np.array([[0, 2], [2, 0], [0, 2]]), np.ones((3, 2), np.float32)
    before = ops.load("experts", "cpu")(x, ids, weights, gate, up, down)
    for s in (gate, up, down):
        s.data[1], s.data[3] = 255, 255  # NaN scales
    np.testing.assert_array_equal(ops.load("experts", "cpu")(x, ids, weights, gate, up, down), before)


def test_results_do_not_depend_on_the_number_of_threads():
    rng = np.random.default_rng(5)
    gate, up, down = packed(rng, q4_k, 8, 512, 1024), packed(rng, q4_k, 8, 512, 1024), packed(rng, q6_k, 8, 1024, 512)
    have = linear_numba.threads()
    try:
        for tokens in (1, 3, 40):
            x = activations(rng, tokens, 1024)
            ids = np.argsort(rng.random((tokens, 8)), axis=1)[:, :3]
            weights = rng.random((tokens, 3)).astype(np.float32)
            results = []
            for n in (1, have):
                linear_numba.set_threads(n)
                results.append(ops.load("experts", "cpu")(x, ids, weights, gate, up, down))
            np.testing.assert_array_equal(*results)
    finally:
        linear_numba.set_threads(have)


def test_a_steady_state_allocates_nothing_but_its_result():
    rng = np.random.default_rng(6)
    gate, up, down = (packed(rng, q4_k, 4, 256, 256) for _ in range(3))
    x, weights = activations(rng, 6, 256), np.ones((6, 2), np.float32)
    run = ops.load("experts", "cpu")
    run(x, np.array([[0, 1]] * 6), weights, gate, up, down)
    buffers = {name: b.ctypes.data for name, b in linear_numba.WORKSPACE._memory.items()}
    for ids in ([[2, 3]] * 6, [[0, 3]] * 6):
        run(x, np.array(ids), weights, gate, up, down)
    run(x[:2], np.array([[1, 2]] * 2), weights[:2], gate, up, down)
    assert {name: b.ctypes.data for name, b in linear_numba.WORKSPACE._memory.items()} == buffers


# --- norms, positions, router, attention ------------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32), tokens=st.integers(1, 5), width=st.integers(1, 600))
def test_rms_norm(seed, tokens, width):
    rng = np.random.default_rng(seed)
    x, weight = activations(rng, tokens, width), rng.normal(0, 1, width).astype(np.float32)
    true = x / np.sqrt(np.mean(np.square(x.astype(np.float64)), axis=-1, keepdims=True) + 1e-6) * weight
    for f in (ops.load("rms_norm", "cpu"), OPS["rms_norm"].reference):
        assert (np.abs(f(x, weight, 1e-6) - true) <= gamma(width // 2 + 6) * np.abs(true)).all()


@given(seed=st.integers(0, 2**32), tokens=st.integers(1, 5), pairs=st.integers(1, 40))
def test_rope(seed, tokens, pairs):
    rng = np.random.default_rng(seed)
    angles = rng.uniform(0, 100, (tokens, pairs)).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    for shape in ((tokens, 2 * pairs), (tokens, 3, 2 * pairs)):
        x = rng.normal(0, 1, shape).astype(np.float32)
        true = OPS["rope"].reference(x, cos, sin)
        size = np.repeat(np.abs(x[..., 0::2]) + np.abs(x[..., 1::2]), 2, axis=-1)
        assert (np.abs(ops.load("rope", "cpu")(x, cos, sin) - true) <= 4 * UNIT * size).all()


@given(seed=st.integers(0, 2**32), tokens=st.integers(1, 6), groups=st.sampled_from([1, 2, 4, 8]), ties=st.booleans(), normalise=st.booleans())
def test_route(seed, tokens, groups, ties, normalise):
    rng = np.random.default_rng(seed)
    c = DeepSeekConfig.from_dict(
        {
            **ROUTER,
            "n_routed_experts": 16,
            "n_group": groups,
            "topk_group": (groups + 1) // 2,
            "num_experts_per_tok": 1 + seed % 2,
            "norm_topk_prob": normalise,
        }
    )
    x, bias = rng.normal(0, 1, (tokens, 32)).astype(np.float32), rng.normal(0, 0.1, 16).astype(np.float32)
    weight = rng.normal(0, 1, (16, 32)).astype(np.float32)
    if ties:
        weight[:], bias[:] = weight[0], 0
    (ids, weights), (true_ids, true_weights) = (f(x, weight, bias, c) for f in (ops.load("route", "cpu"), OPS["route"].reference))
    affinity = np.sort(attention.sigmoid(x @ weight.T) + bias, axis=-1)
    if ties or (np.diff(affinity, axis=-1) > 1e-6).all():  # nearer ones may fall either way
        np.testing.assert_array_equal(ids, true_ids)
        assert (np.abs(weights - true_weights) <= gamma(24) * np.abs(true_weights)).all()


@given(seed=st.integers(0, 2**32), past=st.integers(0, 60), heads=st.integers(1, 5))
def test_absorbed_attention_of_one_token(seed, past, heads):
    rng = np.random.default_rng(seed)
    n, r, v, width = 16, 8, 12, 32
    q_nope, q_pe, kv_b = (rng.normal(0, 1, s).astype(np.float32) for s in ((1, heads, n), (1, heads, r), (heads, n + v, width)))
    rows = rng.normal(0, 1, (past + 1, width + r)).astype(np.float32)
    args = (q_nope, q_pe, rows[:, :width], rows[:, width:], kv_b, 0.2)
    y, true = ops.load("mla_absorbed", "cpu")(*args), attention.mla_naive(*(a.astype(np.float64) if isinstance(a, np.ndarray) else a for a in args))
    # Scores are sums of n*width + r products, and an error of theirs is one of the shares, relatively.
    score_error = (
        0.2
        * gamma(n * width + r)
        * (np.abs(q_nope) @ np.abs(kv_b[:, :n]) @ np.abs(rows[:, :width]).T + np.abs(q_pe[0]) @ np.abs(rows[:, width:]).T).max()
    )
    size = np.abs(rows[:, :width]).max(axis=0) @ np.abs(kv_b[:, n:]).max(axis=0).T
    assert (np.abs(y - true) <= (2 * score_error + gamma(width + past + 8)) * size.max() * 2).all()


ROUTER = {
    "model_type": "deepseek_v3", "vocab_size": 8, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 1, "q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "n_shared_experts": 0, "routed_scaling_factor": 2.5, "first_k_dense_replace": 0, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "max_position_embeddings": 64, "rope_scaling": None, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
}  # fmt: skip


def test_greedy_tokens_are_those_of_the_reference(hybrid_folder):
    models = [refimpl.load(hybrid_folder, backend=b) for b in ("cpu", "reference")]
    encoder = Encoder.open(FP8_DIR)
    for kind in ("sum", "product", "e4m3", "fact"):
        for problem in problems(kind, "heldout", 3, seed=8):
            prompt = encoder.prompt("", [], problem.question)
            ours, true = (list(m.generate(prompt)) for m in models)
            if ours != true:  # then only where the reference itself was undecided
                at = next(i for i, (a, b) in enumerate(zip(ours, true)) if a != b)
                best = np.sort(models[1].logits(prompt + true[:at])[-1])
                assert best[-1] - best[-2] < 1e-2 * np.abs(best).max(), problem


# --- levels -------------------------------------------------------------------------------------------------------------------------------------

HERE = cpu_simd.available()
WIRES = {"generic": (), "avx2": ("vpmaddubsw",), "vnni": ("vpdpbusd", "vpdpwssd"), "avx512": ("%zmm",)}
TARGETS = [
    ("generic", "x86-64"), ("generic", "neoverse-n1"), ("avx2", "haswell"), ("vnni", "alderlake"), ("vnni", "cascadelake"),
    ("avx512", "cascadelake"), ("avx512", "znver4"),
]  # fmt: skip


def assembly(cpu: str, arguments: int, emit) -> str:
    """What LLVM makes of emit(builder, arguments) for another CPU than this."""
    import llvmlite.binding as llvm
    from llvmlite import ir

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    triple = "aarch64-unknown-linux-gnu" if cpu == "neoverse-n1" else "x86_64-unknown-linux-gnu"
    module = ir.Module()
    module.triple = triple
    f = ir.Function(module, ir.FunctionType(ir.VoidType(), [cpu_simd.I64] * arguments), "kernel")
    b = ir.IRBuilder(f.append_basic_block())
    emit(b, f.args)
    b.ret_void()
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    return llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3).emit_assembly(parsed)


def has_only(text: str, level: str, needed: tuple[str, ...]) -> None:
    """None gets an instruction of a higher level."""
    assert all(name in text for name in needed), level
    forbidden = itertools.chain.from_iterable(WIRES[n] for n in cpu_simd.LEVELS[cpu_simd.LEVELS.index(level) + 1 :])
    assert not any(name in text for name in forbidden)


@pytest.mark.parametrize("kind", dot_numba.KINDS)
@pytest.mark.parametrize(("level", "cpu"), TARGETS)
def test_every_row_kernel_compiles_for_every_level(level, cpu, kind):
    """For CPUs that are not here too."""

    def emit(b, args):
        e, (w, scale, columns, out, *tokens) = cpu_simd.Emitter(b, level), args
        for i, y in enumerate(dot_numba.KINDS[kind].dot(e, w, scale, columns, tokens)):
            e.store(e.splat(y, 1), e.at(out, 4 * i))

    integers = dot_numba.KINDS[kind].acts == "q8_k"
    has_only(assembly(cpu, 6, emit), level, WIRES["vnni" if level == "avx512" else level] if integers else ())


@pytest.mark.parametrize("kind", tile_numba.STRIPS)
@pytest.mark.parametrize(("level", "cpu"), TARGETS)
def test_every_strip_kernel_compiles_for_every_level(level, cpu, kind, monkeypatch):
    monkeypatch.setattr(tile_numba, "ROWS", cpu_simd.WORDS[level])
    monkeypatch.setattr(tile_numba, "VECTOR", 4 * cpu_simd.WORDS[level])

    def emit(b, args):
        e, strip, (w, row_bytes, columns, scratch, ahead, lines, out, *tokens) = cpu_simd.Emitter(b, level), tile_numba.STRIPS[kind], args
        tile_numba._interleave(e, strip, w, row_bytes, columns, scratch)
        for i, y in enumerate(tile_numba._multiply(e, strip, scratch, columns, ahead, lines, tokens)):
            e.store(y, e.at(out, 64 * i))

    needed = WIRES["vnni"] + WIRES["avx512"] if level == "avx512" else WIRES[level]
    has_only(assembly(cpu, 9, emit), level, needed)


@pytest.mark.parametrize("level", cpu_simd.LEVELS)
def test_levels_give_the_same_results(level):
    """In a process each, since a process has one level: integer products are exact, so only the sums of floats may differ."""
    if level not in HERE:
        pytest.skip(f"this CPU has no {level}")
    code = """
import numpy as np
from refimpl.kernels import linear_numba
from tests.test_kernels import PACKED, activations, check_linear, packed
rng = np.random.default_rng(7)
for module in PACKED:
    for tokens in (1, 2, 6):
        check_linear(linear_numba.linear, activations(rng, tokens, 512), packed(rng, module, 20, 512), "fp8")
"""
    env = os.environ | {"REFIMPL_SIMD": level, "PYTHONPATH": os.pathsep.join([os.getcwd(), *filter(None, sys.path)])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_level_that_is_not_here_is_refused(monkeypatch):
    monkeypatch.setenv("REFIMPL_SIMD", "amx")
    with pytest.raises(Exception, match="E5020 REFIMPL_SIMD: no such level on this CPU"):
        cpu_simd.choose()
    monkeypatch.setenv("REFIMPL_SIMD", "generic")
    assert cpu_simd.choose() == "generic"


def test_the_plan_sorts_pairs_by_expert():
    ids = np.array([[3, 1], [1, 0], [3, 0]])
    used, first, counts, tokens, pairs = experts_numba._plan(ids, 5)
    assert (used.tolist(), first.tolist(), counts.tolist()) == ([0, 1, 3], [0, 2, 4], [2, 2, 2])
    assert tokens.tolist() == [1, 2, 0, 1, 0, 2] and pairs.tolist() == [[4, 2], [3, 0], [5, 1]]
