"""`formats.dequantize`, `formats.quantize` and `packed.dense` at the speed of the compiled codecs; where
those are missing, by the references.

The same bits either way. For whole tensors: loading, quantizing a checkpoint. The model's operations come
from the table itself.
"""

from __future__ import annotations

import numpy as np

from refimpl import formats, ops
from refimpl.errors import refusal
from refimpl.reference import interleaved
from refimpl.tensors import Interleaved, Packed, ScaledFP8, ScaledInt4, Stack, Weight


def dequantize(ggml_type: int, data: np.ndarray) -> np.ndarray:
    """u8 [..., n*block bytes] -> f32 [..., n*block weights], as `formats.dequantize`."""
    name = f"{formats.get(ggml_type).NAME.lower()}.dequantize"
    return ops.load(name, "cpu")(data) if name in ops.OPS else formats.dequantize(ggml_type, data)


def quantize(ggml_type: int, x: np.ndarray) -> np.ndarray:
    """f32 [..., n*block weights] -> u8 [..., n*block bytes], as `formats.quantize`."""
    name = f"{formats.get(ggml_type).NAME.lower()}.quantize"
    return ops.load(name, "cpu")(x) if name in ops.OPS else formats.quantize(ggml_type, x)


def dense(w: Weight | Stack) -> np.ndarray:
    """The float32 array that a weight of any kind stands for, as `packed.dense`."""
    if isinstance(w, ScaledFP8):
        return ops.load("fp8.weight_dequant", "cpu")(w)
    if isinstance(w, ScaledInt4):
        return ops.load("int4.weight_dequant", "cpu")(w)
    if isinstance(w, Interleaved):
        w = interleaved.plain(w)
    if isinstance(w, Packed):
        return dequantize(w.ggml_type, w.data).reshape(w.shape)
    return w if isinstance(w, np.ndarray) else np.stack([dense(e) for e in w])


def fitting(weight: Weight | Stack, shape: tuple[int, ...], key: str) -> Weight | Stack:
    """The tensor `key`, if it has the shape that its config says. MismatchError E4011."""
    found = tuple(getattr(weight, "shape", ())) or (len(weight),)
    if found != shape[: len(found)]:
        raise refusal("E4011 different", key, found=list(found), expected=list(shape))
    return weight
