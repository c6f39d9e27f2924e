"""Valid files with random contents, in parts that can be changed before they are written, and the changes."""

from __future__ import annotations

import copy
import json
import math
import random
import struct
from typing import Any, NamedTuple

from refimpl import formats
from refimpl.checkpoint import gguf, safetensors
from tests.campaigns import words

GGML_TYPES = sorted(formats.FORMATS.keys() - {15})  # Q8_K is no type of files
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
BOUNDS = (
    0,
    1,
    2,
    3,
    4,
    5,
    13,
    31,
    32,
    64,
    255,
    256,
    999,
    2**16,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**32 + 4,
)
BOUNDS += (2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1)


class Part(NamedTuple):
    """A piece of a GGUF file: `kind` is a struct code, "s" for a string with its length, "r" for raw bytes,
    "p" for padding to `value`.
    """

    kind: str
    value: Any


class Gguf(NamedTuple):
    """A file to write. `head` holds magic, version and the two counts; then groups of parts, a group an
    entry.
    """

    head: list[Part]
    keys: list[list[Part]]
    tensors: list[list[Part]]
    alignment: int
    data: bytes

    def write(self) -> bytes:
        out, size = [], 0
        for part in [
            *self.head,
            *(p for g in (*self.keys, *self.tensors) for p in g),
            Part("p", self.alignment),
            Part("r", self.data),
        ]:
            out.append(_packed(part, size))
            size += len(out[-1])
        return b"".join(out)


def _packed(part: Part, size: int) -> bytes:
    kind, value = part
    if kind == "s":
        return struct.pack("<Q", len(value)) + value
    if kind == "r":
        return value
    if kind == "p":
        return bytes(-size % value)
    width = struct.calcsize("<" + kind)
    if kind in "fd?":
        return struct.pack("<" + kind, value)
    return (value % (1 << 8 * width)).to_bytes(width, "little")


def tensor_table(rng: random.Random, most: int = 5) -> list[tuple[str, int, tuple[int, ...]]]:
    """(name, ggml type, shape) of a few small tensors."""
    table = []
    for i in range(rng.randint(1, most)):
        kind = rng.choice(GGML_TYPES)
        weights = formats.get(kind).WEIGHTS
        shape = (
            *(rng.randint(1, 3) for _ in range(rng.randint(0, 3))),
            weights * rng.randint(1, 3 if weights > 1 else 40),
        )
        table.append(
            (rng.choice(("blk.{}.ffn_up_exps.weight", "t{}", "output_norm.{}", "é{}")).format(i), kind, shape)
        )
    return table


def typed(rng: random.Random, kind: int) -> list[Part]:
    """A metadata value of one type, without the type: a number, a string, or an array of either."""
    if kind == gguf.STRING:
        return [Part("s", rng.choice(("", "a", "deepseek2", "中文", "x" * 200)).encode())]
    if kind != gguf.ARRAY:
        code = NUMBERS[kind]
        return [
            Part(
                code,
                rng.random()
                if code in "fd"
                else bool(rng.getrandbits(1))
                if code == "?"
                else rng.getrandbits(8 * struct.calcsize(code)),
            )
        ]
    element = rng.choice((*NUMBERS, gguf.STRING))
    n = rng.choice((0, 1, 2, 7))
    return [Part("I", element), Part("Q", n), *(p for _ in range(n) for p in typed(rng, element))]


