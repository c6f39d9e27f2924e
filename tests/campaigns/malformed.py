"""Files with one thing wrong each, by what it is."""

from __future__ import annotations

import struct
from typing import Any

from tests.campaigns import make
from tests.campaigns.make import Part


def _gguf(
    tensors: list[dict[str, Any]] | None = None,
    keys: list[list[Part]] | None = None,
    data: bytes = bytes(64),
    **head: Any,
) -> bytes:
    """Two F32 tensors of 8 values in 32 bytes each, but for what is said."""
    table = []
    for i, change in enumerate(tensors or [{}, {}]):
        t = {"name": b"ab"[i : i + 1], "ne": (8,), "kind": 0, "offset": 32 * i} | change
        n = t.get("n", len(t["ne"]))
        table.append(
            [
                Part("s", t["name"]),
                Part("I", n),
                *(Part("Q", v) for v in t["ne"]),
                Part("I", t["kind"]),
                Part("Q", t["offset"]),
            ]
        )
    keys = [] if keys is None else keys
    h = {"magic": b"GGUF", "version": 3, "n_tensors": len(table), "n_keys": len(keys)} | head
    parts = [
        Part("r", h["magic"]),
        Part("I", h["version"]),
        Part("Q", h["n_tensors"]),
        Part("Q", h["n_keys"]),
    ]
    return make.Gguf(parts, keys, table, 32, data).write()


def _key(kind: int, *value: Part, name: bytes = b"k") -> list[Part]:
    return [Part("s", name), Part("I", kind), *value]


GGUF = {
    "empty file": b"",
    "head cut off": b"GGUF\x03\0\0\0",
    "version 1": _gguf(version=1),
    "version 4": _gguf(version=4),
    "big endian": _gguf(version=3 << 24),
    "magic FUGG": _gguf(magic=b"FUGG"),
    "2^63 tensors": _gguf(n_tensors=2**63),
    "2^63 keys": _gguf(n_keys=2**63),
    "key of 2^63 bytes": _gguf(keys=[[Part("Q", 2**63), Part("r", b"x" * 20)]]),
    "empty key": _gguf(keys=[_key(4, Part("I", 0), name=b"")]),
    "key that is not UTF-8": _gguf(keys=[_key(4, Part("I", 0), name=b"\xff\xfe")]),
    "key twice": _gguf(keys=[_key(4, Part("I", 0))] * 2),
    "value of type 13": _gguf(keys=[_key(13, Part("I", 0))]),
    "string past the end": _gguf(keys=[_key(8, Part("Q", 10_000))]),
    "string of 2^63 bytes": _gguf(keys=[_key(8, Part("Q", 2**63))]),
    "text that is not UTF-8": _gguf(keys=[_key(8, Part("s", b"\xff"))]),
    "array of 2^63 strings": _gguf(keys=[_key(9, Part("I", 8), Part("Q", 2**63))]),
    "array larger than the file": _gguf(keys=[_key(9, Part("I", 12), Part("Q", 5_000_000))]),
    "array of arrays, 3000 deep": _gguf(keys=[_key(9, Part("r", struct.pack("<IQ", 9, 1) * 3000))]),
    "array of arrays": _gguf(
        keys=[_key(9, Part("I", 9), Part("Q", 1), Part("I", 4), Part("Q", 1), Part("I", 7))]
    ),
    "bool of 2": _gguf(keys=[_key(7, Part("B", 2))]),
    "alignment 0": _gguf(keys=[_key(4, Part("I", 0), name=b"general.alignment")]),
    "alignment 13": _gguf(keys=[_key(4, Part("I", 13), name=b"general.alignment")]),
    "alignment 2^31": _gguf(keys=[_key(4, Part("I", 2**31), name=b"general.alignment")]),
    "alignment as text": _gguf(keys=[_key(8, Part("s", b"32"), name=b"general.alignment")]),
    "tensor without a name": _gguf([{"name": b""}, {}]),
    "name of 300 bytes": _gguf([{"name": b"a" * 300}, {}]),
    "name with a zero byte": _gguf([{"name": b"a\0b"}, {}]),
    "name with an escape": _gguf([{"name": b"a\x1b[2J"}, {}]),
    "name that is a path": _gguf([{"name": b"../../etc/passwd"}, {}]),
    "tensor twice": _gguf([{}, {"name": b"a"}]),
    "no dimension": _gguf([{"ne": ()}, {}]),
    "five dimensions": _gguf([{"ne": (8, 1, 1, 1, 1)}, {}]),
    "a million dimensions": _gguf([{"n": 10**6}, {}]),
    "dimension 0": _gguf([{"ne": (8, 0)}, {"offset": 0}]),
    "dimension 2^63": _gguf([{"ne": (2**63,)}, {}]),
    "product that wraps to 8": _gguf([{"ne": (8, 2**61 + 1)}, {}]),
    "bytes that wrap": _gguf([{"ne": (2**62,)}, {}]),
    "Q4_K row of 100": _gguf([{"ne": (100,), "kind": 12}, {}]),
    "removed type 4": _gguf([{"kind": 4}, {}]),
    "type 999": _gguf([{"kind": 999}, {}]),
    "offset 2^64-32": _gguf([{"offset": 2**64 - 32}, {}]),
    "offset past the end": _gguf([{}, {"offset": 1 << 20}]),
    "offset not aligned": _gguf([{}, {"offset": 33}]),
    "overlapping tensors": _gguf([{}, {"offset": 0}]),
    "gap between tensors": _gguf([{}, {"offset": 64}], data=bytes(96)),
    "data cut off": _gguf(data=bytes(63)),
    "trailing bytes": _gguf(data=bytes(64) + b"PK\x03\x04" * 20),
}


