"""What the embedded model is taught: a seeded generator of questions, reasonings and answers, every answer
computed.

Arithmetic is reasoned the way children write it, one column a line, so that every step is a look-up in a
small table and any two numbers can be added although only a sliver of all pairs was ever seen. About 5 % of
all sums and differences and 10 % of all products are held out, in every phrasing and (where the operation
commutes) in both orders; `problems(kind, "heldout", ...)` draws from those alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from hashlib import blake2b
from typing import NamedTuple

from refimpl.training import phrases


class Problem(NamedTuple):
    """One question with the reasoning that belongs inside `<think>` and the answer after it."""

    kind: str
    question: str
    reasoning: str
    answer: str


PLACES = ("ones", "tens", "hundreds", "thousands")
SIGN = {"sum": "+", "difference": "-", "product": "*"}
HELD_OUT = {"sum": 0.05, "difference": 0.05, "product": 0.10}
ARITHMETIC = tuple(SIGN)

# Fields of one block in bytes, as ggml lays them out: scales (a half is 2 bytes), packed scales, high bits,
# low bits.
BLOCKS: dict[str, tuple[int, tuple[int, ...]]] = {
    "Q4_0": (32, (2, 16)),
    "Q4_1": (32, (2, 2, 16)),
    "Q5_0": (32, (2, 4, 16)),
    "Q5_1": (32, (2, 2, 4, 16)),
    "Q8_0": (32, (2, 32)),
    "Q2_K": (256, (16, 64, 2, 2)),
    "Q3_K": (256, (32, 64, 12, 2)),
    "Q4_K": (256, (2, 2, 12, 128)),
    "Q5_K": (256, (2, 2, 12, 32, 128)),
    "Q6_K": (256, (128, 64, 16, 2)),
    "Q8_K": (256, (4, 256, 32)),
    "F16": (1, (2,)),
    "BF16": (1, (2,)),
    "F32": (1, (4,)),
}

# Exponent bits, mantissa bits, exponent bias, whether the top exponent is kept for infinities and NaN (IEEE
# 754) or used for numbers (OCP's E4M3).
FLOATS: dict[str, tuple[int, int, int, bool]] = {
    "E4M3": (4, 3, 7, False),
    "E5M2": (5, 2, 15, True),
    "F16": (5, 10, 15, True),
    "BF16": (8, 7, 127, True),
    "F32": (8, 23, 127, True),
}


# --- the held-out split -------------------------------------------------------------------------------------


def held_out(kind: str, a: int, b: int) -> bool:
    """Whether training never sees `a op b`: a hash decides, so the split is the same on every machine and for
    every seed.
    """
    pair = (a, b) if kind == "difference" else (min(a, b), max(a, b))
    digest = blake2b(f"{kind} {pair[0]} {pair[1]}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < HELD_OUT[kind] * 2**64


# --- arithmetic, column by column ---------------------------------------------------------------------------


def _digits(n: int, width: int) -> list[int]:
    return [n // 10**i % 10 for i in range(width)]  # ones first


def _width(a: int, b: int) -> int:
    return max(len(str(a)), len(str(b)))


def _add_columns(a: int, b: int, width: int) -> list[str]:
    lines, carry = [], 0
    for i, (x, y) in enumerate(zip(_digits(a, width), _digits(b, width))):
        total = x + y + carry
        lines.append(f"{PLACES[i]} {x}+{y}+{carry}={total} write {total % 10} carry {total // 10}")
        carry = total // 10
    return lines


def _subtract_columns(a: int, b: int, width: int) -> list[str]:
    lines, borrow = [], 0
    for i, (x, y) in enumerate(zip(_digits(a, width), _digits(b, width))):
        rest = x - y - borrow
        lines.append(f"{PLACES[i]} {x}-{y}-{borrow}={rest} write {rest % 10} borrow {int(rest < 0)}")
        borrow = int(rest < 0)
    return lines


def reason_sum(a: int, b: int) -> str:
    """`a + b` for a, b in 0..999: both numbers padded to one width, then a line for each column."""
    w = _width(a, b)
    return "\n".join([f"{a:0{w}} + {b:0{w}}", *_add_columns(a, b, w), f"= {a + b:0{w}}"])


def _compare(a: int, b: int, width: int) -> str:
    steps = []
    for x, y in zip(reversed(_digits(a, width)), reversed(_digits(b, width))):
        steps.append(f"{x}{'<' if x < y else '>' if x > y else '='}{y}")
        if x != y:
            break
    return ", ".join(steps)


def reason_difference(a: int, b: int) -> str:
    """`a - b` for a, b in 0..999: which is larger, then the smaller taken from the larger column by column,
    then the sign.
    """
    w, sign = _width(a, b), "-" if a < b else ""
    head = [f"{a:0{w}} - {b:0{w}}", _compare(a, b, w)]
    if a == b:
        return "\n".join([*head, "equal", "= 0"])
    large, small = max(a, b), min(a, b)
    swap = f"{'swap' if sign else 'keep'} {large:0{w}} - {small:0{w}}"
    return "\n".join([*head, swap, *_subtract_columns(large, small, w), f"= {sign}{large - small:0{w}}"])


def _row(a: int, digit: int) -> str:
    """`a` (two digits) times one digit: two table look-ups and a carry."""
    ones, tens = _digits(a, 2)
    low, high = ones * digit, tens * digit
    first = f"{ones}*{digit}={low} write {low % 10} carry {low // 10}"
    return (
        f"times {digit}: {first}; {tens}*{digit}={high}, {high}+{low // 10}={high + low // 10}; "
        f"{a * digit:03}"
    )


def reason_product(a: int, b: int) -> str:
    """`a * b` for a, b in 0..99: a row for each digit of b, the second shifted by one place, and the rows
    added.
    """
    if a < 10 and b < 10:
        return f"{a} * {b}\n= {a * b}"
    ones, tens = a * (b % 10), a * (b // 10) * 10
    rows = [_row(a, b % 10), _row(a, b // 10), f"{ones:04} + {tens:04}"]
    return "\n".join([f"{a:02} * {b:02}", *rows, *_add_columns(ones, tens, 4), f"= {a * b:04}"])


_REASON: dict[str, Callable[[int, int], str]] = {
    "sum": reason_sum,
    "difference": reason_difference,
    "product": reason_product,
}
_VALUE: dict[str, Callable[[int, int], int]] = {
    "sum": int.__add__,
    "difference": int.__sub__,
    "product": int.__mul__,
}


def arithmetic(kind: str, a: int, b: int, question: str) -> Problem:
    """The problem `a op b` in the given words."""
    return Problem(kind, question, _REASON[kind](a, b), str(_VALUE[kind](a, b)))


def _operands(kind: str, rng: random.Random) -> tuple[int, int]:
    """Lengths first, so that short numbers are not drowned by the many long ones."""
    lengths = (1, 2) if kind == "product" else (1, 2, 3)
    weights = (1, 5) if kind == "product" else (2, 4, 7)
    highs = [10**n for n in rng.choices(lengths, weights, k=2)]
    a, b = rng.randrange(highs[0]), rng.randrange(highs[1])
    if kind == "difference" and rng.random() < 0.15:
        b = max(0, min(999, a + rng.randint(-9, 9)))  # close neighbours: long comparisons, leading zeros
    return a, b


def _draw_arithmetic(kind: str, split: str, rng: random.Random) -> Problem:
    while True:
        a, b = _operands(kind, rng)
        if held_out(kind, a, b) == (split == "heldout"):
            return arithmetic(kind, a, b, phrases.arithmetic(kind, a, b, rng))


# --- number formats -----------------------------------------------------------------------------------------


def decimal(value: Fraction) -> str:
    """A dyadic fraction as its exact, shortest decimal: 3/2 -> '1.5'."""
    return format((Decimal(value.numerator) / Decimal(value.denominator)).normalize(), "f")


def e4m3_value(code: int) -> Fraction | None:
    """The number an E4M3 code (OCP 8-bit floating point, the finite variant) stands for; None for NaN. The
    sign of zero is lost.
    """
    exponent, mantissa = code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return None
    size = Fraction(2) ** (exponent - 10) * (8 + mantissa) if exponent else Fraction(mantissa, 512)
    return -size if code & 128 else size


def e4m3(code: int, question: str) -> Problem:
    """The value of one E4M3 code, taken apart into sign, exponent and mantissa."""
    bits, value, exponent, mantissa = f"{code:08b}", e4m3_value(code), code >> 3 & 15, code & 7
    lines = [
        f"{code:02X} = {bits}",
        f"sign {bits[0]} exponent {bits[1:5]}={exponent} mantissa {bits[5:]}={mantissa}",
    ]
    if value is None:
        return Problem("e4m3", question, "\n".join([*lines, "all ones: NaN"]), "NaN")
    sign = "-" if code & 128 else ""
    formula = (
        f"normal ({8}+{mantissa})*2^({exponent}-10)={8 + mantissa}*2^{exponent - 10}"
        if exponent
        else f"subnormal {mantissa}*2^-9"
    )
    answer = sign + decimal(abs(value))
    return Problem("e4m3", question, "\n".join([*lines, formula, f"= {answer}"]), answer)


def e4m3_table() -> list[Problem]:
    """All 256 codes, asked in hexadecimal."""
    return [e4m3(code, f"What is the value of E4M3 0x{code:02X}?") for code in range(256)]


def largest(name: str) -> Fraction:
    """The largest finite number of a float format."""
    e, m, bias, ieee = FLOATS[name]
    if ieee:
        return (2 - Fraction(1, 2**m)) * Fraction(2) ** (2**e - 2 - bias)
    return (2 - Fraction(2, 2**m)) * Fraction(2) ** (
        2**e - 1 - bias
    )  # all ones is NaN, the code below it the largest


def _block_facts() -> list[Problem]:
    made = []
    for name, (weights, fields) in BLOCKS.items():
        nbytes, bits = sum(fields), decimal(Fraction(8 * sum(fields), weights))
        why = f"{name}: {weights} weights in {nbytes} bytes"
        made += [Problem("fact", q.format(name), why, f"{nbytes} bytes") for q in phrases.BLOCK_BYTES]
        made += [
            Problem("fact", q.format(name), why, f"{weights} weights" if weights > 1 else "1 weight")
            for q in phrases.BLOCK_WEIGHTS
        ]
        made += [
            Problem("fact", q.format(name), f"{why}\n{nbytes}*8/{weights} = {bits}", f"{bits} bits")
            for q in phrases.BLOCK_BITS
        ]
    return made


def _float_facts() -> list[Problem]:
    made = []
    for name, (e, m, bias, ieee) in FLOATS.items():
        why = f"{name}: 1 sign bit, {e} exponent bits, {m} mantissa bits, bias {bias}"
        answers = {
            "exponent": f"{e} bits",
            "mantissa": f"{m} bits",
            "bias": str(bias),
            "infinity": "Yes." if ieee else "No.",
        }
        if e < 8:
            answers |= {"largest": decimal(largest(name)), "normal": decimal(Fraction(2) ** (1 - bias))}
        if m < 4:
            answers |= {"subnormal": decimal(Fraction(2) ** (1 - bias - m))}
        made += [
            Problem("fact", q.format(name), why, answers[k])
            for k, qs in phrases.FLOAT_QUESTIONS.items()
            if k in answers
            for q in qs
        ]
    return made


def facts() -> list[Problem]:
    """Every fact in every phrasing: block sizes, float formats, a few words of the trade."""
    return (
        _block_facts()
        + _float_facts()
        + [Problem("fact", q, "A word I know.", answer) for q, answer in phrases.glossary()]
    )


# --- drawing ------------------------------------------------------------------------------------------------


def _draw_e4m3(split: str, rng: random.Random) -> Problem:
    code = rng.randrange(256)
    return e4m3(code, phrases.e4m3(code, rng))


_FACTS = facts()


def _draw(kind: str, split: str, rng: random.Random) -> Problem:
    if kind in ARITHMETIC:
        return _draw_arithmetic(kind, split, rng)
    if kind == "e4m3":
        return _draw_e4m3(split, rng)
    if kind == "fact":
        return rng.choice(_FACTS)
    if kind == "talk":
        return Problem("talk", *phrases.talk(rng))
    if kind == "unknown":
        return Problem("unknown", phrases.unknown(rng), "Not one of my subjects.", phrases.SORRY)
    raise ValueError(f"no problems of kind {kind!r}; there are {', '.join(MIX)}")


def problems(kind: str, split: str, n: int, seed: int) -> list[Problem]:
    """`n` problems of one kind ("sum", "difference", "product", "e4m3", "fact", "talk", "unknown"), the same
    for the same seed.

    `split` is "train" or "heldout"; it matters for arithmetic only, the other kinds are closed tables and are
    taught whole. Raises ValueError for another kind or split.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"no split {split!r}; there are train and heldout")
    rng = random.Random(f"{kind} {split} {seed}")
    return [_draw(kind, split, rng) for _ in range(n)]


# Shares of the kinds in training: products take the most steps, facts are only learnt by heart.
MIX = {"sum": 19, "difference": 21, "product": 26, "e4m3": 8, "fact": 35, "talk": 5, "unknown": 4}
TURNS = {1: 80, 2: 12, 3: 5, 4: 3}


def conversation(rng: random.Random, split: str = "train") -> tuple[str, list[Problem]]:
    """A system text (mostly empty) and one to four problems, asked one after the other."""
    turns = rng.choices(list(TURNS), list(TURNS.values()))[0]
    kinds = rng.choices(list(MIX), list(MIX.values()), k=turns)
    system = "You are a helpful assistant." if rng.random() < 0.02 else ""
    return system, [_draw(kind, split, rng) for kind in kinds]
