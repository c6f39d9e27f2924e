"""E4M3FN: eight bits, `S EEEE MMM`, exponent bias 7, no infinities, NaN only where all exponent and mantissa
bits are one.

    0b S EEEE MMM     E > 0:  (-1)^S * 2^(E-7) * (1 + M/8)
                      E = 0:  (-1)^S * 2^-6 * M/8
                      0x7f, 0xff:  NaN

Largest number 448 (0x7e), smallest 2^-9 (0x01). Source: Micikevicius et al. 2022, "FP8 Formats for Deep
Learning", table 1.

Encoding stands once in each engine, since none can call another's: here in numpy, in kernels/codec_fp8.pxi
compiled ahead, in kernels/e4m3_triton.py for GPUs, and in kernels/activations_numba.py as the number that a
code stands for, without the code; on torch tensors it is torch's own cast. The conformance suite judges all
of them by one more (refimpl/conformance/truth/e4m3_by_search.py), which compares with every number and knows
no bits: with this one as its truth, it could not judge this one."""

from __future__ import annotations

import numpy as np

MAX = np.float32(448)


def _table() -> np.ndarray:
    """The number of every code, f32 [256]."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    size = np.where(exponent > 0, np.ldexp(8.0 + mantissa, exponent - 10), np.ldexp(mantissa * 1.0, -9))
    size[[0x7F, 0xFF]] = np.nan
    return np.copysign(size, np.where(code < 128, 1.0, -1.0)).astype(np.float32)


TABLE = _table()
"""f32 [256]: the number of every code."""


def decode(codes: np.ndarray) -> np.ndarray:
    """u8 [...] -> f32 [...], exactly."""
    return TABLE[codes]


def encode(x: np.ndarray) -> np.ndarray:
    """f32 [...] -> u8 [...]: round to nearest, ties to the even code; what lies beyond +-448, infinities
    included, becomes +-448; NaN stays NaN.

    Saturation is this project's overflow policy, as in DeepSeek's kernels and torch; ml_dtypes makes NaN of
    everything from 464 up.
    """
    x = np.asarray(x, np.float32)
    bits = x.view(np.uint32)
    size = np.minimum(np.abs(x), MAX)
    # Normal codes: keep three mantissa bits of the float32 pattern, rounded to even, and rebase the exponent
    # from 127 to 7.
    pattern = size.view(np.uint32)
    normal = ((pattern + 0x7FFFF + ((pattern >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2^-6 codes are multiples of 2^-9; rint rounds ties to even.
    subnormal = np.rint(np.where(size < 1, size, 0) * np.float32(512))
    code = np.where(size < np.float32(2**-6), subnormal.astype(np.uint32), normal)
    code = np.where(np.isnan(x), 0x7F, code)
    return (code | (bits >> 24 & 0x80)).astype(np.uint8)