def _st(header: Any, data: bytes = bytes(8), length: int | None = None) -> bytes:
    return make.safetensors_bytes(header, data, length)


def _entry(**change: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | change


_A = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
SAFETENSORS = {
    "empty file": b"",
    "header past the end": _st({"a": _entry()}, length=10**6),
    "header of 2^63 bytes": _st({"a": _entry()}, length=2**63),
    "not JSON": _st(b"{'a': 1}"),
    "not UTF-8": _st(b'{"\xff":' + _A[4:].encode() + b"}"),
    "leading blank": _st(f" {{{_A}}}".encode()),
    "JSON 100,000 deep": _st(b'{"a":' + b"[" * 100_000),
    "key twice": _st(f"{{{_A},{_A}}}".encode()),
    "field of an entry twice": _st(f'{{{_A[:-1]},"dtype":"F32"}}}}'.encode()),
    "entry with another field": _st({"a": _entry(x=1)}),
    "overlapping tensors": _st({"a": _entry(), "b": _entry(data_offsets=[4, 12])}, bytes(12)),
    "hole": _st({"a": _entry(data_offsets=[4, 12])}, bytes(12)),
    "data cut off": _st({"a": _entry()}, bytes(7)),
    "trailing bytes": _st({"a": _entry()}, bytes(9)),
    "shape that does not fit": _st({"a": _entry(shape=[3])}),
    "negative dimension": _st({"a": _entry(shape=[-2])}),
    "product that wraps": _st({"a": _entry(shape=[2**62, 4])}),
    "empty, and yet beyond any array": _st({"a": _entry(shape=[0, 2**61, 8], data_offsets=[0, 0])}, b""),
    "unknown dtype": _st({"a": _entry(dtype="F99")}),
    "dtype that is a list": _st({"a": _entry(dtype=["F32"])}),
    "metadata that is a number": _st({"__metadata__": {"k": 1}, "a": _entry()}),
    "F32 at an odd offset": _st(
        {"b": _entry(dtype="U8", shape=[1], data_offsets=[0, 1]), "a": _entry(data_offsets=[1, 9])}, bytes(9)
    ),
    "name that is empty": _st({"": _entry()}),
    "name with an escape": _st({"a\x1b[2J": _entry()}),
    "name of 300 characters": _st({"a" * 300: _entry()}),
}
