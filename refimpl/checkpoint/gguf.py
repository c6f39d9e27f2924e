"""GGUF: magic, version, counts, typed metadata, tensor table, then the tensors' bytes at aligned offsets. A
strict reader and a streaming writer.

    "GGUF" u32 version, u64 n_tensors, u64 n_kv
    n_kv x (string key, u32 type, value)
    n_tensors x (string name, u32 n, n x u64 ne, u32 type, u64 offset from the start of the data)
    padding, then the data

A string is a u64 length and bytes. `ne` is the shape reversed (ne[0] is contiguous). Own code, because
gguf-py hangs on a 49-byte file and accepts offsets that wrap around; it is the oracle of the tests. Source:
ggml's docs/gguf.md, versions 2 and 3, little endian.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refimpl import formats
from refimpl.errors import refusal
from refimpl.fields import family, note
from refimpl.files import atomic, map_bytes, real, whole, window
from refimpl.tensors import Packed, TensorInfo

SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
MAX_KV, MAX_TENSORS, MAX_KEY, MAX_NAME, MAX_STRING, MAX_ARRAY, MAX_ALIGNMENT = (
    1 << 16,
    1 << 17,
    1024,
    255,
    16 << 20,
    1 << 24,
    1 << 16,
)
_DAMAGED = "the file is damaged or incomplete: download it again"
_NOT_OURS = {
    b"FUGG": "this file is big endian, which is not supported",
    b"PK": "this is a zip archive: get the .gguf file",
    b"vers": "this is a Git LFS pointer: fetch the real file (git lfs pull)",
    b"<": "this is a web page: download the file again",
}


class File(NamedTuple):
    """What the head of a file says. Tensor dtypes are ggml's type names."""

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


class Entry(NamedTuple):
    """One tensor to write; `shape` row-major, `chunks()` yields its bytes in pieces."""

    name: str
    ggml_type: int
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes | memoryview]]

    @property
    def nbytes(self) -> int:
        return formats.nbytes(self.ggml_type, self.shape)


class _Cursor:
    """Reads forward in the mapped file and checks what is left before every read."""

    def __init__(self, path: Path):
        self.path, self.memory, self.at = path, map_bytes(path).data, 0

    def left(self) -> int:
        return len(self.memory) - self.at

    def take(self, n: int, what: str) -> memoryview:
        if n > self.left():
            raise refusal("E1005", self.path, what=what, found=f"{self.left()} bytes left", expected=n)
        self.at += n
        return self.memory[self.at - n : self.at]

    def number(self, kind: str, what: str) -> Any:
        return struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind), what))[0]

    def text(self, what: str, limit: int) -> bytes:
        n = self.number("Q", what)
        if n > limit:
            raise refusal("E1005 long", self.path, what=what, found=f"{n} bytes", expected=f"at most {limit}")
        return bytes(self.take(n, what))

    def utf8(self, what: str, limit: int) -> str:
        raw = self.text(what, limit)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise refusal("E1006", self.path, what=what, found=repr(raw[:20])) from None


def read(path: Path) -> File:
    """Parse and check one file's header; no tensor byte is read.

    InputFormatError: E1001 not GGUF, E1002 version, E1004 counts, E1005 file ends or too long, E1006 text,
    E1007 value, E1008 array, E1009 alignment, E1101 tensor name, E1102 there twice, E1103 dimensions, E1104
    row size, E1105 offset, E1106 data size. Types as `formats.get`.
    """
    cursor = _Cursor(path)
    version, n_tensors, n_kv = _head(cursor)
    metadata: dict[str, Any] = {}
    for _ in range(n_kv):
        key = cursor.utf8("a metadata key", MAX_KEY)
        if not key.isprintable() or not key:
            raise refusal("E1006 unprintable", path, found=repr(key))
        if key in metadata:
            raise refusal("E1102 metadata", path, key=key)
        metadata[key] = _value(cursor, cursor.number("I", key), key)
    alignment = metadata.get("general.alignment", 32)
    if (
        isinstance(alignment, bool)
        or not isinstance(alignment, int)
        or not 1 <= alignment <= MAX_ALIGNMENT
        or alignment & (alignment - 1)
    ):
        raise refusal("E1009", path, found=repr(alignment), expected=f"a power of two up to {MAX_ALIGNMENT}")
    rows = [_tensor(cursor) for _ in range(n_tensors)]
    return File(path, version, metadata, _placed(rows, cursor, alignment))


