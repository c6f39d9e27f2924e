"""Campaigns: many hostile, damaged or random inputs against what reads them, counted. What they found is told in docs/reliability.md.

    python -m tests.campaigns [NAME ...] [--long] [--cases N] [--seed S] [--json]

One module a campaign, with `SHORT` and `LONG` (how many cases the tests and `make campaigns` ask for) and `run(cases, seed, folder) -> Report`. A
case depends on nothing but the seed and its own number, so that a failure can be had again alone. `folder` is empty and may be filled; what is left
in `folder / "failed"` is kept.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import NamedTuple

CAMPAIGNS = {
    "fuzz": "mutated files of every kind that is read",
    "crash": "merges that are killed, fail, run out of room or memory, or meet another",
    "prefixes": "files cut off at every byte of the head and every 4 KiB of the data",
    "bitflips": "one bit wrong in a head, or in the data of a merged folder",
    "prompts": "random conversations through template and tokenizer",
    "differential": "valid files read by others too, and malformed ones that others accept",
}


class Report(NamedTuple):
    """What a campaign did. `failures` has a line each, `facts` what is worth telling besides."""

    cases: int
    failures: list[str]
    facts: dict[str, object]


def campaign(name: str) -> ModuleType:
    """The module of a campaign."""
    return import_module(f"tests.campaigns.{name}")


def scratch() -> TemporaryDirectory[str]:
    """A folder for `run`, in memory where the system has such a place."""
    memory = Path("/dev/shm")
    return TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None)


def keep(folder: Path, name: str, data: bytes) -> Path:
    """Store the file of a failure."""
    path = folder / "failed" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path
