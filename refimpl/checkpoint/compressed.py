"""Matrices that compressed-tensors has packed into INT4 in groups of 32, in a folder of safetensors: three
tensors for each, `weight_packed`, `weight_scale` and `weight_shape` (refimpl/formats/int4.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from refimpl.checkpoint import safetensors
from refimpl.errors import refusal
from refimpl.files import window
from refimpl.formats import int4
from refimpl.tensors import ScaledInt4, TensorInfo

INT4 = "INT4"  # the dtype that a packed matrix has here, beside those of safetensors
PACKED, SCALE, SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
ZERO, ORDER = ".weight_zero_point", ".weight_g_idx"  # of schemes that are not read


def joined(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of a folder with each packed matrix under the name that it has unpacked, as INT4 of its own
    shape; its scales and shape keep their names. UnsupportedError E4002 for zero points and for columns in
    another order, MismatchError E4014 for words that are no whole groups.
    """
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        if name.endswith((ZERO, ORDER)):
            why = "weights with zero points" if name.endswith(ZERO) else "columns in another order"
            raise refusal("E4002", info.path, key=name, why=why, expected="no such tensor")
        if not name.endswith(PACKED):
            found[name] = info
            continue
        rows, words = info.shape if len(info.shape) == 2 else (0, 0)
        if info.dtype != "I32" or not words or words % (int4.GROUP // 8):
            shown = f"{info.dtype} {list(info.shape)}"
            raise refusal("E4014 packed", info.path, name=name, found=shown, expected="I32 [N, K/8]")
        whole = name.removesuffix(PACKED) + ".weight"
        found[whole] = info._replace(name=whole, dtype=INT4, shape=(rows, 8 * words))
    return found


def is_beside(name: str) -> bool:
    """Whether a tensor belongs to a packed matrix and is not the matrix itself."""
    return name.endswith((SCALE, SHAPE))


def weight(
    info: TensorInfo, tensors: Mapping[str, TensorInfo], memory: Callable[..., np.ndarray]
) -> tuple[ScaledInt4, TensorInfo]:
    """The matrix of an INT4 tensor of `joined`, as views of the mapped files (`memory` maps one), and its
    scales' entry. MismatchError E4013, E4014 where scales or shape are missing or say something else.
    """
    stem, (rows, columns) = info.name.removesuffix(".weight"), info.shape
    scale = _beside(stem + SCALE, tensors, info, "BF16", (rows, columns // int4.GROUP))
    shape = _beside(stem + SHAPE, tensors, info, "I64", (2,))
    said = safetensors.view(shape, memory(shape.path)).tolist()
    if said != [rows, columns]:
        raise refusal("E4014 packed", shape.path, name=shape.name, found=said, expected=[rows, columns])
    codes = window(info.path, info.offset, info.nbytes, memory(info.path)).reshape(rows, columns // 2)
    return ScaledInt4(codes, safetensors.view(scale, memory(scale.path))), scale


def _beside(
    name: str, tensors: Mapping[str, TensorInfo], info: TensorInfo, dtype: str, shape: tuple[int, ...]
) -> TensorInfo:
    found = tensors.get(name)
    if found is None:
        raise refusal("E4013 packed", info.path, name=name)
    if (found.dtype, found.shape) != (dtype, shape):
        shown = f"{found.dtype} {list(found.shape)}"
        raise refusal("E4014 packed", found.path, name=name, found=shown, expected=f"{dtype} {list(shape)}")
    return found
