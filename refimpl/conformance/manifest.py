"""What a kernel declares about itself. The defaults are this project's promises; a stranger's kernel states
where it differs, and is held to that.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from refimpl.errors import meant, refusal
from refimpl.files import read_small

UNITS = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "tensor-core": 2.0
    # they cut off rather than round, bf16 products two bits above float32's last; E4M3 ones:
    # `bounds.tensor_core_error`
    ** -22,
    "tf32": 2.0**-11,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}
"""Unit roundoff of what sums are kept in."""

CHOICES = {
    "array": ("numpy", "torch"),
    "rounding": ("nearest-even", "nearest-away", "toward-zero"),
    "overflow": ("saturate", "nan"),
    "nan": ("any", "bits"),
    "accumulation": tuple(UNITS),
    "activations": ("bits", "nearest"),
    "input": ("float32", "bfloat16", "float16"),
    "output": ("float32", "bfloat16", "float16"),
    "quantized": ("", "q8_0", "q8_0 float", "q8_1", "q8_k", "e4m3"),
    "scaling": ("scores", "queries"),
    "order": ("best first", "any"),
    "ties": ("lowest", "any"),
    "scores": ("", "sigmoid", "softmax"),
}

LEAST = {"tokens": 0, "rows": 1, "columns": 1, "least": 0.0}

MOST = 1 << 20  # bytes of a manifest or a list


@dataclass(frozen=True)
class Manifest:
    """Declared capabilities. Every field can be given on the command line (`--declare overflow=nan`), in a
    TOML file, or to `suite`.
    """

    array: str = "numpy"  # what the kernel takes and returns
    device: str = "cpu"  # of torch tensors
    rounding: str = "nearest-even"  # of conversions to FP8
    # what conversions to E4M3 make of numbers beyond 448: 448, or NaN where they round past it
    overflow: str = "saturate"
    nan: str = "any"  # whether a NaN may have any sign and payload, or must have the reference's
    accumulation: str = "float32"  # sums are kept in this or better
    input: str = "float32"  # activations come in this dtype
    output: str = "float32"  # results of sums are rounded to this once, at the end
    # quantized activations: the reference's bits, or any nearest values under scales a few roundings away
    activations: str = "bits"
    # the format that activations of packed weights are quantized to; empty: that which ggml pairs with them.
    # "q8_0 float" is Q8_0 under float32 scales
    quantized: str = ""
    least: float = 0.0  # the magnitude that every group of `fp8.act_quant` counts as having at least
    modes: tuple[str, ...] = ("fp8", "exact")  # of the argument `activations` of linear, swiglu and experts
    weights: tuple[
        str, ...
    ] = ()  # kinds of weights taken, such as "fp8" or "q4_k"; empty: all that the operation knows
    tokens: int = 0  # at least so many rows of x, and one block where these are asked for (0: also none)
    rows: int = 1  # N is a multiple of this
    columns: int = 1  # K is a multiple of this
    layouts: tuple[str, ...] = ()  # of inputs, see `arrays.LAYOUTS`; empty: all
    ways: tuple[
        str, ...
    ] = ()  # that it has to its results, and names by `refimpl.entered`: all must be taken
    scaling: str = "scores"  # attention's scale multiplies scores, or queries and keys before they meet
    order: str = "best first"  # of a router's choices
    ties: str = "lowest"  # which of equal scores a router takes first: the lowest index
    scores: str = ""  # that a router makes of logits; empty: those that its configuration names
    group_of: int = 1  # experts that each of a router's groups has at least
    shows_nan: bool = True  # a NaN or an infinity among the activations reaches the results it must
    dimensions: bool = True  # x may have any number of dimensions where the reference allows it, else two
    lists: bool = (
        True  # experts' matrices may be a list of one each as well as one stack, and of several kinds
    )
    prepare: str = ""  # "module:function" that makes of a weight what the kernel takes instead
    concurrent: bool = True  # may be called from several threads at once
    threads: bool = True  # gives the same bits with any number of threads

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise refusal(
                    "E8001 such",
                    f"{name}={getattr(self, name)}",
                    expected=meant(getattr(self, name), allowed),
                )
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise refusal("E8001 range", f"{name}={getattr(self, name)}", expected=f"at least {least}")

    @property
    def unit(self) -> float:
        """Unit roundoff of the declared accumulation."""
        return UNITS[self.accumulation]

    def with_declared(self, pairs: list[str]) -> Manifest:
        """With `name=value` pairs; values are JSON, or else plain words. InputFormatError E8001."""
        return self.with_values(dict(_pair(text) for text in pairs), "--declare")

    def with_values(self, values: dict[str, Any], where: object) -> Manifest:
        """With these fields; InputFormatError E8001 for a name or type there is not."""
        kinds: dict[str, type] = {f.name: type(f.default) for f in fields(self)}
        checked: dict[str, Any] = {}
        for name, value in values.items():
            if name not in kinds:
                raise refusal("E8001 nothing", where, name=name, expected=meant(name, kinds))
            if kinds[name] is tuple and isinstance(value, str | list | tuple):
                value = tuple(value.split(",") if isinstance(value, str) else map(str, value))
            if kinds[name] is float and type(value) is int:
                value = float(value)
            if (type(value) is bool and kinds[name] is int) or not isinstance(value, kinds[name]):
                raise refusal(
                    "E8001 wrong", where, name=name, found=repr(value), expected=kinds[name].__name__
                )
            checked[name] = value
        return replace(self, **checked)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """From a TOML file of such fields."""
        try:
            return cls().with_values(tomllib.loads(read_small(path, MOST).decode()), path)
        except (ValueError, RecursionError) as error:  # no UTF-8, no TOML, a number of thousands of digits
            raise refusal(
                "E8001 file", path, found=error, expected="lines such as overflow = 'nan'"
            ) from error


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise refusal("E8001", text, expected="name=value")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


@dataclass
class Expected:
    """Failures that are known: a line is an operation and a law, both may hold `*`, and a reason behind
    `#`.
    """

    lines: list[tuple[str, str, str]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path | None) -> Expected:
        """From a file; None gives none. InputFormatError E8002 for a line of another form."""
        found = []
        text = read_small(path, MOST).decode("utf-8", "backslashreplace") if path else ""
        for number, line in enumerate(text.splitlines(), 1):
            words, _, reason = line.partition("#")
            if not words.strip():
                continue
            if len(words.split()) != 2:
                raise refusal("E8002", f"{path}:{number}", found=line, expected="OPERATION LAW  # reason")
            operation, law = words.split()
            found.append((operation, law, reason.strip()))
        return cls(found)

    def reason(self, operation: str, law: str) -> str | None:
        """Why this verdict may be a failure; None if it may not."""
        return next(
            (
                why or "expected"
                for o, l, why in self.lines
                if fnmatchcase(operation, o) and fnmatchcase(law, l)
            ),
            None,
        )
