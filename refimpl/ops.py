"""OPS: every operation, its slow true reference, its fast paths by backend, and what "equal" means between them.

The model, the tests, the benchmark and the notebooks read this table. What is not in it cannot be called by the model; what is in
it is tested. Fast paths are named by strings and imported when first asked for, so that a missing compiler or GPU costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType

from refimpl import attention, experts
from refimpl.formats import e4m3, q4_k, q5_k, q6_k, q8_0, q8_k
from refimpl.linear import linear


@dataclass(frozen=True)
class Op:
    """One row: the reference, fast paths {backend: "module:function"}, and the demand ("bits" or "bound", see docs/conformance.md)."""

    reference: Callable
    equal: str
    fast: Mapping[str, str] = field(default_factory=dict)


def _codec(reference: Callable, function: str) -> Op:
    return Op(reference, "bits", {"cpu": f"refimpl.kernels.ggml_codec:{function}"})


OPS: dict[str, Op] = {
    "linear": Op(linear, "bound"),
    "rms_norm": Op(attention.rms_norm, "bound"),
    "rope": Op(attention.rope, "bound"),
    "mla_naive": Op(attention.mla_naive, "bound"),
    "mla_absorbed": Op(attention.mla_absorbed, "bound"),
    "route": Op(attention.route, "bound"),
    "swiglu": Op(experts.swiglu, "bound"),
    "experts": Op(experts.experts, "bound"),
    "q4_k.dequantize": _codec(q4_k.dequantize, "dequantize_q4_k"),
    "q5_k.dequantize": _codec(q5_k.dequantize, "dequantize_q5_k"),
    "q6_k.dequantize": _codec(q6_k.dequantize, "dequantize_q6_k"),
    "q8_0.dequantize": _codec(q8_0.dequantize, "dequantize_q8_0"),
    "q8_0.quantize": _codec(q8_0.quantize, "quantize_q8_0"),
    "q8_k.quantize": _codec(q8_k.quantize, "quantize_q8_k"),
    "e4m3.decode": _codec(e4m3.decode, "e4m3_decode"),
    "e4m3.encode": _codec(e4m3.encode, "e4m3_encode"),
}

# Backends of the model. The codecs of "cpu" serve tools so far; a whole model runs on its references.
BACKENDS = ("reference",)


def load(name: str, backend: str) -> Callable:
    """The function that runs operation `name` on `backend`: its fast path there, else (or where that was not built) the reference."""
    op = OPS[name]
    module, _, function = op.fast.get(backend, "").partition(":")
    built = _import(module) if module else None
    return op.reference if built is None else getattr(built, function)


@cache
def _import(module: str) -> ModuleType | None:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        print(f"refimpl: note: {module} is not built ({error}); the numpy references are used instead", file=sys.stderr)
        return None
