"""Models whose FP8 activations have scales that are powers of two (`scale_fmt: ue8m0`, DeepSeek-V3.1).

The fast kernels quantize with the scales of DeepSeek-V3. Linears of FP8 weights run by the numpy references
here, which know both; all else, experts in GGML blocks too, runs as fast as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from refimpl import ops
from refimpl.config import DeepSeekConfig
from refimpl.devices.backend import Backend
from refimpl.devices.cpu import QUANTIZING, CpuBackend
from refimpl.errors import refusal
from refimpl.reference.experts import pick
from refimpl.tensors import Packed, ScaledFP8

UE8M0 = "ue8m0"  # the third value that `activations` of the references has


class PowerOfTwoBackend(CpuBackend):
    """A CPU backend whose linears of FP8 weights quantize x with scales that are powers of two."""

    def function(self, module: str, name: str) -> Callable:
        """As `CpuBackend.function`."""
        fast = super().function(module, name)
        if name not in QUANTIZING:
            return fast
        reference = ops.OPS[name].reference

        def run(*args: Any, activations: str = "fp8", **named: Any) -> Any:
            fp8 = activations == "fp8" and any(map(_is_fp8, (*args, *named.values())))
            function, rounding = (reference, UE8M0) if fp8 else (fast, activations)
            return function(*args, activations=rounding, **named)

        return run


def _is_fp8(weight: Any) -> bool:
    """Whether a matrix, or the first of a stack of matrices, is FP8."""
    if isinstance(weight, ScaledFP8):
        return True
    if isinstance(weight, Packed) or not hasattr(weight, "__getitem__") or hasattr(weight, "dtype"):
        return False
    return isinstance(pick(weight, 0), ScaledFP8)


def with_scale_format(backend: Backend, config: DeepSeekConfig) -> Backend:
    """The backend for a model of this config: itself, or one that quantizes activations as the config says.
    UnsupportedError E4002 where it cannot.
    """
    if config.scale_fmt != UE8M0 or backend.activations != "fp8":
        return backend
    if type(backend) is not CpuBackend:
        why = "no kernel of this backend makes such scales"
        hint = "use --backend cpu, or --activations exact"
        raise refusal("E4002", "config.json", key="scale_fmt", why=why, found=repr(UE8M0), hint=hint)
    return PowerOfTwoBackend(backend.name, backend.activations)
