"""How a module gets its weights: by name and shape from the checkpoint, through the backend that will run
it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from refimpl.checkpoint import names
from refimpl.checkpoint.codecs import fitting
from refimpl.devices.backend import Backend
from refimpl.errors import refusal
from refimpl.tensors import Stack, Weight


class Weights:
    """A checkpoint as the module `module` sees it ("model.layers.3.mlp"; "" is the model): tensors by the
    rest of their Hugging Face names, with the shapes they must have, and operations bound to them.
    """

    def __init__(self, checkpoint: Mapping[str, Weight | Stack], backend: Backend, module: str = ""):
        self.checkpoint, self.backend, self.module = checkpoint, backend, module

    def under(self, name: str) -> Weights:
        """This checkpoint as a module of this one sees it."""
        return Weights(self.checkpoint, self.backend, self._full(name))

    def __call__(self, name: str, *shape: int) -> Any:
        """The tensor `name` where its module runs; "q_a_proj.weight" is found as
        "model.layers.3.self_attn.q_a_proj.weight", and so on.

        MismatchError E4010 when the tensor is missing, E4011 when its shape is another.
        """
        return self.backend.weight(self._full(name), self._find(name, shape))

    def dequantized(self, name: str, *shape: int, of: tuple[int, ...] = ()) -> Any:
        """The tensor as an array, whatever it is stored as; reshaped to `of`. Errors as for calling this."""
        return self.backend.weight(self._full(name), self._find(name, shape), of or shape, dequantized=True)

    def zeros(self, name: str, *shape: int) -> Any:
        """Zeros where a model of the family has no tensor `name`, f32 where its module runs."""
        return self.backend.weight(self._full(name), np.zeros(shape, np.float32))

    def op(self, name: str) -> Callable:
        """The operation `name` of `ops.OPS` as this module runs it, without weights."""
        return self.backend.op(self.module, name)

    def bind(self, name: str, **arguments: Any) -> Callable:
        """The operation `name` with the arguments that do not change: weights, numbers."""
        return self.backend.bind(self.module, name, **arguments)

    def linear(self, name: str, outputs: int, inputs: int) -> Callable:
        """x [T, inputs] -> [T, outputs], by the matrix `name`.weight [outputs, inputs]; "" is the module's
        own.
        """
        return self.bind("linear", w=self(f"{name}.weight", outputs, inputs))

    def linears(self, inputs: int, **outputs: int) -> Callable:
        """Two matrices of one x, as `linear` each: x [T, inputs] -> [T, N1], [T, N2]."""
        first, second = (self(f"{name}.weight", n, inputs) for name, n in outputs.items())
        return self.backend.linears(self.module, first, second)

    def norm(self, name: str, width: int, eps: float, *consumers: Callable) -> Callable:
        """RMSNorm by `name`.weight [width] ("" is the module's own), x [T, width] -> [T, width], which the
        bound operations `consumers` read.
        """
        return self.backend.norm(self.module, self(f"{name}.weight", width), eps, *consumers)

    def placed(self, name: str, module: Callable) -> Callable:
        """A module of this one, run where it belongs and called as before."""
        return self.backend.capturable(self._full(name), module)

    def _full(self, name: str) -> str:
        return ".".join(filter(None, (*self.module.split("."), *name.split("."))))

    def _find(self, name: str, shape: tuple[int, ...]) -> Weight | Stack:
        full = self._full(name)
        key = names.to_gguf(full)
        if key not in self.checkpoint:
            where = getattr(self.checkpoint, "folder", "checkpoint")
            raise refusal("E4010", where, name=full, expected=key)
        return fitting(self.checkpoint[key], shape, key)
