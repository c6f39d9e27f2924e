"""The verdicts on released kernels, as lines on a terminal and as `docs/field.md`."""

from __future__ import annotations

import json
import platform
from typing import NamedTuple

from refimpl.conformance.field.contenders import Contender
from refimpl.conformance.verdict import Verdict


class Judged(NamedTuple):
    """One kernel's verdicts, or why there are none."""

    contender: Contender
    verdicts: list[Verdict]
    missing: str = ""

    @property
    def broken(self) -> list[Verdict]:
        """The laws that it does not obey."""
        return [v for v in self.verdicts if not v.passed]


def line(judged: Judged) -> str:
    """One kernel on one line."""
    name = judged.contender.name
    if judged.missing:
        return f"{name:64} not here: {judged.missing}"
    return f"{name:64} {_word(judged)}"


def _word(judged: Judged) -> str:
    broken = ", ".join(dict.fromkeys(v.law for v in judged.broken))
    return f"breaks {broken}" if broken else f"all {len(judged.verdicts)} laws"


def command(contender: Contender) -> str:
    """What judges this kernel alone."""
    words = [f"{name}={value}" for name, value in contender.environment]
    words += [f"python -m refimpl.conformance --op {contender.op} --kernel {contender.target()}"]
    pairs = [f"{name}={_shown(value)}" for name, value in contender.declared.items()]
    return " ".join([*words, *(["--declare", *pairs] if pairs else [])])


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)


INTRODUCTION = """# The field

**Do the kernels that other projects released obey the laws of the [conformance](conformance.md)
suite?** This page is for their authors, and for people who choose between them. It has three parts: a
table of verdicts, the commands that judge each kernel, and the smallest input of every broken law. Bugs
of earlier releases are in [a table of their own](history.md).

A kernel's command spells out what the kernel declares of itself. Its verdict holds for that, and for
nothing else. A broken law can be a fault of the package, or a choice that its users know. That is for
its authors to say.

This command wrote the page. It judges what is installed, and `--only 'ggml*'` judges a part of that.

    pip install 'refimpl[field]'
    pip install --no-deps kt-kernel torchao
    python -m refimpl.conformance.field --markdown docs/field.md

DeepGEMM needs a Hopper GPU and nvcc. These are its wheels for torch 2.11, and what judges it alone:

    pip install sgl-deep-gemm==0.1.3 apache-tvm-ffi==0.1.9
    python -m refimpl.conformance.field --only 'sgl-deep-gemm*'
"""


def markdown(found: list[Judged], level: str) -> str:
    """The page: a table of all that were judged, their commands, every broken law."""
    here = [j for j in found if not j.missing]
    versions = {j.contender.package: j.contender.version() for j in here}
    with_ = ", ".join(f"{name} {version}" for name, version in versions.items())
    head = ["| package | kernel | operation | verdict |", "|---|---|---|---|"]
    about = f"Level {level}, on {platform.machine()}, with {with_}.{_absent(found)}"
    return "\n".join(
        [INTRODUCTION, about, "", *head, *map(_row, here), *_commands(here), *_failures(here), ""]
    )


def _absent(found: list[Judged]) -> str:
    missing = [f"{j.contender.package}'s {j.contender.what} ({j.missing})" for j in found if j.missing]
    return f" Not judged here: {'; '.join(dict.fromkeys(missing))}." if missing else ""


def _row(judged: Judged) -> str:
    c = judged.contender
    return f"| {c.package} | {c.what} | `{c.op}` | {_word(judged)} |"


def _commands(here: list[Judged]) -> list[str]:
    """One for each group of kernels that declare the same."""
    seen: dict[tuple[str, str, str], Contender] = {}
    for j in here:
        c = j.contender
        seen.setdefault((c.package, c.what, _declared(c)), c)
    rows = [f"| {c.package}: {c.what} | `{command(c)}` |" for c in seen.values()]
    head = [
        "",
        "## Commands",
        "",
        "Each group of kernels has one command here. Its other formats differ in operation and name.",
        "",
    ]
    return [*head, "| kernel | command |", "|---|---|", *rows]


def _declared(c: Contender) -> str:
    return json.dumps(c.declared, sort_keys=True)


def _failures(here: list[Judged]) -> list[str]:
    body = ["", "## Broken laws"]
    for j in here:
        for v in j.broken:
            body += ["", f"### {j.contender.name}: {v.law}", "", *_failure(v, j.contender)]
    return body if len(body) > 2 else []


def _failure(v: Verdict, c: Contender) -> list[str]:
    case = v.case if len(v.case) < 400 else f"{v.case[:400]}..."
    lines = [v.why.replace("|", "/")]
    if v.got:
        lines.append(f"at {v.where}: got {v.got}, want {v.want}")
    return [f"{'; '.join(lines)}.", "", "```", f"{command(c)} --law {v.law} --case '{case}'", "```"]
