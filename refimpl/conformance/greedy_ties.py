"""Greedy tokens that rounding alone can change: the reference model again, with the result of every operation
moved to an end of its bound.

Bounds of operations do not add up to a useful bound of logits: a code of E4M3 that falls the other way moves
its number by up to an eighth, in however few places. So what the bounds allow is tried: each pass draws a
sign for every element of every result, and its logits are those of a model whose every kernel is as wrong as
a kernel may be, and no more. In a choice that no such pass unsettles right backends have to agree.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from refimpl.conformance.families.by_name import family
from refimpl.conformance.manifest import Manifest
from refimpl.conformance.truth import bounds
from refimpl.conformance.truth.bounds import Sum
from refimpl.conformance.truth.routing import Scores
from refimpl.devices.cpu import CpuBackend
from refimpl.model import Model
from refimpl.ops import OPS
from refimpl.reference import fp8

PASSES = 8


class Moved(CpuBackend):
    """The reference, each result at one end of its bound or the other."""

    def __init__(self, seed: int, manifest: Manifest, activations: str):
        super().__init__("reference", activations)
        self.rng, self.manifest = np.random.default_rng(seed), manifest

    def function(self, module: str, name: str) -> Callable:
        """The reference of an operation, with each result moved to one end of its bound or the other."""
        function = super().function(module, name)
        several: dict[str, Callable] = {
            "route": self._route,
            "rms_norm_quant": self._rms_norm_quant,
            "swiglu_quant": self._swiglu_quant,
        }
        if name in several:
            return partial(several[name], function)
        return partial(self._moved, name, function) if OPS[name].equal == "bound" else function

    def _moved(self, name: str, function: Callable, *args: Any, **named: Any) -> np.ndarray:
        args = inspect.signature(function).bind(*args, **named).args
        (found,) = family(name).sums(name, args, self.manifest)
        return self._end(found)

    def _end(self, found: Sum) -> np.ndarray:
        return (found.true + self._signs(found.true.shape) * found.bound).astype(np.float32)

    def _rms_norm_quant(
        self, function: Callable, x: np.ndarray, weight: np.ndarray, eps: float, keep: bool = True
    ) -> tuple:
        normed = self._end(bounds.rms_norm(self.manifest, x, weight, eps))
        return normed if keep else None, *fp8.act_quant(normed)

    def _swiglu_quant(self, function: Callable, gate_up: np.ndarray) -> tuple:
        return fp8.act_quant(self._end(bounds.silu_times(*bounds.halves(gate_up))))

    def _route(
        self, function: Callable, x: np.ndarray, weight: np.ndarray, bias: np.ndarray, config: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        scores, ids, shares = Scores(x, weight, bias, config, self.manifest, exact=False), [], []
        for t in range(len(x)):  # an error of a score chooses as the same error of its bias would
            chosen = function(
                x[t : t + 1],
                weight,
                (bias + self._signs(bias.shape) * scores.error[t]).astype(np.float32),
                config,
            )
            ids.append(chosen[0][0])
            shares.append(
                chosen[1][0] * (1 + self._signs(chosen[1][0].shape) * scores.relative[t, chosen[0][0]])
            )
        return np.array(ids), np.array(shares, np.float32)

    def _signs(self, shape: tuple[int, ...]) -> np.ndarray:
        return self.rng.choice([-1.0, 1.0], shape)


def ambiguous_tokens(
    model: Model, token_ids: Sequence[int], manifest: Manifest | None = None, passes: int = PASSES
) -> np.ndarray:
    """bool [T]: where logits of the reference model of this checkpoint, so moved, have another largest
    element than without.
    """
    activations, manifest = model.backend.activations, manifest or Manifest()
    moved = (Moved(seed, manifest, activations) for seed in range(passes))
    plain, *others = (
        Model(model.config, model.checkpoint, backend).logits(token_ids).argmax(axis=-1)
        for backend in (CpuBackend("reference", activations), *moved)
    )
    return np.any([other != plain for other in others], axis=0)
