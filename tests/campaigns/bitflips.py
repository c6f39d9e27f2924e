"""One bit wrong: in the head of a file it is refused or changes no tensor's type, shape or place; in a merged folder's data `--verify` tells.

Names and metadata are texts and numbers of which every value is possible, so a flipped bit in them cannot be told from intention; the accepted flips
are counted by what they changed. In a GGUF a tensor is padded to the alignment, and a shape that is wrong by less than the padding fits as well: such
a flip is counted as `within the padding`. It needs a tensor whose bytes are no multiple of the alignment. `cases` are flips in heads: of generated
files, and of the embedded model's (all bits where there are enough cases); a hundredth as many are made in data.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refimpl import convert_model, gguf, safetensors
from refimpl.errors import RefimplError
from refimpl.tensors import TensorInfo
from refimpl.tiny import FP8_DIR, GGUF_DIR, GGUF_FILE
from tests.campaigns import Report, guard, keep, make

SHORT, LONG = 2400, 900_000


def run(cases: int, seed: int, folder: Path) -> Report:
    failures: list[str] = []
    facts: dict[str, object] = {}
    done = 0
    with guard.watched():
        for name, source, read in (("GGUF", GGUF_FILE, gguf.read), ("safetensors", FP8_DIR / "model.safetensors", safetensors.read)):
            counts: Counter[str] = Counter()
            number = 0
            while sum(counts.values()) < cases // 4:
                rng = random.Random(f"bitflips/{name}/{seed}/{number}")
                path = folder / f"x{source.suffix}"
                path.write_bytes(make.gguf_file(rng).write() if name == "GGUF" else make.safetensors_bytes(*make.safetensors_file(rng)))
                counts += _flip(path, read, None, failures, folder)
                number += 1
            facts[f"{name}, {number} generated files, every bit of the head"] = _told(counts)
            done += counts.total()
            counts = _flip(_sparse(source, folder, read), read, (cases // 4, random.Random(f"bitflips/{seed}")), failures, folder)
            facts[f"{name}, the embedded model's head"] = _told(counts)
            done += counts.total()
    flips = max(20, cases // 100)
    caught = _data(flips, random.Random(f"data/{seed}"), folder, failures)
    facts["data of a merged folder, told by verify"] = f"{caught} of {flips}"
    return Report(done + flips, failures, facts)


def _told(counts: Counter[str]) -> str:
    return f"{counts.total()} flips: " + ", ".join(f"{n} {what}" for what, n in counts.most_common())


def _sparse(source: Path, folder: Path, read: Callable[[Path], Any]) -> Path:
    """A file of the source's size with its head and no data."""
    head = min(t.offset for t in read(source).tensors.values())
    path = folder / source.name
    with open(source, "rb") as file, open(path, "wb") as copy:
        copy.write(file.read(head))
        copy.truncate(source.stat().st_size)
    return path


def _table(file: Any) -> list[tuple]:
    """Types and places in the order of the file."""
    return sorted((t.offset, t.nbytes, t.dtype, t.shape) for t in file.tensors.values())


def _flip(path: Path, read: Callable[[Path], Any], some: tuple[int, random.Random] | None, failures: list[str], folder: Path) -> Counter[str]:
    """Flips every bit of a file's head, or some, one at a time, and counts what became of them."""
    size, true = path.stat().st_size, read(path)
    end = min((t.offset for t in true.tensors.values()), default=size)
    bits: Any = range(8 * end)
    if some and some[0] < 8 * end:
        bits = some[1].sample(bits, some[0])
    counts: Counter[str] = Counter()
    whole = path.read_bytes()[:end]
    with open(path, "r+b", buffering=0) as file:
        for bit in bits:
            at = bit // 8
            file.seek(at)
            file.write(bytes([whole[at] ^ 1 << bit % 8]))
            found: list[Any] = []
            kind, why = guard.outcome(lambda: found.append(read(path)))
            what = kind if kind == "refused" else f"failed: {why}" if kind == "failed" else _change(true, found[0])
            counts[what] += 1
            if what.startswith(("failed", "SILENT")):
                failures.append(f"bit {bit % 8} of byte {at}: {what} [{keep(folder, f'bit-{bit}-{path.name}', path.read_bytes()[:1000000]).name}]")
            file.seek(at)
            file.write(whole[at : at + 1])
    return counts


def _change(true: Any, found: Any) -> str:
    """What an accepted flip has changed."""
    before, after = _table(true), _table(found)
    if before == after:
        if true.tensors.keys() != found.tensors.keys():
            return "another name"
        return "another metadata value" if repr(true.metadata) != repr(found.metadata) else "nothing that is read"
    changed = [(a, b) for a, b in zip(before, after) if a != b]
    if len(before) == len(after) and all(a[0] == b[0] and _padded(a[1], found) == _padded(b[1], found) for a, b in changed):
        return "the shape of a tensor without values" if all(a[1] == 0 for a, _ in changed) else "a shape, within the padding"
    return f"SILENT {changed[:2]}"


def _padded(nbytes: int, file: gguf.File | safetensors.Header) -> int:
    """Units of the alignment until the next tensor may start."""
    alignment = file.metadata.get("general.alignment", 32) if isinstance(file, gguf.File) else 1
    return -(-nbytes // alignment)


def _data(flips: int, rng: random.Random, folder: Path, failures: list[str]) -> int:
    """One bit at a time in the data of a merged folder; how many `verify` has told."""
    merged = folder / "merged"
    convert_model.write(convert_model.plan(FP8_DIR, GGUF_DIR), merged)
    tensors: list[TensorInfo] = [t for t in safetensors.read_folder(merged)[0].values() if t.nbytes]
    caught = 0
    for _ in range(flips):
        info = rng.choices(tensors, [t.nbytes for t in tensors])[0]
        at, bit = info.offset + rng.randrange(info.nbytes), 1 << rng.randrange(8)
        _toggle(info.path, at, bit)
        try:
            convert_model.verify(merged)
            failures.append(f"verify does not see bit {bit} of byte {at} of {info.path.name}")
        except RefimplError as error:
            caught += error.code == "E3201" and info.name in error.line()
        _toggle(info.path, at, bit)
    if caught < flips:
        failures.append(f"verify named {caught} of {flips} changed tensors")
    convert_model.verify(merged)
    return caught


def _toggle(path: Path, at: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ bit]))
