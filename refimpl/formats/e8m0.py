"""E8M0: eight bits of exponent and nothing else, 2^(code - 127); 0xff is NaN. The scale format of OCP MX
(v1.0, section 5.4.1) and UE8M0 scales.
"""

from __future__ import annotations

import numpy as np

TABLE = np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan).astype(np.float32)
"""f32 [256]: the number of every code."""


def decode(codes: np.ndarray) -> np.ndarray:
    """u8 [...] -> f32 [...], exactly."""
    return TABLE[codes]
