"""Random checkpoints for the campaign about what is read back: configs of every member of the family,
weights in every storage, tokenizers, templates and generation configs of every shape that is honoured.
"""

from __future__ import annotations

import base64
import copy
import json
import random
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.checkpoint import names, safetensors
from refimpl.config import DeepSeekConfig
from refimpl.formats import bf16, int4
from refimpl.reference import fp8
from refimpl.text.gguf_vocabulary import pre_tokenizer
from refimpl.tiny import FP8_DIR

# Templates of the shapes that models of this architecture have, each written for this test.
TEMPLATES = {
    "R1": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}",
    "V3 without BOS": "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content }}{{ eos_token }}{% else %}{{ m.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}",
    "V3.1": "{% if thinking is not defined %}{% set thinking = false %}{% endif %}{{ bos_token }}"
    "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<｜Assistant｜></think>{{ m.content }}{{ eos_token }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{{ '<think>' if thinking else '</think>' }}{% endif %}",
    "K2-Thinking": "{% for m in messages %}<|im_{{ m.role }}|>{% if m.role == 'assistant' %}"
    "<think>{{ m.reasoning_content or '' }}</think>{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_assistant|>{% endif %}",
}
TEMPLATES |= {
    "Kimi-K2": "{% if messages[0].role != 'system' %}"
    "<|im_system|>system<|im_middle|>You help.<|im_end|>{% endif %}"
    "{% for m in messages %}<|im_{{ m.role }}|>{{ m.role }}<|im_middle|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}",
    "GigaChat3": "{{ bos_token }}{% for m in messages %}{{ m.role }}<|role_sep|>\n{{ m.content }}"
    "<|message_sep|>\n\n{% endfor %}{% if add_generation_prompt %}assistant<|role_sep|>\n{% endif %}",
}
WORDS = 560  # rows of the embedding
PARTS = ["the", " the", "in", "er", "an", " a", "Ha", "us", "on", "12"]  # of a tiktoken.model
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
_INTEGERS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": _INTEGERS,
        }
    },
}


def draw_config(rng: random.Random) -> dict[str, Any]:
    """A config.json of a member of the family, in which every honoured number differs from case to case."""
    groups = rng.choice([(1, 1), (2, 1), (2, 2), (4, 2)])
    heads, layers = rng.choice([1, 2, 3]), rng.choice([1, 2, 3])
    config: dict[str, Any] = {
        "model_type": rng.choice(["deepseek_v3", "deepseek_v3", "kimi_k2", "glm4_moe_lite"]),
        "vocab_size": WORDS,
        "hidden_size": rng.choice([32, 48]),
        "intermediate_size": rng.choice([32, 40]),
        "moe_intermediate_size": rng.choice([32, 64, 64, 256]),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": rng.choice([None, 16, 24]),
        "kv_lora_rank": rng.choice([16, 32]),
        "qk_nope_head_dim": rng.choice([8, 16]),
        "qk_rope_head_dim": rng.choice([4, 8, 16]),
        "v_head_dim": rng.choice([8, 24]),
        "n_routed_experts": 8,
        "n_shared_experts": rng.choice([0, 1, 2, None]),
        "num_experts_per_tok": rng.choice([1, 2]),
        "n_group": groups[0],
        "topk_group": groups[1],
        "norm_topk_prob": rng.random() < 0.5,
        "routed_scaling_factor": round(rng.uniform(0.5, 3), 3),
        "first_k_dense_replace": rng.randrange(layers + 1),
        "rms_norm_eps": rng.choice([1e-6, 1e-5, 0.01, 3e-7]),
        "rope_theta": rng.choice([10000.0, 50000, 1e6, 123456.7]),
        "max_position_embeddings": rng.choice([256, 4096]),
        "bos_token_id": 0,
        "eos_token_id": rng.choice([1, [1, 502], None, [501]]),
    }
    scaling = rng.choice([None, draw_yarn(rng), draw_yarn(rng)])
    if scaling and rng.random() < 0.3:  # as transformers 5 writes it
        scaling["rope_type"] = scaling.pop("type")
        config["rope_parameters"] = scaling | {"rope_theta": config.pop("rope_theta")}
    else:
        config["rope_scaling"] = scaling
    config |= rng.choice([_softmax, _sparse, _plain, _plain])(rng, config)
    if rng.random() < 0.2:
        nested = {k: v for k, v in config.items() if k != "eos_token_id"}
        return {"model_type": "some_vl", "text_config": nested, "eos_token_id": config["eos_token_id"]}
    return config


