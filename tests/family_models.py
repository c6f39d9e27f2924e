"""Random tiny models of DeepSeek-V3's family: transformers' own folder of each, and the GGUF that llama.cpp's
converter would write of it, made with gguf-py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
import transformers

Raw = dict[str, Any]


class Kind(NamedTuple):
    """A model of the family: transformers' classes, and what its config has beside random sizes."""

    name: str  # transformers' classes are called NameConfig and NameForCausalLM
    fixed: Raw
    model_type: str = ""  # where the published config.json has another than transformers
    architecture: str = "deepseek2"  # in GGUF

    @property
    def config(self) -> type:
        return getattr(transformers, f"{self.name}Config")

    @property
    def network(self) -> type:
        return getattr(transformers, f"{self.name}ForCausalLM")


ONE_GROUP = {"n_group": 1, "topk_group": 1}


def yarn(**others: float) -> Raw:
    found = {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 10000.0,
    }
    return {"rope_parameters": found | {"beta_fast": 32, "beta_slow": 1} | others}


PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}}
V2 = {"scoring_func": "softmax", "norm_topk_prob": False} | yarn(mscale=0.707, mscale_all_dim=0.707)
KINDS = {
    "Moonlight": Kind(
        "DeepseekV3",
        ONE_GROUP
        | PLAIN
        | {"q_lora_rank": None, "n_shared_experts": 2, "routed_scaling_factor": 2.446, "rms_norm_eps": 1e-5},
    ),
    "Kimi-K2": Kind(
        "DeepseekV3",
        ONE_GROUP | {"routed_scaling_factor": 2.827} | yarn(beta_fast=1.0, mscale=1.0, mscale_all_dim=1.0),
        "kimi_k2",
    ),
    "GLM-4.7-Flash": Kind(
        "Glm4MoeLite",
        ONE_GROUP
        | {"routed_scaling_factor": 1.8, "rms_norm_eps": 1e-5, "eos_token_id": [3, 5, 7]}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0}},
    ),
    "DeepSeek-V2-Lite": Kind(
        "DeepseekV2",
        V2
        | ONE_GROUP
        | {"topk_method": "greedy", "q_lora_rank": None, "n_shared_experts": 2, "routed_scaling_factor": 1.0},
    ),
    "DeepSeek-V2": Kind(
        "DeepseekV2",
        V2 | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0, "n_shared_experts": 2},
    ),
    "GigaChat3": Kind(
        "DeepseekV3", ONE_GROUP | {"q_lora_rank": None, "routed_scaling_factor": 1.0} | yarn(mscale=1.0)
    ),
    "DeepSeek-V3.2": Kind("DeepseekV32", yarn(mscale=1.0, mscale_all_dim=1.0), architecture="deepseek32"),
    "GLM-5": Kind("GlmMoeDsa", ONE_GROUP | PLAIN | {"rms_norm_eps": 1e-5}, architecture="glm-dsa"),
    "GLM-5.2": Kind(
        "GlmMoeDsa",
        ONE_GROUP | PLAIN | {"num_hidden_layers": 5, "index_topk_freq": 2, "index_skip_topk_offset": 3},
        architecture="glm-dsa",
    ),
}


