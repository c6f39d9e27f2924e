"""The comparison against numpy's, over every pair of kinds; different models; bounded memory; exit codes."""

import json
import shutil
import tracemalloc

import gguf as gguf_py
import numpy as np
import pytest

from refimpl import diff
from refimpl.checkpoint import gguf, names, safetensors
from refimpl.checkpoint.folder import Checkpoint
from refimpl.cli import run
from refimpl.diff import Moments, compare, pieces
from refimpl.errors import RefimplError
from refimpl.reference import fp8
from refimpl.reference.packed import dense
from refimpl.tensors import Packed, ScaledFP8
from refimpl.tiny import FP8_DIR, GGUF_DIR, GGUF_FILE


@pytest.fixture
def command(capsys):
    def command(*args):
        code = run(diff.main, [str(a) for a in args])
        out, err = capsys.readouterr()
        return code, out, err

    return command


def rows(a, b, glob="*"):
    return {r.name: r for r in compare(Checkpoint.open(a), Checkpoint.open(b), glob)}


def test_a_checkpoint_is_the_same_as_itself_and_as_its_copy(command):
    code, out, err = command(FP8_DIR, FP8_DIR)
    assert (code, err) == (0, "") and out.endswith("66 tensors: 66 same\n") and out.count("  same\n") == 66


def test_a_hybrid_folder_has_the_checkpoint_s_tensors_and_the_gguf_s_experts(hybrid_folder):
    for other, experts in ((FP8_DIR, False), (GGUF_FILE, True)):
        for name, row in rows(other, hybrid_folder).items():
            same = names.is_routed_expert(name) == experts or "norm" in name or "mlp.gate." in name
            assert row.state == ("same" if same else "different"), name
    assert len(rows(FP8_DIR, hybrid_folder)) == 66