def _plain(rng: random.Random, config: dict[str, Any]) -> dict[str, Any]:
    return {}


def _softmax(rng: random.Random, config: dict[str, Any]) -> dict[str, Any]:
    """DeepSeek-V2's router."""
    method = rng.choice(["greedy", "group_limited_greedy"])
    scale = 1.0 if config["norm_topk_prob"] else config["routed_scaling_factor"]
    router = {"scoring_func": "softmax", "topk_method": method, "routed_scaling_factor": scale}
    return {"model_type": "deepseek_v2"} | router


def _sparse(rng: random.Random, config: dict[str, Any]) -> dict[str, Any]:
    """DeepSeek-V3.2's attention, or GLM-5's, where layers share what an earlier one has found."""
    found: dict[str, Any] = {
        "q_lora_rank": 16,
        "index_topk": rng.choice([4, 100]),
        "index_n_heads": rng.choice([1, 4]),
        "index_head_dim": rng.choice([16, 32]),
    }
    if rng.random() < 0.5:
        return found | {"model_type": "deepseek_v32"}
    later = [rng.choice(["full", "shared"]) for _ in range(config["num_hidden_layers"] - 1)]
    return found | {"model_type": "glm_moe_dsa", "indexer_types": ["full", *later]}


def draw_yarn(rng: random.Random) -> dict[str, Any]:
    """`rope_scaling` with any of YaRN's numbers there or not."""
    every = {
        "beta_fast": rng.choice([1, 32, 64.5]),
        "beta_slow": rng.choice([1, 2, 0.5]),
        "mscale": rng.choice([1.0, 0.707, 0, 1 / 3]),
        "mscale_all_dim": rng.choice([1.0, 0.707, 0, 0.3, round(rng.random(), 6)]),
        "attention_factor": rng.choice([1.0, 1.3]),
    }
    kept = {k: v for k, v in every.items() if rng.random() < (0.2 if k == "attention_factor" else 0.7)}
    return {
        "type": "yarn",
        "factor": rng.choice([1.0, 8, 40.0, 2.7182]),
        "original_max_position_embeddings": rng.choice([16, 64]),
    } | kept


def write_checkpoint(rng: random.Random, folder: Path) -> None:
    """A checkpoint in FP8, BF16, float32, or BF16 with experts of INT4, with all that belongs to it."""
    folder.mkdir(parents=True)
    config = draw_config(rng)
    storage = rng.choice(["F8_E4M3", "BF16", "F32", "INT4"])
    inner = config.get("text_config", config)
    if storage == "F8_E4M3":
        inner["quantization_config"] = FP8 | rng.choice([{}, {"scale_fmt": "ue8m0"}])
    if storage == "INT4":
        inner |= {"quantization_config": INT4, "hidden_size": 64}
    numbers = np.random.default_rng(rng.randrange(1 << 30))
    arrays: dict[str, tuple[str, np.ndarray]] = {}
    for name, shape in names.shapes(DeepSeekConfig.from_dict(config)).items():
        for one, x in _experts(name, _numbers(numbers, name, shape)):
            arrays |= _stored(one, x, storage)
    safetensors.save(folder / "model.safetensors", arrays)
    (folder / "config.json").write_text(json.dumps(config))
    write_text_files(rng, folder)


