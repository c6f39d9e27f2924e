"""Routed experts of a layer on a GPU, computed by the CPU: a launch, and a result that is fetched when it is
needed. Whatever hands the work over differently (a team of threads, a flag in pinned memory) goes here, and
only here.

    routed = experts(x, ids, weights)        # launched
    y = routed + shared_experts(x)           # on the GPU meanwhile; the addition waits for the result
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from refimpl.devices.cuda_graph import Capture
from refimpl.devices.cuda_questions import Questions
from refimpl.kernels import worker
from refimpl.kernels.linear_torch import by_triton, launches
from refimpl.tensors import QuantizedActivation, Stack

if TYPE_CHECKING:  # Numba takes its time to load, and may be missing
    from refimpl.kernels.serve_numba import Layer


def values(x: torch.Tensor | QuantizedActivation) -> torch.Tensor:
    """An activation as float32 [T, D], for who cannot read its codes."""
    return x.values if isinstance(x, QuantizedActivation) else x


def served(gate: Stack, up: Stack, down: Stack, activations: str) -> Layer | None:
    """Stacks [E, N, K] that a graph can ask for; None where Numba's kernel does not take them."""
    try:
        from refimpl.kernels.serve_numba import Layer  # as above

        return Layer(gate, up, down, activations)
    except (ImportError, ValueError):
        return None


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
    comes back through it. `function` as for `SyncExperts`. With `layer`, one token's in a graph are asked for
    from inside it (`cuda_questions`).
    """

    accepts_fp8_activations = False

    def __init__(
        self,
        function: Callable[..., np.ndarray],
        capture: Capture,
        pinned: PinnedMemory,
        layer: Layer | None = None,
    ):
        self.function, self.capture, self.pinned, self.layer = function, capture, pinned, layer

    def __call__(
        self, x: torch.Tensor | QuantizedActivation, ids: torch.Tensor, weights: torch.Tensor
    ) -> RoutedResult:
        """Launch the experts for x f32 [T, D], ids int64 [T, A] and weights f32 [T, A]."""
        routed = RoutedResult(self, (values(x), ids, weights))
        if self.layer is not None and self.capture.questions is not None:
            routed.ask(self.capture.questions, self.layer)
        else:
            self.capture.between(routed.launch)
        return routed


class RoutedResult:
    """The sum of the experts of every token, f32 [T, D], from its launch on. Adding it to a tensor waits for
    it; an error of the experts is raised there.
    """

    def __init__(self, experts: OverlappedExperts, inputs: tuple[torch.Tensor, ...]):
        self.experts, self.inputs, self.out = experts, inputs, torch.empty_like(inputs[0])
        self._questions: Questions | None = None
        self._number = 0
        self._future: Future
        self._pinned: torch.Tensor

    def _shared(self) -> tuple[torch.Tensor, ...]:
        """x, ids, weights and the sum in pinned memory."""
        buffer = self.experts.pinned.buffer
        return tuple(
            buffer(name, a) for name, a in zip(("x", "ids", "weights", "y"), (*self.inputs, self.out))
        )

    def ask(self, questions: Questions, layer: Layer) -> None:
        """Ask for the layer's experts in the graph that is being captured."""
        self._questions = questions
        self._number = questions.ask(layer, self.inputs, self._shared())

    def launch(self) -> None:
        """Copy the inputs to pinned memory and let the experts begin when they are there."""
        *arrays, self._pinned = self._shared()
        device = self.out.device
        if self._one_launch():
            launches().ask(self.inputs, tuple(arrays))
        else:
            for own, a in zip(arrays, self.inputs):
                own.copy_(a, non_blocking=True)
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
        if self._questions is not None:
            return self + torch.zeros_like(self.out)
        self.experts.capture.between(self.wait)
        return self.out

    def __add__(self, other: torch.Tensor) -> torch.Tensor:
        if self._questions is not None:
            return self._questions.added(self._number, other)
        found = self.result()
        return launches().add(found, other) if self._one_launch() else found + other

    __radd__ = __add__

    def _one_launch(self) -> bool:
        """Whether Triton's kernels for one token serve: those that a graph will hold are compiled so."""
        return len(self.out) == 1 and by_triton(self.out)


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