def gguf_file(rng: random.Random, model: bool = False) -> Gguf:
    """A valid file; with `model` its metadata are those of a DeepSeek model."""
    alignment = rng.choice((32, 32, 32, 8, 16, 64, 256))
    keys = [[Part("s", b"general.architecture"), Part("I", gguf.STRING), Part("s", b"deepseek2")]]
    for i in range(rng.randint(0, 6)):
        kind = rng.choice((*NUMBERS, gguf.STRING, gguf.ARRAY, gguf.ARRAY))
        keys.append([Part("s", f"key.{i}".encode()), Part("I", kind), *typed(rng, kind)])
    if model:
        keys += [
            [Part("s", f"deepseek2.{k}".encode()), Part("I", kind), Part(NUMBERS[kind], v)]
            for k, kind, v in MODEL
        ]
    if alignment != 32 or rng.random() < 0.2:
        keys.insert(
            rng.randint(0, len(keys)), [Part("s", b"general.alignment"), Part("I", 4), Part("I", alignment)]
        )
    tensors, data = [], b""
    for name, kind, shape in tensor_table(rng):
        ne = tuple(reversed(shape))
        tensors.append(
            [
                Part("s", name.encode()),
                Part("I", len(ne)),
                *(Part("Q", n) for n in ne),
                Part("I", kind),
                Part("Q", len(data)),
            ]
        )
        data += rng.randbytes(formats.nbytes(kind, shape))
        data += bytes(-len(data) % alignment)
    head = [
        Part("r", b"GGUF"),
        Part("I", rng.choice((3, 3, 3, 2))),
        Part("Q", len(tensors)),
        Part("Q", len(keys)),
    ]
    return Gguf(head, keys, tensors, alignment, data)


# (key, type, value) of deepseek2's metadata, small.
MODEL = (
    ("block_count", 4, 4),
    ("context_length", 4, 4096),
    ("embedding_length", 4, 256),
    ("feed_forward_length", 4, 512),
    ("vocab_size", 4, 512),
    ("attention.head_count", 4, 4),
    ("attention.head_count_kv", 4, 1),
    ("attention.q_lora_rank", 4, 64),
    ("attention.kv_lora_rank", 4, 64),
    ("attention.key_length", 4, 96),
    ("attention.value_length", 4, 64),
    ("rope.dimension_count", 4, 32),
    ("rope.freq_base", 6, 10000.0),
    ("attention.layer_norm_rms_epsilon", 6, 1e-6),
    ("expert_count", 4, 8),
    ("expert_used_count", 4, 2),
    ("expert_shared_count", 4, 1),
    ("expert_feed_forward_length", 4, 256),
    ("expert_weights_scale", 6, 2.5),
    ("expert_weights_norm", 7, True),
    ("expert_gating_func", 4, 2),
    ("leading_dense_block_count", 4, 1),
)


