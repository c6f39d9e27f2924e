"""What is written is read back the same: random checkpoints, with tokenizers, templates and generation
configs of every shape that `refimpl.fields` honours, quantized, merged and linked.

Exact logits of the F32 file, and of folders merged with it, are the checkpoint's to 1e-5 of the largest;
those of another type are the decoded tensors'. Prompt ids, stop ids, sampling defaults and templates are the
same in all. A case is one checkpoint.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from refimpl import convert_model, fields, quantize
from refimpl.checkpoint import names, safetensors
from refimpl.checkpoint.stored import FILE_TYPES
from refimpl.config import DeepSeekConfig
from refimpl.devices.cpu import CpuBackend
from refimpl.formats import bf16
from refimpl.loading.opening import open_model
from refimpl.model import Model
from refimpl.reference import fp8
from refimpl.reference.packed import dense
from refimpl.text import answers, sandbox, template, tokenizer
from refimpl.text.gguf_vocabulary import pre_tokenizer
from refimpl.text.template import ChatTemplate, Message
from refimpl.text.tokenizer import Tokenizer
from refimpl.tiny import FP8_DIR
from tests.campaigns import WHOLE, Part, Report

SHORT, LONG = 12, 10_000
CLOSE = 1e-5
USER, ASSISTANT, THINK = "<｜User｜>", "<｜Assistant｜>", "<think>"
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
TEXTS = ("What is 12 + 30?", " a\n\nb <think> ", "<|im_end|>x", "Herzinfarkt im Haus 東京 2024", "don't")


def run(cases: int, seed: int, folder: Path, part: Part = WHOLE) -> Report:
    """Cases of this part; a failure can be had again with its number and seed."""
    failures: list[str] = []
    counts = Counter[str]()
    with (
        mock.patch.object(tokenizer, "open_library", _library),
        mock.patch.object(template, "render_in_child", sandbox.render),
        mock.patch.object(fields, "note", lambda text: None),
        mock.patch.object(quantize, "note", lambda text: None),
    ):
        for number in part.share(range(cases)):
            place = folder / f"case-{number}"
            found = _case(random.Random(f"roundtrip/{seed}/{number}"), place)
            failures += [f"case {number} of seed {seed}: {line}" for line in found]
            counts["different" if found else "the same"] += 1
            shutil.rmtree(place)
    return Report(counts.total(), failures, {"checkpoints": counts}, {})


def _library(raw: dict[str, Any]) -> sandbox.Library:
    """In this process: the files are the test's own, and a process for each would take most of the time."""
    return sandbox.InProcessTokenizer(json.dumps(raw))


def _case(rng: random.Random, place: Path) -> list[str]:
    source, single = place / "hf", place / "f32"
    write_checkpoint(rng, source)
    single.mkdir()
    quantize.write(quantize.plan(source, "F32"), single / "m.gguf")
    mix = rng.choice(list(FILE_TYPES))
    quantize.write(quantize.plan(source, mix), place / "mix.gguf")
    copies = {"F32": single / "m.gguf", f"a GGUF of {mix}": place / "mix.gguf"}
    for linked in (False, True):
        copies["linked" if linked else "merged"] = place / f"merged-{linked}"
        convert_model.write(convert_model.plan(source, single, linked=linked), place / f"merged-{linked}")
    ids = [rng.randrange(500) for _ in range(24)]
    truth, wanted = open_model(source, "reference", activations="exact"), text_facts(source, rng.random())
    logits = truth.logits(ids)
    found = []
    for name, path in copies.items():
        other = open_model(path, "reference", activations="exact")
        expected = logits
        if path == place / "mix.gguf":
            plain = {key: dense(other.checkpoint[key]) for key in other.checkpoint}
            expected = Model(other.config, plain, CpuBackend("reference", "exact")).logits(ids)
        error = np.abs(other.logits(ids) - expected).max() / np.abs(expected).max()
        if not error <= CLOSE:
            found.append(f"{name}: logits differ by {error:.1e} of the largest")
        if other.config.stop_ids != truth.config.stop_ids:
            found.append(f"{name}: stops {other.config.stop_ids}, not {truth.config.stop_ids}")
        facts = text_facts(path, wanted["number"])
        found += [
            f"{name}: {k} {facts[k]!r}, not {wanted[k]!r}"[:400] for k in wanted if facts[k] != wanted[k]
        ]
    return found


