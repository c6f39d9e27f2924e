# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""References: dequantize and quantize of the modules of refimpl.formats, decode and encode of
refimpl.formats.e4m3, and act_quant, weight_quant and weight_dequant of refimpl.reference.fp8.

The results have the references' bits, NaN and infinite scales included: each float operation stands here in
the reference's order and in float32, and the build forbids fused multiply-add. Inputs may be read-only,
strided or misaligned; they are copied only then. Loops run without the GIL, shared by threads where the
compiler has OpenMP, and the number of threads changes nothing in the result.

Numbers that the references leave to numpy's casts go to the reference, the whole call: for the quantizers of
32 and of Q8_K a block with NaN or infinity, one so small that the inverse of its scale overflows, and one
whose scale overflows a half; for the other K-quants magnitudes from 2**60 up; for FP8 a group or tile with
NaN or infinity, and a scale that is NaN.

Of the included files `codec_bits` is below all, then `codec_decode`, `codec_encode`, `codec_search` (the
K-quants) and `codec_fp8`.
"""

from cython.parallel cimport prange

import os

import numpy as np

from refimpl import entered, tensors
from refimpl.formats import _search, bf16, q2_k, q4_0, q4_1, q4_k, q5_0, q5_1, q5_k, q6_k, q8_0, q8_k
from refimpl.reference import fp8

include "codec_bits.pxi"
include "codec_decode.pxi"
include "codec_encode.pxi"
include "codec_search.pxi"
include "codec_fp8.pxi"

ctypedef void (*decoder)(const uint8_t* p, float* out, Py_ssize_t n) noexcept nogil
ctypedef void (*encoder)(const float* x, uint8_t* p, Py_ssize_t n, bint* beyond) noexcept nogil


# Threads

# OpenMP's own rule: OMP_NUM_THREADS, else the CPUs this process may run on.
cdef int at_most = omp_get_max_threads()
cdef bint forked = False


def set_threads(int n):
    """Use at most n threads from now on; ValueError for n < 1."""
    global at_most
    if n < 1:
        raise ValueError(f"threads must be at least 1, not {n}")
    at_most = n


def _after_fork():
    global forked
    forked = True  # OpenMP's threads stayed with the parent, and waiting for them never ends


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# Elements for which a thread is worth starting. Encoding takes several times as long as decoding.
cdef Py_ssize_t DECODED = 1 << 16
cdef Py_ssize_t ENCODED = 1 << 14
cdef Py_ssize_t TILED = 1 << 15


cdef int threads_for(Py_ssize_t elements, Py_ssize_t each):
    """Threads for so many elements: as many as have `each` of them to do; tells `entered`."""
    cdef int threads = 1 if forked else <int> max(1, min(<Py_ssize_t> at_most, elements // each))
    entered.entered("one thread" if threads == 1 else "a team")
    return threads


# How n blocks are shared out: thread t has blocks n t / threads to n (t + 1) / threads - 1, a run of the
# input and a run of the output, so that no line of the cache is written by two but at the ends.
#
#     bytes    | block 0 | block 1 | ...     | block n - 1 |        nbytes each
#              |<-- thread 0 -->|<-- thread 1 -->| ...     |
#     floats   | weights | weights | ...                   |        f32 [weights] each
cdef void decode(
    decoder f, const uint8_t* p, Py_ssize_t nbytes, float* out, Py_ssize_t weights, Py_ssize_t n, int threads
) noexcept nogil:
    """n blocks of nbytes at p -> f32 [n * weights], each thread a run of them."""
    cdef int t
    cdef Py_ssize_t first
    if threads == 1:
        f(p, out, n)
        return
    for t in prange(threads, num_threads=threads, schedule="static"):
        first = n * t // threads
        f(p + nbytes * first, out + weights * first, n * (t + 1) // threads - first)


cdef bint encode(
    encoder f, const float* x, Py_ssize_t weights, uint8_t* p, Py_ssize_t nbytes, Py_ssize_t n, int threads
) noexcept nogil:
    """x f32 [n * weights] -> n blocks of nbytes, each thread a run of them; False where the reference must do
    it.
    """
    cdef int t
    cdef Py_ssize_t first
    cdef int beyond = 0
    if threads == 1:
        return not encode_part(f, x, p, n)
    for t in prange(threads, num_threads=threads, schedule="static"):
        first = n * t // threads
        beyond += encode_part(f, x + weights * first, p + nbytes * first, n * (t + 1) // threads - first)
    return beyond == 0


# A function of its own, so that each thread has a `beyond` of its own to point at.
cdef int encode_part(encoder f, const float* x, uint8_t* p, Py_ssize_t n) noexcept nogil:
    """One thread's blocks; 1 where the reference must do them."""
    cdef bint beyond = False
    f(x, p, n, &beyond)
    return beyond


