"""What `inspect` lists and draws is what other readers and the formats themselves say."""

import json
import re
from collections import Counter
from pathlib import Path

import gguf as gguf_py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from refimpl import formats, inspect
from refimpl.checkpoint import safetensors
from refimpl.cli import run
from refimpl.formats import draw
from refimpl.reference import fp8
from refimpl.tensors import ScaledFP8
from refimpl.tiny import FP8_DIR, GGUF_DIR, GGUF_FILE

WITH_PARTS = [m for m in formats.FORMATS.values() if hasattr(m, "PARTS")]
EXPERTS = "blk.2.ffn_down_exps.weight"


@pytest.fixture
def look(capsys):
    def look(*args):
        code = run(inspect.main, [str(a) for a in args])
        out, err = capsys.readouterr()
        return (code, err) if code else json.loads(out) if "--json" in args else out

    return look


@pytest.mark.parametrize("module", WITH_PARTS, ids=lambda m: m.NAME)
@given(data=st.data())
def test_the_bits_make_the_numbers(module, data):
    """Every bit has one owner, and an integer is the sum of its bits, up to the format's constant and two's
    complement.
    """
    block = np.frombuffer(
        data.draw(st.binary(min_size=module.BLOCK.itemsize, max_size=module.BLOCK.itemsize)), np.uint8
    )
    found = draw.owners(module)
    assert set(Counter(o for row in found for o in row).values()) == {1}
    sums: Counter = Counter()
    width: Counter = Counter()
    for byte, row in zip(block.tolist(), found):
        for bit, o in enumerate(row):
            sums[o.part, o.at] += (byte >> bit & 1) << o.bit
            width[o.part, o.at] += 1
    zero = draw.field_values(module, np.zeros_like(block))
    for part, values in draw.field_values(module, block).items():
        for index, value in np.ndenumerate(values):
            if values.dtype.kind in "iu":
                assert (int(value) - int(zero[part][index]) - sums[part, index]) % (
                    1 << width[part, index]
                ) == 0
            elif np.isfinite(value):
                assert sums[part, ()] == int(
                    np.array(value, np.float16 if width[part, ()] == 16 else np.float32).view(
                        f"u{width[part, ()] // 8}"
                    )
                )


def test_a_float_s_bits():
    assert draw.float_bits(0x3C00, "f16") == "0 01111 0000000000"
    assert draw.float_bits(0x7E, "e4m3") == "0 1111 110"
    assert draw.float_bits(127, "e8m0") == "01111111"


def test_lists_the_three_kinds_as_other_readers_do(look, hybrid_folder):
    for folder in (FP8_DIR, hybrid_folder):
        ours = look(folder, "--json")
        assert ours["kind"] == ("hybrid" if folder == hybrid_folder else "safetensors")
        theirs = {}
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "np") as f:
                theirs |= {
                    name: (f.get_slice(name).get_dtype(), f.get_slice(name).get_shape(), file.name)
                    for name in f.keys()  # noqa: SIM118
                }
        assert ours["tensors"] and {t["name"] for t in ours["tensors"]} == theirs.keys()
        for t in ours["tensors"]:
            dtype, shape, file = theirs[t["name"]]
            blob = folder == hybrid_folder and dtype == "U8"
            assert (t["type"], t["shape"], t["file"]) == (dtype, shape, file) or (
                blob and t["type"] in ("Q4_K", "Q6_K") and t["file"] == file
            )
    ours = {
        t["name"]: (t["type"], t["shape"], t["nbytes"], t["offset"])
        for t in look(GGUF_DIR, "--json")["tensors"]
    }
    theirs = gguf_py.GGUFReader(GGUF_FILE)
    assert ours == {
        t.name: (t.tensor_type.name, t.shape[::-1].tolist(), t.n_bytes, t.data_offset) for t in theirs.tensors
    }
    assert look(GGUF_FILE, "--json")["tensors"] == look(GGUF_DIR, "--json")["tensors"]


