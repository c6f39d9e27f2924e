"""The cuda backend on CPU tensors: its operations against the references, the model against the reference
backend, the cache, the refusals.

What needs a GPU (Triton, graphs, overlap) is in test_gpu.py; the code that runs here is the same but for
those.
"""

import dataclasses
import os
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refimpl
from refimpl import ops
from refimpl.checkpoint import names
from refimpl.config import DeepSeekConfig
from refimpl.conformance import greedy_ties
from refimpl.devices import cpu
from refimpl.devices.placement import experts_on_cpu
from refimpl.errors import ResourceError, UnsupportedError
from refimpl.formats import bf16
from refimpl.generate import Session
from refimpl.model import Model
from refimpl.reference import attention, experts, fp8, linear, packed
from refimpl.tensors import Packed, ScaledFP8
from refimpl.tiny import FP8_DIR, GGUF_DIR
from refimpl.training.problems import problems
from refimpl.training.tokens import Encoder

torch = pytest.importorskip("torch", reason="the cuda backend is torch's: the extra `gpu`")
oracle = pytest.importorskip("tests.oracle_hf", reason="needs torch and transformers: the extra `test`")

from refimpl.cache import INITIAL_ROWS  # noqa: E402
from refimpl.devices import cuda, cuda_experts, cuda_graph, memory  # noqa: E402
from refimpl.kernels import attention_torch, linear_torch  # noqa: E402

EPS = 2.0**-24  # a rounding of float32
seeds = st.integers(0, 2**31)


@pytest.fixture(autouse=True)
def on_cpu_tensors(monkeypatch):
    monkeypatch.setenv("REFIMPL_CUDA_DEVICE", "cpu")


def tensor(array):
    if isinstance(array, ScaledFP8):
        return ScaledFP8(*map(tensor, array))
    return torch.from_numpy(np.array(array)) if isinstance(array, np.ndarray) else array


def run(name, *args, **kwargs):
    """The row's torch function on tensors; NaN does not pass for a number here."""
    found = ops.load(name, "cuda")(*map(tensor, args), **kwargs)
    return tuple(f.numpy() for f in found) if isinstance(found, tuple) else found.numpy()


def normal(rng, *shape, scale=1.0):
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def within(found, true, bound):
    """Element by element; true in float64."""
    assert found.dtype == np.float32 and found.shape == true.shape
    assert (np.abs(found.astype(np.float64) - true) <= bound).all(), np.abs(found - true).max()


# --- operations ---------------------------------------------------------------------------------------------


@given(seeds, st.integers(0, 5), st.integers(1, 300), st.integers(1, 300))
def test_products_are_within_their_bound(seed, tokens, rows, columns):
    rng = np.random.default_rng(seed)
    x, w = normal(rng, tokens, columns), normal(rng, rows, columns)
    halves = torch.from_numpy(w).to(torch.bfloat16)
    for weight, values in ((w, w), (halves, halves.float().numpy())):
        sums = np.abs(x.astype(np.float64)) @ np.abs(values.astype(np.float64)).T
        within(
            run("linear", x, weight),
            x.astype(np.float64) @ values.astype(np.float64).T,
            (columns + 2) * EPS * sums + 1e-30,
        )


