"""The model against transformers, with cache against without, absorbed against naive, and its answers to
wrong weights.
"""

import itertools
import json
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.checkpoint.folder import Checkpoint
from refimpl.config import DeepSeekConfig
from refimpl.devices.cpu import CpuBackend
from refimpl.errors import MismatchError, ResourceError
from refimpl.model import Model
from refimpl.reference import attention
from refimpl.tiny import FP8_DIR, GGUF_DIR
from refimpl.training.problems import problems
from refimpl.training.tokens import Encoder

oracle = pytest.importorskip("tests.oracle_hf", reason="needs torch and transformers: the extra `test`")
SMALL = oracle.SMALL

VARIANTS = {
    "yarn, ragged rows": {},
    "no yarn": {"rope_scaling": None},
    "no q_lora": {"q_lora_rank": None},
    "one group": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 3},
    "two groups, not normalized": {
        "n_group": 2,
        "topk_group": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
    "many groups, two shared": {
        "n_group": 4,
        "topk_group": 3,
        "num_experts_per_tok": 4,
        "n_shared_experts": 2,
        "num_hidden_layers": 4,
    },
    "ragged columns, two dense": {
        "hidden_size": 512,
        "v_head_dim": 40,
        "first_k_dense_replace": 2,
        "kv_lora_rank": 200,
    },
    "yarn with two mscales": {
        "rope_scaling": SMALL["rope_scaling"] | {"mscale": 0.7, "mscale_all_dim": 1.3, "factor": 4.0}
    },
}


def build(overrides: dict, seed: int = 0, activations: str = "exact", **kwargs) -> tuple[dict, dict, Model]:
    raw = SMALL | overrides
    weights = oracle.random_checkpoint(raw, seed, **kwargs)
    return raw, weights, Model(DeepSeekConfig.from_dict(raw), weights, CpuBackend("reference", activations))


@pytest.mark.parametrize("variant", VARIANTS)
def test_exact_logits_are_transformers_logits(variant):
    raw, weights, model = build(VARIANTS[variant], seed=zlib.crc32(variant.encode()))
    ids = (
        np.random.default_rng(1).integers(0, raw["vocab_size"], 70).tolist()
    )  # longer than the original context of the YaRN variants
    ours, theirs = model.logits(ids), oracle.transformers_logits(raw, weights, ids)
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("folder", [FP8_DIR, GGUF_DIR], ids=["FP8", "GGUF"])
def test_exact_logits_of_the_embedded_model_are_transformers_logits(folder):
    checkpoint = Checkpoint.open(folder)
    raw = json.loads((FP8_DIR / "config.json").read_text())
    ids, _ = Encoder.open(FP8_DIR).example("", problems("product", "heldout", 3, seed=1))
    ours = Model(DeepSeekConfig.from_dict(raw), checkpoint, CpuBackend("reference", "exact")).logits(ids)
    theirs = oracle.transformers_logits(raw, checkpoint, ids)
    assert len(ids) > 100 and np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize(
    "types", [(8, 8, 8), (10, 10, 11), (13, 12, 14)], ids=["Q8_0", "Q2_K and Q3_K", "Q5_K, Q4_K, Q6_K"]
)
def test_other_expert_types_agree_with_transformers_too(types):
    if 11 in types:
        types = tuple(
            10 if t == 11 else t for t in types
        )  # Q3_K has no quantizer; its decoder is tested in test_formats
    raw, weights, model = build({}, seed=5, expert_types=types)
    ids = list(range(20))
    theirs = oracle.transformers_logits(raw, weights, ids)
    assert np.abs(model.logits(ids) - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_a_wrong_constant_is_noticed():
    """The comparison above would see a missing bias, scale or group limit."""
    raw, weights, model = build({})
    ids = list(range(30))
    right = model.logits(ids)
    for change in (
        {"routed_scaling_factor": 2.4},
        {"topk_group": 3},
        {"rope_scaling": None},
        {"norm_topk_prob": False},
    ):
        config, backend = DeepSeekConfig.from_dict(raw | change), CpuBackend("reference", "exact")
        wrong = Model(config, weights, backend).logits(ids)
        assert np.abs(wrong - right).max() > 1e-3 * np.abs(right).max(), change


@given(cuts=st.lists(st.integers(1, 29), max_size=4, unique=True))
def test_decoding_with_the_cache_equals_no_cache(cuts):
    ids = np.random.default_rng(2).integers(0, 97, 30).tolist()
    cache = MODEL.new_cache()
    bounds = [0, *sorted(cuts), 30]
    pieces = [MODEL.forward(ids[a:b], cache) for a, b in itertools.pairwise(bounds)]
    whole = MODEL.logits(ids)
    assert np.abs(np.concatenate(pieces) - whole).max() <= 1e-4 * np.abs(whole).max()
    assert cache.length == 30


def test_truncating_the_cache_forgets():
    model, cache = MODEL, MODEL.new_cache()
    model.forward([1, 2, 3, 4, 5], cache)
    cache.truncate(2)
    again = model.forward([7, 8], cache, last_only=True)
    assert again.shape == (1, 97)
    np.testing.assert_allclose(again[0], model.logits([1, 2, 7, 8])[-1], rtol=0, atol=1e-4)
    with pytest.raises(ValueError):
        cache.truncate(9)


def test_no_tokens_give_no_logits():
    assert MODEL.logits([]).shape == (0, 97)


def test_context_overflow_is_refused_and_the_cache_kept():
    _, _, model = build({"max_position_embeddings": 8})
    cache = model.new_cache()
    model.forward(range(6), cache)
    with pytest.raises(ResourceError, match=r"E6001 .*found 9, expected at most 8"):
        model.forward(range(3), cache)
    assert cache.length == 6


def test_missing_and_misshapen_tensors_are_named():
    raw, weights, _ = build({})
    less = {k: v for k, v in weights.items() if k != "blk.1.attn_output.weight"}
    with pytest.raises(MismatchError, match=r"E4010 .*self_attn\.o_proj\.weight"):
        Model(DeepSeekConfig.from_dict(raw), less)
    with pytest.raises(MismatchError, match=r"E4011 .*wrong shape"):
        Model(DeepSeekConfig.from_dict(raw | {"intermediate_size": 384}), weights)


@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 6), past=st.integers(0, 9), heads=st.integers(1, 5))
def test_absorbed_attention_equals_naive(seed, tokens, past, heads):
    rng = np.random.default_rng(seed)
    n, r, v, latent_dim = rng.integers(1, 20, 4)
    total = tokens + past
    q_nope, q_pe = (
        rng.standard_normal((tokens, heads, n), np.float32),
        rng.standard_normal((tokens, heads, r), np.float32),
    )
    latent, k_pe = (
        rng.standard_normal((total, latent_dim), np.float32),
        rng.standard_normal((total, r), np.float32),
    )
    kv_b = rng.standard_normal((heads, n + v, latent_dim), np.float32)
    arguments = (q_nope, q_pe, latent, k_pe, kv_b, float(n + r) ** -0.5)
    np.testing.assert_allclose(
        attention.mla_absorbed(*arguments), attention.mla_naive(*arguments), rtol=0, atol=2e-4
    )


