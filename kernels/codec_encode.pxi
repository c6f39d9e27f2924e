"""Included by ggml_codec.pyx: float32 to blocks. `NAME_encode` is `quantize` of refimpl.formats.NAME for n
blocks of x, to p on.

It sets beyond[0] where it meets a block that goes to the reference; what it wrote then is not used.
"""


cdef PER_CPU bf16_encode(const float* x, uint8_t* p, Py_ssize_t n, bint* beyond) noexcept nogil:
    cdef uint32_t b, rounded, nan
    cdef Py_ssize_t i
    for i in range(n):
        b = bits_of(x[i])
        rounded = (b + 0x7FFF + ((b >> 16) & 1)) >> 16
        # A NaN would carry over into infinity or a number; it is cut and made quiet. All bits of `nan` are
        # one where there is one, so that a mask chooses.
        nan = -<uint32_t> (size_of(x[i]) > INFINITE)
        rounded = (rounded & ~nan) | ((b >> 16 | 0x40) & nan)
        p[2 * i] = <uint8_t> rounded
        p[2 * i + 1] = <uint8_t> (rounded >> 8)


# Blocks of 32, and Q8_K

cdef inline int32_t order_of(int32_t b) noexcept nogil:
    """Patterns to integers that order as their numbers do, NaN beyond infinity of its sign; and back."""
    return b ^ ((b >> 31) & 0x7FFFFFFF)


cdef WITHIN range_of(const float* x, Py_ssize_t n, float* low, float* high) noexcept nogil:
    """The lowest and highest of n numbers, in the order that `order_of` gives them."""
    # As integers, which a compiler may compare in any order, many at a time.
    cdef int32_t bottom = 0x7FFFFFFF
    cdef int32_t top = -0x7FFFFFFF
    cdef int32_t v
    cdef Py_ssize_t i
    for i in range(n):
        v = order_of(<int32_t> bits_of(x[i]))
        bottom = v if v < bottom else bottom
        top = v if v > top else top
    low[0] = float_of(<uint32_t> order_of(bottom))
    high[0] = float_of(<uint32_t> order_of(top))


cdef inline float extreme(const float* x, Py_ssize_t n, float low, float high) noexcept nogil:
    """The first of the numbers of largest magnitude, which are the lowest, the highest, or both."""
    cdef Py_ssize_t i = 0
    if size_of(low) != size_of(high):
        return low if size_of(low) > size_of(high) else high
    while size_of(x[i]) != size_of(low) and i < n - 1:
        i += 1
    return x[i]


cdef inline float inverse_of(float d) noexcept nogil:
    """1 / d, and 0 where d is 0."""
    return <float> 1 / d if d != 0 else 0


cdef inline bint storable(float d, float inverse) noexcept nogil:
    """Whether d fits a half, 65520 being the first to round to infinity, and its inverse is finite."""
    return size_of(d) < bits_of(65520) and size_of(inverse) < INFINITE


cdef WITHIN levels_of(
    const float* x, float low, float inverse, float half_up, int top, uint8_t* q
) noexcept nogil:
    """32 times trunc((x - low) * inverse + half_up), at most top."""
    cdef int32_t level
    cdef Py_ssize_t i
    for i in range(32):
        level = <int32_t> ((x[i] - low) * inverse + half_up)  # never negative, so it is rounded half up
        q[i] = <uint8_t> (level if level < top else top)


cdef WITHIN put_nibbles(const uint8_t* q, uint8_t* p) noexcept nogil:
    """The low four bits of 32 levels into the 16 bytes at p."""
    #     p[i]    | q[16 + i] | q[i] |
    cdef Py_ssize_t i
    for i in range(16):
        p[i] = (q[i] & 15) | (q[i + 16] & 15) << 4


cdef WITHIN put_fifth_bits(const uint8_t* q, uint8_t* p) noexcept nogil:
    """The fifth bits of 32 levels into the four bytes at p, that of level 0 lowest."""
    cdef uint32_t bits = 0
    cdef Py_ssize_t i
    for i in range(32):
        bits |= <uint32_t> (q[i] >> 4) << i
    put16(p, bits)
    put16(p + 2, bits >> 16)


cdef WITHIN centred(const float* x, int half_range, float* d, uint8_t* q, bint* beyond) noexcept nogil:
    """32 numbers -> scale d and levels q: the number of largest magnitude becomes -half_range; zero is the
    level half_range.
    """
    cdef float low, high, inverse
    range_of(x, 32, &low, &high)
    d[0] = extreme(x, 32, low, high) / <float> -half_range
    inverse = inverse_of(d[0])
    if size_of(low) >= INFINITE or size_of(high) >= INFINITE or not storable(d[0], inverse):
        beyond[0] = True
    else:
        levels_of(x, 0, inverse, <float> half_range + <float> 0.5, 2 * half_range - 1, q)


