"""OPS: every operation of the model, its slow true reference, its fast paths by backend, and what "equal" means between them.

The model, the tests, the benchmark and the notebooks read this table. What is not in it cannot be called by the model; what is in
it is tested. Fast paths are named by strings and imported when first asked for, so that a missing compiler or GPU costs nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from refimpl import attention, experts, fp8, packed
from refimpl.tensors import Packed, ScaledFP8, Weight


@dataclass(frozen=True)
class Op:
    """One row: the reference, fast paths {backend: "module:function"}, and the demand ("bits" or "bound", see docs/conformance.md)."""

    reference: Callable
    equal: str
    fast: Mapping[str, str] = field(default_factory=dict)


def linear(x: np.ndarray, w: Weight, activations: str = "fp8") -> np.ndarray:
    """x [..., K] times the transpose of w [N, K], by what w is: FP8 blocks, GGML blocks or plain float32."""
    if isinstance(w, ScaledFP8):
        return fp8.linear(x, w, activations)
    if isinstance(w, Packed):
        return packed.linear(x, w, activations)
    return x @ w.T


OPS: dict[str, Op] = {
    "linear": Op(linear, "bound"),
    "rms_norm": Op(attention.rms_norm, "bound"),
    "rope": Op(attention.rope, "bound"),
    "mla_naive": Op(attention.mla_naive, "bound"),
    "mla_absorbed": Op(attention.mla_absorbed, "bound"),
    "route": Op(attention.route, "bound"),
    "swiglu": Op(experts.swiglu, "bound"),
    "experts": Op(experts.experts, "bound"),
}

BACKENDS = ("reference",)


def load(name: str, backend: str) -> Callable:
    """The function that runs operation `name` on `backend`: its fast path there, else the reference."""
    op = OPS[name]
    target = op.fast.get(backend)
    if target is None:
        return op.reference
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)
