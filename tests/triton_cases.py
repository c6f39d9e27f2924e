"""The Triton kernels against their numpy references. Not collected by name: `test_triton_interpreter` runs
this file with TRITON_INTERPRET=1 on any CPU, `test_triton_gpu` on a GPU; Triton decides between the two when
it is imported, so each has a process of its own.
"""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refimpl.bench import fp8 as bench_fp8
from refimpl.bench import fp8_sweep
from refimpl.bench.measure import Settings
from refimpl.conformance.laws.real_sizes import PERSISTENT
from refimpl.conformance.truth import bounds
from refimpl.conformance.truth.bounds import gamma
from refimpl.entered import listening
from refimpl.formats import e4m3
from refimpl.kernels import act_quant_triton as quantizers
from refimpl.kernels import fp8_linear_triton as linears
from refimpl.kernels import fp8_plain_triton as plain
from refimpl.kernels.e4m3_triton import INTERPRETED, capability, has_e4m3
from refimpl.kernels.fp8_tiles import H100_GBPS, PRICES, WIDE, Tiles, band, deal, launches, stages, tiles
from refimpl.reference import attention, experts, fp8
from refimpl.tensors import ScaledFP8

DEVICE = torch.device("cpu") if INTERPRETED.value else torch.device("cuda", 0)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*encountered in:RuntimeWarning"
)  # numpy's, below the interpreter, where NaN is meant to be
interpreted = pytest.mark.skipif(
    not INTERPRETED.value, reason="each new shape is compiled anew on a GPU; SHAPES are the ones tried there"
)

# (tokens, outputs, columns): V3's narrow matrix, ragged in each direction, less than a tile, no tokens, more
# tokens than a tile.
SHAPES = [
    (1, 576, 1024),
    (1, 2112, 256),
    (16, 576, 640),
    (7, 300, 200),
    (3, 5, 24),
    (0, 64, 128),
    (33, 257, 384),
    (130, 192, 130),
]
if not INTERPRETED.value:
    SHAPES += [
        (1, 2112, 7168),
        (16, 7168, 2048),
        (128, 4096, 7168),
        (256, 24576, 1536),
        (1000, 7168, 2048),
        (513, 2112, 7168),
    ]


def here(x):
    """numpy to the device, keeping the bits."""
    return (
        ScaledFP8(here(x.codes), here(x.scale))
        if isinstance(x, ScaledFP8)
        else torch.from_numpy(np.ascontiguousarray(x)).to(DEVICE)
    )


def back(x):
    """The device's tensor as numpy, bf16 as f32."""
    return (x.float() if x.dtype == torch.bfloat16 else x).cpu().numpy()


