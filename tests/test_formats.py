"""Number formats against gguf-py, ml_dtypes and torch."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refimpl import formats
from refimpl.errors import RefimplError
from refimpl.formats import bf16, e4m3, e5m2, e8m0, mxfp4, nvfp4, q8_k
from refimpl.formats.ggml_types import OWN
from refimpl.reference import fp8

ROOT = Path(__file__).parent.parent
STORED = sorted(kind for kind in formats.FORMATS.keys() - {15} if kind < OWN)
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


def test_the_table_of_types_is_ggmls():
    """But for Q8_1: gguf-py has 40 bytes, from when its two numbers beside the quants were float32."""
    for kind, size in gguf.GGML_QUANT_SIZES.items():
        row = formats.TYPES[kind]
        assert (row.name, (row.weights, row.nbytes)) == (kind.name, size if kind != 9 else (32, 36))
        assert row.row_head == 0
    assert len({row.name for row in formats.TYPES.values()}) == len(formats.TYPES)


@pytest.mark.parametrize("number", formats.TYPES, ids=formats.type_name)
def test_a_type_goes_by_number_and_name(number):
    row = formats.TYPES[number]
    for kind in (number, np.int64(number), row.name, row.name.lower()):
        assert formats.type_id(kind) == number and formats.type_name(kind) == row.name
        assert formats.row_bytes(kind, 2 * row.weights) == row.row_head + 2 * row.nbytes
        assert formats.nbytes(kind, (3, 2 * row.weights)) == 3 * row.row_head + 6 * row.nbytes
        if row.decoded:
            module = formats.get(kind)
            assert (row.name, number, row.weights) == (module.NAME, module.GGML_TYPE, module.WEIGHTS)
            assert module.BLOCK.itemsize == row.nbytes
            assert formats.dequantize(kind, np.zeros(2 * row.nbytes, np.uint8)).shape == (2 * row.weights,)
        else:
            with pytest.raises(RefimplError, match=rf"E1301 .*found {row.name}, expected F32"):
                formats.get(kind)


@pytest.mark.parametrize("number", formats.FORMATS, ids=formats.type_name)
def test_what_is_only_decoded_is_said_in_a_line(number):
    x = np.ones(256, np.float32)
    for kind in (number, formats.type_name(number)):
        if hasattr(formats.get(kind), "quantize"):
            assert formats.quantize(kind, x).size == formats.row_bytes(kind, 256)
        else:
            with pytest.raises(
                RefimplError, match=rf"E1303 {formats.type_name(number)}: .*only decoded"
            ) as e:
                formats.quantize(kind, x)
            assert "\n" not in str(e.value) and "Q3_K" not in str(e.value).partition("expected")[2]


@pytest.mark.parametrize("kind", [999, -1, "Q4_9", "", "12"])
def test_what_is_no_type_is_refused(kind):
    for ask in (formats.get, formats.type_id, formats.type_name):
        with pytest.raises(RefimplError, match=f"E1302 .*found {kind}"):
            ask(kind)


def test_a_row_that_contradicts_its_module_is_refused():
    with pytest.raises(ImportError, match=r"q4_0 says .* its row in ggml_types\.py 2"):
        formats._module(2, formats.TYPES[2]._replace(nbytes=20))


def test_a_format_is_added_by_contributing_alone(tmp_path):
    """Its example, its row and its commands, in a copy of the house."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text[text.index("**Adding a format**") : text.index("**Adding an operation.**")]
    module, row = re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
    (commands,) = re.findall(r"^```sh\n(.*?)^```$", section, re.M | re.S)
    house = tmp_path / "house"
    for name in ("refimpl", "docs", "tests", "kernels"):
        shutil.copytree(
            ROOT / name, house / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, house)
    name = re.search(r'^NAME, .*= "(\w+)"', module, re.M)[1].lower()
    table, file = house / "refimpl/formats/ggml_types.py", house / f"refimpl/formats/{name}.py"
    before = rf"^ +{row.split(':')[0].strip()}: .*\n"
    assert not file.exists() and len(re.findall(before, table.read_text(), re.M)) == 1
    file.write_text(module)
    table.write_text(re.sub(before, row, table.read_text(), flags=re.M))
    for command in commands.splitlines():
        words = [sys.executable, *shlex.split(command)[1:]]
        env = os.environ | {"PYTHONPATH": str(house), "REFIMPL_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(words, cwd=house, env=env, capture_output=True, text=True, timeout=300)
        said = done.stdout + done.stderr
        assert done.returncode == 0 and (name in said or " passed" in said), said
    assert "## Bits" in (house / f"docs/formats/{name}.md").read_text()
    assert f"[{name.upper()}](formats/{name}.md)" in (house / "docs/formats.md").read_text()


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


def test_floats_of_four_bits_are_ml_dtypes():
    """Every scale times every code, where ggml and the OCP agree: not the NaN of E8M0 and E4M3, nor the sign
    of zeros and of scales.
    """
    codes = np.arange(16, dtype=np.uint8)
    e2m1 = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert (2 * e2m1 == mxfp4.VALUES).all()
    scales = np.arange(255, dtype=np.uint8)
    b = np.zeros(255, mxfp4.BLOCK)
    b["e"], b["qs"] = scales, codes * 0x11
    with np.errstate(over="ignore"):
        wanted = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)[:, None] * e2m1
    found = mxfp4.dequantize(b.view(np.uint8)).reshape(255, 2, 16)
    assert (found[:, 0] == wanted).all() and (found[:, 1] == wanted).all()
    scales = np.arange(0x7F, dtype=np.uint8)
    wanted = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32)[:, None] * e2m1
    for sign in (0, 0x80):
        b = np.zeros(0x7F, nvfp4.BLOCK)
        b["d"], b["qs"] = (scales | sign)[:, None], np.tile(codes[:8] | codes[8:] << 4, 4)
        found = nvfp4.dequantize(b.view(np.uint8)).reshape(0x7F, 4, 16)
        assert (found == wanted[:, None]).all()


