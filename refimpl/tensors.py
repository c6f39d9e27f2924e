"""What a weight knows of itself: where it lies in a file (`TensorInfo`), and its bytes in memory
(`ScaledFP8`, `ScaledInt4`, `Packed`, `Interleaved`, or a plain array). An activation is an array, or a
`QuantizedActivation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np


class TensorInfo(NamedTuple):
    """One tensor of a safetensors or GGUF file, header facts only."""

    name: str
    # safetensors' spelling (F8_E4M3, BF16, F32, U8, I64, ...) or ggml's type name (Q4_K, Q6_K, F32, ...)
    dtype: str
    shape: tuple[int, ...]  # row-major, the last dimension is contiguous (a GGUF's ne reversed)
    path: Path
    offset: int  # of the first byte, from the start of the file
    nbytes: int


class ScaledFP8(NamedTuple):
    """Block-scaled E4M3 matrix: DeepSeek's pair `weight`, `weight_scale_inv` (the multiplier, in spite of its
    name).
    """

    codes: np.ndarray  # u8 [N, K]
    scale: np.ndarray  # f32 [ceil(N/128), ceil(K/128)]

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K), the shape of the codes."""
        return self.codes.shape


class QuantizedActivation(ScaledFP8):
    """An activation x [T, K] in block-scaled E4M3, as an FP8 linear reads it: codes u8 [T, K], scale f32
    [T, ceil(K/128)]; and `values`, x itself in f32, or None where nobody reads that.
    """

    values: Any

    def __new__(cls, codes: Any, scale: Any, values: Any = None) -> QuantizedActivation:
        found = super().__new__(cls, codes, scale)
        found.values = values
        return found


class ScaledInt4(NamedTuple):
    """Matrix of INT4 in groups of 32 columns, as compressed-tensors packs it (refimpl/formats/int4.py)."""

    codes: np.ndarray  # u8 [N, K/2]: two weights a byte, the even column in the low nibble; stored is q + 8
    scale: np.ndarray  # u16 [N, K/32], bit patterns of BF16

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K), of the weights."""
        return (*self.codes.shape[:-1], 2 * self.codes.shape[-1])


class Packed(NamedTuple):
    """GGML-quantized tensor as it lies in the file; never copied."""

    data: np.ndarray  # u8 [..., row_bytes], the last dimension of `shape` packed into blocks
    ggml_type: int
    shape: tuple[int, ...]

    def expert(self, e: int) -> Packed:
        """Matrix e of an [E, out, in] stack, still a view."""
        return Packed(self.data[e], self.ggml_type, self.shape[1:])


class Interleaved(NamedTuple):
    """GGML-quantized matrix, or a stack of them, whose rows lie side by side, sixteen at a time: the bytes
    of a `Packed` in another order (refimpl/reference/interleaved.py).
    """

    data: np.ndarray  # u8 [..., N, row bytes] as of the Packed; only 16 whole rows together mean anything
    ggml_type: int
    shape: tuple[int, ...]

    def expert(self, e: int) -> Interleaved:
        """Matrix e of an [E, out, in] stack, still a view."""
        return Interleaved(self.data[e], self.ggml_type, self.shape[1:])


FileWeight: TypeAlias = np.ndarray | ScaledFP8 | ScaledInt4 | Packed
"""A weight as some file has it."""
Weight: TypeAlias = FileWeight | Interleaved
Stack: TypeAlias = np.ndarray | Packed | Interleaved | Sequence[Weight]
"""All experts of a layer, [E, out, in]: in one piece, or one by one."""


def as_numpy(value: Any) -> np.ndarray:
    """A numpy array of an array or a torch tensor on any device (bfloat16 becomes float32)."""
    if isinstance(value, np.ndarray):
        return value
    value = value.detach().cpu()
    return (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
