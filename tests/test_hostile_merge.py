"""Inputs that do not belong together, M74-M88, and weights with values that no model has, V89-V96 of the bad
inputs.
"""

import json
import shutil

import numpy as np
import pytest

from refimpl import chat, convert_model, formats
from refimpl.checkpoint import gguf, safetensors
from refimpl.checkpoint.folder import Checkpoint
from refimpl.formats import bf16, q4_k
from refimpl.reference import fp8, linear
from refimpl.tiny import FP8_DIR, GGUF_DIR, GGUF_FILE
from tests.test_convert_model import payload, regguf, rewrite, sources

CONFIG = json.loads((FP8_DIR / "config.json").read_text())
FP8 = CONFIG["quantization_config"]


def fp8_folder(folder, change=lambda name, value: value, **config):
    """A copy of the embedded checkpoint, tensors and config changed."""
    rewrite(FP8_DIR, folder, change)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    return folder


def without(*parts):
    """Drops the tensors whose names have one of the parts: for `rewrite`."""
    return lambda name, value: None if any(p in name for p in parts) else value


def gguf_without(*parts):
    return lambda entry: None if any(p in entry.name for p in parts) else entry


# --- M: the two sides of a merge ----------------------------------------------------------------------------


def test_m74_a_folder_that_is_already_merged(refused, hybrid_folder, tmp_path):
    refused.merge("E3101", hybrid_folder, output=tmp_path / "out", names=hybrid_folder.name)
    bare = rewrite(
        hybrid_folder, tmp_path / "bare", lambda name, value: value
    )  # by KTransformers: no manifest of ours
    for name in (convert_model.MANIFEST, safetensors.INDEX):
        (bare / name).unlink()
    refused.merge("E3101", bare, output=tmp_path / "out", names="bare")


@pytest.mark.parametrize("paths", [(GGUF_DIR, FP8_DIR), (FP8_DIR, FP8_DIR), (GGUF_DIR, GGUF_DIR)])
def test_m75_paths_mixed_up(paths, refused, tmp_path):
    refused.merge("E3102", *paths, output=tmp_path / "out")


@pytest.mark.parametrize("name", ["output_norm.weight", "blk.2.exp_probs_b.bias"])
def test_m76_two_models_of_one_shape(name, refused, tmp_path):
    """DeepSeek-V3 and R1 have the same names and shapes; their norms and routers differ."""

    def change(e):
        return (
            e._replace(
                chunks=lambda: [np.nextafter(np.frombuffer(b"".join(e.chunks()), "<f4"), np.inf).tobytes()]
            )
            if e.name == name
            else e
        )

    refused.merge(
        "E3106", gguf_path=regguf(tmp_path / "r1.gguf", change), output=tmp_path / "out", names=name
    )


def test_m77_configs_and_shapes_of_another_model(refused, tmp_path):
    for code, change in [
        ("E4001", {"model_type": "deepseek_v4"}),
        ("E3104", {"hidden_size": 512}),
        ("E3104", {"moe_intermediate_size": 512}),
        ("E3104|E3105", {"q_lora_rank": None}),
    ]:
        folder = fp8_folder(tmp_path / "hf", **change)
        refused.merge(code, folder, output=tmp_path / "out", names="hf")
        shutil.rmtree(folder)


def test_m78_a_layer_is_missing_in_the_gguf(refused, tmp_path):
    model = regguf(tmp_path / "m.gguf", gguf_without("blk.3."))
    refused.merge("E3103", gguf_path=model, output=tmp_path / "out", names="blk.3.ffn_gate_exps")


def test_m79_layers_more_and_layers_fewer_than_the_config_says(accepted, refused, tmp_path):
    """A layer behind the last is multi-token prediction, in the checkpoint as in the GGUF, and left out."""
    more = fp8_folder(tmp_path / "more", num_hidden_layers=5)
    refused.merge("E3105", more, output=tmp_path / "out", names="model.layers.4.")
    fewer = fp8_folder(tmp_path / "fewer", num_hidden_layers=3)
    folder = accepted.merge(fewer, output=tmp_path / "out")
    assert not any("blk.3." in name for name in safetensors.read_folder(folder)[0])


