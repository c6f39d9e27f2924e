"""Every file cut off: each prefix of the head of a GGUF and of a safetensors file, and one every 4 KiB of the data, is refused.

Of `cases` half go to generated files, whose heads are cut at every byte, and half to the embedded model's: spread evenly, or every prefix where there
are enough. A file may lack the padding behind its last tensor, which is no loss.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable
from pathlib import Path

from refimpl import gguf, safetensors
from refimpl.tiny import FP8_DIR, GGUF_FILE
from tests.campaigns import Report, guard, keep, make

SHORT, LONG = 1200, 400_000
STEP = 4096


def run(cases: int, seed: int, folder: Path) -> Report:
    failures: list[str] = []
    done, generated = 0, 0
    with guard.watched():
        while done < cases // 2:
            rng = random.Random(f"prefixes/{seed}/{generated}")
            if generated % 2:
                path, read, data = folder / "x.safetensors", safetensors.read, make.safetensors_bytes(*make.safetensors_file(rng))
            else:
                path, read, data = folder / "x.gguf", gguf.read, make.gguf_file(rng).write()
            path.write_bytes(data)
            end = complete(path)
            head = min((t.offset for t in read(path).tensors.values()), default=end)
            done += _cut(path, read, {*range(head), *range(head, end, 97), end - 1}, f"file {generated} of seed {seed}", failures, folder)
            generated += 1
        facts: dict[str, object] = {"generated files, cut at every byte": f"{generated}, {done} prefixes"}
        for source, read, share in ((GGUF_FILE, gguf.read, cases // 4), (FP8_DIR / "model.safetensors", safetensors.read, cases // 4)):
            path = folder / source.name
            path.write_bytes(source.read_bytes())
            end = complete(path)
            head = min(t.offset for t in read(path).tensors.values())
            every, step = max(1, -(-head // share)), STEP * max(1, -(-end // STEP // share))
            points = {*range(0, head, every), *range(head, end, step), end - 1}
            facts[source.name] = f"{len(points)} prefixes: every {every} of {head} bytes of its head, every {step} of {end - head} bytes of data"
            done += _cut(path, read, points, source.name, failures, folder)
    return Report(done, failures, facts)


def complete(path: Path) -> int:
    """Bytes a file needs: to the end of its last tensor, or of its head."""
    if path.suffix == ".gguf":
        return max(t.offset + t.nbytes for t in gguf.read(path).tensors.values())
    return path.stat().st_size


def _cut(path: Path, read: Callable[[Path], object], points: Iterable[int], what: str, failures: list[str], folder: Path) -> int:
    count = 0
    for n in sorted(points, reverse=True):  # one file, shorter and shorter
        os.truncate(path, n)
        kind, why = guard.outcome(lambda: read(path))
        if kind != "refused":
            failures.append(f"{what}: the first {n} bytes are {kind} {why} [{keep(folder, f'prefix-{n}-{path.name}', path.read_bytes()).name}]")
        count += 1
    return count