def random_config(kind: Kind, rng: np.random.Generator) -> Raw:
    """Fields of transformers' config: sizes that are multiples of nothing, and those of the kind."""
    heads = int(rng.choice([1, 2, 3, 5, 7, 20]))
    groups, width = int(rng.choice([2, 3, 4])), int(rng.integers(2, 5))
    kept = int(rng.integers(1, groups))
    experts = {"n_group": groups, "topk_group": kept} | kind.fixed
    eligible = groups * width if experts["n_group"] == 1 else kept * width
    layers, dense = int(rng.integers(2, 4)), int(rng.integers(0, 2))
    sizes = {
        "vocab_size": int(rng.integers(30, 60)),
        "hidden_size": heads * int(rng.integers(3, 12)),
        "intermediate_size": int(rng.integers(8, 40)),
        "moe_intermediate_size": int(rng.integers(8, 40)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": int(rng.integers(5, 24)),
        "kv_lora_rank": int(rng.integers(5, 24)),
        "qk_nope_head_dim": int(rng.integers(3, 24)),
        "qk_rope_head_dim": 2 * int(rng.integers(2, 8)),
        "v_head_dim": int(rng.integers(3, 30)),
        "n_routed_experts": groups * width,
        "n_shared_experts": 1,
        "num_experts_per_tok": int(rng.integers(1, eligible + 1)),
        "norm_topk_prob": True,
        "first_k_dense_replace": dense,
        "max_position_embeddings": 256,
    }
    if kind.name == "DeepseekV2":  # transformers' views of complex numbers want even strides
        sizes |= {name: sizes[name] // 2 * 2 for name in ("kv_lora_rank", "qk_nope_head_dim")}
    if kind.architecture != "deepseek2":
        sizes |= {
            "index_topk": int(rng.integers(2, 16)),
            "index_head_dim": 16,  # not below qk_rope_head_dim
            "index_n_heads": int(rng.integers(16, 30)),  # many, for no two scores to be the same zero
        }
    if kind.name == "Glm4MoeLite":
        sizes["mlp_layer_types"] = ["dense"] * dense + ["sparse"] * (layers - dense)
    return sizes | experts


def build(kind: Kind, raw: Raw, rng: np.random.Generator) -> torch.nn.Module:
    """transformers' model of random float32 weights, lively enough to tell."""
    config = kind.config(**raw)
    config._attn_implementation = config._experts_implementation = "eager"
    model = kind.network(config).float().eval()
    for name, module in model.named_modules():
        # The norms of the latents: transformers has 1e-6 whatever the config says, vLLM, SGLang and llama.cpp
        # have what the config says, and so has refimpl.
        if name.endswith("a_layernorm"):
            module.variance_epsilon = raw.get("rms_norm_eps", config.rms_norm_eps)
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name:
                continue
            x = torch.from_numpy(rng.standard_normal(p.shape).astype(np.float32))
            plain = name.endswith("layernorm.weight") or "norm.weight" in name
            small = "e_score_correction_bias" in name or name.endswith("norm.bias")
            p.copy_(1 + x * 0.2 if plain else x * 0.1 if small else x * p.shape[-1] ** -0.5)
    return model


def logits(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    """float32 [T, vocab] of transformers."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def save(kind: Kind, model: torch.nn.Module, folder: Path) -> Path:
    """transformers' own folder, with the published model_type."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | ({"model_type": kind.model_type} if kind.model_type else {})))
    return folder


# --- the GGUF -----------------------------------------------------------------------------------------------

SCORES = {"softmax": gguf.ExpertGatingFuncType.SOFTMAX, "sigmoid": gguf.ExpertGatingFuncType.SIGMOID}


def metadata(writer: gguf.GGUFWriter, c: Raw) -> None:
    """The keys that llama.cpp's converter writes of a config."""
    writer.add_vocab_size(c["vocab_size"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_leading_dense_block_count(c["first_k_dense_replace"])
    if c["q_lora_rank"] is not None:
        writer.add_q_lora_rank(c["q_lora_rank"])
    writer.add_kv_lora_rank(c["kv_lora_rank"])
    writer.add_key_length(c["kv_lora_rank"] + c["qk_rope_head_dim"])
    writer.add_value_length(c["kv_lora_rank"])
    writer.add_key_length_mla(c["qk_nope_head_dim"] + c["qk_rope_head_dim"])
    writer.add_value_length_mla(c["v_head_dim"])
    writer.add_rope_dimension_count(c["qk_rope_head_dim"])
    writer.add_expert_feed_forward_length(c["moe_intermediate_size"])
    writer.add_expert_count(c["n_routed_experts"])
    writer.add_expert_used_count(c["num_experts_per_tok"])
    writer.add_expert_shared_count(c["n_shared_experts"])
    writer.add_expert_group_count(c["n_group"])
    writer.add_expert_group_used_count(c["topk_group"])
    writer.add_expert_weights_scale(c["routed_scaling_factor"])
    if c["norm_topk_prob"]:
        writer.add_expert_weights_norm(True)
    writer.add_expert_gating_func(SCORES[c["scoring_func"]])
    rope = c["rope_parameters"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
        if "mscale_all_dim" in rope:
            writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    if "index_topk" in c:
        writer.add_indexer_head_count(c["index_n_heads"])
        writer.add_indexer_key_length(c["index_head_dim"])
        writer.add_indexer_top_k(c["index_topk"])


def tensors(model: torch.nn.Module, c: Raw) -> dict[str, np.ndarray]:
    """Weights under llama.cpp's names: stacks of experts, and kv_b in its halves."""
    architecture = gguf.MODEL_ARCH.GLM_DSA if "index_topk" in c else gguf.MODEL_ARCH.DEEPSEEK2
    names = gguf.get_tensor_name_map(architecture, c["num_hidden_layers"])
    found: dict[str, np.ndarray] = {}

    def add(name: str, x: np.ndarray) -> None:
        to = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if name.endswith("e_score_correction_bias"):
            to = f"blk.{name.split('.')[2]}.exp_probs_b.bias"
        assert to is not None, name
        found[to] = np.ascontiguousarray(x)

    for name, tensor in model.state_dict().items():
        x = tensor.numpy()
        if name.endswith("experts.gate_up_proj"):
            for half, part in zip(("gate", "up"), np.split(x, 2, axis=1)):
                add(name.replace("gate_up", half) + ".weight", part)
        elif name.endswith("experts.down_proj"):
            add(name + ".weight", x)
        elif name.endswith("kv_b_proj.weight"):
            n = c["qk_nope_head_dim"]
            halves = x.reshape(c["num_attention_heads"], n + c["v_head_dim"], -1)
            add(name.replace("kv_b", "k_b"), halves[:, :n].transpose(0, 2, 1))
            add(name.replace("kv_b", "v_b"), halves[:, n:])
        elif "inv_freq" not in name:
            add(name, x)
    return found


def save_gguf(
    kind: Kind, model: torch.nn.Module, raw: Raw, path: Path, text: Mapping[str, Any] = MappingProxyType({})
) -> Path:
    """An F32 GGUF by gguf-py's writer; `text`: keys of a tokenizer."""
    writer = gguf.GGUFWriter(path, kind.architecture)
    unsaid = {name: getattr(model.config, name) for name in ("rms_norm_eps", "routed_scaling_factor")}
    metadata(writer, {"scoring_func": "sigmoid"} | unsaid | raw)
    if "index_topk_freq" in raw:  # a key of llama.cpp that this gguf-py has no method for
        full = [layer == "full" for layer in model.config.indexer_types]
        writer.add_array(f"{kind.architecture}.attention.indexer.types", full)
    for key, value in text.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        add[type(value)](key, value)
    for name, x in tensors(model, raw).items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
