"""Which family an operation belongs to, by the pattern of its name: a new `*.dequantize` needs nothing
here.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from refimpl.conformance.families.attention import MLA, RMS_NORM, RMS_NORM_QUANT, ROPE, ROUTE
from refimpl.conformance.families.codecs import (
    ACT_QUANT,
    ACT_QUANT_UE8M0,
    DECODE,
    DECODE_CODES,
    ENCODE,
    ENCODE_CODES,
    INT4_DEQUANT,
    WEIGHT_DEQUANT,
    WEIGHT_QUANT,
)
from refimpl.conformance.families.family import Family
from refimpl.conformance.families.indexer import INDEX_ROPE, INDEX_ROWS, LAYER_NORM
from refimpl.conformance.families.linear import EMBED, EXPERTS, LINEAR, SWIGLU, SWIGLU_QUANT
from refimpl.errors import refusal

FAMILIES = (
    DECODE,
    DECODE_CODES,
    ENCODE_CODES,
    ENCODE,
    ACT_QUANT,
    ACT_QUANT_UE8M0,
    WEIGHT_DEQUANT,
    INT4_DEQUANT,
    WEIGHT_QUANT,
    EMBED,
    LINEAR,
    SWIGLU,
    SWIGLU_QUANT,
    EXPERTS,
    RMS_NORM,
    RMS_NORM_QUANT,
    ROPE,
    MLA,
    ROUTE,
    LAYER_NORM,
    INDEX_ROPE,
    INDEX_ROWS,
)


def family(op: str) -> Family:
    """MismatchError E8003 for an operation that has none."""
    found = next((f for f in FAMILIES if any(fnmatchcase(op, p) for p in f.patterns)), None)
    if found is None:
        raise refusal("E8003", op)
    return found
