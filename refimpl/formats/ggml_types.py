"""Every tensor type that a GGUF may name, one row each: number, name, weights and bytes of a block, and
whether this package decodes it.

A row with `decoded` has a module of its name here (Q4_K: refimpl/formats/q4_k.py). All others are listed so
that a file with them can be read, sized and talked about by name; what asks for their numbers is refused
(E1301). Numbers below 97 are ggml's, those from 97 on are ik_llama.cpp's own (in its names, _R4 and _R8 are
four or eight rows interleaved). A format that neither has takes a number from 1000 on. Sources: ggml.h,
ggml-common.h and the type traits of ggml.c in llama.cpp and ik_llama.cpp.
"""

from __future__ import annotations

from typing import NamedTuple

FORK = 97  # the first number of ik_llama.cpp
OWN = 1000  # the first number of formats that neither ggml nor ik_llama.cpp has


class GgmlType(NamedTuple):
    """One type. A row of n weights takes `row_head + n / weights * nbytes` bytes; n must be whole blocks."""

    name: str
    weights: int  # of a block
    nbytes: int  # of a block
    row_head: int = 0  # bytes a row has besides its blocks: a scale of the whole row
    decoded: bool = False  # refimpl/formats/NAME.py is there


TYPES: dict[int, GgmlType] = {
    0: GgmlType("F32", 1, 4, decoded=True),
    1: GgmlType("F16", 1, 2, decoded=True),
    2: GgmlType("Q4_0", 32, 18, decoded=True),
    3: GgmlType("Q4_1", 32, 20, decoded=True),
    4: GgmlType("Q4_2", 16, 10),  # removed from ggml, as are 5, 31..33 and 36..38
    5: GgmlType("Q4_3", 16, 12),
    6: GgmlType("Q5_0", 32, 22, decoded=True),
    7: GgmlType("Q5_1", 32, 24, decoded=True),
    8: GgmlType("Q8_0", 32, 34, decoded=True),
    9: GgmlType("Q8_1", 32, 36),  # of activations; gguf-py still has 40, from when its sums were float32
    10: GgmlType("Q2_K", 256, 84, decoded=True),
    11: GgmlType("Q3_K", 256, 110, decoded=True),
    12: GgmlType("Q4_K", 256, 144, decoded=True),
    13: GgmlType("Q5_K", 256, 176, decoded=True),
    14: GgmlType("Q6_K", 256, 210, decoded=True),
    15: GgmlType("Q8_K", 256, 292, decoded=True),
    16: GgmlType("IQ2_XXS", 256, 66),
    17: GgmlType("IQ2_XS", 256, 74),
    18: GgmlType("IQ3_XXS", 256, 98),
    19: GgmlType("IQ1_S", 256, 50),
    20: GgmlType("IQ4_NL", 32, 18, decoded=True),
    21: GgmlType("IQ3_S", 256, 110),
    22: GgmlType("IQ2_S", 256, 82),
    23: GgmlType("IQ4_XS", 256, 136, decoded=True),
    24: GgmlType("I8", 1, 1),
    25: GgmlType("I16", 1, 2),
    26: GgmlType("I32", 1, 4),
    27: GgmlType("I64", 1, 8),
    28: GgmlType("F64", 1, 8),
    29: GgmlType("IQ1_M", 256, 56),
    30: GgmlType("BF16", 1, 2, decoded=True),
    31: GgmlType("Q4_0_4_4", 32, 18),
    32: GgmlType("Q4_0_4_8", 32, 18),
    33: GgmlType("Q4_0_8_8", 32, 18),
    34: GgmlType("TQ1_0", 256, 54),
    35: GgmlType("TQ2_0", 256, 66),
    36: GgmlType("IQ4_NL_4_4", 32, 18),  # ik_llama.cpp reads BitNet's I2_S here
    37: GgmlType("IQ4_NL_4_8", 32, 18),
    38: GgmlType("IQ4_NL_8_8", 32, 18),
    39: GgmlType("MXFP4", 32, 17, decoded=True),
    40: GgmlType("NVFP4", 64, 36, decoded=True),
    41: GgmlType("Q1_0", 128, 18),
    97: GgmlType("Q8_0_X4", 32, 34),
    98: GgmlType("Q8_1_X4", 32, 36),
    99: GgmlType("Q8_2_X4", 32, 36),
    133: GgmlType("Q6_0", 32, 26),
    134: GgmlType("IQ1_BN", 64, 13, row_head=2),
    135: GgmlType("IQ2_BN", 64, 16, row_head=4),
    136: GgmlType("Q8_K64", 64, 68),
    137: GgmlType("IQ2_K", 256, 76),
    138: GgmlType("IQ3_K", 256, 110),
    139: GgmlType("IQ4_K", 256, 144),
    140: GgmlType("IQ5_K", 256, 176),
    141: GgmlType("IQ6_K", 256, 212),
    144: GgmlType("IQ4_KS", 256, 136, row_head=4),
    145: GgmlType("IQ2_KS", 256, 70, row_head=2),
    146: GgmlType("IQ4_KSS", 256, 128, row_head=4),
    147: GgmlType("Q8_K16", 64, 64, row_head=20),
    148: GgmlType("Q8_K32", 256, 296),
    149: GgmlType("Q8_KR8", 256, 296),
    150: GgmlType("Q8_K128", 128, 140),
    151: GgmlType("Q8_KV", 32, 32, row_head=8),
    152: GgmlType("IQ5_KS", 256, 168, row_head=4),
    153: GgmlType("IQ2_KT", 256, 68, row_head=4),
    154: GgmlType("IQ3_KT", 256, 100, row_head=4),
    155: GgmlType("IQ4_KT", 256, 128, row_head=4),
    156: GgmlType("IQ3_KS", 256, 102, row_head=2),
    157: GgmlType("IQ2_KL", 256, 86, row_head=2),
    158: GgmlType("IQ1_KT", 256, 56, row_head=4),
    202: GgmlType("Q4_0_R8", 32, 18),
    206: GgmlType("Q5_0_R4", 32, 22),
    208: GgmlType("Q8_0_R8", 32, 34),
    210: GgmlType("Q2_K_R4", 256, 84),
    211: GgmlType("Q3_K_R4", 256, 110),
    212: GgmlType("Q4_K_R4", 256, 144),
    213: GgmlType("Q5_K_R4", 256, 176),
    214: GgmlType("Q6_K_R4", 256, 210),
    216: GgmlType("IQ2_XXS_R4", 256, 66),
    217: GgmlType("IQ2_XS_R4", 256, 74),
    218: GgmlType("IQ3_XXS_R4", 256, 98),
    219: GgmlType("IQ1_S_R4", 32, 6, row_head=2),
    220: GgmlType("IQ4_NL_R4", 32, 18),
    221: GgmlType("IQ3_S_R4", 256, 110),
    222: GgmlType("IQ2_S_R4", 256, 82),
    223: GgmlType("IQ4_XS_R8", 256, 136),
    229: GgmlType("IQ1_M_R4", 32, 7, row_head=2),
    230: GgmlType("BF16_R16", 1, 2),
    233: GgmlType("Q6_0_R4", 32, 26),
    335: GgmlType("IQ2_BN_R4", 64, 16, row_head=4),
    337: GgmlType("IQ2_K_R4", 256, 76),
    338: GgmlType("IQ3_K_R4", 256, 110),
    339: GgmlType("IQ4_K_R4", 256, 144),
    340: GgmlType("IQ5_K_R4", 256, 176),
    344: GgmlType("IQ4_KS_R4", 256, 136, row_head=4),
    352: GgmlType("IQ5_KS_R4", 256, 168, row_head=4),
    353: GgmlType("MXFP4_R8", 32, 17),
    397: GgmlType("Q8_K_R16", 256, 258),
    398: GgmlType("Q8_KV_R8", 32, 32, row_head=4),
    399: GgmlType("Q8_K_R8", 256, 258),
}
