"""How each tensor of a checkpoint is stored in a GGUF: the type that llama.cpp's file types give it, and its
bytes.
"""

from __future__ import annotations

import math

from refimpl import formats
from refimpl.checkpoint import names, stored
from refimpl.config import DeepSeekConfig

# Which tensors, by HF name, make up a component. The first that matches counts.
KINDS = {
    "embedding": r"embed_tokens",
    "attention": r"self_attn\.(\w+_proj|indexer\.w)",
    "routed experts": r"mlp\.experts\.",
    "shared expert": r"mlp\.shared_experts\.",
    "router": r"mlp\.gate\.",
    "dense MLP": r"mlp\.",
    "norms": r"norm",
    "head": r"lm_head",
}


def storage(c: DeepSeekConfig, name: str, shape: tuple[int, ...], mix: str) -> tuple[str, int]:
    """(format, bytes) of a tensor by HF name in the hybrid folder, an FP8 weight with its scales."""
    if names.is_routed_expert(name):
        kind = stored.tensor_type(names.to_gguf(name), shape, mix, c.num_hidden_layers, c.n_routed_experts)
        return kind, formats.nbytes(formats.type_id(kind), shape)
    if names.is_fp8(name):
        return "E4M3", math.prod(shape) + 4 * math.prod(-(-n // 128) for n in shape)
    return ("F32", 4 * math.prod(shape)) if name.endswith("bias") else ("BF16", 2 * math.prod(shape))


# llama.cpp's file type numbers; a mix is its commonest type and a rule, the others give all matrices one
# type.
FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q4_K_M": 15,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "BF16": 32,
}


# What llama.cpp takes for rows that are no whole blocks of 256.
FALLBACK = {"Q2_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's choice of layers whose down projections get Q6_K: the first and last eighth, and every
    third between.
    """
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def tensor_type(name: str, shape: tuple[int, ...], mix: str, layers: int, experts: int) -> str:
    """GGML type name of a tensor by GGUF name, as llama.cpp's quantizer chooses it for `deepseek2`."""
    if len(shape) == 1 or name.endswith("ffn_gate_inp.weight"):
        return "F32"
    base = {"Q4_K_M": "Q4_K", "Q5_K_M": "Q5_K"}.get(mix, mix)
    kind, layer = base, names.layer_of(name)
    if mix.endswith("_M"):
        if name == "output.weight" or ("ffn_down" in name and layer is not None and more_bits(layer, layers)):
            kind = "Q6_K"
        elif name.endswith("attn_output.weight") and experts == 8 and mix == "Q4_K_M":
            kind = "Q5_K"  # llama.cpp's rule for models of eight experts
    elif base == "Q2_K" and name == "output.weight":
        kind = "Q6_K"
    while shape[-1] % formats.get(formats.type_id(kind)).WEIGHTS:
        kind = FALLBACK.get(kind, "F16")
    return kind
