"""The three kinds of folder give the same model; quantize writes what they were made from."""

import json
import shutil

import numpy as np
import pytest

from refimpl import formats, quantize
from refimpl.checkpoint import gguf, names, safetensors, stored
from refimpl.checkpoint.folder import Checkpoint, gguf_config
from refimpl.cli import run
from refimpl.config import DeepSeekConfig
from refimpl.devices.cpu import CpuBackend
from refimpl.errors import RefimplError
from refimpl.formats import bf16
from refimpl.model import Model
from refimpl.reference import fp8
from refimpl.reference.packed import dense
from refimpl.tensors import Packed, ScaledFP8
from refimpl.tiny import FP8_DIR, GGUF_DIR, GGUF_FILE

IDS = np.random.default_rng(0).integers(0, 500, 24).tolist()


def model(folder, activations: str = "fp8") -> Model:
    checkpoint = Checkpoint.open(folder)
    config, backend = DeepSeekConfig.from_dict(checkpoint.config), CpuBackend("reference", activations)
    return Model(config, checkpoint, backend)


def test_all_three_kinds_hold_the_same_tensors(hybrid_folder):
    kinds = {f: Checkpoint.open(f) for f in (hybrid_folder, FP8_DIR, GGUF_DIR)}
    assert [c.kind for c in kinds.values()] == ["hybrid", "safetensors", "gguf"]
    c = DeepSeekConfig.from_dict(kinds[FP8_DIR].config)
    wanted = {names.to_gguf(n): s for n, s in names.shapes(c).items()}
    for checkpoint in kinds.values():
        assert wanted.keys() <= checkpoint.keys()
        for name, shape in wanted.items():
            assert checkpoint[name].shape == shape
    assert isinstance(kinds[hybrid_folder]["blk.1.attn_q_a.weight"], ScaledFP8)
    assert isinstance(kinds[hybrid_folder]["blk.1.ffn_up_exps.weight"], Packed)


def test_the_gguf_is_the_fp8_checkpoint_up_to_quantization(hybrid_folder):
    a, b = Checkpoint.open(FP8_DIR), Checkpoint.open(GGUF_FILE)
    for name, worst in (
        ("blk.1.attn_kv_b.weight", 0.1),
        ("blk.2.ffn_down_exps.weight", 0.03),
        ("output.weight", 0.03),
        ("blk.0.attn_norm.weight", 0.0),
    ):
        x, y = dense(a[name]), dense(b[name])
        assert np.sqrt(np.mean((x - y) ** 2)) <= worst * np.sqrt(np.mean(x**2)), name


def test_gguf_metadata_give_back_the_config():
    ours = DeepSeekConfig.from_dict(gguf_config(gguf.read(GGUF_FILE)))
    truth = DeepSeekConfig.from_dict(json.loads((FP8_DIR / "config.json").read_text()))
    assert ours.rms_norm_eps == np.float32(truth.rms_norm_eps)
    assert ours == DeepSeekConfig.from_dict(
        json.loads((FP8_DIR / "config.json").read_text()) | {"rms_norm_eps": ours.rms_norm_eps}
    )


def test_weights_are_views_of_the_mapped_file(hybrid_folder):
    checkpoint = Checkpoint.open(hybrid_folder)
    for array in (
        checkpoint["blk.1.attn_q_a.weight"].codes,
        checkpoint["blk.1.ffn_up_exps.weight"].data,
        checkpoint["token_embd.weight"].data,
    ):
        base = array
        while isinstance(base, np.ndarray):
            base = base.base
        assert isinstance(base, memoryview) and not array.flags.writeable  # of the mapped file


def test_a_folder_of_ktransformers_without_extras_loads_with_the_original_config(hybrid_folder, tmp_path):
    for path in hybrid_folder.glob("*.safetensors"):
        header = safetensors.read(path)
        safetensors.save(
            tmp_path / path.name,
            {n: (t.dtype, np.array(safetensors.view(t))) for n, t in header.tensors.items()},
        )
    with pytest.raises(RefimplError, match="E4020"):
        Checkpoint.open(tmp_path)
    checkpoint = Checkpoint.open(tmp_path, config_folder=FP8_DIR)
    bare = Model(DeepSeekConfig.from_dict(checkpoint.config), checkpoint)
    assert (bare.logits(IDS) == model(hybrid_folder).logits(IDS)).all()


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("E4015", lambda n, v: None if n == "blk.2.ffn_up_exps.ggml_type" else v),
        ("E4016", lambda n, v: (v[0], v[1][:-1]) if n == "blk.2.ffn_up_exps.weight" else v),
        ("E1301 .*IQ3_S", lambda n, v: (v[0], np.array(21)) if n == "blk.2.ffn_up_exps.ggml_type" else v),
        ("E4010 .*blk.3.ffn_norm", lambda n, v: None if n == "blk.3.ffn_norm.weight" else v),
        ("E4013", lambda n, v: None if n == "blk.1.attn_q_b.weight_scale_inv" else v),
        ("E4014", lambda n, v: (v[0], v[1].T) if n == "blk.1.attn_q_b.weight_scale_inv" else v),
        ("E4014", lambda n, v: ("BF16", bf16.encode(v[1])) if n == "blk.1.attn_q_b.weight_scale_inv" else v),
        ("E4011", lambda n, v: (v[0], v[1][:-1]) if n == "output_norm.weight" else v),
    ],
)
def test_damaged_hybrid_folders_are_refused_by_tensor(hybrid_folder, tmp_path, code, change):
    arrays = {
        n: (t.dtype, np.array(safetensors.view(t)))
        for n, t in safetensors.read_folder(hybrid_folder)[0].items()
    }
    safetensors.save(
        tmp_path / "model.safetensors", {n: w for n, v in arrays.items() if (w := change(n, v)) is not None}
    )
    shutil.copy(FP8_DIR / "config.json", tmp_path)
    with pytest.raises(RefimplError, match=code):
        model(tmp_path)