def test_the_list_for_people(look, hybrid_folder):
    text = look(FP8_DIR)
    assert re.search(
        r"model\.layers\.1\.mlp\.experts\.gate_proj\.weight +F8_E4M3 +8 experts of \[256, 256\] +524\.3 kB",
        text,
    )
    assert max(map(len, text.splitlines())) < 160
    assert re.search(rf"{EXPERTS} +Q6_K +\[8, 256, 256\]", look(hybrid_folder))
    assert "general.architecture = deepseek2" in look(GGUF_DIR)


def test_a_blob_of_the_merged_folder_draws_like_its_source(look, hybrid_folder):
    a, b = (look(f, EXPERTS, "--block", 77, "--bits", "--json") for f in (hybrid_folder, GGUF_DIR))
    for key in ("type", "shape", "place", "bytes", "fields", "parts", "weights", "bits"):
        assert a[key] == b[key]
    theirs = {t.name: t.data for t in gguf_py.GGUFReader(GGUF_FILE).tensors}[EXPERTS].reshape(-1, 210)[77]
    assert bytes.fromhex(a["bytes"]) == theirs.tobytes()
    assert a["weights"] == gguf_py.dequantize(theirs, gguf_py.GGMLQuantizationType.Q6_K).tolist()
    assert a["place"] == "weights [0, 77][0] to 255" and a["blocks"] == 2048


def test_other_naming_finds_the_tensor(look):
    assert look(GGUF_DIR, "model.layers.2.mlp.experts.down_proj.weight").startswith(EXPERTS)
    assert "Q6_K (256 weights in 210 bytes)" in look(GGUF_DIR, EXPERTS)


def test_a_tile_of_fp8_has_its_scale(look):
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"  # [288, 256]: the last tiles have 32 rows
    tensors, _ = safetensors.read_folder(FP8_DIR)
    whole = fp8.weight_dequant(
        ScaledFP8(safetensors.view(tensors[name]), safetensors.view(tensors[name + "_scale_inv"]))
    )
    drawn = look(FP8_DIR, name, "--block", 5, "--json")
    assert drawn["blocks"] == 6 and drawn["place"] == "rows 256 to 287, columns 128 to 255"
    np.testing.assert_array_equal(np.float32(drawn["weights"]), whole[256:, 128:])
    text = look(FP8_DIR, name, "--block", 5, "--bits")
    code = drawn["codes"][0][0]
    assert (
        f"  0   0  0x{code:02x}  {draw.float_bits(code, 'e4m3')}" in text
        and "weight_scale_inv[2,1] f32 0x" in text
    )


def test_plain_numbers(look, hybrid_folder):
    drawn = look(FP8_DIR, "model.norm.weight", "--block", 7, "--json")
    assert drawn["blocks"] == 8 and len(drawn["weights"]) == 32
    assert look(hybrid_folder, "blk.2.ffn_down_exps.ggml_type", "--bits").rstrip().endswith("1110  = 14")


def test_nan_is_valid_json(tmp_path, look):
    safetensors.save(tmp_path / "x.safetensors", {"w": ("F32", np.array([np.nan, np.inf, 1], "f4"))})
    assert look(tmp_path / "x.safetensors", "w", "--block", 0, "--json")["weights"] == ["nan", "inf", 1.0]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["nowhere"], r"E4021 .*nowhere: no such folder or file"),
        ([Path(__file__).parent], "E4021 .*neither safetensors nor GGUF"),
        ([GGUF_DIR, "blk.2.ffn_down_exp.weight"], r"E4050 .*near: blk\.\d"),
        ([GGUF_DIR, EXPERTS, "--block", "2048"], r"E4051 .*found 2048, expected 0 to 2047"),
        ([GGUF_DIR, EXPERTS, "--block", "-1"], r"E4051 .*found -1"),
        ([Path(__file__)], "E1001"),
    ],
)
def test_one_line_for_what_is_not_there(look, args, line):
    code, err = look(*args)
    assert code == 1 and err.count("\n") == 1 and re.search(line, err), err


def test_other_dtypes_are_named(tmp_path, look):
    safetensors.save(tmp_path / "x.safetensors", {"w": ("BOOL", np.ones(3, "u1"))})
    code, err = look(tmp_path / "x.safetensors", "w", "--block", 0)
    assert code == 1 and "E4052" in err and "BOOL" in err
