"""Included by ggml_codec.pyx: patterns and numbers, and how a loop is compiled for several CPUs."""

from libc.stdint cimport int8_t, int16_t, int32_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memset


cdef extern from *:
    """
    #ifdef _OPENMP
    #include <omp.h>
    #else
    #define omp_get_max_threads() 1
    #endif

    /* A function of type PER_CPU is compiled three times and picked when the module is loaded; one of type
       WITHIN goes into its callers. */
    #if defined(__x86_64__) && defined(__gnu_linux__) \\
        && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
    #define PER_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"))) void
    #else
    #define PER_CPU void
    #endif
    #if defined(__GNUC__)
    #define WITHIN inline __attribute__((always_inline)) void
    #else
    #define WITHIN void
    #endif
    """
    ctypedef void PER_CPU
    ctypedef void WITHIN
    int omp_get_max_threads() nogil

cdef enum:
    INFINITE = 0x7F800000  # the patterns of float32 magnitudes from here on are infinity and NaN


cdef inline uint32_t bits_of(float x) noexcept nogil:
    """The pattern of x."""
    cdef uint32_t b
    memcpy(&b, &x, 4)
    return b


cdef inline float float_of(uint32_t b) noexcept nogil:
    """The float with the pattern b."""
    cdef float x
    memcpy(&x, &b, 4)
    return x


cdef inline uint32_t size_of(float x) noexcept nogil:
    """The pattern of the magnitude of x. Patterns order as magnitudes do, NaN above all."""
    return bits_of(x) & 0x7FFFFFFF


cdef inline float half(const uint8_t* p) noexcept nogil:
    """The two little-endian bytes at p as float32, exactly; a NaN keeps its payload."""
    #     half      S EEEEE MMMMMMMMMM                    bias 15
    #     float32   S EEEEEEEE MMMMMMMMMM0000000000000    bias 127
    cdef uint32_t h = p[0] | <uint32_t> p[1] << 8
    cdef uint32_t sign = (h & 0x8000) << 16
    cdef uint32_t exponent = (h >> 10) & 31
    cdef uint32_t mantissa = h & 0x3FF
    if exponent == 0:  # subnormal: multiples of 2**-24
        return float_of(sign | bits_of(<float> mantissa * <float> 2.0**-24))
    if exponent == 31:
        return float_of(sign | INFINITE | mantissa << 13)
    return float_of(sign | (exponent + (127 - 15)) << 23 | mantissa << 13)


cdef inline uint32_t to_half(float x) noexcept nogil:
    """The pattern of the half nearest to x, ties to even, for abs(x) < 65520."""
    cdef uint32_t b = size_of(x)
    cdef uint32_t sign = bits_of(x) >> 16 & 0x8000
    if b < bits_of(<float> 2.0**-14):
        # Floats just above 0.5 are 2**-24 apart, as subnormal halves are: the addition rounds.
        return sign | (bits_of(float_of(b) + <float> 0.5) - bits_of(0.5))
    # Thirteen bits of the mantissa are rounded off, a carry goes into the exponent, which is rebased.
    return sign | (((b + 0xFFF + ((b >> 13) & 1)) >> 13) - ((127 - 15) << 10))


cdef inline void put16(uint8_t* p, uint32_t value) noexcept nogil:
    """The low 16 bits to p, little-endian."""
    p[0] = <uint8_t> value
    p[1] = <uint8_t> (value >> 8)


cdef inline uint32_t largest(const float* x, Py_ssize_t n) noexcept nogil:
    """The pattern of the largest magnitude of x[0..n), not below INFINITE where NaN or infinity is among
    them.
    """
    # As signed integers, of which CPUs compare many at a time.
    cdef int32_t size, top = 0
    cdef Py_ssize_t i
    for i in range(n):
        size = <int32_t> size_of(x[i])
        top = size if size > top else top
    return <uint32_t> top


cdef inline int32_t nearest(float v) noexcept nogil:
    """v as an integer, ties to even, for abs(v) < 2**22: floats just above 1.5 * 2**23 are 1 apart."""
    return <int32_t> (bits_of(v + <float> 12582912) - bits_of(12582912))


cdef inline float within(float v, float low, float high) noexcept nogil:
    """v, or the end of the range that it lies beyond."""
    v = v if v > low else low
    return v if v < high else high


cdef inline float whole(float v) noexcept nogil:
    """v as a whole number, ties to even, for abs(v) < 2**22."""
    return (v + <float> 12582912) - <float> 12582912


cdef inline float ratio(float a, float b) noexcept nogil:
    """a / b, and 0 where b is 0 or so small that the quotient overflows."""
    cdef float quotient = a / b
    return quotient if size_of(quotient) < INFINITE else 0
