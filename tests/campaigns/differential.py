"""Valid files with random contents, read here and by others: gguf-py, ggml and the package safetensors must
see the same tensors; and what they let through that is refused here.

Half of the cases are GGUF (every tenth a split model), half safetensors (every fourth written by the
package). ggml comes with llama_cpp (extra `peers`) and is left out where that is not installed.

    python -m tests.campaigns.differential FILE ...     ggml's word on files, a line each, for the campaign:
    it may end the process that asks
"""

from __future__ import annotations

import contextlib
import ctypes
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf as gguf_py
import numpy as np
import safetensors as package
from safetensors import numpy as safetensors_numpy

from refimpl import formats
from refimpl.bench import peers
from refimpl.checkpoint import gguf, safetensors
from refimpl.errors import UnsupportedError
from tests.campaigns import WHOLE, Part, Report, guard, keep, make, malformed

SHORT, LONG = 600, 40_000
Seen = dict[
    str, tuple[str, tuple[int, ...], int, bytes]
]  # type, shape, offset from the start of the file, bytes; by name


def run(cases: int, seed: int, folder: Path, part: Part = WHOLE) -> Report:
    """Generated files, then the list of malformed ones."""
    failures: list[str] = []
    agreed: Counter[str] = Counter()
    readers = {"gguf-py": read_gguf_py} | ({"ggml": read_ggml} if has_ggml() else {})
    numbers = part.share(range(cases))
    for i in numbers:
        rng = random.Random(f"differential/{seed}/{i}")
        kind, compare = (
            ("safetensors", _safetensors)
            if i % 2
            else ("split GGUF", _split)
            if i % 20 == 0
            else ("GGUF", _gguf)
        )
        try:
            differences = compare(rng, folder, readers)
        except Exception as error:
            differences = [f"{type(error).__name__}: {error}"[:200]]
        agreed[kind] += not differences
        failures += [f"{kind} case {i} of seed {seed}: {d}" for d in differences]
        if differences:
            keep(
                folder, f"{kind}-{seed}-{i}", (folder / ("x.safetensors" if i % 2 else "x.gguf")).read_bytes()
            )
    facts = {"readers": ", ".join(_readers(readers))} | (
        _malformed(folder, failures) if part.number == 0 else {}
    )
    return Report(len(numbers), failures, {"files on which all agree": agreed}, facts)


def _readers(readers: dict[str, Any]) -> Iterator[str]:
    for name in ("gguf", "safetensors", "llama_cpp_python"):
        if name != "llama_cpp_python" or "ggml" in readers:
            yield f"{name} {version(name)}"
    if "ggml" not in readers:
        yield "no ggml, since llama_cpp is not installed"


# --- valid files --------------------------------------------------------------------------------------------


def read_ours(path: Path) -> Seen:
    return {
        t.name: (t.dtype, t.shape, t.offset, gguf.view(t).data.tobytes())
        for t in gguf.read(path).tensors.values()
    }


def read_gguf_py(path: Path) -> Seen:
    with np.errstate(over="ignore"):
        tensors = gguf_py.GGUFReader(path).tensors
    return {
        t.name: (
            t.tensor_type.name,
            tuple(int(n) for n in reversed(t.shape)),
            int(t.data_offset),
            t.data.tobytes(),
        )
        for t in tensors
    }