def test_deepseek_v3_constants():
    """The figures published for the 671B model: softmax scale 0.1352338, YaRN ramp from pair 10 to pair
    23.
    """
    yarn = {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    c = DeepSeekConfig.from_dict(
        SMALL | {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rope_scaling": yarn}
    )
    assert attention.softmax_scale(c) == pytest.approx(0.1352338, abs=1e-7)
    plain = attention.rope_frequencies(64, 10000.0, None)
    yarn = attention.rope_frequencies(64, 10000.0, c.rope_scaling)
    np.testing.assert_array_equal(yarn[:11], plain[:11])
    np.testing.assert_allclose(yarn[23:], plain[23:] / 40, rtol=1e-6)


@given(seed=st.integers(0, 2**31))
def test_rope_turns_pairs_and_keeps_relative_scores(seed):
    rng = np.random.default_rng(seed)
    c = DeepSeekConfig.from_dict(SMALL)
    q, k = rng.standard_normal((2, 1, c.qk_rope_head_dim)).astype(np.float32)

    def score(at_q: int, at_k: int) -> float:
        turned = [
            attention.rope(x[None], *attention.rope_tables(c, np.array([p])))
            for x, p in ((q, at_q), (k, at_k))
        ]
        return float(np.sum(turned[0] * turned[1]))

    shift = int(rng.integers(0, 200))
    assert score(5 + shift, 3 + shift) == pytest.approx(score(5, 3), abs=1e-3)


@given(seed=st.integers(0, 2**31), bias_size=st.floats(0, 2))
def test_router_obeys_its_definition(seed, bias_size):
    rng = np.random.default_rng(seed)
    c = DeepSeekConfig.from_dict(SMALL)
    x, w = (
        rng.standard_normal((5, 256)).astype(np.float32),
        rng.standard_normal((8, 256)).astype(np.float32) / 16,
    )
    bias = (rng.standard_normal(8) * bias_size).astype(np.float32)
    ids, weights = attention.route(x, w, bias, c)
    affinity = 1 / (1 + np.exp(-(x.astype(np.float64) @ w.T.astype(np.float64))))
    for t in range(5):
        biased = affinity[t] + bias
        groups = sorted(range(4), key=lambda g: -biased[2 * g : 2 * g + 2].sum())[:2]
        chosen = sorted((e for g in groups for e in (2 * g, 2 * g + 1)), key=lambda e: -biased[e])[:2]
        assert ids[t].tolist() == chosen
        np.testing.assert_allclose(
            weights[t], affinity[t, chosen] / affinity[t, chosen].sum() * 2.5, rtol=1e-5
        )


MODEL = build({})[2]