def test_folders_that_are_no_model_are_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(RefimplError, match="E4021"):
            Checkpoint.open(folder)
    with pytest.raises(RefimplError, match="E1010"):
        gguf.write(
            tmp_path / "x.gguf",
            {"general.architecture": "llama"},
            [gguf.Entry("output.weight", 0, (8,), lambda: [bytes(32)])],
        )
        Checkpoint.open(tmp_path)


# --- quantize -----------------------------------------------------------------------------------------------


def test_the_shipped_gguf_is_what_quantize_makes_of_the_shipped_checkpoint(tmp_path):
    quantize.write(quantize.plan(FP8_DIR, "Q4_K_M", "refimpl-tiny"), tmp_path / "x.gguf")
    made, shipped = gguf.read(tmp_path / "x.gguf"), gguf.read(GGUF_FILE)
    assert made.metadata == shipped.metadata
    assert [(t.name, t.dtype, t.shape, t.offset) for t in made.tensors.values()] == [
        (t.name, t.dtype, t.shape, t.offset) for t in shipped.tensors.values()
    ]
    assert (tmp_path / "x.gguf").read_bytes() == GGUF_FILE.read_bytes()


def test_the_mix_is_llama_cpps():
    """Published counts of DeepSeek-V3's Q4_K_M in the old style: 361 F32, 606 Q4_K, 58 Q6_K."""
    c = DeepSeekConfig()
    kinds = [stored.tensor_type(n, s, "Q4_K_M", 61, 256) for n, s in names.gguf_inventory(c).items()]
    assert {k: kinds.count(k) for k in set(kinds)} == {"F32": 361, "Q4_K": 606, "Q6_K": 58}
    downs = [
        i
        for i in range(3, 61)
        if stored.tensor_type(f"blk.{i}.ffn_down_exps.weight", (256, 7168, 2048), "Q4_K_M", 61, 256) == "Q6_K"
    ]
    assert downs == [3, 4, 5, 6, *range(9, 52, 3), *range(53, 61)] and len(downs) == 27


def test_rows_that_are_no_whole_blocks_get_a_smaller_format():
    assert stored.tensor_type("blk.0.attn_q_b.weight", (384, 96), "Q4_K_M", 4, 8) == "Q5_0"
    assert stored.tensor_type("output.weight", (97, 64), "Q4_K_M", 4, 8) == "Q8_0"
    assert stored.tensor_type("blk.0.attn_q_b.weight", (384, 50), "Q4_K_M", 4, 8) == "F16"


@pytest.mark.parametrize("mix", ["Q8_0", "Q6_K", "F16"])
def test_other_mixes_answer_as_the_checkpoint_does(tmp_path, mix):
    assert (
        run(
            quantize.main,
            ["--safetensor_path", str(FP8_DIR), "--output", str(tmp_path / "x.gguf"), "--type", mix],
        )
        == 0
    )
    truth, ours = (
        model(FP8_DIR, activations="exact").logits(IDS),
        model(tmp_path / "x.gguf", activations="exact").logits(IDS),
    )
    assert np.sqrt(np.mean((truth - ours) ** 2)) < {"Q8_0": 0.02, "Q6_K": 0.06, "F16": 0.002}[mix] * np.sqrt(
        np.mean(truth**2)
    )


def test_bf16_checkpoints_are_read_and_quantized(tmp_path):
    tensors = safetensors.read(FP8_DIR / "model.safetensors").tensors
    arrays = {}
    for name, info in tensors.items():
        if info.dtype == "F8_E4M3":
            w = ScaledFP8(safetensors.view(info), safetensors.view(tensors[name + "_scale_inv"]))
            arrays[name] = ("BF16", bf16.encode(fp8.weight_dequant(w)))
        elif not name.endswith("_scale_inv"):
            arrays[name] = (info.dtype, safetensors.view(info))
    safetensors.save(tmp_path / "model.safetensors", arrays)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        shutil.copy(FP8_DIR / file, tmp_path)
    plans = {"x.gguf": quantize.plan(tmp_path), "y.gguf": quantize.plan(FP8_DIR)}
    for name, p in plans.items():
        told: list[int] = []
        quantize.write(p, tmp_path / name, told.append)
        assert sum(told) == p.nbytes
    assert plans["x.gguf"].types == plans["y.gguf"].types
    truth, a, b = (
        dense(Checkpoint.open(f)["blk.1.ffn_gate_exps.weight"])
        for f in (FP8_DIR, tmp_path / "x.gguf", tmp_path / "y.gguf")
    )
    errors = [np.sqrt(np.mean((x - truth) ** 2) / np.mean(truth**2)) for x in (a, b)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01) and errors[0] < 0.1


def test_wrong_mixes_and_incomplete_checkpoints_are_refused(tmp_path):
    with pytest.raises(RefimplError, match="E4030"):
        quantize.plan(FP8_DIR, "IQ2_XXS")
    folder = shutil.copytree(FP8_DIR, tmp_path / "hf")
    arrays = {
        n: (t.dtype, np.array(safetensors.view(t)))
        for n, t in safetensors.read(folder / "model.safetensors").tensors.items()
    }
    del arrays["model.layers.2.mlp.experts.5.up_proj.weight"]
    safetensors.save(folder / "model.safetensors", arrays)
    with pytest.raises(RefimplError, match=r"E4010 .*expert 5 of blk\.2\.ffn_up_exps"):
        quantize.write(quantize.plan(folder), tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_every_quantized_type_is_known_to_the_reader():
    assert {formats.type_id(t) for t in stored.FALLBACK.values()} <= formats.FORMATS.keys()
