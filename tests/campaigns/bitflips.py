"""One bit wrong: in the head of a file it is refused or changes no tensor's type, shape or place; in a merged
folder's data `--verify` tells.

Names and metadata are texts and numbers of which every value is possible, so a flipped bit in them cannot be
told from intention; the accepted flips are counted by what they changed. In a GGUF a tensor is padded to the
alignment, and a type or shape whose bytes end within it fits as well: such a flip is counted as `within the
padding`. It needs a tensor whose bytes are no multiple of the alignment. `cases` are flips in heads: of
generated files, and of the embedded model's (all bits where there are enough cases); a hundredth as many are
made in data.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from refimpl import convert_model
from refimpl.checkpoint import gguf, safetensors
from refimpl.errors import RefimplError
from refimpl.tensors import TensorInfo
from refimpl.tiny import FP8_DIR, GGUF_DIR, GGUF_FILE
from tests.campaigns import WHOLE, Part, Report, guard, keep, make

SHORT, LONG = 2400, 900_000


def run(cases: int, seed: int, folder: Path, part: Part = WHOLE) -> Report:
    failures: list[str] = []
    counts: dict[str, Counter[str]] = {}
    facts: dict[str, Any] = {}
    with guard.watched():
        for name, source, read in (
            ("GGUF", GGUF_FILE, gguf.read),
            ("safetensors", FP8_DIR / "model.safetensors", safetensors.read),
        ):
            generated = counts[f"{name}, generated files, every bit of the head"] = Counter()
            number = part.number
            while generated.total() < part.size(cases // 4):
                rng = random.Random(f"bitflips/{name}/{seed}/{number}")
                path = folder / f"x{source.suffix}"
                path.write_bytes(
                    make.gguf_file(rng).write()
                    if name == "GGUF"
                    else make.safetensors_bytes(*make.safetensors_file(rng))
                )
                generated += _flip(
                    path,
                    read,
                    range(8 * _head(path, read)),
                    f"file {number} of seed {seed}",
                    failures,
                    folder,
                )
                number += part.of
            path = _sparse(source, folder, read)
            bits: Sequence[int] = range(8 * _head(path, read))
            some = (
                bits
                if cases // 4 >= len(bits)
                else sorted(random.Random(f"bitflips/{seed}").sample(bits, cases // 4))
            )
            facts[f"bits of the embedded {name}'s head"] = f"{len(some)} of {len(bits)}"
            counts[f"{name}, the embedded model's head"] = _flip(
                path, read, part.share(some), source.name, failures, folder
            )
    flips = part.share(range(max(20, cases // 100)))
    counts["data of a merged folder"] = _data(flips, seed, folder, failures)
    return Report(sum(map(Counter.total, counts.values())), failures, counts, facts)


def _head(path: Path, read: Callable[[Path], Any]) -> int:
    """Bytes before the first tensor's."""
    return min((t.offset for t in read(path).tensors.values()), default=path.stat().st_size)


def _sparse(source: Path, folder: Path, read: Callable[[Path], Any]) -> Path:
    """A file of the source's size with its head and no data."""
    head, path = _head(source, read), folder / source.name
    with open(source, "rb") as file, open(path, "wb") as copy:
        copy.write(file.read(head))
        copy.truncate(source.stat().st_size)
    return path


def _table(file: Any) -> list[tuple]:
    """Types and places in the order of the file."""
    return sorted((t.offset, t.nbytes, t.dtype, t.shape) for t in file.tensors.values())


def _flip(
    path: Path, read: Callable[[Path], Any], bits: Sequence[int], told: str, failures: list[str], folder: Path
) -> Counter[str]:
    """Flips bits of a file's head, one at a time, and counts what became of them. `told` names the file in
    failures.
    """
    true, counts = read(path), Counter[str]()
    whole = path.read_bytes()[: _head(path, read)]
    with open(path, "r+b", buffering=0) as file:
        for bit in bits:
            at = bit // 8
            file.seek(at)
            file.write(bytes([whole[at] ^ 1 << bit % 8]))
            found: list[Any] = []
            kind, why = guard.outcome(lambda: found.append(read(path)))
            what = (
                kind
                if kind == "refused"
                else f"failed: {why}"
                if kind == "failed"
                else _change(true, found[0])
            )
            counts[what] += 1
            if what.startswith(("failed", "SILENT")):
                kept = keep(folder, f"bit-{bit}-{told.replace(' ', '-')}", path.read_bytes()[:1000000])
                failures.append(f"{told}, bit {bit % 8} of byte {at}: {what} [{kept.name}]")
            file.seek(at)
            file.write(whole[at : at + 1])
    return counts


def _change(true: Any, found: Any) -> str:
    """What an accepted flip has changed."""
    before, after = _table(true), _table(found)
    if before == after:
        if true.tensors.keys() != found.tensors.keys():
            return "another name"
        return (
            "another metadata value"
            if repr(true.metadata) != repr(found.metadata)
            else "nothing that is read"
        )
    changed = [(a, b) for a, b in zip(before, after) if a != b]
    if len(before) == len(after) and all(
        a[0] == b[0] and _padded(a[1], found) == _padded(b[1], found) for a, b in changed
    ):
        return (
            "the shape of a tensor without values"
            if all(a[1] == 0 for a, _ in changed)
            else "a type or shape within the padding"
        )
    return f"SILENT {changed[:2]}"


def _padded(nbytes: int, file: gguf.File | safetensors.Header) -> int:
    """Units of the alignment until the next tensor may start."""
    alignment = file.metadata.get("general.alignment", 32) if isinstance(file, gguf.File) else 1
    return -(-nbytes // alignment)


def _data(flips: Sequence[int], seed: int, folder: Path, failures: list[str]) -> Counter[str]:
    """One bit at a time in the data of a merged folder; whether `verify` has told."""
    merged = folder / "merged"
    convert_model.write(convert_model.plan(FP8_DIR, GGUF_DIR), merged)
    tensors: list[TensorInfo] = [t for t in safetensors.read_folder(merged)[0].values() if t.nbytes]
    counts: Counter[str] = Counter()
    for flip in flips:
        rng = random.Random(f"data/{seed}/{flip}")
        info = rng.choices(tensors, [t.nbytes for t in tensors])[0]
        at, bit = info.offset + rng.randrange(info.nbytes), 1 << rng.randrange(8)
        _toggle(info.path, at, bit)
        try:
            convert_model.verify(merged)
            line = "nothing"
        except RefimplError as error:
            line = error.line()
        told = "E3201" in line and f" {info.name} " in line
        counts["tensor named by verify" if told else "not told"] += 1
        if not told:
            failures.append(
                f"bit {bit} of byte {at} of {info.path.name}, tensor {info.name}: verify says {line}"
            )
        _toggle(info.path, at, bit)
    convert_model.verify(merged)
    return counts


def _toggle(path: Path, at: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ bit]))
