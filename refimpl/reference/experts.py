"""The mixture-of-experts MLP in plain numpy: SwiGLU experts, gathered by expert, summed by routing weight.

DeepSeek-V3 (arXiv 2412.19437) equation 12; SwiGLU from Shazeer 2020. Letters: T tokens, D hidden, I
intermediate, E experts, A activated.
"""

from __future__ import annotations

import numpy as np

from refimpl.reference.attention import sigmoid
from refimpl.reference.linear import linear
from refimpl.tensors import Interleaved, Packed, Stack, Weight


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x), f32 of any shape, element by element (also named swish; Ramachandran et al. 2017)."""
    return x * sigmoid(x)


def swiglu(x: np.ndarray, gate: Weight, up: Weight, down: Weight, activations: str = "fp8") -> np.ndarray:
    """down(silu(gate(x)) * up(x)): x f32 [T, D] -> f32 [T, D]; gate and up [I, D], down [D, I], each of any
    kind of weight. `activations` "fp8", "ue8m0" or "exact" says how the three linear layers round them.
    """
    return linear(silu(linear(x, gate, activations)) * linear(x, up, activations), down, activations)


def experts(
    x: np.ndarray,
    ids: np.ndarray,
    weights: np.ndarray,
    gate: Stack,
    up: Stack,
    down: Stack,
    activations: str = "fp8",
) -> np.ndarray:
    """Routed experts: y[t] = sum over a of weights[t, a] * expert[ids[t, a]](x[t]), added in routed order. ->
    f32 [T, D].

    x f32 [T, D], ids int [T, A], weights f32 [T, A]; gate and up [E, I, D], down [E, D, I], each a `Packed`
    stack or a sequence of E matrices. An expert nobody chose is not read.
    """
    parts = np.empty((*ids.shape, x.shape[-1]), np.float32)  # [T, A, D]
    for e in np.unique(ids):
        token, slot = np.nonzero(ids == e)
        parts[token, slot] = swiglu(x[token], pick(gate, e), pick(up, e), pick(down, e), activations)
    y = np.zeros(x.shape, np.float32)
    for a in range(ids.shape[1]):
        y += weights[:, a, None] * parts[:, a]
    return y


def pick(stack: Stack, e: int) -> Weight:
    """Matrix e of a stack of experts [E, N, K], without touching the others."""
    return stack.expert(int(e)) if isinstance(stack, Packed | Interleaved) else stack[int(e)]
