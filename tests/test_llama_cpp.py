"""llama.cpp loads the GGUF that `quantize` wrote, and does the embedded model's sums with it (extra
`peers`).
"""

import contextlib
import json
import shutil

import numpy as np
import pytest

from refimpl import chat, quantize
from refimpl.checkpoint import gguf
from refimpl.checkpoint.folder import Checkpoint
from refimpl.cli import run
from refimpl.config import DeepSeekConfig
from refimpl.devices.cpu import CpuBackend
from refimpl.model import Model
from refimpl.tiny import FP8_DIR, GGUF_FILE
from refimpl.training.evaluate import score
from refimpl.training.problems import problems
from refimpl.training.tokens import Encoder

llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama.cpp: the extra `peers`")
N = 100  # problems of a kind


@pytest.fixture(scope="module")
def llama():
    with contextlib.closing(llama_cpp.Llama(str(GGUF_FILE), n_ctx=512, n_threads=2, verbose=False)) as model:
        yield model


def logits(llama, ids: list[int]) -> np.ndarray:
    """float32 [vocab] after the ids, which are added to what llama.cpp has seen."""
    llama.eval(ids)
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama.ctx, -1), (llama.n_vocab(),)).copy()


def greedy(llama, prompt: list[int], end: int) -> list[int]:
    llama.reset()
    said = [int(logits(llama, prompt).argmax())]
    while said[-1] != end and len(said) < 256:
        said.append(int(logits(llama, said[-1:]).argmax()))
    return said


@pytest.mark.parametrize("kind", ["sum", "difference"])
def test_llama_cpp_does_the_sums_from_the_same_ids(llama, kind):
    encoder, asked = Encoder.open(FP8_DIR), problems(kind, "heldout", N, seed=3)
    theirs = (
        sum(
            encoder.answer(greedy(llama, encoder.prompt("", [], p.question), encoder.eos)) == p.answer
            for p in asked
        )
        / N
    )
    checkpoint = Checkpoint.open(GGUF_FILE)
    ours, _, _ = score(Model(DeepSeekConfig.from_dict(checkpoint.config), checkpoint), encoder, asked)
    print(f"{kind}: llama.cpp {theirs:.0%}, refimpl {ours:.0%}")
    assert ours >= 0.95 and abs(theirs - ours) <= 0.02


def test_llama_cpp_s_logits_are_ours_within_its_activation_rounding(llama):
    ids = Encoder.open(FP8_DIR).prompt("", [], "What is 123 + 456?")
    llama.reset()
    theirs = logits(llama, ids)
    checkpoint = Checkpoint.open(GGUF_FILE)
    ours = Model(DeepSeekConfig.from_dict(checkpoint.config), checkpoint).logits(ids)[-1]
    # Both round activations to 8 bits, by other rules and in other places.
    assert np.abs(ours - theirs).max() <= 0.05 * np.abs(ours).max() and ours.argmax() == theirs.argmax()


# --- GLM-4.7-Flash's shape ----------------------------------------------------------------------------------

TIES = 2e-3  # of the largest logit: llama.cpp's cache holds half precision, eleven bits, and ours float32
TOKENS = 32


