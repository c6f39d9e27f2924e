"""Tensor names of DeepSeek-V3's family in Hugging Face's spelling and in GGUF's, which is llama.cpp's: one
table, both ways.

Routed experts are one tensor each on Hugging Face and one stack per layer in GGUF. A stack has an HF-like
name here without the expert's number: `model.layers.3.mlp.experts.gate_proj.weight`.
"""

from __future__ import annotations

import re

from refimpl.config import DeepSeekConfig
from refimpl.errors import refusal

OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    # the two halves of kv_b_proj, key half transposed: llama.cpp's newer files
    "self_attn.k_b_proj": "attn_k_b",
    "self_attn.v_b_proj": "attn_v_b",
    "self_attn.o_proj": "attn_output",
    # sparse attention
    "self_attn.indexer.wq_b": "indexer.attn_q_b",
    "self_attn.indexer.wk": "indexer.attn_k",
    "self_attn.indexer.k_norm": "indexer.k_norm",
    "self_attn.indexer.weights_proj": "indexer.proj",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    # the multi-token-prediction layer
    "embed_tokens": "nextn.embed_tokens",
    "enorm": "nextn.enorm",
    "hnorm": "nextn.hnorm",
    "eh_proj": "nextn.eh_proj",
    "shared_head.norm": "nextn.shared_head_norm",
    "shared_head.head": "nextn.shared_head_head",
}
BIAS = ("mlp.gate.e_score_correction_bias", "exp_probs_b.bias")  # the one name whose suffix differs too
_BIASES = dict([BIAS, ("self_attn.indexer.k_norm.bias", "indexer.k_norm.bias")])  # all that the family has
_BIASES_TO_HF = {gguf: hf for hf, gguf in _BIASES.items()}

_TO_HF = {gguf: hf for hf, gguf in IN_LAYER.items()}
_OUTSIDE_TO_HF = {gguf: hf for hf, gguf in OUTSIDE.items()}
_SUFFIX = r"(weight|weight_scale_inv|ggml_type)"
_HF_LAYER = re.compile(rf"model\.layers\.(\d{{1,4}})\.(.+)\.{_SUFFIX}")
_HF_EXPERT = re.compile(r"(model\.layers\.\d{1,4}\.mlp\.experts\.)(\d{1,5})\.((?:gate|up|down)_proj\..+)")
_GGUF_LAYER = re.compile(rf"blk\.(\d{{1,4}})\.(.+)\.{_SUFFIX}")
_GGUF_EXPERT = re.compile(r"(blk\.\d{1,4}\.ffn_(?:gate|up|down))\.(\d{1,5})\.(weight)")


# Of models that see, as Kimi-K2.5, whose language model has the first of these before all names.
LARGER = ("language_model.", "model.language_model.", "vision_tower.", "mm_projector.")


def to_gguf(name: str) -> str:
    """'model.layers.3.self_attn.q_a_proj.weight' -> 'blk.3.attn_q_a.weight'. All experts of a layer give the
    name of their stack.

    GGUF names are returned as they are, so translating twice does no harm. InputFormatError E3001 for a name
    that is in neither table.
    """
    name = split_expert(name)[0]
    if is_gguf(name):
        return name
    stem, _, suffix = name.rpartition(".")
    if stem in OUTSIDE:
        return f"{OUTSIDE[stem]}.{suffix}"
    layer = re.fullmatch(r"model\.layers\.(\d{1,4})\.(.+bias)", name)
    if layer and layer[2] in _BIASES:
        return f"blk.{int(layer[1])}.{_BIASES[layer[2]]}"
    found = _HF_LAYER.fullmatch(name)
    if found and found[2] in IN_LAYER:
        return f"blk.{int(found[1])}.{IN_LAYER[found[2]]}.{found[3]}"
    raise refusal("E3001 part" if name.startswith(LARGER) else "E3001 checkpoint", name)


