"""Number formats against gguf-py, ml_dtypes and torch."""

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refimpl import formats
from refimpl.errors import RefimplError
from refimpl.formats import bf16, e4m3, e5m2, e8m0, q8_k
from refimpl.reference import fp8

STORED = sorted(formats.FORMATS.keys() - {15})
HALVES = np.array([0, 0x8000, 1, 0x83FF, 0x7BFF, 0x7C00, 0xFC00, 0x7E00, 0x3C00], "<u2")


def same(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert ((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))).all()


@pytest.mark.parametrize("kind", STORED, ids=formats.type_name)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 5))
def test_arbitrary_bytes_decode_as_gguf_py_decodes_them(kind, seed, n):
    module, rng = formats.get(kind), np.random.default_rng(seed)
    data = rng.integers(0, 256, (2, n * module.BLOCK.itemsize), np.uint8)
    if module.BLOCK.names:
        for field in ("d", "dmin", "m"):
            if field in module.BLOCK.names and module.BLOCK[field] == "<f2":
                data.view(module.BLOCK)[field].view("<u2")[...] = rng.choice(HALVES, (2, n))
    with np.errstate(all="ignore"):
        same(
            formats.dequantize(kind, data),
            gguf.quants.dequantize(data, gguf.GGMLQuantizationType(kind)).astype(np.float32),
        )


def test_blocks_are_ggmls_and_other_types_are_refused_by_name():
    for kind, module in formats.FORMATS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)] == (
            module.WEIGHTS,
            module.BLOCK.itemsize,
        )
        assert gguf.GGMLQuantizationType(kind).name == module.NAME and formats.type_id(module.NAME) == kind
    for kind in (16, 19, 20, 34, 39):
        with pytest.raises(RefimplError, match=f"E1301 .*{formats.type_name(kind)}"):
            formats.get(kind)
    with pytest.raises(RefimplError, match="E1302"):
        formats.get(999)
    with pytest.raises(RefimplError, match="E1303"):
        formats.quantize(11, np.zeros(256, np.float32))


def test_every_code_of_a_byte_is_ml_dtypes():
    codes = np.arange(256, dtype=np.uint8)
    for module, kind in (
        (e4m3, ml_dtypes.float8_e4m3fn),
        (e5m2, ml_dtypes.float8_e5m2),
        (e8m0, ml_dtypes.float8_e8m0fnu),
    ):
        same(module.decode(codes), codes.view(kind).astype(np.float32))


def test_e4m3_rounds_to_even_and_saturates_as_torch():
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (e4m3.TABLE[:126] + e4m3.TABLE[1:127]) / np.float32(2)
    x = np.concatenate([halves, ties, -ties, np.float32([1e38, -np.inf])])
    inside = np.abs(x) <= 448
    assert (e4m3.encode(x[inside]) == x[inside].astype(ml_dtypes.float8_e4m3fn).view(np.uint8)).all()
    # torch saturates too, but not infinities in every version: those are stated here.
    beyond = np.abs(x) > 448
    assert (e4m3.encode(x[beyond]) == np.where(x[beyond] < 0, 0xFE, 0x7E)).all()
    assert (e4m3.encode(x[np.isnan(x)]) & 0x7F == 0x7F).all()


@given(st.integers(0, 2**32 - 1))
def test_bf16_rounds_as_ml_dtypes(seed):
    x = np.random.default_rng(seed).integers(0, 2**32, 200, np.uint32).view(np.float32)
    x = x[~np.isnan(x)]
    with np.errstate(all="ignore"):
        assert (bf16.encode(x) == x.astype(ml_dtypes.bfloat16).view(np.uint16)).all()


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_simple_quantizers_have_gguf_pys_bits(name):
    x = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    assert (
        formats.quantize(formats.type_id(name), x) == gguf.quants.quantize(x, gguf.GGMLQuantizationType[name])
    ).all()


