"""Included by ggml_codec.pyx: E4M3 (refimpl.formats.e4m3) and block FP8 (refimpl.reference.fp8).

E4M3 stands here once more since a compiled loop cannot call numpy's; e4m3_triton.py has it for GPUs.
"""

cdef enum:
    GROUP = 128  # columns of a group of activations; columns and rows of a tile of weights


cdef inline float e4m3_value(uint32_t code) noexcept nogil:
    """The number of a code, exactly."""
    # Below 8 codes are multiples of 2**-9; from there on they are patterns of float32 with another exponent:
    #     code      S EEEE MMM                            bias 7
    #     float32   S EEEEEEEE MMM00000000000000000000    bias 127
    cdef uint32_t sign = (code & 0x80) << 24
    cdef uint32_t size = code & 0x7F
    cdef uint32_t small = bits_of(<float> <int32_t> size * <float> 2.0**-9)
    cdef uint32_t normal = (size + ((127 - 7) << 3)) << 20
    # Masks choose, not branches: all bits are one where it is so.
    cdef uint32_t below = -<uint32_t> (size < 8)
    cdef uint32_t nan = -<uint32_t> (size == 0x7F)
    return float_of(sign | (small & below) | (normal & ~below & ~nan) | (nan & <uint32_t> 0x7FC00000))


cdef inline uint8_t e4m3_code(float x) noexcept nogil:
    """The code nearest to x, ties to the even code; beyond +-448 that of +-448; NaN keeps its sign."""
    cdef int32_t size = <int32_t> size_of(x)
    cdef int32_t top = <int32_t> bits_of(448)
    cdef int32_t inside = size if size < top else top
    # Floats just above 2**14 are 2**-9 apart, as subnormal codes are: the addition rounds. Normal codes keep
    # three bits of the mantissa; what is rounded up may carry into the exponent, which is as it should be.
    cdef int32_t small = <int32_t> (bits_of(float_of(<uint32_t> inside) + <float> 16384) - bits_of(16384))
    cdef int32_t normal = ((inside + 0x7FFFF + ((inside >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    cdef int32_t below = -<int32_t> (inside < <int32_t> bits_of(2.0**-6))
    cdef int32_t code = (small & below) | (normal & ~below)
    code = 0x7F if size > INFINITE else code
    return <uint8_t> (code | (bits_of(x) >> 24 & 0x80))


cdef PER_CPU e4m3_values(const uint8_t* codes, float* out, Py_ssize_t n) noexcept nogil:
    """u8 [n] -> f32 [n]."""
    cdef Py_ssize_t i
    for i in range(n):
        out[i] = e4m3_value(codes[i])


cdef PER_CPU e4m3_codes(const float* x, uint8_t* out, Py_ssize_t n, bint* beyond) noexcept nogil:
    """f32 [n] -> u8 [n]; nothing is beyond it."""
    cdef Py_ssize_t i
    for i in range(n):
        out[i] = e4m3_code(x[i])


cdef WITHIN quantize_tile(
    const float* x,
    Py_ssize_t k,
    Py_ssize_t rows,
    Py_ssize_t columns,
    uint8_t* codes,
    float* scale,
    bint* beyond,
) noexcept nogil:
    """A tile f32 [rows, columns] at x, of a matrix with k columns -> its codes u8, of a matrix with k columns
    too, and one scale. NaN and infinity are beyond it.
    """
    cdef uint32_t top = 0, size
    cdef float s
    cdef Py_ssize_t row, i
    for row in range(rows):
        size = largest(x + row * k, columns)
        top = size if size > top else top
    s = float_of(top) / <float> 448
    scale[0] = s
    if top >= INFINITE:
        beyond[0] = True
        return
    for row in range(rows):
        if s == 0:  # zeros, or so small that the scale underflows: zero would divide zero
            memset(codes + row * k, 0, columns)
        else:
            for i in range(columns):
                codes[row * k + i] = e4m3_code(x[row * k + i] / s)


cdef PER_CPU quantize_tiles(
    const float* x, Py_ssize_t k, Py_ssize_t rows, uint8_t* codes, float* scale, bint* beyond
) noexcept nogil:
    """The tiles side by side in at most 128 rows of k columns: f32 [rows, k] -> u8 [rows, k], f32
    [ceil(k/128)]; with one row, the groups of activations.
    """
    cdef Py_ssize_t tile, at
    for tile in range((k + GROUP - 1) // GROUP):
        at = tile * GROUP
        # Two calls, in the first of which the compiler knows how long the loop is.
        if k - at >= GROUP:
            quantize_tile(x + at, k, rows, GROUP, codes + at, scale + tile, beyond)
        else:
            quantize_tile(x + at, k, rows, k - at, codes + at, scale + tile, beyond)


cdef PER_CPU tile_values(const uint8_t* codes, const float* scale, Py_ssize_t k, float* out) noexcept nogil:
    """A row of k columns: codes u8 [k], scale f32 [ceil(k/128)] -> f32 [k]."""
    cdef Py_ssize_t tile, i, end
    cdef float s
    for tile in range((k + GROUP - 1) // GROUP):
        s = scale[tile]
        end = (tile + 1) * GROUP
        for i in range(tile * GROUP, end if end < k else k):
            out[i] = e4m3_value(codes[i]) * s