def to_hf(name: str) -> str:
    """'blk.3.attn_q_a.weight' -> 'model.layers.3.self_attn.q_a_proj.weight'; a stack keeps one name for all
    experts.

    InputFormatError E3001 for a name that is not in the table.
    """
    stack, expert = split_expert(name)
    stem, _, suffix = stack.rpartition(".")
    if stem in _OUTSIDE_TO_HF:
        return f"{_OUTSIDE_TO_HF[stem]}.{suffix}"
    layer = re.fullmatch(r"blk\.(\d{1,4})\.(.+bias)", stack)
    if layer and layer[2] in _BIASES_TO_HF:
        return f"model.layers.{int(layer[1])}.{_BIASES_TO_HF[layer[2]]}"
    found = _GGUF_LAYER.fullmatch(stack)
    if found and found[2] in _TO_HF:
        hf = f"model.layers.{int(found[1])}.{_TO_HF[found[2]]}.{found[3]}"
        return hf if expert is None else hf.replace(".experts.", f".experts.{expert}.")
    raise refusal("E3001 file", name)


def is_gguf(name: str) -> bool:
    """Whether the name is one of the table's GGUF names."""
    stem, _, suffix = name.rpartition(".")
    found = _GGUF_LAYER.fullmatch(name)
    bias = re.fullmatch(r"blk\.\d{1,4}\.(.+bias)", name)
    return (
        (stem in _OUTSIDE_TO_HF and suffix != "")
        or (bias is not None and bias[1] in _BIASES_TO_HF)
        or (found is not None and found[2] in _TO_HF)
    )


def split_expert(name: str) -> tuple[str, int | None]:
    """Name of the stack and number of the expert, for HF's one-tensor-an-expert names and GGUF's old
    `blk.3.ffn_gate.7.weight`; else (name, None).
    """
    found = _HF_EXPERT.fullmatch(name)
    if found:
        return found[1] + found[3], int(found[2])
    found = _GGUF_EXPERT.fullmatch(name)
    return (f"{found[1]}_exps.{found[3]}", int(found[2])) if found else (name, None)


def layer_of(name: str) -> int | None:
    """Layer number in either spelling; None outside the layers."""
    found = re.match(r"(?:model\.layers|blk)\.(\d{1,4})\.", name)
    return int(found[1]) if found else None


def is_routed_expert(name: str) -> bool:
    """Whether a tensor in either spelling belongs to the routed experts."""
    return re.search(r"\.mlp\.experts\.|^blk\.\d+\.ffn_(gate|up|down)(_exps\.|\.\d+\.)", name) is not None


def is_derived(name: str) -> bool:
    """Whether a checkpoint has a tensor that follows from its config: Kimi's and Moonlight's keep the
    frequencies of the rotary embedding in each layer.
    """
    return name.endswith(".rotary_emb.inv_freq")


def shapes(c: DeepSeekConfig, layers: range | None = None) -> dict[str, tuple[int, ...]]:
    """Every tensor by HF name with its row-major shape, the experts of a layer as one [E, out, in] stack;
    without scales and MTP extras.
    """
    found: dict[str, tuple[int, ...]] = {}
    for i in range(c.num_hidden_layers) if layers is None else layers:
        parts = (
            _attention_shapes(c)
            | _indexer_shapes(c, i)
            | {
                "input_layernorm.weight": (c.hidden_size,),
                "post_attention_layernorm.weight": (c.hidden_size,),
            }
        )
        parts |= _mlp_shapes("mlp.", c.hidden_size, c.intermediate_size) if c.is_dense(i) else _moe_shapes(c)
        found |= {f"model.layers.{i}.{k}": v for k, v in parts.items()}
    if layers is None:
        outside = {
            "model.embed_tokens.weight": (c.vocab_size, c.hidden_size),
            "lm_head.weight": (c.vocab_size, c.hidden_size),
        }
        found |= outside | {"model.norm.weight": (c.hidden_size,)}
    return found


def _attention_shapes(c: DeepSeekConfig) -> dict[str, tuple[int, ...]]:
    heads = c.num_attention_heads
    if c.q_lora_rank is None:
        q: dict[str, tuple[int, ...]] = {"q_proj.weight": (heads * c.qk_head_dim, c.hidden_size)}
    else:
        q = {"q_a_proj.weight": (c.q_lora_rank, c.hidden_size), "q_a_layernorm.weight": (c.q_lora_rank,)}
        q["q_b_proj.weight"] = (heads * c.qk_head_dim, c.q_lora_rank)
    kv: dict[str, tuple[int, ...]] = {
        "kv_a_proj_with_mqa.weight": (c.kv_lora_rank + c.qk_rope_head_dim, c.hidden_size),
        "kv_a_layernorm.weight": (c.kv_lora_rank,),
        "kv_b_proj.weight": (heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank),
        "o_proj.weight": (c.hidden_size, heads * c.v_head_dim),
    }
    return {f"self_attn.{k}": v for k, v in (q | kv).items()}