def test_q8_k_is_ggmls_rule():
    x = np.random.default_rng(1).standard_normal((40, 256)).astype(np.float32)
    d, q, sums = q8_k.unpack(q8_k.quantize(x))
    for row in range(40):
        extreme = x[row, np.abs(x[row]).argmax()]
        inverse = np.float32(-127) / extreme
        wanted = np.minimum(np.rint(inverse * x[row]), 127)
        assert d[row, 0] == np.float32(1) / inverse and (q[row, 0] == wanted).all()
        assert (sums[row, 0] == wanted.reshape(16, 16).sum(axis=1)).all()


@pytest.mark.parametrize(
    ("name", "worst"), [("Q2_K", 0.4), ("Q4_K", 0.09), ("Q5_K", 0.045), ("Q6_K", 0.023), ("Q8_0", 0.006)]
)
def test_quantizers_are_accurate_on_gaussian_numbers_and_exact_on_zeros(name, worst):
    kind = formats.type_id(name)
    x = np.random.default_rng(2).standard_normal((64, 512)).astype(np.float32)
    y = formats.dequantize(kind, formats.quantize(kind, x))
    assert np.sqrt(((x - y) ** 2).sum() / (x**2).sum()) < worst
    assert not formats.dequantize(kind, formats.quantize(kind, np.zeros((3, 256), np.float32))).any()


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K", "Q6_K"])
def test_no_more_is_lost_than_by_llama_cpp(name):
    pytest.importorskip("llama_cpp", reason="needs the extra `peers`")
    from refimpl.bench.format_error import measure

    row = measure(name, with_peer=True)
    assert row["gaussian_ratio"] <= 1 and row["weights_ratio"] <= 1


@given(n=st.integers(1, 300), k=st.integers(1, 300), seed=st.integers(0, 999))
def test_fp8_tiles_decode_as_torch_decodes_them_within_half_a_step(n, k, seed):
    x = np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)
    w = fp8.weight_quant(x)
    assert w.scale.shape == (-(-n // 128), -(-k // 128))
    spread = np.repeat(np.repeat(w.scale, 128, 0)[:n], 128, 1)[:, :k]
    theirs = torch.from_numpy(w.codes.copy()).view(torch.float8_e4m3fn).float().numpy() * spread
    same(fp8.weight_dequant(w), theirs)
    assert (np.abs(theirs - x) <= np.maximum(np.abs(x) * 2**-4, spread * 2**-10) * 1.0001).all()


def test_groups_of_zeros_give_zeros_and_nan_shows_in_its_group_alone():
    x = np.ones((2, 300), np.float32)
    x[0, :128], x[1, 130] = 0, np.nan
    codes, scale = fp8.act_quant(x)
    assert not codes[0, :128].any() and scale[0, 0] == 0 and scale.shape == (2, 3)
    back = e4m3.decode(codes) * np.repeat(scale, 128, 1)[:, :300]
    assert np.isnan(back[1, 128:256]).all() and not np.isnan(np.delete(back, np.s_[128:256], 1)).any()


@given(m=st.integers(0, 4), n=st.integers(1, 200), k=st.integers(1, 400), seed=st.integers(0, 999))
def test_fp8_linear_is_the_product_of_what_the_codes_stand_for(m, n, k, seed):
    rng = np.random.default_rng(seed)
    x, w = (
        rng.standard_normal((m, k)).astype(np.float32),
        fp8.weight_quant(rng.standard_normal((n, k)).astype(np.float32)),
    )
    codes, scale = fp8.act_quant(x)
    a = e4m3.decode(codes).astype(np.float64) * np.repeat(scale, 128, 1)[:, :k]
    b = e4m3.decode(w.codes).astype(np.float64) * np.repeat(np.repeat(w.scale, 128, 0)[:n], 128, 1)[:, :k]
    bound = (
        (k + 8) * 2.0**-24 * 2 * (np.abs(a) @ np.abs(b).T)
    )  # gamma of a float32 sum of k products and two scalings
    assert (np.abs(fp8.linear(x, w) - a @ b.T) <= bound).all()