def _head(cursor: _Cursor) -> tuple[int, int, int]:
    path, magic = cursor.path, bytes(cursor.memory[:4])
    if magic != b"GGUF":
        hint = next(
            (h for m, h in _NOT_OURS.items() if magic.startswith(m)), "pass a .gguf file or a model's folder"
        )
        if len(cursor.memory) > 9 and bytes(cursor.memory[8:10]) == b'{"':
            hint = "this is a safetensors file: pass it as --safetensor_path"
        raise refusal(
            "E1001", path, found=repr(magic) if magic else "an empty file", expected="GGUF", hint=hint
        )
    cursor.at = 4
    version = cursor.number("I", "the head")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in (2, 3):
            raise refusal("E1003", path)
        hint = (
            "convert it again with a current llama.cpp"
            if version < 2
            else "the file is newer than this program"
        )
        raise refusal("E1002", path, found=version, expected="2 or 3", hint=hint)
    n_tensors, n_kv = cursor.number("Q", "the head"), cursor.number("Q", "the head")
    # The smallest tensor entry has 24 bytes, the smallest key and value 13. The first part of a split model
    # may be without tensors.
    if n_tensors > MAX_TENSORS or n_kv > MAX_KV or 24 * n_tensors + 13 * n_kv > cursor.left():
        found = f"{n_tensors} tensors and {n_kv} keys in {cursor.left()} bytes"
        raise refusal("E1004", path, found=found, expected=f"at most {MAX_TENSORS} tensors and {MAX_KV} keys")
    return version, n_tensors, n_kv


def _value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind == STRING:
        return cursor.utf8(key, MAX_STRING)
    if kind in SCALARS:
        value = np.frombuffer(cursor.take(np.dtype(SCALARS[kind]).itemsize, key), SCALARS[kind])[0].item()
        if kind == BOOL and value > 1:
            raise refusal("E1007", cursor.path, key=key, found=value)
        return bool(value) if kind == BOOL else value
    if kind != ARRAY:
        raise refusal("E1007 unknown", cursor.path, key=key, found=kind, expected="0 to 12")
    element, n = cursor.number("I", key), cursor.number("Q", key)
    least = 8 if element == STRING else np.dtype(SCALARS[element]).itemsize if element in SCALARS else 0
    if not least or n > MAX_ARRAY or n * least > cursor.left():
        found = f"{n} elements of type {element} in {cursor.left()} bytes"
        raise refusal("E1008", cursor.path, key=key, found=found, expected="numbers or strings that fit")
    if element == STRING:  # tokens need not be UTF-8 each
        return [cursor.text(key, MAX_STRING).decode("utf-8", "surrogateescape") for _ in range(n)]
    values = np.frombuffer(cursor.take(n * least, key), SCALARS[element])
    if element == BOOL and (values > 1).any():
        raise refusal("E1007 holds", cursor.path, key=key, found=int(values.max()))
    return (values.astype(bool) if element == BOOL else values).tolist()


def _tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    path, name = cursor.path, cursor.utf8("a tensor name", MAX_NAME)
    if not name or not name.isprintable() or "/" in name:
        raise refusal("E1101", path, found=repr(name))
    n = cursor.number("I", name)
    if not 1 <= n <= 4:
        raise refusal("E1103 number", path, name=name, found=n, expected="1 to 4")
    ne = [cursor.number("Q", name) for _ in range(n)]
    kind, offset = cursor.number("I", name), cursor.number("Q", name)
    if min(ne) < 1 or math.prod(ne) >= 2**63:
        raise refusal(
            "E1103 impossible", path, name=name, found=ne, expected="at least 1 each, a product below 2^63"
        )
    return name, tuple(reversed(ne)), kind, offset


def _placed(
    rows: list[tuple[str, tuple[int, ...], int, int]], cursor: _Cursor, alignment: int
) -> dict[str, TensorInfo]:
    """Absolute places; every tensor must start where the one before it ended, padded to the alignment, as
    llama.cpp demands.
    """
    path, size = cursor.path, len(cursor.memory)
    start = _pad(cursor.at, alignment)
    tensors: dict[str, TensorInfo] = {}
    expected, end = 0, cursor.at
    # Sizes of a fork's own types are its affair: such a tensor has the bytes up to the next one.
    following = [row[3] for row in rows[1:]] + [size - start]
    for (name, shape, kind, offset), next_offset in zip(rows, following):
        if name in tensors:
            raise refusal("E1102 tensor", path, name=name)
        # Whether a type is decoded here matters only to who asks for the tensor's numbers.
        row = formats.TYPES[formats.type_id(kind, f"{path}: {name}")]
        if shape[-1] % row.weights:
            raise refusal("E1104", path, name=name, found=shape[-1], expected=f"a multiple of {row.weights}")
        if offset != expected:
            raise refusal("E1105", path, name=name, found=f"offset {offset}", expected=expected)
        nbytes = formats.nbytes(kind, shape) if kind < formats.FORK else max(next_offset - offset, 0)
        tensors[name] = TensorInfo(name, row.name, shape, path, start + offset, nbytes)
        expected = _pad(offset + nbytes, alignment)
        end = start + offset + nbytes
        if end > size:
            raise refusal("E1106 inside", path, name=name, found=f"{size} bytes", expected=f"at least {end}")
    if size >= end + alignment:
        if bytes(cursor.memory[start + expected :][:4]) == b"GGUF":
            raise refusal("E1106 parts", path, found=f"{size} bytes", expected=end)
        raise refusal("E1106 behind", path, found=f"{size} bytes", expected=end)
    return tensors