def _indexer_shapes(c: DeepSeekConfig, layer: int) -> dict[str, tuple[int, ...]]:
    if c.index_topk is None or c.q_lora_rank is None or c.shares_rows(min(layer, c.num_hidden_layers - 1)):
        return {}
    parts: dict[str, tuple[int, ...]] = {
        "wq_b.weight": (c.index_n_heads * c.index_head_dim, c.q_lora_rank),
        "wk.weight": (c.index_head_dim, c.hidden_size),
        "k_norm.weight": (c.index_head_dim,),
        "k_norm.bias": (c.index_head_dim,),
        "weights_proj.weight": (c.index_n_heads, c.hidden_size),
    }
    return {f"self_attn.indexer.{k}": v for k, v in parts.items()}


def _mlp_shapes(prefix: str, hidden: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    up, down = (intermediate, hidden), (hidden, intermediate)
    return {f"{prefix}gate_proj.weight": up, f"{prefix}up_proj.weight": up, f"{prefix}down_proj.weight": down}


def _moe_shapes(c: DeepSeekConfig) -> dict[str, tuple[int, ...]]:
    router: dict[str, tuple[int, ...]] = {"mlp.gate.weight": (c.n_routed_experts, c.hidden_size)}
    if c.topk_method == "noaux_tc":
        router[BIAS[0]] = (c.n_routed_experts,)
    experts = {
        k: (c.n_routed_experts, *v)
        for k, v in _mlp_shapes("mlp.experts.", c.hidden_size, c.moe_intermediate_size).items()
    }
    shared = (
        _mlp_shapes("mlp.shared_experts.", c.hidden_size, c.moe_intermediate_size * c.n_shared_experts)
        if c.n_shared_experts
        else {}
    )
    return router | experts | shared


def is_fp8(name: str) -> bool:
    """Whether DeepSeek's checkpoint stores this HF tensor in FP8: the linears of the layers, not embeddings,
    head, norms, router or `eh_proj`.
    """
    linear = r"\.(self_attn|mlp)\.(?!indexer)(.*_proj(_with_mqa)?)\.weight$|\.indexer\.(wq_b|wk)\.weight$"
    return re.search(linear, name) is not None


def hf_inventory(c: DeepSeekConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor of the FP8 checkpoint, MTP layers included: {name: (safetensors dtype, shape)}. 91,991 for
    DeepSeek-V3.
    """
    mtp = range(c.num_hidden_layers, c.num_hidden_layers + c.num_nextn_predict_layers)
    wanted = shapes(c) | shapes(c, mtp)
    for i in mtp:
        for part in ("enorm", "hnorm", "shared_head.norm"):
            wanted[f"model.layers.{i}.{part}.weight"] = (c.hidden_size,)
        for part in ("embed_tokens", "shared_head.head"):
            wanted[f"model.layers.{i}.{part}.weight"] = (c.vocab_size, c.hidden_size)
        wanted[f"model.layers.{i}.eh_proj.weight"] = (c.hidden_size, 2 * c.hidden_size)
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in wanted.items():
        singles = (
            [name]
            if len(shape) < 3
            else [name.replace(".experts.", f".experts.{e}.") for e in range(shape[0])]
        )
        for single in singles:
            found[single] = (
                "F8_E4M3" if is_fp8(name) else "F32" if name.endswith("bias") else "BF16",
                shape[-2:],
            )
            if is_fp8(name):
                found[single + "_scale_inv"] = ("F32", (-(-shape[-2] // 128), -(-shape[-1] // 128)))
    return found


def architecture(c: DeepSeekConfig) -> str:
    """`general.architecture` of a GGUF of this config."""
    if c.index_topk is None:
        return "deepseek2"
    return "glm-dsa" if c.indexer_rope_interleave else "deepseek32"


def gguf_inventory(c: DeepSeekConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a GGUF in the old style (one `attn_kv_b`): {name: row-major shape}. 1,025 for
    DeepSeek-V3.
    """
    return {to_gguf(name): shape for name, shape in shapes(c).items()}
