"""transformers' DeepseekV3ForCausalLM in float32, fed the very numbers our quantized weights stand for."""

from __future__ import annotations

import numpy as np
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from refimpl import formats
from refimpl.checkpoint import names
from refimpl.config import DeepSeekConfig
from refimpl.reference import fp8
from refimpl.reference.packed import dense
from refimpl.tensors import Packed, Weight

SMALL = {
    "model_type": "deepseek_v3",
    "vocab_size": 97,
    "hidden_size": 256,
    "intermediate_size": 320,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "rope_scaling": {
        "type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}
NOT_QUANTIZED = ("norm", "embed_tokens", "lm_head", ".mlp.gate.")


def random_checkpoint(
    raw: dict, seed: int, expert_types: tuple[int, int, int] = (12, 12, 14)
) -> dict[str, Weight]:
    """GGUF-named weights: FP8 linears, GGML experts (gate, up, down types), plain norms, router and
    embeddings, lively enough to test.
    """
    rng = np.random.default_rng(seed)
    c = DeepSeekConfig.from_dict(raw)
    weights: dict[str, Weight] = {}
    for name, shape in names.shapes(c).items():
        x = rng.standard_normal(shape, dtype=np.float32)
        if name.endswith("e_score_correction_bias"):
            weights[names.to_gguf(name)] = x * np.float32(0.1)
        elif "norm" in name:
            weights[names.to_gguf(name)] = 1 + x * np.float32(0.2)
        elif any(part in name for part in NOT_QUANTIZED):
            weights[names.to_gguf(name)] = x * np.float32(shape[-1] ** -0.5)
        elif len(shape) == 3:
            kind = expert_types[["gate_proj", "up_proj", "down_proj"].index(name.split(".")[-2])]
            weights[names.to_gguf(name)] = Packed(
                formats.quantize(kind, x * np.float32(shape[-1] ** -0.5)), kind, shape
            )
        else:
            weights[names.to_gguf(name)] = fp8.weight_quant(x * np.float32(shape[-1] ** -0.5))
    return weights


def transformers_logits(raw: dict, weights, ids: list[int]) -> np.ndarray:
    """float32 logits [T, vocab] of transformers' own implementation."""
    hf_config = DeepseekV3Config(
        **{k: v for k, v in raw.items() if k not in ("model_type", "quantization_config", "architectures")}
    )
    hf_config._attn_implementation = "eager"
    hf_config._experts_implementation = "eager"
    model = DeepseekV3ForCausalLM(hf_config).float().eval()
    c = DeepSeekConfig.from_dict(raw)
    state = {}
    for name in names.shapes(c):
        w = weights[names.to_gguf(name)]
        state[name] = torch.from_numpy(np.array(dense(w), np.float32))
    for i in range(c.first_k_dense_replace, c.num_hidden_layers):
        prefix = (
            f"model.layers.{i}.mlp.experts."  # transformers fuses gate and up of all experts into one tensor
        )
        gate, up = state.pop(prefix + "gate_proj.weight"), state.pop(prefix + "up_proj.weight")
        state[prefix + "gate_up_proj"] = torch.cat([gate, up], dim=1)
        state[prefix + "down_proj"] = state.pop(prefix + "down_proj.weight")
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and not [m for m in missing if "inv_freq" not in m], (missing, unexpected)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()
