"""Verdicts for people, for programs, and as one Markdown page."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable
from dataclasses import asdict

import numpy as np

from refimpl import __version__
from refimpl.conformance.laws.ladder import LAWS
from refimpl.conformance.verdict import Verdict


def line(v: Verdict) -> str:
    """One verdict on one line, without its failure."""
    word = "pass" if v.passed else "xfail" if v.expected else "FAIL"
    cut = ", out of time" if v.cut else ""
    cut += f", the bound says nothing in {v.silent}" if v.silent else ""
    note = f"; not judged here: {v.note}" if v.note else ""
    return (
        f"{v.operation:18} {v.kernel:12.60} {v.law:13} {word:5} {v.examples:5} examples{cut}, "
        f"{v.seconds:.2f} s{note}"
    )


def failure(v: Verdict) -> str:
    """What is wrong, where, by how much, and how to see it again."""
    lines = [f"  {v.why}"]
    if v.got:
        lines.append(f"  at {v.where}: got {v.got}, want {v.want}")
    if v.bound is not None:
        lines.append(f"  bound {v.bound:.6g}, missed {v.times:.4g} times over")
    lines += [f"  law: {LAWS[v.law].says}"] if v.law in LAWS else []
    lines += [f"  smallest input found: {v.case}", f"  {v.reproduce}"]
    return "\n".join(lines)


def text(verdicts: Iterable[Verdict]) -> str:
    """All lines, failures spelled out."""
    return "\n".join(line(v) + ("" if v.passed else "\n" + failure(v)) for v in verdicts)


def summary(verdicts: list[Verdict]) -> str:
    """The end of a report for people: kernels, verdicts, failures and seconds, and where to begin."""
    failed, known = sum(not v.fine for v in verdicts), sum(not v.passed and v.fine for v in verdicts)
    kernels = len({(v.operation, v.kernel) for v in verdicts})
    seconds = sum(v.seconds for v in verdicts)
    counts = f"{len(verdicts) - failed - known} passed, {failed} failed, {known} failed as expected"
    cut = sum(v.cut for v in verdicts)
    counts += f", {cut} out of time" if cut else ""
    judged = f"{_counted(kernels, 'kernel')}, {_counted(len(verdicts), 'verdict')}"
    lead = (
        "\nBegin with a kernel's first failure: one fault often breaks later laws, too." if failed > 1 else ""
    )
    return f"{judged}: {counts}, {seconds:.0f} s{lead}"


def _counted(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def as_json(verdicts: list[Verdict]) -> list[dict]:
    """The verdicts as plain dicts that `json` can write."""
    return [{name: _plain(value) for name, value in asdict(v).items()} for v in verdicts]


def _plain(value: object) -> object:
    """JSON has no infinity and no NaN: they become words."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def markdown(verdicts: list[Verdict], command: str) -> str:
    """A page that needs nothing beside it: the command, the machine, a table, and every failure in full."""
    laws = [law for law in LAWS if any(v.law == law for v in verdicts)]
    kernels = list(dict.fromkeys((v.operation, v.kernel) for v in verdicts))
    by = {(v.operation, v.kernel, v.law): v for v in verdicts}
    words = {None: "", True: "pass", False: "**FAIL**"}
    versions = (
        f"refimpl {__version__}, numpy {np.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()}."
    )
    head = ["# Conformance report", "", f"`{command}`", "", versions, ""]
    table = ["| operation | kernel | " + " | ".join(laws) + " |", "|---" * (2 + len(laws)) + "|"]
    for op, kernel in kernels:
        cells = [by.get((op, kernel, law)) for law in laws]
        table.append(
            f"| {op} | {kernel} | "
            + " | ".join("xfail" if c and c.expected else words[c.passed if c else None] for c in cells)
            + " |"
        )
    body = []
    for v in verdicts:
        if not v.passed:
            title = f"## {v.operation}, {v.kernel}: {v.law}" + (
                f" (expected: {v.expected})" if v.expected else ""
            )
            body += ["", title, "", "```", failure(v), "```"]
    return "\n".join([*head, *table, "", summary(verdicts), *body, ""])
