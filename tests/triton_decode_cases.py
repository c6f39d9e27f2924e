"""The Triton kernels of one token against their numpy references: attention over the latent cache, the router
and what lies between products. Not collected by name: test_triton.py runs this file as it does
triton_cases.py.
"""

import os
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.bench import attention as bench_attention
from refimpl.conformance.inputs import draws
from refimpl.conformance.manifest import Manifest
from refimpl.conformance.truth import bounds, routing
from refimpl.devices.speed import Result
from refimpl.entered import listening
from refimpl.kernels import (
    attention_torch,
    mla_decode_triton,
    mla_long_triton,
    norm_rope_triton,
    route_triton,
)
from refimpl.kernels.e4m3_triton import INTERPRETED
from refimpl.reference import attention

DEVICE = torch.device("cpu") if INTERPRETED.value else torch.device("cuda", 0)
MANIFEST = Manifest(accumulation="float32" if INTERPRETED.value else "tensor-core")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*encountered:RuntimeWarning"
)  # numpy's, below the interpreter, where NaN is meant to be
interpreted = pytest.mark.skipif(
    not INTERPRETED.value, reason="each new shape is compiled anew on a GPU; the others are tried there"
)

PLAIN = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": False}

# (heads, n, r, v, L, rows there, room): V3's head, the embedded model's sizes, nothing a multiple of
# anything, one row, several shares of a long cache.
SHAPES = [
    (3, 128, 64, 128, 512, 77, 128),
    (4, 16, 8, 16, 32, 256, 256),
    (17, 20, 6, 33, 70, 213, 300),
    (3, 1, 2, 1, 16, 1, 1),
    (2, 8, 4, 6, 40, 1050, 2100),
]
if not INTERPRETED.value:
    SHAPES += [(128, 128, 64, 128, 512, rows, room) for rows, room in ((500, 512), (1, 256), (9000, 16384))]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def case(seed, heads, n, r, v, latents, rows, room, dtype):
    """The arguments on the device, latent and key side by side as a cache holds them and NaN behind what is
    there; the truth and its bound, f64.
    """
    rng = np.random.default_rng(seed)

    def numbers(*shape):
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    q, cache = numbers(1, heads, n + r), numbers(room, latents + r).to(dtype)
    kv_b = (numbers(heads, n + v, latents) / latents**0.5).to(dtype)
    cache[rows:] = float("nan")
    wide = cache[:rows].float().numpy()
    true = bounds.attention(
        MANIFEST,
        *(q[..., :n].numpy(), q[..., n:].numpy(), wide[:, :latents], wide[:, latents:]),
        *(kv_b.float().numpy(), 0.1),
    )
    q, cache, kv_b = (a.to(DEVICE) for a in (q, cache, kv_b))
    return (q[..., :n], q[..., n:], cache[:, :latents], cache[:, latents:], kv_b, 0.1), true


def within(found: torch.Tensor, true: bounds.Sum) -> None:
    off = np.abs(found.cpu().numpy() - true.true)
    assert found.shape == true.true.shape and (off <= true.bound).all(), np.max(off / true.bound)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_over_a_cache_with_room_to_spare(shape, dtype):
    arguments, true = case(1, *shape, dtype)
    length = torch.tensor(shape[-2], device=DEVICE)
    found = attention_torch.mla_absorbed(*arguments, length=length)
    within(found, true)
    for _ in range(1 if INTERPRETED.value else 20):
        assert torch.equal(found, attention_torch.mla_absorbed(*arguments, length=length))


