"""Included by ggml_codec.pyx: blocks to float32. `NAME_blocks` is `dequantize` of refimpl.formats.NAME for n
blocks from p on; the layouts are drawn there.

Integers pass through an array of their own, which no pointer can alias, so that the compiler is free to take
many at a time.
"""


cdef PER_CPU bf16_blocks(const uint8_t* p, float* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        out[i] = float_of(<uint32_t> p[2 * i] << 16 | <uint32_t> p[2 * i + 1] << 24)


# Blocks of 32

cdef WITHIN spread(float scale, const int8_t* q, float* out, Py_ssize_t n) noexcept nogil:
    """out[i] = scale * q[i], n numbers."""
    cdef Py_ssize_t i
    for i in range(n):
        out[i] = scale * <float> q[i]


cdef WITHIN nibbles(const uint8_t* p, const uint8_t* high, int fifth, int offset, int8_t* q) noexcept nogil:
    """32 numbers less `offset` from the 16 bytes at p; where `fifth` is 1, a bit of the four at `high` on top
    of each.
    """
    #     p[i]    | q[16 + i] | q[i] |        four bits each
    #     h       bit i is the fifth of q[i]
    cdef uint32_t h = 0
    cdef Py_ssize_t i
    if fifth:
        h = high[0] | <uint32_t> high[1] << 8 | <uint32_t> high[2] << 16 | <uint32_t> high[3] << 24
    for i in range(16):
        q[i] = <int8_t> (((p[i] & 15) | ((h >> i) & 1) << 4) - offset)
        q[i + 16] = <int8_t> (((p[i] >> 4) | ((h >> (i + 16)) & 1) << 4) - offset)


cdef WITHIN two_sixteens(float d, const int8_t* q, float* out) noexcept nogil:
    """out[i] = d * q[i], 32 numbers."""
    # Read as they were written, sixteen at a time; a wider load would wait for both stores.
    spread(d, q, out, 16)
    spread(d, q + 16, out + 16, 16)


cdef WITHIN sloped(float d, float m, const int8_t* q, float* out) noexcept nogil:
    """out[i] = d * q[i] - -m, 32 numbers."""
    # The sign of m is turned as a pattern: a compiler would make a sum of it.
    cdef float minimum = float_of(bits_of(m) ^ <uint32_t> 0x80000000)
    cdef Py_ssize_t i
    for i in range(16):
        out[i] = d * <float> q[i] - minimum
    for i in range(16):
        out[i + 16] = d * <float> q[i + 16] - minimum


cdef PER_CPU q4_0_blocks(const uint8_t* p, float* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t block
    cdef int8_t[32] q
    for block in range(n):
        nibbles(p + 18 * block + 2, p, 0, 8, q)
        two_sixteens(half(p + 18 * block), q, out + 32 * block)


cdef PER_CPU q4_1_blocks(const uint8_t* p, float* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t block
    cdef int8_t[32] q
    for block in range(n):
        nibbles(p + 20 * block + 4, p, 0, 0, q)
        sloped(half(p + 20 * block), half(p + 20 * block + 2), q, out + 32 * block)


cdef PER_CPU q5_0_blocks(const uint8_t* p, float* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t block
    cdef int8_t[32] q
    for block in range(n):
        nibbles(p + 22 * block + 6, p + 22 * block + 2, 1, 16, q)
        two_sixteens(half(p + 22 * block), q, out + 32 * block)


cdef PER_CPU q5_1_blocks(const uint8_t* p, float* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t block
    cdef int8_t[32] q
    for block in range(n):
        nibbles(p + 24 * block + 8, p + 24 * block + 4, 1, 0, q)
        sloped(half(p + 24 * block), half(p + 24 * block + 2), q, out + 32 * block)


cdef PER_CPU q8_0_blocks(const uint8_t* p, float* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t block
    for block in range(n):
        spread(half(p + 34 * block), <const int8_t*> (p + 34 * block + 2), out + 32 * block, 32)


# Blocks whose quants are places in a table of sixteen: under one scale there are sixteen products

cdef float[16] UNEVEN = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
cdef float[16] E2M1 = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]


cdef WITHIN looked_up(float scale, const float* values, const uint8_t* p, float* out) noexcept nogil:
    """32 numbers from 16 bytes: the low nibbles, then the high."""
    cdef float[16] product
    cdef Py_ssize_t i
    for i in range(16):
        product[i] = scale * values[i]
    for i in range(16):
        out[i], out[i + 16] = product[p[i] & 15], product[p[i] >> 4]


cdef PER_CPU iq4_nl_blocks(const uint8_t* p, float* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t block
    for block in range(n):
        looked_up(half(p + 18 * block), UNEVEN, p + 18 * block + 2, out + 32 * block)


cdef PER_CPU iq4_xs_blocks(const uint8_t* data, float* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t block
    cdef const uint8_t* p
    cdef float d, scale
    cdef int j, low, high
    for block in range(n):
        p = data + 136 * block
        d = half(p)
        for j in range(8):
            low, high = (p[4 + (j >> 1)] >> 4 * (j & 1)) & 15, (p[2 + (j >> 2)] >> 2 * (j & 3)) & 3
            scale = d * <float> ((low | high << 4) - 32)
            looked_up(scale, UNEVEN, p + 8 + 16 * j, out + 256 * block + 32 * j)


cdef PER_CPU mxfp4_blocks(const uint8_t* p, float* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t block
    cdef uint32_t e, scale  # the pattern of 2^(e - 128): below e = 2 it is subnormal
    for block in range(n):
        e = p[17 * block]
        scale = (e - 1) << 23 if e > 1 else <uint32_t> 0x200000 << e
        looked_up(float_of(scale), E2M1, p + 17 * block + 1, out + 32 * block)


# Blocks of 256

cdef inline void scale_and_minimum(const uint8_t* s, int j, uint8_t* scale, uint8_t* minimum) noexcept nogil:
    """The 6-bit pair j of the 12 bytes s of Q4_K and Q5_K."""
    # Letters are the bits of scale j (A) and minimum j (a) for j < 4, and (E, e) for j + 4:
    #
    #     s[j] EEAAAAAA   s[4 + j] eeaaaaaa   s[8 + j] eeeeEEEE        (refimpl.formats._blocks draws all)
    if j < 4:
        scale[0] = s[j] & 63
        minimum[0] = s[j + 4] & 63
    else:
        scale[0] = (s[j + 4] & 15) | ((s[j - 4] >> 6) << 4)
        minimum[0] = (s[j + 4] >> 4) | ((s[j] >> 6) << 4)


cdef WITHIN four_planes(const uint8_t* p, int8_t* q) noexcept nogil:
    """128 numbers of two bits from the 32 bytes at p."""
    #     p[i]    | q[96 + i] | q[64 + i] | q[32 + i] | q[i] |        two bits each
    cdef Py_ssize_t i
    for i in range(32):
        q[i] = p[i] & 3
        q[i + 32] = (p[i] >> 2) & 3
        q[i + 64] = (p[i] >> 4) & 3
        q[i + 96] = p[i] >> 6


cdef PER_CPU q2_k_blocks(const uint8_t* data, float* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t block, i
    cdef const uint8_t* p
    cdef int8_t[256] q
    cdef float d, dmin, scale, minimum
    cdef int j
    for block in range(n):
        p = data + 84 * block
        d = half(p + 80)
        dmin = half(p + 82)
        four_planes(p + 16, q)
        four_planes(p + 48, q + 128)
        for j in range(16):
            scale = d * <float> (p[j] & 15)
            minimum = dmin * <float> (p[j] >> 4)
            for i in range(16):
                out[256 * block + 16 * j + i] = scale * <float> q[16 * j + i] - minimum


cdef PER_CPU q3_k_blocks(const uint8_t* data, float* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t block, i
    cdef const uint8_t* p
    cdef int8_t[256] q
    cdef uint8_t[32] third
    cdef float d
    cdef int j, low, high
    for block in range(n):
        p = data + 110 * block
        d = half(p + 108)
        four_planes(p + 32, q)
        four_planes(p + 64, q + 128)
        memcpy(third, p, 32)
        # Bit j of third[i] belongs to weight 32 j + i; where it is missing, 4 is taken away.
        for j in range(8):
            for i in range(32):
                q[32 * j + i] += ((third[i] & 1) << 2) - 4
                third[i] >>= 1
        for j in range(16):
            # Scale j has four bits in a nibble of 8 bytes, and two in a quarter of 4 bytes.
            low = (p[96 + (j & 7)] >> 4 * (j >> 3)) & 15
            high = (p[104 + (j & 3)] >> 2 * (j >> 2)) & 3
            spread(d * <float> ((low | high << 4) - 32), q + 16 * j, out + 256 * block + 16 * j, 16)


cdef WITHIN pair_of_groups(
    const uint8_t* s, int j, float d, float dmin, const int8_t* low, const int8_t* high, float* out
) noexcept nogil:
    """Groups j and j + 1 of Q4_K or Q5_K, 64 numbers: s are the block's 12 bytes of scales, `low` and `high`
    the levels of 32 each.
    """
    cdef float scale, minimum
    cdef uint8_t sc, m
    cdef Py_ssize_t i
    scale_and_minimum(s, j, &sc, &m)
    scale = d * <float> sc
    minimum = dmin * <float> m
    for i in range(32):
        out[i] = scale * <float> low[i] - minimum
    scale_and_minimum(s, j + 1, &sc, &m)
    scale = d * <float> sc
    minimum = dmin * <float> m
    for i in range(32):
        out[32 + i] = scale * <float> high[i] - minimum


cdef PER_CPU q4_k_blocks(const uint8_t* data, float* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t block, i
    cdef const uint8_t* p
    cdef int8_t[32] low, high
    cdef int c
    for block in range(n):
        p = data + 144 * block
        for c in range(4):
            for i in range(32):
                low[i] = p[16 + 32 * c + i] & 15
                high[i] = p[16 + 32 * c + i] >> 4
            pair_of_groups(p + 4, 2 * c, half(p), half(p + 2), low, high, out + 256 * block + 64 * c)


cdef PER_CPU q5_k_blocks(const uint8_t* data, float* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t block, i
    cdef const uint8_t* p
    cdef int8_t[32] low, high
    cdef uint8_t[32] fifth
    cdef int c
    for block in range(n):
        p = data + 176 * block
        memcpy(fifth, p + 16, 32)
        for c in range(4):
            for i in range(32):  # the two lowest bits of `fifth` are this pair's
                low[i] = (p[48 + 32 * c + i] & 15) | (fifth[i] & 1) << 4
                high[i] = (p[48 + 32 * c + i] >> 4) | (fifth[i] & 2) << 3
                fifth[i] >>= 2
            pair_of_groups(p + 4, 2 * c, half(p), half(p + 2), low, high, out + 256 * block + 64 * c)


cdef WITHIN four_planes_of_six(const uint8_t* low, const uint8_t* high, int8_t* q) noexcept nogil:
    """128 numbers of six bits, less 32: four from the 64 bytes at `low`, two from the 32 at `high`."""
    #     low[i]         | q[64 + i] | q[i]      |                            four low bits each
    #     low[32 + i]    | q[96 + i] | q[32 + i] |
    #     high[i]        | q[96 + i] | q[64 + i] | q[32 + i] | q[i] |         two high bits each
    cdef Py_ssize_t i
    for i in range(32):
        q[i] = <int8_t> (((low[i] & 15) | (high[i] & 3) << 4) - 32)
        q[i + 32] = <int8_t> (((low[i + 32] & 15) | (high[i] & 12) << 2) - 32)
        q[i + 64] = <int8_t> (((low[i] >> 4) | (high[i] & 48)) - 32)
        q[i + 96] = <int8_t> (((low[i + 32] >> 4) | (high[i] & 192) >> 2) - 32)


cdef PER_CPU q6_k_blocks(const uint8_t* data, float* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t block
    cdef const uint8_t* p
    cdef int8_t[256] q
    cdef float d
    cdef int j
    for block in range(n):
        p = data + 210 * block
        d = half(p + 208)
        four_planes_of_six(p, p + 128, q)
        four_planes_of_six(p + 64, p + 160, q + 128)
        for j in range(16):
            spread(d * <float> (<const int8_t*> p)[192 + j], q + 16 * j, out + 256 * block + 16 * j, 16)


cdef PER_CPU q8_k_blocks(const uint8_t* p, float* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t block
    cdef float d
    for block in range(n):
        memcpy(&d, p + 292 * block, 4)
        spread(d, <const int8_t*> (p + 292 * block + 4), out + 256 * block, 256)
