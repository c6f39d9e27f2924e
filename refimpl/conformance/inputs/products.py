"""Blocks that hold every product of a format's sub-scales and quants: under each half-precision scale in turn
they enumerate decoding.

Nothing here knows a format: which integers a block has, and in which bits, `refimpl.formats.draw` finds out.
"""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np

from refimpl.formats import draw


def blocks(module: ModuleType) -> np.ndarray:
    """BLOCK [n] with scales of zero: every quant under every sub-scale, and every minimum.

    Groups of all blocks are numbered on. Where a group is too short for all quants, it holds a piece of them,
    and the groups after it hold the other pieces, under the same sub-scale.
    """
    bits, parts = draw.widths(module), draw.field_values(module, np.zeros(module.BLOCK.itemsize, np.uint8))
    sizes = {part: parts[part].size for part in bits if part != "q"}
    groups = max(sizes.values(), default=1)
    each = parts["q"].size // groups
    pieces = math.ceil(2 ** bits["q"] / each)
    count = max([pieces, *(math.ceil(2 ** bits[part] * pieces / size) for part, size in sizes.items())])
    quants = (np.arange(count * groups) % pieces)[:, None] * each + np.arange(each)
    stored = {"q": (quants % 2 ** bits["q"]).reshape(count, *parts["q"].shape)}
    for i, (part, size) in enumerate(sizes.items()):
        # An odd factor: all of them again, in another order than the part before.
        number = np.arange(count * size) // pieces * (2 * i + 1) % 2 ** bits[part]
        stored[part] = number.reshape(count, *parts[part].shape)
    return draw.pack(module, stored, count).view(module.BLOCK)[:, 0]
