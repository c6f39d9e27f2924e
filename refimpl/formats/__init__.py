"""Number formats: a dict of modules. A GGML format is a module with NAME, GGML_TYPE, WEIGHTS a block, BLOCK
(a structured dtype that is ggml's C struct), `unpack` to the numbers named PARTS, `dequantize` and, where the
project writes it, `quantize`; where its quants are places in a table of numbers, VALUES is that table. E4M3,
E5M2 and E8M0 are codes of one byte with `decode` and TABLE.

FORMATS follows from the rows of `ggml_types` that are decoded. A type is asked for by its number or its name.
"""

from __future__ import annotations

import math
from importlib import import_module
from types import ModuleType

import numpy as np

from refimpl.errors import meant, refusal
from refimpl.formats.ggml_types import FORK, TYPES, GgmlType


def _module(ggml_type: int, row: GgmlType) -> ModuleType:
    """The module of a row; ImportError when the two tell different things."""
    module = import_module(f"refimpl.formats.{row.name.lower()}")
    told = (module.GGML_TYPE, module.NAME, module.WEIGHTS, module.BLOCK.itemsize)
    if told != (ggml_type, row.name, row.weights, row.nbytes):
        raise ImportError(f"{module.__name__} says {told}, its row in ggml_types.py {ggml_type}: {row}")
    return module


FORMATS: dict[int, ModuleType] = {
    number: _module(number, row) for number, row in TYPES.items() if row.decoded
}
KNOWN_UNSUPPORTED: dict[int, str] = {number: row.name for number, row in TYPES.items() if not row.decoded}
_NUMBERS: dict[str, int] = {row.name: number for number, row in TYPES.items()}


def type_id(kind: int | str, where: object = "ggml type") -> int:
    """A type's number, of its number or its name: 12, 'Q4_K' or 'q4_k' -> 12, also for types that are not
    decoded. InputFormatError E1302 for what is no type.
    """
    number = _NUMBERS.get(kind.upper()) if isinstance(kind, str) else int(kind)
    if number in TYPES:
        return number
    if isinstance(kind, str):
        raise refusal("E1302 name", where, found=kind, expected=meant(kind, (t.name for t in TYPES.values())))
    raise refusal("E1302", where, found=kind, expected=_names())


def type_name(kind: int | str) -> str:
    """A type's name: 12 -> 'Q4_K', also for types that are not decoded. InputFormatError E1302 for what is no
    type.
    """
    return TYPES[type_id(kind)].name


def get(kind: int | str, where: object = "ggml type") -> ModuleType:
    """The module of a type by number or name. UnsupportedError E1301 for a type that is not decoded here,
    InputFormatError E1302 for no type at all.
    """
    number = type_id(kind, where)
    if number in FORMATS:
        return FORMATS[number]
    key = "E1301 fork" if number >= FORK else "E1301"
    raise refusal(key, where, found=TYPES[number].name, expected=_names())


def dequantize(kind: int | str, data: np.ndarray) -> np.ndarray:
    """u8 [..., n*block bytes] of a type by number or name -> f32 [..., n*block weights]. Errors as `get`;
    ValueError when the bytes are not whole blocks.
    """
    return get(kind).dequantize(data)


def quantize(kind: int | str, x: np.ndarray) -> np.ndarray:
    """f32 [..., n*block weights] -> u8 [..., n*block bytes] of a type by number or name. Errors as `get`;
    UnsupportedError E1303 for a type that is only decoded (Q3_K).
    """
    module = get(kind)
    if not hasattr(module, "quantize"):
        written = ", ".join(m.NAME for m in FORMATS.values() if hasattr(m, "quantize"))
        raise refusal("E1303", module.NAME, expected=written)
    return module.quantize(x)


def row_bytes(kind: int | str, weights: int) -> int:
    """Bytes of a row of `weights` weights of any type, decoded or not; ValueError when that is not whole
    blocks.
    """
    row = TYPES[type_id(kind)]
    if weights % row.weights:
        raise ValueError(f"{weights} weights are not whole {row.name} blocks of {row.weights}")
    return row.row_head + weights // row.weights * row.nbytes


def nbytes(kind: int | str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of row-major `shape` of any type, the last dimension packed."""
    return math.prod(shape[:-1]) * row_bytes(kind, shape[-1] if shape else 1)


def _names() -> str:
    return ", ".join(module.NAME for module in FORMATS.values())
