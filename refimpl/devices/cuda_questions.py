"""How a graph asks the CPU for a layer's experts without Python: its stream writes a number into pinned
memory, and waits until the CPU has written the same number beside it.

    stream   x, ids, weights -> pinned    asked = n    shared expert    answered >= n?    y -> GPU
    CPU                                        experts (`serve_numba`)     answered = n

Both are operations of the driver on a stream that can be captured (CUDA Driver API, "Stream Memory
Operations").
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING

import torch

from refimpl.kernels.linear_torch import launches

if TYPE_CHECKING:  # Numba takes its time to load, and may be missing
    from refimpl.kernels.serve_numba import Layer, Server

AT_LEAST = 0  # CU_STREAM_WAIT_VALUE_GEQ


@cache
def supported(device: torch.device) -> bool:
    """Whether this driver has the two operations: it is asked to write and to wait for what it wrote."""
    try:
        flags = torch.zeros(32, dtype=torch.int32, pin_memory=True)
        with torch.cuda.device(device):
            _write(flags.data_ptr(), 1)
            _wait(flags.data_ptr(), 1)
            torch.cuda.current_stream().synchronize()
    except (OSError, AttributeError, RuntimeError):
        return False
    return bool(flags[0] == 1)


def _write(address: int, value: int) -> None:
    _on_stream("cuStreamWriteValue32_v2", address, value, 0)


def _wait(address: int, value: int) -> None:
    _on_stream("cuStreamWaitValue32_v2", address, value, AT_LEAST)


def _on_stream(name: str, address: int, value: int, flags: int) -> None:
    """RuntimeError where the driver refuses."""
    stream = torch.cuda.current_stream().cuda_stream
    function = getattr(_driver(), name)
    error = function(
        ctypes.c_void_p(stream), ctypes.c_uint64(address), ctypes.c_uint32(value), ctypes.c_uint(flags)
    )
    if error:
        raise RuntimeError(f"{name}: error {error} of the CUDA driver")


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if hasattr(ctypes, "windll") else "libcuda.so.1")


class Questions:
    """What one graph asks for, in this order. Its inputs and results are one token's and pass through the
    same pinned memory: the next question is asked when the last result has been fetched.
    """

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.flags = torch.zeros(32, dtype=torch.int32, pin_memory=True)
        self.shared: tuple[torch.Tensor, ...] = ()
        self.server: Server | None = None

    def ask(self, layer: Layer, inputs: tuple[torch.Tensor, ...], shared: tuple[torch.Tensor, ...]) -> int:
        """Send x f32 [1, D], ids i64 [1, A] and weights f32 [1, A] to the first three of the tensors in
        pinned memory, and ask for that layer's experts, whose sum comes to the fourth: the question's number.
        """
        assert not self.shared or [a.data_ptr() for a in shared] == [a.data_ptr() for a in self.shared]
        self.shared = shared
        launches().ask(inputs, shared)
        self.layers.append(layer)
        _write(self.flags.data_ptr(), len(self.layers))
        return len(self.layers)

    def added(self, number: int, other: torch.Tensor) -> torch.Tensor:
        """Wait for the answer to that question, and add it to f32 [1, D]: f32 [1, D]. It is read where the
        CPU wrote it.
        """
        _wait(self.flags.data_ptr() + self.layers[0].ANSWERED, number)
        return launches().add(self.shared[-1], other)

    def replay(self, graph: torch.cuda.CUDAGraph) -> None:
        """Replay the graph, and answer what it asks."""
        if self.server is None:
            from refimpl.kernels.serve_numba import Server  # as above

            self.server = Server(self.layers, self.flags.numpy(), *(a.numpy() for a in self.shared))
        self.server.reset()
        graph.replay()
        stream = torch.cuda.current_stream()
        try:
            self.server.answer(stream.query)  # raises what the device has failed by
        except BaseException:
            stream.synchronize()  # the graph still looks at the flags that the next replay will reset
            raise
