"""Families of numbers and their codes: blocks of formats, E4M3, groups and tiles of FP8."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from refimpl.conformance.families import relations
from refimpl.conformance.families.family import SEEDS, Family, Recipe, Strategies
from refimpl.conformance.inputs import draws
from refimpl.conformance.manifest import Manifest
from refimpl.conformance.truth import quantizers
from refimpl.conformance.truth.compare import shown
from refimpl.conformance.truth.e4m3_by_search import e4m3_codes
from refimpl.ops import OPS
from refimpl.reference import fp8
from refimpl.tensors import ScaledFP8, ScaledInt4

# --- formats ------------------------------------------------------------------------------------------------


def module_of(op: str):
    """The format that an operation such as "q4_k.dequantize" is named after; None for codes of one byte."""
    return draws.FORMATS.get(op.partition(".")[0])


SHAPES = st.lists(st.integers(1, 3), max_size=2)


def _bytes_recipe(op: str, m: Manifest) -> Strategies:
    size = module_of(op).BLOCK.itemsize
    explicit = (
        st.integers(1, 3).flatmap(lambda n: st.binary(min_size=n * size, max_size=n * size)).map(bytes.hex)
    )
    drawn = st.fixed_dictionaries(
        {
            "shape": SHAPES,
            "blocks": st.integers(min(1, m.tokens), 4),
            "seed": SEEDS,
            "nasty": st.sampled_from([0.0, 0.5]),
        }
    )
    return {"data": explicit | drawn}


def _bytes(op: str, r: Recipe, m: Manifest) -> tuple:
    data = r["data"]
    if isinstance(data, str):
        return (np.frombuffer(bytes.fromhex(data), np.uint8).copy(),)
    return (
        draws.block_bytes(
            np.random.default_rng(data["seed"]),
            module_of(op),
            [*data["shape"], data["blocks"]],
            data["nasty"],
        ),
    )


def _byte_edges(op: str, m: Manifest) -> list[Recipe]:
    sizes: tuple[tuple[list[int], int], ...] = (([3], 0), ([], 1), ([], 33), ([1], 2), ([2, 3], 7), ([5], 3))
    return [
        {"data": {"shape": s, "blocks": n, "seed": 1, "nasty": 0.0}} for s, n in sizes if n or not m.tokens
    ]


LARGE = 512 * 257  # numbers of a row, three of which are work for many threads, and an odd number of blocks


def _many_blocks(op: str, m: Manifest) -> list[Recipe]:
    return [{"data": {"shape": [3], "blocks": LARGE // module_of(op).WEIGHTS, "seed": 2, "nasty": 0.1}}]


def _codes_recipe(op: str, m: Manifest) -> Strategies:
    return {"data": st.binary(max_size=40).map(bytes.hex)}


def _codes(op: str, r: Recipe, m: Manifest) -> tuple:
    data = r["data"]
    drawn = (
        np.random.default_rng(data["seed"]).bytes(data["size"])
        if isinstance(data, dict)
        else bytes.fromhex(data)
    )
    return (np.frombuffer(drawn, np.uint8).copy(),)


def _code_edges(op: str, m: Manifest) -> list[Recipe]:
    return [{"data": "".join(f"{i % 256:02x}" for i in range(n))} for n in (0, 1, 255, 256, 1000)]


def _float_kinds(op: str) -> list[str]:
    return list(draws.FLOATS) if op.endswith(".encode") else [k for k in draws.FLOATS if k != "patterns"]


# The scale of a block is stored as a half; far beyond its range nothing is left to compare.
_POWERS = {
    "encode": (-149, 127),
    "act_quant": (-100, 100),
    "act_quant_ue8m0": (-100, 100),
    "weight_quant": (-100, 100),
    "quantize": (-24, 14),
}


def _floats_recipe(op: str, m: Manifest) -> Strategies:
    powers = (
        st.integers(*_POWERS[op.partition(".")[2]])
        if not op.startswith(("q8_k", "f32", "bf16"))
        else st.integers(-100, 100)
    )
    row = st.tuples(st.sampled_from(_float_kinds(op)), powers)
    return {
        "rows": st.lists(row.map(list), min_size=1, max_size=4),
        "blocks": st.integers(1, 3),
        "more": st.integers(0, 40),
        "seed": SEEDS,
    }


def float_unit(op: str) -> int:
    """Numbers of a row come in multiples of this."""
    module = module_of(op)
    return module.WEIGHTS if module else 1


def _floats(op: str, r: Recipe, m: Manifest) -> tuple:
    unit = float_unit(op)
    ragged = (
        op.partition(".")[2] in ("act_quant", "act_quant_ue8m0", "weight_quant", "encode") and m.columns == 1
    )
    columns = r["blocks"] * (unit if unit > 1 else 128) - (
        r["more"] if ragged or (unit == 1 and m.columns == 1) else 0
    )
    columns = -(-columns // m.columns) * m.columns
    kinds, powers = zip(*r["rows"]) if r["rows"] else ((), ())
    return (draws.floats(np.random.default_rng(r["seed"]), list(kinds), list(powers), columns),)


def _float_edges(op: str, m: Manifest) -> list[Recipe]:
    rows = [["normal", 0], ["zeros", 0], ["uneven", 2], ["alone", -3], ["ties of 127", 0]]
    return [
        {"rows": rows[: max(n, m.tokens)], "blocks": b, "more": more, "seed": 3}
        for n in (0, 1, 5)
        for b in (1, 2, 9)
        for more in (0, 1)
    ]


def _many_floats(op: str, m: Manifest) -> list[Recipe]:
    rows = [["normal", 0], ["uneven", 2], ["ties of 127", 0]]
    return [
        {
            "rows": rows,
            "blocks": LARGE // (float_unit(op) if float_unit(op) > 1 else 128),
            "more": 0,
            "seed": 3,
        }
    ]


def _encoded(op: str, args: tuple, m: Manifest) -> np.ndarray:
    return e4m3_codes(args[0], m.rounding, m.overflow)


def _number(op: str, args: tuple, where: tuple[int, ...]) -> str:
    return f"that of {shown(args[0][where])}"


SPELLED = 36  # bytes of a block that fit into a line


def _weight(op: str, args: tuple, where: tuple[int, ...]) -> str:
    module = module_of(op)
    block, weight = divmod(where[-1], module.WEIGHTS)
    raw = args[0][where[:-1]].reshape(-1, module.BLOCK.itemsize)[block]
    spelled = f", whose bytes are {raw.tobytes().hex(' ')}" if len(raw) <= SPELLED else ""
    return f"shown is weight {weight} of block {block}{spelled}"


DECODE = Family(
    ("*.dequantize",),
    _bytes_recipe,
    _bytes,
    edges=_byte_edges,
    large=_many_blocks,
    relations={
        "power_of_two": relations.scaled_blocks,
        "permutation": relations.permuted_blocks,
        "batch": relations.rows_alone,
    },
    fixed={"exhaustive": "blocks"},
    real={"real_sizes": ("many_blocks",)},
    source=_weight,
)
DECODE_CODES = Family(
    ("*.decode",),
    _codes_recipe,
    _codes,
    edges=_code_edges,
    large=lambda op, m: [{"data": {"size": 3 * LARGE, "seed": 2}}],
    relations={"permutation": relations.permuted_last},
    fixed={"exhaustive": "codes"},
    source=_number,
    real={"real_sizes": ("many_rows",)},
)
ENCODE_CODES = Family(
    ("e4m3.encode",),
    _floats_recipe,
    _floats,
    want=_encoded,
    edges=_float_edges,
    large=_many_floats,
    codes=(True,),
    source=_number,
    relations={"permutation": relations.permuted_last, "batch": relations.rows_alone},
    fixed={"exhaustive": "floats"},
    real={"real_sizes": ("many_rows",)},
)
ENCODE = Family(
    ("*.quantize",),
    _floats_recipe,
    _floats,
    edges=_float_edges,
    large=_many_floats,
    relations={"batch": relations.rows_alone},
    fixed={"exhaustive": "scales"},
    real={
        "real_sizes": ("many_blocks",),
        "extremes": ("tiny_groups", "shifted", "spoiled_blocks", "spoiled_alone"),
    },
)
ACT_QUANT = Family(
    ("fp8.act_quant",),
    _floats_recipe,
    _floats,
    edges=_float_edges,
    large=_many_floats,
    nearest=lambda args, m, got: quantizers.nearest(got, args[0], 1, m.least),
    results=("codes", "scale"),
    codes=(True, False),
    relations={
        "power_of_two": relations.scaled_groups,
        "batch": relations.rows_alone,
        "nan_reach": relations.nan_in_a_group,
    },
    fixed={"exhaustive": "groups"},
    real={
        "real_sizes": ("many_rows",),
        "extremes": ("ue8m0", "groups_of_nothing", "vanishing", "dimensions"),
    },
)


# Its scales have no zero and a least one, so that a power of two does not go through.
ACT_QUANT_UE8M0 = replace(
    ACT_QUANT,
    patterns=("fp8.act_quant_ue8m0",),
    relations={law: r for law, r in ACT_QUANT.relations.items() if law != "power_of_two"},
)


# --- FP8 matrices -------------------------------------------------------------------------------------------


def _tiles_recipe(op: str, m: Manifest) -> Strategies:
    return {
        "rows": st.integers(1, 300),
        "columns": st.integers(1, 300),
        "seed": SEEDS,
        "codes": st.sampled_from(["quantized", "any"]),
    }


def _tiles(op: str, r: Recipe, m: Manifest) -> tuple:
    rng = np.random.default_rng(r["seed"])
    n, k = (
        -(-r[name] // multiple) * multiple for name, multiple in (("rows", m.rows), ("columns", m.columns))
    )
    if r["codes"] == "quantized":
        return (fp8.weight_quant(rng.normal(0, 1, (n, k)).astype(np.float32)),)
    scale = np.ldexp(rng.normal(0, 1, (-(-n // 128), -(-k // 128))), rng.integers(-20, 20)).astype(np.float32)
    return (ScaledFP8(rng.integers(0, 256, (n, k), np.uint8), scale),)


def _tile_edges(op: str, m: Manifest) -> list[Recipe]:
    sizes = ((1, 1), (127, 129), (128, 128), (129, 127), (300, 130), (1, 257))
    return [{"rows": n, "columns": k, "seed": 5, "codes": "any"} for n, k in sizes]


def _matrix_recipe(op: str, m: Manifest) -> Strategies:
    return {
        "rows": st.integers(1, 300),
        "columns": st.integers(1, 300),
        "seed": SEEDS,
        "power": st.integers(-40, 40),
    }


def _matrix(op: str, r: Recipe, m: Manifest) -> tuple:
    n, k = (
        -(-r[name] // multiple) * multiple for name, multiple in (("rows", m.rows), ("columns", m.columns))
    )
    return (np.ldexp(np.random.default_rng(r["seed"]).normal(0, 1, (n, k)), r["power"]).astype(np.float32),)


def _matrix_edges(op: str, m: Manifest) -> list[Recipe]:
    return [
        {"rows": n, "columns": k, "seed": 5, "power": 0}
        for n, k in ((1, 1), (127, 129), (128, 128), (129, 127), (300, 130))
    ]


def _pair(op: str, args: tuple, m: Manifest) -> tuple:
    return tuple(OPS[op].reference(*args))


WEIGHT_DEQUANT = Family(
    ("fp8.weight_dequant",),
    _tiles_recipe,
    _tiles,
    edges=_tile_edges,
    relations={"power_of_two": relations.scaled_tiles},
    large=lambda op, m: [{"rows": 2401, "columns": 257, "seed": 5, "codes": "any"}],  # 19 tiles high
    fixed={"exhaustive": "tile"},
    real={"real_sizes": ("tiles",), "extremes": ("tiles",)},
)
WEIGHT_QUANT = Family(
    ("fp8.weight_quant",),
    _matrix_recipe,
    _matrix,
    want=_pair,
    edges=_matrix_edges,
    nearest=lambda args, m, got: quantizers.nearest(got, args[0], 128, m.least),
    results=("codes", "scale"),
    codes=(True, False),
    large=lambda op, m: [{"rows": 2401, "columns": 257, "seed": 5, "power": 0}],
    real={"real_sizes": ("tiles",), "extremes": ("vanishing", "spoiled_tiles")},
)


# --- INT4 in groups -----------------------------------------------------------------------------------------


def _int4_recipe(op: str, m: Manifest) -> Strategies:
    return {"rows": st.integers(1, 300), "groups": st.integers(1, 9), "seed": SEEDS, "any": st.booleans()}


def _int4(op: str, r: Recipe, m: Manifest) -> tuple:
    """All codes, under scales of a sane size or of any bits."""
    w = draws.in_groups(np.random.default_rng(r["seed"]), r["rows"], 32 * r["groups"])
    scale = np.random.default_rng(r["seed"]).integers(0, 2**16, w.scale.shape, np.uint16)
    return (ScaledInt4(w.codes, scale if r["any"] else w.scale),)


def _int4_edges(op: str, m: Manifest) -> list[Recipe]:
    return [{"rows": n, "groups": g, "seed": 5, "any": True} for n, g in ((1, 1), (3, 2), (129, 5))]


INT4_DEQUANT = Family(("int4.weight_dequant",), _int4_recipe, _int4, edges=_int4_edges)
