"""The cuda backend: modules on GPUs through torch, routed experts on the CPU beside them.

    GPU     norm, attention, norm, route |  shared expert   | + ...
    CPU                                  | routed experts   |

Activations are float32 between operations. Weights are brought over once, tensor by tensor: FP8 as it is,
BF16 as it is, GGML blocks dequantized to bfloat16, `kv_b` (which absorption needs as numbers) in bfloat16;
with activations="exact" the last two in float32. The latent cache is bfloat16 or float32 likewise. Routed
experts stay in the mapped file.

Decoding one token runs what the GPU does as CUDA graphs (`cuda_graph.py`). Shapes must not change in a graph,
so one new token looks at all rows that the cache has room for, and its length, a number on the device, masks
the rest. Room grows by doubling, and only then are graphs captured anew.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from refimpl import ops
from refimpl.cache import LatentCache
from refimpl.config import DeepSeekConfig
from refimpl.devices.backend import Bound, Watcher
from refimpl.devices.cpu import UE8M0, CpuBackend, check_gpu, on_cpu_tensors
from refimpl.devices.cuda_cache import DeviceCache
from refimpl.devices.cuda_experts import (
    HostCall,
    OverlappedExperts,
    PinnedMemory,
    SyncExperts,
    served,
    values,
)
from refimpl.devices.cuda_graph import Capture, CudaGraph
from refimpl.devices.placement import experts_on_cpu
from refimpl.devices.steps import step
from refimpl.formats import bf16
from refimpl.kernels.linear_torch import (
    FusedRows,
    accepts_fp8_activations,
    fuse_rows,
    fused_linear,
    fused_swiglu,
)
from refimpl.reference.packed import dense
from refimpl.tensors import Packed, QuantizedActivation, ScaledFP8, ScaledInt4, Stack, Weight


class CudaBackend(CpuBackend):
    """Modules where `place` says, by name: "cpu" or "cuda:N". Whole layers can be on the CPU; in a layer on a
    GPU its experts are, and single linears may be. Without `graphs` every operation is launched by itself.
    The methods are those of `Backend`. UnsupportedError E5030 without a GPU.
    """

    def __init__(
        self,
        place: Callable[[str], str] = experts_on_cpu,
        activations: str = "fp8",
        graphs: bool = True,
    ):
        check_gpu()
        super().__init__("cuda", activations)
        self.place = place
        self.narrow = torch.float32 if activations == "exact" else torch.bfloat16
        self.graphs = graphs and not on_cpu_tensors()
        self.capture, self.pinned = Capture(), PinnedMemory()
        self._weights: dict[str, Any] = {}
        self._fused: dict[tuple[int, ...], FusedRows] = {}  # by the ids of their parts
        self._modules: list[Placed] = []  # of the model that is being built

    def watched(self, watcher: Watcher) -> CudaBackend:
        """A backend with these weights on these devices, without graphs, one operation after the other and
        each linear by itself, all shown to `watcher`.
        """
        other = super().watched(watcher)
        assert isinstance(other, CudaBackend)
        other.graphs, other._modules = False, []
        return other

    def function(self, module: str, name: str) -> Callable:
        """The row's torch function where the module is on a GPU; its cpu function otherwise, and for routed
        experts.
        """
        return ops.load(name, "cpu" if name == "experts" or self.home(module) is None else "cuda")

    def home(self, module: str) -> torch.device | None:
        """Where the activations of a module are, None for numpy: in a layer its attention decides, and for
        the head the norm before it.
        """
        parts = module.split(".")
        if parts[1:2] == ["layers"]:
            module = ".".join([*parts[:3], "self_attn"])
        return self._device("model.norm" if module == "lm_head" else module)

    def _device(self, module: str) -> torch.device | None:
        assert self.place is not None
        where = self.place(module)
        return None if where == "cpu" else torch.device("cpu" if on_cpu_tensors() else where)

    def new_cache(self, config: DeepSeekConfig) -> LatentCache:
        """A cache whose rows lie with their layers."""
        homes = [self.home(f"model.layers.{i}") for i in range(config.num_hidden_layers)]
        return DeviceCache(config, homes, self.narrow, self.prefill)

    # --- weights ---

    def weight(
        self, name: str, stored: Weight | Stack, shape: tuple[int, ...] = (), dequantized: bool = False
    ) -> Any:
        """Tensors on the module's device, dequantized (to bfloat16 unless activations are exact) where that
        is asked for or its rule says so; what stays on the CPU is as there.
        """
        found = self._moved(name, stored, self._dequantized if dequantized else self._converter(name))
        if dequantized:
            found = (found if isinstance(found, torch.Tensor) else dense(found)).reshape(shape)
        return self._shown(name, found)

    def _converter(self, name: str) -> Callable[[Any, torch.device], Any]:
        find = getattr(self.place, "find", None)
        by_rule = find is not None and find(name.removesuffix(".weight")).operator == "bf16"
        return self._dequantized if by_rule else self._tensor

    def _moved(self, name: str, stored: Weight | Stack, convert: Callable[[Any, torch.device], Any]) -> Any:
        module = name.removesuffix(".weight")
        device = self._device(module)
        if device is None or self.home(module) is None:
            return stored
        if name not in self._weights:
            self._weights[name] = convert(stored, device)
        return self._weights[name]

    def _tensor(self, stored: Any, device: torch.device) -> Any:
        if isinstance(stored, ScaledFP8):
            return ScaledFP8(_upload(stored.codes, device), _upload(stored.scale, device))
        if isinstance(stored, Packed) and stored.ggml_type == bf16.GGML_TYPE:
            return _upload(stored.data.view(np.int16).reshape(stored.shape), device).view(torch.bfloat16)
        if isinstance(stored, Packed | ScaledInt4):
            return torch.from_numpy(dense(stored)).to(self.narrow).to(device)
        return _upload(stored, device)

    def _dequantized(self, stored: Any, device: torch.device) -> torch.Tensor:
        if not isinstance(stored, ScaledFP8):
            return self._tensor(stored, device)
        if device.type == "cpu":
            return torch.from_numpy(dense(stored)).to(self.narrow)
        with torch.cuda.device(device):  # the host takes 80 ms for a kv_b of DeepSeek-V3
            return ops.load("fp8.weight_dequant", "cuda")(self._tensor(stored, device), self.narrow)

    def _fuse(self, *weights: Any) -> FusedRows | None:
        """The weights in one piece, which takes the place of each: its parts are what `weight` gives from now
        on. None where they do not fit together.
        """
        known = self._fused.get(tuple(map(id, weights)))
        fused = known or fuse_rows(*weights)
        if known is None and fused is not None:
            self._fused[tuple(map(id, fused.parts))] = fused
            views = {id(w): part for w, part in zip(weights, fused.parts)}
            self._weights.update((n, views[id(w)]) for n, w in self._weights.items() if id(w) in views)
        return fused

    # --- operations ---

    def bind(self, module: str, name: str, **arguments: Any) -> Callable:
        """Operation `name` with weights given: gate and up of an MLP as one product, routed experts beside
        the GPU, matrices that are left to the CPU there.
        """
        bound = Bound(self.op(module, name), **arguments)
        if self.home(module) is None:
            return bound
        if name == "experts":
            if self.watcher is not None:
                return SyncExperts(bound)
            layer = served(**arguments, activations=self.activations)
            return OverlappedExperts(bound, self.capture, self.pinned, layer)
        if self.watcher is not None:
            return bound
        if name == "route":
            return lambda x: bound(values(x))
        if name == "linear" and module.endswith(".indexer"):  # beside linears that want x quantized
            return self._of_values(self._matrices(bound, name, **arguments))
        return self._matrices(bound, name, **arguments) if name in ("linear", "swiglu") else bound

    def _matrices(self, bound: Bound, name: str, **weights: Any) -> Callable:
        """A linear or SwiGLU as its weights want it; the last of them makes the result."""
        *inner, last = weights.values()
        if any(map(_on_host, weights.values())):
            return HostCall(bound, last.shape[0], self.capture)
        fused = self._fuse(*inner) if name == "swiglu" else None
        if fused is not None:
            bound = Bound(fused_swiglu, gate_up=fused, down=last, activations=self.activations)
        bound.accepts_fp8_activations = self._accept(*(inner or [last]))
        return bound

    def _of_values(self, linear: Any) -> Any:
        accepts = getattr(linear, "accepts_fp8_activations", False)
        return linear if accepts else lambda x: linear(values(x))

    def linears(self, module: str, first: Any, second: Any) -> Callable:
        """Two matrices of one x: one product where they fit together."""
        if self.home(module) is None or self.watcher is not None:
            return super().linears(module, first, second)
        fused = self._fuse(first, second)
        if fused is not None:
            bound = Bound(fused_linear, fused=fused, activations=self.activations)
        else:
            bound = Bound(_each, *(self.bind(module, "linear", w=w) for w in (first, second)))
        bound.accepts_fp8_activations = self._accept(first, second)
        return bound

    def _accept(self, *weights: Any) -> bool:
        return self.activations != "exact" and all(map(accepts_fp8_activations, weights))

    def norm(self, module: str, weight: Any, eps: float, *consumers: Callable) -> Callable:
        """RMSNorm; quantized as well where consumers multiply codes, and only that where all of them do."""
        accept = [getattr(c, "accepts_fp8_activations", False) for c in consumers]
        if self.home(module) is None or not any(accept):
            return super().norm(module, weight, eps, *consumers)
        powers, keep = self.activations == UE8M0, not all(accept)
        return Bound(_norm_quant, self.op(module, "rms_norm_quant"), weight, eps, keep, powers)

    def capturable(self, module: str, function: Callable) -> Callable:
        """The module on its device. When a token is decoded it is a CUDA graph: the whole model ("") where it
        is on one GPU, else each module that is on one.
        """
        if module:
            self._modules.append(Placed(function, self.home(module)))
            return self._modules[-1]
        modules, self._modules = self._modules, []
        whole = Whole(function, modules[0].device)
        together = len({m.device for m in modules}) == 1
        if not together and any(getattr(m.function, "shares_rows", False) for m in modules):
            return whole  # rows that one layer chooses for another pass by what a graph of one layer knows
        for placed in [whole] if together else modules:
            if self.graphs and placed.device is not None:
                placed.function = CudaGraph(placed.function, self.capture)
        return whole


class Placed:
    """A module that is brought its activations to where it runs, tensors on `device` or numpy arrays for
    None; called as it is.
    """

    def __init__(self, function: Callable, device: torch.device | None):
        self.function, self.device = function, device

    def __call__(self, *args: Any) -> Any:
        """What the function returns, on its device."""
        if self.device is None:
            return self.function(*map(to_numpy, args))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # kernels are launched on the current one
        return self.function(*(to_device(a, self.device) for a in args))


class Whole(Placed):
    """What lies between embedding and logits, with numpy's logits for a result."""

    def __call__(self, *args: Any) -> np.ndarray:
        """The logits, f32 [T, vocab]."""
        with step(len(args[0])):
            return to_numpy(super().__call__(*args))


