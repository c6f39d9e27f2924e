"""Every field of the files that describe a model, and what is done with it: one table for config.json (with
its `quantization_config`, `rope_scaling` and `text_config`), generation_config.json, tokenizer_config.json
and the metadata of a GGUF.

honoured    it governs what the row says
harmless    it changes nothing that is computed here, for the reason given
refused     it would change what is computed and is not done; values at which it changes nothing are let
through

`check` is the one judge of all sources. Keys in none of the rows are named in one note. docs/fields.md is
made from this table.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from refimpl.errors import printable, refusal
from refimpl.fields.config import COMPRESSED, COMPRESSED_WEIGHTS, CONFIG, QUANTIZATION, ROPE
from refimpl.fields.gguf import GGUF
from refimpl.fields.rows import HARMLESS, HONOURED, REFUSED, Field
from refimpl.fields.text import GENERATION, TOKENIZER

__all__ = ["HARMLESS", "HONOURED", "REFUSED", "TABLES", "Field", "check", "note", "row"]

TABLES: dict[str, dict[str, Field]] = {
    "config.json": CONFIG,
    "quantization_config": QUANTIZATION,
    "compressed-tensors": COMPRESSED,
    "weights of compressed-tensors": COMPRESSED_WEIGHTS,
    "rope_scaling": ROPE,
    "generation_config.json": GENERATION,
    "tokenizer_config.json": TOKENIZER,
    "GGUF": GGUF,
}
PROMPTS = (
    "tokenizer.",
    "general.sampling.",
    "refimpl.stop",
    "refimpl.max",
)  # of a GGUF's keys, what text needs


def row(source: str, key: str) -> Field | None:
    """The row of a key, None where there is none."""
    table = TABLES[source]
    return table.get(key) or next((f for k, f in table.items() if "*" in k and fnmatchcase(key, k)), None)


def judge(source: str, raw: Mapping[str, Any], where: object, keys: Iterable[str] | None = None) -> None:
    """Judge the keys of `raw` (or those of `keys`) by the table of `source`: UnsupportedError E4002 for the
    first that is refused; one note for all that are in no row.
    """
    unknown = []
    for key in raw if keys is None else keys:
        found = row(source, key)
        if found is None:
            unknown.append(str(key))
        elif not found.passes(raw[key], raw):
            shown = printable(repr(raw[key]), 60)
            raise refusal("E4002", where, key=key, why=found.why, found=shown, expected=found.expected)
    if unknown:
        shown = ", ".join(printable(k, 60) for k in sorted(unknown)[:20])
        more = f" and {len(unknown) - 20} more" if len(unknown) > 20 else ""
        note(f"{where}: fields that are not known here and not looked at: {shown}{more}")


@cache
def note(text: str) -> None:
    """One line on stderr, once a process."""
    print(f"refimpl: note: {printable(text, 1000)}", file=sys.stderr)