def _numbers(numbers: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    x = numbers.standard_normal(shape, dtype=np.float32)
    if "norm" in name:
        return 1 + x / 5
    return x / 10 if name.endswith("bias") else x * np.float32(shape[-1] ** -0.5)


def _experts(name: str, x: np.ndarray) -> list[tuple[str, np.ndarray]]:
    if x.ndim < 3:
        return [(name, x)]
    return [(name.replace(".experts.", f".experts.{e}."), x[e]) for e in range(len(x))]


def _stored(name: str, x: np.ndarray, storage: str) -> dict[str, tuple[str, np.ndarray]]:
    if storage == "F8_E4M3" and "_proj." in name:
        w = fp8.weight_quant(x)
        return {name: ("F8_E4M3", w.codes), f"{name}_scale_inv": ("F32", w.scale)}
    if storage == "INT4" and ".experts." in name:
        return _in_int4(name.removesuffix(".weight"), x)
    if storage == "F32" or name.endswith("bias"):
        return {name: ("F32", x)}
    return {name: ("BF16", bf16.encode(x))}


def _in_int4(stem: str, x: np.ndarray) -> dict[str, tuple[str, np.ndarray]]:
    scale = bf16.encode(np.abs(x.reshape(len(x), -1, int4.GROUP)).max(-1) / 7)
    spread = np.repeat(bf16.decode(scale), int4.GROUP, axis=-1)
    words = int4.encode(np.clip(np.rint(x / spread), -8, 7)).view("<i4")
    shape = np.array(x.shape, np.int64)
    return {
        f"{stem}.weight_packed": ("I32", words),
        f"{stem}.weight_scale": ("BF16", scale),
        f"{stem}.weight_shape": ("I64", shape),
    }


@cache
def _tiny(name: str) -> dict[str, Any]:
    return json.loads((FP8_DIR / name).read_text())


def write_text_files(rng: random.Random, folder: Path) -> None:
    """Tokenizer, its config, templates where each kind of model keeps them, and perhaps a generation
    config.
    """
    raw, config = copy.deepcopy(_tiny("tokenizer.json")), dict(_tiny("tokenizer_config.json"))
    if splits := rng.choice([None, "deepseek-v3", "kimi-k2"]):
        raw["pre_tokenizer"] = pre_tokenizer(splits)
    if rng.random() < 0.2:
        raw["model"]["ignore_merges"] = True
    if rng.random() < 0.2:
        raw["normalizer"] = {"type": rng.choice(["NFC", "NFKC"])}
    shape = rng.choice(list(TEMPLATES))
    extra = [("Herzinfarkt", False), ("<|im_end|>", True), ("<|im_assistant|>", False), ("Haus", False)]
    for content, special in rng.sample(extra, rng.randrange(len(extra) + 1)):
        flags = {f: rng.random() < 0.3 for f in ("single_word", "lstrip", "rstrip", "normalized")}
        raw["added_tokens"].append(
            {"id": 500 + len(raw["added_tokens"]) - 3, "content": content, "special": special, **flags}
        )
    config["add_bos_token"] = rng.choice([True, False, None])
    if rng.random() < 0.2:
        del config["pad_token"]
    config["chat_template"] = TEMPLATES[shape]
    other = TEMPLATES[rng.choice(list(TEMPLATES))]
    place = rng.choice(["config", "file", "list", "files"])
    if place == "list":
        rows = [("default", config["chat_template"]), ("tool_use", other)]
        config["chat_template"] = [{"name": n, "template": t} for n, t in rows]
    elif place != "config":
        (folder / "chat_template.jinja").write_text(config.pop("chat_template"))
    if place == "files":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "rag.jinja").write_text(other)
    if rng.random() < 0.1 and find_spec("tiktoken"):
        config |= _write_tiktoken(folder, raw["added_tokens"])
    else:
        (folder / "tokenizer.json").write_text(json.dumps(raw))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if generation := draw_generation(rng):
        (folder / "generation_config.json").write_text(json.dumps(generation))


def _write_tiktoken(folder: Path, added: list[dict[str, Any]]) -> dict[str, Any]:
    """A tiktoken.model, and what tokenizer_config.json then says of the added tokens."""
    tokens = [bytes([b]) for b in range(256)] + [part.encode() for part in PARTS]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (folder / "tiktoken.model").write_text("".join(lines))
    decoder = {str(len(tokens) + i): {"content": a["content"], "special": True} for i, a in enumerate(added)}
    return {"added_tokens_decoder": decoder}


def draw_generation(rng: random.Random) -> dict[str, Any]:
    """generation_config.json; {} for none."""
    if rng.random() < 0.2:
        return {}
    every = {
        "eos_token_id": rng.choice([1, [1], [1, 500], [1, 2, 501, 502], None, 502]),
        "do_sample": rng.choice([True, False]),
        "temperature": rng.choice([0.6, 1.0, 0.3]),
        "top_p": rng.choice([0.95, 1.0]),
        "top_k": rng.choice([20, 0]),
        "min_p": rng.choice([0.01, 0.0]),
        "max_new_tokens": rng.choice([16, 2048]),
    }
    return {k: v for k, v in every.items() if rng.random() < 0.6}
