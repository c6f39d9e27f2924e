"""The kernels written in LLVM's instructions (`kernels/*_llvm.py`) against the ten lines of Numba that each
shows in its docstring: the lines are taken from there, compiled and run.
"""

import ast
import re
import textwrap

import numpy as np
import pytest

numba = pytest.importorskip("numba", reason="what the kernels are written for")
from numba import types  # noqa: E402
from numba.extending import intrinsic  # noqa: E402

from refimpl.conformance.inputs.draws import bf16_bits  # noqa: E402
from refimpl.formats import bf16, e4m3, f16, int4, q4_k, q8_k  # noqa: E402
from refimpl.formats._blocks import pack_scales  # noqa: E402
from refimpl.kernels import (  # noqa: E402
    activations_numba,
    block_llvm,
    dot_llvm,
    floats_llvm,
    int4_llvm,
    latent_llvm,
    pair_llvm,
    panel_llvm,
    simd_llvm,
    unpack_llvm,
    wide_llvm,
)
from refimpl.reference import fp8  # noqa: E402


def shown(module, name: str):
    """The function of that name in a module's docstring, compiled."""
    found = re.search(rf"^    def {name}\(.*\n(?:(?:        .*)?\n)*", module.__doc__, re.M)
    source = textwrap.dedent(found[0])
    assert len(ast.parse(source).body[0].body) and len(source.strip().splitlines()) <= 12
    names = {"np": np}
    exec(source, names)
    return numba.njit(names[name])


def written(level: str, name: str):
    """`Emitter.dot_fours` or `Emitter.scaled_dot` at a level, on i32 [8], u8 [32], i8 [32] and i16 [16]."""

    @intrinsic
    def call(typingctx, total, u, s, scales):
        def codegen(context, b, signature, args):
            e = simd_llvm.Emitter(b, level)
            at, *operands = args
            x = [e.load(operands[0], simd_llvm.I8, 32), e.load(operands[1], simd_llvm.I8, 32)]
            if name == "scaled_dot":
                x.append(e.spread(e.load(operands[2], simd_llvm.I16, 16), 3))
            e.store(getattr(e, name)(e.load(at, simd_llvm.I32, 8), *x), at)
            return context.get_dummy_value()

        return types.none(*[types.int64] * 4), codegen

    @numba.njit
    def run(total, u, s, scales):
        call(total.ctypes.data, u.ctypes.data, s.ctypes.data, scales.ctypes.data)

    return run


@pytest.mark.parametrize("level", simd_llvm.LEVELS)
@pytest.mark.parametrize("name", ["dot_fours", "scaled_dot"])
def test_products_of_bytes_are_the_ten_lines(level, name):
    """At the ends of what the instructions take too: 63 * 127, and -128."""
    if level not in simd_llvm.available():
        pytest.skip(f"this CPU has no {level}")
    fast, plain, rng = written(level, name), shown(simd_llvm, name), np.random.default_rng(11)
    for case in range(40):
        u = np.where(case < 2, 63, rng.integers(0, 64, 32)).astype(np.uint8)
        s = np.where(case < 2, (127, -128)[case % 2], rng.integers(-128, 128, 32)).astype(np.int8)
        scales = rng.integers(-128, 128, 16).astype(np.int16)
        ours = rng.integers(-(2**20), 2**20, 8).astype(np.int32)
        true = ours.copy()
        fast(ours, u, s, scales)
        plain(true, u, s, *([] if name == "dot_fours" else [scales[3], scales[11]]))
        np.testing.assert_array_equal(ours, true)


def whole_numbers(rows: int, blocks: int) -> tuple:
    """Q4_K blocks u8 [rows, bytes] and activations f32 [2, K] of small whole numbers, of which every sum is
    exact in float32, so that its order does not matter.
    """
    rng = np.random.default_rng(12)
    b = np.zeros((rows, blocks), q4_k.BLOCK)
    b["d"] = 2.0 ** rng.integers(-2, 3, b.shape)
    b["dmin"] = 2.0 ** rng.integers(-2, 3, b.shape)
    b["scales"] = pack_scales(*rng.integers(0, 4, (2, *b.shape, 8), np.uint8))
    b["qs"] = rng.integers(0, 256, (*b.shape, 128))
    x = rng.integers(-3, 4, (2, 256 * blocks)).astype(np.float32)
    x[:, ::256] = 127  # the scale becomes one
    return b.view(np.uint8).reshape(rows, -1), x


