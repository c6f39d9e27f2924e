"""Number formats: a dict of modules. A GGML format is a module with NAME, GGML_TYPE, WEIGHTS a block, BLOCK
(a structured dtype that is ggml's C struct), `unpack` to the numbers named PARTS, `dequantize` and, where the
project writes it, `quantize`. E4M3, E5M2 and E8M0 are codes of one byte with `decode` and TABLE.
"""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np

from refimpl.errors import refusal
from refimpl.formats import bf16, f16, f32, q2_k, q3_k, q4_0, q4_1, q4_k, q5_0, q5_1, q5_k, q6_k, q8_0, q8_k

_MODULES = (f32, f16, q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, q6_k, q8_k, bf16)
FORMATS: dict[int, ModuleType] = {m.GGML_TYPE: m for m in _MODULES}

# Recognized by name and refused. Types 4, 5, 31..33 and 36..38 were removed from ggml.
KNOWN_UNSUPPORTED: dict[int, str] = {
    4: "Q4_2",
    5: "Q4_3",
    9: "Q8_1",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    34: "TQ1_0",
    35: "TQ2_0",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
    39: "MXFP4",
    40: "NVFP4",
}


def get(ggml_type: int, where: object = "ggml type") -> ModuleType:
    """The module of a type id. UnsupportedError E1301 for a type known by name only, InputFormatError E1302
    for no type at all.
    """
    if ggml_type in FORMATS:
        return FORMATS[ggml_type]
    names = ", ".join(m.NAME for m in _MODULES)
    if ggml_type in KNOWN_UNSUPPORTED:
        raise refusal("E1301 quantized", where, found=KNOWN_UNSUPPORTED[ggml_type], expected=names)
    raise refusal("E1302", where, found=ggml_type, expected=names)


def type_name(ggml_type: int) -> str:
    """12 -> 'Q4_K', also for types that are known by name only; InputFormatError E1302 for others."""
    return KNOWN_UNSUPPORTED.get(ggml_type) or get(ggml_type).NAME


def type_id(name: str) -> int:
    """'Q4_K' -> 12; UnsupportedError E1301 for any other name."""
    for ggml_type, module in FORMATS.items():
        if name.upper() == module.NAME:
            return ggml_type
    raise refusal("E1301", name, expected=", ".join(m.NAME for m in _MODULES))


def dequantize(ggml_type: int, data: np.ndarray) -> np.ndarray:
    """u8 [..., n*block bytes] -> f32 [..., n*block weights]. Errors as `get`; ValueError when the bytes are
    not whole blocks.
    """
    return get(ggml_type).dequantize(data)


def quantize(ggml_type: int, x: np.ndarray) -> np.ndarray:
    """f32 [..., n*block weights] -> u8 [..., n*block bytes]. UnsupportedError E1303 for a type that is only
    decoded (Q3_K).
    """
    module = get(ggml_type)
    if not hasattr(module, "quantize"):
        raise refusal("E1303", module.NAME)
    return module.quantize(x)


def row_bytes(ggml_type: int, weights: int) -> int:
    """Bytes of a row of `weights` weights; ValueError when that is not whole blocks."""
    module = get(ggml_type)
    if weights % module.WEIGHTS:
        raise ValueError(f"{weights} weights are not whole {module.NAME} blocks of {module.WEIGHTS}")
    return weights // module.WEIGHTS * module.BLOCK.itemsize


def nbytes(ggml_type: int, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of row-major `shape`, the last dimension packed."""
    return math.prod(shape[:-1]) * row_bytes(ggml_type, shape[-1] if shape else 1)