def numbers(seed: int, *shape: int) -> np.ndarray:
    """Rows of very different sizes with outliers, some of them zeros, or zeros in their first group."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 3, (*shape[:-1], 1))
    x[rng.random(shape) < 0.01] *= 50
    x[rng.random(shape[:-1]) < 0.1] = 0
    x[rng.random(shape[:-1]) < 0.1, :128] = 0
    return x.astype(np.float32)


def weights(seed: int, n: int, k: int) -> ScaledFP8:
    return (
        fp8.weight_quant(numbers(seed, n, k))
        if n * k
        else ScaledFP8(np.zeros((n, k), np.uint8), np.zeros((-(-n // 128), -(-k // 128)), np.float32))
    )


# --- quantizers: the same bits ------------------------------------------------------------------------------


def check_quantized(x: np.ndarray, ue8m0: bool):
    codes, scale = quantizers.act_quant(here(x), ue8m0)
    true_codes, true_scale = fp8.act_quant(x, ue8m0)
    np.testing.assert_array_equal(back(scale), true_scale, strict=True)  # NaN equals NaN
    np.testing.assert_array_equal(back(codes), true_codes, strict=True)


FLOATS = st.one_of(
    st.floats(width=32),
    st.sampled_from([np.inf, -np.inf, np.nan, -0.0, 448.0, 464.0, 2.0**-149, 3.4e38, 1.5 * 2.0**-10]).map(
        np.float32
    ),
)


@pytest.mark.parametrize("ue8m0", [False, True])
@given(
    st.integers(0, 40),
    st.integers(1, 3),
    st.sampled_from([0, 1, 24, 128, 200, 256]),
    st.integers(0, 2**32),
    st.integers(-44, 30),
)
def test_act_quant(ue8m0, m, lead, k, seed, size):
    x = np.random.default_rng(seed).standard_normal((lead, m, k)).astype(np.float32)
    check_quantized(x * np.float32(10.0) ** size, ue8m0)
    check_quantized(
        x[0] * 10.0 ** np.random.default_rng(seed).integers(-3, 3, (m, 1)).astype(np.float32), ue8m0
    )


@pytest.mark.parametrize("ue8m0", [False, True])
@given(st.lists(FLOATS, min_size=1, max_size=130), st.floats(0, 1, width=32))
def test_act_quant_of_any_floats(ue8m0, values, share):
    """Zeros around the few drawn, so that every value is the largest of a group at times."""
    x = np.zeros((2, 160), np.float32)
    x[0, : len(values)] = values
    x[1, : max(1, int(len(values) * share))] = values[: max(1, int(len(values) * share))]
    check_quantized(x, ue8m0)


def test_act_quant_rounds_once():
    """All ties between neighbouring codes and what lies a float32 step to either side, under a scale of
    one.
    """
    ties = (e4m3.TABLE[:126] + e4m3.TABLE[1:127]) / 2
    x = np.stack([np.nextafter(ties, np.float32(0)), ties, np.nextafter(ties, np.float32(448))]).astype(
        np.float32
    )
    x = np.concatenate([x, -x]).reshape(-1, 126)
    check_quantized(np.concatenate([x, np.full((len(x), 2), 448, np.float32)], axis=1), False)


def test_act_quant_of_bfloat16_and_of_strided_rows():
    x = here(numbers(0, 5, 400)).to(torch.bfloat16)
    for view in (x, x[:, 8:200], x[::2], x.T):
        codes, scale = quantizers.act_quant(view)
        true_codes, true_scale = fp8.act_quant(back(view))
        np.testing.assert_array_equal(back(codes), true_codes)
        np.testing.assert_array_equal(back(scale), true_scale)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (128, 128), (200, 300), (576, 256)])
def test_weight_dequant_of_all_codes(n, k):
    codes = np.resize(np.arange(256, dtype=np.uint8), n * k).reshape(n, k)
    w = ScaledFP8(codes, numbers(1, -(-n // 128), -(-k // 128)))
    np.testing.assert_array_equal(back(quantizers.weight_dequant(here(w))), fp8.weight_dequant(w))
    halves = quantizers.weight_dequant(here(w), torch.bfloat16)
    np.testing.assert_array_equal(
        back(halves), back(torch.from_numpy(fp8.weight_dequant(w)).to(torch.bfloat16))
    )


def close_codes(found: ScaledFP8, true: np.ndarray, relative: float):
    """`found` are codes of numbers within `relative` of `true`: what they stand for is within that and half a
    step of E4M3.
    """
    codes, scale = (
        back(found.codes),
        np.repeat(back(found.scale), 128, axis=-1)[:, : true.shape[1]].astype(np.float64),
    )
    step = np.maximum(np.abs(true) / 16, scale * 2.0**-10)  # half of what lies between neighbouring codes
    off = np.abs(e4m3.decode(codes) * scale - true)
    assert (off <= step * (1 + 2.0**-4) + relative * np.abs(true) + 1e-37).all(), np.max(off - step)
    groups = np.maximum.reduceat(np.abs(true), np.arange(0, true.shape[1], 128), axis=1) / 448
    np.testing.assert_allclose(back(found.scale), groups, rtol=relative + 2.0**-22, atol=1e-37)


@pytest.mark.parametrize(("m", "k"), [(1, 128), (5, 576), (3, 1536)])
def test_rms_norm_quant(m, k):
    x, weight = numbers(2, m, k), np.abs(numbers(3, 1, k)[0]) + np.float32(0.1)
    true = attention.rms_norm(x.astype(np.float64), weight.astype(np.float64), 1e-6)
    normed, *quantized = quantizers.rms_norm_quant(here(x), here(weight), 1e-6)
    np.testing.assert_allclose(back(normed), true, rtol=2.0**-20)
    close_codes(ScaledFP8(*quantized), true, 2.0**-20)
    nothing, *again = quantizers.rms_norm_quant(here(x), here(weight), 1e-6, keep=False)
    assert nothing is None and all(torch.equal(a, b) for a, b in zip(quantized, again))


@pytest.mark.parametrize(("m", "k"), [(1, 128), (33, 200), (3, 512)])
def test_swiglu_quant(m, k):
    gate_up = np.clip(numbers(4, m, 2 * k), -30, 30)
    gate, up = gate_up[:, :k].astype(np.float64), gate_up[:, k:].astype(np.float64)
    close_codes(ScaledFP8(*quantizers.swiglu_quant(here(gate_up))), experts.silu(gate) * up, 2.0**-18)


def test_fused_quantizers_have_scales_that_are_powers_of_two():
    """Those of the norm are `act_quant`'s of what it normed; of SwiGLU, whose numbers are not kept, the
    scales are the plain ones rounded up.
    """
    x, weight = numbers(2, 5, 300), np.abs(numbers(3, 1, 300)[0]) + np.float32(0.1)
    normed, *quantized = quantizers.rms_norm_quant(here(x), here(weight), 1e-6, ue8m0=True)
    for found, true in zip(quantized, fp8.act_quant(back(normed), ue8m0=True), strict=True):
        np.testing.assert_array_equal(back(found), true)
    gate_up = here(np.clip(numbers(4, 9, 400), -30, 30))
    plain, powers = (back(quantizers.swiglu_quant(gate_up, u)[1]) for u in (False, True))
    mantissa, exponent = np.frexp(plain)
    np.testing.assert_array_equal(powers, np.ldexp(np.float32(1), exponent - (mantissa == 0.5)))


# --- linears: each element within its bound -----------------------------------------------------------------


def truth(x: np.ndarray, w: ScaledFP8, how: str) -> tuple[np.ndarray, np.ndarray]:
    """The product in float64, and how far from it the declared arithmetic may be."""
    n, k = w.shape
    wide = fp8.weight_dequant(w).astype(np.float64)
    unit = 2.0**-24 if INTERPRETED.value else 2.0**-22  # tensor cores cut off rather than round
    if how == "exact":
        return x.astype(np.float64) @ wide.T, gamma(2 * k + 16, unit) * (
            np.abs(x).astype(np.float64) @ np.abs(wide).T
        )
    codes, scale = fp8.act_quant(x)
    values, b = e4m3.decode(codes).astype(np.float64), e4m3.decode(w.codes).astype(np.float64)
    a = values * np.repeat(scale, 128, axis=-1)[:, :k]
    bound = gamma(k + 16, unit) * (np.abs(a) @ np.abs(wide).T)
    if has_e4m3(DEVICE):
        for block, start in enumerate(range(0, k, 128)):
            part = slice(start, start + 128)
            bound += (
                bounds.tensor_core_error(values[:, part], b[:, part])
                * scale[:, block, None]
                * np.repeat(w.scale[:, block], 128)[:n]
            )
    return a @ wide.T, bound


def check_linear(
    m: int, n: int, k: int, seed: int, how: str, dtype: torch.dtype, tile: Tiles | None = None
) -> None:
    x, w = here(numbers(seed, m, k)).to(dtype), weights(seed + 1, n, k)
    before = x.clone()
    y = _with(x, here(w), how, tile) if tile else linears.linear(x, here(w), how)
    true, bound = truth(back(x), w, how)
    bound = bound + 1e-37 + (2.0**-8 * (np.abs(true) + bound) if dtype == torch.bfloat16 else 0)
    off = np.abs(back(y) - true)
    assert y.dtype == dtype and y.shape == (m, n)
    assert (off <= bound).all(), f"{np.max(off / bound):.3g} times the bound"
    assert torch.equal(x, before)


def _with(x, w: ScaledFP8, how: str, tile: Tiles) -> torch.Tensor:
    """`linear` in tiles of our choice."""
    return linears._product(*(quantizers.act_quant(x) if how == "fp8" else (x, None)), w, x.dtype, tile)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["fp8", "exact"])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_linear(m, n, k, how, dtype):
    check_linear(m, n, k, m + n + k, how, dtype)


@interpreted
@pytest.mark.parametrize("how", ["fp8", "exact"])
@given(
    st.integers(0, 40),
    st.integers(1, 300),
    st.integers(1, 400) | st.sampled_from([128, 256]),
    st.integers(0, 2**32),
    st.booleans(),
)
def test_linear_of_any_shape(how, m, n, k, seed, halves):
    check_linear(m, n, k, seed, how, torch.bfloat16 if halves else torch.float32)


@pytest.mark.parametrize("how", ["fp8", "exact"])
@pytest.mark.parametrize("splits", [2, 5, 8])
def test_columns_split_among_programs(splits, how):
    tile = Tiles("split", 64, 16, 4, 3, splits)
    check_linear(5, 200, 1100, splits, how, torch.float32, tile)


@pytest.mark.skipif(capability(DEVICE)[0] != 9, reason="for Hopper: Gluon has no interpreter")
@pytest.mark.parametrize("splits", [0, 1, 3])
@pytest.mark.parametrize(("outputs", "tokens"), [(64, 16), (64, 64), (64, 128), (128, 128)])
def test_tiles_streamed_in_gluon(outputs, tokens, splits):
    """Fewer programs than tiles and more of them, tiles that programs share, ragged edges in every direction,
    tiles whose second group has nothing to do; the same bits twice.
    """
    tile = Tiles("gluon", outputs, tokens, 4, 0, splits, 2 if tokens <= 64 else 1)
    shapes = [(200, 320, 272), (64, 72, 128), (1, 256, 16), (1000, 2112, 1024), (3000, 4352, 528)]
    check_streamed(tile, shapes)


@pytest.mark.skipif(capability(DEVICE)[0] != 9, reason="for Hopper: Gluon has no interpreter")
def test_wide_tiles_streamed_in_gluon():
    """The same of tiles of 256 outputs, of four blocks and of more, also where the second half has nothing to
    do.
    """
    check_streamed(
        WIDE, [(200, 320, 512), (64, 72, 400), (1, 256, 16 * 26), (1000, 2112, 1024), (3000, 4352, 1536)]
    )


@pytest.mark.skipif(linears.processors(DEVICE) != 132, reason="the shape is for an H100 (SXM) or H200")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_in_two_launches(dtype):
    """Each launch writes its columns of the same result: a round of wide tiles, and eight outputs more."""
    with listening() as entered:
        check_linear(512, 64 * 132 + 8, 2048, 77, "fp8", dtype)
    assert "outputs in two launches" in entered


def check_streamed(tile: Tiles, shapes: list[tuple[int, int, int]]) -> None:
    with listening() as entered:
        for m, n, k in shapes:
            for dtype in (torch.float32, torch.bfloat16):
                check_linear(m, n, k, m, "fp8", dtype, tile)
        check_linear(700, 4352, 1024, 21, "fp8", torch.float32, tile)
    size = f"{tile.outputs} outputs" if tile.tokens > 16 else "few tokens"
    assert {way for way in entered if way.startswith("persistent")} == {f"persistent, {size}"}
    x, w = here(numbers(21, 700, 1024)), here(weights(22, 4352, 1024))
    first = _with(x, w, "fp8", tile)
    assert all(torch.equal(first, _with(x, w, "fp8", tile)) for _ in range(20))


@pytest.mark.skipif(capability(DEVICE)[0] != 9, reason="for Hopper: Gluon has no interpreter")
@pytest.mark.parametrize("splits", [0, 1, 3])
@pytest.mark.parametrize(("outputs", "tokens"), [(64, 64), (64, 128), (128, 128)])
def test_tiles_streamed_in_gluon_by_bfloat16_activations(outputs, tokens, splits):
    """The same of activations that are not quantized."""
    tile = Tiles("gluon", outputs, tokens, 4, 0, splits, 2 if tokens == 64 else 1)
    with listening() as entered:
        for m, n, k in [(200, 320, 272), (64, 72, 128), (1, 256, 16), (1000, 2112, 1024), (300, 4352, 528)]:
            check_linear(m, n, k, m, "exact", torch.bfloat16, tile)
    assert {way for way in entered if "outputs" in way} == {f"persistent bf16, {outputs} outputs"}
    x, w = here(numbers(21, 700, 1024)).to(torch.bfloat16), here(weights(22, 4352, 1024))
    first = _with(x, w, "exact", tile)
    assert all(torch.equal(first, _with(x, w, "exact", tile)) for _ in range(20))


@pytest.mark.skipif(capability(DEVICE)[0] != 9, reason="for Hopper: Gluon has no interpreter")
@pytest.mark.parametrize("m", [1, 5, 40, 96, 200])
def test_what_lies_behind_the_last_token_changes_nothing(m):
    """The copy engine reads whole tiles where the memory of the codes goes on: of NaN, here."""
    codes, scale = quantizers.act_quant(here(numbers(31, m, 1024)))
    w = here(weights(32, 512, 1024))
    alone = linears._product(codes.clone(), scale, w, torch.float32)
    behind = codes.new_full((256, 1024), 0x7F)
    behind[:m] = codes
    assert torch.equal(linears._product(behind[:m], scale, w, torch.float32), alone)


@pytest.mark.skipif(capability(DEVICE) < (9, 0), reason="launches of other chips wait for each other")
@pytest.mark.parametrize("captured", [False, True])
def test_launches_that_overlap_read_what_the_ones_before_wrote(captured):
    """Products one after the other, of few tokens and of many, whose results and parts are let go between:
    each has the bits of the same product by itself.
    """
    shapes = [(64, 2112, 7168), (64, 4096, 7168), (128, 4096, 7168), (1, 2112, 7168)]
    problems = [
        (*quantizers.act_quant(here(numbers(i, m, k))), here(weights(i + 9, n, k)))
        for i, (m, n, k) in enumerate(shapes)
    ]
    problems.append((here(numbers(5, 64, 7168)).to(torch.bfloat16), None, here(weights(6, 2112, 7168))))

    def product(i: int) -> torch.Tensor:
        return linears._product(*problems[i % len(problems)], torch.bfloat16)

    alone = []
    for i in range(len(problems)):
        torch.cuda.synchronize()
        alone.append(product(i))
        torch.cuda.synchronize()
    kept: list[torch.Tensor] = []

    def many() -> None:
        for i in range(50):
            y = product(i)  # let go, but for the last four
            if i >= 46:
                kept.append(y)

    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            many()
        graph.replay()
    else:
        many()
    torch.cuda.synchronize()
    assert all(torch.equal(y, alone[i % len(problems)]) for i, y in zip(range(46, 50), kept, strict=True))


@pytest.mark.skipif(capability(DEVICE) < (9, 0), reason="launches of other chips wait for each other")
@pytest.mark.parametrize("m", [1, 16, 60, 200])
def test_quantizers_and_linears_that_overlap_wait_for_each_other(m):
    """Layers whose operations are let in by the one before have the bits of those that begin when all has
    ended.
    """
    shapes = (4096, 2048), (2048, 2048), (2048, 2048)
    gate_up, down, square = (here(weights(i, *shape)) for i, shape in enumerate(shapes))
    start, ones = here(numbers(3, m, 2048)), torch.ones(2048, device=DEVICE)

    def layers(wait: Callable[[], None]) -> torch.Tensor:
        x = start
        for _ in range(8):
            _, *normed = quantizers.rms_norm_quant(x, ones, 1e-6, keep=False)
            wait()
            both = linears.linear(ScaledFP8(*normed), gate_up, dtype=torch.float32)
            wait()
            made = quantizers.swiglu_quant(both)
            wait()
            x = linears.linear(ScaledFP8(*made), down, dtype=torch.float32)
            wait()
            x = linears.linear(x, square)
            wait()
        return x

    true = layers(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layers(lambda: None)
    for _ in range(20):
        assert torch.equal(layers(lambda: None), true)
        graph.replay()
        assert torch.equal(captured, true)


@given(st.integers(1, 3000), st.integers(1, 200), st.integers(1, 264), st.integers(0, 8))
def test_every_block_is_dealt_out_once(count, blocks, places, splits):
    """By the arithmetic of `piece` in the kernel, and by that with which `add_up` counts who has a part."""
    dealt = deal(count, blocks, places, splits)
    assert 1 <= dealt.programs <= places and dealt.each <= blocks
    done: list[list[int]] = [[] for _ in range(dealt.rest)]
    slots = set()
    for program in range(dealt.programs):
        first = program * dealt.each
        last = min(first + dealt.each, dealt.rest * blocks)
        for tile in range(first // blocks, -(-last // blocks) if last > first else first // blocks):
            start, stop = max(first - tile * blocks, 0), min(last - tile * blocks, blocks)
            done[tile] += range(start, stop)
            slot = (program, start == 0)
            assert stop - start == blocks or slot not in slots, "two parts in one place"
            slots.add(slot)
            assert tile * blocks // dealt.each <= program <= ((tile + 1) * blocks - 1) // dealt.each
    assert all(found == list(range(blocks)) for found in done) and dealt.rounds * places + dealt.rest == count


@pytest.mark.parametrize("how", ["fp8", "exact"])
def test_the_same_bits_every_time(how):
    """Split columns are added up in one order whatever order they arrive in, and a token's result does not
    depend on the others beside it.
    """
    x, w = here(numbers(5, 12, 1024)), here(weights(6, 192, 1024))
    tile = Tiles("split", 64, 16, 4, 3, 8)
    first = _with(x, w, how, tile)
    assert all(torch.equal(first, _with(x, w, how, tile)) for _ in range(3 if INTERPRETED.value else 100))
    assert torch.equal(first[3:4], _with(x[3:4], w, how, tile))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["fp8", "exact"])
def test_nan_and_infinity_reach_their_rows_and_no_others(how, dtype):
    x, w = numbers(7, 6, 300) + np.float32(1), weights(8, 140, 300)
    x[1, 7], x[4, 290] = np.nan, np.inf
    w.codes[130, 3] = 0x7F
    y = back(linears.linear(here(x).to(dtype), here(w), how))
    finite = np.isfinite(y)
    assert not finite[1].any() and not finite[4].any() and not finite[:, 130].any()
    rest = np.ones_like(finite)
    rest[[1, 4]], rest[:, 130] = False, False
    assert finite[rest].all()


def test_one_column_at_a_time():
    """With one activation that is not zero the product is that column, exactly: no layout or offset can be
    wrong.
    """
    w = weights(9, 130, 140)
    columns = [0, 1, 31, 127, 128, 139]
    x = np.zeros((len(columns), 140), np.float32)
    x[np.arange(len(columns)), columns] = 2.0
    y = back(linears.linear(here(x), here(w), "exact"))
    np.testing.assert_array_equal(y, 2 * fp8.weight_dequant(w)[:, columns].T)


def test_float32_activations_lose_nothing():
    """A float32 with a full significand times a power of two comes out as it went in."""
    x = np.float32([[1 + 2.0**-23, np.pi, -1e-20, 1e30, 3.0000002e-5]]).T.copy()
    w = ScaledFP8(np.full((1, 1), 0x38, np.uint8), np.full((1, 1), 0.5, np.float32))  # 1.0 * 0.5
    np.testing.assert_array_equal(back(linears.linear(here(x), here(w), "exact")), x / 2)


def test_quantized_activations():
    x, w = here(numbers(10, 4, 384)), here(weights(11, 326, 384))
    ready = ScaledFP8(*quantizers.act_quant(x))
    assert torch.equal(linears.linear(ready, w, dtype=torch.float32), linears.linear(x, w))
    assert linears.linear(ready, w).dtype == torch.bfloat16


def test_leading_dimensions_and_wrong_arguments():
    x, w = here(numbers(13, 2, 3, 200)), here(weights(14, 30, 200))
    y = linears.linear(x, w)
    assert y.shape == (2, 3, 30) and torch.equal(y.view(6, 30), linears.linear(x.view(6, 200), w))
    assert linears.linear(x[:0], w).shape == (0, 3, 30)
    with pytest.raises(ValueError, match="fp8"):
        linears.linear(x, w, "fp4")
    with pytest.raises(ValueError, match="100 columns"):
        linears.linear(x[..., :100], w)


def test_the_plain_design_is_right_too():
    """The yardstick of the benchmark."""
    x, w = numbers(19, 5, 256), weights(20, 200, 256)
    true, bound = truth(x, w, "fp8")
    for tokens, outputs in ((16, 32), (64, 128)):
        assert (np.abs(back(plain.linear(here(x), here(w), tokens, outputs)) - true) <= bound + 1e-37).all()


@interpreted
def test_the_benchmark(monkeypatch, capsys):
    """All of it but the clock and cuBLAS, at small shapes: rows, the table, what failed and why."""
    monkeypatch.setattr(bench_fp8, "gpu", lambda: torch)
    monkeypatch.setattr(bench_fp8, "DEVICE", "cpu")
    monkeypatch.setattr(bench_fp8, "CACHE", 1)
    monkeypatch.setattr(bench_fp8, "QUANTIZED", (1,))
    monkeypatch.setattr(bench_fp8, "LAYER", {"a": (192, 256), "b": (128, 128)})
    monkeypatch.setattr(bench_fp8, "DENSE", {"c": (64, 256)})
    monkeypatch.setattr(bench_fp8, "measure_limits", lambda: bench_fp8.Limits(3e12, 1e15, 5e14))
    monkeypatch.setattr(
        bench_fp8, "replay", lambda calls: [call() for call in calls] and bench_fp8.Result(2e-6, 0.1)
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no GPU")
    monkeypatch.setattr(bench_fp8, "scaled_mm", lambda x, w: linears.linear(x, w) * 1.1)
    rows = list(bench_fp8.fp8(Settings("v3", [1, 5], 1, False, False, 0.0)))
    table = capsys.readouterr().err
    assert {r.backend for r in rows} == {"ours a16", "ours a8", "ours q+a8", "plain", "plain blind", "bf16"}
    assert len(rows) == 6 * 3 * 2 and all(
        r.peer in ("plain", "bf16") and r.speedup_vs_peer == 1.0 for r in rows if r.backend in bench_fp8.OURS
    )
    assert (
        "not measured: scaled_mm (c, M=1): wrong: 0." in table
        and table.count("MoE layer") == 2
        and "M=5 ours a8: 1% of the floor" in table
    )
    for what in ("act_quant 7168", "rms_norm_quant 7168", "swiglu_quant 2048"):
        assert what in table
    list(bench_fp8.fp8(Settings("v3", [1], 1, True, False, 0.0)))
    assert "deep_gemm is not installed" in capsys.readouterr().err
    theirs = ModuleType("deep_gemm")
    theirs.__spec__ = ModuleSpec("deep_gemm", None)
    theirs.get_mn_major_tma_aligned_tensor = lambda scale: scale.T.contiguous().T
    theirs.fp8_gemm_nt = lambda a, b, y: y.copy_(
        linears.linear(*(ScaledFP8(codes.view(torch.uint8), scale) for codes, scale in (a, b)))
    )
    monkeypatch.setitem(sys.modules, "deep_gemm", theirs)
    math = SimpleNamespace(per_token_cast_to_fp8=lambda x, use_ue8m0: quantizers.act_quant(x, use_ue8m0))
    monkeypatch.setitem(sys.modules, "deep_gemm.utils.math", math)
    rows = list(bench_fp8.fp8(Settings("v3", [1], 1, True, False, 0.0)))
    assert {r.backend for r in rows} == {
        "ours a16",
        "ours a8",
        "ours q+a8",
        "bf16",
        "deep_gemm",
        "q+deep_gemm",
    }
    assert "x deep_gemm" in capsys.readouterr().err


# --- the table of tiles -------------------------------------------------------------------------------------


@given(
    st.integers(1, 9000),
    st.integers(1, 40000),
    st.integers(1, 20000),
    st.sampled_from([(8, 0), (8, 9), (9, 0), (12, 0)]),
)
def test_tiles_cover_the_product(m, n, k, chip):
    for kind in ("fp8", "bf16", "f32"):
        tile = tiles(m, n, k, chip, 132, kind)
        blocks = -(-k // 128)
        assert (
            tile == WIDE or (tile.outputs in (64, 128) if tile.kernel == "gluon" else 128 % tile.outputs == 0)
        ) and tile.splits <= max(blocks, 4)
        assert tile != WIDE or blocks % 4 == 0
        if tile.kernel != "split":
            assert min(stages(tile, itemsize, kind) for itemsize in (2, 4)) >= 2
        else:
            assert (tile.splits - 1) * -(-blocks // tile.splits) < blocks, "a program with nothing to do"
        assert -(-n // tile.outputs) * -(-m // tile.tokens) < linears.COUNTERS
        parts = launches(m, n, k, chip, 132, kind)
        assert sum(outputs for outputs, _ in parts) == n
        assert parts == ((n, tile),) or (chip == (9, 0) and parts[0][1] == WIDE and parts[0][0] % 256 == 0)


@pytest.mark.parametrize(("m", "sizes"), [(16, set()), (64, {(64, 64)}), (128, set(PRICES["bf16"].blocks))])
def test_the_sweep_times_the_persistent_tiles_of_sixteen_bits(monkeypatch, m, sizes):
    """All that the table may choose, so that its prices can be fitted again."""
    hopper = SimpleNamespace(cuda=SimpleNamespace(get_device_capability=lambda: (9, 0)))
    monkeypatch.setattr(fp8_sweep, "gpu", lambda: hopper)
    monkeypatch.setattr(linears, "capability", lambda device: (9, 0))
    found = list(fp8_sweep.candidates(7168, 2048, m, "bf16", torch.device("cpu")))
    assert {(t.tokens, t.outputs) for t in found if t.kernel == "gluon"} == sizes
    assert found[0] in found[1:], "the tile that the table picks is one of them"


@pytest.mark.parametrize(
    ("m", "n", "k", "parts"),
    [
        (4096, 2112, 7168, [(2048, 256), (64, 64)]),  # q_a+kv_a: 288 tiles would take three rounds of 132
        (256, 36864, 7168, [(36864, 128)]),
        (512, 36864, 7168, [(33792, 256), (3072, 128)]),
        (4096, 7168, 16384, [(7168, 256)]),
    ],
)
def test_outputs_of_whole_rounds_are_a_launch_of_their_own(m, n, k, parts):
    found = launches(m, n, k, (9, 0), 132, "fp8")
    assert [(outputs, tile.outputs) for outputs, tile in found] == parts


H200_GBPS = 4917.0


@pytest.mark.parametrize(
    ("m", "n", "k", "h100", "h200"),
    [
        (1, 4096, 7168, (64, 16, 0), (64, 16, 0)),  # gate+up
        (16, 7168, 2048, (64, 16, 1), (64, 16, 1)),  # down
        (64, 4096, 7168, (64, 64, 1), (64, 64, 0)),
        (128, 4096, 7168, (64, 128, 2), (64, 128, 2)),
        (128, 32768, 512, (64, 128, 1), (128, 128, 1)),  # kv_b
        (64, 2112, 7168, (64, 64, 0), (64, 64, 0)),
        (4096, 7168, 16384, (256, 128, 1), (256, 128, 1)),
    ],
)
def test_tiles_are_shared_where_memory_is_faster(m, n, k, h100, h200):
    """Where reading the weights takes less time, adding up parts may pay: measured on an H200."""
    for gbps, expected in (({}, h100), ({"memory_gbps": H200_GBPS}, h200)):
        tile = tiles(m, n, k, (9, 0), 132, "fp8", **gbps)
        assert (tile.outputs, tile.tokens, tile.splits) == expected


@pytest.mark.parametrize("gbps", [H100_GBPS, H200_GBPS])
def test_the_shapes_of_the_suite_take_every_way_of_dealing_out_tiles(gbps):
    """On H100s (SXM) and H200s: programs that end a shared tile and begin the next, of each number of tokens;
    several whole tiles of each width; several bands.
    """
    found = set()
    for m, n, k in PERSISTENT:
        for outputs, tile in launches(m, n, k, (9, 0), 132, "fp8", gbps):
            blocks = -(-k // 128)
            high, wide = -(-m // tile.tokens), -(-outputs // tile.outputs)
            dealt = deal(high * wide, blocks, 132 * tile.beside, tile.splits)
            size = tile.tokens, tile.outputs
            if dealt.shared and any(
                p * dealt.each % blocks > blocks - dealt.each for p in range(dealt.programs)
            ):
                found.add(("spans", tile.tokens))
            if dealt.rounds + (dealt.rest > 0) > 1:
                found.add(("several", size))
            if high > band(k):
                found.add(("bands",))
    assert found >= {("spans", 16), ("spans", 64), ("spans", 128), ("bands",)}
    assert found >= {("several", (16, 64)), ("several", (128, 128)), ("several", (128, 256))}


@pytest.mark.parametrize(("said", "taken"), [(H200_GBPS, H200_GBPS), (0.0, H100_GBPS)])
def test_the_table_knows_the_memory_of_the_gpu(monkeypatch, said, taken):
    """By what the driver says of it; an H100's where the driver says nothing."""
    monkeypatch.setattr(linears, "INTERPRETED", SimpleNamespace(value=False))
    monkeypatch.setattr(linears, "get_dram_gbps", {3: said}.get)
    found = linears.memory_gbps.__wrapped__(torch.device("cuda", 3))
    assert found == taken


@pytest.mark.skipif(INTERPRETED.value, reason="CUDA graphs need a GPU")
def test_in_a_cuda_graph():
    x, w = here(numbers(15, 4, 7168)).to(torch.bfloat16), here(weights(16, 576, 7168))
    true = linears.linear(x, w)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linears.linear(x, w)
    for _ in range(3):
        y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, true)
