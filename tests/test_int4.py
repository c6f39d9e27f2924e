"""INT4 in groups of 32 as compressed-tensors packs it: decoded as that library does, loaded from folders like
Kimi-K2-Thinking's, and run, merged, quantized and refused.
"""

import base64
import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from refimpl import chat, convert_model, diff, plan, quantize
from refimpl.checkpoint.folder import Checkpoint
from refimpl.cli import run
from refimpl.config import DeepSeekConfig
from refimpl.conformance.inputs.draws import bf16_bits
from refimpl.devices.cpu import CpuBackend
from refimpl.errors import RefimplError
from refimpl.formats import int4
from refimpl.model import Model
from refimpl.reference import int4 as reference
from refimpl.reference.packed import dense
from refimpl.tensors import ScaledInt4
from refimpl.tiny import FP8_DIR

SCHEME = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
    "kv_cache_scheme": None,
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 32,
                "actorder": None,
                "dynamic": False,
                "observer": "minmax",
                "observer_kwargs": {},
            },
        }
    },
}


# --- beside the library -------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32), rows=st.integers(1, 5), groups=st.integers(1, 5))
def test_numbers_are_the_library_s(seed, rows, groups):
    """Those in float32 to the bit, and rounded to bfloat16 what it makes of scales in bfloat16."""
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    rng = np.random.default_rng(seed)
    q = rng.integers(-8, 8, (rows, 32 * groups)).astype(np.int8)
    scale = torch.from_numpy(rng.normal(0, 1, (rows, groups)).astype(np.float32)).bfloat16()
    words = library.pack_to_int32(torch.from_numpy(q), 4)
    w = ScaledInt4(words.numpy().view(np.uint8), scale.view(torch.int16).numpy().view(np.uint16))
    np.testing.assert_array_equal(int4.decode(w.codes), q)
    np.testing.assert_array_equal(int4.encode(q), w.codes)
    fields = SCHEME["config_groups"]["group_0"]["weights"]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**fields))
    for kind in (torch.float32, torch.bfloat16):
        state = {
            "weight_packed": words,
            "weight_scale": scale.to(kind),
            "weight_shape": torch.tensor(q.shape),
        }
        theirs = library.PackedQuantizationCompressor.decompress(state, scheme)["weight"]
        ours = torch.from_numpy(reference.weight_dequant(w)).to(kind)
        assert w.shape == q.shape and torch.equal(ours, theirs.to(kind))


def test_an_odd_number_of_columns_cannot_be_packed():
    with pytest.raises(ValueError, match="even number of columns"):
        int4.encode(np.zeros((2, 33), np.int8))


# --- folders ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def member(tmp_path_factory):
    """A random tiny Kimi-K2: transformers' folder with its routed experts packed, the same experts as
    float32 in another, and its GGUF.
    """
    family = pytest.importorskip("tests.family_models", reason="needs torch and transformers")
    kind, rng, home = family.KINDS["Kimi-K2"], np.random.default_rng(32), tmp_path_factory.mktemp("int4")
    raw = family.random_config(kind, rng) | {"hidden_size": 96, "moe_intermediate_size": 64}
    raw["vocab_size"] = json.loads((FP8_DIR / "config.json").read_text())["vocab_size"]
    raw |= {
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "rope_parameters": kind.fixed["rope_parameters"],
    }
    model = family.build(kind, raw, rng)
    family.save_gguf(kind, model, raw, home / "model.gguf")
    plain, packed = (family.save(kind, model, home / name) for name in ("plain", "packed"))
    tensors = {name: np.array(x) for name, x in read(plain).items()}
    experts = [name for name in tensors if ".experts." in name]
    for name in experts:
        w = round_to_int4(tensors[name])
        tensors[name] = dense(w)
    (plain / "model.safetensors").unlink()
    save_file(tensors, plain / "model.safetensors")
    for name in experts:
        w = round_to_int4(tensors.pop(name))
        stem = name.removesuffix(".weight")
        tensors[stem + ".weight_packed"] = w.codes.view(np.int32)
        tensors[stem + ".weight_scale"] = w.scale
        tensors[stem + ".weight_shape"] = np.array(w.shape, np.int64)
    (packed / "model.safetensors").unlink()
    save_as_bf16(tensors, packed / "model.safetensors")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FP8_DIR / file, packed / file)
    config = json.loads((packed / "config.json").read_text()) | {"quantization_config": SCHEME}
    (packed / "config.json").write_text(json.dumps(config))
    return home


