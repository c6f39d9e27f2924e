"""What only a person can say about a format: the question its page answers, what its fields mean, its formula, its quirks.

The formula is not only shown: `worked.evaluate` computes it on the page's block and a test wants the bits of `dequantize`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from refimpl.formats import (
    iq4_nl,
    iq4_xs,
    mxfp4,
    nvfp4,
    q2_k,
    q3_k,
    q4_0,
    q4_1,
    q4_k,
    q5_0,
    q5_1,
    q5_k,
    q6_k,
    q8_0,
    q8_k,
)


class Spec(NamedTuple):
    """`formula` is an expression in the numbers of `unpack`: [j] is a group, [i] a weight of the block or group."""

    question: str
    answer: str
    formula: str
    fields: dict[str, str]
    quirks: tuple[str, ...]
    source: str


NIBBLES = "two weights a byte: byte k has weight k in its low half and weight k + 16 in its high half"
TWO_BITS = "in two halves of 32 bytes: byte l of a half holds weights l, l + 32, l + 64 and l + 96 of its half, the first in its lowest bits"
RUNS = "four runs of 32 bytes: run c has group 2c in its low halves and group 2c + 1 in its high halves"
PACKED = "eight scales and eight minima of six bits each; the [quirks](#quirks) say which bits are whose"
D = "one half-precision scale for the whole block"
SIX_BITS = (
    "Eight scales and eight minima of six bits are 96 bits, so they fill 12 bytes to the last bit. Those of groups 0 to 3 lie in bits 5..0 of bytes "
    "4 to 7 (`sc`) and 8 to 11 (`m`). Groups 4 to 7 have their low four bits in bytes 12 to 15 and their high two bits on top of bytes 4 to 11."
)
SUBTRACTED = "The minimum is subtracted, not added: `dmin * m` is how far below zero the group reaches."
NO_ROUNDING = "`d * sc * q` fits into the 24 significant bits of float32. So decoding rounds nothing, and every decoder must give equal bits."


def one_rounding(bits: int) -> str:
    """Of a format with minima whose quants have so many bits."""
    return (
        f"`d * sc * q` has at most 11 + 6 + {bits} significant bits and so is exact in float32. Only the subtraction rounds, and it rounds once. That is why two decoders "
        "can be asked for equal bits, whatever their order of work."
    )


SPECS = {
    "Q4_0": Spec(
        "What is the simplest way to store a weight in four bits?",
        "Q4_0 takes 32 weights, divides them by a scale that the largest one decides, and keeps four bits of each. There is one scale and no "
        "minimum. So zero is always a value. The range is not symmetric: -8 to 7.",
        q4_0.FORMULA,
        {
            "d": D,
            "qs": f"{NIBBLES}; stored is q + 8",
        },
        (
            "The weight of largest magnitude becomes -8 exactly, whatever its sign, so `d` is negative whenever that weight is positive.",
            "Neighbouring weights are not neighbours in memory: a byte holds weights k and k + 16. So a SIMD register of low nibbles is 16 consecutive weights.",
        ),
        "block_q4_0",
    ),
    "Q4_1": Spec(
        "What if the weights of a block do not lie around zero?",
        "Q4_1 also stores where they begin. It spreads 16 levels from the smallest weight `m` to the largest. The offset takes two bytes more than Q4_0.",
        q4_1.FORMULA,
        {
            "d": "distance between two levels",
            "m": "the smallest weight, half precision",
            "qs": f"{NIBBLES}; stored as they are, 0 to 15",
        },
        (
            "Here the offset is added. The K-quants, which came later, subtract theirs.",
            "Zero is a value only if it happens to fall on a level.",
        ),
        "block_q4_1",
    ),
    "Q5_0": Spec(
        "Where does a fifth bit go when nibbles are taken?",
        "It goes into a field of its own, called `qh`. 32 weights have 32 fifth bits, which are four bytes. The nibbles stay where Q4_0 has them.",
        q5_0.FORMULA,
        {
            "d": D,
            "qh": "bit i is the highest bit of weight i, read as one little-endian number",
            "qs": f"the low four bits, {NIBBLES}; stored is q + 16",
        },
        (
            "`qh` starts at byte 2, so it is not aligned to four bytes; C code copies it before it is read as a number.",
            "llama.cpp's quantizer falls back to Q5_0 where a row is no whole number of 256 weights and Q4_K was asked for.",
        ),
        "block_q5_0",
    ),
    "Q5_1": Spec(
        "How does one store five bits with an offset?",
        "Q5_1 is Q4_1 with the fifth bits of Q5_0. It has 32 levels from the smallest weight to the largest.",
        q5_1.FORMULA,
        {
            "d": "distance between two levels",
            "m": "the smallest weight",
            "qh": "bit i is the highest bit of weight i, read as one little-endian number",
            "qs": f"the low four bits, {NIBBLES}; stored as they are",
        },
        (
            "At 6 bits a weight it costs nearly as much as Q6_K, which is more exact. Q5_1 occurs as a fallback for odd row lengths.",
        ),
        "block_q5_1",
    ),
    "Q8_0": Spec(
        "What is the plainest format of all?",
        "A block of Q8_0 is a scale and 32 signed bytes. Other formats are compared with it. Activations become Q8_0 when they meet Q4_0, Q5_0 or Q8_0 weights.",
        q8_0.FORMULA,
        {"d": D, "qs": "the weights, signed bytes from -127 to 127"},
        (
            "-128 never comes out of the quantizer, but a decoder meets it in foreign files and must read it as -128.",
            "34 bytes are no multiple of four: every second block starts in the middle of a word.",
            "Ties are rounded away from zero here, and to the even number in Q8_K.",
        ),
        "block_q8_0",
    ),
    "Q2_K": Spec(
        "How few bits can a weight have before a model stops making sense?",
        "About two and a half bits are the least. In Q2_K, 256 weights form 16 groups. Every group has a four-bit scale and a four-bit minimum, in units "
        "that the super-block holds.",
        q2_k.FORMULA,
        {
            "scales": "byte j: scale of group j in bits 3..0, its minimum in bits 7..4",
            "qs": f"two bits a weight, {TWO_BITS}",
            "d": "unit of the scales",
            "dmin": "unit of the minima",
        },
        (SUBTRACTED, "The scales come first and the two halves last; in Q4_K it is the other way round."),
        "block_q2_K",
    ),
    "Q3_K": Spec(
        "How does one store three bits without wasting any?",
        "Q3_K puts two of them into one field and the third into another. The third one is stored inverted: where its bit is 0, four is subtracted.",
        q3_k.FORMULA,
        {
            "hmask": "bit k of byte l is the third bit of weight 32 k + l, inverted in its meaning",
            "qs": f"the low two bits, {TWO_BITS}",
            "scales": "16 scales of six bits: low four bits in bytes 96 to 103, high two in bytes 104 to 107; stored is sc + 32",
            "d": "unit of the scales",
        },
        (
            "No minimum: the scales are signed instead, and so are the quants, -4 to 3.",
            "This package decodes Q3_K and does not write it (error E1303).",
        ),
        "block_q3_K",
    ),
    "Q4_K": Spec(
        "How do 256 weights fit into 144 bytes and still know their own scale?",
        "Scales are stored in two steps. Every 32 weights have a scale and a minimum of their own. These are numbers of six bits, in units that all 256 weights "
        "share. The routed experts in the hybrid folder have this format, and so have 97 % of DeepSeek-V3's weights.",
        q4_k.FORMULA,
        {
            "d": "unit of the eight scales",
            "dmin": "unit of the eight minima",
            "scales": PACKED,
            "qs": RUNS,
        },
        (
            SIX_BITS,
            SUBTRACTED,
            one_rounding(4),
            "A row must be a whole number of 256 weights. 7168 and 2048 are, and kv_b's 128 are not.",
        ),
        "block_q4_K",
    ),
    "Q5_K": Spec(
        "What does one bit more than Q4_K buy?",
        "It halves the error. The layout is that of Q4_K, with the fifth bits in a field of their own between scales and nibbles.",
        q5_k.FORMULA,
        {
            "d": "unit of the eight scales",
            "dmin": "unit of the eight minima",
            "scales": PACKED,
            "qh": "bit j of byte l is the fifth bit of weight l of group j",
            "qs": f"the low four bits, {RUNS}",
        },
        (SIX_BITS, SUBTRACTED, one_rounding(5)),
        "block_q5_K",
    ),
    "Q6_K": Spec(
        "Which tensors deserve more than four bits?",
        "Those tensors do whose errors reach every later layer. The mix Q4_K_M gives Q6_K to the output matrix and to about half of the down "
        "projections. A block has 16 groups of 16 weights. Each group has a signed scale of a whole byte, and no minimum.",
        q6_k.FORMULA,
        {
            "ql": "the low four bits, in two halves of 64 bytes",
            "qh": "the high two bits, in two halves of 32 bytes: byte l holds those of weights l, l + 32, l + 64, l + 96 of its half",
            "scales": "16 signed bytes, one for each group of 16 weights",
            "d": "unit of the scales; it comes last",
        },
        (
            NO_ROUNDING,
            "A group is 16 weights and a run of bytes is 32, so two groups share every run: scale j belongs to weights 16 j to 16 j + 15 of the block "
            "as decoded, not to 16 consecutive bytes.",
            "210 bytes are no multiple of four. A block's `d` may begin at any even address.",
            "Stored is q + 32, and a scale may be negative: the quantizer uses that to let the largest weight be -32.",
        ),
        "block_q6_K",
    ),
    "IQ4_NL": Spec(
        "Must the levels of a format lie at equal distances?",
        "They need not. Most weights are near zero, so IQ4_NL puts its sixteen levels close together there, and far apart at the ends. The bytes are those "
        "of Q4_0, but a quant is a place in a table.",
        iq4_nl.FORMULA,
        {
            "d": D,
            "qs": f"{NIBBLES}; stored is the place in the table",
        },
        (
            "Zero is no value: the numbers nearest to it are 1 and -10. Only a block whose `d` is zero holds zeros.",
            "The table is the same in every file, so it is part of the format as much as the order of the bytes is. It is not symmetric: -127 to 113.",
            "The table has sixteen bytes, so one byte shuffle of a SIMD unit looks up a quant in every byte of a register.",
            "llama.cpp's quantizer falls back to IQ4_NL where a row is no whole number of 256 weights and IQ4_XS was asked for.",
            "`d * VALUES[q]` has at most 11 + 7 significant bits: decoding rounds nothing.",
            "This package decodes IQ4_NL and does not write it (error E1303).",
        ),
        "block_iq4_nl",
    ),
    "IQ4_XS": Spec(
        "What can be saved on scales when the levels are well chosen?",
        "IQ4_XS saves a quarter of a bit a weight against Q4_K. 256 weights are eight groups of 32. Each group has a signed scale of six bits and no minimum. The quants are those of IQ4_NL.",
        iq4_xs.FORMULA,
        {
            "d": "unit of the eight scales",
            "scales_h": "the high two bits of the scales: those of group j are bits 2j and 2j + 1 of the number",
            "scales_l": "the low four bits of the scales: byte k has group 2k in its low half and group 2k + 1 in its high half; stored is sc + 32",
            "qs": "eight runs of 16 bytes: run j is group j, weight i in the low half of byte i and weight i + 16 in its high half",
        },
        (
            NO_ROUNDING.replace("sc * q", "sc * VALUES[q]"),
            "`scales_h` is one little-endian number of 16 bits, so the high bits of groups 4 to 7 are in its second byte.",
            "A run of 16 bytes is one group. In Q4_K a run of 32 bytes is two, one in the low halves and one in the high ones.",
            "A scale may be negative, and then the levels of its group are mirrored: -113 to 127 steps instead of -127 to 113.",
            "This package decodes IQ4_XS and does not write it (error E1303).",
        ),
        "block_iq4_xs",
    ),
    "MXFP4": Spec(
        "What if the weights themselves are floats of four bits?",
        "Then a scale only has to move them to the right size, and a power of two is enough for that. The scale is one byte for 32 weights, and multiplying "
        "by it rounds nothing. The Open Compute Project (OCP) defined the format, and GPUs multiply it directly.",
        mxfp4.FORMULA,
        {
            "e": "an E8M0 scale: 2^(e - 127) is the scale of the numbers 0, 0.5, 1, 1.5, 2, 3, 4, 6",
            "qs": f"an E2M1 code a weight, {NIBBLES}",
        },
        (
            "`VALUES` are twice the E2M1 numbers, so that they are whole, and the scale is halved for it: 128 instead of 127.",
            "Code 8 is minus zero in E2M1 and zero in ggml. The OCP calls e = 255 NaN; ggml reads 2^127 there, and so does this package.",
            "Under e = 254 the values from 4 on are 2^128 and more, which float32 cannot hold: they become infinite.",
            "A block has 17 bytes, so most blocks begin at an odd address.",
            "Encoding: e is the exponent of the largest magnitude minus 2, a weight becomes the nearest number, of two the one nearer to zero, and what lies "
            "beyond 6 scales becomes 6. So does llama.cpp. NaN and infinity are refused.",
        ),
        "block_mxfp4",
    ),
    "NVFP4": Spec(
        "What does a finer scale do for floats of four bits?",
        "It comes closer to each group's largest number. 16 weights share an E4M3 scale with three bits of mantissa. MXFP4 has a power of two instead.",
        nvfp4.FORMULA,
        {
            "d": "four E4M3 scales, one for each group; their sign bit means nothing",
            "qs": "two E2M1 codes a byte: byte 8j + k has weights k and k + 8 of group j",
        },
        (
            "`VALUES` are those of MXFP4, twice E2M1, and `SCALES` half of E4M3's numbers.",
            "E4M3's NaN, 0x7f, is a scale of zero in ggml. With the sign bit, 0xff, it is read as 240; no writer makes it.",
            "A group of 16 weights is 8 bytes; its low halves are the first 8 weights, not every second one.",
            "NVIDIA's checkpoints have one float32 scale more for each tensor. The blocks do not hold it.",
            "The product has at most 4 + 2 significant bits: decoding rounds nothing.",
            "This package decodes NVFP4 and does not write it (error E1303).",
        ),
        "block_nvfp4",
    ),
    "Q8_K": Spec(
        "What do activations become before they meet a K-quant?",
        "They become blocks of 256 signed bytes and one float32 scale. Within a super-block, the product with the weights is then computed in integers, "
        "exactly. Q8_K is never stored in a file.",
        q8_k.FORMULA,
        {
            "d": "scale, float32, possibly negative",
            "qs": "the activations, a signed byte each",
            "bsums": "sums of 16 quants each: what a minimum is multiplied by",
        },
        (
            "The number of largest magnitude becomes -127, whatever its sign, so `d` is negative when that number is positive.",
            "`bsums` holds nothing new. It saves the kernel from adding up the quants again for every row of weights, because "
            "the sum over i of (s q_i - m) a_i is s times the sum of q_i a_i, minus m times the sum of a_i.",
            "Rounding is to the nearest, ties to even; what would be 128 is cut to 127.",
        ),
        "block_q8_K",
    ),
}

SCALED = {
    "FP8": Spec(
        "How does a weight of one byte get the size that it needs?",
        "128 codes of E4M3 share one scale, a float32. DeepSeek-V3's checkpoint is stored so. It keeps codes and scales in two tensors, with one scale for a tile "
        "of 128 rows and 128 columns. Here you see one row of such a tile behind its scale.",
        "",
        {"scale": "one float32 for the 128 weights", "codes": "one E4M3 code a weight"},
        (
            "A checkpoint calls the scale `weight_scale_inv`. A weight is multiplied by it, in spite of the name.",
        ),
        "",
    ),
    "FP8_UE8M0": Spec(
        "What if a scale of FP8 is a power of two?",
        "Then it takes one byte, which is the exponent, and multiplying by it rounds nothing. 128 codes of E4M3 share it. Later kernels take such scales.",
        "",
        {"e": "an E8M0 scale: 2^(e - 127)", "codes": "one E4M3 code a weight"},
        (
            "`E4M3[q]` is the number that code q means in the format E4M3, and `UE8M0[e]` is 2^(e - 127).",
            "The scale is rounded up to a power of two, so that no code becomes larger than 448.",
        ),
        "",
    ),
}
"""FP8 with its scales, for pages to touch; its formulas are in `refimpl.pages.scaled`."""


class Code(NamedTuple):
    """A float of few bits: `bias` of the exponent, and what its page tells."""

    question: str
    answer: str
    bias: int
    worked: tuple[float, ...]
    quirks: tuple[str, ...]
    source: str


CODES = {
    "e4m3": Code(
        "What can a float of one byte say?",
        "It can say 253 different numbers. It has four bits of exponent and three of mantissa. It has no infinity, and only one NaN for each sign. So the largest number is 448.",
        7,
        (1.0, 0.3, 448.0, 0.001, 1000.0),
        (
            "The full name is E4M3FN: F for finite, N for the NaN that has all bits set. By the rules of IEEE, infinities would take a whole exponent.",
            "Encoding rounds to nearest, ties to the even code, and saturates: everything beyond 448, infinity too, becomes 448. ml_dtypes makes NaN of "
            "numbers from 464 on. All libraries agree on numbers that were clamped to 448 before.",
            "A NaN stays NaN. -0 is a code of its own (0x80).",
            "By itself the range is too small for weights, so a float32 scale stands beside every tile of 128x128 weights (`weight_scale_inv`, which is multiplied "
            "by, in spite of its name) and every group of 128 activations.",
        ),
        "Micikevicius et al. 2022, FP8 Formats for Deep Learning, table 1",
    ),
    "e5m2": Code(
        "What if range matters more than precision?",
        "Then one bit moves from the mantissa to the exponent. E5M2 is the upper byte of a half, with infinities and NaNs in their usual places.",
        15,
        (1.0, 0.3, 57344.0, 1e-5),
        (
            "It was meant for gradients. DeepSeek-V3 trains with E4M3 throughout, and its checkpoint has no E5M2 tensor.",
            "Decoding is a shift: put the byte on top of a half.",
        ),
        "Micikevicius et al. 2022, FP8 Formats for Deep Learning, table 1",
    ),
    "e8m0": Code(
        "What is left of a float without sign and mantissa?",
        "A power of two is left. E8M0 is used as a scale: multiplying by it changes an exponent and rounds nothing.",
        127,
        (1.0, 0.125, 2.0**127),
        (
            "There is no zero and no negative number. 0xff is NaN.",
            "UE8M0 is the same thing as a scale of FP8 blocks. DeepSeek-V3's checkpoint has float32 scales; later kernels take powers of two.",
            "Code 0 is 2^-127, a subnormal number in float32.",
        ),
        "OCP Microscaling Formats (MX) v1.0, section 5.4.1",
    ),
    "bf16": Code(
        "How much of a float32 does a network need?",
        "The upper half is mostly enough. BF16 has the whole exponent of float32 and seven bits of mantissa. Embeddings, head, norms and router of DeepSeek-V3 are stored so.",
        127,
        (1.0, 1 / 3, 448.0, 1e30),
        (
            "Decoding is exact: sixteen zero bits are appended.",
            "Encoding rounds to nearest even. Adding 1 to 256 changes nothing: its step there is 2.",
            "Sums must not be kept in it; kernels add in float32 and round once, at the end.",
        ),
        "the upper 16 bits of IEEE 754 binary32",
    ),
    "f16": Code(
        "Why are the scales of GGML blocks halves and not bfloat16?",
        "A scale needs much precision and little range. A half has ten bits of mantissa, and numbers from 6e-8 to 65504.",
        15,
        (1.0, 1 / 3, 65504.0, 1e-7),
        (
            "Subnormal scales do occur: a block of small weights may have d below 6.1e-5, and a decoder that flushes them to zero loses the block.",
            "Encoding goes to infinity beyond 65504, as IEEE says. A quantizer whose `d` overflows makes a block of infinities and NaNs, and decoders must agree on it.",
        ),
        "IEEE 754 binary16",
    ),
    "f32": Code(
        "Why is plain float32 listed?",
        "Norms, the router and its bias are float32 in a GGUF. F32 is a format like the others here, so that a reader needs no exception for it.",
        127,
        (1.0, 1 / 3, 16777217.0),
        (
            "Whole numbers are exact up to 16,777,216 = 2^24. The integer part of a product of a Q4_K and a Q8_K block can reach 2^26: it is added up in "
            "integers and rounded once, when it becomes a float32.",
        ),
        "IEEE 754 binary32",
    ),
}


def of(name: str) -> Spec | Code | None:
    """What is said of a layout, by its name in `layouts`: "Q4_K", "FP8", "E4M3"; None where nobody has said
    anything yet.
    """
    return (SPECS | SCALED).get(name) or CODES.get(name.lower())


def words() -> dict[str, dict[str, Any]]:
    """{name of a layout: its "quirks", and of a block the meaning of its "fields"}, for a page's script. A text may hold `code` and
    links, [text](#place).
    """
    blocks: dict[str, dict[str, Any]] = {
        n: {"fields": s.fields, "quirks": s.quirks} for n, s in (SPECS | SCALED).items()
    }
    return blocks | {n.upper(): {"quirks": c.quirks} for n, c in CODES.items()}
