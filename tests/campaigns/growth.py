"""What a process that lives long would gather: models that are loaded, asked and dropped, and answers of one
model. Resident memory, mappings of files and open descriptors stay what they were.

`cases` models are loaded on the cpu backend, and ten times as many answers of four tokens given by one. What
the first tenth makes (compiled kernels, caches of a bounded size, the allocator's room) is where it is
measured from.
"""

from __future__ import annotations

import gc
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from refimpl import convert_model
from refimpl.loading.opening import open_model
from refimpl.tiny import FP8_DIR, GGUF_DIR
from tests.campaigns import WHOLE, Part, Report

SHORT, LONG = 5, 200
ROOM = 16 << 20  # bytes that resident memory may vary by
PROC = Path("/proc/self")


def state(folder: Path) -> tuple[int, int, int]:
    """Resident bytes, mappings of files in `folder`, open descriptors; zeros where nothing tells."""
    gc.collect()
    if not (PROC / "statm").exists():
        return 0, 0, 0
    resident = int((PROC / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    mapped = sum(str(folder) in line for line in (PROC / "maps").read_text().splitlines())
    return resident, mapped, len(os.listdir(PROC / "fd"))


def run(cases: int, seed: int, folder: Path, part: Part = WHOLE) -> Report:
    """Loads, then answers."""
    model, rng = folder / "model", random.Random(f"growth/{seed}/{part.number}")
    convert_model.write(convert_model.plan(FP8_DIR, GGUF_DIR), model)
    loads = part.size(cases)

    def load() -> None:
        open_model(model, "cpu").logits([0, *(rng.randrange(500) for _ in range(rng.choice((1, 3, 40))))])

    failures = _flat("loads", load, loads, model)
    held = open_model(model, "cpu")

    def answer() -> None:
        prompt = [0, *(rng.randrange(500) for _ in range(rng.randint(1, 60)))]
        assert len(list(held.generate(prompt, max_new_tokens=4))) <= 4

    failures += _flat("answers", answer, 10 * loads, model)
    counts = {"loads": Counter(done=loads), "answers": Counter(done=10 * loads)}
    return Report(11 * loads, failures, counts, {})


def _flat(what: str, act: Callable[[], None], times: int, folder: Path) -> list[str]:
    first = max(1, times // 10)
    for _ in range(first):
        act()
    before = state(folder)
    for _ in range(times - first):
        act()
    after = state(folder)
    grown, more_maps, more_files = (b - a for a, b in zip(before, after, strict=True))
    failures = [f"{what}: {grown >> 20} MiB more after {times}"] if grown > ROOM else []
    failures += [f"{what}: {more_maps} mappings more after {times}"] if more_maps > 0 else []
    return failures + ([f"{what}: {more_files} descriptors more after {times}"] if more_files > 0 else [])