@given(seed=st.integers(0, 2**32 - 1), power=st.integers(-149, 127))
def test_mxfp4_rounds_to_the_nearest_and_of_two_to_the_smaller(seed, power):
    """By trying all numbers of the block's scale, which is the power of two at or below a quarter of the
    largest magnitude.
    """
    rng = np.random.default_rng(seed)
    x = np.ldexp(rng.integers(-64, 65, (5, 32)) / 64, power).astype(np.float32)
    x[0] *= rng.random(32, np.float32)
    e, q = mxfp4.unpack(mxfp4.quantize(x))
    exact = x.astype(np.float64)
    largest = np.abs(exact).max(axis=-1, keepdims=True)
    low = np.ldexp(4.0, e.astype(int) - 127)
    assert ((low <= largest) & (largest < 2 * low) | ((e == 0) & (largest < 2 * low))).all()
    numbers = np.ldexp(mxfp4.VALUES.astype(np.float64), e[..., None].astype(int) - 128)  # [5, 1, 16]
    off = np.abs(numbers - exact[..., None])
    chosen = np.take_along_axis(off, q[:, 0, :, None].astype(int), axis=-1)[..., 0]
    assert (chosen == off.min(axis=-1)).all()
    value = np.abs(
        np.take_along_axis(np.broadcast_to(numbers, off.shape), q[:, 0, :, None].astype(int), axis=-1)
    )
    ties = np.where(off == chosen[..., None], np.abs(numbers), np.inf).min(axis=-1)
    assert (value[..., 0] == ties).all()
    again = mxfp4.quantize(mxfp4.dequantize(mxfp4.quantize(x)))
    assert (mxfp4.dequantize(again) == mxfp4.dequantize(mxfp4.quantize(x))).all()


def test_mxfp4_refuses_what_is_no_number():
    for bad in (np.nan, np.inf, -np.inf):
        x = np.ones((2, 64), np.float32)
        x[1, 40] = bad
        with pytest.raises(ValueError, match="NaN or infinity"):
            formats.quantize("MXFP4", x)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
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
    ("name", "worst"),
    [("Q2_K", 0.4), ("Q4_K", 0.09), ("Q5_K", 0.045), ("Q6_K", 0.023), ("Q8_0", 0.006), ("MXFP4", 0.13)],
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
