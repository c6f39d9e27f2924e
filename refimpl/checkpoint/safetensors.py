"""safetensors: 8 bytes of header length, a JSON header, then the tensors' bytes without gaps. A strict
reader, views, and a streaming writer.

Own code, because the package's numpy side has no FP8, writes wrong bytes for transposed arrays and holds a
whole file in memory; it is the oracle of the tests. Source: the format's README. Stricter than that: no
duplicate keys, aligned tensors, printable names.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refimpl.errors import RefimplError, refusal
from refimpl.files import Writeback, atomic, read_small, regular_size, window
from refimpl.tensors import TensorInfo

# Bytes per value and the numpy type a view has: FP8 as codes, BF16 as bit patterns.
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "BOOL": "u1",
        "U8": "u1",
        "I8": "i1",
        "F8_E4M3": "u1",
        "F8_E5M2": "u1",
        "F8_E8M0": "u1",
        "I16": "<i2",
        "U16": "<u2",
        "F16": "<f2",
        "BF16": "<u2",
        "I32": "<i4",
        "U32": "<u4",
        "F32": "<f4",
        "I64": "<i8",
        "U64": "<u8",
        "F64": "<f8",
    }.items()
}
SUB_BYTE = ("F4", "F6_E2M3", "F6_E3M2")
MAX_HEADER = 100_000_000  # the format's own limit
MAX_NAME = 255
MAX_TENSORS = 1 << 18  # DeepSeek-V3 has 91,991 in all its files
MAX_INDEX = 64 << 20  # DeepSeek-V3's has 8.9 MB
_DAMAGED = "the file is damaged or incomplete: download it again"
_NOT_OURS = {
    b"GGUF": "this is a GGUF file: pass it as --gguf_path",
    b"PK\x03\x04": "this is a zip archive, perhaps a PyTorch pickle, which is never opened: get the "
    "safetensors files",
    b"\x80\x02": "this is a Python pickle, which is never opened: get the safetensors files",
    b"version ": "this is a Git LFS pointer: fetch the real file (git lfs pull)",
    b"<": "this is a web page, not a tensor file: download it again",
}


class Header(NamedTuple):
    """What the head of a file says."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


