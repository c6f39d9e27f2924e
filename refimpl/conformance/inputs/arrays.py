"""The arguments of an operation as one tree of arrays: laid out otherwise, as tensors on a device, as bytes
to compare.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np

from refimpl.conformance.manifest import Manifest
from refimpl.formats import bf16
from refimpl.tensors import Interleaved, Packed, ScaledFP8, ScaledInt4

FAR_ROWS = 3
FAR = (
    2**30 + 1024
    # elements from row to row: to the last row further than 32 bits of offset reach, counted in bytes or in
    # elements
)


def tree_map(f: Callable[[Any], Any], value: Any) -> Any:
    """f of every array (or tensor) in a weight, a stack, a list or a tuple; everything else stays."""
    if isinstance(value, np.ndarray) or hasattr(value, "detach"):
        return f(value)
    if isinstance(value, ScaledFP8 | ScaledInt4):
        kind = ScaledFP8 if isinstance(value, ScaledFP8) else ScaledInt4
        return kind(f(value.codes), f(value.scale))
    if isinstance(value, Packed | Interleaved):
        return type(value)(f(value.data), value.ggml_type, value.shape)
    if isinstance(value, list | tuple):
        return type(value)(tree_map(f, v) for v in value)
    return value


def leaves(value: Any) -> list[Any]:
    """Every array (or tensor) of the tree."""
    found: list[Any] = []
    tree_map(found.append, value)
    return found


def contents(value: Any) -> list[bytes]:
    """The bytes of every array of the tree."""
    return [a.tobytes() for a in leaves(value)]


def copy(value: Any) -> Any:
    """New, contiguous, writeable memory for all arrays."""
    return tree_map(lambda a: a.copy(order="C"), value)


# --- layouts: the same numbers otherwise --------------------------------------------------------------------


def _read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy(order="C")
    x.flags.writeable = False
    return x


def _misaligned(x: np.ndarray) -> np.ndarray:
    raw = np.zeros(x.nbytes + 1, np.uint8)
    raw[1:] = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    return raw[1:].view(x.dtype).reshape(x.shape)


def _every_second(x: np.ndarray) -> np.ndarray:
    return (
        np.repeat(x[..., None], 2, axis=-1).reshape(*x.shape[:-1], 2 * x.shape[-1])[..., ::2] if x.ndim else x
    )


def _padded(x: np.ndarray) -> np.ndarray:
    """Rows inside a wider matrix."""
    wide = np.full((*x.shape[:-1], x.shape[-1] + 7), 77, x.dtype) if x.ndim else x
    if x.ndim:
        wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]] if x.ndim else x


def few_rows(x: np.ndarray) -> bool:
    """Whether it is a matrix that `far_apart` takes apart."""
    return x.ndim == 2 and 2 <= len(x) <= FAR_ROWS and x.size > 0


def _far_apart(x: np.ndarray) -> np.ndarray:
    """The rows of a matrix of a few FAR elements apart in a sparse mapping; other arrays just copied."""
    if not few_rows(x):
        return x.copy(order="C")
    stride = FAR * x.itemsize
    memory = mmap.mmap(
        -1, stride * len(x), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    )
    far = np.ndarray(x.shape, x.dtype, memory, strides=(stride, x.itemsize))
    far[...] = x
    return far


def _four_past_sixteen(x: np.ndarray) -> np.ndarray:
    """Aligned for its dtype, and not for a vector."""
    raw = np.zeros(x.nbytes + 32, np.uint8)
    start = -raw.ctypes.data % 16 + 4
    placed = raw[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    placed[...] = x
    return placed


def _exchanged(x: np.ndarray) -> np.ndarray:
    """Tokens and heads in the other order in memory; the same as "by columns" for a matrix."""
    return x if x.ndim < 2 else x.swapaxes(0, 1).copy(order="C").swapaxes(0, 1)


EXCHANGED = "heads before tokens"
"""A layout of arrays of three dimensions."""
LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "contiguous": lambda x: x.copy(order="C"),
    "read-only": _read_only,
    "at an odd address": _misaligned,
    "four bytes past sixteen": _four_past_sixteen,
    "every second": _every_second,
    "backwards": lambda x: np.flip(np.flip(x).copy()),
    "by columns": np.asfortranarray,
    "padded rows": _padded,
    EXCHANGED: _exchanged,
}
OF_TENSORS = (
    "contiguous",
    "four bytes past sixteen",
    "every second",
    "by columns",
    "padded rows",
    EXCHANGED,
)  # torch has no negative strides, read-only or misaligned memory


def laid_out(value: Any, name: str) -> Any:
    """All arrays of the tree in a layout of LAYOUTS."""
    return tree_map(lambda a: LAYOUTS[name](a).view(type(a)), value)


def one_laid_out(value: Any, name: str, which: int) -> Any:
    """The array of this number, as `leaves` counts them, in a layout of LAYOUTS; all others as they are."""
    number = count()
    return tree_map(lambda a: LAYOUTS[name](a).view(type(a)) if next(number) == which else a, value)


def far_apart(value: Any) -> Any:
    """The rows of each matrix of at most FAR_ROWS in the tree far apart; with three the last is beyond 2^31
    elements.
    """
    return tree_map(lambda a: _far_apart(a).view(type(a)), value)


def has_room(manifest: Manifest) -> bool:
    """Whether rows can be taken FAR apart: sparsely on the host, while a GPU must really have twice the
    memory of the largest such matrix.
    """
    if manifest.array == "numpy" or manifest.device == "cpu":
        return True
    import torch

    return torch.cuda.mem_get_info()[0] > 2 * FAR_ROWS * FAR * 4


def big_stack(matrix: Packed | Interleaved, experts: int) -> Packed | Interleaved:
    """A sparse stack of `experts` matrices whose last is `matrix`; all others are untouched zeros."""
    size = matrix.data.nbytes
    memory = mmap.mmap(
        -1, size * experts, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    )
    data = np.frombuffer(memory, np.uint8).reshape(experts, *matrix.data.shape)
    data[-1] = matrix.data
    return type(matrix)(data, matrix.ggml_type, (experts, *matrix.shape))


# --- the kernel's kind of array -----------------------------------------------------------------------------


class Narrow(np.ndarray):
    """float32 numbers, each of which bfloat16 has: a kernel of tensors gets them as bfloat16."""


def narrow(a: np.ndarray) -> Narrow:
    """float32 rounded to bfloat16, any shape, as `Narrow`."""
    return bf16.dequantize(bf16.quantize(a)).view(Narrow)


def to_kernel(value: Any, manifest: Manifest) -> Any:
    """numpy stays; for a kernel of tensors every array becomes one, in the same layout. Views of one array
    become views of one tensor, such as the two parts of a cache's rows, which kernels look for.
    """
    if manifest.array == "numpy":
        return value
    import torch

    owners: dict[int, Any] = {}

    def tensor(a: np.ndarray) -> Any:
        owner = a.base
        if owner is not None and (isinstance(a, Narrow) or manifest.device != "cpu") and _is_part(a, owner):
            if id(owner) not in owners:
                owners[id(owner)] = tensor(owner.copy().view(a.dtype).view(type(a)))
            start = a.__array_interface__["data"][0] - owner.__array_interface__["data"][0]
            strides = [s // a.itemsize for s in a.strides]
            return owners[id(owner)].as_strided(a.shape, strides, start // a.itemsize)
        t = torch.from_numpy(np.asarray(a if a.flags.writeable else a.copy()))
        t = t.to(torch.bfloat16) if isinstance(a, Narrow) else t
        if manifest.device == "cpu" or t.is_contiguous():
            return t.to(manifest.device)
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=manifest.device).copy_(
            t
        )  # `to` would close the gaps

    return tree_map(tensor, value)


def _is_part(a: np.ndarray, owner: Any) -> bool:
    """Whether it is a view with gaps of an array without."""
    return (
        isinstance(owner, np.ndarray)
        and owner.flags.c_contiguous
        and owner.dtype.itemsize == a.itemsize
        and not a.flags.c_contiguous
        and min(a.strides) > 0
    )


def in_dtype(x: Any, dtype: str) -> Any:
    """Activations f32 as a kernel declares to take them: tensors in that dtype, numpy's (which has no
    bfloat16) in its numbers. Others, such as codes and scales, stay.
    """
    if hasattr(x, "detach"):
        import torch  # there are tensors, so that it is loaded

        return x.to(getattr(torch, dtype)) if x.dtype == torch.float32 else x
    if not isinstance(x, np.ndarray) or x.dtype != np.float32:
        return x
    return bf16.dequantize(bf16.quantize(x)) if dtype == "bfloat16" else x.astype(np.float16)


def from_kernel(value: Any, output: str = "float32") -> tuple[Any, ...]:
    """The results, one or several, as numpy. Those of the declared dtype `output` become float32, FP8 its
    codes; what is no array stays what it is, to be found by the law `form`.
    """
    several = value if isinstance(value, tuple | list) else (value,)
    return tuple(_numpy(v, output) for v in several)


def _numpy(value: Any, output: str) -> Any:
    if hasattr(value, "detach"):
        import torch

        value = value.detach().cpu()
        if value.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            value = value.view(torch.uint8)
        if str(value.dtype) == f"torch.{output}":
            value = value.float()
        return value if value.dtype == torch.bfloat16 else value.numpy()
    if isinstance(value, np.ndarray) and value.dtype.kind == "V" and value.dtype.itemsize == 1:
        return value.view(np.uint8)  # ml_dtypes' E4M3
    if isinstance(value, np.ndarray) and value.dtype.name == output:
        return value.astype(np.float32)
    return value
