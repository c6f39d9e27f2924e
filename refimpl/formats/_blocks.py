"""Bytes to blocks and back, and the bit tricks that several formats share."""

from __future__ import annotations

import math

import numpy as np


def blocks(data: np.ndarray, block: np.dtype) -> np.ndarray:
    """u8 [..., n*itemsize] -> structured [..., n]. ValueError when the bytes are not whole blocks."""
    data = np.asarray(data)
    if data.dtype != np.uint8 or data.ndim == 0 or data.shape[-1] % block.itemsize:
        raise ValueError(
            f"expected u8 in whole blocks of {block.itemsize} bytes, got {data.dtype} {data.shape}"
        )
    return np.ascontiguousarray(data).view(block)


def to_bytes(b: np.ndarray) -> np.ndarray:
    """Structured [..., n] -> u8 [..., n*itemsize]."""
    return np.ascontiguousarray(b).view(np.uint8)


def in_blocks(x: np.ndarray, weights: int) -> np.ndarray:
    """f32 [..., n*weights] -> f32 [..., n, weights]. ValueError when the last axis is not whole blocks."""
    x = np.asarray(x, np.float32)
    if x.ndim == 0 or x.shape[-1] % weights:
        raise ValueError(f"expected rows of whole blocks of {weights} weights, got shape {x.shape}")
    return x.reshape(*x.shape[:-1], x.shape[-1] // weights, weights)


def flat(w: np.ndarray, axes: int) -> np.ndarray:
    """An array [..., a, b, ...] with its last `axes` axes joined into one, [..., a*b*...]."""
    return w.reshape(*w.shape[:-axes], math.prod(w.shape[-axes:]))


def nibbles(qs: np.ndarray) -> np.ndarray:
    """u8 [..., L] -> u8 [..., 2, L], in 0..15: all low nibbles, then all high ones."""
    return np.stack([qs & 15, qs >> 4], axis=-2)


def pack_nibbles(q: np.ndarray) -> np.ndarray:
    """u8 [..., 2, L], in 0..15 -> u8 [..., L]: the first half are low nibbles, the second high ones, as
    `nibbles` takes them apart.
    """
    return q[..., 0, :] | (q[..., 1, :] << 4)


def two_bits(qs: np.ndarray) -> np.ndarray:
    """u8 [..., 64] -> u8 [..., 256] in 0..3, as Q2_K and Q3_K lay them: for each half of 32 bytes four planes
    of 32 weights.

        byte i of a half    | weight 96 + i | weight 64 + i | weight 32 + i | weight i |
    """
    halves = qs.reshape(*qs.shape[:-1], 2, 1, 32)
    return flat((halves >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3, 3)


def unpack_scales(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 12 bytes of Q4_K and Q5_K -> eight 6-bit scales and eight 6-bit minima: u8 [..., 8] twice.

    Letters are the bits of scale 0..7 (A..H) and minimum 0..7 (a..h); the two high bits of 4..7 ride on top
    of 0..3:

        byte 0  EEAAAAAA    byte 4  eeaaaaaa    byte  8  eeeeEEEE
        byte 1  FFBBBBBB    byte 5  ffbbbbbb    byte  9  ffffFFFF
        byte 2  GGCCCCCC    byte 6  ggcccccc    byte 10  ggggGGGG
        byte 3  HHDDDDDD    byte 7  hhdddddd    byte 11  hhhhHHHH
    """
    a, b, c = s[..., 0:4], s[..., 4:8], s[..., 8:12]
    scales = np.concatenate([a & 63, (c & 15) | ((a >> 6) << 4)], axis=-1)
    minima = np.concatenate([b & 63, (c >> 4) | ((b >> 6) << 4)], axis=-1)
    return scales, minima


def pack_scales(sc: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Eight 6-bit scales and eight 6-bit minima, u8 [..., 8] each -> the 12 bytes u8 [..., 12] that
    `unpack_scales` draws.
    """
    a = sc[..., :4] | ((sc[..., 4:] >> 4) << 6)
    b = m[..., :4] | ((m[..., 4:] >> 4) << 6)
    c = (sc[..., 4:] & 15) | ((m[..., 4:] & 15) << 4)
    return np.concatenate([a, b, c], axis=-1)


def round_away(x: np.ndarray) -> np.ndarray:
    """Each number of x f32 [...] as a whole number, ties away from zero, as C's roundf."""
    return np.trunc(x + np.copysign(np.float32(0.5), x))


def pack_two_bits(q: np.ndarray) -> np.ndarray:
    """u8 [..., 256] in 0..3 -> u8 [..., 64]: planes of 32 weights into pairs of bits, as `two_bits` draws
    them.
    """
    planes = q.reshape(*q.shape[:-1], 2, 4, 32) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    return flat(planes.sum(axis=-2, dtype=np.uint8), 2)
