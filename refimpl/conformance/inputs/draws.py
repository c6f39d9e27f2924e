"""Numbers to feed to kernels, made from a few drawn values: hypothesis shrinks the recipe, and the same
recipe always gives the same numbers.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

from refimpl import formats
from refimpl.config import DeepSeekConfig
from refimpl.formats import bf16, int4, q8_k
from refimpl.reference import fp8
from refimpl.tensors import FileWeight, Packed, ScaledInt4

FORMATS: dict[str, ModuleType] = {m.NAME.lower(): m for m in formats.FORMATS.values()}
PACKED = [name for name, m in FORMATS.items() if m is not q8_k]
WEIGHTS = ("fp8", "int4", "plain", *PACKED)
"""Kinds of weights that `linear` knows: FP8 tiles, INT4 in groups, float32 arrays, and blocks."""

# Zeros, subnormals, the neighbours of one, the largest, infinities, quiet and signalling NaN.
HALVES = [
    0x0000,
    0x8000,
    0x0001,
    0x83FF,
    0x0400,
    0x3BFF,
    0x3C00,
    0xBC01,
    0x7BFF,
    0xFBFF,
    0x7C00,
    0xFC00,
    0x7E00,
    0xFE00,
    0x7C01,
    0xFDFF,
    0x7FFF,
]


def half_fields(module: ModuleType) -> list[str]:
    """The names of the half-precision scales of a block."""
    return [name for name in module.BLOCK.names or () if module.BLOCK[name] == "<f2"]


def scale_fields(module: ModuleType) -> list[str]:
    """The names of all scales of a block, in half or single precision."""
    return [name for name in module.BLOCK.names or () if module.BLOCK[name] in ("<f2", "<f4")]


# --- activations --------------------------------------------------------------------------------------------


def _one(rng: np.random.Generator, x: np.ndarray) -> None:
    for row in x:
        row[rng.integers(len(row))] = 1


def _integers(rng: np.random.Generator, x: np.ndarray) -> None:
    x[...] = rng.integers(-127, 128, x.shape)


def _normal(rng: np.random.Generator, x: np.ndarray) -> None:
    x[...] = rng.normal(0, 1, x.shape)


def _outliers(rng: np.random.Generator, x: np.ndarray) -> None:
    """Rows of different sizes, single numbers far above the others, one row perhaps of zeros."""
    x[...] = rng.normal(0, 1, x.shape) * 10.0 ** rng.integers(-3, 3, (len(x), 1))
    x[rng.random(x.shape) < 0.01] *= 50
    x[rng.integers(len(x))] *= rng.integers(0, 2)


ACTIVATIONS = {"one": _one, "integers": _integers, "normal": _normal, "outliers": _outliers}


def activations(rng: np.random.Generator, kind: str, *shape: int) -> np.ndarray:
    """Activations of one kind in ACTIVATIONS, f32 of the shape given."""
    x = np.zeros(shape, np.float32)
    if x.size:
        ACTIVATIONS[kind](rng, x.reshape(-1, shape[-1]))
    return x


# --- weights ------------------------------------------------------------------------------------------------


def unit_columns(kind: str) -> int:
    """K must be a multiple of this."""
    return FORMATS[kind].WEIGHTS if kind in FORMATS else int4.GROUP if kind == "int4" else 1


def packed(rng: np.random.Generator, module: ModuleType, *shape: int, spread: float = 0.01) -> Packed:
    """Random bits under scales of a sane size; where no field of a block is a float, quantized numbers, and
    of a format that is only decoded any blocks that are neither infinite nor huge.
    """
    data = rng.integers(0, 256, (*shape[:-1], formats.row_bytes(module.GGML_TYPE, shape[-1])), np.uint8)
    if scale_fields(module):
        blocks = data.view(module.BLOCK)
        for name in scale_fields(module):
            blocks[name] = rng.normal(0, spread, blocks.shape)
    elif hasattr(module, "quantize"):
        data = module.quantize(rng.normal(0, 1, shape).astype(np.float32)).reshape(data.shape)
    else:
        blocks = data.view(module.BLOCK)
        size = np.abs(module.dequantize(data)).reshape(*blocks.shape, module.WEIGHTS).max(axis=-1)
        blocks[~(size < 2.0**16)] = np.zeros((), module.BLOCK)
    return Packed(data, module.GGML_TYPE, shape)


def weight(rng: np.random.Generator, kind: str, rows: int, columns: int, spread: float = 1.0) -> FileWeight:
    """A matrix [N, K] of a kind of WEIGHTS."""
    if kind == "fp8":
        return fp8.weight_quant(rng.normal(0, spread, (rows, columns)).astype(np.float32))
    if kind == "plain":
        return rng.normal(0, spread, (rows, columns)).astype(np.float32)
    if kind == "int4":
        return in_groups(rng, rows, columns, spread)
    return packed(rng, FORMATS[kind], rows, columns)


def in_groups(rng: np.random.Generator, rows: int, columns: int, spread: float = 1.0) -> ScaledInt4:
    """Any codes of INT4 under random scales."""
    codes = rng.integers(0, 256, (rows, columns // 2), np.uint8)
    return ScaledInt4(codes, bf16_bits(rng.normal(0, spread / 16, (rows, columns // int4.GROUP))))


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """Numbers of any shape as the bit patterns of BF16, u16."""
    return bf16.quantize(np.asarray(x, np.float32)).view(np.uint16).reshape(np.shape(x))


def stack(rng: np.random.Generator, kind: str, *shape: int) -> Packed | list[FileWeight]:
    """Matrices [E, N, K] small enough for hidden numbers that a half can scale: blocks in one piece, others
    one by one.
    """
    if kind not in FORMATS:
        return [weight(rng, kind, shape[1], shape[2], 0.1) for _ in range(shape[0])]
    return packed(rng, FORMATS[kind], *shape, spread=0.001)


# --- blocks and rows of floats ------------------------------------------------------------------------------


def block_bytes(rng: np.random.Generator, module: ModuleType, shape: list[int], nasty: float) -> np.ndarray:
    """u8 [..., n*bytes], every bit random; with this probability a scale is one of HALVES."""
    b = rng.integers(0, 256, (*shape[:-1], shape[-1] * module.BLOCK.itemsize), np.uint8)
    if module.BLOCK.names and b.size:
        view = b.view(module.BLOCK)
        for name in half_fields(module):
            chosen = rng.choice(np.array(HALVES, "<u2"), view.shape)
            view[name].view("<u2")[...] = np.where(
                rng.random(view.shape) < nasty, chosen, view[name].view("<u2")
            )
    return b


def _alone(rng: np.random.Generator, n: int, power: int) -> np.ndarray:
    return np.where(np.arange(n) % 32 == rng.integers(32), np.ldexp(rng.choice([-1.0, 1.0]), power), 0)


FLOATS = {
    "zeros": lambda rng, n, power: np.copysign(0, rng.uniform(-1, 1, n)),
    "alone": _alone,
    "ties": lambda rng, n, power: np.ldexp(rng.integers(-254, 255, n) / 2, power // 2),
    "ties of 127": lambda rng, n, power: np.where(
        np.arange(n) % 32, np.ldexp(rng.integers(-254, 255, n) / 2, power // 2), np.ldexp(127.0, power // 2)
    ),
    "normal": lambda rng, n, power: np.ldexp(rng.uniform(-1, 1, n), power),
    "uneven": lambda rng, n, power: np.ldexp(rng.normal(0, 1, n), power // 2 + rng.integers(-6, 7, n)),
    "patterns": lambda rng, n, power: rng.integers(0, 2**32, n, np.uint32).view(np.float32),
}
"""Rows of n numbers about 2^power in size; "patterns" are any 32 bits, NaN and infinity among them."""


def floats(rng: np.random.Generator, kinds: list[str], powers: list[int], columns: int) -> np.ndarray:
    """A row of numbers for each kind in FLOATS and its power of two -> f32 [len(kinds), columns]."""
    rows = [np.asarray(FLOATS[kind](rng, columns, power)) for kind, power in zip(kinds, powers)]
    return np.array(rows, np.float32).reshape(len(kinds), columns)


# --- the router ---------------------------------------------------------------------------------------------


ROUTERS = {
    "sigmoid": ("sigmoid", "noaux_tc"),
    "softmax": ("softmax", "greedy"),
    "softmax, groups by their best": ("softmax", "group_limited_greedy"),
}
"""Scores and choices that go together (`scoring_func`, `topk_method`): DeepSeek-V3's and DeepSeek-V2's."""


def routers(scores: str) -> list[str]:
    """The kinds with these scores; all of them for an empty name."""
    return [kind for kind, (made, _) in ROUTERS.items() if scores in ("", made)]


def router(
    experts: int,
    groups: int,
    kept: int,
    chosen: int,
    normalize: bool = True,
    kind: str = "sigmoid",
    factor: float = 2.5,
) -> DeepSeekConfig:
    """A configuration of which only the router's fields matter; `kind` is one of ROUTERS."""
    scores, method = ROUTERS[kind]
    return DeepSeekConfig(
        n_routed_experts=experts,
        n_group=1 if method == "greedy" else groups,
        topk_group=1 if method == "greedy" else kept,
        num_experts_per_tok=chosen,
        norm_topk_prob=normalize,
        scoring_func=scores,
        topk_method=method,
        routed_scaling_factor=factor,
    )
