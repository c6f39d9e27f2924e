"""Reference: refimpl.reference.attention.mla_absorbed, its products and its softmax, a few registers at a
time. `latent_numba` puts them together.

Both products of attention over latents are one product of small matrices in float32, with other steps
through memory. The ten lines of Numba that do the same are these:

    def multiply(panel, factors, start):  # f32 [K, n], f32 [K, 4], f32 [4, n] -> f32 [4, n]
        y = np.zeros((4, panel.shape[1]), np.float32)
        for i in range(4):
            for k in range(len(panel)):
                for lane in range(panel.shape[1]):
                    y[i, lane] += factors[k, i] * panel[k, lane]
        return start + y

    scores      panel   queries, a column of all of them in each row      factors   numbers of four cache rows
    mixing      panel   cache rows, some columns of them                  factors   shares of four queries

Each lane's sum is one chain in the order of k. Four factors times `WIDE` registers are as many sums as there
are registers for, so that loads do not hold up the multiplications.

The softmax of a tile of scores goes on from what earlier tiles have found:

    def soften(scores, scale, largest, sums):  # f32 [rows, n], f32, f32 [n], f32 [n]
        top = np.maximum(largest, (scores * scale).max(axis=0))
        scores[:] = np.exp(scores * scale - top)
        shrink = np.exp(largest - top)
        return top, sums * shrink + scores.sum(axis=0), shrink
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from refimpl.kernels.simd_llvm import F32, I32, I64, LEVEL, WORDS, Emitter, Lanes

LANES = WORDS[LEVEL]  # of a register
WIDE = 4 if LANES == 16 else 2  # registers of a panel's row: of AVX2's sixteen, eight hold sums


def _products(
    e: Emitter,
    many: int,
    count: ir.Value,
    panel: tuple[ir.Value, ir.Value],
    factors: tuple[list[ir.Value], ir.Value],
    start: list[ir.Value],
    to: list[ir.Value],
) -> None:
    """What `multiply_latents` does, with `many` registers; panel and factors are addresses and steps."""
    b, n = e.b, WORDS[e.level]

    def row(k: ir.Value, sums: list[Lanes]) -> list[Lanes]:
        at, behind = e.at(panel[0], b.mul(k, panel[1])), b.mul(k, factors[1])
        lanes = [e.load(e.at(at, 4 * n * v), F32, n) for v in range(many)]
        numbers = [e.splat(e.load(e.at(f, behind), F32), n) for f in factors[0]]
        return [e.fma(x, f, y) for y, (f, x) in zip(sums, [(f, x) for f in numbers for x in lanes])]

    sums = e.loop(count, [e.constant(F32, [0.0] * n)] * (len(to) * many), row)
    places = [(i, 4 * n * v) for i in range(len(to)) for v in range(many)]
    sums = [y + e.load(e.at(start[i], at), F32, n) for y, (i, at) in zip(sums, places)]
    for y, (i, at) in zip(sums, places):
        e.store(y, e.at(to[i], at))


@intrinsic(prefer_literal=True)
def multiply_latents(typingctx, vectors, count, panel, panel_step, factors, step, start, to):
    """multiply_latents(vectors, count, panel, panel_step, factors, step, start, to) inside a Numba function:
    `count` rows of a panel, f32 [LANES * vectors] and `panel_step` bytes apart, times numbers f32 at the four
    addresses `factors` and every `step` bytes behind them. The sums and what is at the four addresses `start`
    go to the four addresses `to`. All three are tuples, and may be of one address instead of four.

    `vectors` is a constant, 1 or WIDE. One of the four may be given again in place of others, with its start
    and its `to`: everything is read before anything is written.
    """
    if not (isinstance(vectors, types.IntegerLiteral) and isinstance(to, types.BaseTuple)):
        return None

    def codegen(context, b, signature, args):
        _, count, panel, panel_step, factors, step, start, to = args
        factors, start, to = ([b.extract_value(x, i) for i in range(each)] for x in (factors, start, to))
        many = signature.args[0].literal_value
        _products(Emitter(b, LEVEL), many, count, (panel, panel_step), (factors, step), start, to)
        return context.get_dummy_value()

    each = to.count
    addresses = types.UniTuple(types.int64, each)
    given = types.int64, types.int64, types.int64, addresses, types.int64, addresses, addresses
    return types.none(vectors, *given), codegen


@intrinsic
def lay_side_by_side(typingctx, rows, row_bytes, last, count, to, step):
    """lay_side_by_side(rows, row_bytes, last, count, to, step) inside a Numba function: `count` numbers f32
    of each of LANES rows, `row_bytes` apart, to registers that have the same number of all of them, `step`
    bytes from one to the next. In place of rows behind row `last` that one is taken; `count` is a multiple of
    four.
    """

    def codegen(context, b, signature, args):
        rows, row_bytes, last, count, to, step = args
        e = Emitter(b, LEVEL)
        places = [b.select(b.icmp_signed("<", I64(r), last), I64(r), last) for r in range(LANES)]
        at = [e.at(rows, b.mul(place, row_bytes)) for place in places]

        def four(i: ir.Value, nothing: list[Lanes]) -> list[Lanes]:
            words = e.words_at([e.at(row, b.mul(i, I64(16))) for row in at])
            for j, lanes in enumerate(words):
                e.store(lanes, e.at(to, b.mul(b.add(b.mul(i, I64(4)), I64(j)), step)))
            return nothing

        e.loop(b.sdiv(count, I64(4)), [], four)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 6), codegen


def _greater(e: Emitter, x: Lanes, y: Lanes) -> Lanes:
    """The greater of two, f32 [n]; y where x is NaN."""
    return Lanes(e.b, e.b.select(e.b.fcmp_ordered(">", x.value, y.value), x.value, y.value))


def exponential(e: Emitter, x: Lanes) -> Lanes:
    """exp(x) of numbers f32 [n] that are not above zero, within 2 ulp; 0 where it is below 2**-126."""
    # x = n ln 2 + r with a whole n: exp(x) = 2**n exp(r), and |r| <= ln(2) / 2 takes few terms. Adding
    # 1.5 * 2**23 leaves n in the lowest bits of a float32, from where it moves to the exponent.
    count = x.value.type.count
    constant = lambda value: e.constant(F32, [value] * count)  # noqa: E731
    magic = constant(12582912.0)
    shifted = e.fma(x, constant(1.44269504), magic)
    n = (shifted - magic).negative()
    # ln 2 in two parts: the first has so few bits that its product with n is exact.
    r = e.fma(n, constant(-2.12194440e-4), e.fma(n, constant(0.693359375), x))
    # exp(r) = 1 + r + r**2 * (a polynomial): the coefficients of the Cephes library's expf.
    y = constant(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        y = e.fma(y, r, constant(c))
    y = e.fma(y, r * r, r) + constant(1.0)
    power = ((shifted.bits(I32, count) << 23) + (127 << 23)).bits(F32, count)
    small = e.b.fcmp_ordered("<", x.value, constant(-87.3).value)
    return Lanes(e.b, e.b.select(small, constant(0.0).value, (y * power).value))


def _shares(
    e: Emitter,
    many: int,
    rows: ir.Value,
    scores: ir.Value,
    scale: ir.Value,
    largest: ir.Value,
    sums: ir.Value,
    shrink: ir.Value,
) -> None:
    """What `soften` does, with `many` registers of heads."""
    b, n = e.b, WORDS[e.level]
    factor, places = e.splat(scale, n), [4 * n * v for v in range(many)]

    def scaled(s: ir.Value, place: int) -> tuple[ir.Value, Lanes]:
        at = e.at(e.at(scores, b.mul(s, I64(4 * n * many))), place)
        return at, e.load(at, F32, n) * factor

    def find(s: ir.Value, found: list[Lanes]) -> list[Lanes]:
        return [_greater(e, scaled(s, place)[1], x) for place, x in zip(places, found)]

    def share(s: ir.Value, totals: list[Lanes]) -> list[Lanes]:
        after = []
        for place, top, total in zip(places, tops, totals):
            at, score = scaled(s, place)
            found = exponential(e, score - top)
            e.store(found, at)
            after.append(total + found)
        return after

    before = [e.load(e.at(largest, place), F32, n) for place in places]
    found = e.loop(rows, before, find)
    # With -inf alone there is nothing to subtract: -inf - 0 gives shares of 0.
    zeros, none = e.constant(F32, [0.0] * n), e.constant(F32, [float("-inf")] * n)
    nothing = [b.fcmp_ordered("==", x.value, none.value) for x in found]
    tops = [Lanes(b, b.select(no, zeros.value, x.value)) for no, x in zip(nothing, found)]
    totals = e.loop(rows, [zeros] * many, share)
    for place, old, new, top, total in zip(places, before, found, tops, totals):
        less = exponential(e, old - top)
        e.store(less, e.at(shrink, place))
        e.store(new, e.at(largest, place))
        e.store(e.fma(e.load(e.at(sums, place), F32, n), less, total), e.at(sums, place))


@intrinsic(prefer_literal=True)
def soften(typingctx, vectors, rows, scores, scale, largest, sums, shrink):
    """soften(vectors, rows, scores, scale, largest, sums, shrink) inside a Numba function: scores of so many
    rows, f32 [rows, LANES * vectors] at the address `scores`, to shares, as above. What was found so far is
    f32 [LANES * vectors] at `largest` and `sums`, and goes on there; `shrink` receives what older sums were
    multiplied by.

    `vectors` is a constant, 1 or WIDE; `scale` a float32. Where all scores so far are -inf, shares are 0. A
    score that is NaN makes its share and its sum NaN.
    """
    if not isinstance(vectors, types.IntegerLiteral):
        return None

    def codegen(context, b, signature, args):
        _, rows, scores, scale, largest, sums, shrink = args
        many = signature.args[0].literal_value
        _shares(Emitter(b, LEVEL), many, rows, scores, scale, largest, sums, shrink)
        return context.get_dummy_value()

    return types.none(vectors, types.int64, types.int64, types.float32, *[types.int64] * 3), codegen