def to_device(x: Any, device: torch.device) -> Any:
    """An array or tensor as a tensor on that device, where it is one; anything else as it is."""
    if isinstance(x, np.ndarray):
        x = torch.from_numpy(np.ascontiguousarray(x))
    return x.to(device) if isinstance(x, torch.Tensor) else x


def to_numpy(x: Any) -> Any:
    """The array a tensor holds, on the host; anything else as it is."""
    return x.cpu().numpy() if isinstance(x, torch.Tensor) else x


def _norm_quant(
    function: Callable, weight: torch.Tensor, eps: float, keep: bool, ue8m0: bool, x: torch.Tensor
) -> QuantizedActivation:
    values, codes, scale = function(x, weight, eps, keep, ue8m0)
    return QuantizedActivation(codes, scale, values)


def _each(first: Callable, second: Callable, x: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return first(x), second(x)


def _on_host(weight: Any) -> bool:
    return not isinstance(weight, torch.Tensor) and not accepts_fp8_activations(weight)


def _upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of the array on that device, straight from a mapped file."""
    with warnings.catch_warnings():  # such files are read-only, which torch does not like
        warnings.simplefilter("ignore", UserWarning)
        given = torch.from_numpy(np.ascontiguousarray(array))
    return given.clone() if device.type == "cpu" else given.to(device)
