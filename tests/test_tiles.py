"""Many tokens by tiles (AMX), where a loop stands in place of a tile's product on CPUs without them: the bits
are those of lanes.
"""

from collections import defaultdict

import numpy as np
import pytest

from refimpl import formats
from refimpl.conformance.inputs.draws import activations, packed
from refimpl.formats import e4m3, q4_k, q6_k
from refimpl.reference import fp8, interleaved
from refimpl.tensors import ScaledFP8

numba = pytest.importorskip("numba", reason="the cpu backend's kernels are compiled by Numba")
from refimpl.kernels import (  # noqa: E402
    experts_numba,
    linear_numba,
    pair_llvm,
    pair_tile_llvm,
    panel_llvm,
    simd_llvm,
    tile_llvm,
    tiles_numba,
)


@pytest.fixture
def with_tiles(monkeypatch):
    """A function: the same call by lanes, and by tiles or loops in their place."""

    def clear():
        for known in (linear_numba.job_layout, linear_numba.strip):
            known.cache_clear()

    def both(call):
        results = []
        for tiles in (False, True):
            monkeypatch.setattr(linear_numba, "TILES", tiles)
            clear()
            results.append(call())
        return results

    yield both
    monkeypatch.undo()
    clear()


@pytest.mark.parametrize("tokens", [8, 17, 33, 131])
@pytest.mark.parametrize("kind", panel_llvm.PANELS)
def test_tiles_are_bit_for_bit_what_lanes_are(kind, tokens, with_tiles):
    rng = np.random.default_rng(kind)
    w = packed(rng, formats.get(kind), 2 * tiles_numba.HEIGHT + 5, 512)
    x = activations(rng, "outliers", tokens, 512)
    lanes, tiles = with_tiles(lambda: linear_numba.linear(x, w))
    np.testing.assert_array_equal(lanes.view(np.uint32), tiles.view(np.uint32))


@pytest.mark.parametrize("module", interleaved.FORMATS)
@pytest.mark.parametrize("tokens", [8, 33])
def test_tiles_of_interleaved_rows(tokens, module, with_tiles):
    if panel_llvm.ROWS != interleaved.ROWS:
        pytest.skip("tiles are of CPUs whose panels have sixteen rows")
    rng = np.random.default_rng(8)
    columns = 256 * 9  # two parts
    w = packed(rng, module, 2 * tiles_numba.HEIGHT + interleaved.ROWS, columns)
    x, beside = activations(rng, "outliers", tokens, columns), interleaved.interleave(w)
    lanes, tiles = with_tiles(lambda: linear_numba.linear(x, beside))
    np.testing.assert_array_equal(lanes.view(np.uint32), tiles.view(np.uint32))