def oracle(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Both sides of a stack of experts or of a matrix by other means: the checkpoint's codes by hand, the
    GGUF's blocks by gguf-py.
    """
    file = safetensors.read(FP8_DIR / "model.safetensors").tensors
    singles = [name] if name in file else [name.replace(".experts.", f".experts.{e}.") for e in range(8)]
    sides = []
    for single in singles:
        codes, scale = safetensors.view(file[single]), safetensors.view(file[single + "_scale_inv"])
        tiles = np.kron(scale, np.ones((128, 128), np.float32))[: codes.shape[0], : codes.shape[1]]
        sides.append(fp8.e4m3.decode(codes) * tiles)
    reader = {t.name: t for t in gguf_py.GGUFReader(str(GGUF_FILE)).tensors}
    tensor = reader[names.to_gguf(name)]
    return np.stack(sides).reshape(-1, sides[0].shape[-1]), gguf_py.dequantize(
        tensor.data, tensor.tensor_type
    ).reshape(-1, sides[0].shape[-1])


@pytest.mark.parametrize(
    ("name", "low", "high"),  # Q4_K costs weights like these about 7 %, Q6_K about 1.7 %: docs/formats.md
    [
        ("model.layers.1.mlp.experts.gate_proj.weight", 22.5, 23.7),
        ("model.layers.3.mlp.experts.down_proj.weight", 34.8, 36.0),
        ("model.layers.2.self_attn.kv_a_proj_with_mqa.weight", 22.5, 23.7),
    ],
)
def test_figures_are_those_of_numpy(name, low, high):
    row = rows(FP8_DIR, GGUF_DIR, name)[name]
    a, b = (x.astype(np.float64) for x in oracle(name))
    assert row.max_abs == np.abs(a - b).max() and row.differing == np.count_nonzero(a != b)
    assert row.relative == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-12)
    assert row.sqnr_db == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()), rel=1e-12)
    assert low < row.sqnr_db < high


def test_types_are_those_of_the_files():
    found = {name: row.types for name, row in rows(FP8_DIR, GGUF_DIR, "*layers.1.*").items()}
    assert found["model.layers.1.self_attn.kv_b_proj.weight"] == ("F8_E4M3", "Q5_0+Q4_K")
    assert found["model.layers.1.input_layernorm.weight"] == ("BF16", "F32")
    assert found["model.layers.1.mlp.experts.gate_proj.weight"] == ("F8_E4M3", "Q4_K")


@pytest.mark.parametrize("piece", [1, 1 << 14, 1 << 21])
def test_where_tensors_are_cut_does_not_matter(monkeypatch, piece):
    monkeypatch.setattr(diff, "PIECE", piece)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 200), dtype=np.float32)
    matrix = fp8.weight_quant(x)
    for weight, shape in (
        (matrix, (300, 200)),
        (x, (300, 200)),
        (x[0], (200,)),
        ([matrix, matrix], (2, 300, 200)),
        (x.reshape(3, 100, 200), (3, 100, 200)),
    ):
        found = list(pieces(weight, shape))
        assert len(found) >= (1 if piece > 1 << 14 or len(shape) == 1 else 2)
        np.testing.assert_array_equal(np.concatenate(found), dense(weight).reshape(-1, 200))


def test_not_a_number_equals_itself_alone():
    nan, inf = np.nan, np.inf
    found = Moments()
    found.add(
        np.array([[nan, inf, 1, nan, 2, 0]], np.float32), np.array([[nan, inf, 2, 1, inf, -0.0]], np.float32)
    )
    assert (found.differing, found.not_finite, found.largest) == (3, 2, 1) and found.figures() == (
        None,
        None,
        None,
    )
    zeros = Moments()
    zeros.add(np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32))
    assert zeros.figures() == (1, None, None)


def test_memory_does_not_grow_with_the_tensor():
    """A quarter of a gigabyte of weights a side, from blocks that are all one."""
    data = np.broadcast_to(np.zeros(1, np.uint8), (1 << 14, 8192))
    stack = Packed(data, 1, (1 << 14, 4096))
    tracemalloc.start()
    try:
        row = diff._row("x", ("F16", "F16"), stack, stack)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert row.state == "same" and peak < 20 * diff.PIECE * 4 < (1 << 26) * 4


def changed(folder, change, config=None) -> None:
    """The FP8 folder with tensors as `change(name, dtype, array)` has them; None leaves one out."""
    tensors = safetensors.read(FP8_DIR / "model.safetensors").tensors
    arrays = {n: (t.dtype, np.array(safetensors.view(t))) for n, t in tensors.items()}
    safetensors.save(
        folder / "model.safetensors",
        {n: (d, y) for n, (d, x) in arrays.items() if (y := change(n, x)) is not None},
    )
    raw = json.loads((FP8_DIR / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | (config or {})))


def test_one_weight_is_found_and_a_missing_or_misshapen_tensor_named(tmp_path, command):
    def change(name, x):
        if name == "model.layers.2.mlp.experts.5.up_proj.weight":
            x[7, 9] ^= 0x80
        if name == "lm_head.weight":
            x = x[:-1]
        return None if name == "model.layers.1.mlp.gate.weight" else x

    changed(tmp_path, change)
    found = {n: r for n, r in rows(FP8_DIR, tmp_path).items() if r.state != "same"}
    assert {n: r.state for n, r in found.items()} == {
        "model.layers.1.mlp.gate.weight": "only in A",
        "model.layers.2.mlp.experts.up_proj.weight": "different",
        "lm_head.weight": "shape",
    }
    assert found["model.layers.2.mlp.experts.up_proj.weight"].differing == 1
    code, out, err = command(FP8_DIR, tmp_path, "--worst")
    assert code == 1 and "E4060" in err and "3 of 66 tensors" in err and "another model" not in err
    assert [line.split()[0] for line in out.splitlines()[:3]] == [
        "model.layers.1.mlp.gate.weight",
        "lm_head.weight",
        *list(found)[1:2],
    ]
    assert "1 different, 1 of another shape, 1 only in A" in out.splitlines()[-1]
    assert rows(tmp_path, FP8_DIR)["model.layers.1.mlp.gate.weight"].state == "only in B"


def test_another_model_is_named_by_its_sizes_or_by_its_norms(tmp_path, command):
    changed(tmp_path, lambda n, x: x, {"routed_scaling_factor": 1.5, "rope_theta": 50000})
    code, out, err = command(FP8_DIR, tmp_path, "--json")
    assert code == 1 and "another model than" in err and "0 of 66 tensors" in err
    assert (
        json.loads(out)["other_models"]
        == "their configs differ: routed_scaling_factor 2.5 and 1.5, rope_theta 10000 and 50000"
    )
    changed(tmp_path, lambda n, x: x ^ np.uint16(1) if "norm" in n and x.dtype == np.uint16 else x)
    code, _, err = command(FP8_DIR, tmp_path)
    assert code == 1 and "another model than" in err and "17 of 17 norms differ" in err
    assert command(FP8_DIR, tmp_path, "--min_sqnr", "30")[0] == 0


def test_near_enough_is_the_same_to_the_exit_code(command):
    experts = "*.mlp.experts.*"
    assert command(FP8_DIR, GGUF_FILE, "--tensor", experts)[0] == 1
    assert command(FP8_DIR, GGUF_FILE, "--tensor", experts, "--min_sqnr", "22")[0] == 0
    code, _, err = command(FP8_DIR, GGUF_FILE, "--tensor", experts, "--min-sqnr", "30")
    assert code == 1 and "found 7 of 9 tensors that differ, expected at least 30 dB" in err


def test_json_has_every_figure(command):
    report = json.loads(command(FP8_DIR, GGUF_DIR, "--tensor", "blk.1.*", "--json")[1])
    assert report["kinds"] == ["safetensors", "gguf"] and report["other_models"] is None
    found = {t["name"]: t for t in report["tensors"]}
    assert (
        found["model.layers.1.mlp.gate.weight"]["state"] == "same"
        and found["model.layers.1.mlp.gate.weight"]["sqnr_db"] is None
    )
    assert found["model.layers.1.mlp.experts.up_proj.weight"]["shapes"] == [[8, 256, 256]] * 2


def test_a_folder_without_config_is_read_with_the_other_s(hybrid_folder, tmp_path, command):
    for path in hybrid_folder.glob("*.safetensors"):
        shutil.copy(path, tmp_path)
    assert command(tmp_path, hybrid_folder)[0] == command(hybrid_folder, tmp_path)[0] == 0


def test_what_cannot_be_compared_is_one_line(tmp_path, command):
    for args, wanted in (
        ((FP8_DIR, tmp_path / "none"), "E4021"),
        ((FP8_DIR, FP8_DIR, "--tensor", "nothing"), "E4050"),
    ):
        code, out, err = command(*args)
        assert (code, out) == (1, "") and wanted in err and err.count("\n") == 1
    gguf.write(
        tmp_path / "x.gguf",
        {"general.architecture": "llama"},
        [gguf.Entry("output.weight", 0, (8,), lambda: [bytes(32)])],
    )
    with pytest.raises(RefimplError, match="E1010"):
        Checkpoint.open(tmp_path / "x.gguf")
    assert isinstance(Checkpoint.open(FP8_DIR)["blk.1.attn_q_a.weight"], ScaledFP8)
