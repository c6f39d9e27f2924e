"""Draw one block: the ruler of its fields, whose every bit is, and the numbers the bits make.

Nothing here knows a format. Fields come from BLOCK, numbers from `unpack`; which number a bit belongs to is
found by flipping it in a block of zeros and looking which number changes, and by how much.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

FLOATS = {
    "e4m3": (1, 4, 3),
    "e5m2": (1, 5, 2),
    "e8m0": (0, 8, 0),
    "bf16": (1, 8, 7),
    "f16": (1, 5, 10),
    "f32": (1, 8, 23),
}
"""Bits of sign, exponent and mantissa."""
_BY_DTYPE = {"<f2": "f16", "<f4": "f32"}


class Field(NamedTuple):
    """One member of the C struct."""

    name: str
    kind: str  # "f16", "f32", "u16", or "12 x u8"
    offset: int
    nbytes: int


class Owner(NamedTuple):
    """The number that a bit belongs to: PARTS name and index there, and the bit's place in the number (for
    floats: in the pattern).
    """

    part: str
    at: tuple[int, ...]
    bit: int

    @property
    def label(self) -> str:
        return self.part + (f"[{','.join(map(str, self.at))}]" if self.at else "")


def fields(module: ModuleType) -> list[Field]:
    """The fields of a block in order of their bytes."""
    found = []
    for name in module.BLOCK.names or ():
        dtype, offset = module.BLOCK.fields[name][:2]
        many = f"{dtype.shape[0]} x " if dtype.shape else ""
        kind = _BY_DTYPE.get(dtype.base.str) or f"{many}{dtype.base.kind}{8 * dtype.base.itemsize}"
        found.append(Field(name, kind, offset, dtype.itemsize))
    return found


def float_fields(module: ModuleType) -> list[str]:
    """The names of the fields that are floats."""
    return [f.name for f in fields(module) if f.kind in FLOATS]


def owners(module: ModuleType) -> list[list[Owner]]:
    """[block bytes][8] for a format with PARTS, bit 0 of a byte first."""
    size = module.BLOCK.itemsize
    flipped = np.zeros((size * 8, size), np.uint8)
    flipped[np.arange(size * 8), np.arange(size * 8) // 8] = 1 << (np.arange(size * 8) % 8)
    before, after = module.unpack(np.zeros(size, np.uint8)), module.unpack(flipped)
    found: dict[int, Owner] = {}
    for field in fields(module):
        if field.kind in FLOATS:
            for bit in range(field.nbytes * 8):
                found[field.offset * 8 + bit] = Owner(field.name, (), bit)
    for part, was, now in zip(module.PARTS, before, after):
        if was.dtype.kind == "f":
            continue
        change = np.abs(now[:, 0].astype(np.int64) - was[0].astype(np.int64))
        for bit, *index in np.argwhere(change):
            found[int(bit)] = Owner(part, tuple(map(int, index)), int(change[(bit, *index)]).bit_length() - 1)
    return [[found[8 * byte + bit] for bit in range(8)] for byte in range(size)]


def pack(module: ModuleType, stored: dict[str, np.ndarray], blocks: int) -> np.ndarray:
    """u8 [blocks, block bytes] from {part: integers [blocks, ...]}, the opposite of `numbers`: every bit to
    the place where `owners` finds it. Integers are as they are stored, without a format's constant offset;
    bits of parts that are not given are zero.
    """
    data = np.zeros((blocks, module.BLOCK.itemsize), np.uint8)
    for byte, row in enumerate(owners(module)):
        for bit, owner in enumerate(row):
            if owner.part in stored:
                at: Any = (slice(None), *owner.at)
                number = stored[owner.part][at]
                data[:, byte] |= (number.astype(np.int64) >> owner.bit & 1).astype(np.uint8) << bit
    return data


def widths(module: ModuleType) -> dict[str, int]:
    """{part: bits of one of its integers} for the integers of a block."""
    found: dict[str, int] = {}
    for row in owners(module):
        for owner in row:
            found[owner.part] = max(found.get(owner.part, 0), owner.bit + 1)
    return {part: bits for part, bits in found.items() if part not in float_fields(module)}


def field_values(module: ModuleType, block: np.ndarray) -> dict[str, np.ndarray]:
    """u8 [block bytes] -> {part: array without the axis of blocks}."""
    return {part: value[0] for part, value in zip(module.PARTS, module.unpack(block))}


def float_bits(pattern: int, kind: str) -> str:
    """'0 01111 0000000000': sign, exponent and mantissa of a pattern of a kind in FLOATS."""
    sign, exponent, mantissa = FLOATS[kind]
    text = f"{pattern:0{sign + exponent + mantissa}b}"
    return " ".join(filter(None, (text[:sign], text[sign : sign + exponent], text[sign + exponent :])))


def lines(module: ModuleType, block: np.ndarray, bits: bool = False) -> Iterator[str]:
    """Text of one block, u8 [block bytes], of a format with PARTS: ruler, fields, with `bits` every byte's
    bits and owners, numbers, weights.
    """
    yield from ruler(module)
    yield ""
    for f in fields(module):
        raw = block[f.offset : f.offset + f.nbytes]
        if f.kind in FLOATS:
            pattern = int.from_bytes(raw.tobytes(), "little")
            value = block.view(module.BLOCK)[f.name][0]
            yield (
                f"{f.name:8} {f.kind:4} 0x{pattern:0{2 * f.nbytes}x}  {float_bits(pattern, f.kind)}  = "
                f"{number(value)}"
            )
        else:
            for start in range(0, f.nbytes, 16):
                yield (
                    f"{f.name if start == 0 else '':8} {f.offset + start:4} "
                    f"{raw[start : start + 16].tobytes().hex(' ')}"
                )
    if bits:
        yield ""
        yield from _bit_lines(module, block)
    yield ""
    for part, value in field_values(module, block).items():
        yield from array_lines(part, value)
    yield from array_lines("w", module.dequantize(block).reshape(-1, min(module.WEIGHTS, 32)))


def as_dict(module: ModuleType, block: np.ndarray, bits: bool = False) -> dict[str, Any]:
    """What `lines` shows of one block, u8 [block bytes], as a dict for JSON: bytes in hex, fields, parts,
    weights, and with `bits` every bit and its owner. Numbers that JSON lacks are strings.
    """
    drawn: dict[str, Any] = {
        "bytes": block.tobytes().hex(),
        "fields": [f._asdict() for f in fields(module)],
        "parts": {part: plain(value) for part, value in field_values(module, block).items()},
        "weights": plain(module.dequantize(block)),
    }
    if bits:
        drawn["bits"] = [
            {
                "byte": i,
                "bit": b,
                "value": int(block[i]) >> b & 1,
                "part": o.part,
                "index": o.at,
                "part_bit": o.bit,
            }
            for i, row in enumerate(owners(module))
            for b, o in enumerate(row)
        ]
    return drawn


def ruler(module: ModuleType) -> Iterator[str]:
    """The fields on a ruler of bytes, two lines."""
    cells = [(f"{f.name}: {f.kind}", f.offset) for f in fields(module)]
    yield (
        "byte  " + "".join(f"{start:<{len(text) + 3}}" for text, start in cells) + str(module.BLOCK.itemsize)
    )
    yield "      " + "".join(f"| {text} " for text, _ in cells) + "|"


def _bit_lines(module: ModuleType, block: np.ndarray) -> Iterator[str]:
    yield "byte hex  bits       whose, from the highest bit"
    for i, row in enumerate(owners(module)):
        runs = [
            (label, [b for b, _ in group])
            for label, group in groupby(reversed(list(enumerate(row))), key=lambda pair: pair[1].label)
        ]
        pattern = " ".join("".join(str(block[i] >> b & 1) for b in places) for _, places in runs)
        whose = ", ".join(f"{label} {_places([row[b].bit for b in places])}" for label, places in runs)
        yield f"{i:4}  {block[i]:02x}  {pattern:10} {whose}"


def _places(bits: list[int]) -> str:
    return f"bit {bits[0]}" if len(bits) == 1 else f"bits {bits[0]}..{bits[-1]}"


def array_lines(name: str, values: np.ndarray) -> Iterator[str]:
    """`name` and its numbers, one line for each row of the last axis."""
    if values.ndim == 0:
        yield f"{name} = {number(values)}"
        return
    for index in np.ndindex(values.shape[:-1]):
        label = f"{name}[{','.join(map(str, index))}]" if index else name
        yield f"{label:8} {' '.join(f'{number(v):>{_width(values)}}' for v in values[index])}"


def _width(values: np.ndarray) -> int:
    return 3 if values.dtype.kind in "iu" else 10


def number(value: Any) -> str:
    """An integer as it is, a float with six digits."""
    return f"{value:.6g}" if np.asarray(value).dtype.kind == "f" else str(value)


def plain(values: Any) -> Any:
    """Lists of Python numbers; NaN and infinities as strings, since JSON has none."""
    if values.ndim:
        return [plain(v) for v in values]
    return values.item() if np.isfinite(values) else str(values)
