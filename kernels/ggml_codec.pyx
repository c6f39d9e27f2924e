# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""References: dequantize and quantize of refimpl.formats.{q4_k, q5_k, q6_k, q8_0, q8_k}, decode and encode of refimpl.formats.e4m3, and
act_quant, weight_quant and weight_dequant of refimpl.fp8.

The same bits as those, NaN and infinite scales included: each float operation stands here in the reference's order and in float32, and the
build forbids fused multiply-add. Inputs may be read-only, strided or misaligned; they are copied only then. Loops run without the GIL.

Numbers that the references leave to numpy's casts go to the reference, the whole call: for `quantize_q8_0` and `quantize_q8_k` a block with
NaN or infinity, one so small that the inverse of its scale overflows, and one whose scale overflows a half; for FP8 a group or tile with NaN or
infinity, and a scale that is NaN.
"""

from libc.stdint cimport int8_t, int16_t, int32_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memset

import numpy as np

from refimpl import fp8, tensors
from refimpl.formats import q8_0, q8_k

cdef enum:
    INFINITE = 0x7F800000  # the patterns of float32 magnitudes from here on are infinity and NaN
cdef float[256] E4M3


# Patterns and numbers

cdef inline uint32_t bits_of(float x) noexcept nogil:
    cdef uint32_t b
    memcpy(&b, &x, 4)
    return b


cdef inline float float_of(uint32_t b) noexcept nogil:
    cdef float x
    memcpy(&x, &b, 4)
    return x


cdef inline float half(const uint8_t* p) noexcept nogil:
    """The two little-endian bytes at p as float32, exactly; a NaN keeps its payload."""
    cdef uint32_t h = p[0] | <uint32_t> p[1] << 8
    cdef uint32_t sign = (h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3FF
    if exponent == 0:
        return float_of(sign | bits_of(<float> mantissa * <float> 2.0**-24))
    if exponent == 31:
        return float_of(sign | INFINITE | mantissa << 13)
    return float_of(sign | (exponent + (127 - 15)) << 23 | mantissa << 13)


cdef inline uint32_t to_half(float x) noexcept nogil:
    """The half nearest to x, ties to even, for 0 <= x < 65520."""
    cdef uint32_t b = bits_of(x)
    if x < <float> 2.0**-14:
        return bits_of(x + <float> 0.5) - bits_of(0.5)  # floats just above 0.5 are 2**-24 apart, as subnormal halves are
    return ((b + 0xFFF + ((b >> 13) & 1)) >> 13) - ((127 - 15) << 10)


cdef inline void put16(uint8_t* p, uint32_t value) noexcept nogil:
    p[0], p[1] = <uint8_t> value, <uint8_t> (value >> 8)


cdef inline uint32_t largest(const float* x, Py_ssize_t n) noexcept nogil:
    """The pattern of the largest magnitude, not below INFINITE where NaN or infinity is among them. Patterns order as magnitudes do."""
    cdef int32_t size, top = 0
    cdef Py_ssize_t i
    for i in range(n):
        size = <int32_t> (bits_of(x[i]) & 0x7FFFFFFF)
        top = size if size > top else top
    return <uint32_t> top


# Checks and buffers

def _blocks_in(data, Py_ssize_t nbytes, Py_ssize_t weights):
    """The contiguous bytes, flat, and an empty f32 result. ValueError when the data is not u8 in whole blocks."""
    data = np.asarray(data)
    *rows, length = data.shape or [1]
    if data.dtype != np.uint8 or length % nbytes:
        raise ValueError(f"expected u8 in whole blocks of {nbytes} bytes, got {data.dtype} {data.shape}")
    return np.ascontiguousarray(data).reshape(-1), np.empty((*rows, length // nbytes * weights), np.float32)


def _weights_in(x, Py_ssize_t weights, Py_ssize_t nbytes):
    """The contiguous, aligned weights, flat, and an empty u8 result. ValueError when the last axis is not whole blocks."""
    x = np.asarray(x, np.float32)
    *rows, length = x.shape or [1]
    if length % weights:
        raise ValueError(f"expected rows of whole blocks of {weights} weights, got shape {x.shape}")
    return np.require(x, np.float32, ["C", "A"]).reshape(-1), np.empty((*rows, length // weights * nbytes), np.uint8)


# Q4_K and Q5_K

cdef inline void scale_and_minimum(const uint8_t* s, int j, uint8_t* scale, uint8_t* minimum) noexcept nogil:
    """The 6-bit pair j of the 12 bytes s, drawn in refimpl.formats._blocks.unpack_scales."""
    if j < 4:
        scale[0], minimum[0] = s[j] & 63, s[j + 4] & 63
    else:
        scale[0] = (s[j + 4] & 15) | ((s[j - 4] >> 6) << 4)
        minimum[0] = (s[j + 4] >> 4) | ((s[j] >> 6) << 4)


cdef void q4_k_block(const uint8_t* p, float* out) noexcept nogil:
    cdef float d = half(p), dmin = half(p + 2), scale, minimum
    cdef const uint8_t* q
    cdef uint8_t sc, m
    cdef int j, i, shift
    for j in range(8):
        scale_and_minimum(p + 4, j, &sc, &m)
        scale, minimum, shift, q = d * sc, dmin * m, 4 * (j & 1), p + 16 + 32 * (j >> 1)
        for i in range(32):
            out[32 * j + i] = scale * <float> ((q[i] >> shift) & 15) - minimum


cdef void q5_k_block(const uint8_t* p, float* out) noexcept nogil:
    cdef float d = half(p), dmin = half(p + 2), scale, minimum
    cdef const uint8_t* high = p + 16
    cdef const uint8_t* q
    cdef uint8_t sc, m
    cdef int j, i, shift
    for j in range(8):
        scale_and_minimum(p + 4, j, &sc, &m)
        scale, minimum, shift, q = d * sc, dmin * m, 4 * (j & 1), p + 48 + 32 * (j >> 1)
        for i in range(32):
            out[32 * j + i] = scale * <float> (((q[i] >> shift) & 15) | ((high[i] >> j) & 1) << 4) - minimum


def dequantize_q4_k(data):
    """u8 [..., n*144] -> f32 [..., n*256]. ValueError when the data is not u8 in whole blocks."""
    flat, out = _blocks_in(data, 144, 256)
    cdef const uint8_t[::1] p = flat
    cdef float[::1] w = out.reshape(-1)
    cdef Py_ssize_t block, n = p.shape[0] // 144
    with nogil:
        for block in range(n):
            q4_k_block(&p[144 * block], &w[256 * block])
    return out


def dequantize_q5_k(data):
    """u8 [..., n*176] -> f32 [..., n*256]. ValueError when the data is not u8 in whole blocks."""
    flat, out = _blocks_in(data, 176, 256)
    cdef const uint8_t[::1] p = flat
    cdef float[::1] w = out.reshape(-1)
    cdef Py_ssize_t block, n = p.shape[0] // 176
    with nogil:
        for block in range(n):
            q5_k_block(&p[176 * block], &w[256 * block])
    return out


# Q6_K

cdef void q6_k_plane(const uint8_t* low, const uint8_t* high, int plane, const float* scales, float* out) noexcept nogil:
    """The 32 weights whose nibbles and bit pairs are at one place in each byte. They pass through q, which no pointer can alias."""
    cdef int8_t[32] q
    cdef int i, nibble = 4 * (plane >> 1), pair = 2 * plane
    for i in range(32):
        q[i] = <int8_t> ((((low[i] >> nibble) & 15) | ((high[i] >> pair) & 3) << 4) - 32)
    for i in range(16):
        out[i] = scales[0] * <float> q[i]
    for i in range(16, 32):
        out[i] = scales[1] * <float> q[i]


cdef void q6_k_block(const uint8_t* p, float* out) noexcept nogil:
    cdef float d = half(p + 208)
    cdef const int8_t* sc = <const int8_t*> (p + 192)
    cdef float[2] scales
    cdef int k, plane, second
    for k in range(8):
        second, plane, scales[0], scales[1] = k >> 2, k & 3, d * sc[2 * k], d * sc[2 * k + 1]
        q6_k_plane(p + 64 * second + 32 * (plane & 1), p + 128 + 32 * second, plane, scales, out + 32 * k)


def dequantize_q6_k(data):
    """u8 [..., n*210] -> f32 [..., n*256]. ValueError when the data is not u8 in whole blocks."""
    flat, out = _blocks_in(data, 210, 256)
    cdef const uint8_t[::1] p = flat
    cdef float[::1] w = out.reshape(-1)
    cdef Py_ssize_t block, n = p.shape[0] // 210
    with nogil:
        for block in range(n):
            q6_k_block(&p[210 * block], &w[256 * block])
    return out


# Q8_0 and Q8_K

cdef void q8_0_block(const uint8_t* p, float* out) noexcept nogil:
    cdef float d = half(p)
    cdef const int8_t* q = <const int8_t*> (p + 2)
    cdef int i
    for i in range(32):
        out[i] = d * q[i]


def dequantize_q8_0(data):
    """u8 [..., n*34] -> f32 [..., n*32]. ValueError when the data is not u8 in whole blocks."""
    flat, out = _blocks_in(data, 34, 32)
    cdef const uint8_t[::1] p = flat
    cdef float[::1] w = out.reshape(-1)
    cdef Py_ssize_t block, n = p.shape[0] // 34
    with nogil:
        for block in range(n):
            q8_0_block(&p[34 * block], &w[32 * block])
    return out


cdef inline float away(float v) noexcept nogil:
    """To be truncated: half a unit further from zero."""
    return v + float_of(bits_of(0.5) | (bits_of(v) & <uint32_t> 0x80000000))


cdef bint to_q8_0_block(const float* x, uint8_t* p) noexcept nogil:
    """False, and nothing written, for a block that goes to the reference."""
    cdef uint32_t top = largest(x, 32)
    cdef float d = float_of(top) / <float> 127, inverse = <float> 1 / d if d != 0 else 0
    cdef int8_t[32] q
    cdef int i
    if top >= INFINITE or bits_of(inverse) >= INFINITE or d >= 65520:
        return False
    for i in range(32):
        q[i] = <int8_t> <int32_t> away(x[i] * inverse)
    put16(p, to_half(d))
    memcpy(p + 2, q, 32)
    return True


def quantize_q8_0(x):
    """f32 [..., n*32] -> u8 [..., n*34]. ValueError when the last axis is not whole blocks."""
    flat, out = _weights_in(x, 32, 34)
    cdef const float[::1] w = flat
    cdef uint8_t[::1] p = out.reshape(-1)
    cdef Py_ssize_t block, n = w.shape[0] // 32
    cdef bint here = True
    with nogil:
        for block in range(n):
            here = to_q8_0_block(&w[32 * block], &p[34 * block])
            if not here:
                break
    return out if here else q8_0.quantize(x)


cdef inline int nearest(float v) noexcept nogil:
    """v as an integer, ties to even, for abs(v) < 2**22: floats just above 1.5 * 2**23 are 1 apart."""
    return <int> (bits_of(v + <float> 12582912) - bits_of(12582912))


cdef void put_q8_k_block(const float* x, float d, float inverse, uint8_t* p) noexcept nogil:
    cdef int8_t[256] q
    cdef int i, j, n, total
    for i in range(256):
        n = nearest(inverse * x[i])
        q[i] = <int8_t> (n if n < 127 else 127)
    put16(p, bits_of(d))
    put16(p + 2, bits_of(d) >> 16)
    memcpy(p + 4, q, 256)
    for j in range(16):
        total = 0
        for i in range(16):
            total += q[16 * j + i]
        put16(p + 260 + 2 * j, <uint32_t> total)


cdef bint to_q8_k_block(const float* x, uint8_t* p) noexcept nogil:
    """False, and nothing written, for a block that goes to the reference."""
    cdef uint32_t top = largest(x, 256)
    cdef float inverse = 0, d = 0
    cdef int at = 0
    if top >= INFINITE:
        return False
    if top:
        while bits_of(x[at]) & 0x7FFFFFFF != top:
            at += 1
        inverse = <float> -127 / x[at]
        d = <float> 1 / inverse
    if bits_of(inverse) & 0x7FFFFFFF >= INFINITE:
        return False
    put_q8_k_block(x, d, inverse, p)
    return True


def quantize_q8_k(x):
    """f32 [..., n*256] -> u8 [..., n*292]. ValueError when the last axis is not whole blocks."""
    flat, out = _weights_in(x, 256, 292)
    cdef const float[::1] w = flat
    cdef uint8_t[::1] p = out.reshape(-1)
    cdef Py_ssize_t block, n = w.shape[0] // 256
    cdef bint here = True
    with nogil:
        for block in range(n):
            here = to_q8_k_block(&w[256 * block], &p[292 * block])
            if not here:
                break
    return out if here else q8_k.quantize(x)


# E4M3

cdef float e4m3_value(uint32_t code) noexcept nogil:
    cdef uint32_t sign = (code & 0x80) << 24, size = code & 0x7F
    if size == 0x7F:
        return float_of(sign | 0x7FC00000)
    if size < 8:
        return float_of(sign | bits_of(<float> size * <float> 2.0**-9))
    return float_of(sign | ((size + ((127 - 7) << 3)) << 20))


cdef inline uint8_t e4m3_code(uint32_t b) noexcept nogil:
    """Of the pattern b. Floats just above 2**14 are 2**-9 apart, as subnormal codes are; normal codes keep three bits of the mantissa."""
    cdef int32_t size = <int32_t> (b & 0x7FFFFFFF), top = <int32_t> bits_of(448)
    cdef int32_t inside = size if size < top else top
    cdef int32_t small = <int32_t> (bits_of(float_of(<uint32_t> inside) + <float> 16384) - bits_of(16384))
    cdef int32_t normal = ((inside + 0x7FFFF + ((inside >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    cdef int32_t below = -<int32_t> (inside < <int32_t> bits_of(2.0**-6))  # all ones below the normal codes: a choice without a branch
    cdef int32_t code = (small & below) | (normal & ~below)
    code = 0x7F if size > INFINITE else code
    return <uint8_t> (code | (b >> 24 & 0x80))


cdef void e4m3_values(const uint8_t* codes, float* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        out[i] = E4M3[codes[i]]


cdef void e4m3_codes(const uint32_t* patterns, uint8_t* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        out[i] = e4m3_code(patterns[i])


for _code in range(256):
    E4M3[_code] = e4m3_value(_code)


def e4m3_decode(codes):
    """u8 [...] -> f32 [...], exactly. ValueError when the codes are not u8."""
    codes = np.asarray(codes)
    if codes.dtype != np.uint8:
        raise ValueError(f"expected u8 codes, got {codes.dtype} {codes.shape}")
    out = np.empty(codes.shape, np.float32)
    cdef const uint8_t[::1] c = np.ascontiguousarray(codes).reshape(-1)
    cdef float[::1] x = out.reshape(-1)
    with nogil:
        e4m3_values(&c[0], &x[0], c.shape[0])
    return out if out.ndim else out[()]


def e4m3_encode(x):
    """f32 [...] -> u8 [...]: to nearest, ties to the even code, saturating at +-448; NaN stays NaN."""
    x = np.asarray(x, np.float32)
    out = np.empty(x.shape, np.uint8)
    cdef const uint32_t[::1] b = np.require(x, np.float32, ["C", "A"]).reshape(-1).view(np.uint32)
    cdef uint8_t[::1] c = out.reshape(-1)
    with nogil:
        e4m3_codes(&b[0], &c[0], b.shape[0])
    return out if out.ndim else out[()]


# Block FP8

cdef enum:
    GROUP = 128  # columns of a group of activations; columns and rows of a tile of weights


cdef void scaled_codes(const float* x, float scale, uint8_t* codes, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        codes[i] = e4m3_code(bits_of(x[i] / scale))


cdef bint act_groups(const float* x, Py_ssize_t k, uint8_t* codes, float* scale) noexcept nogil:
    """A row of k numbers. False for a row that goes to the reference."""
    cdef Py_ssize_t group, at, n
    cdef uint32_t top
    for group in range((k + GROUP - 1) // GROUP):
        at = group * GROUP
        n = min(k - at, <Py_ssize_t> GROUP)
        top = largest(x + at, n)
        if top >= INFINITE:
            return False
        scale[group] = float_of(top) / <float> 448
        if scale[group] == 0:
            memset(codes + at, 0, n)
        else:
            scaled_codes(x + at, scale[group], codes + at, n)
    return True


cdef bint weight_tile(const float* w, Py_ssize_t k, Py_ssize_t rows, Py_ssize_t columns, uint8_t* codes, float* scale) noexcept nogil:
    """Of a matrix with k columns. False for a tile that goes to the reference."""
    cdef uint32_t top = 0
    cdef Py_ssize_t row
    for row in range(rows):
        top = max(top, largest(w + row * k, columns))
    if top >= INFINITE:
        return False
    scale[0] = float_of(top) / <float> 448
    for row in range(rows):
        if scale[0] == 0:
            memset(codes + row * k, 0, columns)
        else:
            scaled_codes(w + row * k, scale[0], codes + row * k, columns)
    return True


cdef void scaled_values(const uint8_t* codes, float scale, float* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        out[i] = E4M3[codes[i]] * scale


def act_quant(x):
    """f32 [..., K] -> codes u8 [..., K], scale f32 [..., ceil(K/128)], each group of 128 by itself."""
    x = np.asarray(x, np.float32)
    *lead, length = x.shape
    cdef Py_ssize_t k = length, groups = (k + GROUP - 1) // GROUP, row, rows = x.size // max(k, 1)
    codes, scale = np.empty(x.shape, np.uint8), np.empty((*lead, groups), np.float32)
    cdef const float[::1] numbers = np.require(x, np.float32, ["C", "A"]).reshape(-1)
    cdef uint8_t[::1] c = codes.reshape(-1)
    cdef float[::1] s = scale.reshape(-1)
    cdef bint here = True
    with nogil:
        for row in range(rows):
            here = act_groups(&numbers[row * k], k, &c[row * k], &s[row * groups])
            if not here:
                break
    return (codes, scale) if here else fp8.act_quant(x)


def weight_quant(w):
    """f32 [N, K] -> ScaledFP8 of codes u8 [N, K], scale f32 [ceil(N/128), ceil(K/128)]."""
    w = np.asarray(w, np.float32)
    if w.ndim != 2 or not w.size:
        return fp8.weight_quant(w)
    cdef Py_ssize_t n = w.shape[0], k = w.shape[1], tile, row, column
    cdef Py_ssize_t across = (k + GROUP - 1) // GROUP, tiles = (n + GROUP - 1) // GROUP * across
    codes, scale = np.empty((n, k), np.uint8), np.empty((tiles // across, across), np.float32)
    cdef const float[:, ::1] weights = np.require(w, np.float32, ["C", "A"])
    cdef uint8_t[:, ::1] c = codes
    cdef float[::1] s = scale.reshape(-1)
    cdef bint here = True
    with nogil:
        for tile in range(tiles):
            row, column = tile // across * GROUP, tile % across * GROUP
            here = weight_tile(&weights[row, column], k, min(n - row, <Py_ssize_t> GROUP), min(k - column, <Py_ssize_t> GROUP), &c[row, column], &s[tile])
            if not here:
                break
    return tensors.ScaledFP8(codes, scale) if here else fp8.weight_quant(w)


def weight_dequant(w):
    """f32 [N, K] of a ScaledFP8: each code's number times its tile's scale."""
    codes, scale = w
    cdef Py_ssize_t n, k, row, tile
    n, k = codes.shape
    if codes.dtype != np.uint8 or scale.dtype != np.float32 or scale.shape != ((n + GROUP - 1) // GROUP, (k + GROUP - 1) // GROUP) or np.isnan(scale).any():
        return fp8.weight_dequant(w)
    out = np.empty((n, k), np.float32)
    cdef const uint8_t[:, ::1] c = np.ascontiguousarray(codes)
    cdef const float[:, ::1] s = np.require(scale, np.float32, ["C", "A"])
    cdef float[:, ::1] o = out
    with nogil:
        for row in range(n):
            for tile in range((k + GROUP - 1) // GROUP):
                scaled_values(&c[row, GROUP * tile], s[row // GROUP, tile], &o[row, GROUP * tile], min(k - GROUP * tile, <Py_ssize_t> GROUP))
    return out
