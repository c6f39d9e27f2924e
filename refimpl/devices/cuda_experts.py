"""Routed experts of a layer on a GPU, computed by the CPU: a launch, and a result that is fetched when it is
needed. Whatever hands the work over differently (a team of threads, a flag in pinned memory) goes here, and
only here.

    routed = experts(x, ids, weights)        # launched
    y = routed + shared_experts(x)           # on the GPU meanwhile; the addition waits for the result
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

from refimpl.devices.cuda_graph import Capture
from refimpl.kernels import worker
from refimpl.tensors import QuantizedActivation


def values(x: torch.Tensor | QuantizedActivation) -> torch.Tensor:
    """An activation as float32 [T, D], for who cannot read its codes."""
    return x.values if isinstance(x, QuantizedActivation) else x


class SyncExperts:
    """Experts in the caller's thread: what is returned is the result. `function` takes numpy's x f32 [T, D],
    ids int64 [T, A] and weights f32 [T, A], and gives f32 [T, D].
    """

    accepts_fp8_activations = False

    def __init__(self, function: Callable[..., np.ndarray]):
        self.function = function

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The experts' sum for every token, f32 [T, D], on the device of x."""
        return torch.from_numpy(self.function(*(a.cpu().numpy() for a in (x, ids, weights)))).to(x.device)


class OverlappedExperts:
    """Experts on the CPU's own thread: activations and choices go there through pinned memory, the result
    comes back through it. `function` as for `SyncExperts`.
    """

    accepts_fp8_activations = False

    def __init__(self, function: Callable[..., np.ndarray], capture: Capture, pinned: PinnedMemory):
        self.function, self.capture, self.pinned = function, capture, pinned

    def __call__(
        self, x: torch.Tensor | QuantizedActivation, ids: torch.Tensor, weights: torch.Tensor
    ) -> RoutedResult:
        """Launch the experts for x f32 [T, D], ids int64 [T, A] and weights f32 [T, A]."""
        routed = RoutedResult(self, (values(x), ids, weights))
        self.capture.between(routed.launch)
        return routed


class RoutedResult:
    """The sum of the experts of every token, f32 [T, D], from its launch on. Adding it to a tensor waits for
    it; an error of the experts is raised there.
    """

    def __init__(self, experts: OverlappedExperts, inputs: tuple[torch.Tensor, ...]):
        self.experts, self.inputs, self.out = experts, inputs, torch.empty_like(inputs[0])
        self._future: Future
        self._pinned: torch.Tensor

    def launch(self) -> None:
        """Copy the inputs to pinned memory and let the experts begin when they are there."""
        buffer, device = self.experts.pinned.buffer, self.out.device
        arrays = [
            buffer(name, a).copy_(a, non_blocking=True)
            for name, a in zip(("x", "ids", "weights"), self.inputs)
        ]
        self._pinned = buffer("y", self.out)
        copied = None
        if device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(device))
        self._future = worker.submit(
            _run, copied, self.experts.function, [a.numpy() for a in arrays], self._pinned.numpy()
        )

    def wait(self) -> None:
        """Copy the result to its device as soon as it is there."""
        self._future.result()
        self.out.copy_(self._pinned, non_blocking=True)

    def result(self) -> torch.Tensor:
        """The sum, f32 [T, D]."""
        self.experts.capture.between(self.wait)
        return self.out

    def __add__(self, other: torch.Tensor) -> torch.Tensor:
        return self.result() + other

    def __radd__(self, other: torch.Tensor) -> torch.Tensor:
        return other + self.result()


def _run(copied: Any, function: Callable, arrays: list[np.ndarray], out: np.ndarray) -> None:
    if copied is not None:
        copied.synchronize()
    out[:] = function(*arrays)


class PinnedMemory:
    """Buffers on the host, by name, that all layers share. The next layer's copies into them come after this
    one's are done: they wait in the same stream.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def buffer(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Memory of that shape and dtype, pinned where `like` is on a GPU."""
        found = self._buffers.get(name)
        if found is None or found.numel() < like.numel():
            found = self._buffers[name] = torch.empty(like.numel(), dtype=like.dtype, pin_memory=like.is_cuda)
        return found[: like.numel()].view(like.shape)


class HostCall:
    """A linear or an MLP with matrices that were left to the CPU, x f32 [T, K] -> [T, rows]: x goes there
    and the result back, between two graphs.
    """

    accepts_fp8_activations = False

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], rows: int, capture: Capture):
        self.function, self.rows, self.capture = function, rows, capture

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, K] -> [T, rows] on the device of x."""
        out = x.new_empty(len(x), self.rows)
        self.capture.between(lambda: out.copy_(self.function(x)))
        return out