def read(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def round_to_int4(x: np.ndarray) -> ScaledInt4:
    """The nearest integers under scales that make the largest of a group 7; what is exact stays so."""
    groups = x.reshape(*x.shape[:-1], -1, 32)
    bits = bf16_bits(np.abs(groups).max(axis=-1) / 7)
    scale = reference.scales(ScaledInt4(np.zeros((0,)), bits))[..., None]
    return ScaledInt4(int4.encode(np.clip(np.rint(groups / scale), -8, 7).reshape(x.shape)), bits)


def save_as_bf16(tensors, path):
    """Scales u16 as the BF16 that their bits are."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    def tensor(x):
        return (
            torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
            if x.dtype == np.uint16
            else torch.from_numpy(x)
        )

    save_file({name: tensor(x) for name, x in tensors.items()}, path)


def logits(path, backend):
    checkpoint = Checkpoint.open(path)
    return Model(DeepSeekConfig.from_dict(checkpoint.config), checkpoint, backend).logits(
        [1, 2, 3, 4, 5, 6, 7]
    )


@pytest.mark.parametrize("activations", ["fp8", "exact"])
def test_a_packed_folder_gives_the_logits_of_its_numbers(member, activations, monkeypatch):
    """On every backend, and in both modes: activations of INT4 are not rounded."""
    monkeypatch.setenv("REFIMPL_CUDA_DEVICE", "cpu")
    cuda = pytest.importorskip("refimpl.devices.cuda")
    true = logits(member / "plain", CpuBackend("reference", "exact"))
    for backend in (CpuBackend("reference", activations), CpuBackend("cpu", activations)):
        assert np.abs(logits(member / "packed", backend) - true).max() <= 1e-5 * np.abs(true).max()
    # float32 where activations are exact, else what a GPU keeps: bfloat16
    slack = 1e-5 if activations == "exact" else 3e-2
    found = logits(member / "packed", cuda.CudaBackend(activations=activations))
    assert np.abs(found - true).max() <= slack * np.abs(true).max()


def test_experts_are_views_of_the_file_and_are_planned_as_packed(member, capsys):
    checkpoint = Checkpoint.open(member / "packed")
    w = checkpoint["blk.1.ffn_gate_exps.weight"][0]
    assert isinstance(w, ScaledInt4) and w.shape == (64, 96) and not w.codes.flags.writeable
    assert run(plan.main, ["--model_path", str(member / "packed"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    experts = [item for item in report["parts"] if item["name"] == "routed experts"]
    count = len(checkpoint["blk.1.ffn_gate_exps.weight"])
    assert [item["nbytes"] for item in experts] == [3 * count * (64 * 96 // 2 + 64 * 96 // 32 * 2)]


def test_diff_sees_the_same_model(member, capsys):
    assert run(diff.main, [str(member / "plain"), str(member / "packed"), "--json"]) == 0
    capsys.readouterr()


def test_quantize_writes_what_the_integers_stand_for(member, tmp_path, capsys):
    target = tmp_path / "f32.gguf"
    assert (
        run(
            quantize.main,
            ["--safetensor_path", str(member / "packed"), "--output", str(target), "--type", "F32"],
        )
        == 0
    )
    exact = CpuBackend("reference", "exact")
    true = logits(member / "plain", exact)
    assert np.abs(logits(target, exact) - true).max() <= 1e-5 * np.abs(true).max()


def test_a_merge_takes_the_experts_from_the_gguf(member, tmp_path, capsys):
    arguments = ["--safetensor_path", str(member / "packed"), "--gguf_path", str(member / "model.gguf")]
    assert run(convert_model.main, [*arguments, "--output_path", str(tmp_path / "merged")]) == 0, (
        capsys.readouterr()
    )
    exact = CpuBackend("reference", "exact")
    true = logits(member / "model.gguf", exact)
    assert np.abs(logits(tmp_path / "merged", exact) - true).max() <= 1e-5 * np.abs(true).max()


# --- refused ------------------------------------------------------------------------------------------------

OTHERS = {
    "asymmetric": ({"symmetric": False}, "symmetric"),
    "other groups": ({"group_size": 128}, "group_size"),
    "eight bits": ({"num_bits": 8}, "num_bits"),
    "no width": ({"num_bits": 0}, "num_bits"),
    "channels": ({"strategy": "channel", "group_size": None}, "strategy"),
    "another order": ({"actorder": "weight"}, "actorder"),
    "floats": ({"type": "float"}, "type"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_schemes_are_refused_by_the_field_that_says_so(member, name):
    change, key = OTHERS[name]
    raw = json.loads((member / "packed" / "config.json").read_text())
    raw["quantization_config"]["config_groups"]["group_0"]["weights"] |= change
    with pytest.raises(RefimplError, match=rf"E4002 .*{key} is not supported"):
        DeepSeekConfig.from_dict(raw)


def test_rounded_activations_are_refused(member):
    raw = json.loads((member / "packed" / "config.json").read_text())
    raw["quantization_config"]["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    with pytest.raises(RefimplError, match=r"E4002 .*input_activations"):
        DeepSeekConfig.from_dict(raw)


def changed(member, tmp_path, edit):
    """A copy of the packed folder whose tensors `edit` has changed."""
    tensors = bf16_as_u16(member / "packed")
    edit(tensors)
    save_as_bf16(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((member / "packed" / "config.json").read_text())
    return tmp_path


def bf16_as_u16(folder):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    return {
        name: x.view(torch.int16).numpy().view(np.uint16) if x.dtype == torch.bfloat16 else x.numpy()
        for name, x in load_file(folder / "model.safetensors").items()
    }


STEM = "model.layers.1.mlp.experts.0.gate_proj"
DAMAGES = {
    "no scale": (lambda t: t.pop(f"{STEM}.weight_scale"), "E4013 .*weight_scale is missing"),
    "no shape": (lambda t: t.pop(f"{STEM}.weight_shape"), "E4013 .*weight_shape is missing"),
    "another shape": (
        lambda t: t.update({f"{STEM}.weight_shape": np.array([64, 95])}),
        "E4014 .*weight_shape",
    ),
    "fewer scales": (
        lambda t: t.update({f"{STEM}.weight_scale": np.ones((64, 1), np.uint16)}),
        "E4014 .*weight_scale",
    ),
    "a scale of NaN": (
        lambda t: t[f"{STEM}.weight_scale"].__setitem__((3, 1), 0x7FC0),
        "E4018 .*weight_scale",
    ),
    "zero points": (
        lambda t: t.update({f"{STEM}.weight_zero_point": np.zeros((8, 3), np.int32)}),
        "E4002 .*weights with zero points",
    ),
    "columns in order": (
        lambda t: t.update({f"{STEM}.weight_g_idx": np.zeros(96, np.int32)}),
        "E4002 .*columns in another order",
    ),
    "half a group": (
        lambda t: t.update({f"{STEM}.weight_packed": np.zeros((64, 2), np.int32)}),
        "E4014 .*weight_packed",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_does_not_fit_is_one_line(member, tmp_path, name):
    edit, line = DAMAGES[name]
    folder = changed(member, tmp_path, edit)
    with pytest.raises(RefimplError, match=line):
        Checkpoint.open(folder)["blk.1.ffn_gate_exps.weight"][0]


def test_a_merge_refuses_other_packed_matrices(member, tmp_path):
    name = "model.layers.0.mlp.gate_proj"

    def pack(tensors):
        rows, columns = tensors.pop(f"{name}.weight").shape
        tensors[f"{name}.weight_packed"] = np.zeros((rows, columns // 8), np.int32)

    (tmp_path / "hf").mkdir()
    folder = changed(member, tmp_path / "hf", pack)
    arguments = ["--safetensor_path", str(folder), "--gguf_path", str(member / "model.gguf")]
    with pytest.raises(RefimplError, match=rf"E3109 .*{name}\.weight_packed"):
        convert_model.main([*arguments, "--output_path", str(tmp_path / "merged")])


def test_a_folder_with_tiktoken_s_ranks_chats(member, tmp_path, capsys):
    """As Kimi-K2-Thinking comes: packed experts, a tiktoken.model and no tokenizer.json."""
    pytest.importorskip("tiktoken", reason="reads Kimi-K2's tokenizer: the extra `tiktoken`")
    folder = shutil.copytree(member / "packed", tmp_path / "kimi")
    (folder / "tokenizer.json").unlink()
    lines = [base64.b64encode(bytes([b])).decode() + f" {b}" for b in range(256)]
    (folder / "tiktoken.model").write_text("\n".join(lines) + "\n")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}<|im_assistant|>"
    named = {256: "[BOS]", 257: "[EOS]", 258: "<|im_assistant|>"}
    config = {
        "tokenizer_class": "TikTokenTokenizer",
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "added_tokens_decoder": {str(i): {"content": t, "special": True} for i, t in named.items()},
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    words = ["--model_path", str(folder), "-p", "Hello", "--greedy", "--max_new_tokens", "4", "--json"]
    assert run(chat.main, words) == 0, capsys.readouterr().err
    report = json.loads(capsys.readouterr().out)
    assert report["stats"]["prompt_tokens"] == 6
    assert len(report["token_ids"]) == 4 or report["finish_reason"] == "stop"