def unpacked(w: np.ndarray, x: np.ndarray) -> tuple:
    """d, dmin f32 [rows, B], sc, m, q i32 [rows, B, 8 (, 32)]; d_a f32 [2, B], a i32 [2, B, 8, 32]."""
    d, dmin, *integers = q4_k.unpack(w)
    d_a, a, _ = q8_k.unpack(q8_k.quantize(x))
    np.testing.assert_array_equal(np.abs(d_a), 1)
    return (
        d,
        dmin,
        *(i.astype(np.int32) for i in integers),
        d_a,
        a.astype(np.int32).reshape(*d_a.shape, 8, 32),
    )


def test_a_row_of_q4_k_is_the_ten_lines():
    w, x = whole_numbers(3, 5)
    d, dmin, sc, m, q, d_a, a = unpacked(w, x)
    plain = shown(dot_llvm, "q4_k_dot")
    true = [[plain(d[r], dmin[r], sc[r], m[r], q[r], d_a[t], a[t]) for t in range(2)] for r in range(3)]
    acts = activations_numba.prepare("test", x, "q8_k")

    @numba.njit
    def fast(row, columns, tokens):
        first, second = tokens[0].ctypes.data, tokens[1].ctypes.data
        return dot_llvm.dot(12, row.ctypes.data, 0, columns, (first, second), 0)

    assert q4_k.GGML_TYPE == 12
    ours = [fast(row, x.shape[1], acts.view(np.uint8)) for row in w]
    np.testing.assert_array_equal(ours, np.float32(true))
    assert len(np.unique(ours)) == 6


def test_a_panel_of_q4_k_is_the_ten_lines():
    w, x = whole_numbers(panel_llvm.ROWS, 5)
    *rows, d_a, a = unpacked(w, x)
    last = [np.ascontiguousarray(np.moveaxis(part, 0, -1)) for part in rows]
    plain = shown(panel_llvm, "q4_k_panel")
    true = [plain(*last, d_a[t], a[t]) for t in range(2)]
    scratch = np.zeros(panel_llvm.scratch_bytes(12, x.shape[1]), np.uint8)
    acts = activations_numba.prepare("test", x, "q8_k").view(np.uint8)
    ours = np.zeros((2, panel_llvm.ROWS), np.float32)

    @numba.njit
    def fast(w, columns, scratch, tokens, out):
        at, to = scratch.ctypes.data, (out[0].ctypes.data, out[1].ctypes.data)
        panel_llvm.pack_panel(12, w.ctypes.data, w.shape[1], columns, at)
        panel_llvm.multiply(12, at, columns, at, 0, (tokens[0].ctypes.data, tokens[1].ctypes.data), to)

    fast(w, x.shape[1], scratch, acts, ours)
    np.testing.assert_array_equal(ours, true)
    assert len(np.unique(ours)) > panel_llvm.ROWS


def test_a_block_of_q4_k_unpacks_as_the_ten_lines():
    w = whole_numbers(1, 5)[0].reshape(5, -1)
    true = np.zeros((5, 8, 32), np.uint8)
    shown(unpack_llvm, "q4_k_unpack")(w, true)

    @intrinsic
    def unpack(typingctx, block, out):
        def codegen(context, b, signature, args):
            e = simd_llvm.Emitter(b, simd_llvm.LEVEL)
            for i, q in enumerate(unpack_llvm.weights(e, q4_k, args[0])):
                e.store(q, e.at(args[1], 32 * i))
            return context.get_dummy_value()

        return types.none(types.int64, types.int64), codegen

    @numba.njit
    def fast(block, out):
        unpack(block.ctypes.data, out.ctypes.data)

    ours = np.zeros_like(true)
    for block, out in zip(w, ours):
        fast(block, out)
    np.testing.assert_array_equal(ours, true)
    np.testing.assert_array_equal(ours, q4_k.unpack(w)[-1].reshape(5, 8, 32))


