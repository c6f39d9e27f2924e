"""What a page's script must know of a format: the fields of a block, whose every bit is, and the formula as
JavaScript.

Nothing is written twice: fields, owners and what a bit adds come from `formats.draw` and `unpack`, the
formula from the
module's FORMULA, the shape of a float from `draw.FLOATS`. The script rounds every operation to float32, as
numpy does.
"""

from __future__ import annotations

import ast
import json
from types import ModuleType
from typing import Any

import numpy as np

from refimpl import formats
from refimpl.formats import bf16, draw, e4m3, e5m2, e8m0, f16, f32
from refimpl.pages.scaled import SCALED

RUN = 32  # numbers of a plain type that are shown together
FLOATS: dict[str, ModuleType] = {
    "E4M3": e4m3,
    "E5M2": e5m2,
    "E8M0": e8m0,
    "BF16": bf16,
    "F16": f16,
    "F32": f32,
}
BLOCKS: dict[str, Any] = {m.NAME: m for m in formats.FORMATS.values() if hasattr(m, "FORMULA")} | SCALED
MEANS = {
    "d": "scale",
    "dmin": "unit of the minima",
    "e": "exponent of the scale",
    "m": "minimum",
    "q": "quant",
    "sc": "scale",
    "scale": "scale",
    "bsums": "sum of 16 quants",
    "S": "sign, 1 means minus",
    "E": "exponent",
    "M": "mantissa",
}
"""What the numbers of PARTS are called, of every format that has one of the name."""
STORED = {
    "F8_E4M3": "E4M3",
    "F8_E5M2": "E5M2",
    "F8_E8M0": "E8M0",
}
"""Names of types in a safetensors file that differ from the layouts' names."""


def known(dtype: str) -> str | None:
    """The name of the layout of a tensor's type, as safetensors or ggml call it; None for a type without
    one.
    """
    name = STORED.get(dtype, dtype)
    return name if name in BLOCKS or name in FLOATS else None


def layout(name: str) -> dict[str, Any]:
    """The layout of "Q4_K", "E4M3", ...: `bytes` and `weights` of a block, `width` of a group (weights where
    there are none), `fields`, `parts` with their names and shapes, `bits` ([byte * 8 + bit] -> part, flat
    index, place in the number, what it adds), `formula` and `tables`; of a float `float` instead of tables.
    KeyError for other names.
    """
    return _block(BLOCKS[name]) if name in BLOCKS else _float(name)


def _block(module: Any) -> dict[str, Any]:
    zeros = draw.field_values(module, np.zeros(module.BLOCK.itemsize, np.uint8))
    floats = {f.name: f.kind for f in draw.fields(module) if f.kind in draw.FLOATS}
    names = list(module.PARTS)
    means = MEANS | ({"d": "unit of the scales"} if "sc" in names else {})
    parts = {
        part: {
            "means": means.get(part, ""),
            "shape": list(value.shape),
            "zero": [] if part in floats else value.reshape(-1).tolist(),
        }
        | ({"float": float_shape(floats[part])} if part in floats else {})
        for part, value in zeros.items()
    }
    adds = _adds(module)
    bits = [
        [names.index(o.part), _flat(o.at, zeros[o.part].shape), o.bit, adds.get((8 * byte + bit), 0)]
        for byte, row in enumerate(draw.owners(module))
        for bit, o in enumerate(row)
    ]
    return {
        "name": module.NAME,
        "type": module.GGML_TYPE,
        "bytes": module.BLOCK.itemsize,
        "weights": module.WEIGHTS,
        "width": zeros["q"].shape[-1],
        "fields": [f._asdict() for f in draw.fields(module)],
        "parts": parts,
        "bits": bits,
        "formula": module.FORMULA,
        "tables": {name: getattr(module, name).tolist() for name in _tables(module.FORMULA)},
    }


