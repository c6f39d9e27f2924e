"""Whether a checkpoint and a GGUF are of one model: DeepSeek-V3 and R1 agree in every name and shape, and in
no trained number.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from refimpl.checkpoint import gguf, names
from refimpl.errors import refusal
from refimpl.files import chunks
from refimpl.formats import bf16
from refimpl.tensors import TensorInfo


def require_same_model(plain: Mapping[str, TensorInfo], file: gguf.File) -> None:
    """Compare in value what both have unquantized: norms and biases first, then some routers. A GGUF of
    experts alone has nothing to compare.

    MismatchError E3106 names the first tensor that differs, and how many do.
    """
    pairs = [
        (info, other)
        for name, info in plain.items()
        if (other := file.tensors.get(names.to_gguf(name))) is not None and other.dtype == "F32"
    ]
    vectors = [p for p in pairs if len(p[0].shape) == 1]
    routers = sorted(
        (p for p in pairs if p[1].name.endswith("ffn_gate_inp.weight")),
        key=lambda p: names.layer_of(p[0].name) or 0,
    )
    # Routers are 15 MB a layer: the first, a middle one and the last are enough.
    picked = [routers[i] for i in sorted({0, len(routers) // 2, len(routers) - 1})] if routers else []
    for group in (vectors, picked):
        different = [p for p in group if not _equal(*p)]
        if different:
            mine, other = different[0]
            raise refusal(
                "E3106",
                other.path,
                name=other.name,
                name2=mine.name,
                found=f"{len(different)} of {len(group)} such tensors differ",
            )


def _equal(a: TensorInfo, b: TensorInfo) -> bool:
    """Whether the numbers are the same. A router's bias, the one tensor that checkpoints have in float32,
    may be rounded to BF16 on one side: a GGUF is often made by way of a checkpoint of which every tensor
    was cast.
    """
    if a.shape != b.shape:
        return False
    x, y = values(a), values(b)
    pairs = [(x, y), (_rounded(x), y), (x, _rounded(y))] if b.name.endswith(names.BIAS[1]) else [(x, y)]
    return any(np.array_equal(*pair, equal_nan=True) for pair in pairs)


def _rounded(x: np.ndarray) -> np.ndarray:
    """To BF16, ties to even, and back."""
    return bf16.dequantize(bf16.quantize(x))


def values(info: TensorInfo) -> np.ndarray:
    """f32 of a BF16, F16 or F32 tensor, exactly, by reading its bytes."""
    raw = b"".join(chunks(info.path, info.offset, info.nbytes))
    if info.dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, {"F16": "<f2", "F32": "<f4"}[info.dtype]).astype(np.float32)
