"""Included by ggml_codec.pyx: the search of refimpl.formats._search, with its names, for sixteen groups side
by side.

Number i of group g is x[16 * i + g], so that a vector holds one number of each group and nothing is summed
across:

    x    | group 0: 0 | group 1: 0 | ... | group 15: 0 | group 0: 1 | group 1: 1 | ...

Sixteen groups are two blocks of Q4_K or Q5_K, one of Q2_K or Q6_K. Every float operation is the reference's,
in its order.
"""

cdef enum:
    STEPS = 13
    GROUPS = 16
    # The pattern of 2**60, above which squares overflow: those go to the reference, NaN and infinity too.
    BEYOND = (127 + 60) << 23
# These two are filled in when the module is loaded.
cdef double[STEPS] LADDER
cdef int[3] NEIGHBOURS

cdef struct Found:
    float d[2]  # of each block, rounded to halves
    float dmin[2]
    # Whole numbers all: scale and minimum of each group, levels side by side like x.
    float sc[GROUPS]
    float m[GROUPS]
    float q[32 * GROUPS]


cdef WITHIN side_by_side(const float* x, Py_ssize_t length, Py_ssize_t weights, float* out) noexcept nogil:
    """The next sixteen groups of `length` numbers of the `weights` that are left, transposed; zeros where
    there are none.
    """
    cdef Py_ssize_t i, g
    for g in range(GROUPS):
        for i in range(length):
            out[GROUPS * i + g] = x[length * g + i] if length * g < weights else 0


cdef WITHIN fit_line(
    const float* x, Py_ssize_t length, float levels, float* scale, float* minimum
) noexcept nogil:
    """Best scale >= 0 and minimum >= 0 of each group for x ~ scale * q - minimum, q in 0..levels."""
    cdef float[GROUPS] low, high, error, sum_x, inverse, sum_q, sum_qq, sum_xq, s, m, wrong
    cdef float n = length, q, v, spread
    cdef Py_ssize_t i, g, step
    for g in range(GROUPS):
        low[g] = x[g]
        high[g] = x[g]
        sum_x[g] = 0
        scale[g] = 0
        minimum[g] = 0
        error[g] = float_of(INFINITE)
    for i in range(length):
        for g in range(GROUPS):
            v = x[GROUPS * i + g]
            low[g] = v if v < low[g] else low[g]
            high[g] = v if v > high[g] else high[g]
            sum_x[g] += v
    for g in range(GROUPS):
        low[g] = low[g] if low[g] < 0 else 0  # minima are subtracted: they cannot start above zero
    # For each candidate step: levels by rounding, the best line through them, and its error.
    for step in range(STEPS):
        for g in range(GROUPS):
            inverse[g] = ratio(<float> (levels + LADDER[step]), high[g] - low[g])
            sum_q[g] = 0
            sum_qq[g] = 0
            sum_xq[g] = 0
            wrong[g] = 0
        for i in range(length):
            for g in range(GROUPS):
                v = x[GROUPS * i + g]
                q = whole(within((v - low[g]) * inverse[g], 0, levels))
                sum_q[g] += q
                sum_qq[g] += q * q
                sum_xq[g] += v * q
        for g in range(GROUPS):
            # The regression; below zero the minimum cannot be stored, so through the origin then.
            spread = n * sum_qq[g] - sum_q[g] * sum_q[g]
            s[g] = ratio(n * sum_xq[g] - sum_x[g] * sum_q[g], spread)
            m[g] = ratio(sum_q[g] * sum_xq[g] - sum_qq[g] * sum_x[g], spread)
            v = ratio(sum_xq[g], sum_qq[g])
            s[g] = s[g] if m[g] > 0 else v
            m[g] = m[g] if m[g] > 0 else 0
        for i in range(length):
            for g in range(GROUPS):
                v = x[GROUPS * i + g]
                v = whole(within((v - low[g]) * inverse[g], 0, levels)) * s[g] - m[g] - v
                wrong[g] += v * v
        for g in range(GROUPS):
            scale[g] = s[g] if wrong[g] < error[g] else scale[g]
            minimum[g] = m[g] if wrong[g] < error[g] else minimum[g]
            error[g] = wrong[g] if wrong[g] < error[g] else error[g]
    for g in range(GROUPS):
        scale[g] = scale[g] if scale[g] > 0 else 0