cdef WITHIN from_lowest(
    const float* x, int levels, float* d, float* m, uint8_t* q, bint* beyond
) noexcept nogil:
    """32 numbers -> scale d, minimum m and levels q: the smallest number becomes 0, the largest `levels`."""
    cdef float low, high, inverse
    range_of(x, 32, &low, &high)
    low = low + <float> 0  # a zero has no sign
    high = high + <float> 0
    d[0] = (high - low) / <float> levels
    m[0] = low
    inverse = inverse_of(d[0])
    if (
        size_of(low) >= INFINITE
        or size_of(high) >= INFINITE
        or not storable(d[0], inverse)
        or not storable(low, 0)
    ):
        beyond[0] = True
    else:
        levels_of(x, low, inverse, 0.5, levels, q)


cdef PER_CPU q4_0_encode(const float* x, uint8_t* p, Py_ssize_t n, bint* beyond) noexcept nogil:
    cdef Py_ssize_t block
    cdef uint8_t[32] q
    cdef float d
    for block in range(n):
        centred(x + 32 * block, 8, &d, q, beyond)
        put16(p + 18 * block, to_half(d))
        put_nibbles(q, p + 18 * block + 2)


cdef PER_CPU q4_1_encode(const float* x, uint8_t* p, Py_ssize_t n, bint* beyond) noexcept nogil:
    cdef Py_ssize_t block
    cdef uint8_t[32] q
    cdef float d, m
    for block in range(n):
        from_lowest(x + 32 * block, 15, &d, &m, q, beyond)
        put16(p + 20 * block, to_half(d))
        put16(p + 20 * block + 2, to_half(m))
        put_nibbles(q, p + 20 * block + 4)


cdef PER_CPU q5_0_encode(const float* x, uint8_t* p, Py_ssize_t n, bint* beyond) noexcept nogil:
    cdef Py_ssize_t block
    cdef uint8_t[32] q
    cdef float d
    for block in range(n):
        centred(x + 32 * block, 16, &d, q, beyond)
        put16(p + 22 * block, to_half(d))
        put_fifth_bits(q, p + 22 * block + 2)
        put_nibbles(q, p + 22 * block + 6)


cdef PER_CPU q5_1_encode(const float* x, uint8_t* p, Py_ssize_t n, bint* beyond) noexcept nogil:
    cdef Py_ssize_t block
    cdef uint8_t[32] q
    cdef float d, m
    for block in range(n):
        from_lowest(x + 32 * block, 31, &d, &m, q, beyond)
        put16(p + 24 * block, to_half(d))
        put16(p + 24 * block + 2, to_half(m))
        put_fifth_bits(q, p + 24 * block + 4)
        put_nibbles(q, p + 24 * block + 8)


cdef inline float away(float v) noexcept nogil:
    """v, half a unit further from zero: truncated, it is v rounded, ties away from zero."""
    return v + float_of(bits_of(0.5) | (bits_of(v) & <uint32_t> 0x80000000))


cdef PER_CPU q8_0_encode(const float* x, uint8_t* p, Py_ssize_t n, bint* beyond) noexcept nogil:
    cdef Py_ssize_t block
    cdef uint32_t top
    cdef float d, inverse
    cdef int8_t[32] q
    cdef Py_ssize_t i
    for block in range(n):
        top = largest(x + 32 * block, 32)  # a pattern
        d = float_of(top) / <float> 127
        inverse = inverse_of(d)
        if top >= INFINITE or not storable(d, inverse):
            beyond[0] = True
            return
        for i in range(32):
            q[i] = <int8_t> <int32_t> away(x[32 * block + i] * inverse)
        put16(p + 34 * block, to_half(d))
        memcpy(p + 34 * block + 2, q, 32)


cdef WITHIN put_q8_k(const float* x, float d, float inverse, uint8_t* p) noexcept nogil:
    """256 numbers as a block of Q8_K: scale, levels, and the sums of each sixteen."""
    cdef int8_t[256] q
    cdef int32_t level, total
    cdef Py_ssize_t i, j
    for i in range(256):
        level = nearest(inverse * x[i])  # -127 for the largest; what rounds to 128 is cut, as in ggml
        q[i] = <int8_t> (level if level < 127 else 127)
    memcpy(p, &d, 4)
    memcpy(p + 4, q, 256)
    for j in range(16):
        total = 0
        for i in range(16):
            total += q[16 * j + i]
        put16(p + 260 + 2 * j, <uint32_t> total)


cdef PER_CPU q8_k_encode(const float* x, uint8_t* p, Py_ssize_t n, bint* beyond) noexcept nogil:
    cdef Py_ssize_t block
    cdef float low, high, d, inverse
    for block in range(n):
        range_of(x + 256 * block, 256, &low, &high)
        d = 0
        inverse = 0
        if low != 0 or high != 0:
            # The number of largest magnitude becomes -127, whatever its sign.
            inverse = <float> -127 / extreme(x + 256 * block, 256, low, high)
            d = <float> 1 / inverse
        if size_of(low) >= INFINITE or size_of(high) >= INFINITE or size_of(inverse) >= INFINITE:
            beyond[0] = True
            return
        put_q8_k(x + 256 * block, d, inverse, p + 292 * block)
