"""The tokenizer that a GGUF carries in its metadata, as the files Hugging Face keeps it in;
`tokenizer.Tokenizer` reads either.

`tokenizer.huggingface.json` is a whole tokenizer.json (`refimpl.quantize` writes it). Most files have
llama.cpp's keys alone: tokens, their types, merges, and of the pre-tokenizer the name. Two names are known
here, DeepSeek-V3's and Kimi-K2's; to guess another would give other token ids without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refimpl import fields
from refimpl.checkpoint import gguf
from refimpl.errors import refusal

ORDINARY, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
_LETTERS = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"  # begin of a word, rest of it
_KIMI_WORD = r"[^\r\n\p{L}\p{N}]?[%s&&[^\p{Han}]]%s[%s&&[^\p{Han}]]%s(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# What splits a text before merging, in passes: each name's tokenizer.json (or, for Kimi, its tiktoken
# pattern).
SPLITS = {
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| "
        r"?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "kimi-k2": (
        "|".join(
            (
                r"[\p{Han}]+",
                _KIMI_WORD % (_LETTERS[0], "*", _LETTERS[1], "+"),
                _KIMI_WORD % (_LETTERS[0], "+", _LETTERS[1], "*"),
                r"\p{N}{1,3}",
                r" ?[^\s\p{L}\p{N}]+[\r\n]*",
                r"\s*[\r\n]+",
                r"\s+(?!\S)",
                r"\s+",
            )
        ),
    ),
}
MERGES_IGNORED = {"kimi-k2"}  # a piece that is a token is that token, whatever the merges make of it


def pre_tokenizer(name: str) -> dict[str, Any]:
    """tokenizer.json's `pre_tokenizer` for a name of SPLITS."""
    splits = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in SPLITS[name]
    ]
    return {"type": "Sequence", "pretokenizers": [*splits, BYTE_LEVEL]}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def name_of(raw: Mapping[str, Any]) -> str | None:
    """The name of a tokenizer.json's splits, None where SPLITS has none of it."""
    for name in SPLITS:
        same = _splits(raw.get("pre_tokenizer")) == _splits(pre_tokenizer(name))
        if (
            same
            and not raw.get("normalizer")
            and bool((raw.get("model") or {}).get("ignore_merges")) == (name in MERGES_IGNORED)
        ):
            return name
    return None


def _splits(pre: Any) -> list[Any]:
    """What of a pre-tokenizer decides how text is split."""
    parts = pre.get("pretokenizers") if isinstance(pre, dict) and pre.get("type") == "Sequence" else [pre]
    wanted = ("type", "pattern", "behavior", "invert", "add_prefix_space", "use_regex")
    parts = parts if isinstance(parts, list) else [parts]
    return [{k: p.get(k) for k in wanted} if isinstance(p, dict) else p for p in parts]


def metadata(path: Path) -> tuple[Mapping[str, Any], Path]:
    """The metadata of a .gguf file, or of the model in a folder, and the file it is from. Raises as
    `gguf.read`; UnsupportedError E4002 for a field that would change prompts or answers and is not done.
    """
    file = gguf.read(gguf.first_file(path))
    meta = file.metadata
    fields.judge("GGUF", meta, file.path, [k for k in meta if k.startswith(fields.PROMPTS)])
    return meta, file.path


def config(meta: Mapping[str, Any], where: object) -> dict[str, Any]:
    """tokenizer_config.json as the metadata have it: named tokens, add_bos_token and chat templates.
    InputFormatError E6111 for what is malformed.
    """
    found: dict[str, Any] = {}
    if "tokenizer.ggml.tokens" in meta:
        tokens = _texts(meta, "tokens", where)
        for key, name in NAMED.items():
            if (i := _token(meta, tokens, key, where)) is not None:
                found[name] = tokens[i]
        _token(meta, tokens, "eot", where)
    if isinstance(add := meta.get("tokenizer.ggml.add_bos_token"), bool):
        found["add_bos_token"] = add
    named = {k.removeprefix(_TEMPLATE + "."): v for k, v in meta.items() if k.startswith(_TEMPLATE + ".")}
    default = {} if meta.get(_TEMPLATE) is None else {"default": meta[_TEMPLATE]}
    if named:
        rows = (default | named).items()
        found["chat_template"] = [{"name": name, "template": source} for name, source in rows]
    elif default:
        found["chat_template"] = default["default"]
    return found


NAMED = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
_TEMPLATE = "tokenizer.chat_template"


def tokenizer(meta: Mapping[str, Any], where: object) -> dict[str, Any]:
    """tokenizer.json from GGUF metadata.

    UnsupportedError E6110 for another kind than byte-level BPE, E6112 for an unknown pre-tokenizer;
    InputFormatError E6104 for a broken tokenizer.huggingface.json, E6111 for keys that are missing or
    malformed.
    """
    raw = meta.get("tokenizer.huggingface.json")
    return _parsed(raw, where) if raw is not None else _rebuilt(meta, _texts(meta, "tokens", where), where)


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
    model: dict[str, Any] = {"type": "BPE", "vocab": used, "merges": _texts(meta, "merges", where)}
    if pre in MERGES_IGNORED:
        model["ignore_merges"] = True
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer(pre),
        "post_processor": None,
        "decoder": BYTE_LEVEL,
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