cdef WITHIN fit_slope(const float* x, Py_ssize_t length, float levels, float* scale) noexcept nogil:
    """Best scale of either sign of each group for x ~ scale * q, q in -levels..levels - 1."""
    cdef float[GROUPS] top, error, inverse, sum_qq, sum_xq, s, wrong
    cdef float q, v
    cdef Py_ssize_t i, g, step
    for g in range(GROUPS):
        top[g] = 0
        scale[g] = 0
        error[g] = float_of(INFINITE)
    # The number of largest magnitude, the first among equals.
    for i in range(length):
        for g in range(GROUPS):
            v = x[GROUPS * i + g]
            top[g] = v if size_of(v) > size_of(top[g]) else top[g]
    # It becomes about -levels, the level that there is one more of.
    for step in range(STEPS):
        for g in range(GROUPS):
            inverse[g] = ratio(-<float> (levels + LADDER[step]), top[g])
            sum_qq[g] = 0
            sum_xq[g] = 0
            wrong[g] = 0
        for i in range(length):
            for g in range(GROUPS):
                v = x[GROUPS * i + g]
                q = whole(within(v * inverse[g], -levels, levels - 1))
                sum_qq[g] += q * q
                sum_xq[g] += v * q
        for g in range(GROUPS):
            s[g] = ratio(sum_xq[g], sum_qq[g])
        for i in range(length):
            for g in range(GROUPS):
                v = x[GROUPS * i + g]
                v = whole(within(v * inverse[g], -levels, levels - 1)) * s[g] - v
                wrong[g] += v * v
        for g in range(GROUPS):
            scale[g] = s[g] if wrong[g] < error[g] else scale[g]
            error[g] = wrong[g] if wrong[g] < error[g] else error[g]


cdef WITHIN try_scales(
    const float* x,
    Py_ssize_t length,
    const float* d,
    const float* dmin,
    float* sc,
    float* m,
    float low,
    float high,
    int step,
    int shift,
    float bottom,
    float top,
    const float* sc0,
    const float* m0,
    float* error,
) noexcept nogil:
    """The integers sc0 + step (bottom..top) and m0 + shift (0..top), with levels low..high, into sc and m
    where they leave less than `error`, which is lowered.
    """
    cdef float[GROUPS] scale, minimum, inverse, wrong, one, two
    cdef float v
    cdef Py_ssize_t i, g
    for g in range(GROUPS):
        one[g] = within(sc0[g] + <float> step, bottom, top)
        two[g] = within(m0[g] + <float> shift, 0, top)
        scale[g] = d[g] * one[g]
        minimum[g] = dmin[g] * two[g]
        wrong[g] = 0
        inverse[g] = ratio(1, scale[g])
    for i in range(length):
        for g in range(GROUPS):
            v = x[GROUPS * i + g]
            v = whole(within((v + minimum[g]) * inverse[g], low, high)) * scale[g] - minimum[g] - v
            wrong[g] += v * v
    for g in range(GROUPS):
        # NaN is not less: a candidate that makes one is not taken.
        sc[g] = one[g] if wrong[g] < error[g] else sc[g]
        m[g] = two[g] if wrong[g] < error[g] else m[g]
        error[g] = wrong[g] if wrong[g] < error[g] else error[g]


cdef inline float unit(float value, float top) noexcept nogil:
    """value / top as the nearest half; a zero has no sign."""
    cdef uint8_t[2] h
    put16(h, to_half(within(value / top, -65504, 65504) + <float> 0))
    return half(h)


cdef WITHIN put_levels(
    const float* x, Py_ssize_t length, const float* d, const float* dmin, float low, float high, Found* found
) noexcept nogil:
    """found.q: the levels low..high of each number under the scales and minima found."""
    cdef float[GROUPS] minimum, inverse
    cdef Py_ssize_t i, g
    for g in range(GROUPS):
        minimum[g] = dmin[g] * found.m[g]
        inverse[g] = ratio(1, d[g] * found.sc[g])
    for i in range(length):
        for g in range(GROUPS):
            found.q[GROUPS * i + g] = whole(within((x[GROUPS * i + g] + minimum[g]) * inverse[g], low, high))