@interpreted
@DTYPES
@settings(max_examples=-(-settings.default.max_examples // 5))  # an example takes the interpreter a second
@given(
    st.integers(0, 2**32),
    st.integers(1, 40),
    st.tuples(*[st.integers(1, 40)] * 4),
    st.integers(1, 200),
    st.integers(0, 1200),
)
def test_attention_of_any_shape(dtype, seed, heads, sizes, rows, spare):
    arguments, true = case(seed, heads, *sizes, rows, rows + spare, dtype)
    within(attention_torch.mla_absorbed(*arguments, length=torch.tensor(rows)), true)


def test_attention_without_a_length_is_over_all_rows():
    arguments, true = case(2, 4, 16, 8, 16, 32, 300, 300, torch.bfloat16)
    within(attention_torch.mla_absorbed(*arguments), true)


def test_one_token_takes_the_kernel_and_two_the_other_way(monkeypatch):
    arguments, _ = case(3, 4, 16, 8, 16, 32, 60, 60, torch.float32)
    taken = []
    monkeypatch.setattr(mla_decode_triton, "mla_absorbed", lambda *a: taken.append(a))
    attention_torch.mla_absorbed(*arguments)
    q_nope, q_pe, *rest = arguments
    attention_torch.mla_absorbed(q_nope.repeat(2, 1, 1), q_pe.repeat(2, 1, 1), *rest)
    assert len(taken) == 1


@pytest.mark.parametrize("where", ["query", "row there"])
def test_nan_reaches_what_it_should(where):
    arguments, _ = case(4, 20, 16, 8, 16, 32, 100, 200, torch.bfloat16)
    arguments[0 if where == "query" else 2][0, 3] = float("nan")
    found = attention_torch.mla_absorbed(*arguments, length=torch.tensor(100, device=DEVICE)).isnan()
    assert found.all() if where == "row there" else found[0, 3].all() and found.sum() == 16


def test_the_latest_of_a_long_cache_is_found():
    """Scores that rise by row: every share and every step within one has to rescale what came before."""
    rows = 2000
    q, zero = torch.ones(1, 1, 1, device=DEVICE), torch.zeros(1, 1, 1, device=DEVICE)
    latent = torch.arange(rows, device=DEVICE, dtype=torch.float32)[:, None]
    kv_b = torch.ones(1, 2, 1, device=DEVICE)
    found = attention_torch.mla_absorbed(q, zero, latent, torch.zeros_like(latent), kv_b, 1.0)
    p = np.exp(np.arange(rows) - rows + 1.0)
    np.testing.assert_allclose(found.item(), (p * np.arange(rows)).sum() / p.sum(), rtol=1e-6)


@pytest.mark.parametrize("rows", [64, 65, 1024, 1025, 1088, 1089, 2100])
def test_shares_of_what_is_there_cover_it(rows):
    """Lengths around those where there is one share more, or all become longer."""
    arguments, true = case(5, 2, 8, 4, 6, 40, rows, 2100, torch.float32)
    within(attention_torch.mla_absorbed(*arguments, length=torch.tensor(rows, device=DEVICE)), true)


# --- a cache with room for many rows ------------------------------------------------------------------------

TILE, EACH = mla_long_triton.ROWS, mla_long_triton.EACH
# (heads, n, r, v, L, rows there, room): one row; a tile, and one row more; a row more than two shares; more
# heads than a block, and than two; widths that are multiples of nothing; no room to spare.
LONG_SHAPES = [
    (40, 5, 6, 3, 140, 1, 300),
    (83, 4, 8, 4, 128, TILE, 700),
    (40, 5, 6, 3, 140, TILE + 1, 700),
    (34, 3, 2, 2, 128, 2 * EACH + 1, 4096),
    (130, 4, 8, 4, 128, 140, 140),
]
if not INTERPRETED.value:
    LONG_SHAPES = [
        (heads, 128, 64, 128, 512, rows, room)
        for heads in (128, 64, 83)
        for rows, room in ((1, 4096), (4096, 4096), (8193, 16384), (16384, 16384), (20000, 32768))
    ]


@pytest.fixture
def long(monkeypatch):
    """Large tiles, however little room there is."""
    monkeypatch.setattr(mla_long_triton, "LONG", 1)


def apart(arguments):
    """The same with keys somewhere else than behind the latents."""
    return (*arguments[:3], arguments[3].clone(), *arguments[4:])


@pytest.mark.parametrize("shape", LONG_SHAPES, ids=str)
def test_large_tiles_over_a_cache_with_room_to_spare(long, shape):
    arguments, true = case(7, *shape, torch.bfloat16)
    length = torch.tensor(shape[-2], device=DEVICE)
    found = attention_torch.mla_absorbed(*arguments, length=length)
    within(found, true)
    for _ in range(0 if INTERPRETED.value else 20):
        assert torch.equal(found, attention_torch.mla_absorbed(*arguments, length=length))


def test_shares_of_many_tiles(long, monkeypatch):
    """More than are joined at once."""
    monkeypatch.setattr(mla_long_triton, "SHARES", 2)
    monkeypatch.setattr(mla_decode_triton, "MANY", 2)
    rows = 2 * 17 * TILE - 5
    arguments, true = case(9, 34, 3, 2, 2, 128, rows, rows + 100, torch.bfloat16)
    within(attention_torch.mla_absorbed(*arguments, length=torch.tensor(rows, device=DEVICE)), true)


@pytest.mark.parametrize("rows", [200, 300])
def test_large_tiles_where_keys_lie_elsewhere_and_all_rows_are_there(long, rows):
    arguments, true = case(8, 40, 5, 20, 3, 140, rows, rows, torch.bfloat16)
    within(attention_torch.mla_absorbed(*arguments), true)
    within(attention_torch.mla_absorbed(*apart(arguments)), true)


@interpreted
@settings(max_examples=-(-settings.default.max_examples // 16))
@given(
    st.integers(0, 2**32),
    st.integers(mla_long_triton.HEADS, 70),
    st.tuples(*[st.integers(1, 20)] * 3, st.integers(mla_long_triton.LATENTS, 300)),
    st.integers(1, 500),
    st.integers(0, 300),
    st.booleans(),
)
def test_large_tiles_of_any_shape(seed, heads, sizes, rows, spare, together):
    arguments, true = case(seed, heads, *sizes, rows, rows + spare, torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mla_long_triton, "LONG", 1)
        arguments = arguments if together else apart(arguments)
        within(attention_torch.mla_absorbed(*arguments, length=torch.tensor(rows)), true)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_latest_and_the_first_of_many_rows_are_found(long, sign):
    """Scores that rise or fall by row: each tile and each share has another largest."""
    heads, rows = 34, 700 if INTERPRETED.value else 20000
    row = torch.arange(rows, device=DEVICE)
    latent = torch.zeros(rows, 128, dtype=torch.bfloat16, device=DEVICE)
    latent[:, 0], latent[:, 1] = row // 256, row % 256  # bfloat16 has eight bits
    kv_b = torch.zeros(heads, 2, 128, device=DEVICE)
    kv_b[:, :, 0], kv_b[:, :, 1] = 256, 1
    q = torch.full((1, heads, 1), float(sign), device=DEVICE)
    found = attention_torch.mla_absorbed(q, q * 0, latent, latent[:, 2:3], kv_b, 1.0)
    p = np.exp(sign * np.arange(rows) - (rows - 1.0) * (sign > 0))
    wanted = (p * np.arange(rows)).sum() / p.sum()
    np.testing.assert_allclose(found.cpu().numpy(), np.full((1, heads, 1), wanted), rtol=2e-5)


@pytest.mark.parametrize("where", ["query", "row there"])
def test_nan_reaches_what_it_should_through_large_tiles(long, where):
    arguments, _ = case(4, 40, 4, 8, 5, 128, 200, 300, torch.bfloat16)
    arguments[0 if where == "query" else 2][0, 3] = float("nan")
    found = attention_torch.mla_absorbed(*arguments, length=torch.tensor(200, device=DEVICE)).isnan()
    assert found.all() if where == "row there" else found[0, 3].all() and found.sum() == 5


def test_room_and_model_choose_the_tiles_and_the_length_does_not(monkeypatch):
    """A CUDA graph holds what was chosen."""
    room = mla_long_triton.LONG
    cache = torch.zeros(room, 128, dtype=torch.bfloat16)
    assert mla_long_triton.takes(room, 128, cache)
    assert not mla_long_triton.takes(room - 1, 128, cache), "little room"
    assert not mla_long_triton.takes(room, 16, cache), "few heads"
    assert not mla_long_triton.takes(room, 128, cache.float()), "float32"
    assert not mla_long_triton.takes(room, 128, cache[:, :64]), "few latents"


# --- prompts, in pieces of a cache's rows -------------------------------------------------------------------

# (tokens, rows before them, heads, n, r, v, rows at a time): pieces before the new tokens, among them, and
# both; fewer rows at a time than new tokens, so that the first of these see no row of the last pieces; a last
# piece of one row; more tokens than a block of queries. Half of the heads are computed at a time.
PIECES = [
    (17, 79, 3, 16, 16, 16, 32),
    (70, 0, 2, 16, 32, 16, 32),
    (150, 43, 2, 32, 16, 64, 64),
    (129, 64, 3, 16, 16, 32, 96),
    (20, 300, 2, 128, 64, 128, 96),
]
if not INTERPRETED.value:
    PIECES += [(t, past, 16, 128, 64, 128, 2048) for t, past in ((17, 9000), (1024, 3000), (2000, 0))]


def prompt_case(seed, tokens, past, heads, n, r, v):
    """Arguments of `mla_absorbed` over a cache of bfloat16 without room to spare; the truth and its bound."""
    rows = past + tokens
    (*_, latent, k_pe, kv_b, scale), _ = case(seed, heads, n, r, v, 32, rows, rows, torch.bfloat16)
    draw = np.random.default_rng(seed + 1).standard_normal
    queries = [draw((tokens, heads, width)).astype(np.float32) for width in (n, r)]
    stored = [a.float().cpu().numpy() for a in (latent, k_pe, kv_b)]
    true = bounds.attention(MANIFEST, *queries, *stored, scale)
    return (*(torch.from_numpy(q).to(DEVICE) for q in queries), latent, k_pe, kv_b, scale), true


@pytest.mark.parametrize("shape", PIECES, ids=str)
def test_prompts_are_the_same_in_pieces_of_rows(monkeypatch, shape):
    *sizes, each = shape
    arguments, true = prompt_case(11, *sizes)
    whole = attention_torch.mla_absorbed(*arguments)
    monkeypatch.setattr(attention_torch, "rows_at_a_time", lambda some, *_: (some // 2, each))
    with listening() as entered:
        found = attention_torch.mla_absorbed(*arguments)
    assert entered["rows in pieces"] and entered["heads in pieces"]
    within(whole, true)
    within(found, true)
    for _ in range(1 if INTERPRETED.value else 20):
        assert torch.equal(found, attention_torch.mla_absorbed(*arguments))


@pytest.mark.parametrize("where", ["query", "row there"])
def test_nan_reaches_what_it_should_through_pieces_of_rows(monkeypatch, where):
    arguments, _ = prompt_case(12, 40, 100, 3, 16, 16, 16)
    arguments[0 if where == "query" else 2][5, 1] = float("nan")
    monkeypatch.setattr(attention_torch, "rows_at_a_time", lambda some, *_: (some, 32))
    found = attention_torch.mla_absorbed(*arguments).isnan()
    assert found.all() if where == "row there" else found[5, 1].all() and found.sum() == 16


@pytest.mark.parametrize("sign", [1, -1])
def test_the_latest_and_the_first_row_of_all_pieces_are_found(monkeypatch, sign):
    """Scores that rise or fall by row, far beyond what float32's exponentials hold: each piece makes nothing
    of those before it, or is nothing beside them.
    """
    tokens, rows = 20, 256
    row = torch.arange(rows, device=DEVICE)
    latent = torch.zeros(rows, 32, dtype=torch.bfloat16, device=DEVICE)
    latent[:, 0] = row  # at most 256: bfloat16 has eight bits
    kv_b = torch.zeros(2, 32, 32, dtype=torch.bfloat16, device=DEVICE)
    kv_b[:, 0, 0] = kv_b[:, 16:, 0] = 1
    q = torch.full((tokens, 2, 16), 8.0 * sign, device=DEVICE)
    monkeypatch.setattr(attention_torch, "rows_at_a_time", lambda some, *_: (some, 32))
    found = attention_torch.mla_absorbed(q, q * 0, latent, torch.zeros_like(latent[:, :16]), kv_b, 1.0)
    wanted = row[-tokens:, None, None].float() if sign > 0 else torch.zeros(1, device=DEVICE)
    assert (found - wanted).abs().max() < 0.01


# --- the router ---------------------------------------------------------------------------------------------

# (experts, groups, groups kept, experts chosen)
ROUTERS = [(256, 8, 4, 8), (8, 4, 2, 2), (8, 8, 3, 3), (6, 1, 1, 6), (24, 3, 2, 5)]


def routed(x, weight, bias, c):
    ids, shares = attention_torch.route(*(torch.from_numpy(a).to(DEVICE) for a in (x, weight, bias)), c)
    return ids.cpu().numpy(), shares.cpu().numpy()


PART = INTERPRETED.value and os.environ.get("HYPOTHESIS_PROFILE") != "deep"
MANY = route_triton.FEW + 1 if PART else 20  # many tokens take the interpreter seconds
CHOICES = [*product(ROUTERS, [0, 1, 3, MANY], ["normal", "integers", "ties"], draws.ROUTERS)]
if PART:
    CHOICES = [c for c in CHOICES if c[1] < MANY] + [c for c in CHOICES if c[1] == MANY][::4]


@pytest.mark.parametrize(("router", "tokens", "kind", "scores"), CHOICES)
def test_the_router_chooses_as_the_reference(router, tokens, kind, scores):
    experts, groups, kept, chosen = router
    rng = np.random.default_rng(experts + tokens)
    c = draws.router(experts, groups, kept, chosen, tokens != 3, scores)
    x, weight = rng.standard_normal((tokens, 200)), rng.standard_normal((experts, 200)) / 10
    bias = rng.standard_normal(experts) * (scores == "sigmoid")
    if kind != "normal":
        x, weight, bias = rng.integers(-1, 2, x.shape), rng.integers(-1, 2, weight.shape), bias * 0
    if kind == "ties":
        weight[:] = weight[0]
    x, weight, bias = (a.astype(np.float32) for a in (x, weight, bias))
    found = routed(x, weight, bias, c)
    assert routing.check_route(MANIFEST, found, x, weight, bias, c) is None
    if kind != "normal":  # logits are exact: the very same ids
        np.testing.assert_array_equal(found[0], attention.route(x, weight, bias, c)[0])


def test_logits_of_bfloat16_weights():
    rng = np.random.default_rng(5)
    x = torch.from_numpy(rng.standard_normal((2, 7168)).astype(np.float32))
    weight = torch.from_numpy(rng.standard_normal((9, 7168)).astype(np.float32)).to(torch.bfloat16)
    true = bounds.linear(MANIFEST, x.numpy(), weight.float().numpy(), "exact")
    within(route_triton.few_logits(x.to(DEVICE), weight.to(DEVICE)), true)


def test_scores_rank_as_the_reference_ranks_them():
    """The best group is kept whole, NaN stands behind all, zeros are equal whatever their sign."""
    c = SimpleNamespace(
        n_group=2,
        topk_group=1,
        num_experts_per_tok=4,
        routed_scaling_factor=2.0,
        **PLAIN,
    )
    logits = torch.tensor([[0.0, -1.0, -0.0, 3.0, 0.0, 0.0, 0.0, float("nan")]], device=DEVICE)
    bias = torch.zeros(8, device=DEVICE)
    ids, shares = (a.cpu().numpy() for a in route_triton.choices(logits, bias, c))
    assert ids.tolist() == [[3, 0, 2, 1]]
    np.testing.assert_allclose(shares[0], 2 / (1 + np.exp([-3.0, 0, 0, 1])), rtol=1e-6)
    bias[0] = float("-inf")  # an expert that is not to be chosen before any other
    c.num_experts_per_tok = 3
    assert route_triton.choices(logits, bias, c)[0].tolist() == [[3, 2, 1]]
    bias[:4] = float("nan")
    ids = route_triton.choices(logits, bias, c)[0].tolist()
    assert len(set(ids[0])) == 3


def test_a_softmax_of_nan_or_infinity_is_nan():
    c = draws.router(8, 1, 1, 3, False, "softmax")
    for strange in (float("nan"), float("inf")):
        logits = torch.tensor([[0.0, 1, strange, 2, 3, 4, 5, 6]], device=DEVICE)
        ids, shares = route_triton.choices(logits, torch.zeros(8, device=DEVICE), c)
        assert len(set(ids[0].tolist())) == 3 and shares.isnan().all()


def test_sigmoids_keep_their_last_places():
    """Of very negative logits too, where the chip's own exponential would lose some."""
    logits = np.linspace(-80, 20, 256, dtype=np.float32)[None]
    c = SimpleNamespace(
        n_group=1,
        topk_group=1,
        num_experts_per_tok=256,
        routed_scaling_factor=1.0,
        **PLAIN,
    )
    ids, found = route_triton.choices(torch.from_numpy(logits).to(DEVICE), torch.zeros(256, device=DEVICE), c)
    true = 1 / (1 + np.exp(-logits[0].astype(np.float64)[ids.cpu().numpy()[0]]))
    np.testing.assert_allclose(found.cpu().numpy()[0], true, rtol=bounds.gamma(bounds.EXP + 3))


@pytest.mark.skipif(INTERPRETED.value, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize(("heads", "room"), [(16, 1000), (64, 9000)])
def test_a_growing_length_in_a_cuda_graph(heads, room):
    """One graph for every length that the cache has room for."""
    shape = (heads, 128, 64, 128, 512)
    arguments, _ = case(6, *shape, room, room, torch.bfloat16)
    length = torch.tensor(1, device=DEVICE)
    attention_torch.mla_absorbed(*arguments, length=length)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attention_torch.mla_absorbed(*arguments, length=length)
    for rows in (1, 64, 65, 500, room):
        length.fill_(rows)
        graph.replay()
        torch.cuda.synchronize()
        _, true = case(6, *shape, rows, room, torch.bfloat16)
        within(found, true)


@DTYPES
@pytest.mark.parametrize("latents", [512, 600])  # a program's columns, as in DeepSeek-V3, and some more
def test_a_row_goes_where_it_belongs_and_nowhere_else(dtype, latents):
    latent, k_pe = torch.randn(1, 700, device=DEVICE), torch.randn(1, 70, device=DEVICE)
    wide = torch.full((6, 800), 7.0, dtype=dtype, device=DEVICE)
    rows = wide[:, :790]
    norm_rope_triton.write_row(latent[:, :latents], k_pe[:, :64], rows, torch.tensor([4], device=DEVICE))
    new = torch.cat((latent[:, :latents], k_pe[:, :64]), dim=1).to(dtype)
    assert torch.equal(wide[4, : latents + 64], new[0])
    wide[4, : latents + 64] = 7
    assert (wide == 7).all()


def test_questions_arrive_whole_and_answers_are_added():
    inputs = (
        torch.randn(1, 1111, device=DEVICE),
        torch.arange(8, device=DEVICE)[None],
        torch.rand(1, 8, device=DEVICE),
    )
    shared = tuple(torch.zeros(a.shape, dtype=a.dtype, pin_memory=not INTERPRETED.value) for a in inputs)
    norm_rope_triton.ask(inputs, shared)
    if not INTERPRETED.value:
        torch.cuda.synchronize()
    assert all(torch.equal(a.cpu(), b) for a, b in zip(inputs, shared))
    other = torch.randn(1, 1111, device=DEVICE)
    assert torch.equal(norm_rope_triton.add(shared[0], other), inputs[0] + other)


@interpreted
def test_the_benchmark_of_attention(monkeypatch, capsys):
    """All of it but the clock, at small sizes."""
    sizes = {"HEADS": 2, "NOPE": 16, "VALUE": 16, "ROPE": 16, "LATENT": 32, "CACHE": 1, "DEVICE": "cpu"}
    for name, value in sizes.items():
        monkeypatch.setattr(bench_attention, name, value)
    monkeypatch.setattr(bench_attention, "gpu", lambda: torch)
    monkeypatch.setattr(bench_attention, "copy_bandwidth", lambda: 1000.0)
    monkeypatch.setattr(
        bench_attention, "replay", lambda calls: [call() for call in calls] and Result(2e-6, 0.0)
    )
    bench_attention.main(["--backend", "cuda", "--tokens", "1", "--tokens", "20", "--context", "70"])
    lines = capsys.readouterr().out.splitlines()
    assert [line[25:45].strip() for line in lines] == ["large tiles", "16 heads", "cuda"]
    assert all("0.002 ms" in line for line in lines)
