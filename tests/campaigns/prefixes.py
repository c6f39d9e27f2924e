"""Every file cut off: each prefix of the head of a GGUF and of a safetensors file, and one every 4 KiB of the
data, is refused.

Of `cases` half go to generated files, whose heads are cut at every byte, and half to the embedded model's:
spread evenly, or every prefix where there are enough. A file may lack the padding behind its last tensor,
which is no loss.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from refimpl.checkpoint import gguf, safetensors
from refimpl.tiny import FP8_DIR, GGUF_FILE
from tests.campaigns import WHOLE, Part, Report, guard, keep, make

SHORT, LONG = 1200, 400_000
STEP = 4096


def run(cases: int, seed: int, folder: Path, part: Part = WHOLE) -> Report:
    failures: list[str] = []
    counts = {"generated files, cut at every byte": Counter[str](), "the embedded model's": Counter[str]()}
    ours, embedded = counts.values()
    facts: dict[str, Any] = {}
    number = part.number
    with guard.watched():
        while ours.total() < part.size(cases // 2):
            rng = random.Random(f"prefixes/{seed}/{number}")
            if number % 2:
                path, read, data = (
                    folder / "x.safetensors",
                    safetensors.read,
                    make.safetensors_bytes(*make.safetensors_file(rng)),
                )
            else:
                path, read, data = folder / "x.gguf", gguf.read, make.gguf_file(rng).write()
            path.write_bytes(data)
            end = complete(path)
            head = min((t.offset for t in read(path).tensors.values()), default=end)
            ours += _cut(
                path,
                read,
                sorted({*range(head), *range(head, end, 97), end - 1}),
                f"file {number} of seed {seed}",
                failures,
                folder,
            )
            number += part.of
        for source, read, share in (
            (GGUF_FILE, gguf.read, cases // 4),
            (FP8_DIR / "model.safetensors", safetensors.read, cases // 4),
        ):
            path = folder / source.name
            path.write_bytes(source.read_bytes())
            end = complete(path)
            head = min(t.offset for t in read(path).tensors.values())
            every, step = max(1, -(-head // share)), STEP * max(1, -(-end // STEP // share))
            points = sorted({*range(0, head, every), *range(head, end, step), end - 1})
            facts[source.name] = (
                f"{len(points)} prefixes: every {every} of {head} bytes of its head, every {step} of "
                f"{end - head} bytes of data"
            )
            embedded += _cut(path, read, part.share(points), source.name, failures, folder)
    return Report(ours.total() + embedded.total(), failures, counts, facts)


def complete(path: Path) -> int:
    """Bytes a file needs: to the end of its last tensor, or of its head."""
    if path.suffix == ".gguf":
        return max(t.offset + t.nbytes for t in gguf.read(path).tensors.values())
    return path.stat().st_size


def _cut(
    path: Path,
    read: Callable[[Path], object],
    points: Sequence[int],
    what: str,
    failures: list[str],
    folder: Path,
) -> Counter[str]:
    """`points` ascend."""
    counts: Counter[str] = Counter()
    for n in reversed(points):  # one file, shorter and shorter
        os.truncate(path, n)
        kind, why = guard.outcome(lambda: read(path))
        if kind != "refused":
            failures.append(
                f"{what}: the first {n} bytes are {kind} {why} "
                f"[{keep(folder, f'prefix-{n}-{path.name}', path.read_bytes()).name}]"
            )
        counts[kind] += 1
    return counts