@pytest.mark.parametrize("dense", [0, 2])
def test_m80_another_number_of_dense_layers(dense, refused, tmp_path):
    folder = fp8_folder(tmp_path / "hf", first_k_dense_replace=dense)
    refused.merge("E3105", folder, output=tmp_path / "out", names=f"model.layers.{min(dense, 1)}.mlp.")
    model = regguf(
        tmp_path / "m.gguf", gguf_without("blk.1.ffn_gate_exps", "blk.1.ffn_up_exps", "blk.1.ffn_down_exps")
    )
    refused.merge("E3103", gguf_path=model, output=tmp_path / "out", names="blk.1.")


def test_m81_another_number_of_experts(refused, tmp_path):
    def half(e):
        return (
            e._replace(shape=(4, *e.shape[1:]), chunks=lambda: [bytes(e.nbytes // 2)])
            if "_exps" in e.name
            else e
        )

    line = refused.merge(
        "E3104", gguf_path=regguf(tmp_path / "m.gguf", half), output=tmp_path / "out", names="m.gguf"
    )
    assert "found [4, 256, 256], expected [8, 256, 256]" in line


def test_m82_experts_transposed(refused, tmp_path):
    few = {
        "n_group": 2,
        "topk_group": 2,
        "vocab_size": 256,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
    }
    hf, model = sources(tmp_path / "v3", few | {"num_nextn_predict_layers": 0}, lambda layer, part: 12)
    stacks = [e._replace(shape=(e.shape[0], e.shape[2], e.shape[1])) for e in entries(model / "model.gguf")]
    with open(model / "model.gguf", "wb") as file:
        file.write(gguf.head({"general.architecture": "deepseek2"}, stacks))
        file.truncate(file.tell() + sum(e.nbytes for e in stacks))
    line = refused.merge("E3104", hf, model, output=tmp_path / "out", names="model.gguf")
    assert "found [8, 7168, 2048], expected [8, 2048, 7168]" in line


def entries(path):
    return [
        gguf.Entry(n, formats.type_id(t.dtype), t.shape, lambda t=t: [payload(t)])
        for n, t in gguf.read(path).tensors.items()
    ]


@pytest.mark.parametrize("part", ["gate", "up", "down"])
def test_m83_one_of_gate_up_and_down_is_missing(part, refused, tmp_path):
    model = regguf(tmp_path / "m.gguf", gguf_without(f"blk.2.ffn_{part}_exps"))
    refused.merge(
        "E3103", gguf_path=model, output=tmp_path / "out", names=f"blk.2.ffn_{part}_exps.weight is missing"
    )


def one_by_one(path, change=lambda entry: entry):
    """The embedded GGUF with a tensor for each expert, as llama.cpp's converter of 2023 wrote them."""
    singles = []
    for e in entries(GGUF_FILE):
        for i in range(8) if "_exps" in e.name else ():
            step = e.nbytes // 8
            whole = e.chunks
            one = e._replace(
                name=e.name.replace("_exps", f".{i}"),
                shape=e.shape[1:],
                chunks=lambda i=i, step=step, whole=whole: [b"".join(whole())[i * step : (i + 1) * step]],
            )
            if (one := change(one)) is not None:
                singles.append(one)
    gguf.write(path, {"general.architecture": "deepseek2"}, singles)
    return path


def test_m84_a_tensor_for_each_expert_gives_the_same_bytes(accepted, refused, hybrid_folder, tmp_path):
    folder = accepted.merge(gguf_path=one_by_one(tmp_path / "old.gguf"), output=tmp_path / "out")
    for path in hybrid_folder.glob("*.safetensors"):
        assert (folder / path.name).read_bytes() == path.read_bytes()
    lacking = one_by_one(tmp_path / "lacking.gguf", gguf_without("blk.2.ffn_up.5.weight"))
    refused.merge(
        "E3103|E3104", gguf_path=lacking, output=tmp_path / "out2", names="blk.2.ffn_up_exps.weight"
    )


def test_m85_a_gguf_with_either_form_of_kv_b_is_merged(accepted, hybrid_folder, tmp_path):
    """The checkpoint's is taken."""

    def halves(e):
        return e._replace(name=e.name.replace("attn_kv_b", "attn_k_b")) if "attn_kv_b" in e.name else e

    folder = accepted.merge(gguf_path=regguf(tmp_path / "new.gguf", halves), output=tmp_path / "out")
    for path in hybrid_folder.glob("*.safetensors"):
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_m86_types_mixed_in_a_layer_are_usual(accepted, hybrid_folder, tmp_path):
    kinds = {e.name: e.ggml_type for e in entries(GGUF_FILE) if "_exps" in e.name}
    assert len(set(kinds.values())) > 1

    def q8(e):
        return (
            e._replace(ggml_type=8, chunks=lambda: [bytes(formats.nbytes(8, e.shape))])
            if "blk.2.ffn_up_exps" in e.name
            else e
        )

    folder = accepted.merge(gguf_path=regguf(tmp_path / "m.gguf", q8), output=tmp_path / "out")
    assert Checkpoint.open(folder)["blk.2.ffn_up_exps.weight"].ggml_type == 8


def test_m86_types_mixed_in_a_stack_are_not(refused, tmp_path):
    def q8(e):
        return (
            e._replace(ggml_type=8, chunks=lambda: [bytes(formats.nbytes(8, e.shape))])
            if e.name == "blk.2.ffn_up.5.weight"
            else e
        )

    refused.merge(
        "E3104",
        gguf_path=one_by_one(tmp_path / "m.gguf", q8),
        output=tmp_path / "out",
        names="blk.2.ffn_up_exps.weight",
    )


def test_m87_the_routers_bias(accepted, refused, tmp_path):
    """It comes from the checkpoint, so that a GGUF may be without."""
    accepted.merge(
        gguf_path=regguf(tmp_path / "m.gguf", gguf_without("exp_probs_b")), output=tmp_path / "out"
    )
    folder = fp8_folder(tmp_path / "hf", without("layers.2.mlp.gate.e_score_correction_bias"))
    refused.merge(
        "E3105", folder, output=tmp_path / "out2", names="model.layers.2.mlp.gate.e_score_correction_bias"
    )


CONFIGS = {
    "another model": ({"model_type": "llama"}, "E4001"),
    "no model type": ({"model_type": None}, "E4001"),
    "blocks of 64": ({"quantization_config": FP8 | {"weight_block_size": [64, 128]}}, "E4002"),
    "no block size": (
        {"quantization_config": {k: v for k, v in FP8.items() if k != "weight_block_size"}},
        "E4002",
    ),
    "blocks as a number": ({"quantization_config": FP8 | {"weight_block_size": 128}}, "E4002"),
    "a list for a scheme": ({"quantization_config": [FP8]}, "E4002|E4003"),
    "e5m2": ({"quantization_config": FP8 | {"fmt": "e5m2"}}, "E4002"),
    "AWQ": ({"quantization_config": {"quant_method": "awq"}}, "E4002"),
    "softmax": ({"scoring_func": "softmax"}, "E4002"),
    "a router that nobody knows": ({"topk_method": "best"}, "E4002"),
    "a dictionary for a router": ({"topk_method": {}}, "E4002"),
    "dense layers in between": ({"mlp_layer_types": ["sparse", "dense"]}, "E4002"),
    "text for the kinds of layers": ({"mlp_layer_types": "dense"}, "E4002"),
    "text for a size": ({"hidden_size": "256"}, "E4003"),
    "a fraction for a size": ({"hidden_size": 256.5}, "E4003"),
    "true for a size": ({"hidden_size": True}, "E4003"),
    "infinity": ({"rope_theta": float("inf")}, "E4003"),
    "NaN": ({"rope_theta": float("nan")}, "E4003"),
    "10^400": ({"max_position_embeddings": 10**400}, "E4003"),
    "text for rope_parameters": ({"rope_theta": None, "rope_parameters": "x"}, "E4003"),
    "a list for rope_scaling": ({"rope_scaling": [1]}, "E4003"),
    "a dictionary for a kind": ({"rope_scaling": {"type": {}}}, "E4002"),
    "negative": ({"hidden_size": -256}, "E4004"),
    "groups that do not divide": ({"n_group": 3}, "E4004"),
    "a million layers": ({"num_hidden_layers": 10**6}, "E4004"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_m88_configs(case, refused, tmp_path):
    change, code = CONFIGS[case]
    folder = shutil.copytree(FP8_DIR, tmp_path / "hf")
    (folder / "config.json").write_text(json.dumps(CONFIG | change))
    refused.merge(code, folder, output=tmp_path / "out", names="config.json")


def test_m88_a_config_that_is_none(refused, tmp_path, monkeypatch):
    import os

    folder = shutil.copytree(FP8_DIR, tmp_path / "hf")
    path = folder / "config.json"
    for text, code in (
        (b"", "E4003"),
        (b"[]", "E4003"),
        (b"\xff", "E4003"),
        (b"[" * 100_000, "E4003"),
        (b"version https://git-lfs", "E4003"),
    ):
        path.write_bytes(text)
        refused.merge(code, folder, output=tmp_path / "out", names="config.json")
    path.unlink()
    refused.merge("E4020", folder, output=tmp_path / "out", names="hf")
    os.mkfifo(path)
    refused.merge("E5002", folder, output=tmp_path / "out", names="config.json")


# --- V: values ----------------------------------------------------------------------------------------------

WEIGHT = "blk.1.attn_q_b.weight"


def changed(hybrid_folder, folder, change):
    """A copy of the merged model with other values, in one file and without index and manifest."""
    rewrite(hybrid_folder, folder, change)
    for name in (convert_model.MANIFEST, safetensors.INDEX):
        (folder / name).unlink()
    return folder


def put(name, value, at=0):
    """Puts one value into the tensor of that name: for `changed`."""

    def change(n, old):
        if n == name:
            old[1].reshape(-1)[at] = value
        return old

    return change


def ask(folder):
    return ("--gguf_path", folder, "-p", "What is 1 + 2?", "--greedy")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0])
def test_v89_multipliers_that_are_none(value, refused, hybrid_folder, tmp_path):
    folder = changed(hybrid_folder, tmp_path / "m", put(WEIGHT + "_scale_inv", value, 1))
    line = refused("E4018", chat.main, *ask(folder), names=WEIGHT + "_scale_inv")
    assert f"found {value} at [1, 0]" in line and "model.safetensors" in line


def test_v89_nothing_but_zeros_is_a_hole_in_a_download(refused, hybrid_folder, tmp_path):
    zeros = lambda n, v: (v[0], np.zeros_like(v[1])) if n == WEIGHT + "_scale_inv" else v  # noqa: E731
    refused(
        "E4018", chat.main, *ask(changed(hybrid_folder, tmp_path / "m", zeros)), names="nothing but zeros"
    )


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-40])
def test_v89_a_zero_among_others_and_subnormals_are_numbers(value, hybrid_folder, tmp_path):
    weight = Checkpoint.open(changed(hybrid_folder, tmp_path / "m", put(WEIGHT + "_scale_inv", value)))[
        WEIGHT
    ]
    tile = fp8.weight_dequant(weight)[:128, :128]
    assert np.isfinite(tile).all() and (tile.any() == (value != 0))


@pytest.mark.parametrize(
    "shape", [lambda s: s[:1], lambda s: np.repeat(s, 2, 0), lambda s: s.reshape(-1), lambda s: s.T.copy()]
)
def test_v90_scales_of_the_wrong_shape(shape, refused, tmp_path):
    # not square, and a last tile that is not full
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight_scale_inv"
    folder = fp8_folder(tmp_path / "hf", lambda n, v: (v[0], shape(v[1])) if n == name else v)
    refused.merge("E4014", folder, output=tmp_path / "out", names=name)
    refused("E4014", chat.main, *ask(folder), names="attn_kv_a_mqa" if "blk" in name else name)


def test_v91_scales_that_are_missing_or_in_another_file(accepted, refused, tmp_path):
    name = "model.layers.1.self_attn.o_proj.weight_scale_inv"
    folder = fp8_folder(tmp_path / "hf", without(name))
    refused.merge("E4013", folder, output=tmp_path / "out", names=name)
    refused("E4013", chat.main, *ask(folder), names=name)
    info = safetensors.read_folder(FP8_DIR)[0][name]
    safetensors.save(folder / "other.safetensors", {name: ("F32", np.array(safetensors.view(info)))})
    accepted.merge(folder, output=tmp_path / "out")
    assert Checkpoint.open(folder)["blk.1.attn_output.weight"].scale.shape == info.shape


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_v92_fp8_codes_of_nan_are_nan_and_said_to_be(code, refused, hybrid_folder, tmp_path):
    folder = changed(hybrid_folder, tmp_path / "m", put(WEIGHT, code))
    assert np.isnan(fp8.weight_dequant(Checkpoint.open(folder)[WEIGHT])).sum() == 1
    refused("E4040", chat.main, *ask(folder), names="the logits are not numbers")


def q4_k_stack(hybrid_folder):
    """Name of a stack of Q4_K experts in the first layer that has experts."""
    found = Checkpoint.open(hybrid_folder)
    return next(
        n for n in found if n.startswith("blk.1.") and "_exps" in n and found[n].ggml_type == q4_k.GGML_TYPE
    )


@pytest.mark.parametrize(("half", "which"), [(0x7E00, 0), (0xFC00, 0), (0x7C00, 2)])
def test_v93_scales_of_a_block_that_are_no_numbers_make_weights_that_are_none(
    half, which, refused, hybrid_folder, tmp_path
):
    stack = q4_k_stack(hybrid_folder)

    def change(n, old):
        if n == stack:  # the first block of every row of every expert: whichever is chosen, it shows
            old[1].reshape(-1, 144)[:, which : which + 2] = np.frombuffer(np.uint16(half).tobytes(), np.uint8)
        return old

    folder = changed(hybrid_folder, tmp_path / "m", change)
    refused("E4040", chat.main, *ask(folder), names="the weights are damaged")


def test_v93_negative_scales_of_a_block_are_numbers():
    block = np.zeros(144, np.uint8)
    block[:2] = np.frombuffer(np.float16(-1).tobytes(), np.uint8)
    block[4:16], block[16:] = 1, 0x21
    found = formats.dequantize(q4_k.GGML_TYPE, block)
    assert np.isfinite(found).all() and found.min() < 0 and found.max() <= 0


@pytest.mark.parametrize("kind", sorted(formats.FORMATS))
def test_v94_a_block_of_zero_bytes_is_a_block_of_zeros(kind):
    module = formats.get(kind)
    assert not formats.dequantize(kind, np.zeros(module.BLOCK.itemsize, np.uint8)).any()


def test_v95_activations_of_zeros_and_of_no_numbers():
    """Zeros stay zeros, though their group has no maximum to divide by; what is no number reaches its own row
    alone.
    """
    x = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
    x[1], x[2, 7], x[3, 9] = 0, np.nan, np.inf
    codes, scale = fp8.act_quant(x)
    assert np.isfinite(scale[:2]).all() and not (codes[1] & 0x7F).any()
    weight = fp8.weight_quant(np.random.default_rng(1).standard_normal((128, 256)).astype(np.float32))
    y = linear.linear(x, weight, "fp8")
    assert np.isfinite(y[0]).all() and not y[1].any() and np.isnan(y[2]).all() and not np.isfinite(y[3]).any()


def test_v96_multipliers_in_bf16(refused, hybrid_folder, tmp_path):
    name = "model.layers.1.self_attn.q_b_proj.weight_scale_inv"
    folder = fp8_folder(tmp_path / "hf", lambda n, v: ("BF16", bf16.encode(v[1])) if n == name else v)
    refused.merge("E4014", folder, output=tmp_path / "out", names=name)
    merged = changed(
        hybrid_folder,
        tmp_path / "m",
        lambda n, v: ("BF16", bf16.encode(v[1])) if n == WEIGHT + "_scale_inv" else v,
    )
    refused("E4014", chat.main, *ask(merged), names=WEIGHT + "_scale_inv")