def test_a_row_of_e4m3_is_the_ten_lines():
    """On small whole numbers and scales that are powers of two: exact in any order."""
    rng = np.random.default_rng(13)
    codes = e4m3.encode(rng.integers(-8, 9, (3, 5 * 128)).astype(np.float32))
    scales = 2.0 ** rng.integers(-2, 3, (3, 5)).astype(np.float32)
    x = rng.integers(-3, 4, (2, 5 * 128)).astype(np.float32)
    value = e4m3.decode(np.arange(256, dtype=np.uint8))
    plain = shown(floats_llvm, "e4m3_dot")

    @numba.njit
    def fast(row, scale, tokens):
        addresses = tokens[0].ctypes.data, tokens[1].ctypes.data
        return dot_llvm.dot(256, row.ctypes.data, scale.ctypes.data, len(row), addresses, 0)

    assert floats_llvm.E4M3 == 256
    ours = [fast(row, scale, x) for row, scale in zip(codes, scales)]
    true = [[plain(row, scale, a, value) for a in x] for row, scale in zip(codes, scales)]
    np.testing.assert_array_equal(np.float32(ours), np.float32(true))
    assert len(np.unique(ours)) == 6


def test_int4_is_the_ten_lines():
    """On small whole numbers and scales that are powers of two: exact in any order."""
    rng = np.random.default_rng(15)
    q = rng.integers(-8, 8, (3, 160))
    scales = 2.0 ** rng.integers(-2, 3, (3, 5)).astype(np.float32)
    x = rng.integers(-3, 4, (2, 160)).astype(np.float32)
    plain = shown(int4_llvm, "int4_dot")

    @numba.njit
    def fast(row, scale, tokens):
        addresses = tokens[0].ctypes.data, tokens[1].ctypes.data
        return dot_llvm.dot(257, row.ctypes.data, scale.ctypes.data, 2 * len(row), addresses, 0)

    assert int4_llvm.INT4 == 257
    ours = [fast(row, scale, x) for row, scale in zip(int4.encode(q), bf16_bits(scales))]
    true = [[plain(row, scale, a) for a in x] for row, scale in zip(q, scales)]
    np.testing.assert_array_equal(np.float32(ours), np.float32(true))
    assert len(np.unique(ours)) == 6


def test_a_block_of_floats_is_the_ten_lines():
    rows, x = np.random.default_rng(14).integers(-9, 10, (2, 4, 96)).astype(np.float32)
    ours = np.zeros((4, 4), np.float32)

    @numba.njit
    def fast(w, a, out):
        tokens = a[0].ctypes.data, a[1].ctypes.data, a[2].ctypes.data, a[3].ctypes.data
        block_llvm.multiply_block(w.ctypes.data, 4 * w.shape[1], w.shape[1], tokens, out.ctypes.data)

    fast(rows, x, ours)
    np.testing.assert_array_equal(ours, shown(block_llvm, "block")(rows, x))
    np.testing.assert_array_equal(ours, x @ rows.T)