cdef PER_CPU scales_and_minima(
    const float* weights, Py_ssize_t left, Py_ssize_t length, float levels, float top, Found* found
) noexcept nogil:
    """The search of Q2_K, Q4_K and Q5_K for sixteen groups of `length` of the weights that are left: levels
    0..levels, integer scales and minima 0..top.
    """
    cdef float[32 * GROUPS] x
    cdef float[GROUPS] scale, minimum, d, dmin, sc, m, error
    cdef float largest_scale, largest_minimum
    cdef Py_ssize_t block, g, of_block = 256 // length, step, shift
    side_by_side(weights, length, left, x)
    fit_line(x, length, levels, scale, minimum)
    # One unit for the scales of a block and one for its minima: the largest becomes the integer `top`.
    for block in range(GROUPS // of_block):
        largest_scale = 0
        largest_minimum = 0
        for g in range(of_block * block, of_block * (block + 1)):
            largest_scale = max(largest_scale, scale[g])
            largest_minimum = max(largest_minimum, minimum[g])
        found.d[block] = unit(largest_scale, top)
        found.dmin[block] = unit(largest_minimum, top)
    for g in range(GROUPS):
        d[g] = found.d[g // of_block]
        dmin[g] = found.dmin[g // of_block]
        error[g] = float_of(INFINITE)
        sc[g] = whole(within(ratio(scale[g], d[g]), 0, top))
        m[g] = whole(within(ratio(minimum[g], dmin[g]), 0, top))
        found.sc[g] = sc[g]
        found.m[g] = m[g]
    # Each integer as it was rounded, or a neighbour that leaves less error.
    for step in range(3):
        for shift in range(3):
            try_scales(
                x, length, d, dmin, found.sc, found.m, 0, levels,
                NEIGHBOURS[step], NEIGHBOURS[shift], 0, top, sc, m, error,
            )
    put_levels(x, length, d, dmin, 0, levels, found)


cdef PER_CPU signed_scales(
    const float* weights, Py_ssize_t left, Py_ssize_t length, float levels, float top, Found* found
) noexcept nogil:
    """The search of Q6_K for sixteen groups of `length` of the weights that are left: levels
    -levels..levels - 1, integer scales -top - 1..top, no minima.
    """
    cdef float[32 * GROUPS] x
    cdef float[GROUPS] scale, d, dmin, sc, m, error
    cdef float largest_scale = 0
    cdef Py_ssize_t g, step
    side_by_side(weights, length, left, x)
    fit_slope(x, length, levels, scale)
    for g in range(GROUPS):
        largest_scale = scale[g] if size_of(scale[g]) > size_of(largest_scale) else largest_scale
    # The largest scale becomes the integer with one more step, the negative one.
    found.d[0] = unit(-largest_scale, top + 1)
    for g in range(GROUPS):
        d[g] = found.d[0]
        dmin[g] = 0
        m[g] = 0
        found.m[g] = 0
        error[g] = float_of(INFINITE)
        sc[g] = whole(within(ratio(scale[g], d[g]), -top - 1, top))
        found.sc[g] = sc[g]
    for step in range(3):
        try_scales(
            x, length, d, dmin, found.sc, found.m, -levels, levels - 1,
            NEIGHBOURS[step], 0, -top - 1, top, sc, m, error,
        )
    put_levels(x, length, d, dmin, -levels, levels - 1, found)


assert len(_search.STEPS) == STEPS
NEIGHBOURS[:] = [0, -1, 1]
for _step, _value in enumerate(_search.STEPS):
    LADDER[_step] = _value


# The blocks

cdef void put_scales(const float* sc, const float* m, uint8_t* p) noexcept nogil:
    """Eight scales and eight minima of 6 bits into the 12 bytes at p, as `scale_and_minimum` reads them and
    draws them.
    """
    cdef Py_ssize_t j
    cdef int s, t
    for j in range(4):
        s = <int> sc[j + 4]
        t = <int> m[j + 4]
        p[j] = <uint8_t> (<int> sc[j] | (s >> 4) << 6)
        p[j + 4] = <uint8_t> (<int> m[j] | (t >> 4) << 6)
        p[j + 8] = <uint8_t> ((s & 15) | (t & 15) << 4)


cdef void put_q4_k(const Found* found, int block, uint8_t* p) noexcept nogil:
    """Block 0 or 1 of what was found into the 144 bytes at p."""
    cdef const float* q = found.q + 8 * block
    cdef int low, high
    cdef Py_ssize_t c, i
    put16(p, to_half(found.d[block]))
    put16(p + 2, to_half(found.dmin[block]))
    put_scales(found.sc + 8 * block, found.m + 8 * block, p + 4)
    for c in range(4):
        for i in range(32):
            low = <int> q[GROUPS * i + 2 * c]
            high = <int> q[GROUPS * i + 2 * c + 1]
            p[16 + 32 * c + i] = <uint8_t> (low | high << 4)


cdef void put_q5_k(const Found* found, int block, uint8_t* p) noexcept nogil:
    """Block 0 or 1 of what was found into the 176 bytes at p."""
    cdef const float* q = found.q + 8 * block
    cdef Py_ssize_t j, c, i
    cdef int fifth, low, high
    put16(p, to_half(found.d[block]))
    put16(p + 2, to_half(found.dmin[block]))
    put_scales(found.sc + 8 * block, found.m + 8 * block, p + 4)
    for i in range(32):
        fifth = 0
        for j in range(8):
            fifth |= (<int> q[GROUPS * i + j] >> 4) << j
        p[16 + i] = <uint8_t> fifth
        for c in range(4):
            low = <int> q[GROUPS * i + 2 * c] & 15
            high = <int> q[GROUPS * i + 2 * c + 1] & 15
            p[48 + 32 * c + i] = <uint8_t> (low | high << 4)


cdef inline int level(const Found* found, int weight, int offset) noexcept nogil:
    """The level of a weight of a block with groups of 16, plus `offset`."""
    return <int> found.q[GROUPS * (weight & 15) + (weight >> 4)] + offset


cdef void put_q2_k(const Found* found, uint8_t* p) noexcept nogil:
    """What was found into the 84 bytes at p."""
    cdef Py_ssize_t h, i, j
    cdef int byte
    for j in range(16):
        p[j] = <uint8_t> (<int> found.sc[j] | <int> found.m[j] << 4)
    for h in range(2):
        for i in range(32):
            byte = 0
            for j in range(4):
                byte |= level(found, 128 * h + 32 * j + i, 0) << 2 * j
            p[16 + 32 * h + i] = <uint8_t> byte
    put16(p + 80, to_half(found.d[0]))
    put16(p + 82, to_half(found.dmin[0]))


cdef void put_q6_k(const Found* found, uint8_t* p) noexcept nogil:
    """What was found into the 210 bytes at p; levels are stored 32 higher."""
    cdef Py_ssize_t h, i, j
    cdef int low, high
    for h in range(2):
        for i in range(64):
            low = level(found, 128 * h + i, 32) & 15
            high = level(found, 128 * h + 64 + i, 32) & 15
            p[64 * h + i] = <uint8_t> (low | high << 4)
        for i in range(32):
            high = 0
            for j in range(4):
                high |= (level(found, 128 * h + 32 * j + i, 32) >> 4) << 2 * j
            p[128 + 32 * h + i] = <uint8_t> high
    for j in range(16):
        p[192 + j] = <uint8_t> <int> found.sc[j]
    put16(p + 208, to_half(found.d[0]))


cdef void q2_k_encode(const float* x, uint8_t* p, Py_ssize_t n, bint* beyond) noexcept nogil:
    cdef Found found
    cdef Py_ssize_t block
    for block in range(n):
        scales_and_minima(x + 256 * block, 256, 16, 3, 15, &found)
        put_q2_k(&found, p + 84 * block)
    beyond[0] |= largest(x, 256 * n) >= BEYOND


cdef void q4_k_encode(const float* x, uint8_t* p, Py_ssize_t n, bint* beyond) noexcept nogil:
    cdef Found found
    cdef Py_ssize_t block
    for block in range(n):
        if block & 1 == 0:  # sixteen groups of 32 are two blocks
            scales_and_minima(x + 256 * block, 256 * (n - block), 32, 15, 63, &found)
        put_q4_k(&found, block & 1, p + 144 * block)
    beyond[0] |= largest(x, 256 * n) >= BEYOND


cdef void q5_k_encode(const float* x, uint8_t* p, Py_ssize_t n, bint* beyond) noexcept nogil:
    cdef Found found
    cdef Py_ssize_t block
    for block in range(n):
        if block & 1 == 0:
            scales_and_minima(x + 256 * block, 256 * (n - block), 32, 31, 63, &found)
        put_q5_k(&found, block & 1, p + 176 * block)
    beyond[0] |= largest(x, 256 * n) >= BEYOND


cdef void q6_k_encode(const float* x, uint8_t* p, Py_ssize_t n, bint* beyond) noexcept nogil:
    cdef Found found
    cdef Py_ssize_t block
    for block in range(n):
        signed_scales(x + 256 * block, 256, 16, 32, 127, &found)
        put_q6_k(&found, p + 210 * block)
    beyond[0] |= largest(x, 256 * n) >= BEYOND