def text_facts(place: Path, number: float) -> dict[str, Any]:
    """All that must not change of what a folder says about text."""
    t = Tokenizer(place)
    rng = random.Random(number)
    turns = [
        Message("user", rng.choice(TEXTS)),
        Message("assistant", rng.choice(TEXTS), "so"),
        Message("user", "z"),
    ]
    prompt = t.encode_pieces(ChatTemplate.open(t).pieces(turns, thinking=number < 0.5))
    return {
        "number": number,
        "prompt": prompt,
        "texts": [t.encode(text) for text in TEXTS],
        "stop_ids": t.stop_ids,
        "bos": t.bos,
        "special": t.special,
        "control": t.control,
        "templates": t.templates,
        "sampling": answers.sampling(t.generation, place),
        "length": answers.max_new_tokens(t.generation, place),
    }


# --- what is drawn ------------------------------------------------------------------------------------------


def draw_config(rng: random.Random) -> dict[str, Any]:
    """A config.json in which every honoured number differs from case to case."""
    groups = rng.choice([(1, 1), (2, 1), (2, 2), (4, 2)])
    heads, layers = rng.choice([1, 2, 3]), rng.choice([1, 2, 3])
    config: dict[str, Any] = {
        "model_type": rng.choice(["deepseek_v3", "kimi_k2"]),
        "vocab_size": 520,
        "hidden_size": rng.choice([32, 48]),
        "intermediate_size": rng.choice([32, 40]),
        "moe_intermediate_size": rng.choice([32, 64]),
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
        "rms_norm_eps": rng.choice([1e-6, 1e-5, 0.01]),
        "rope_theta": rng.choice([10000.0, 50000, 1e6]),
        "max_position_embeddings": rng.choice([256, 4096]),
        "rope_scaling": rng.choice([None, draw_yarn(rng), draw_yarn(rng)]),
        "bos_token_id": 0,
        "eos_token_id": rng.choice([1, [1, 502], None, [501]]),
    }
    if rng.random() < 0.2:
        nested = {k: v for k, v in config.items() if k != "eos_token_id"}
        return {"model_type": "kimi_k25", "text_config": nested, "eos_token_id": config["eos_token_id"]}
    return config


def draw_yarn(rng: random.Random) -> dict[str, Any]:
    """`rope_scaling` with any of YaRN's numbers there or not."""
    every = {
        "beta_fast": rng.choice([1, 32, 64.5]),
        "beta_slow": rng.choice([1, 2, 0.5]),
        "mscale": rng.choice([1.0, 0.707, 0]),
        "mscale_all_dim": rng.choice([1.0, 0.707, 0, 0.3]),
        "attention_factor": rng.choice([1.0, 1.3]),
    }
    kept = {k: v for k, v in every.items() if rng.random() < (0.2 if k == "attention_factor" else 0.7)}
    length = rng.choice([16, 64])
    return {
        "type": "yarn",
        "factor": rng.choice([1.0, 8, 40.0]),
        "original_max_position_embeddings": length,
    } | kept


def write_checkpoint(rng: random.Random, folder: Path) -> None:
    """A checkpoint in FP8, BF16 or float32, with all that belongs to it."""
    folder.mkdir(parents=True)
    config = draw_config(rng)
    storage = rng.choice(["F8_E4M3", "BF16", "F32"])
    if storage == "F8_E4M3":
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
        }
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
    if storage == "F32" or name.endswith("bias"):
        return {name: ("F32", x)}
    return {name: ("BF16", bf16.encode(x))}


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
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if generation := draw_generation(rng):
        (folder / "generation_config.json").write_text(json.dumps(generation))


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
