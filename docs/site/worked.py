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
    """u8 [block bytes]: the first block of `weights`; Q3_K, which has no quantizer, packs a plain
    rounding.
    """
    x = weights()[: module.WEIGHTS]
    return module.quantize(x) if hasattr(module, "quantize") else _rounded(module, x)


def _rounded(module: ModuleType, x: np.ndarray) -> np.ndarray:
    """Signed groups: the largest magnitude of a group becomes -4 (Q3_K), scales are rounded to 31 steps of
    the largest.
    """
    groups = x.reshape(16, -1)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)[:, 0]
    d = np.float16(np.abs(largest).max() / 4 / 31)
    sc = np.clip(np.rint(-largest / 4 / np.float32(d)), -32, 31)
    scale = np.where(sc == 0, np.inf, np.float32(d) * sc)
    q = np.clip(np.rint(groups / scale[:, None]), -4, 3)
    return pack(module, d, {"sc": sc.astype(int) + 32, "q": q.astype(int) + 4})


def pack(module: ModuleType, d: np.float16, stored: dict[str, np.ndarray]) -> np.ndarray:
    """A block from its numbers, by the bits that `draw.owners` finds: every bit of `stored` to its place."""
    data = np.zeros(module.BLOCK.itemsize, np.uint8)
    for byte, row in enumerate(draw.owners(module)):
        for bit, owner in enumerate(row):
            number = int(d.view(np.uint16)) if owner.part == "d" else int(stored[owner.part][owner.at])
            data[byte] |= (number >> owner.bit & 1) << bit
    return data


def evaluate(formula: str, parts: dict[str, np.ndarray]) -> np.ndarray:
    """The formula on all weights of a block, in float32: [j] are groups, [i] weights."""
    source = re.sub(r"\[j, i\]|\[i\]", "", re.sub(r"(\w+)\[j\]", r"\1[:, None]", formula))
    return np.asarray(
        eval(source, {"__builtins__": {}}, {k: v.astype(np.float32) for k, v in parts.items()})
    ).reshape(-1)


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


def weight_bits(module: ModuleType) -> Iterator[str]:
    """Whose bits lie in the first byte of every field of quants, from the highest bit."""
    owners = draw.owners(module)
    for f in draw.fields(module):
        row = list(reversed(owners[f.offset]))
        if f.kind not in draw.FLOATS and {o.part for o in row} == {"q"}:
            runs = [(label, [o.bit for o in group]) for label, group in groupby(row, key=lambda o: o.label)]
            whose = ", ".join(
                f"{label} bit{f's {bits[0]}..{bits[-1]}' if len(bits) > 1 else f' {bits[0]}'}"
                for label, bits in runs
            )
            yield f"{f.name:6} byte {f.offset:3}  {whose}"


def number_lines(module: ModuleType, data: np.ndarray) -> Iterator[str]:
    """The numbers that the bytes make; of long ones the beginning."""
    for part, value in draw.numbers(module, data).items():
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
    parts, owners = draw.numbers(module, data), draw.owners(module)
    grouped = "[j, i]" in formula
    width = parts["q"].shape[-1] if grouped else module.WEIGHTS
    j, i = divmod(at, width)
    shown = formula
    for name, index in re.findall(r"(\w+)(\[j, i\]|\[j\]|\[i\])?", formula):
        place = {"[j, i]": (j, i), "[j]": (j,), "[i]": (i,), "": ()}[index]
        label = name + (f"[{', '.join(map(str, place))}]" if place else "")
        value = parts[name][place]
        where, pattern = _bits(owners, data, name, place)
        yield f"{label:9} {where:38} {pattern:>16}  = {draw.number(value)}"
        spelled = draw.number(value)
        shown = re.sub(
            rf"\b{name}\b(\[[ij, ]+\])?", f"({spelled})" if spelled.startswith("-") else spelled, shown
        )
    w = module.dequantize(data)[at]
    yield f"w[{j}, {i}]" + f" = {formula}" if grouped else f"w[{i}] = {formula}"
    yield f"{'':8}= {shown}"
    yield f"{'':8}= {draw.number(w)}"


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