@pytest.mark.parametrize("activations", ["fp8", "ue8m0", "exact"])
@given(seeds, st.integers(1, 4), st.integers(1, 300), st.integers(1, 300))
def test_fp8_linear_is_the_references_arithmetic(activations, seed, tokens, rows, columns):
    rng = np.random.default_rng(seed)
    x, w = normal(rng, tokens, columns), fp8.weight_quant(normal(rng, rows, columns))
    x[0, : columns // 2] = 0  # a group of zeros
    values, weights = x.astype(np.float64), fp8.weight_dequant(w).astype(np.float64)
    if activations != "exact":
        codes, scale = fp8.act_quant(x, ue8m0=activations == "ue8m0")
        values = fp8.weight_dequant(ScaledFP8(np.repeat(codes, 128, 0), scale)).astype(np.float64)[::128]
    within(
        run("linear", x, w, activations=activations),
        values @ weights.T,
        (columns + 8) * EPS * (np.abs(values) @ np.abs(weights).T) + 1e-30,
    )


@pytest.mark.parametrize("ue8m0", [False, True])
def test_activations_are_quantized_to_the_same_bits(ue8m0):
    rng = np.random.default_rng(0)
    x = normal(rng, 64, 300) * np.exp(rng.uniform(-60, 60, (64, 1))).astype(np.float32)
    x[3] = 0
    codes, scale = fp8.act_quant(x, ue8m0)
    mine, found = linear_torch.act_quant(tensor(x), ue8m0)
    np.testing.assert_array_equal(found.numpy(), scale)
    np.testing.assert_array_equal(mine.numpy(), codes)


@pytest.mark.parametrize("backend", ops.BACKENDS)
@given(seeds, st.integers(1, 4), st.integers(1, 300), st.integers(1, 300))
def test_codes_go_through_a_linear_as_the_numbers_they_were_made_of_do(backend, seed, tokens, rows, columns):
    rng = np.random.default_rng(seed)
    x, w = normal(rng, tokens, columns), fp8.weight_quant(normal(rng, rows, columns))
    codes = ScaledFP8(*fp8.act_quant(x))
    if backend == "cuda":
        np.testing.assert_array_equal(run("linear", codes, w), run("linear", x, w))
    else:
        close = {
            "reference": 0.0,
            "cpu": 2.0**-20 * np.abs(x).max() * np.abs(fp8.weight_dequant(w)).sum(axis=1).max(),
        }[backend]
        np.testing.assert_allclose(
            ops.load("linear", backend)(codes, w), ops.load("linear", backend)(x, w), rtol=0, atol=close
        )
    with pytest.raises(TypeError, match="E4M3"):
        (run if backend == "cuda" else lambda name, *a: ops.load(name, backend)(*a))("linear", codes, x)


def test_norms_before_fp8_linears_quantize_and_so_does_swiglu(hybrid_folder, monkeypatch):
    called = []
    for name, module in (("rms_norm_quant", attention_torch), ("swiglu_quant", linear_torch)):
        function = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda *a, name=name, function=function: called.append((name, *a[3:4])) or function(*a),
        )
    model = refimpl.load(hybrid_folder, backend="cuda")
    model.logits([1, 2, 3])
    layers = model.config.num_hidden_layers
    dense = sum(map(model.config.is_dense, range(layers)))
    # before attention, within it and before a dense MLP codes are enough; the router reads numbers beside the
    # codes
    assert (
        called.count(("rms_norm_quant", False)) == 2 * layers + dense
        and called.count(("rms_norm_quant", True)) == layers - dense
    )
    assert called.count(("swiglu_quant",)) == layers
    called.clear()
    refimpl.load(hybrid_folder, backend="cuda", activations="exact").logits([1, 2, 3])
    assert not called


@given(seeds, st.sampled_from([(128, 128), (256, 130), (100, 128)]), st.booleans())
def test_gate_and_up_fused_are_the_same_and_one_product(seed, shape, narrow):
    rng = np.random.default_rng(seed)
    x, mats = normal(rng, 3, shape[1]), [normal(rng, *shape, scale=0.1), normal(rng, *shape, scale=0.1)]
    down = normal(rng, 64, shape[0])
    plain = [tensor(fp8.weight_quant(m)) if narrow else tensor(m) for m in mats]
    fused = linear_torch.fuse_rows(*plain)
    assert (fused is None) == (narrow and shape[0] % 128 != 0)
    true = experts.swiglu(x, *(fp8.weight_quant(m) if narrow else m for m in mats), down)
    a = ops.load("swiglu", "cuda")(tensor(x), *plain, tensor(down))
    np.testing.assert_allclose(a, true, rtol=0, atol=1e-5 * np.abs(true).max())
    if fused is None:
        return
    assert fused.rows == (shape[0], shape[0])
    for one, other in zip(plain, fused.parts):
        for v, w in zip(*((one, other) if narrow else ((one,), (other,)))):
            assert torch.equal(v, w)
    b = linear_torch.fused_swiglu(tensor(x), fused, tensor(down))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
    for one, other in zip(plain, linear_torch.fused_linear(tensor(x), fused)):
        separate = linear_torch.linear(tensor(x), one)
        np.testing.assert_allclose(separate, other, rtol=1e-5, atol=1e-5 * float(separate.abs().max()))


