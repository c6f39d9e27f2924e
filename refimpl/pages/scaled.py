"""FP8 with its scales as blocks that can be touched: 128 codes of a row and the scale that they share.

A checkpoint keeps codes and scales in two tensors; here the scale stands before its codes. w[i] is
`fp8.weight_dequant`: the code's number times the scale, rounded once. Source: `refimpl.reference.fp8`.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from refimpl.formats import e4m3, e8m0

WEIGHTS = 128


def _scaled(name: str, scale: str, kind: str, formula: str, tables: dict[str, np.ndarray]) -> SimpleNamespace:
    """A format like the modules of `refimpl.formats`: `scale` names the scale's part, `kind` its dtype."""
    block = np.dtype([(scale, kind), ("codes", "u1", WEIGHTS)])

    def unpack(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The scale [..., n] and codes u8 [..., n, 128] of u8 [..., n * bytes]."""
        b = np.ascontiguousarray(data).view(block)
        return b[scale], b["codes"]

    def dequantize(data: np.ndarray) -> np.ndarray:
        """u8 [..., n * bytes] -> f32 [..., n * 128]."""
        s, q = unpack(data)
        factor = e8m0.decode(s) if kind == "u1" else s
        w = e4m3.decode(q) * factor[..., None]
        return w.reshape(*w.shape[:-2], -1)

    return SimpleNamespace(
        NAME=name,
        GGML_TYPE=None,
        WEIGHTS=WEIGHTS,
        BLOCK=block,
        PARTS=(scale, "q"),
        FORMULA=formula,
        unpack=unpack,
        dequantize=dequantize,
        **tables,
    )


SCALED = {
    "FP8": _scaled("FP8", "scale", "<f4", "E4M3[q[i]] * scale", {"E4M3": e4m3.TABLE}),
    "FP8_UE8M0": _scaled(
        "FP8_UE8M0", "e", "u1", "E4M3[q[i]] * UE8M0[e]", {"E4M3": e4m3.TABLE, "UE8M0": e8m0.TABLE}
    ),
}
"""{name: format}: scales of float32 as in DeepSeek-V3's checkpoint, and powers of two."""
