"""The models that are DeepSeek-V3's architecture with a small difference, by the `model_type` of their
config.json: what a file means that leaves a field out, and which of their kin are something else.

Nothing here is computed with: a difference is a field of the config, and the network reads the field.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Kin(NamedTuple):
    """A model type that is run: its names in GGUF, and the fields whose absence means another value than in
    DeepSeek-V3.
    """

    architecture: str  # `general.architecture`
    absent: dict[str, Any]


_ONE_GROUP = {"n_group": 1, "topk_group": 1}
KIN: dict[str, Kin] = {
    "deepseek_v3": Kin("deepseek2", {"max_position_embeddings": 4096}),
    "kimi_k2": Kin("deepseek2", {"max_position_embeddings": 4096}),
    "deepseek_v2": Kin(
        "deepseek2",
        {
            **_ONE_GROUP,
            "scoring_func": "softmax",
            "topk_method": "greedy",
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "first_k_dense_replace": 0,
            "max_position_embeddings": 2048,
        },
    ),
    "glm4_moe_lite": Kin(
        "deepseek2",
        {
            **_ONE_GROUP,
            "routed_scaling_factor": 1.8,
            "rms_norm_eps": 1e-5,
            "first_k_dense_replace": 1,
            "max_position_embeddings": 202752,
        },
    ),
    "deepseek_v32": Kin("deepseek32", {"index_topk": 2048}),
    "glm_moe_dsa": Kin(
        "glm-dsa",
        {
            **_ONE_GROUP,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 202752,
            "index_topk": 2048,
            "index_n_heads": 32,
            "indexer_rope_interleave": True,
        },
    ),
}

# Others whose names come up beside these, and what they need that is not here. By model type, and by
# architecture where a GGUF has another name.
MISSING = {
    "deepseek_v4": "DeepSeek-V4: hash-routed layers, hyper-connections, compressed and windowed attention, "
    "grouped output projections, sqrtsoftplus scores",
    "deepseek_v4_1": "DeepSeek-V4.1: an encoder beside the decoder, and memory looked up by n-grams",
    "deepseek_ocr2": "DeepSeek-OCR: an encoder of images",
    "deepseek_vl": "DeepSeek-VL: an encoder of images, and attention without latents",
    "deepseek": "DeepSeek-MoE: attention without latents",
    "glm5_next": "GLM-5.3: hyper-connections and an indexer over pooled keys",
    "glm4_moe": "GLM-4.5 to 4.7: attention without latents (GLM-4.7-Flash has them and runs)",
    "glm4": "GLM-4: attention without latents, and no experts",
    "kimi_linear": "Kimi-Linear: linear attention in most layers",
    "kimi_k3": "Kimi-K3: linear attention in most layers",
    "minimax_m2": "MiniMax-M2: attention without latents",
    "longcat_flash": "LongCat-Flash: experts that pass their input on, and two attentions a layer",
    "qwen3_moe": "Qwen3: attention without latents",
    "qwen3_next": "Qwen3-Next: linear attention in most layers",
    "gpt_oss": "gpt-oss: attention without latents, with sinks and windows",
    "llama": "Llama: attention without latents, and no experts",
}
_IN_GGUF = {
    "deepseek4": "deepseek_v4",
    "deepseek2-ocr": "deepseek_ocr2",
    "glm5-next": "glm5_next",
    "glm4moe": "glm4_moe",
    "kimi-linear": "kimi_linear",
    "kimi-k3": "kimi_k3",
    "minimax-m2": "minimax_m2",
    "qwen3moe": "qwen3_moe",
    "qwen3next": "qwen3_next",
    "gpt-oss": "gpt_oss",
}


def missing(name: object) -> str:
    """What a model of this type or architecture needs that is not here, in words; "" where it is unknown."""
    return MISSING.get(_IN_GGUF.get(str(name), str(name)), "")


def architectures() -> tuple[str, ...]:
    """Every `general.architecture` of a GGUF that is run."""
    return tuple(dict.fromkeys(kin.architecture for kin in KIN.values()))