def _pad(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def read_all(path: Path) -> File:
    """A model given as a file, any file of a split one, or a folder that holds one model.

    The tensors of all parts together under the metadata of the first. MismatchError: E1201 a part is missing,
    E1202 parts disagree, E1203 no model or several in the folder.
    """
    first = first_file(path)
    name = _SPLIT.fullmatch(first.name)
    head = read(first)
    count = head.metadata.get("split.count", 0)
    if not name and isinstance(count, int) and count > 1:
        number = head.metadata.get("split.no")
        part = number + 1 if isinstance(number, int) else "?"
        raise refusal("E1202 alone", first, part=part, count=count)
    if not name or not count:  # merged files keep split.count = 0
        return head
    parts = [first.with_name(f"{name[1]}-{i:05d}-of-{name[3]}.gguf") for i in range(1, int(name[3]) + 1)]
    if not parts:
        raise refusal("E1202 name", first, found=name[3], expected=f"{count!r}, as split.count")
    missing = [p.name for p in parts if not p.exists()]
    if missing:
        raise refusal(
            "E1201", path, found=f"{len(parts) - len(missing)} of {len(parts)}", expected=missing[0]
        )
    files = [head if p == first else read(p) for p in parts]
    for number, file in enumerate(files):
        found = (file.metadata.get("split.no"), file.metadata.get("split.count"))
        if found != (number, len(parts)):
            raise refusal("E1202 name", file.path, found=found, expected=(number, len(parts)))
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        twice = tensors.keys() & file.tensors.keys()
        if twice:
            raise refusal("E1202 twice", file.path, value=min(twice))
        tensors |= file.tensors
    total = files[0].metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise refusal("E1202 tensors", path, found=len(tensors), expected=total)
    return File(files[0].path, files[0].version, files[0].metadata, tensors)


_FUSED = re.compile(r"(blk\.\d{1,4}\.ffn_)gate_up_exps\.weight")


def unfused(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Stacks of fused experts [E, 2 I, D], the rows of gate before those of up, as the single matrices
    `ffn_gate.E.weight` and `ffn_up.E.weight` that lie in them; all else as it is.
    """
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        fused = _FUSED.fullmatch(name)
        if not fused or len(info.shape) != 3 or info.shape[1] % 2:
            found[name] = info
            continue
        experts, rows, columns = info.shape
        half = info.nbytes // experts // 2
        for i in range(2 * experts):
            one = f"{fused[1]}{('gate', 'up')[i % 2]}.{i // 2}.weight"
            shape = (rows // 2, columns)
            found[one] = TensorInfo(one, info.dtype, shape, info.path, info.offset + i * half, half)
    return found


def first_file(path: Path) -> Path:
    """The file itself, or the first one of the model in a folder, or in its one subfolder with GGUF files.
    MismatchError E1203 for no model or several.
    """
    return _model_in(home(path) or path) if path.is_dir() else path


def home(folder: Path) -> Path | None:
    """The folder itself where it holds GGUF files, else the one folder in it that does, which is told in a
    note; None without any. MismatchError E1203 when there are several.
    """
    if any(folder.glob("*.gguf")):
        return folder
    found = sorted({p.parent for p in folder.glob("*/*.gguf")})
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise refusal(
            "E1203 folders", folder, found=names, expected="one", hint=f"name one of them, as {found[0]}"
        )
    if found:
        note(f"{folder} holds no GGUF; the one folder in it that does is taken: {found[0].name}")
    return found[0] if found else None


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF does, whatever its name."""
    with suppress(OSError), open(path, "rb") as file:
        return path.is_file() and file.read(4) == b"GGUF"
    return False


def _model_in(folder: Path) -> Path:
    candidates = sorted(folder.glob("*.gguf"))
    stems = {(m[1] if (m := _SPLIT.fullmatch(p.name)) else p.name): p for p in reversed(candidates)}
    if len(stems) > 1:  # projectors and importance matrices lie beside models
        stems = {
            stem: p
            for stem, p in stems.items()
            if read(p).metadata.get("general.architecture") in family.architectures()
        }
    if len(stems) != 1:
        names = sorted(p.name for p in stems.values())
        hint = (
            f"name the .gguf file itself, as {folder / names[0]}" if names else "name the .gguf file itself"
        )
        raise refusal("E1203", folder, found=", ".join(names) or "none", expected="one", hint=hint)
    return next(iter(stems.values()))


def view(info: TensorInfo, memory: np.ndarray | None = None) -> Packed:
    """The tensor on the mapped file (`memory`, from `map_bytes`, else mapped now), read-only.
    UnsupportedError E1301 for a type that is not decoded here.
    """
    kind = formats.get(info.dtype, f"{info.path}: {info.name}").GGML_TYPE
    row = formats.row_bytes(kind, info.shape[-1])
    return Packed(
        window(info.path, info.offset, info.nbytes, memory).reshape(*info.shape[:-1], row), kind, info.shape
    )


def head(
    metadata: Mapping[str, Any], entries: Sequence[Entry], alignment: int = 32, where: object = "metadata"
) -> bytes:
    """The bytes of a version 3 file before its data, padded to the alignment.

    Metadata values: bool, str, int (stored as u32), float (f32), and lists of str, int (i32) or float (f32).
    ValueError for two tensors of one name; InputFormatError E4006 for a number beyond its type, E1006 for
    what is no Unicode, E4007 for another value or for more than the reader takes. `where` is what they name.
    """
    if len({e.name for e in entries}) < len(entries):
        raise ValueError("two tensors of one name")
    parts = [struct.pack("<4sIQQ", b"GGUF", 3, len(entries), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key, "a metadata key", where, MAX_KEY), _typed(value, key, where)]
    offset = 0
    for e in entries:
        ne = tuple(reversed(e.shape))
        parts.append(_string(e.name, "a tensor name", where, MAX_NAME))
        parts.append(struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, e.ggml_type, offset))
        offset = _pad(offset + e.nbytes, alignment)
    text = b"".join(parts)
    return text + bytes(_pad(len(text), alignment) - len(text))


def write(
    path: Path,
    metadata: Mapping[str, Any],
    entries: Iterable[Entry],
    progress: Callable[[int], None] = lambda n: None,
    *,
    force: bool = True,
) -> None:
    """Write a file atomically (over one that is there, unless `force` is False), one piece of one tensor in
    memory at a time.

    ValueError as `head`, and when an entry yields another number of bytes than its shape says.
    """
    entries, alignment = list(entries), 32
    with atomic(path, force=force) as file:
        file.write(head(metadata, entries, alignment, path))
        for e in entries:
            done = 0
            for piece in e.chunks():
                file.write(piece)
                done += len(piece)
                progress(len(piece))
            if done != e.nbytes:
                raise ValueError(f"{e.name}: {done} bytes given for {e.nbytes}")
            file.write(bytes(_pad(done, alignment) - done))


def _string(text: str, what: str, where: object, limit: int = MAX_STRING) -> bytes:
    try:
        raw = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise refusal("E1006", where, what=what, found=repr(text[error.start : error.start + 20])) from None
    if len(raw) > limit:
        raise refusal("E4007", where, name=what, found=f"{len(raw)} bytes", expected=f"at most {limit}")
    return struct.pack("<Q", len(raw)) + raw


def _typed(value: Any, key: str, where: object) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<IB", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", U32, whole(value, key, where, 0, 2**32 - 1))
    if isinstance(value, float):
        return struct.pack("<If", F32, _single(value, key, where))
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value, key, where)
    if not isinstance(value, list) or len(value) > MAX_ARRAY:
        found, expected = repr(value)[:40], f"a number, a text, or a list of at most {MAX_ARRAY}"
        raise refusal("E4007", where, name=key, found=found, expected=expected)
    if all(isinstance(v, str) for v in value):
        texts = b"".join(_string(v, key, where) for v in value)
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + texts
    if all(isinstance(v, bool) for v in value):
        return struct.pack("<IIQ", ARRAY, BOOL, len(value)) + bytes(value)
    if all(isinstance(v, int) for v in value):
        array = np.array([whole(v, key, where, -(2**31), 2**31 - 1) for v in value], "<i4")
        return struct.pack("<IIQ", ARRAY, I32, len(value)) + array.tobytes()
    array = np.array([_single(v, key, where) for v in value], "<f4")
    return struct.pack("<IIQ", ARRAY, F32, len(value)) + array.tobytes()


def _single(value: Any, key: str, where: object) -> float:
    """A float that float32 holds; infinities and NaN are some."""
    if isinstance(value, float) and not math.isfinite(value):
        return value
    return real(value, key, where, -3.4028235e38, 3.4028235e38)