cdef by_reference(reference, x):
    """What the reference makes of x, for which nothing here is meant."""
    entered.entered("reference")
    return reference(x)


# GGML blocks and BF16

cdef _decoded(decoder f, data, Py_ssize_t nbytes, Py_ssize_t weights):
    """f32 [..., n*weights] from u8 [..., n*nbytes]. ValueError when the data is not u8 in whole blocks."""
    data = np.asarray(data)
    *rows, length = data.shape or [0]  # a scalar has no axes
    if data.dtype != np.uint8 or data.ndim == 0 or length % nbytes:
        raise ValueError(f"expected u8 in whole blocks of {nbytes} bytes, got {data.dtype} {data.shape}")
    out = np.empty((*rows, length // nbytes * weights), np.float32)
    # Copied only where it is not contiguous.
    cdef const uint8_t[::1] p = np.ascontiguousarray(data).reshape(-1)
    cdef float[::1] w = out.reshape(-1)
    cdef int threads = threads_for(w.shape[0], DECODED)
    with nogil:
        decode(f, &p[0], nbytes, &w[0], weights, p.shape[0] // nbytes, threads)
    return out


cdef _encoded(encoder f, reference, x, Py_ssize_t weights, Py_ssize_t nbytes):
    """u8 [..., n*nbytes] from f32 [..., n*weights]. ValueError when the last axis is not whole blocks."""
    x = np.asarray(x, np.float32)
    *rows, length = x.shape or [0]
    if x.ndim == 0 or length % weights:
        raise ValueError(f"expected rows of whole blocks of {weights} weights, got shape {x.shape}")
    out = np.empty((*rows, length // weights * nbytes), np.uint8)
    # Copied only where it is strided or misaligned.
    cdef const float[::1] w = np.require(x, np.float32, ["C", "A"]).reshape(-1)
    cdef uint8_t[::1] p = out.reshape(-1)
    cdef int threads = threads_for(w.shape[0], ENCODED)
    cdef bint here
    with nogil:
        here = encode(f, &w[0], weights, &p[0], nbytes, w.shape[0] // weights, threads)
    return out if here else by_reference(reference.quantize, x)


def dequantize_bf16(data):
    """u8 [..., n*2] -> f32 [..., n], exactly. ValueError when the data is not u8 in whole pairs of bytes."""
    return _decoded(&bf16_blocks, data, 2, 1)


def dequantize_q4_0(data):
    """u8 [..., n*18] -> f32 [..., n*32]. ValueError when the data is not u8 in whole blocks."""
    return _decoded(&q4_0_blocks, data, 18, 32)


def dequantize_q4_1(data):
    """u8 [..., n*20] -> f32 [..., n*32]. ValueError when the data is not u8 in whole blocks."""
    return _decoded(&q4_1_blocks, data, 20, 32)


def dequantize_q5_0(data):
    """u8 [..., n*22] -> f32 [..., n*32]. ValueError when the data is not u8 in whole blocks."""
    return _decoded(&q5_0_blocks, data, 22, 32)


def dequantize_q5_1(data):
    """u8 [..., n*24] -> f32 [..., n*32]. ValueError when the data is not u8 in whole blocks."""
    return _decoded(&q5_1_blocks, data, 24, 32)


def dequantize_q8_0(data):
    """u8 [..., n*34] -> f32 [..., n*32]. ValueError when the data is not u8 in whole blocks."""
    return _decoded(&q8_0_blocks, data, 34, 32)


def dequantize_q2_k(data):
    """u8 [..., n*84] -> f32 [..., n*256]. ValueError when the data is not u8 in whole blocks."""
    return _decoded(&q2_k_blocks, data, 84, 256)


def dequantize_q3_k(data):
    """u8 [..., n*110] -> f32 [..., n*256]. ValueError when the data is not u8 in whole blocks."""
    return _decoded(&q3_k_blocks, data, 110, 256)


def dequantize_q4_k(data):
    """u8 [..., n*144] -> f32 [..., n*256]. ValueError when the data is not u8 in whole blocks."""
    return _decoded(&q4_k_blocks, data, 144, 256)


def dequantize_q5_k(data):
    """u8 [..., n*176] -> f32 [..., n*256]. ValueError when the data is not u8 in whole blocks."""
    return _decoded(&q5_k_blocks, data, 176, 256)


def dequantize_q6_k(data):
    """u8 [..., n*210] -> f32 [..., n*256]. ValueError when the data is not u8 in whole blocks."""
    return _decoded(&q6_k_blocks, data, 210, 256)


def dequantize_q8_k(data):
    """u8 [..., n*292] -> f32 [..., n*256]. ValueError when the data is not u8 in whole blocks."""
    return _decoded(&q8_k_blocks, data, 292, 256)


def dequantize_iq4_nl(data):
    """u8 [..., n*18] -> f32 [..., n*32]. ValueError when the data is not u8 in whole blocks."""
    return _decoded(&iq4_nl_blocks, data, 18, 32)


def dequantize_iq4_xs(data):
    """u8 [..., n*136] -> f32 [..., n*256]. ValueError when the data is not u8 in whole blocks."""
    return _decoded(&iq4_xs_blocks, data, 136, 256)


def dequantize_mxfp4(data):
    """u8 [..., n*17] -> f32 [..., n*32]. ValueError when the data is not u8 in whole blocks."""
    return _decoded(&mxfp4_blocks, data, 17, 32)


def quantize_bf16(x):
    """f32 [..., n] -> u8 [..., n*2]: to nearest, ties to even; NaN stays NaN."""
    return _encoded(&bf16_encode, bf16, x, 1, 2)


def quantize_q4_0(x):
    """f32 [..., n*32] -> u8 [..., n*18]. ValueError when the last axis is not whole blocks."""
    return _encoded(&q4_0_encode, q4_0, x, 32, 18)


def quantize_q4_1(x):
    """f32 [..., n*32] -> u8 [..., n*20]. ValueError when the last axis is not whole blocks."""
    return _encoded(&q4_1_encode, q4_1, x, 32, 20)


def quantize_q5_0(x):
    """f32 [..., n*32] -> u8 [..., n*22]. ValueError when the last axis is not whole blocks."""
    return _encoded(&q5_0_encode, q5_0, x, 32, 22)


def quantize_q5_1(x):
    """f32 [..., n*32] -> u8 [..., n*24]. ValueError when the last axis is not whole blocks."""
    return _encoded(&q5_1_encode, q5_1, x, 32, 24)


def quantize_q8_0(x):
    """f32 [..., n*32] -> u8 [..., n*34]. ValueError when the last axis is not whole blocks."""
    return _encoded(&q8_0_encode, q8_0, x, 32, 34)


def quantize_q2_k(x):
    """f32 [..., n*256] -> u8 [..., n*84]. ValueError when the last axis is not whole blocks, or holds NaN or
    infinity.
    """
    return _encoded(&q2_k_encode, q2_k, x, 256, 84)


def quantize_q4_k(x):
    """f32 [..., n*256] -> u8 [..., n*144]. ValueError when the last axis is not whole blocks, or holds NaN or
    infinity.
    """
    return _encoded(&q4_k_encode, q4_k, x, 256, 144)


def quantize_q5_k(x):
    """f32 [..., n*256] -> u8 [..., n*176]. ValueError when the last axis is not whole blocks, or holds NaN or
    infinity.
    """
    return _encoded(&q5_k_encode, q5_k, x, 256, 176)


def quantize_q6_k(x):
    """f32 [..., n*256] -> u8 [..., n*210]. ValueError when the last axis is not whole blocks, or holds NaN or
    infinity.
    """
    return _encoded(&q6_k_encode, q6_k, x, 256, 210)


def quantize_q8_k(x):
    """f32 [..., n*256] -> u8 [..., n*292]. ValueError when the last axis is not whole blocks."""
    return _encoded(&q8_k_encode, q8_k, x, 256, 292)


# E4M3 and block FP8

def e4m3_decode(codes):
    """u8 [...] -> f32 [...], exactly. ValueError when the codes are not u8."""
    codes = np.asarray(codes)
    if codes.dtype != np.uint8:
        raise ValueError(f"expected u8 codes, got {codes.dtype} {codes.shape}")
    out = np.empty(codes.shape, np.float32)
    cdef const uint8_t[::1] c = np.ascontiguousarray(codes).reshape(-1)
    cdef float[::1] x = out.reshape(-1)
    cdef int threads = threads_for(x.shape[0], DECODED)
    with nogil:
        decode(&e4m3_values, &c[0], 1, &x[0], 1, c.shape[0], threads)
    # A scalar in gives a scalar out, as with numpy's own functions.
    return out if out.ndim else out[()]


def e4m3_encode(x):
    """f32 [...] -> u8 [...]: to nearest, ties to the even code, saturating at +-448; NaN stays NaN."""
    x = np.asarray(x, np.float32)
    out = np.empty(x.shape, np.uint8)
    cdef const float[::1] values = np.require(x, np.float32, ["C", "A"]).reshape(-1)
    cdef uint8_t[::1] c = out.reshape(-1)
    cdef int threads = threads_for(values.shape[0], ENCODED)
    with nogil:
        encode(&e4m3_codes, &values[0], 1, &c[0], 1, values.shape[0], threads)
    return out if out.ndim else out[()]


# Tiles of a matrix, `height` rows by 128 columns each, one scale a tile: 1 row for activations, 128 for
# weights.
# A thread takes whole bands, which are whole rows of codes and of scales:
#
#     codes  band 0   | tile | tile | .. |        scale  | s s .. |        across = ceil(k / 128)
#            band 1   | tile | tile | .. |               | s s .. |
cdef bint tiles(
    const float* x, Py_ssize_t n, Py_ssize_t k, Py_ssize_t height, uint8_t* codes, float* scale, int threads
) noexcept nogil:
    """x f32 [n, k] -> codes u8 [n, k], scale f32 [ceil(n/height), ceil(k/128)], in bands of `height` rows,
    each thread some of them; False where the reference must do it.
    """
    cdef Py_ssize_t band
    cdef Py_ssize_t bands = (n + height - 1) // height
    cdef Py_ssize_t across = (k + GROUP - 1) // GROUP
    cdef int beyond = 0
    if threads == 1:
        for band in range(bands):
            beyond += tiles_part(x, n, k, height, codes, scale, band, across)
    else:
        for band in prange(bands, num_threads=threads, schedule="static"):
            beyond += tiles_part(x, n, k, height, codes, scale, band, across)
    return beyond == 0


cdef int tiles_part(
    const float* x,
    Py_ssize_t n,
    Py_ssize_t k,
    Py_ssize_t height,
    uint8_t* codes,
    float* scale,
    Py_ssize_t band,
    Py_ssize_t across,
) noexcept nogil:
    """One band of the matrix; 1 where the reference must do it."""
    cdef bint beyond = False
    cdef Py_ssize_t row = band * height
    quantize_tiles(x + row * k, k, min(height, n - row), codes + row * k, scale + band * across, &beyond)
    return beyond


def act_quant(x):
    """f32 [..., K] -> codes u8 [..., K], scale f32 [..., ceil(K/128)], each group of 128 by itself."""
    x = np.asarray(x, np.float32)
    *lead, length = x.shape
    cdef Py_ssize_t k = length
    cdef Py_ssize_t rows = x.size // max(k, 1)
    codes = np.empty(x.shape, np.uint8)
    scale = np.empty((*lead, (k + GROUP - 1) // GROUP), np.float32)
    cdef const float[::1] values = np.require(x, np.float32, ["C", "A"]).reshape(-1)
    cdef uint8_t[::1] c = codes.reshape(-1)
    cdef float[::1] s = scale.reshape(-1)
    cdef int threads = threads_for(rows * k, TILED)
    cdef bint here
    with nogil:
        here = tiles(&values[0], rows, k, 1, &c[0], &s[0], threads)
    return (codes, scale) if here else by_reference(fp8.act_quant, x)


def weight_quant(w):
    """f32 [N, K] -> ScaledFP8 of codes u8 [N, K], scale f32 [ceil(N/128), ceil(K/128)]."""
    w = np.asarray(w, np.float32)
    if w.ndim != 2 or not w.size:  # the reference says what is wrong with it
        return by_reference(fp8.weight_quant, w)
    cdef Py_ssize_t n = w.shape[0]
    cdef Py_ssize_t k = w.shape[1]
    codes = np.empty((n, k), np.uint8)
    scale = np.empty(((n + GROUP - 1) // GROUP, (k + GROUP - 1) // GROUP), np.float32)
    cdef const float[::1] values = np.require(w, np.float32, ["C", "A"]).reshape(-1)
    cdef uint8_t[::1] c = codes.reshape(-1)
    cdef float[::1] s = scale.reshape(-1)
    cdef int threads = threads_for(n * k, TILED)
    cdef bint here
    with nogil:
        here = tiles(&values[0], n, k, GROUP, &c[0], &s[0], threads)
    return tensors.ScaledFP8(codes, scale) if here else by_reference(fp8.weight_quant, w)


def weight_dequant(w):
    """f32 [N, K] of a ScaledFP8: each code's number times its tile's scale."""
    codes, scale = w
    cdef Py_ssize_t n, k, row
    n, k = codes.shape
    cdef Py_ssize_t across = (k + GROUP - 1) // GROUP
    if codes.dtype != np.uint8 or scale.dtype != np.float32 or np.isnan(scale).any():
        return by_reference(fp8.weight_dequant, w)
    if scale.shape != ((n + GROUP - 1) // GROUP, across):
        return by_reference(fp8.weight_dequant, w)
    out = np.empty((n, k), np.float32)
    cdef const uint8_t[::1] c = np.ascontiguousarray(codes).reshape(-1)
    cdef const float[::1] s = np.require(scale, np.float32, ["C", "A"]).reshape(-1)
    cdef float[::1] o = out.reshape(-1)
    cdef int threads = threads_for(n * k, DECODED)
    with nogil:
        if threads == 1:
            for row in range(n):
                tile_values(&c[row * k], &s[row // GROUP * across], k, &o[row * k])
        else:
            for row in prange(n, num_threads=threads, schedule="static"):
                tile_values(&c[row * k], &s[row // GROUP * across], k, &o[row * k])
    return out