@pytest.fixture(scope="module")
def flash(tmp_path_factory):
    """A random F32 GGUF of GLM-4.7-Flash's shape by gguf-py's writer, with the embedded model's tokenizer:
    20 heads, a width of values that is not that of keys, 4 of many experts in one group, three stop ids.
    """
    models = pytest.importorskip(
        "tests.family_models", reason="needs torch and transformers: the extra `test`"
    )
    kind, rng = models.KINDS["GLM-4.7-Flash"], np.random.default_rng(47)
    sizes = {"hidden_size": 160, "num_attention_heads": 20, "num_key_value_heads": 20, "q_lora_rank": 48}
    heads = {"kv_lora_rank": 64, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 32}
    experts = {"n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 64}
    layers = {"num_hidden_layers": 3, "first_k_dense_replace": 1, "intermediate_size": 256}
    layers["mlp_layer_types"] = ["dense", "sparse", "sparse"]
    text = gguf.read(GGUF_FILE).metadata
    raw = models.random_config(kind, rng) | sizes | heads | experts | layers
    raw |= {"vocab_size": len(text["tokenizer.ggml.tokens"]), "max_position_embeddings": 512}
    model = models.build(kind, raw, rng)
    path = tmp_path_factory.mktemp("flash") / "glm-4.7-flash.gguf"
    return models.save_gguf(kind, model, raw, path, {k: v for k, v in text.items() if "tokenizer." in k})


def test_llama_cpp_s_greedy_tokens_are_ours_where_logits_are_apart(flash):
    ids = Encoder.open(FP8_DIR).prompt("", [], "What is 123 + 456?")
    checkpoint = Checkpoint.open(flash)
    model = Model(DeepSeekConfig.from_dict(checkpoint.config), checkpoint, CpuBackend("cpu", "exact"))
    cache, new, apart = model.new_cache(), ids, 0
    with contextlib.closing(llama_cpp.Llama(str(flash), n_ctx=512, n_threads=2, verbose=False)) as theirs:
        for _ in range(TOKENS):
            ours, other = model.forward(new, cache, last_only=True)[0], logits(theirs, new)
            assert np.abs(ours - other).max() <= TIES * np.abs(ours).max()
            second, first = np.sort(ours)[-2:]
            if first - second > TIES * np.abs(ours).max():
                assert ours.argmax() == other.argmax()
                apart += 1
            new = [int(ours.argmax())]
    assert apart >= TOKENS // 2


def test_chat_answers_from_a_gguf_of_another_writer(flash, capsys):
    arguments = [
        "--gguf_path",
        str(flash),
        "--model_path",
        str(flash.parent),
        "-p",
        "What is 7 + 8?",
        "--greedy",
    ]
    assert run(chat.main, [*arguments, "--max_new_tokens", "8", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["token_ids"]) == 8 or report["finish_reason"] == "stop"


# --- the family's GGUFs, as `quantize` writes them ----------------------------------------------------------


@pytest.fixture(
    scope="module", params=["Moonlight", "DeepSeek-V2-Lite", "GLM-4.7-Flash", "DeepSeek-V3.2", "GLM-5"]
)
def quantized(request, tmp_path_factory):
    """A tiny member of the family as `quantize` writes it from transformers' folder, in F32."""
    models = pytest.importorskip(
        "tests.family_models", reason="needs torch and transformers: the extra `test`"
    )
    kind, rng, home = (
        models.KINDS[request.param],
        np.random.default_rng(48),
        tmp_path_factory.mktemp("member"),
    )
    raw = models.random_config(kind, rng) | {"first_k_dense_replace": 1}
    # llama.cpp knows that there is one matrix for the queries by the number of layers
    raw["num_hidden_layers"] = 27 if raw["q_lora_rank"] is None else 3
    raw |= {"hidden_size": 160, "num_attention_heads": 5, "num_key_value_heads": 5, "kv_lora_rank": 64}
    raw |= {"qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 32, "moe_intermediate_size": 64}
    raw |= {
        "q_lora_rank": raw["q_lora_rank"] and 48,
        "intermediate_size": 256,
        "max_position_embeddings": 512,
    }
    raw |= {"index_topk": 64, "index_head_dim": 128} if "index_topk" in raw else {}
    raw |= {"mlp_layer_types": ["dense", "sparse", "sparse"]} if "mlp_layer_types" in raw else {}
    raw |= {"vocab_size": len(gguf.read(GGUF_FILE).metadata["tokenizer.ggml.tokens"]), "eos_token_id": 1}
    folder = models.save(kind, models.build(kind, raw, rng), home / "hf")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FP8_DIR / file, folder / file)
    path = home / "model.gguf"
    assert run(quantize.main, ["--safetensor_path", str(folder), "--output", str(path), "--type", "F32"]) == 0
    return path


def test_llama_cpp_loads_what_quantize_wrote_of_the_family(quantized):
    """Prompts shorter than `index_topk`, below which sparse attention is attention."""
    ids = Encoder.open(FP8_DIR).prompt("", [], "What is 123 + 456?")
    checkpoint = Checkpoint.open(quantized)
    model = Model(DeepSeekConfig.from_dict(checkpoint.config), checkpoint, CpuBackend("cpu", "exact"))
    with contextlib.closing(llama_cpp.Llama(str(quantized), n_ctx=512, n_threads=2, verbose=False)) as theirs:
        ours, other = model.logits(ids)[-1], logits(theirs, ids)
    assert np.abs(ours - other).max() <= TIES * np.abs(ours).max()