class Entry(NamedTuple):
    """One tensor to write; `chunks()` yields its bytes in pieces, little endian, row-major."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes | memoryview]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def read(path: Path) -> Header:
    """Parse and check a file's header; no tensor byte is read.

    InputFormatError: E2001 not this format, E2002 header length, E2003 not JSON, E2004 duplicate name, E2005
    malformed entry, E2007 shape against bytes, E2008 holes, overlaps or wrong file size, E2009 alignment,
    E2010 metadata, E2011 too many tensors. UnsupportedError E2006: a dtype unknown or below a byte.
    """
    size = regular_size(path)
    with open(path, "rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > MAX_HEADER or length > size - 8:
            _refuse_other_formats(path, head)
            raise refusal(
                "E2002", path, found=f"{length} of {size} bytes", expected=f"8 + at most {MAX_HEADER}"
            )
        text = file.read(length)
    raw = _parse(text, path)
    metadata = _metadata(raw.pop("__metadata__", {}), path)
    if len(raw) > MAX_TENSORS:
        raise refusal("E2011", path, found=len(raw), expected=f"at most {MAX_TENSORS}")
    tensors = {name: _entry(name, value, 8 + length, path) for name, value in raw.items()}
    _check_layout(tensors, 8 + length, size, path)
    return Header(path, tensors, metadata)


def view(info: TensorInfo, memory: np.ndarray | None = None) -> np.ndarray:
    """The tensor as a read-only array on the mapped file (`memory`, from `map_bytes`, else mapped now); types
    as in DTYPES.
    """
    raw = window(info.path, info.offset, info.nbytes, memory)
    return raw.view(DTYPES[info.dtype]).reshape(info.shape)


def head(entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a file before its data, padded to eight. ValueError for two tensors of one name."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for e in entries:
        if e.name in fields:
            raise ValueError(f"two tensors named {e.name}")
        fields[e.name] = {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [at, at + e.nbytes]}
        at += e.nbytes
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write(
    path: Path,
    entries: Iterable[Entry],
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], None] = lambda n: None,
    *,
    force: bool = True,
) -> None:
    """Write a file atomically (over one that is there, unless `force` is False), one piece of one tensor in
    memory at a time; `progress(n)` is told of every n bytes.

    Wider types come first, so that every tensor is aligned. ValueError when an entry yields another number of
    bytes than its shape says.
    """
    ordered = sorted(entries, key=lambda e: -DTYPES[e.dtype].itemsize)
    with atomic(path, force=force) as file:
        file.write(first := head(ordered, metadata))
        writeback = Writeback(file)
        writeback.wrote(len(first))
        for e in ordered:
            done = 0
            for piece in e.chunks():
                file.write(piece)
                writeback.wrote(len(piece))
                done += len(piece)
                progress(len(piece))
            if done != e.nbytes:
                raise ValueError(f"{e.name}: {done} bytes given for {e.nbytes}")


def save(
    path: Path,
    arrays: Mapping[str, tuple[str, np.ndarray]],
    metadata: Mapping[str, str] | None = None,
    *,
    force: bool = True,
) -> None:
    """Write arrays {name: (dtype, array)}; of any layout in memory, in the numpy types of DTYPES. Over
    a file that is there, unless `force` is False.
    """
    entries = []
    for name, (dtype, array) in arrays.items():
        if np.asarray(array).dtype != DTYPES[dtype]:
            raise ValueError(f"{name}: {dtype} is stored from {DTYPES[dtype]}, not {np.asarray(array).dtype}")
        entries.append(Entry(name, dtype, array.shape, partial(_contiguous, array)))
    write(path, entries, metadata, force=force)


def _contiguous(array: np.ndarray) -> list[bytes]:
    return [np.ascontiguousarray(array).tobytes()]


def _refuse_other_formats(path: Path, head: bytes) -> None:
    for magic, hint in _NOT_OURS.items():
        if head.startswith(magic):
            raise refusal("E2001", path, found=repr(head[:8]), hint=hint)


def _unique(path: Path) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """What builds the objects of a JSON text, and refuses two values of one name, of which JSON itself keeps
    the last, and more entries than a file may have tensors, however they are spelled: half a minute's work,
    for which nobody waits.
    """
    objects = 0

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal objects
        objects += 1
        if max(objects, len(pairs)) > MAX_TENSORS + 2:  # the metadata, and what holds them all
            raise refusal("E2011", path, found=f"over {MAX_TENSORS}", expected=f"at most {MAX_TENSORS}")
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise refusal("E2004", path, twice=twice)
        return found

    return unique


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    try:
        raw = (
            json.loads(text.decode("utf-8"), object_pairs_hook=_unique(path))
            if text.startswith(b"{")
            else None
        )
    except (ValueError, RecursionError) as error:
        raise refusal("E2003", path, found=str(error)[:80]) from None
    if not isinstance(raw, dict):
        _refuse_other_formats(path, text)
        raise refusal("E2003 object", path, found=repr(text[:12]), expected="{")
    return raw


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if value is None:  # some programs write null for nothing
        return {}
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise refusal("E2010", path, expected="texts by name")
    return value


def _entry(name: str, value: Any, start: int, path: Path) -> TensorInfo:
    def bad() -> RefimplError:
        return refusal("E2005", path, value=name or "a tensor without name", found=repr(value))

    if not name or len(name.encode("utf-8", "replace")) > MAX_NAME or not name.isprintable():
        raise bad()
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise bad()
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if (
        not _naturals(shape)
        or not _naturals(offsets)
        or len(offsets) != 2
        or len(shape) > 8
        or math.prod(n for n in shape if n) >= 2**60
    ):
        raise bad()
    if not isinstance(dtype, str) or dtype not in DTYPES:
        found = repr(dtype)[:40] + (" (below a byte)" if dtype in SUB_BYTE else "")
        raise refusal("E2006", path, name=name, found=found, expected=", ".join(DTYPES))
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise refusal("E2007", path, name=name, found=f"{offsets[1] - offsets[0]} bytes", expected=nbytes)
    if math.prod(n for n in shape if n) >= 2**60:  # nothing in it, and yet no array can have this shape
        raise bad()
    if (start + offsets[0]) % DTYPES[dtype].itemsize:
        raise refusal("E2009", path, name=name, found=f"{dtype} at byte {start + offsets[0]}")
    return TensorInfo(name, dtype, tuple(shape), path, start + offsets[0], nbytes)


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**63 for v in values
    )


def _check_layout(tensors: dict[str, TensorInfo], start: int, size: int, path: Path) -> None:
    at = start
    for info in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if info.offset != at:
            what = "overlaps another tensor" if info.offset < at else "leaves a hole before it"
            raise refusal(
                "E2008 tensor", path, name=info.name, what=what, found=f"offset {info.offset}", expected=at
            )
        at += info.nbytes
    if at != size:
        what = "the file is cut off" if size < at else "there are bytes behind the last tensor"
        raise refusal("E2008", path, what=what, found=f"{size} bytes", expected=at)


INDEX = "model.safetensors.index.json"


def read_folder(
    folder: Path, wanted: Callable[[str], bool] = lambda name: True
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Every tensor of a folder for which `wanted(name)`, and the metadata of all files together (values that
    differ joined by commas).

    Where the folder has an index, files without a wanted tensor are not opened, and need not be there.
    MismatchError: E2101 malformed index, E2102 a file of it is missing, E2103 a tensor is not where it says,
    E2104 a tensor in two files, E2105 no safetensors file at all.
    """
    index = folder / INDEX
    if index.exists():
        placed = {name: file for name, file in _index(index).items() if wanted(name)}
    else:
        placed = {}
        if not any(folder.glob("*.safetensors")):
            raise refusal("E2105", folder, hint=what_else(folder))
    paths = (
        [folder / f for f in sorted(set(placed.values()))] if placed else sorted(folder.glob("*.safetensors"))
    )
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        if placed and not path.exists():
            raise refusal("E2102", index, expected=path.name)
        header = read(path)
        for key, value in header.metadata.items():
            metadata[key] = value if metadata.get(key, value) == value else f"{metadata[key]}, {value}"
        for name, info in header.tensors.items():
            if (placed and placed.get(name) != path.name) or not wanted(name):
                continue
            if name in tensors:
                raise refusal("E2104", folder, name=name, found=f"{tensors[name].path.name} and {path.name}")
            tensors[name] = info
    lost = placed.keys() - tensors.keys()
    if lost:
        name = min(lost)
        raise refusal("E2103", index, name=name, expected=placed[name])
    return tensors, metadata


def read_index(folder: Path) -> dict[str, str]:
    """{tensor: name of its file} as the folder's index says. MismatchError E2101."""
    return _index(folder / INDEX)


def _index(path: Path) -> dict[str, str]:
    try:
        found = json.loads(read_small(path, MAX_INDEX), object_pairs_hook=_unique(path))["weight_map"]
        good = isinstance(found, dict) and all(
            isinstance(f, str) and Path(f).name == f and f.endswith(".safetensors") and "\\" not in f
            for f in found.values()
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise refusal("E2101", path, expected="weight_map of tensor names to plain .safetensors file names")
    return found


def what_else(folder: Path) -> str:
    """A hint on a folder without the wanted files, by what it holds instead."""
    if any(folder.glob("*.gguf")):
        return "it holds GGUF files: are the two paths swapped?"
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        return "it holds Python pickles, which are never opened: get the safetensors files"
    return "check the path"