def test_a_register_of_rows_is_multiplied_by_one_token():
    """On any numbers: the bits of four rows times four tokens, as sums are taken in the same order."""
    rng, n = np.random.default_rng(15), latent_llvm.LANES
    rows, x = rng.standard_normal((n, 96), np.float32), rng.standard_normal((1, 96), np.float32)
    ours, four = np.zeros(n, np.float32), np.zeros((n // 4, 4, 4), np.float32)

    @numba.njit
    def fast(w, a, out, four):
        at, y, token = w.ctypes.data, four.ctypes.data, a.ctypes.data
        block_llvm.multiply_block(at, 384, 96, (token,), out.ctypes.data)
        for i in range(len(four)):
            block_llvm.multiply_block(at + 4 * i * 384, 384, 96, (token, token, token, token), y + 64 * i)

    fast(rows, x, ours, four)
    np.testing.assert_array_equal(ours, four[:, 2].reshape(-1))
    np.testing.assert_allclose(ours, rows @ x[0], rtol=1e-4, atol=1e-5)


needs_pairs = pytest.mark.skipif(not pair_llvm.PAIRS, reason="this CPU has no products of bfloat16")


@needs_pairs
def test_a_panel_of_e4m3_is_the_ten_lines():
    """On small whole numbers and scales that are powers of two: exact in any order. Of 23 rows the panel has
    room for 32; three tokens are the numbers 4, 0 and 2 of five.
    """
    rng = np.random.default_rng(16)
    whole, x = (
        rng.integers(-8, 9, (23, 128)).astype(np.float32),
        rng.integers(-3, 4, (5, 128)).astype(np.float32),
    )
    codes, scale = e4m3.encode(whole), np.array([0.5], np.float32)
    scales = 2.0 ** rng.integers(-2, 3, 5).astype(np.float32)
    acts, tokens = bf16_bits(x), np.array([4, 0, 2, 2])
    memory = np.zeros(pair_llvm.PANEL_BYTES, np.uint8)
    before = rng.integers(-9, 10, (4, 32)).astype(np.float32)
    ours = before.copy()

    @numba.njit
    def fast(codes, panel, acts, scales, scale, tokens, totals):
        rows, at, n = codes.ctypes.data, panel.ctypes.data, len(codes)
        for v in range(2):
            pair_llvm.pack_pairs(rows + 16 * v * 128, 128, n - 16 * v, 128, at + 64 * v, 128)
        of = at, acts.ctypes.data, scales.ctypes.data, scale.ctypes.data
        first, four = totals.ctypes.data, (tokens[0], tokens[1], tokens[2], tokens[3])
        to = first, first + 128, first + 2 * 128, first + 3 * 128
        pair_llvm.multiply_pairs(2, 64, of, four, first, 128, to, (rows, 128))

    fast(codes, memory, acts, scales, scale, tokens, ours)
    true = shown(pair_llvm, "pairs")(np.ascontiguousarray(whole.T), scale[0], x[tokens], scales[tokens])
    np.testing.assert_array_equal(ours[:, :23], before[:, :23] + true)
    assert len(np.unique(true)) > 23


@needs_pairs
def test_every_code_is_the_bfloat16_that_it_stands_for():
    """Each code in every place of a register: NaN stays NaN, and zero keeps its sign."""
    codes = (np.arange(16 * 16 * 16) + np.arange(16).repeat(256)).astype(np.uint8).reshape(16, 256)
    panel = np.zeros((128, 16, 2), np.uint16)

    @numba.njit
    def fast(codes, panel):
        pair_llvm.pack_pairs(codes.ctypes.data, 256, 16, 256, panel.ctypes.data, 64)

    fast(codes, panel)
    found = (panel.transpose(1, 0, 2).reshape(16, 256).astype(np.uint32) << 16).view(np.float32)
    true = e4m3.decode(codes)
    np.testing.assert_array_equal(found, true)
    number = ~np.isnan(true)
    np.testing.assert_array_equal(np.signbit(found)[number], np.signbit(true)[number])


@needs_pairs
@pytest.mark.parametrize("power_of_two", [0, 1])
def test_groups_are_quantized_as_the_reference_does(power_of_two):
    """Random numbers of all sizes, ties between two codes, zeros, numbers that are none; short groups."""
    rng = np.random.default_rng(17)
    x = (rng.standard_normal((200, 128)) * 2.0 ** rng.integers(-130, 120, (200, 1))).astype(np.float32)
    x[:100] *= 2.0 ** rng.integers(-20, 1, (100, 128))
    values = e4m3.TABLE[:127].astype(np.float32)
    ties = np.append((values[1:] + values[:-1]) / 2, [448, 448])
    x[100:140] = ties * np.where(rng.random((40, 128)) < 0.5, -1, 1) * 2.0 ** rng.integers(-20, 20, (40, 1))
    x[140], x[141, 5], x[142, 5], x[143] = 0, np.nan, -np.inf, -0.0
    found, scale = np.zeros((len(x), 128), np.uint16), np.zeros((len(x), 1), np.float32)

    @numba.njit
    def fast(x, columns, found, scale):
        at = x.ctypes.data, found.ctypes.data, scale.ctypes.data
        if power_of_two:
            pair_llvm.quantize_pairs(1, at[0], columns, at[1], at[2])
        else:
            pair_llvm.quantize_pairs(0, at[0], columns, at[1], at[2])

    for n in (128, 96, 64, 32):
        codes, true = fp8.act_quant(x[:, :n], ue8m0=bool(power_of_two))
        for i in range(len(x)):
            fast(x[i], n, found[i], scale[i])
        bad = ~np.isfinite(true[:, 0])
        assert np.isnan(scale[bad]).all() and bad.sum() >= 1
        np.testing.assert_array_equal(scale[~bad], true[~bad])
        ours = (found[:, :n].astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_array_equal(ours[~bad], e4m3.decode(codes)[~bad])


@pytest.mark.skipif(not wide_llvm.WIDE, reason="this CPU has no registers of 512 bits")
@pytest.mark.parametrize("module", [bf16, f16])
def test_a_panel_of_floats_is_the_ten_lines(module):
    """On small whole numbers: exact in any order. Of 23 rows the panel has room for 32."""
    rng = np.random.default_rng(18)
    whole, x = (
        rng.integers(-8, 9, (23, 64)).astype(np.float32),
        rng.integers(-3, 4, (4, 64)).astype(np.float32),
    )
    weights, memory = module.quantize(whole), np.zeros(wide_llvm.PANEL_BYTES, np.uint8)
    before = rng.integers(-9, 10, (4, 32)).astype(np.float32)
    ours, kind = before.copy(), module.GGML_TYPE

    @numba.njit
    def fast(weights, panel, acts, totals):
        rows, at, n, x = weights.ctypes.data, panel.ctypes.data, len(weights), acts.ctypes.data
        for v in range(2):
            wide_llvm.pack_wide(kind, rows + 16 * v * 128, 128, n - 16 * v, 64, at + 64 * v, 128)
        first, four = totals.ctypes.data, (x, x + 256, x + 2 * 256, x + 3 * 256)
        to = first, first + 128, first + 2 * 128, first + 3 * 128
        wide_llvm.multiply_wide(2, 64, at, four, first, 128, to, (rows, 128))

    fast(weights, memory, x, ours)
    true = shown(wide_llvm, "wide")(np.ascontiguousarray(whole.T), x)
    np.testing.assert_array_equal(ours[:, :23], before[:, :23] + true)
    np.testing.assert_array_equal(true, x @ whole.T)


@pytest.mark.parametrize("vectors", [1, latent_llvm.WIDE])
def test_products_of_latents_are_the_ten_lines(vectors):
    """On small whole numbers: exact in any order. Rows of the panel lie apart, and of three factors the last
    counts twice.
    """
    rng, lanes = np.random.default_rng(19), latent_llvm.LANES * vectors
    panel, factors = rng.integers(-8, 9, (40, 80)), rng.integers(-3, 4, (40, 5))
    start, panel, factors = (x.astype(np.float32) for x in (rng.integers(-9, 10, (3, 64)), panel, factors))
    ours = start.copy()

    @numba.njit
    def fast(panel, factors, out):
        at, f, y = panel.ctypes.data, factors.ctypes.data, out.ctypes.data
        to = y, y + 256, y + 512, y + 512
        four = f, f + 4, f + 8, f + 8
        latent_llvm.multiply_latents(vectors, len(panel), at, 320, four, 20, to, to)

    fast(panel, factors, ours)
    one = start.copy()

    @numba.njit
    def single(panel, factors, out):
        at, f, y = panel.ctypes.data, factors.ctypes.data, out.ctypes.data
        latent_llvm.multiply_latents(vectors, len(panel), at, 320, (f + 4,), 20, (y + 256,), (y + 256,))

    single(panel, factors, one)
    np.testing.assert_array_equal(one[1], ours[1])
    np.testing.assert_array_equal(one[::2], start[::2])
    picked = np.ascontiguousarray(factors[:, [0, 1, 2, 2]]), start[[0, 1, 2, 2], :lanes]
    true = shown(latent_llvm, "multiply")(np.ascontiguousarray(panel[:, :lanes]), *picked)
    np.testing.assert_array_equal(ours[:, :lanes], true[:3])
    np.testing.assert_array_equal(ours[:, lanes:], start[:, lanes:])


@pytest.mark.parametrize("last", [0, 2, latent_llvm.LANES])
def test_numbers_of_rows_are_laid_side_by_side(last):
    """Whole bits, NaN too, of rows that lie apart; behind the last one its own again, and nothing else."""
    lanes = latent_llvm.LANES
    rows, panel = (
        np.arange(lanes * 23, dtype=np.int32).reshape(lanes, 23),
        np.full((14, lanes + 3), -1, np.int32),
    )
    rows[0, 5] = 0x7FA00001

    @numba.njit
    def fast(rows, last, panel):
        latent_llvm.lay_side_by_side(rows.ctypes.data, 92, last, 12, panel.ctypes.data, panel.strides[0])

    fast(rows, last, panel)
    np.testing.assert_array_equal(panel[:12, :lanes], rows[np.minimum(np.arange(lanes), last), :12].T)
    assert (panel[:, lanes:] == -1).all() and (panel[12:] == -1).all()


@pytest.mark.parametrize("vectors", [1, latent_llvm.WIDE])
def test_shares_are_the_ten_lines(vectors):
    """Scores of all sizes, a lane of -inf alone, a NaN, and sums that begin with what was found before."""
    rng, lanes = np.random.default_rng(20), latent_llvm.LANES * vectors
    scores = (rng.standard_normal((7, lanes)) * 10.0 ** rng.integers(-3, 3, lanes)).astype(np.float32)
    largest, sums = rng.standard_normal((2, lanes)).astype(np.float32)
    scores[:, 0], largest[0], sums[0], scores[3, 1], scores[2, 2] = -np.inf, -np.inf, 0, np.nan, -np.inf
    ours, top, total, shrink = scores.copy(), largest.copy(), np.abs(sums), np.zeros(lanes, np.float32)

    @numba.njit
    def fast(scores, scale, top, total, shrink):
        at, to = scores.ctypes.data, (top.ctypes.data, total.ctypes.data, shrink.ctypes.data)
        latent_llvm.soften(vectors, len(scores), at, scale, to[0], to[1], to[2])

    fast(ours, np.float32(0.5), top, total, shrink)
    wide = scores.astype(np.float64)
    with np.errstate(invalid="ignore"):
        true = shown(latent_llvm, "soften").py_func(wide, 0.5, largest.astype(np.float64), np.abs(sums))
    assert top[0] == -np.inf and not ours[:, 0].any() and total[0] == shrink[0] == 0
    assert np.isnan(total[1]) and np.isnan(ours[3, 1])
    rest = slice(2, None)
    np.testing.assert_array_equal(top[rest], true[0][rest].astype(np.float32))
    near = {"rtol": 4e-7, "atol": 2.0**-126}  # x * scale - top is rounded too: see the next line
    exact = np.exp(np.float32(0.5) * scores[:, rest] - top[rest], dtype=np.float64)
    np.testing.assert_allclose(ours[:, rest], exact, **near)
    np.testing.assert_allclose(total[rest], true[1][rest], rtol=1e-4)
    np.testing.assert_allclose(shrink[rest], true[2][rest], rtol=1e-4, atol=1e-37)


def test_exponentials_are_within_two_ulp():
    """All of float32's magnitudes, and each of 2**20 numbers from -100 to 0."""
    x = np.append(-np.linspace(0, 100, 1 << 20), -(2.0 ** np.arange(-149.0, 128))).astype(np.float32)
    x = x[: len(x) // latent_llvm.LANES * latent_llvm.LANES].reshape(-1, latent_llvm.LANES)
    ours, room = x.copy(), np.zeros((3, latent_llvm.LANES), np.float32)

    @numba.njit
    def fast(scores, top, total, shrink):
        to = top.ctypes.data, total.ctypes.data, shrink.ctypes.data
        latent_llvm.soften(1, len(scores), scores.ctypes.data, np.float32(1), to[0], to[1], to[2])

    fast(ours, *room)  # the largest score before is 0
    true = np.exp(x.astype(np.float64))
    ulp = np.spacing(true.astype(np.float32)).astype(np.float64)
    assert (np.abs(ours - true) <= np.where(x < -87.3, 2.0**-125, 2 * ulp)).all()
    assert not ours[x < -88].any()
