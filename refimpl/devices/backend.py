"""What a model asks of the device it runs on, nine methods, and nothing of it in `model.py`: a backend gives
a module its weights and, bound to them, its operations. What the device makes of that (one product instead of
two, a norm that quantizes, a graph, experts beside the shared expert) are other objects that are called
alike.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from refimpl.cache import LatentCache
from refimpl.config import DeepSeekConfig
from refimpl.tensors import Stack, Weight


class Bound(partial):
    """An operation with its weights, by the names the reference gives them: what a module calls with
    activations alone. A `partial`, so that calling it costs no Python.
    """

    accepts_fp8_activations = False
    """Whether x may come as a `QuantizedActivation`: a norm that knows this of its consumers quantizes."""


class Watcher(Protocol):
    """Who is shown everything that a watched backend gives out; `refimpl.tracing` has one."""

    def operation(self, module: str, name: str, function: Callable) -> Callable:
        """What to call in place of `function`, the operation `name` in `module`."""

    def weight(self, name: str, value: Any) -> None:
        """`value` is what the tensor `name` of the checkpoint has become."""


class Backend(Protocol):
    """Where a model's modules run. Modules and weights go by their names in the checkpoint:
    "model.layers.3.mlp", "model.layers.3.mlp.gate.weight".
    """

    name: str  # "reference", "cpu" or "cuda", as flags and `ops.BACKENDS` say it
    # "fp8": rounded before quantized weights as the real system does; "ue8m0": likewise, E4M3 with scales
    # that are powers of two, as a model's config may ask; "exact": float32
    activations: str
    place: Callable[[str], str] | None  # a module's device, "cpu" or "cuda:N"; None where all is on the CPU
    prefill: int  # tokens of a prompt that there is room for at a time

    def suited(self, config: DeepSeekConfig) -> Backend:
        """The backend for a model of this config: itself, or one that rounds activations as it says."""

    def op(self, module: str, name: str) -> Callable:
        """The function for operation `name` of `ops.OPS` in this module, the backend's `activations` given
        where it has such an argument.
        """

    def weight(
        self, name: str, stored: Weight | Stack, shape: tuple[int, ...] = (), dequantized: bool = False
    ) -> Any:
        """A tensor of the checkpoint as the operations of its module want it; with `dequantized` an array
        whatever it was stored as, of that shape if one is given.
        """

    def bind(self, module: str, name: str, **arguments: Any) -> Callable:
        """Operation `name` with weights (and what else it needs) given, to be called with activations."""

    def linears(self, module: str, first: Any, second: Any) -> Callable:
        """Two matrices [N1, K] and [N2, K] of one x: called with x [T, K], it gives [T, N1] and [T, N2]."""

    def norm(self, module: str, weight: Any, eps: float, *consumers: Callable) -> Callable:
        """RMSNorm, f32 [T, D] -> [T, D], for these bound operations: quantized for those that accept it."""

    def capturable(self, module: str, function: Callable) -> Callable:
        """A module to be run where it is placed, called as `function` is: with activations first, then what
        else it takes; "" is all between embedding and logits, and gives numpy's float32.
        """

    def new_cache(self, config: DeepSeekConfig) -> LatentCache:
        """An empty cache for one conversation, each layer's rows where the layer is."""

    def watched(self, watcher: Watcher) -> Backend:
        """A backend with these weights on these devices that calls every operation by itself and shows it to
        `watcher`.
        """
