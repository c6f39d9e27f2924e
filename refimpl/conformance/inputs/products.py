"""Blocks that hold every product of a format's sub-scales and quants: under each half-precision scale in turn
they enumerate decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np

from refimpl.formats import q2_k, q3_k, q4_0, q4_1, q4_k, q5_0, q5_1, q5_k, q6_k, q8_0

Bytes = Callable[
    [np.ndarray, np.ndarray], np.ndarray
]  # of the place of a byte in its field, and the number of the block

NIBBLES: dict[str, Bytes] = {"qs": lambda i, block: i % 16 * 0x11}
PAIRS: dict[str, Bytes] = {"qs": lambda i, block: i % 4 * 0x55}

QUANTS: dict[ModuleType, tuple[int, dict[str, Bytes]]] = {
    # how many blocks, and the bytes of the quants: each group of weights under one sub-scale has all of them,
    # of Q8_0 and Q6_K a part in each block
    q8_0: (8, {"qs": lambda i, block: 32 * block + i}),
    q4_0: (1, NIBBLES),
    q4_1: (1, NIBBLES),
    q5_0: (1, NIBBLES | {"qh": lambda i, block: i // 2 * 0xFF}),
    q5_1: (1, NIBBLES | {"qh": lambda i, block: i // 2 * 0xFF}),
    q2_k: (32, PAIRS),
    q3_k: (32, PAIRS | {"hmask": lambda i, block: i // 4 % 2 * 0xFF}),
    q4_k: (64, NIBBLES),
    q5_k: (64, NIBBLES | {"qh": lambda i, block: i // 16 * 0xFF}),
    q6_k: (
        64,
        {
            "ql": NIBBLES["qs"],
            "qh": lambda i, block: block % 4 * 0x55,
            "scales": lambda i, block: block // 4 * 16 + i,
        },
    ),
}


def blocks(module: ModuleType) -> np.ndarray:
    """BLOCK [n] with scales of zero: every pair of sub-scale and quant, and every minimum. Packed sub-scales
    are random bytes, enough of them.
    """
    count, fields = QUANTS[module]
    b = np.zeros(count, module.BLOCK)
    if "scales" in module.BLOCK.names:
        b["scales"] = (
            np.random.default_rng(0).integers(0, 256, b["scales"].shape, np.uint8).view(b["scales"].dtype)
        )
    for name, of in fields.items():
        i, block = np.arange(b[name].shape[-1]), np.arange(count)[:, None]
        b[name] = np.broadcast_to(of(i, block), b[name].shape).astype(np.uint8).view(b[name].dtype)
    return b