def _adds(module: Any) -> dict[int, int]:
    """{bit of the block: what it adds to its integer when it is set}; the highest of a signed one takes
    away.
    """
    size = module.BLOCK.itemsize
    flipped = np.zeros((size * 8, size), np.uint8)
    flipped[np.arange(size * 8), np.arange(size * 8) // 8] = 1 << (np.arange(size * 8) % 8)
    found: dict[int, int] = {}
    for was, now in zip(module.unpack(np.zeros(size, np.uint8)), module.unpack(flipped)):
        if was.dtype.kind != "f":
            change = now[:, 0].astype(np.int64) - was[0].astype(np.int64)
            found |= {int(place[0]): int(change[tuple(place)]) for place in np.argwhere(change)}
    return found


def _flat(at: tuple[int, ...], shape: tuple[int, ...]) -> int:
    return int(np.ravel_multi_index(at, shape)) if at else 0


def float_shape(kind: str) -> dict[str, Any]:
    """Bits of exponent and mantissa of a kind in `draw.FLOATS`, its bias, and whether its highest exponent
    means infinity and NaN ("ieee") or only the last code NaN.
    """
    _, exponent, mantissa = draw.FLOATS[kind]
    module = FLOATS[kind.upper()]
    top = ((1 << exponent) - 1) << mantissa
    ieee = kind == "f32" or kind == "f16" or kind == "bf16" or bool(np.isinf(module.TABLE[top]))
    return {"exponent": exponent, "mantissa": mantissa, "bias": 2 ** (exponent - 1) - 1, "ieee": ieee}


def _float(name: str) -> dict[str, Any]:
    kind = name.lower()
    sign, exponent, mantissa = draw.FLOATS[kind]
    width, shape = sign + exponent + mantissa, float_shape(kind)
    letters = ["S", "E", "M"]
    place = [(2, b) for b in range(mantissa)] + [(1, b) for b in range(exponent)] + [(0, 0)] * sign
    bits = [[part, n, bit, 1 << bit] for n in range(RUN) for part, bit in place]
    used = [letter for letter, count in zip(letters, (sign, exponent, mantissa)) if count]
    one = f"2 ** (E - {shape['bias']})" + (f" * (1 + M / {2**mantissa})" if mantissa else "")
    nil = f"; of E = 0: (-1) ** S * 2 ** {1 - shape['bias']} * M / {2**mantissa}" if mantissa else ""
    return {
        "name": name,
        "type": getattr(FLOATS[name], "GGML_TYPE", None),
        "bytes": RUN * width // 8,
        "weights": RUN,
        "width": RUN,
        "fields": [{"name": "numbers", "kind": f"{RUN} x {kind}", "offset": 0, "nbytes": RUN * width // 8}],
        "parts": {letter: {"means": MEANS[letter], "shape": [RUN], "zero": [0] * RUN} for letter in letters},
        "bits": bits,
        "formula": ("(-1) ** S * " if sign else "") + one + nil,
        "used": used,
        "float": shape,
        "tables": {},
    }


# --- JavaScript ---------------------------------------------------------------------------------------------


def _tables(formula: str) -> list[str]:
    return [n.id for n in ast.walk(ast.parse(formula)) if isinstance(n, ast.Name) and n.id.isupper()]


def javascript(formula: str) -> str:
    """A FORMULA as an expression of JavaScript in `p` (numbers by part), `t` (tables), `j`, `i` and `n`
    (weight of the block), every operation rounded to float32 by `f`. ValueError for what no formula has.

    The result has the bits of float32 arithmetic: a product of two float32 is exact in a double, and a sum
    that is rounded to double and then to float32 is rounded as if once (53 >= 2 * 24 + 2).
    """
    return _expression(ast.parse(formula, mode="eval").body)


_SIGNS: dict[type, str] = {ast.Mult: "*", ast.Add: "+", ast.Sub: "-", ast.Pow: "**"}


def _expression(node: ast.expr) -> str:
    if isinstance(node, ast.BinOp) and type(node.op) in _SIGNS:
        return f"f({_expression(node.left)} {_SIGNS[type(node.op)]} {_expression(node.right)})"
    if isinstance(node, ast.Constant):
        return repr(node.value)
    if isinstance(node, ast.Name):
        return f"p.{node.id}[0]"
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        name, inner = node.value.id, node.slice
        if name.isupper():
            return f"t.{name}[{_expression(inner)}]"
        if isinstance(inner, ast.Tuple):
            return f"p.{name}[n]"
        if isinstance(inner, ast.Name):
            return f"p.{name}[{'j' if inner.id == 'j' else 'n'}]"
    raise ValueError(f"no formula has this: {ast.dump(node)}")


def script(names: list[str] | None = None) -> str:
    """The layouts (all, or those named) as JavaScript that sets `LAYOUTS`."""
    rows = []
    for name in names or [*BLOCKS, *FLOATS]:
        found = layout(name)
        formula = (
            "decodeFloat(l.float, p.S[n], p.E[n], p.M[n])" if name in FLOATS else javascript(found["formula"])
        )
        told = json.dumps(found, separators=(",", ":"))
        rows.append(f"{json.dumps(name)}: {{...{told}, weight: (l, p, t, f, j, n) => {formula}}}")
    return "const LAYOUTS = {\n" + ",\n".join(rows) + "\n};\n"
