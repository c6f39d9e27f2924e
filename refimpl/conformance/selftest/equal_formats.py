"""Rewrites of decoders, encoders and FP8: other orders, tables for arithmetic, one rounding for two."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from refimpl import ops
from refimpl.conformance.inputs import draws
from refimpl.conformance.selftest.rewrite import F32, F64, Array, Rewrite
from refimpl.conformance.truth import bounds, e4m3_by_search
from refimpl.formats import e4m3
from refimpl.reference import fp8
from refimpl.tensors import ScaledFP8

# --- formats ------------------------------------------------------------------------------------------------

MOST_CALLS = 300


def _terms(kind: str, data: Array) -> dict[str, Array]:
    module = draws.FORMATS[kind]
    parts = dict(zip(module.PARTS, module.unpack(data)))
    return parts | ({"q": module.VALUES[parts["q"]]} if hasattr(module, "VALUES") else {})


def _low(p: dict[str, Array], dtype: type) -> Array | None:
    """What is added to every weight of a group; None where there is nothing."""
    if "dmin" in p:
        return -(p["dmin"][..., None].astype(dtype) * p["m"])[..., None]
    return p["m"][..., None].astype(dtype) if "m" in p else None


def _rounded_once(kind: str, data: Array) -> Array:
    p = _terms(kind, data)
    scale = p["d"][..., None].astype(F64) * p["sc"] if "sc" in p else p["d"].astype(F64)
    low = _low(p, F64)
    y = scale[..., None] * p["q"] if low is None else scale[..., None] * p["q"] + low
    return y.astype(F32).reshape(*data.shape[:-1], p["d"].shape[-1] * draws.FORMATS[kind].WEIGHTS)


def _products_first(kind: str, data: Array) -> Array:
    p = _terms(kind, data)
    q = p["sc"][..., None].astype(F32) * p["q"].astype(F32) if "sc" in p else p["q"].astype(F32)
    y = p["d"].reshape(p["d"].shape + (1,) * (q.ndim - p["d"].ndim)) * q
    if (low := _low(p, F32)) is not None:
        y = y + low
    return y.reshape(*data.shape[:-1], p["d"].shape[-1] * draws.FORMATS[kind].WEIGHTS)


def _from_the_end(count: int) -> list[slice]:
    """Blocks one by one from the last, or in as many pieces where they are many: a call of numpy's each."""
    step = 1 + count // MOST_CALLS
    return [slice(at, at + step) for at in reversed(range(0, count, step))]


