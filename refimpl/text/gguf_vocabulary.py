"""The tokenizer that a GGUF carries in its metadata, as the files Hugging Face keeps it in;
`tokenizer.Tokenizer` reads either.

`tokenizer.huggingface.json` is a whole tokenizer.json (`refimpl.quantize` writes it). Most files have
llama.cpp's keys alone: tokens, their types, merges, and of the pre-tokenizer the name. One name is known
here, DeepSeek-V3's; to guess another would give other token ids without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from refimpl.checkpoint import gguf
from refimpl.errors import refusal

ORDINARY, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
# What splits a text before merging, in three passes: DeepSeek-V3's tokenizer.json.
SPLITS = {
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| "
        r"?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
}
_HINT = (
    "put tokenizer.json and tokenizer_config.json beside the file, or name the original checkpoint's "
    "folder as --model_path"
)


class Files(NamedTuple):
    """The contents of tokenizer.json, tokenizer_config.json and generation_config.json."""

    tokenizer: dict[str, Any]
    config: dict[str, Any]
    generation: dict[str, Any]


def read(path: Path) -> Files:
    """From a .gguf file, or the model in a folder. Raises as `files` and as `gguf.read`."""
    file = gguf.read(gguf.first_file(path))
    return files(file.metadata, file.path)


def files(meta: Mapping[str, Any], where: object) -> Files:
    """From GGUF metadata.

    UnsupportedError E6110 for another kind than byte-level BPE, E6112 for an unknown pre-tokenizer;
    InputFormatError E6104 for a broken tokenizer.huggingface.json, E6111 for keys that are missing or
    malformed.
    """
    tokens = _texts(meta, "tokens", where)
    special = {
        name: _token(meta, tokens, key, where)
        for key, name in (("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token"))
    }
    config: dict[str, Any] = {name: tokens[i] for name, i in special.items() if i is not None}
    template = meta.get("tokenizer.chat_template")
    stops = [i for i in (special["eos_token"], _token(meta, tokens, "eot", where)) if i is not None]
    generation = {"eos_token_id": list(dict.fromkeys(stops))} if stops else {}
    raw = meta.get("tokenizer.huggingface.json")
    tokenizer = _parsed(raw, where) if raw is not None else _rebuilt(meta, tokens, where)
    return Files(tokenizer, config | ({} if template is None else {"chat_template": template}), generation)


def _parsed(raw: Any, where: object) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (TypeError, ValueError, RecursionError) as error:
        raise refusal("E6104 gguf", where, found=str(error)[:80]) from None
    if not isinstance(value, dict):
        raise refusal("E6104", where, found=type(value).__name__)
    return value


def _rebuilt(meta: Mapping[str, Any], tokens: list[str], where: object) -> dict[str, Any]:
    kind, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise refusal("E6110 checkpoint", where, found=repr(kind), expected="tokenizer.ggml.model 'gpt2'")
    if pre not in SPLITS:
        raise refusal("E6112", where, found=repr(pre), expected=" or ".join(map(repr, SPLITS)))
    types = meta.get("tokenizer.ggml.token_type", [ORDINARY] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise refusal("E6111 tokenizer", where, expected=f"{len(tokens)} numbers")
    used = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
    added = [
        {
            "id": i,
            "content": tokens[i],
            "special": kind == CONTROL,
            "normalized": False,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
        }
        for i, kind in enumerate(types)
        if kind in (CONTROL, USER_DEFINED)
    ]
    splits = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in SPLITS[pre]
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {"type": "BPE", "vocab": used, "merges": _texts(meta, "merges", where)}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, level]},
        "post_processor": None,
        "decoder": level,
        "model": model,
    }


def _texts(meta: Mapping[str, Any], key: str, where: object) -> list[str]:
    value = meta.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value) or not value:
        what = f"tokenizer.ggml.{key} is missing or no list of texts"
        raise refusal("E6111", where, what=what, found=type(value).__name__)
    return value


def _token(meta: Mapping[str, Any], tokens: list[str], key: str, where: object) -> int | None:
    value = meta.get(f"tokenizer.ggml.{key}_token_id")
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(tokens)):
        return value
    what = f"tokenizer.ggml.{key}_token_id is no token"
    raise refusal(
        "E6111", where, what=what, found=repr(value)[:40], expected=f"a number from 0 to {len(tokens) - 1}"
    )
