"""Bugs that released kernels had, planted again (`bugs`): `python -m refimpl.conformance.field --history`.

Which law of the quick level finds each is said beside what three norms say of the same fault on everyday
inputs: the norms that test suites of such kernels use, on random normal numbers of shapes that divide evenly.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from refimpl.cli import to_json
from refimpl.conformance.field.bugs import BUGS, Array, Bug
from refimpl.conformance.inputs import draws
from refimpl.conformance.judge import judge
from refimpl.conformance.manifest import Manifest
from refimpl.conformance.trial import Trial, quiet
from refimpl.formats import e4m3
from refimpl.ops import OPS


class Norms(NamedTuple):
    """What norms say of a faulty result: the normalized mean square error, the cosine, and whether it is
    close by rtol and atol of a hundredth.
    """

    nmse: float
    cosine: float
    close: bool

    def passed(self) -> tuple[bool, bool, bool]:
        """At the limits that are usual: 5e-4, 0.999."""
        return self.nmse <= 5e-4, self.cosine >= 0.999, self.close


def norms(bug: Bug) -> Norms:
    """On the bug's everyday inputs."""
    args = bug.everyday(np.random.default_rng(191))
    with quiet():
        got, want = bug.kernel(*args), OPS[bug.op].reference(*args)
    a, b = (_flat(y, bug.op) for y in (got, want))
    error, size = float(np.sum((a - b) ** 2)), float(np.sum(b**2))
    cosine = float(a @ b / max(np.sqrt(a @ a) * np.sqrt(size), 1e-300))
    return Norms(error / size, cosine, bool(np.allclose(a, b, rtol=1e-2, atol=1e-2)))


def _flat(value: Any, op: str) -> Array:
    """Numbers of a result as one vector f64: what codes, with scales or without, and blocks stand for."""
    parts = value if isinstance(value, tuple) else (value,)
    kind, _, verb = op.partition(".")
    if verb == "quantize":
        parts = (draws.FORMATS[kind].dequantize(value),)
    elif verb == "encode":
        parts = (e4m3.decode(value),)
    if len(parts) == 2 and parts[0].dtype == np.uint8:
        spread = np.repeat(parts[1], 128, axis=-1)[..., : parts[0].shape[-1]]
        parts = (e4m3.decode(parts[0]) * spread,)
    return np.concatenate([np.asarray(p, np.float64).reshape(-1) for p in parts])


class Found(NamedTuple):
    """A bug, the law that found it (empty for none), and what norms say."""

    bug: Bug
    law: str
    norms: Norms


def tried(bug: Bug) -> Found:
    """Judge a kernel that has the bug by the quick level, and by norms."""
    manifest = Manifest().with_values(bug.declared, bug.says)
    trial = Trial(bug.op, bug.kernel, manifest, bug.thread, isolated=True)
    broken = [v for v in judge(trial, shrink=False, stop=True) if not v.passed]
    return Found(bug, broken[0].law if broken else "", norms(bug))


def table(found: list[Found]) -> list[str]:
    """The bugs found and not found as a table, lines of Markdown."""
    head = "| thread | bug | operation | found by | `nmse` | cosine | `allclose` |"
    return [head, "|---|---|---|---|---|---|---|", *map(_row, found)]


def _row(one: Found) -> str:
    bug, words = one.bug, " | ".join("passes" if ok else "fails" for ok in one.norms.passed())
    return f"| {bug.thread} | {bug.says} | `{bug.op}` | {one.law or '**not found**'} | {words} |"


def told(args: argparse.Namespace) -> int:
    """One line a bug; exit code 1 when one was not found."""
    stream, found = sys.stderr if args.json else sys.stdout, []
    for one in map(tried, BUGS):
        found.append(one)
        named = zip(("NMSE", "cosine", "allclose"), one.norms.passed())
        words = ", ".join(f"{name} {'passes' if ok else 'fails'}" for name, ok in named)
        line = f"{one.bug.thread:36} {one.bug.says:70} {one.law or 'NOT FOUND':13} {words}"
        print(line, file=stream, flush=True)
    count = sum(bool(f.law) for f in found)
    print(f"{count} of {len(found)} found", file=stream)
    if args.json:
        print(to_json([{"thread": f.bug.thread, "law": f.law, **f.norms._asdict()} for f in found]))
    if args.markdown:
        args.markdown.write_text("\n".join([*_page(found), ""]))
    return int(count < len(found))


INTRODUCTION = """# Bugs of released kernels, planted again

**Would the usual tests have found these bugs?** This page takes bugs that other projects released and
mended. Each was planted in this project's own code, after the public description in the thread that is
named. Then [the suite](conformance.md) judged it at the quick level. "Found by" names the law that
broke first.

The last three columns say whether three norms, which tests often use, would have noticed the same bug.
They were taken on everyday inputs: random normal numbers, of shapes that divide evenly.

| norm | passes |
|---|---|
| `nmse`, the mean square error over the mean square | up to 5e-4 |
| cosine | from 0.999 on |
| `allclose` | with `rtol` and `atol` of 0.01 |

This command wrote the page: `python -m refimpl.conformance.field --history --markdown docs/history.md`.
"""


def _page(found: list[Found]) -> Iterator[str]:
    yield INTRODUCTION
    passing = sum(all(f.norms.passed()) for f in found)
    count = sum(bool(f.law) for f in found)
    yield f"{count} of {len(found)} are found; all three norms pass {passing} of them."
    yield ""
    yield from table(found)
