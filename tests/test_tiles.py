"""Many tokens by tiles (AMX), where a loop stands in place of a tile's product on CPUs without them: the bits
are those of lanes.
"""

import numpy as np
import pytest

from refimpl import formats
from refimpl.conformance.inputs.draws import activations, packed
from refimpl.formats import q4_k, q6_k
from refimpl.reference import interleaved

numba = pytest.importorskip("numba", reason="the cpu backend's kernels are compiled by Numba")
from refimpl.kernels import (  # noqa: E402
    experts_numba,
    linear_numba,
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
    kind = ir.FunctionType(ir.VoidType(), [simd_llvm.I64] * 5)
    f = ir.Function(module, kind, "kernel")
    b = ir.IRBuilder(f.append_basic_block())
    tile_llvm._write(b, "ldtilecfg ($0)", f.args[0])
    tile_llvm._write(b, tile_llvm._assembly(), *f.args)
    tile_llvm._write(b, "tilerelease")
    b.ret_void()
    machine = llvm.Target.from_triple(module.triple).create_target_machine(cpu="sapphirerapids")
    code = machine.emit_object(llvm.parse_assembly(str(module)))
    assert code.count(b"\x5e") >= 8 and b"\xc4\xe2\x78\x49" in code  # tdpbssd; ldtilecfg, tilerelease
