"""One block of a format, worked by hand: where the bits of its numbers lie, and what the formula makes of
them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from types import ModuleType

import numpy as np

from refimpl.checkpoint.folder import Checkpoint
from refimpl.formats import draw
from refimpl.reference import packed
from refimpl.tiny import FP8_DIR

SHOWN = 10  # numbers of a long array
# of the embedded model: its first row of 256 weights, from the FP8 checkpoint
TENSOR = "blk.1.ffn_gate_exps.weight"


def weights() -> np.ndarray:
    """f32 [256]: the numbers that every page's block was made of."""
    return packed.dense(Checkpoint.open(FP8_DIR)[TENSOR][0])[0]


def block(module: ModuleType) -> np.ndarray:
    """u8 [block bytes]: the first block of `weights`; of a format without quantizer the nearest of all blocks
    that are tried.
    """
    x = weights()[: module.WEIGHTS]
    return module.quantize(x) if hasattr(module, "quantize") else nearest(module, x)


def nearest(module: ModuleType, x: np.ndarray) -> np.ndarray:
    """u8 [block bytes] for x f32 [WEIGHTS] by trying: each `d` of a ladder, under it each sub-scale and each
    quant, by what they decode to. Slow, and needs to know nothing but the decoder; minima stay zero.
    """
    bits, parts = draw.widths(module), draw.field_values(module, np.zeros(module.BLOCK.itemsize, np.uint8))
    scale = next((part for part in bits if part not in ("q", "m")), None)
    steps, groups = (2 ** bits[scale], parts[scale].size) if scale else (1, 1)
    grid = np.indices((steps, 2 ** bits["q"])).reshape(2, -1)

    def packed_with(step: np.ndarray, q: np.ndarray) -> np.ndarray:
        stored = {"q": np.broadcast_to(q, (len(q), module.WEIGHTS)).reshape(-1, *parts["q"].shape)}
        if scale:
            stored[scale] = np.broadcast_to(step, (len(step), groups)).reshape(-1, *parts[scale].shape)
        return draw.pack(module, stored, len(q))

    tried, best = packed_with(grid[0][:, None], grid[1][:, None]), (np.inf, np.empty(0, np.uint8))
    ladder = np.abs(x).max() * 2.0 ** (-np.arange(64) / 4) if "d" in draw.float_fields(module) else [1.0]
    for d in ladder:
        if "d" in draw.float_fields(module):
            tried.view(module.BLOCK)["d"] = d
        with np.errstate(over="ignore", invalid="ignore"):
            off = np.nan_to_num((module.dequantize(tried) - x) ** 2, nan=np.inf)
        off = off.reshape(steps, -1, groups, module.WEIGHTS // groups)
        step = off.min(axis=1).sum(axis=-1).argmin(axis=0)  # [groups]
        mine = off[step, :, np.arange(groups)]  # [groups, quants, weights of a group]
        if (total := mine.min(axis=1).sum()) < best[0]:
            found = packed_with(step[None], mine.argmin(axis=1).reshape(1, -1))
            if "d" in draw.float_fields(module):
                found.view(module.BLOCK)["d"] = d
            best = total, found[0]
    return best[1]


class _Table:
    """A table of a format's module, read with whole numbers that are float32."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values.astype(np.float32)

    def __getitem__(self, at: np.ndarray) -> np.ndarray:
        return self.values[at.astype(int)]


def evaluate(module: ModuleType, formula: str, parts: dict[str, np.ndarray]) -> np.ndarray:
    """The formula on all weights of a block, in float32: [j] are groups, [i] weights, names in capitals
    tables of the module.
    """
    source = re.sub(r"\[j, i\]|\[i\]", "", re.sub(r"(\w+)\[j\]", r"\1[:, None]", formula))
    names = {name: _Table(getattr(module, name)) for name in tables(formula)}
    names |= {part: value.astype(np.float32) for part, value in parts.items()}
    return np.asarray(eval(source, {"__builtins__": {}}, names)).reshape(-1)


def tables(formula: str) -> list[str]:
    """The names of tables in a formula."""
    return re.findall(r"\b[A-Z]\w*\b", formula)


def hex_lines(module: ModuleType, data: np.ndarray) -> Iterator[str]:
    """The bytes, by field, sixteen a line, with the number of the first."""
    for f in draw.fields(module):
        raw = data[f.offset : f.offset + f.nbytes]
        for start in range(0, f.nbytes, 16):
            yield (
                f"{f.name if start == 0 else '':8} {f.offset + start:4}  "
                f"{raw[start : start + 16].tobytes().hex(' ')}"
            )


def scale_letters(module: ModuleType) -> list[str]:
    """Bytes that several scales and minima share, bit by bit: A, B, ... are the bits of scale 0, 1, ..., a,
    b, ... those of minimum 0, 1, ...
    """
    found = []
    for byte, row in enumerate(draw.owners(module)):
        if {o.part for o in row} <= {"sc", "m"} and len({(o.part, o.at) for o in row}) > 1:
            shown = "".join(chr(ord("A" if o.part == "sc" else "a") + o.at[0]) for o in reversed(row))
            found.append(f"byte {byte:3}  {shown}")
    columns = -(-len(found) // 4)
    return (
        ["     ".join(found[i :: len(found) // columns]) for i in range(len(found) // columns)]
        if found
        else []
    )


def walked(module: ModuleType) -> list[int]:
    """The weights that a page takes apart: of a super-block one in an early group and one in a late group, in
    the high half of its byte, whose scale may be spread; of others one.
    """
    shape = _quants(module)
    if module.WEIGHTS == 256:
        return [17, 177] if len(shape) == 2 else [100]
    return [min(17, module.WEIGHTS - 1)]


def _quants(module: ModuleType) -> tuple[int, ...]:
    return draw.field_values(module, np.zeros(module.BLOCK.itemsize, np.uint8))["q"].shape


def place(module: ModuleType, at: int) -> tuple[int, ...]:
    """Weight `at` as group and weight of the group, or as it is."""
    return tuple(map(int, np.unravel_index(at, _quants(module))))


def weight_bits(module: ModuleType, at: int) -> Iterator[str]:
    """Whose bits lie in the bytes that hold a bit of weight `at`, of its scale or of its minimum, from the
    highest bit.
    """
    owners, here = draw.owners(module), place(module, at)
    group = here[:1] if len(here) == 2 else None
    for f in draw.fields(module):
        for byte in range(f.offset, f.offset + f.nbytes):
            row = list(reversed(owners[byte]))
            if not any(o.at == (here if o.part == "q" else group) for o in row):
                continue
            runs = [(label, [o.bit for o in owned]) for label, owned in groupby(row, key=lambda o: o.label)]
            whose = ", ".join(
                f"{label} bit{f's {bits[0]}..{bits[-1]}' if len(bits) > 1 else f' {bits[0]}'}"
                for label, bits in runs
            )
            yield f"{f.name:6} byte {byte:3}  {whose}"


def number_lines(module: ModuleType, data: np.ndarray) -> Iterator[str]:
    """The numbers that the bytes make; of long ones the beginning."""
    for part, value in draw.field_values(module, data).items():
        flat = value.reshape(-1)
        if value.ndim == 0:
            yield f"{part:5} = {draw.number(value)}"
        else:
            shown = " ".join(f"{draw.number(v):>4}" for v in flat[:SHOWN])
            yield f"{part:5} = {shown}" + (
                f" ...  [{', '.join(map(str, value.shape))}]" if flat.size > SHOWN else ""
            )


def by_hand(module: ModuleType, formula: str, data: np.ndarray, at: int) -> Iterator[str]:
    """Weight `at` step by step: the bits of every number in the formula, and the sum."""
    parts, owners = draw.field_values(module, data), draw.owners(module)
    grouped = "[j, i]" in formula
    width = parts["q"].shape[-1] if grouped else module.WEIGHTS
    j, i = divmod(at, width)
    shown = formula
    for name, index in re.findall(r"(\w+)(\[j, i\]|\[j\]|\[i\])?", formula):
        if name not in parts:
            continue
        place = {"[j, i]": (j, i), "[j]": (j,), "[i]": (i,), "": ()}[index]
        label = name + (f"[{', '.join(map(str, place))}]" if place else "")
        value = parts[name][place]
        where, pattern = _bits(owners, data, name, place)
        yield f"{label:9} {where:38} {pattern:>16}  = {draw.number(value)}"
        shown = re.sub(rf"\b{name}\b(\[[ij, ]+\])?", _spelled(value), shown)
    w = module.dequantize(data)[at]
    yield f"w[{j}, {i}]" + f" = {formula}" if grouped else f"w[{i}] = {formula}"
    yield f"{'':8}= {shown}"
    if tables(formula):
        yield f"{'':8}= " + re.sub(
            r"([A-Z]\w*)\[(\d+)\]", lambda m: _spelled(getattr(module, m[1])[int(m[2])]), shown
        )
    yield f"{'':8}= {draw.number(w)}"


def _spelled(value: np.generic) -> str:
    return f"({draw.number(value)})" if value < 0 else draw.number(value)


def _bits(
    owners: list[list[draw.Owner]], data: np.ndarray, part: str, at: tuple[int, ...]
) -> tuple[str, str]:
    """Where a number's bits lie, and the bits, highest first; a field of whole bytes is told as such."""
    bits = [
        (o.bit, byte, bit)
        for byte, row in enumerate(owners)
        for bit, o in enumerate(row)
        if (o.part, o.at) == (part, at)
    ]
    bits.sort(reverse=True)
    pattern = "".join(str(data[byte] >> bit & 1) for _, byte, bit in bits)
    places: dict[int, list[int]] = {}
    for _, byte, bit in bits:
        places.setdefault(byte, []).append(bit)
    if all(len(b) == 8 for b in places.values()):
        first, last = min(places), max(places)
        return (f"byte {first}" if first == last else f"bytes {first} to {last}"), (
            f"0x{int(pattern, 2):0{len(pattern) // 4}x}" if len(pattern) > 8 else pattern
        )
    return ", ".join(
        f"byte {byte} bit{f's {b[0]}..{b[-1]}' if len(b) > 1 else f' {b[0]}'}" for byte, b in places.items()
    ), pattern


def relative_error(module: ModuleType, data: np.ndarray) -> float:
    """sqrt(sum (x - w)^2 / sum x^2) of the block against the weights it was made of."""
    x = weights()[: module.WEIGHTS].astype(np.float64)
    return float(np.sqrt(np.sum((module.dequantize(data) - x) ** 2) / np.sum(x**2)))
