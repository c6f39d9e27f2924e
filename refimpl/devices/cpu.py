"""Where a model's modules run and where their weights lie. `Host` is numpy's memory; `cuda.Devices` puts some
modules on GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from refimpl import ops
from refimpl.cache import LatentCache
from refimpl.config import DeepSeekConfig
from refimpl.errors import refusal
from refimpl.reference.packed import dense
from refimpl.tensors import Stack, Weight


class Host:
    """Every module on one backend of numpy arrays."""

    def __init__(self, backend: str = "reference"):
        self.backend = backend

    def load(self, module: str, name: str) -> Callable:
        """The function that runs operation `name` in `module`."""
        return ops.load(name, self.backend)

    def weight(self, name: str, weight: Weight | Stack) -> Any:
        """The checkpoint's tensor `name` as its module's operations want it."""
        return weight

    def numbers(self, name: str, weight: Weight | Stack) -> Any:
        """The same, as an array whatever it is packed in."""
        return dense(weight)

    def side_by_side(self, names: tuple[str, str], weights: tuple[Any, Any]) -> tuple[Any, Any]:
        """Two matrices that multiply the same x, where their operations like them best: in one piece on a
        GPU, as they are here.
        """
        return weights

    def both(self, linear: Callable) -> Callable:
        """`linear` of one x and two weights: two results."""
        return lambda x, first, second: (linear(x, first), linear(x, second))

    def takes_codes(self, *weights: Any) -> bool:
        """Whether linears of all these weights multiply activations that are quantized already. Here each
        quantizes its own.
        """
        return False

    def bring(self, module: str, *arrays: Any) -> tuple[Any, ...]:
        """Activations to where the module runs; those that are there are returned as they are."""
        return arrays

    def start(self, function: Callable, *args: Any) -> Callable[[], Any]:
        """Begin an operation whose result is wanted later: calling what is returned gives it."""
        result = function(*args)
        return lambda: result

    def segment(self, function: Callable) -> Callable:
        """A stretch of operations on one device, for what it can do to a stretch: nothing here, a CUDA graph
        there.
        """
        return function

    def eager(self) -> Host:
        """The same without what a segment does: every operation is called every time."""
        return self

    def check_room(self, checkpoint: Any, config: DeepSeekConfig, activations: str) -> None:
        """Raise where the weights cannot fit; in mapped files they always do."""

    def new_cache(self, config: DeepSeekConfig) -> LatentCache:
        """An empty cache for one conversation."""
        return LatentCache(config)

    def numpy(self, x: Any) -> Any:
        """A result, as a numpy array."""
        return x


def check_gpu() -> None:
    """UnsupportedError where torch or Triton is missing or Triton too old (E5031), torch sees no GPU (E5030)
    or it is too old (E5032). Imports torch and no kernels.

    REFIMPL_CUDA_DEVICE=cpu runs this backend on CPU tensors instead, as tests do.
    """
    if find_spec("torch") is None:
        raise refusal("E5031 torch", "backend cuda")
    if on_cpu_tensors():
        return
    import torch

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