def _one_by_one(kind: str, data: Array) -> Array:
    module = draws.FORMATS[kind]
    blocks = np.ascontiguousarray(data).reshape(-1, module.BLOCK.itemsize)
    out = np.empty((len(blocks), module.WEIGHTS), F32)
    for i in _from_the_end(len(blocks)):
        out[i] = module.dequantize(blocks[i].reshape(-1)).reshape(-1, module.WEIGHTS)
    return out.reshape(*data.shape[:-1], data.shape[-1] // module.BLOCK.itemsize * module.WEIGHTS)


def _by_table(kind: str, data: Array) -> Array:
    """A table of every value a group can have, looked up by its codes."""
    p = _terms(kind, data)
    scale = p["d"][..., None] * p["sc"].astype(F32) if "sc" in p else p["d"]
    codes = np.arange(int(p["q"].min(initial=0)), int(p["q"].max(initial=0)) + 1)
    table = scale[..., None] * codes.astype(F32)
    if (low := _low(p, F32)) is not None:
        table = table + low
    y = np.take_along_axis(table, p["q"].astype(np.int64) - codes[0], axis=-1)
    return y.reshape(*data.shape[:-1], p["d"].shape[-1] * draws.FORMATS[kind].WEIGHTS)


ALONE = "block by block from the end"
DECODERS = {
    "rounded once from float64 (fused multiply-add)": _rounded_once,
    "sub-scale times quant first": _products_first,
    ALONE: _one_by_one,
    "by a table for each group": _by_table,
}


def _encode_one_by_one(kind: str, x: Array) -> Array:
    module = draws.FORMATS[kind]
    blocks = np.ascontiguousarray(x, F32).reshape(-1, module.WEIGHTS)
    out = np.empty((len(blocks), module.BLOCK.itemsize), np.uint8)
    for i in _from_the_end(len(blocks)):
        out[i] = module.quantize(blocks[i].reshape(-1)).reshape(-1, module.BLOCK.itemsize)
    return out.reshape(*x.shape[:-1], x.shape[-1] // module.WEIGHTS * module.BLOCK.itemsize)


def _encode_through_float64(kind: str, x: Array) -> Array:
    return draws.FORMATS[kind].quantize(np.asfortranarray(x.astype(F64)))


def formats() -> Iterator[Rewrite]:
    """Equivalent rewrites of every decoder and encoder of GGML's formats."""
    for op in ops.OPS:
        kind, _, verb = op.partition(".")
        module = draws.FORMATS.get(kind)
        if module is None or not module.BLOCK.names:
            continue
        if verb == "dequantize":
            # The others know a half-precision or single-precision scale called d.
            known = DECODERS if "d" in draws.scale_fields(module) else {ALONE: _one_by_one}
            yield from (Rewrite(name, op, partial(f, kind)) for name, f in known.items())
        else:
            yield Rewrite(ALONE, op, partial(_encode_one_by_one, kind))
            yield Rewrite("from float64, by columns", op, partial(_encode_through_float64, kind))


# --- FP8 ----------------------------------------------------------------------------------------------------


def _decode_by_arithmetic(codes: Array) -> Array:
    size, exponent = (codes & 7).astype(F64), (codes >> 3 & 15).astype(int)
    y = np.where(exponent > 0, np.ldexp(8 + size, exponent - 10), np.ldexp(size, -9))
    return np.where((codes & 127) == 127, np.nan, np.copysign(y, np.where(codes > 127, -1.0, 1.0))).astype(
        F32
    )


def _decode_through_half(codes: Array) -> Array:
    """A code is the top of a half whose exponent is eight too small."""
    half = ((codes.astype(np.uint16) & 0x80) << 8 | (codes.astype(np.uint16) & 0x7F) << 7).view(np.float16)
    return np.where((codes & 127) == 127, F32(np.nan), half.astype(F32) * F32(256))


def _act_quant_by_group(x: Array) -> tuple[Array, Array]:
    codes, scale = np.empty(x.shape, np.uint8), np.empty((*x.shape[:-1], -(-x.shape[-1] // 128)), F32)
    for g in reversed(range(scale.shape[-1])):
        codes[..., 128 * g : 128 * g + 128], scale[..., g : g + 1] = fp8.act_quant(
            np.ascontiguousarray(x[..., 128 * g : 128 * g + 128])
        )
    return codes, scale


def _act_quant_in_float64(x: Array) -> tuple[Array, Array]:
    """Quotients of two float32 rounded to float64 and then to float32 are those rounded at once."""
    starts = np.arange(0, x.shape[-1], 128)
    if not len(starts) or not len(x):
        return fp8.act_quant(x)
    scale = (np.maximum.reduceat(np.abs(x.astype(F64)), starts, axis=-1) / 448).astype(F32)
    spread = np.repeat(scale, 128, axis=-1)[..., : x.shape[-1]]
    with np.errstate(all="ignore"):
        return np.where(
            spread == 0, np.uint8(0), e4m3_by_search.e4m3_codes((x.astype(F64) / spread).astype(F32))
        ), scale


def _dequant_by_tile(w: ScaledFP8) -> Array:
    y = np.empty(w.shape, F32)
    for i, j in np.ndindex(*w.scale.shape):
        tile = np.s_[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
        y[tile] = w.scale[i, j] * e4m3.decode(w.codes[tile])
    return y


def _dequant_in_float64(w: ScaledFP8) -> Array:
    return bounds.terms(w)[0].astype(F32)


FP8 = (
    Rewrite("by arithmetic in float64", "e4m3.decode", _decode_by_arithmetic),
    Rewrite("through half precision", "e4m3.decode", _decode_through_half),
    Rewrite("by looking for the nearest", "e4m3.encode", e4m3_by_search.e4m3_codes),
    Rewrite(
        "one row after the other",
        "e4m3.encode",
        lambda x: np.array([e4m3.encode(row) for row in x], np.uint8).reshape(x.shape),
    ),
    Rewrite("group by group from the end", "fp8.act_quant", _act_quant_by_group),
    Rewrite("in float64", "fp8.act_quant", _act_quant_in_float64),
    Rewrite("tile by tile", "fp8.weight_dequant", _dequant_by_tile),
    Rewrite("in float64", "fp8.weight_dequant", _dequant_in_float64),
)
