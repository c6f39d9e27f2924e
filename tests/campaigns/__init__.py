"""Campaigns: many hostile, damaged or random inputs against what reads them, counted. What they found is told
in docs/reliability.md.

    python -m tests.campaigns [NAME ...] [--long] [--count N] [--seconds T] [--seed S] [--processes N]

One module a campaign, with `SHORT` and `LONG` (how many cases the tests and `make campaigns` ask for) and
`run(cases, seed, folder, part) -> Report`. A case depends on nothing but the seed and its own number, so that
a failure can be had again alone and several processes can share the cases. `folder` is empty and may be
filled; what is left in `folder / "failed"` is kept.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

ROOM = 4 << 30  # bytes that several processes may want of a folder in memory
CAMPAIGNS = {
    "fuzz": "mutated files of every kind that is read",
    "crash": "merges that are killed, fail, run out of room or memory, or meet another",
    "prefixes": "files cut off at every byte of the head and every 4 KiB of the data",
    "bitflips": "one bit wrong in a head, or in the data of a merged folder",
    "prompts": "random conversations through template and tokenizer",
    "roundtrip": "random checkpoints quantized, merged and linked, and read back",
    "commands": "every command with models, configs, metadata, manifests and flags made to break it",
    "requests": "strangers' requests to the server, torn, doubled, oversized or no HTTP",
    "growth": "models loaded and dropped, answers given: memory, mappings and descriptors stay",
    "interrupts": "Ctrl-C at random times of cold and warm starts",
    "differential": "valid files read by others too, and malformed ones that others accept",
}


T = TypeVar("T")


class Report(NamedTuple):
    """What a campaign did. `failures` has a line each; `counts` how often what happened, by kind of input;
    `facts` what is worth telling besides.
    """

    cases: int
    failures: list[str]
    counts: dict[str, Counter[str]]
    facts: dict[str, Any]

    @classmethod
    def joined(cls, reports: Iterable[Report]) -> Report:
        """The parts of one campaign as a whole: counts added up; of facts that differ the largest."""
        whole = cls(0, [], {}, {})
        for report in reports:
            for kind, counter in report.counts.items():
                whole.counts.setdefault(kind, Counter()).update(counter)
            facts = {k: max(v, whole.facts.get(k, v)) for k, v in report.facts.items()}
            whole = cls(
                whole.cases + report.cases,
                whole.failures + report.failures,
                whole.counts,
                whole.facts | facts,
            )
        return whole


class Part(NamedTuple):
    """One of `of` processes that share the cases of a campaign, counted from 0."""

    number: int = 0
    of: int = 1

    def share(self, cases: Sequence[T]) -> Sequence[T]:
        """Those of the cases that are this part's."""
        return cases[self.number :: self.of]

    def size(self, cases: int) -> int:
        """How many cases of so many are this part's."""
        return len(self.share(range(cases)))


WHOLE = Part()


def campaign(name: str) -> ModuleType:
    """The module of a campaign."""
    return import_module(f"tests.campaigns.{name}")


def scratch() -> TemporaryDirectory[str]:
    """A folder for `run`, in memory where the system has such a place."""
    memory = Path("/dev/shm")
    return TemporaryDirectory(
        dir=memory if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free >= ROOM else None
    )


def keep(folder: Path, name: str, data: bytes) -> Path:
    """Store the file of a failure."""
    path = folder / "failed" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path