def safetensors_file(rng: random.Random) -> tuple[dict[str, Any], bytes]:
    """Header and data of a valid file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "k": "é"}} if rng.random() < 0.5 else {}
    # The largest values first, so that every tensor is aligned.
    kinds = sorted(
        (rng.choice(list(safetensors.DTYPES)) for _ in range(rng.randint(0, 5))),
        key=lambda k: -safetensors.DTYPES[k].itemsize,
    )
    at = 0
    for i, kind in enumerate(kinds):
        shape = [rng.choice((0, 1, 2, 3, 5)) for _ in range(rng.randint(0, 3))]
        size = math.prod(shape) * safetensors.DTYPES[kind].itemsize
        header[rng.choice(("model.layers.{}.w", "t{}", "é{}")).format(i)] = {
            "dtype": kind,
            "shape": shape,
            "data_offsets": [at, at + size],
        }
        at += size
    return header, rng.randbytes(at)


def safetensors_bytes(header: dict[str, Any] | bytes, data: bytes, length: int | None = None) -> bytes:
    text = (
        header
        if isinstance(header, bytes)
        else json.dumps(header, ensure_ascii=False).encode("utf-8", "surrogatepass")
    )
    text += b" " * (-len(text) % 8)
    return ((len(text) if length is None else length) % 2**64).to_bytes(8, "little") + text + data


# --- changes ------------------------------------------------------------------------------------------------


def number(rng: random.Random, value: int) -> int:
    """Another number: a bound of some type, or a neighbour."""
    return rng.choice(
        (
            rng.choice(BOUNDS),
            value + 1,
            value - 1,
            value * 2,
            value + 32,
            -value,
            value ^ 1 << rng.randrange(64),
        )
    )


def changed(rng: random.Random, file: Gguf) -> Gguf:
    """One field, entry or count of a GGUF changed."""
    head, keys, tensors = list(file.head), [list(g) for g in file.keys], [list(g) for g in file.tensors]
    groups = rng.choice([g for g in ([head], keys, tensors, tensors) if g])
    i = rng.randrange(len(groups))
    what = rng.random()
    if what < 0.75 or groups[0] is head:
        group = groups[i]
        j = rng.randrange(len(group))
        group[j] = _other(rng, group[j])
    elif what < 0.85:
        groups.append(list(groups[i]))
    elif what < 0.95:
        del groups[i]
    else:
        j = rng.randrange(len(groups))
        groups[i], groups[j] = groups[j], groups[i]
    if rng.random() < 0.5 and groups[0:1] != [head]:  # counts that say so, or do not
        head[2], head[3] = Part("Q", len(tensors)), Part("Q", len(keys))
    alignment = rng.choice(BOUNDS[1:12]) if rng.random() < 0.02 else file.alignment
    data = file.data if rng.random() < 0.95 else file.data[: rng.randint(0, len(file.data))]
    return Gguf(head, keys, tensors, alignment, data)


def _other(rng: random.Random, part: Part) -> Part:
    kind, value = part
    if rng.random() < 0.05:
        return Part("r", rng.randbytes(rng.choice((0, 1, 4, 8, 13))))
    if kind in "sr":
        return Part(
            kind,
            rng.choice(words.TEXTS)
            if rng.random() < 0.6
            else rng.choice((value[:-1], value + b"x", rng.randbytes(len(value)))),
        )
    if kind in "fd":
        return Part(kind, rng.choice((0.0, -1.0, math.nan, math.inf, 1e38)))
    return Part("B", rng.randrange(256)) if kind == "?" else Part(kind, number(rng, value))


def bytes_changed(rng: random.Random, data: bytes) -> bytes:
    """A few bits, bytes or stretches of any file changed."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(out)) if out else 0
        # Heads are where it matters.
        at = at % 64 if rng.random() < 0.3 else at
        at = min(at, max(0, len(out) - 1))
        what = rng.randrange(6)
        if what == 0 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif what == 1 and out:
            out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif what == 2:
            out[at:at] = rng.randbytes(rng.choice((1, 4, 8, 32)))
        elif what == 3:
            del out[at : at + rng.choice((1, 4, 8, 32))]
        elif what == 4:
            out[at:at] = out[at : at + rng.choice((4, 8, 64))]
        else:
            del out[at:]
    return bytes(out)


def _places(value: Any, into: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        into.append((value, key))
        _places(value[key], into)
    return into


def json_changed(rng: random.Random, value: Any, times: int = 1) -> Any:
    """A value of JSON with values in it replaced, removed, renamed or repeated. `value` is not touched."""
    root = [json.loads(json.dumps(value))]
    for _ in range(times):
        places = _places(root, [])
        container, key = rng.choice(places[:200]) if rng.random() < 0.5 else rng.choice(places)
        what = rng.random()
        if what < 0.6:
            old = container[key]
            near = isinstance(old, int) and not isinstance(old, bool) and rng.random() < 0.5
            container[key] = number(rng, old) if near else copy.deepcopy(rng.choice(words.VALUES))
        elif what < 0.75 and container is not root:
            del container[key]
        elif what < 0.85 and isinstance(container, dict):
            container[
                rng.choice(("", "x", "__metadata__", "\ud800", "\x1b[2J", "a" * 300, str(key) + "x"))
            ] = container.pop(key)
        else:
            container[key] = rng.choice(
                ([container[key]], {"a": container[key]}, [copy.deepcopy(container[key]), container[key]])
            )
    return root[0]


def json_bytes(rng: random.Random, value: Any) -> bytes:
    """JSON text, at times with what no dump writes: deep nesting, huge numbers, keys that are there twice,
    bytes that are not text.
    """
    text = json.dumps(value, ensure_ascii=rng.random() < 0.3)
    text = text.replace(f'"{words.DEEP}"', "[" * 5000 + "]" * 5000).replace(f'"{words.LONG}"', "9" * 5000)
    if rng.random() < 0.05 and text.startswith('{"'):
        end = text.index('"', 1) + 1
        text = (
            text[:end]
            + text[end : text.index(",", end) if "," in text[end:] else len(text) - 1]
            + ","
            + text[1:]
        )
    data = text.encode("utf-8", "surrogatepass")
    return bytes_changed(rng, data) if rng.random() < 0.2 else data
