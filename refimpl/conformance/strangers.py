"""Operations and formats that this project has no row for: the stranger brings the truth.

`--reference module:function` is what an operation must equal. `--format FILE` is a number format written as
those of `refimpl.formats` are: a module with NAME, WEIGHTS, BLOCK, `dequantize` and, where there are,
`quantize`, `unpack` and PARTS. Both hold for one process, so each process that judges is told of them.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from refimpl import formats
from refimpl.conformance.families.by_name import family
from refimpl.conformance.importing import find
from refimpl.conformance.inputs import arrays, draws
from refimpl.conformance.manifest import Manifest
from refimpl.errors import refusal
from refimpl.formats.ggml_types import TYPES, GgmlType
from refimpl.ops import OPS, Op

FIRST_NUMBER = 10_000  # of formats that ggml has no number for
VERBS = ("dequantize", "quantize")
EXACT = (*VERBS, "decode", "encode", "act_quant", "weight_quant", "weight_dequant")
"""Last words of operations that are asked for equal bits; all others for their bound."""


def add_format(where: str) -> str:
    """Make a format of a file, or of a module by its name, known in this process: its decoder and encoder are
    operations, and `linear`, `swiglu` and `experts` take it. Its name in lower case; InputFormatError E8011
    for what is no format.
    """
    module = _loaded(where)
    name = str(getattr(module, "NAME", "")).lower()
    missing = [n for n in ("NAME", "WEIGHTS", "BLOCK", "dequantize") if not hasattr(module, n)]
    if missing:
        raise refusal(
            "E8011", where, found=f"no {', '.join(missing)}", expected="a module as in refimpl/formats"
        )
    if name in draws.FORMATS:
        if draws.FORMATS[name].__name__ == module.__name__:
            return name  # told of before
        raise refusal("E8011 known", where, found=module.NAME)
    number = getattr(module, "GGML_TYPE", FIRST_NUMBER)
    while number in TYPES:
        number = max(number + 1, FIRST_NUMBER)
    module.GGML_TYPE = number  # type: ignore[attr-defined]
    TYPES[number] = GgmlType(module.NAME, module.WEIGHTS, module.BLOCK.itemsize, decoded=True)
    formats.FORMATS[number] = draws.FORMATS[name] = module
    draws.WEIGHTS = (*draws.WEIGHTS, name)
    for verb in VERBS:
        if hasattr(module, verb):
            OPS[f"{name}.{verb}"] = Op(getattr(module, verb), "bits")
    return name


def _loaded(where: str) -> ModuleType:
    path = Path(where)
    try:
        if path.suffix != ".py":
            return importlib.import_module(where)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except (ImportError, OSError, SyntaxError) as error:
        raise refusal("E8011 read", where, error=error, expected="a Python file or module") from error


def add_reference(op: str, where: str) -> str:
    """Make `module:function` the reference of an operation, of a new one too, whose name tells its inputs:
    `NAME.linear`, `NAME.dequantize`, `rope`. InputFormatError E8006; MismatchError E8003 for a name that
    tells none.
    """
    equal = OPS[op].equal if op in OPS else "bits" if op.rpartition(".")[2] in EXACT else "bound"
    family(op)
    OPS[op] = Op(find(where), equal)
    return op


def check_reference(op: str, m: Manifest) -> None:
    """MismatchError E8003 for a reference of sums that is not what the operation's name says. Those are
    judged by the float64 truth that the name stands for, not by the reference.
    """
    known, plain = family(op), Manifest(weights=m.weights, modes=m.modes, columns=m.columns, rows=m.rows)
    if not (known.truth or known.demand):
        return
    for recipe in known.edges(op, plain):
        args = known.build(op, recipe, plain)
        wrong = known.check(op, args, plain, arrays.from_kernel(OPS[op].reference(*args)))
        if wrong:
            raise refusal("E8003 reference", op, wrong=wrong.what)