@given(seeds, st.integers(0, 6), st.sampled_from([16, 96, 256]))
def test_norm_and_rope_are_within_their_bounds(seed, tokens, width):
    rng = np.random.default_rng(seed)
    x, weight, eps = normal(rng, tokens, width), normal(rng, width), 1e-6
    wide = x.astype(np.float64)
    true = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + eps) * weight
    within(run("rms_norm", x, weight, eps), true, (width + 8) * EPS * np.abs(true))
    angles = rng.uniform(0, 7, (tokens, width // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    for shape in ((tokens, width), (tokens, 3, width)):
        y = np.broadcast_to(x[:, None], (tokens, 3, width)) if len(shape) == 3 else x
        size = np.abs(y[..., 0::2]) + np.abs(y[..., 1::2])
        within(
            run("rope", y, cos, sin),
            attention.rope(y, cos, sin).astype(np.float64),
            8 * EPS * np.repeat(size, 2, axis=-1),
        )


def attention_case(seed, tokens, past):
    rng = np.random.default_rng(seed)
    heads, n, r, v, width = rng.integers(1, 20, 5)
    total = tokens + past
    q_nope, q_pe = normal(rng, tokens, heads, n), normal(rng, tokens, heads, 2 * r)
    return (
        q_nope,
        q_pe,
        normal(rng, total, width),
        normal(rng, total, 2 * r),
        normal(rng, heads, n + v, width),
        float(n + r) ** -0.5,
    )


@given(seeds, st.integers(1, 6), st.integers(0, 9), st.integers(0, 7))
def test_attention_is_the_references_with_room_to_spare_or_without(seed, tokens, past, spare):
    q_nope, q_pe, latent, k_pe, kv_b, scale = case = attention_case(seed, tokens, past)
    true = attention.mla_naive(*(a.astype(np.float64) if isinstance(a, np.ndarray) else a for a in case))
    for name in ("mla_naive", "mla_absorbed"):
        np.testing.assert_allclose(run(name, *case), true, rtol=0, atol=2e-4)
    room = [
        np.concatenate((a, np.full((spare, a.shape[1]), 1e30, np.float32))) for a in (latent, k_pe)
    ]  # finite, and huge
    length = torch.tensor(len(latent))
    for backend in ("cuda", "cpu", "reference"):
        convert = tensor if backend == "cuda" else lambda a: a
        out = ops.load("mla_absorbed", backend)(
            *map(convert, (q_nope, q_pe, *room, kv_b)),
            scale,
            length=length if backend == "cuda" else len(latent),
        )
        np.testing.assert_allclose(out, true, rtol=0, atol=2e-4)


def test_attention_in_pieces_is_the_same(monkeypatch):
    case = attention_case(3, 7, 4)
    whole = run("mla_absorbed", *case)
    monkeypatch.setattr("refimpl.kernels.attention_torch.SCORES", 1)
    np.testing.assert_allclose(run("mla_absorbed", *case), whole, rtol=1e-5, atol=1e-5)


def prompt_case(seed, tokens, past, heads=3, latent=40):
    """Numbers of a head in fours, as the fused kernel wants them."""
    rng = np.random.default_rng(seed)
    n, r, v = 4 * rng.integers(1, 6, 3)
    rows = [normal(rng, past + tokens, width) for width in (latent, r)]
    queries = [normal(rng, tokens, heads, width) for width in (n, r)]
    return *queries, *rows, normal(rng, heads, n + v, latent), float(n + r) ** -0.5


@given(seeds, st.integers(17, 64), st.integers(0, 90), st.sampled_from([1, 1 << 14, 1 << 26]))
def test_prompts_go_through_expanded_keys_and_values(seed, tokens, past, nbytes):
    case, called, fused = prompt_case(seed, tokens, past), [], attention_torch.scaled_dot_product_attention
    true = attention.mla_naive(*(a.astype(np.float64) if isinstance(a, np.ndarray) else a for a in case))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_torch, "EXPANDED", nbytes)
        patch.setattr(
            attention_torch,
            "scaled_dot_product_attention",
            lambda *a, **k: called.append(len(a)) or fused(*a, **k),
        )
        found = run("mla_absorbed", *case)
        count = len(called)
        with_room = run("mla_absorbed", *case, length=torch.tensor(past + tokens))
    np.testing.assert_allclose(found, true, rtol=0, atol=2e-4)
    np.testing.assert_allclose(with_room, true, rtol=0, atol=2e-4)
    assert count == len(called) == {1: 3, 1 << 26: 1}.get(nbytes, count) and 1 <= count <= 3


@pytest.mark.parametrize("past", [0, 11])
def test_prompts_over_a_cache_of_bfloat16_are_exact_products(past):
    """Latents and kv_b of the fp8 mode: nothing is lost but what their storage has lost already."""
    q_nope, q_pe, *stored, scale = prompt_case(5, 33, past)
    halves = [tensor(a).to(torch.bfloat16) for a in stored]
    values = [h.double().numpy() for h in halves]
    true = attention.mla_naive(q_nope.astype(np.float64), q_pe.astype(np.float64), *values, scale)
    found = ops.load("mla_absorbed", "cuda")(tensor(q_nope), tensor(q_pe), *halves, scale)
    np.testing.assert_allclose(found, true, rtol=0, atol=1e-4)


def test_few_tokens_and_odd_widths_stay_absorbed(monkeypatch):
    monkeypatch.setattr(attention_torch, "mla_expanded", lambda *a: pytest.fail("expanded"))
    run("mla_absorbed", *prompt_case(0, attention_torch.EXPANDED_FROM - 1, 50))
    q_nope, *rest, kv_b, scale = prompt_case(0, 40, 0)
    run("mla_absorbed", q_nope[..., 1:], *rest, kv_b[:, 1:], scale)


def test_heads_at_a_time_are_all_heads_in_equal_pieces_within_their_bytes():
    for tokens, rows in ((17, 17), (1024, 1024), (2048, 8192), (256, 131072)):
        heads = attention_torch.heads_at_a_time(tokens, 128, rows, 128, 64, 128)
        taken = 4 * heads * (rows * 576 + tokens * 320)
        assert heads == 1 or taken <= attention_torch.expanded_bytes(tokens)
        pieces = -(-128 // heads)
        assert heads == -(-128 // pieces)
        bytes_of_all = 4 * memory._expanded(memory.Inventory.builtin("deepseek-v3").config, tokens, rows)
        assert bytes_of_all == taken


@pytest.mark.parametrize("tokens", [17, 65, 130, 256, 1024, 2048])
@pytest.mark.parametrize("past", [0, 500, 8000, 16000, 33000, 131000])
def test_pieces_of_rows_occupy_a_gpu_within_the_bytes_of_the_plan(tokens, past):
    rows, sizes, full = tokens + past, (128, 64, 128), attention_torch.FULL
    some = attention_torch.heads_at_a_time(tokens, 128, rows, *sizes)
    heads, each = attention_torch.rows_at_a_time(some, tokens, 128, rows, *sizes)
    if some == 128 or some * tokens >= 2 * full:
        assert (heads, each) == (some, rows)
        return
    assert full / 2 < heads * tokens <= full or heads == 128
    assert each == rows or each % attention_torch.TILE == 0
    taken = 8 * heads * (each * 256 + tokens * (each < rows))
    assert taken <= 4 * memory._expanded(memory.Inventory.builtin("deepseek-v3").config, tokens, rows)


@given(seeds, st.integers(1, 5), st.sampled_from([(4, 2), (1, 1), (2, 1), (8, 4)]), st.booleans())
def test_the_router_chooses_the_same_experts(seed, tokens, groups, normalize):
    rng = np.random.default_rng(seed)
    c = DeepSeekConfig.from_dict(
        oracle.SMALL | {"n_group": groups[0], "topk_group": groups[1], "norm_topk_prob": normalize}
    )
    x, w, bias = normal(rng, tokens, 64), normal(rng, 8, 64, scale=0.1), normal(rng, 8, scale=0.1)
    w[5], bias[5] = w[4], bias[4]  # a tie: the lower id first
    ids, weights = run("route", x, w, bias, c)
    true_ids, true_weights = attention.route(x, w, bias, c)
    np.testing.assert_array_equal(ids, true_ids)
    np.testing.assert_allclose(weights, true_weights, rtol=1e-5)


def test_embedding_rows_are_exact():
    table = normal(np.random.default_rng(0), 9, 32)
    halves = Packed(bf16.quantize(table), bf16.GGML_TYPE, table.shape)
    ids = np.array([3, 3, 0, 8])
    on_device = torch.from_numpy(halves.data.view(np.int16).reshape(9, 32)).view(torch.bfloat16)
    np.testing.assert_array_equal(run("embed", on_device, ids), packed.embed(halves, ids))


# --- the model ----------------------------------------------------------------------------------------------


def random_model(overrides=None, backend=None):
    """A model of random weights, exact; on the reference backend unless another is given."""
    raw = oracle.SMALL | (overrides or {})
    weights = oracle.random_checkpoint(raw, 0)
    return Model(DeepSeekConfig.from_dict(raw), weights, backend or cpu.CpuBackend("reference", "exact"))


def exact(place=experts_on_cpu):
    return cuda.CudaBackend(place, "exact")


@pytest.mark.parametrize(
    "overrides", [{}, {"q_lora_rank": None}, {"n_shared_experts": 2}, {"rope_scaling": None}], ids=str
)
def test_exact_logits_are_the_references(overrides):
    ids = list(range(40))
    true, model = (
        random_model(overrides),
        random_model(overrides, exact()),
    )
    expected = true.logits(ids)
    assert np.abs(model.logits(ids) - expected).max() <= 1e-4 * np.abs(expected).max()
    cache = model.new_cache()
    pieces = [model.forward(ids[a:b], cache) for a, b in ((0, 10), (10, 11), (11, 12), (12, 40))]
    assert np.abs(np.concatenate(pieces) - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("folder", ["hybrid", FP8_DIR, GGUF_DIR], ids=["hybrid", "FP8", "GGUF"])
def test_exact_logits_of_the_embedded_model(folder, hybrid_folder):
    folder = hybrid_folder if folder == "hybrid" else folder
    ids, _ = Encoder.open(FP8_DIR).example("", problems("product", "heldout", 3, seed=1))
    true, found = (
        refimpl.load(folder, backend=b, activations="exact").logits(ids) for b in ("reference", "cuda")
    )
    assert np.abs(found - true).max() <= 1e-4 * np.abs(true).max()


def test_greedy_tokens_of_the_embedded_model_are_the_references(hybrid_folder):
    """With activations="fp8" a last bit of an activation can move a code of E4M3 and so the logits by more
    than rounding. Where numbers within the bounds of all operations can change the reference's choice, either
    token is right; elsewhere they must agree.
    """
    reference, model = (refimpl.load(hybrid_folder, backend=b) for b in ("reference", "cuda"))
    encoder, open_ = Encoder.open(FP8_DIR), 0
    for seed in range(3):
        prompt = encoder.example("", problems("sum", "heldout", 1, seed=seed))[0][:24]
        tokens = list(reference.generate(prompt, 12))
        ids = [*prompt, *tokens]
        true, found = (m.logits(ids)[len(prompt) - 1 : -1].argmax(axis=-1) for m in (reference, model))
        ambiguous = greedy_ties.ambiguous_tokens(reference, ids)[len(prompt) - 1 : -1]
        open_ += ambiguous.sum()
        assert (ambiguous | (true == found)).all()
        if not ambiguous.any():
            assert list(model.generate(prompt, 12)) == tokens
    assert open_ <= 36 // 4


@cache
def with_scales_of_powers_of_two():
    """The embedded model's config with DeepSeek-V3.1's `scale_fmt`, ids, the reference's greedy tokens after
    each, and which of them rounding can change.
    """
    plain = refimpl.load(FP8_DIR, backend="reference")
    config = dataclasses.replace(plain.config, scale_fmt="ue8m0")
    ids, _ = Encoder.open(FP8_DIR).example("", problems("product", "heldout", 3, seed=1))
    true = Model(config, plain.checkpoint, cpu.CpuBackend("reference"))
    return config, ids, true.logits(ids).argmax(-1), greedy_ties.ambiguous_tokens(true, ids)


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_scales_that_are_powers_of_two_are_the_references(backend):
    """Greedy tokens of the embedded model, as above."""
    plain = refimpl.load(FP8_DIR, backend=backend)
    config, ids, expected, ambiguous = with_scales_of_powers_of_two()
    found = Model(config, plain.checkpoint, plain.backend)
    logits = found.logits(ids)
    assert ambiguous.mean() < 0.5
    assert (ambiguous | (logits.argmax(-1) == expected)).all()
    assert found.backend.activations == "ue8m0" and plain.backend.activations == "fp8"
    assert not np.array_equal(logits, plain.logits(ids))


def test_one_token_at_a_time_is_the_prefill(hybrid_folder):
    model = refimpl.load(hybrid_folder, backend="cuda", activations="exact")
    ids = list(
        np.random.default_rng(0).integers(0, 512, 300)
    )  # more than the room at first: the cache grows while decoding
    one, many = model.new_cache(), model.new_cache()
    assert one.nbytes == 0
    whole = model.forward(ids, many)
    model.forward(ids[:250], one)
    assert one.capacity == INITIAL_ROWS
    for i in range(250, 300):
        assert np.abs(model.forward(ids[i : i + 1], one) - whole[i]).max() <= 1e-4 * np.abs(whole).max()
    assert one.capacity == 2 * INITIAL_ROWS and one.nbytes == 4 * 2 * INITIAL_ROWS * (256 + 32) * 4


@pytest.mark.parametrize("prefill", [32, 100, 512])
def test_sessions_read_prompts_in_pieces_of_the_backends_and_continue_conversations(prefill):
    """One piece or several, then another prompt that shares a beginning, from a cache that is cut back."""
    backend = exact()
    backend.prefill = prefill
    true, model = random_model(), random_model(backend=backend)
    session, rng = Session(model), np.random.default_rng(1)
    ids = rng.integers(0, 97, 300).tolist()
    seen, forward = [], model.forward
    model.forward = lambda new, *a, **k: seen.append(len(new)) or forward(new, *a, **k)
    for prompt in (ids[:170], ids[:300], [*ids[:120], *ids[200:290]]):
        seen.clear()
        new = len(prompt) - max(i for i in range(len(session.ids) + 1) if session.ids[:i] == prompt[:i])
        expected = true.logits(prompt)[-1]
        assert np.abs(session.prefill(prompt) - expected).max() <= 1e-4 * np.abs(expected).max()
        assert seen == [prefill] * (new // prefill) + [new % prefill] * (new % prefill > 0)


def test_truncated_and_overfull_caches():
    model = random_model({"max_position_embeddings": 8}, exact())
    cache = model.new_cache()
    model.forward([1, 2, 3, 4, 5], cache)
    cache.truncate(2)
    again = model.forward([7], cache)
    np.testing.assert_allclose(again[-1], model.logits([1, 2, 7])[-1], rtol=0, atol=1e-4)
    with pytest.raises(ResourceError, match=r"E6001 .*found 9, expected at most 8"):
        model.forward(range(6), cache)
    assert cache.length == 3 and cache.capacity <= 8


def test_a_cache_that_cannot_grow_says_so_and_keeps_what_it_has(monkeypatch):
    model = random_model(backend=exact())
    ids, cache = list(np.random.default_rng(0).integers(0, 97, 257)), model.new_cache()
    model.forward(ids[:255], cache)
    zeros, calls = torch.zeros, []

    def failing(shape, *args, **kwargs):
        calls.append(shape)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no room")
        return zeros(shape, *args, **kwargs)

    monkeypatch.setattr(torch, "zeros", failing)
    with pytest.raises(ResourceError, match="E7022 context"):
        model.forward(ids[255:], cache)
    assert (cache.length, cache.capacity, cache.epoch) == (255, 256, 2)
    monkeypatch.undo()
    monkeypatch.setenv("REFIMPL_CUDA_DEVICE", "cpu")
    whole = model.logits(ids)
    assert np.abs(model.forward(ids[255:], cache) - whole[255:]).max() <= 1e-4 * np.abs(whole).max()


@pytest.mark.parametrize(
    "on_cpu",
    [
        r"layers\.1",
        r"layers\.[02]",
        r"(q_b|o)_proj|shared_experts",
        r"lm_head|model\.norm",
        r"mlp\.gate_proj",
    ],
    ids=str,
)
def test_any_module_can_stay_on_the_cpu(on_cpu):
    import re

    def place(module):
        return "cpu" if re.search(on_cpu, module) or experts_on_cpu(module) == "cpu" else "cuda:0"

    ids = list(range(20))
    expected = random_model().logits(ids)
    mixed = random_model(backend=exact(place))
    assert np.abs(mixed.logits(ids) - expected).max() <= 1e-4 * np.abs(expected).max()
    cache = mixed.new_cache()
    stepwise = np.concatenate([mixed.forward([i], cache) for i in ids])
    assert np.abs(stepwise - expected).max() <= 1e-4 * np.abs(expected).max()


def test_an_embedding_table_can_be_on_the_gpu():
    ids = list(range(20))
    mixed = random_model(backend=exact(lambda m: "cpu" if ".mlp.experts" in m else "cuda:0"))
    true = random_model()
    assert np.abs(mixed.logits(ids) - true.logits(ids)).max() <= 1e-4


def overlapped(function):
    return cuda_experts.OverlappedExperts(function, cuda_graph.Capture(), cuda_experts.PinnedMemory())


def test_experts_run_on_their_own_thread_while_the_shared_expert_does():
    import threading

    names = []
    start = threading.Event()
    x, ids, weights = torch.ones(2, 4), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)

    def slow(x, ids, weights):
        assert start.wait(10)  # until the caller has gone on
        names.append(threading.current_thread().name)
        return x * 2

    routed = overlapped(slow)(x, ids, weights)
    start.set()
    assert routed.result().tolist() == [[2.0] * 4] * 2 and names[0].startswith("experts")
    assert (routed + x).tolist() == (x + routed).tolist() == [[3.0] * 4] * 2
    assert torch.equal(cuda_experts.SyncExperts(slow)(x, ids, weights), routed.result())
    assert names[1] == threading.current_thread().name


def test_an_error_of_the_experts_reaches_the_caller():
    def broken(x, ids, weights):
        raise ValueError("broken")

    x, ids, weights = torch.ones(1, 4), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    routed = overlapped(broken)(x, ids, weights)
    with pytest.raises(ValueError, match="broken"):
        routed + x


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_command_refuses_in_one_line(monkeypatch):
    environment = {k: v for k, v in os.environ.items() if k != "REFIMPL_CUDA_DEVICE"}
    command = [
        sys.executable,
        "-m",
        "refimpl.chat",
        "--gguf_path",
        str(FP8_DIR),
        "--backend",
        "cuda",
        "-p",
        "hello",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    assert (
        done.stderr.startswith("refimpl: E5030 backend cuda: torch sees no GPU")
        and done.stderr.count("\n") == 1
    )
    monkeypatch.delenv("REFIMPL_CUDA_DEVICE")
    with pytest.raises(UnsupportedError, match="E5030"):
        refimpl.load(FP8_DIR, backend="cuda")


def test_triton_and_a_new_enough_gpu_are_asked_for(monkeypatch):
    monkeypatch.delenv("REFIMPL_CUDA_DEVICE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UnsupportedError, match=r"E5032 .*found compute capability 7\.5"):
        cpu.check_gpu()
    monkeypatch.setattr(cpu, "version", lambda name: "3.5.1")
    with pytest.raises(UnsupportedError, match=r"E5031 .*triton is too old .found 3\.5\.1, expected 3\.6"):
        cpu.check_gpu()
    monkeypatch.setattr(cpu, "find_spec", lambda name: None if name == "triton" else name)
    with pytest.raises(UnsupportedError, match=r"E5031 .*triton"):
        cpu.check_gpu()


def test_without_torch_too(monkeypatch):
    monkeypatch.setattr(cpu, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="E5031"):
        refimpl.load(FP8_DIR, backend="cuda")


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="there is a GPU here")
def test_auto_without_a_gpu_imports_no_torch():
    program = (
        "import sys, refimpl; m = refimpl.load(sys.argv[1]); print(m.backend.name, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(FP8_DIR)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "cpu False\n", done.stderr


def test_the_reference_is_not_this_backend():
    """What the tests above compare with is another code."""
    for name in ("linear", "rms_norm", "rope", "mla_absorbed", "mla_naive", "route", "swiglu", "embed"):
        assert ops.load(name, "cuda") is not ops.load(name, "reference") and ops.load(
            name, "cuda"
        ).__module__.endswith("_torch")
    assert ops.load("linear", "reference") is linear.linear


def test_q_a_and_kv_a_are_one_product_and_so_are_gate_and_up():
    """Fused, each layer makes four products of FP8 (q_a with kv_a, q_b, o, and the MLP's two), and separate
    ones give the same logits.
    """
    model = refimpl.load(FP8_DIR, backend="cuda", activations="exact")
    attention, mlp = model.layers[0].self_attn, model.layers[0].mlp
    assert mlp.swiglu.func is linear_torch.fused_swiglu
    assert attention.down.func is not linear_torch.fused_linear  # 96 rows: no whole tile
    fused = random_model({"q_lora_rank": 128}, exact())
    assert fused.layers[0].self_attn.down.func is linear_torch.fused_linear
    seen = Seen()
    separate = Model(fused.config, fused.checkpoint, fused.backend.watched(seen))
    ids = list(range(20))
    np.testing.assert_allclose(fused.logits(ids), separate.logits(ids), rtol=0, atol=1e-4)
    assert seen.called.count("linear") == 4 * fused.config.num_hidden_layers + 1
    expected = random_model({"q_lora_rank": 128}).logits(ids)
    assert np.abs(fused.logits(ids) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_fused_weight_takes_the_place_of_its_parts():
    """No byte is held twice, by whatever models share the backend."""
    backend = exact()
    one = random_model({"q_lora_rank": 128}, backend)
    other = Model(one.config, one.checkpoint, backend)
    for i in range(one.config.num_hidden_layers):
        name = f"model.layers.{i}.self_attn.q_a_proj.weight"
        fused = one.layers[i].self_attn.down.keywords["fused"]
        assert fused is other.layers[i].self_attn.down.keywords["fused"]
        assert backend.weight(name, one.checkpoint[names.to_gguf(name)]) is fused.parts[0]
        assert fused.parts[0].codes.data_ptr() == fused.whole.codes.data_ptr()


class Seen:
    """Watches a backend."""

    def __init__(self):
        self.called = []

    def weight(self, name, value):
        pass

    def operation(self, module, name, function):
        return lambda *a, **k: (self.called.append(name), function(*a, **k))[1]
