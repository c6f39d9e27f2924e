"""The backends of numpy arrays, "reference" and "cpu": every module in the same memory, nothing to move. And
whether there is a GPU for the other one, asked here so that asking does not import torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from copy import copy
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from refimpl import ops
from refimpl.cache import PREFILL, LatentCache
from refimpl.config import DeepSeekConfig
from refimpl.devices.backend import Bound, Watcher
from refimpl.devices.steps import Steps
from refimpl.errors import refusal
from refimpl.reference.packed import dense
from refimpl.tensors import ScaledFP8, Stack, Weight

UE8M0 = "ue8m0"
# Numbers of a kv_b from which reading its codes pays: 16 MB in float32, which memory has to bring each time.
CODED_KV_B = 1 << 22
# operations that are told whether to round their activations
QUANTIZING = ("linear", "swiglu", "experts", "index_rows")


class CpuBackend:
    """Every module on the CPU, by the column `name` of `ops.OPS`: "reference" or "cpu". The methods are
    those of `Backend`. ValueError for activations other than "fp8", "ue8m0" and "exact".
    """

    place: Callable[[str], str] | None = None
    prefill = PREFILL

    def __init__(self, name: str = "reference", activations: str = "fp8"):
        if activations not in ("fp8", UE8M0, "exact"):
            raise ValueError(f"activations must be 'fp8', 'ue8m0' or 'exact', not {activations!r}")
        self.name, self.activations = name, activations
        self.watcher: Watcher | None = None

    def suited(self, config: DeepSeekConfig) -> CpuBackend:
        """Itself, or for `scale_fmt: ue8m0` (DeepSeek-V3.1) one whose activations of E4M3 have scales that
        are powers of two; exact ones stay so.
        """
        if config.scale_fmt != UE8M0 or self.activations == "exact":
            return self
        other = copy(self)
        other.activations = UE8M0
        return other

    def function(self, module: str, name: str) -> Callable:
        """The function that runs operation `name` in `module`, with all arguments of the reference."""
        return ops.load(name, self.name)

    def op(self, module: str, name: str) -> Callable:
        """That function, with the backend's `activations` given where it has such an argument."""
        function = self.function(module, name)
        if name in QUANTIZING:
            function = partial(function, activations=self.activations)
        return function if self.watcher is None else self.watcher.operation(module, name, function)

    def weight(
        self, name: str, stored: Weight | Stack, shape: tuple[int, ...] = (), dequantized: bool = False
    ) -> Any:
        """The tensor as it lies in its file, or dequantized to f32 in that shape; a large kv_b stays codes of
        E4M3 where `mla_absorbed` reads those.
        """
        if dequantized and self.name == "cpu" and self.watcher is None and stays_coded(name, stored):
            return stored
        found: Any = dense(stored) if dequantized else stored
        return self._shown(name, found.reshape(shape) if shape else found)

    def _shown(self, name: str, found: Any) -> Any:
        if self.watcher is not None:
            self.watcher.weight(name, found)
        return found

    def bind(self, module: str, name: str, **arguments: Any) -> Callable:
        """Operation `name` with its weights given."""
        if name == "mla_naive" and isinstance(kv_b := arguments["kv_b"], ScaledFP8):
            return _dequantizing(self.op(module, name), kv_b, arguments["scale"])
        return Bound(self.op(module, name), **arguments)

    def linears(self, module: str, first: Any, second: Any) -> Callable:
        """Two matrices [N1, K] and [N2, K] of one x: f32 [T, K] -> f32 [T, N1] and f32 [T, N2]."""
        linear = self.op(module, "linear")
        return lambda x: (linear(x, first), linear(x, second))

    def norm(self, module: str, weight: Any, eps: float, *consumers: Callable) -> Callable:
        """RMSNorm, f32 [..., D] -> [..., D]; each linear behind it quantizes what it reads by itself."""
        return Bound(self.op(module, "rms_norm"), weight=weight, eps=eps)

    def capturable(self, module: str, function: Callable) -> Callable:
        """The function itself: the CPU has no graphs to capture it in. Around the whole model ("") the number
        of threads is found.
        """
        return Steps(function) if self.name == "cpu" and not module else function

    def new_cache(self, config: DeepSeekConfig) -> LatentCache:
        """An empty cache for one conversation, f32 in numpy's memory."""
        return LatentCache(config, self.prefill)

    def watched(self, watcher: Watcher) -> CpuBackend:
        """This backend, with every operation and weight it gives out shown to `watcher`."""
        other = copy(self)
        other.watcher = watcher
        return other


def stays_coded(name: str, stored: Any) -> bool:
    """Whether a weight that is wanted as numbers is read as E4M3 by the attention of backend "cpu"."""
    coded = isinstance(stored, ScaledFP8) or getattr(stored, "kind", "") == "E4M3"
    large = coded and math.prod(stored.shape) >= CODED_KV_B
    return large and name.endswith("kv_b_proj.weight") and find_spec("numba") is not None


def _dequantizing(naive: Callable, kv_b: ScaledFP8, scale: float) -> Callable:
    """`mla_naive` with kv_b dequantized at each call: it is called once for a whole text, without a cache."""

    def call(q_nope: Any, *rest: Any, **more: Any) -> Any:
        heads = q_nope.shape[1]
        array = dense(kv_b).reshape(heads, kv_b.shape[0] // heads, kv_b.shape[1])
        return naive(q_nope, *rest, kv_b=array, scale=scale, **more)

    return call


def check_gpu() -> None:
    """UnsupportedError where torch or Triton is missing or Triton too old (E5031), torch sees no GPU (E5030)
    or it is too old (E5032). Imports torch and no kernels.

    REFIMPL_CUDA_DEVICE=cpu runs this backend on CPU tensors instead, as tests do.
    """
    if find_spec("torch") is None:
        raise refusal("E5031 torch", "backend cuda")
    if on_cpu_tensors():
        return
    import torch  # optional, and seconds to import

    if not torch.cuda.is_available():
        raise refusal("E5030", "backend cuda", found=f"torch {torch.__version__}")
    if find_spec("triton") is None:
        raise refusal("E5031 triton", "backend cuda")
    if tuple(map(int, (found := version("triton")).split(".")[:2])) < (3, 6):  # Gluon's Hopper modules
        raise refusal("E5031 old", "backend cuda", found=found, expected="3.6 or later")
    if (capability := torch.cuda.get_device_capability(0)) < (8, 0):
        raise refusal(
            "E5032", "backend cuda", found="compute capability {}.{}".format(*capability), expected="8.0"
        )


def on_cpu_tensors() -> bool:
    """Whether the environment says so."""
    return os.environ.get("REFIMPL_CUDA_DEVICE") == "cpu"
