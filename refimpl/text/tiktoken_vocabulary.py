"""A `tiktoken.model` (Kimi-K2, Moonlight) as the tokenizer.json that gives the same ids. The package
tiktoken, an extra, reads the file: lines of a token in base64 and its rank.

tiktoken merges the neighbours whose joint bytes have the lowest rank, and takes a piece that is a token for
that token. Byte-level BPE does the same with a merge for every way to cut every token, in the order of
ranks, and `ignore_merges`. The pattern that splits a text stands in the model's own Python code, which is
not run: Kimi's, the only one known to come with this architecture, is taken, with a note.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from refimpl.errors import refusal
from refimpl.fields import note
from refimpl.text import gguf_vocabulary

RESERVED = 256  # ids of control tokens behind the ranks
MAX_BYTES = 64 << 20


def tokenizer(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json's contents from a tiktoken.model and its tokenizer_config.json. ResourceError E6113
    without the package, InputFormatError E6113 for a file it cannot read.
    """
    ranks = _ranks(path)
    note(f"{path}: text is split as Kimi-K2 does it; the file itself does not say")
    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    return {
        "version": "1.0",
        "added_tokens": _added(max(ranks.values(), default=-1) + 1, config, path),
        "normalizer": None,
        "pre_tokenizer": gguf_vocabulary.pre_tokenizer("kimi-k2"),
        "post_processor": None,
        "decoder": gguf_vocabulary.BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": _merges(ranks), "ignore_merges": True},
    }


def _ranks(path: Path) -> dict[bytes, int]:
    try:
        from tiktoken.load import load_tiktoken_bpe  # optional, an extra
    except ImportError:
        raise refusal("E6113 tiktoken", path) from None
    if path.stat().st_size > MAX_BYTES:
        raise refusal("E6113", path, found=f"{path.stat().st_size} bytes", expected=f"at most {MAX_BYTES}")
    try:
        ranks = load_tiktoken_bpe(str(path))
    except Exception as error:  # whatever the package makes of a damaged line
        raise refusal("E6113", path, found=f"{type(error).__name__}: {error}"[:80]) from None
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise refusal(
            "E6113", path, found=f"no token for byte {missing[0]:#04x}", expected="one for each byte"
        )
    return ranks


def _added(first: int, config: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """Control tokens behind the ranks: those the config names, and reserved ones in between."""
    named = config.get("added_tokens_decoder") or {}
    try:
        given = {int(i): t["content"] for i, t in named.items()}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise refusal("E6113", path, found=repr(error)[:80], expected="added_tokens_decoder of ids") from None
    spellings = {i: f"<|reserved_token_{i}|>" for i in range(first, first + RESERVED)} | given
    flags = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    return [{"id": i, "content": text, **flags} for i, text in sorted(spellings.items())]


def _merges(ranks: dict[bytes, int]) -> list[list[str]]:
    """Every way to cut a token into two others, by the rank of the token, then of the parts."""
    found = []
    for token, rank in ranks.items():
        for i in range(1, len(token)):
            a, b = ranks.get(token[:i]), ranks.get(token[i:])
            if a is not None and b is not None:
                found.append((rank, a, b, spell(token[:i]), spell(token[i:])))
    return [[left, right] for *_, left, right in sorted(found)]


def _alphabet() -> dict[int, str]:
    """A visible character for each byte, as GPT-2's byte-level BPE has them."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + n) for n, b in enumerate(others)}


_ALPHABET = _alphabet()


def spell(token: bytes) -> str:
    """A token's bytes as a byte-level vocabulary spells them."""
    return "".join(_ALPHABET[b] for b in token)