class _Params(ctypes.Structure):
    """gguf_init_params."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.POINTER(ctypes.c_void_p)))


class _Tensor(ctypes.Structure):
    """The head of ggml_tensor."""

    _fields_ = (("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4))


_P, _N = ctypes.c_void_p, ctypes.c_int64
_GGUF = {
    "gguf_init_from_file": (_P, ctypes.c_char_p, _Params),
    "gguf_free": (None, _P),
    "gguf_get_n_tensors": (_N, _P),
    "gguf_get_n_kv": (_N, _P),
    "gguf_get_key": (ctypes.c_char_p, _P, _N),
    "gguf_get_tensor_name": (ctypes.c_char_p, _P, _N),
    "gguf_get_data_offset": (ctypes.c_size_t, _P),
    "gguf_get_tensor_offset": (ctypes.c_size_t, _P, _N),
    "gguf_get_tensor_size": (ctypes.c_size_t, _P, _N),
    "ggml_get_tensor": (_P, _P, ctypes.c_char_p),
    "ggml_type_name": (ctypes.c_char_p, ctypes.c_int),
}


def has_ggml() -> bool:
    with contextlib.suppress(UnsupportedError):
        g = peers.library()
        for name, (result, *args) in _GGUF.items():
            function = getattr(g, name)
            function.restype, function.argtypes = result, args
        return True
    return False


def read_ggml(path: Path) -> Seen:
    """ValueError where ggml refuses the file."""
    g, context = peers.library(), ctypes.c_void_p()
    file = g.gguf_init_from_file(str(path).encode(), _Params(True, ctypes.pointer(context)))
    if not file:
        raise ValueError("refused")
    data, start, seen = path.read_bytes(), g.gguf_get_data_offset(file), {}
    for i in range(g.gguf_get_n_tensors(file)):
        name = g.gguf_get_tensor_name(file, i)
        tensor = ctypes.cast(g.ggml_get_tensor(context, name), ctypes.POINTER(_Tensor)).contents
        at, size = start + g.gguf_get_tensor_offset(file, i), g.gguf_get_tensor_size(file, i)
        seen[name.decode()] = (
            g.ggml_type_name(tensor.type).decode().upper(),
            tuple(reversed(tensor.ne)),
            at,
            data[at : at + size],
        )
    g.gguf_free(file)
    g.ggml_free(context)
    return seen


def _same(name: str, ours: Seen, theirs: Seen) -> list[str]:
    """Differences in words. ggml fills shapes up to four dimensions with ones."""
    if ours.keys() != theirs.keys():
        return [f"{name} has the tensors {sorted(theirs)}, we {sorted(ours)}"]
    found = []
    for tensor, (kind, shape, *rest) in ours.items():
        other, filled, *others = theirs[tensor]
        full = (1,) * (4 - len(shape)) + shape if name == "ggml" else shape
        if (kind, full, rest) != (other, filled, others):
            found.append(
                f"{name} has {tensor} as {other} {filled} at {others[0]}, we {kind} {shape} at {rest[0]}"
            )
    return found


def _gguf(rng: random.Random, folder: Path, readers: dict[str, Callable[[Path], Seen]]) -> list[str]:
    path = folder / "x.gguf"
    file = make.gguf_file(rng)
    path.write_bytes(file.write())
    ours = read_ours(path)
    found = [d for name, read in readers.items() for d in _same(name, ours, read(path))]
    if {t: s[3] for t, s in ours.items()} != _written(file):
        found.append("the bytes are not those written")
    return found + _metadata(path)


def _written(file: make.Gguf) -> dict[str, bytes]:
    """The bytes of each tensor, by what the generator put down."""
    out = {}
    for name, n, *rest in file.tensors:
        ne, (kind, offset) = [p.value for p in rest[: n.value]], [p.value for p in rest[n.value :]]
        out[name.value.decode()] = file.data[offset : offset + formats.nbytes(kind, tuple(reversed(ne)))]
    return out


def _metadata(path: Path) -> list[str]:
    ours, theirs = (
        gguf.read(path).metadata,
        {k: f for k, f in gguf_py.GGUFReader(path).fields.items() if not k.startswith("GGUF.")},
    )
    if ours.keys() != theirs.keys():
        return [f"keys are {sorted(ours)} and {sorted(theirs)}"]
    return [
        f"{k} is {v!r} and {theirs[k].contents()!r}"
        for k, v in ours.items()
        if repr(theirs[k].contents() or type(v)()) != repr(v)
    ]


def _split(rng: random.Random, folder: Path, readers: dict[str, Callable[[Path], Seen]]) -> list[str]:
    count, names = rng.randint(2, 3), iter(range(99))
    paths = [folder / f"m-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
    tables = [make.tensor_table(rng, 3) for _ in paths]
    total = sum(map(len, tables))
    for i, (path, table) in enumerate(zip(paths, tables)):
        entries = [
            gguf.Entry(f"t{next(names)}", kind, shape, _random_bytes(rng, formats.nbytes(kind, shape)))
            for _, kind, shape in table
        ]
        gguf.write(
            path,
            {
                "general.architecture": "deepseek2",
                "split.no": i,
                "split.count": count,
                "split.tensors.count": total,
            },
            entries,
        )
    (folder / "x.gguf").write_bytes(paths[0].read_bytes())
    whole = gguf.read_all(rng.choice(paths)).tensors
    ours: Seen = {t.name: (t.dtype, t.shape, t.offset, gguf.view(t).data.tobytes()) for t in whole.values()}
    found = [
        d
        for name, read in readers.items()
        for d in _same(name, ours, {k: v for p in paths for k, v in read(p).items()})
    ]
    for path in paths:
        path.unlink()
    return found


def _random_bytes(rng: random.Random, n: int) -> Callable[[], list[bytes]]:
    data = rng.randbytes(n)
    return lambda: [data]


def _safetensors(rng: random.Random, folder: Path, readers: object) -> list[str]:
    path = folder / "x.safetensors"
    header, data = make.safetensors_file(rng)
    metadata = header.pop("__metadata__", None)
    if rng.random() < 0.25 and all(v["dtype"] in _NUMPY for v in header.values()):
        whole = safetensors_numpy.save({k: _array(v, data) for k, v in header.items()}, metadata)
    else:
        whole = make.safetensors_bytes(({"__metadata__": metadata} if metadata else {}) | header, data)
    path.write_bytes(whole)
    file = safetensors.read(path)
    ours: dict[str, Any] = {
        t.name: (t.dtype, list(t.shape), safetensors.view(t).tobytes()) for t in file.tensors.values()
    }
    theirs = {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in package.deserialize(whole)}
    found = [] if ours == theirs else [f"safetensors sees {theirs}, we {ours}"]
    with package.safe_open(path, "np") as opened:
        if (opened.metadata() or {}) != file.metadata:
            found.append(f"metadata are {opened.metadata()} and {file.metadata}")
    return found


# The types that the package's numpy side has.
_NUMPY = {"BOOL": "?"} | {
    k: v.str
    for k, v in safetensors.DTYPES.items()
    if k in ("U8", "I8", "I16", "U16", "F16", "I32", "U32", "F32", "I64", "U64", "F64")
}


def _array(entry: dict[str, Any], data: bytes) -> np.ndarray:
    raw = np.frombuffer(data[slice(*entry["data_offsets"])], np.uint8)
    return (raw & 1 if entry["dtype"] == "BOOL" else raw).view(_NUMPY[entry["dtype"]]).reshape(entry["shape"])


# --- files that are wrong -----------------------------------------------------------------------------------


def _malformed(folder: Path, failures: list[str]) -> dict[str, str]:
    """Every malformed file must be refused here; who accepts it is told."""
    by: dict[str, list[str]] = {"gguf-py": [], "ggml": [], "safetensors": []}
    paths = {}
    with guard.watched():
        for name, data in malformed.GGUF.items():
            paths[name] = folder / f"bad-{len(paths)}.gguf"
            paths[name].write_bytes(data)
            _judge(name, lambda n=name: gguf.read(paths[n]), failures)
            if guard.outcome(lambda n=name: read_gguf_py(paths[n]))[0] == "accepted":
                by["gguf-py"].append(name)
        for name, data in malformed.SAFETENSORS.items():
            path = folder / "bad.safetensors"
            path.write_bytes(data)
            _judge(name, lambda p=path: safetensors.read(p), failures)
            if guard.outcome(lambda d=data: package.deserialize(d))[0] == "accepted":
                by["safetensors"].append(name)
    if has_ggml():
        by["ggml"] = [name for name, word in ask_ggml(paths).items() if word != "refused"]
    else:
        del by["ggml"]
    total = len(malformed.GGUF)
    counts = {"gguf-py": total, "ggml": total, "safetensors": len(malformed.SAFETENSORS)}
    return {
        f"malformed, refused here, accepted by {k}": f"{len(v)} of {counts[k]}: {'; '.join(v)}"
        for k, v in by.items()
    }


def _judge(name: str, read: Callable[[], object], failures: list[str]) -> None:
    kind, why = guard.outcome(read)
    if kind != "refused":
        failures.append(f"malformed {name}: {kind} {why}")


def ask_ggml(paths: dict[str, Path]) -> dict[str, str]:
    """ "accepted", "refused", or "died" where the process that asked did."""
    words: dict[str, str] = {}
    left = list(paths)
    while left:
        command = [sys.executable, "-m", "tests.campaigns.differential", *(str(paths[n]) for n in left)]
        said = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout.split()
        words |= dict(zip(left, said))
        if len(said) < len(left):
            words[left[len(said)]] = "died"
        left = left[len(said) + 1 :]
    return words


def main(argv: list[str]) -> None:
    has_ggml()
    for path in argv:
        try:
            read_ggml(Path(path))
            print("accepted", flush=True)
        except ValueError:
            print("refused", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