@pytest.mark.parametrize("up", [q4_k, q6_k], ids=["as gate", "other than gate"])
def test_experts_with_few_and_many_tokens_by_tiles(up, with_tiles):
    rng = np.random.default_rng(5)
    gate, down = packed(rng, q4_k, 6, 256, 512), packed(rng, q6_k, 6, 512, 256)
    ups = packed(rng, up, 6, 256, 512)
    x = activations(rng, "normal", 40, 512)
    ids = np.stack([rng.permutation([0, 1, 2, 3, 3 + t % 3 // 2])[:2] for t in range(40)])
    weights = rng.random((40, 2)).astype(np.float32)
    lanes, tiles = with_tiles(lambda: experts_numba.experts(x, ids, weights, gate, ups, down))
    np.testing.assert_array_equal(lanes.view(np.uint32), tiles.view(np.uint32))


pairs = pytest.mark.skipif(not pair_llvm.PAIRS, reason="this CPU has no products of bfloat16")


def whole_numbers(rng, *shape):
    """E4M3 weights [..., N, K] that are whole numbers times powers of two, whatever is added up first."""
    codes = e4m3.encode(rng.integers(-8, 9, shape).astype(np.float32))
    tiles = (*shape[:-2], *(-(-n // 128) for n in shape[-2:]))
    return ScaledFP8(codes, (2.0 ** rng.integers(-3, 4, tiles)).astype(np.float32))


@pairs
@pytest.mark.parametrize("tokens", [8, 16, 23, 40, 1030])
@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (130, 160), (200, 384), (40, 256)])
def test_pairs_in_tiles_are_bit_for_bit_what_pairs_are(rows, columns, tokens, with_tiles):
    """Where no sum is rounded: 40 rows are less than a panel, and 160 columns more than a block."""
    rng = np.random.default_rng(rows + tokens)
    w, x = whole_numbers(rng, rows, columns), rng.integers(-8, 9, (tokens, columns)).astype(np.float32)
    one, tiles = with_tiles(lambda: linear_numba.linear(x, w, "ue8m0"))
    np.testing.assert_array_equal(one.view(np.uint32), tiles.view(np.uint32))
    np.testing.assert_array_equal(tiles, fp8.linear(x, w, "ue8m0"))


@pairs
@pytest.mark.parametrize("scale", [np.nan, np.inf, 0.0])
def test_pairs_in_tiles_of_numbers_that_are_none(scale, with_tiles):
    rng = np.random.default_rng(4)
    w, x = whole_numbers(rng, 128, 256), rng.integers(-8, 9, (32, 256)).astype(np.float32)
    w.scale[0, 1], w.codes[5, 3], x[17, 130] = scale, 0x7F, np.inf
    with np.errstate(invalid="ignore"):
        one, tiles = with_tiles(lambda: linear_numba.linear(x, w, "ue8m0"))
    np.testing.assert_array_equal(one, tiles)


@pairs
def test_experts_of_pairs_in_tiles_take_tokens_from_anywhere(with_tiles):
    rng = np.random.default_rng(6)
    gate, up = (whole_numbers(rng, 3, 128, 128) for _ in range(2))
    down = whole_numbers(rng, 3, 128, 128)
    stacks = [[ScaledFP8(c, s) for c, s in zip(w.codes, w.scale)] for w in (gate, up, down)]
    x = rng.integers(-2, 3, (60, 128)).astype(np.float32)
    ids = np.stack([rng.permutation(3)[:2] for _ in range(60)])
    shares = rng.random((60, 2)).astype(np.float32)
    one, tiles = with_tiles(lambda: experts_numba.experts(x, ids, shares, *stacks, "ue8m0"))
    np.testing.assert_allclose(one, tiles, rtol=1e-5, atol=1e-5 * np.abs(one).max())


class Features:
    """A CPU that has all features that `has` does not deny."""

    def __init__(self, has):
        self.get = lambda name: has[name]


def test_tiles_of_bfloat16_are_asked_for(monkeypatch):
    """A CPU that has tiles of bytes alone, or of bfloat16 alone, is not given the level."""
    import llvmlite.binding as llvm

    monkeypatch.setattr(simd_llvm, "_tiles_allowed", lambda: True)
    for lacking in ("", "amx-tile", "amx-int8", "amx-bf16"):
        features = defaultdict(lambda: True, {lacking: False})
        monkeypatch.setattr(llvm, "get_host_cpu_features", lambda has=features: Features(has))
        assert ("amx" in simd_llvm.available()) == (not lacking)


def both_ways_of_pairs():
    """Sixteen tokens and half a panel of numbers that E4M3 has, and a function that multiplies them."""
    rng = np.random.default_rng(7)
    draw = lambda *shape: e4m3.TABLE[rng.integers(0, 0x7E, shape)] * rng.choice([-1, 1], shape)  # noqa: E731
    acts, panel = draw(16, 128).astype(np.float32), draw(64, 64, 2).astype(np.float32)
    stored = [(a.view(np.uint32) >> 16).astype(np.uint16) for a in (acts, panel)]
    true = np.einsum("tpk,prk->tr", acts.reshape(16, 64, 2).astype(float), panel[:, :32].astype(float))
    size = np.einsum("tpk,prk->tr", np.abs(acts.reshape(16, 64, 2)), np.abs(panel[:, :32]))
    return stored, true, size


def test_loops_in_place_of_tiles_multiply_pairs():
    (acts, panel), true, size = both_ways_of_pairs()
    found = np.zeros((16, 32), np.float32)
    pair_tile_llvm.multiply_pair_tiles_slowly(4, acts.ctypes.data, panel.ctypes.data, found.ctypes.data)
    assert (np.abs(found - true) <= 1e-5 * size).all()


@pytest.mark.skipif("amx" not in simd_llvm.available(), reason="this CPU has no tiles")
def test_a_product_of_tiles_of_pairs_is_what_loops_make_of_it():
    (acts, panel), _, _ = both_ways_of_pairs()
    found, true = np.zeros((16, 32), np.float32), np.zeros((16, 32), np.float32)
    shapes = np.zeros(8, np.int64)

    @numba.njit
    def fast(shapes, acts, panel, out):
        tile_llvm.shapes_of_tiles(shapes)
        tile_llvm.begin_tiles(shapes)
        pair_tile_llvm.multiply_pair_tiles(4, acts, panel, out)
        tile_llvm.end_tiles()

    fast(shapes.ctypes.data, acts.ctypes.data, panel.ctypes.data, found.ctypes.data)
    pair_tile_llvm.multiply_pair_tiles_slowly(4, acts.ctypes.data, panel.ctypes.data, true.ctypes.data)
    np.testing.assert_array_equal(found.view(np.uint32), true.view(np.uint32))


@pytest.mark.skipif("amx" not in simd_llvm.available(), reason="this CPU has no tiles")
def test_a_product_of_tiles_is_what_loops_make_of_it():
    rng = np.random.default_rng(1)
    acts, planes = (
        rng.integers(-128, 128, (16, 320), np.int8),
        rng.integers(-128, 128, (2, 64, 16, 4), np.int8),
    )
    found, true = np.zeros((2, 16, 16), np.int32), np.zeros((2, 16, 16), np.int32)
    shapes = np.zeros(8, np.int64)

    @numba.njit
    def fast(shapes, acts, planes, out):
        tile_llvm.shapes_of_tiles(shapes)
        tile_llvm.begin_tiles(shapes)
        tile_llvm.multiply_tiles(acts, planes, out)
        tile_llvm.end_tiles()

    fast(shapes.ctypes.data, acts.ctypes.data, planes.ctypes.data, found.ctypes.data)
    tile_llvm.multiply_tiles_slowly(acts.ctypes.data, planes.ctypes.data, true.ctypes.data)
    np.testing.assert_array_equal(found, true)


def test_loops_in_place_of_tiles_are_a_product():
    rng = np.random.default_rng(2)
    rows = panel_llvm.ROWS
    acts, planes = (
        rng.integers(-128, 128, (16, 320), np.int8),
        rng.integers(-128, 128, (2, 64, rows, 4), np.int8),
    )
    found = np.zeros((2, 16, rows), np.int32)
    tile_llvm.multiply_tiles_slowly(acts.ctypes.data, planes.ctypes.data, found.ctypes.data)
    np.testing.assert_array_equal(
        found,
        np.einsum("tkc,pkrc->ptr", acts[:, :256].reshape(16, 64, 4).astype(int), planes.astype(int)),
    )


def test_the_assembly_is_one_that_llvm_can_read():
    """For a CPU with tiles, which need not be here."""
    import llvmlite.binding as llvm
    from llvmlite import ir

    if not llvm.get_process_triple().startswith("x86_64"):
        pytest.skip("assembly is read for the machine that this is")
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    llvm.initialize_native_asmparser()
    module = ir.Module()
    module.triple = "x86_64-unknown-linux-gnu"
    kind = ir.FunctionType(ir.VoidType(), [simd_llvm.I64] * 6)
    f = ir.Function(module, kind, "kernel")
    b = ir.IRBuilder(f.append_basic_block())
    tile_llvm.write(b, "ldtilecfg ($0)", f.args[0])
    tile_llvm.write(b, tile_llvm._assembly(), *f.args[:5])
    for vectors in (1, 2, 4):
        tile_llvm.write(b, pair_tile_llvm.assembly(vectors), *f.args)
    tile_llvm.write(b, "tilerelease")
    b.ret_void()
    machine = llvm.Target.from_triple(module.triple).create_target_machine(cpu="sapphirerapids")
    code = machine.emit_object(llvm.parse_assembly(str(module)))
    assert code.count(b"\x5e") >= 8 and b"\xc4\xe2\x78\x49" in code  # tdpbssd; ldtilecfg, tilerelease
    assert code.count(b"\x5c") >= 8  # tdpbf16ps
