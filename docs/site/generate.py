"""Write the parts of docs/ that a program can write: `python docs/site/generate.py` (`--check`: say what is
not up to date, exit 1).

    formats/*.md           from the format modules, `refimpl.pages.spec` and a worked block
    ```console             in any page: what `$ python -m refimpl...` prints now (a line `...` stands for any)
    <!-- table NAME -->    in any page, up to <!-- end -->: the table of that name
    <!-- live NAME -->     stays as it is in the file and becomes rows of OPS when the site is built, since
                           those change most often
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

import worked

from refimpl import arithmetic, errors, fields, formats, ops
from refimpl.checkpoint import (
    names,
)
from refimpl.checkpoint.stored import storage
from refimpl.cli import run
from refimpl.config import DeepSeekConfig
from refimpl.devices.memory import builtin_configs
from refimpl.fields import family
from refimpl.formats import draw, e4m3, e5m2, e8m0
from refimpl.formats.ggml_types import OWN
from refimpl.loading import hub
from refimpl.pages import spec

DOCS, ROOT = HERE.parent, HERE.parent.parent
BLOCKS = {m.NAME: m for m in formats.FORMATS.values() if hasattr(m, "PARTS")}
FLOATS: dict[str, ModuleType] = {"e4m3": e4m3, "e5m2": e5m2, "e8m0": e8m0} | {
    n: getattr(formats, n) for n in ("bf16", "f16", "f32")
}
NOTE = (
    "<!-- Made by docs/site/generate.py from the format's module and refimpl/pages/spec.py: change those. -->"
)


# --- one page a format --------------------------------------------------------------------------------------


def block_page(module: ModuleType) -> Iterator[str]:
    """A GGML block; what only a person can say comes from `spec.SPECS`, and is left out where it is not there
    yet.
    """
    s, data = spec.SPECS.get(module.NAME), worked.block(module)
    size, name, count = module.BLOCK.itemsize, module.NAME.lower(), module.WEIGHTS
    yield from (f"# {module.NAME}", "", NOTE, "")
    if s:
        yield from (f"**{s.question}** {s.answer}", "")
    bits = f"**{8 * size / count:g} bits a weight**"
    yield f"{count} weights in {size} bytes: {bits}. GGML type {module.GGML_TYPE}."
    yield from ("", "## Bytes", "", *fence(line.rstrip() for line in draw.ruler(module)))
    yield from _fields_table(module, s.fields if s else {})
    yield from ("", "All numbers are little endian.", "", *_bits(module))
    if hasattr(module, "VALUES"):
        yield from _values(module)
    if s:
        yield from (
            "## Formula",
            "",
            *fence([f"{_left(s.formula)} = {s.formula}"]),
            _letters(module, s.formula),
            "",
        )
    yield from ("## A block by hand", "", *_by_hand(module, s, data), "")
    if s:
        yield from ("## Quirks", "", *(f"- {q}" for q in s.quirks), "")
    yield from (
        "## Where it is",
        "",
        f"- Reference: `refimpl/formats/{name}.py`, [API](../api/refimpl.formats.{name}.md)",
        f"<!-- live {name} -->",
    )
    source = f"`{s.source}` in ggml's `ggml-common.h`" if s else "named in the module"
    tested = "; tested bit for bit against the package gguf" if module.GGML_TYPE < OWN else ""
    yield from (f"- Source: {source}{tested}.", "")


def _fields_table(module: ModuleType, told: dict[str, str]) -> Iterator[str]:
    yield from ("| field | type | bytes | |", "|---|---|---|---|")
    for f in draw.fields(module):
        many, _, kind = f.kind.rpartition(" x ")
        typed = f"{kind}[{many}]" if many else kind
        yield f"| `{f.name}` | `{typed}` | {f.offset} to {f.offset + f.nbytes - 1} | {told.get(f.name, '')} |"


def _bits(module: ModuleType) -> Iterator[str]:
    yield from ("## Bits", "")
    if letters := worked.scale_letters(module):
        yield from (
            "Bytes that scales and minima share. A, B, ... are bits of `sc[0]`, `sc[1]`, ...; a, b, ... of "
            "`m[0]`, `m[1]`, ...:",
            "",
            *fence(letters),
        )
    for at, which in _walked(module):
        yield from (
            f"Each byte below holds a part of {which}. Behind it stands whose its bits are, from the highest "
            "down:",
            "",
            *fence(worked.weight_bits(module, at)),
        )
    yield from ("All this is found by flipping every bit of a block and looking which number changes.", "")


def _walked(module: ModuleType) -> list[tuple[int, str]]:
    """The weights that are taken apart, and what they are called."""
    found = worked.walked(module)
    if len(found) == 1:
        return [(at, f"weight {at}") for at in found]
    groups = [worked.place(module, at)[0] for at in found]
    return [(at, f"weight {at}, which is in group {j}") for at, j in zip(found, groups)]


def _values(module: ModuleType) -> Iterator[str]:
    yield from ("## Values", "", "What a quant stands for:", "")
    yield "| q | " + " | ".join(map(str, range(len(module.VALUES)))) + " |"
    yield "|---" * (len(module.VALUES) + 1) + "|"
    yield "| `VALUES[q]` | " + " | ".join(map(str, module.VALUES)) + " |"
    yield ""


def _by_hand(module: ModuleType, s: spec.Spec | None, data: np.ndarray) -> Iterator[str]:
    count = module.WEIGHTS
    made = (
        "quantized with `refimpl.formats.quantize`"
        if hasattr(module, "quantize")
        else "as the nearest block that trying finds"
    )
    yield f"The first {count} weights of an expert of the embedded model (`{worked.TENSOR}`), {made}."
    yield from ("By field, with the number of the first byte:", "", *fence(worked.hex_lines(module, data)))
    yield from ("The numbers in it:", "", *fence(worked.number_lines(module, data)))
    if s:
        for at, which in _walked(module):
            yield from (
                f"{which.capitalize()}, bit by bit:",
                "",
                *fence(worked.by_hand(module, s.formula, data, at)),
            )
    else:
        weights = " ".join(draw.number(w) for w in module.dequantize(data)[: worked.SHOWN])
        yield from ("The first weights that they decode to:", "", *fence([f"w     = {weights} ..."]))
    yield (
        f"All {count} weights together are off by {100 * worked.relative_error(module, data):.2g} % "
        f"(root of the summed squares, relative)."
    )


def fence(lines: Iterable[str]) -> list[str]:
    """Lines as they are."""
    return ["```text", *lines, "```", ""]


def _left(formula: str) -> str:
    return "w[j, i]" if "[j, i]" in formula else "w[i]"


def _letters(module: ModuleType, formula: str) -> str:
    groups = worked.draw.field_values(module, np.zeros(module.BLOCK.itemsize, np.uint8))["q"].shape
    if "[j, i]" in formula:
        return (
            f"Group j = 0..{groups[0] - 1}, weight i = 0..{groups[1] - 1} of the group: weight number "
            f"{groups[1]} j + i of the block."
        )
    return f"Weight i = 0..{groups[0] - 1}."


def float_page(kind: str) -> Iterator[str]:
    """A float of one, two or four bytes."""
    s, module = spec.CODES[kind], FLOATS[kind]
    sign, exponent, mantissa = draw.FLOATS[kind]
    bits = sign + exponent + mantissa
    letters = " ".join(filter(None, ("S" * sign, "E" * exponent, "M" * mantissa)))
    yield from (
        f"# {kind.upper()}",
        "",
        NOTE,
        "",
        f"**{s.question}** {s.answer}",
        "",
        f"**{bits} bits a number.**",
        "",
        "## Bits",
        "",
    )
    yield from (*fence([letters]), "## Formula", "")
    normal = f"E > 0:  (-1)^S * 2^(E - {s.bias}) * (1 + M / {2**mantissa})"
    yield from fence(
        [normal, f"E = 0:  (-1)^S * 2^{1 - s.bias} * M / {2**mantissa}"]
        if mantissa
        else [f"2^(E - {s.bias})"]
    )
    yield from ("## Worked", "", f"| wanted | code | `{letters}` | means |", "|---|---|---|---|")
    for x in s.worked:
        code = encode(kind, x)
        yield (
            f"| {x:.10g} | `0x{code:0{bits // 4}x}` | `{draw.float_bits(code, kind)}` | "
            f"{decode(kind, code):.10g} |"
        )
    if bits == 8:
        yield from _grid(module, exponent, mantissa) if mantissa else _ends(module)
    yield from ("", "## Quirks", "", *(f"- {q}" for q in s.quirks), "", "## Where it is", "")
    yield from (
        f"- Reference: `refimpl/formats/{kind}.py`, [API](../api/refimpl.formats.{kind}.md)",
        f"<!-- live {kind} -->",
    )
    yield from (f"- Source: {s.source}.", "")


def _grid(module: ModuleType, exponent: int, mantissa: int) -> Iterator[str]:
    yield from (
        "",
        "## All of them",
        "",
        "Rows are exponents, columns mantissas; negative numbers have the highest bit set.",
        "",
    )
    yield from (
        "| E | " + " | ".join(f"M={m}" for m in range(2**mantissa)) + " |",
        "|---" * (2**mantissa + 1) + "|",
    )
    for e in range(2**exponent):
        values = [draw.number(module.TABLE[e << mantissa | m]) for m in range(2**mantissa)]
        yield f"| {e} | " + " | ".join({"nan": "NaN", "inf": "infinity"}.get(v, v) for v in values) + " |"


def _ends(module: ModuleType) -> Iterator[str]:
    yield from ("", "## Its ends", "", "| code | number |", "|---|---|")
    for code in (0, 1, 127, 254, 255):
        yield (
            f"| `0x{code:02x}` | "
            f"{'NaN' if np.isnan(module.TABLE[code]) else draw.number(module.TABLE[code])} |"
        )


def encode(kind: str, x: float) -> int:
    """The code of the nearest number, by the module; E5M2 and E8M0 have no encoder, and the nearest entry of
    the table is taken.
    """
    module = FLOATS[kind]
    if kind == "e4m3":
        return int(e4m3.encode(np.array([x], np.float32))[0])
    if hasattr(module, "TABLE"):
        return int(
            np.nanargmin(
                np.abs(np.where(np.isfinite(module.TABLE), module.TABLE, np.nan).astype(np.float64) - x)
            )
        )
    return int(
        module.quantize(np.array([x], np.float32)).view(
            module.BLOCK if module.BLOCK.kind == "u" else f"<u{module.BLOCK.itemsize}"
        )[0]
    )


def decode(kind: str, code: int) -> float:
    """Its number."""
    module = FLOATS[kind]
    if hasattr(module, "TABLE"):
        return float(module.TABLE[code])
    return float(module.dequantize(np.array([code], f"<u{module.BLOCK.itemsize}").view(np.uint8))[0])


# --- tables -------------------------------------------------------------------------------------------------


def formats_table() -> Iterator[str]:
    """Every GGML block format in a line."""
    yield from ("| format | GGML type | weights | bytes | bits a weight | w = |", "|---|---|---|---|---|---|")
    for name, module in BLOCKS.items():
        size = module.BLOCK.itemsize
        row = (
            f"[{name}](formats/{name.lower()}.md)",
            module.GGML_TYPE,
            module.WEIGHTS,
            size,
            f"{8 * size / module.WEIGHTS:g}",
            f"`{spec.SPECS[name].formula}`" if name in spec.SPECS else "",
        )
        yield "| " + " | ".join(map(str, row)) + " |"


def codes_table() -> Iterator[str]:
    """Every float in a line."""
    yield from (
        "| format | bits | sign + exponent + mantissa | bias | smallest above zero | largest |",
        "|---|---|---|---|---|---|",
    )
    for kind in FLOATS:
        sign, exponent, mantissa = draw.FLOATS[kind]
        bits = sign + exponent + mantissa
        finite = [
            decode(kind, c) for c in (range(256) if bits == 8 else (1, (((2**exponent - 1) << mantissa) - 1)))
        ]
        finite = [v for v in finite if np.isfinite(v) and v > 0]
        parts, ends = f"{sign} + {exponent} + {mantissa}", (f"{min(finite):.3g}", f"{max(finite):.6g}")
        row = (f"[{kind.upper()}](formats/{kind}.md)", bits, parts, spec.CODES[kind].bias, *ends)
        yield "| " + " | ".join(map(str, row)) + " |"


def operations_table() -> Iterator[str]:
    """The rows of OPS."""
    yield from ("| operation | reference | fast paths | equal means |", "|---|---|---|---|")
    for key, op in ops.OPS.items():
        fast = ", ".join(
            f"{backend}: `{path.split(':')[0].rsplit('.', 1)[1]}.{path.split(':')[1]}`"
            for backend, path in op.fast.items()
        )
        reference = f"{op.reference.__module__}.{op.reference.__name__}"
        yield (
            f"| `{key}` | `{reference}` | {fast} | "
            f"{'the same bits' if op.equal == 'bits' else 'within the bound'} |"
        )


def fast_paths(name: str) -> Iterator[str]:
    """The fast paths of a format's operations, as items of a list."""
    for key, op in ops.OPS.items():
        for backend, path in op.fast.items() if key.startswith(name + ".") else ():
            module, function = path.split(":")
            equal = "in every bit" if op.equal == "bits" else "within the bound"
            yield (
                f"- Fast path of `{key}` on `{backend}`: `{function}` in "
                f"`kernels/{module.rsplit('.', 1)[1]}`, equal {equal}"
            )


def tensors_table() -> Iterator[str]:
    """Every tensor of a merged DeepSeek-V3: names in both spellings, type and shape, of a dense and of an
    expert layer.
    """
    c = DeepSeekConfig()
    yield from ("| checkpoint | folder | type | shape |", "|---|---|---|---|")
    wanted = {
        n: s for n, s in names.shapes(c).items() if (names.layer_of(n) or 0) in (0, c.first_k_dense_replace)
    }
    seen = set()
    for name, shape in wanted.items():
        hf = re.sub(r"layers\.\d+", "layers.N", name).replace("mlp.experts.", "mlp.experts.*.")
        if hf in seen:
            continue
        seen.add(hf)
        same = [
            n
            for n in names.shapes(c)
            if re.sub(r"\d+", "N", n) == re.sub(r"\d+", "N", name)
            and c.is_dense(names.layer_of(n) or 0) == c.is_dense(names.layer_of(name) or 0)
        ]
        stored = dict.fromkeys(storage(c, n, shape, "Q4_K_M") for n in same)
        gguf = re.sub(r"blk\.\d+", "blk.N", names.to_gguf(name))
        kind, shown = " or ".join(sorted(k for k, _ in stored)), f"[{', '.join(map(str, shape))}]"
        if names.is_routed_expert(name):
            kind, shown = f"U8, a blob of {kind}", " or ".join(f"[{n}]" for _, n in sorted(stored))
        elif kind == "E4M3":
            kind, shown = "F8_E4M3, scales F32", f"{shown}, [{', '.join(str(-(-n // 128)) for n in shape)}]"
        yield f"| `{hf}` | `{gguf}` | {kind} | {shown} |"


def errors_table() -> Iterator[str]:
    """Every code of errors.toml: its sentences, and what to do."""
    yield from ("| code | what | what to do |", "|---|---|---|")
    for code, entries in itertools.groupby(sorted(errors.table().items()), key=lambda item: item[0][:5]):
        found = [entry for _, entry in entries]
        sentences = dict.fromkeys(_blanks(entry["what"]) for entry in found)
        hints = dict.fromkeys(_blanks(entry["hint"]) for entry in found if "hint" in entry)
        yield f"| {code} | {'; '.join(sentences)} | {'; '.join(hints)} |"


def _blanks(sentence: str) -> str:
    return (
        re.sub(r"(?<!\{)\{\w+(?:![rsa])?(?::[^}]*)?\}", "…", sentence).replace("{{", "{").replace("}}", "}")
    )


def fields_table() -> Iterator[str]:
    """A table a file: what is done with each of its fields. Keys of one row share a line."""
    for source, table in fields.TABLES.items():
        yield from ("", f"### {source}", "", "| field | | |", "|---|---|---|")
        order = (fields.HONOURED, fields.REFUSED, fields.HARMLESS)
        rows = sorted(table.items(), key=lambda item: order.index(item[1].verdict))
        for (verdict, why, needs), keys in itertools.groupby(rows, key=lambda item: _fields_row(item[1])):
            shown = ", ".join(f"`{key}`" for key, _ in keys)
            yield f"| {shown} | {verdict}{needs} | {why} |"


def _fields_row(f: fields.Field) -> tuple[str, str, str]:
    return f.verdict, f.why, f" unless {f.expected}" if f.verdict == fields.REFUSED else ""


def _raw_configs() -> dict[str, dict[str, object]]:
    return {name: json.loads(path.read_text()) for name, path in builtin_configs().items()}


def family_table() -> Iterator[str]:
    """The models of the family, a line each."""
    yield "| `--config` | `model_type` | GGUF | parameters (billions) | of a token | cache of a token |"
    yield "|---|---|---|---|---|---|"
    for name, raw in _raw_configs().items():
        c = DeepSeekConfig.from_dict(raw)
        whole = arithmetic.total(arithmetic.components(c))
        sizes = (f"{n / 1e9:.1f}" for n in (whole.parameters, whole.token_parameters))
        cells = (f"`{name}`", f"`{raw['model_type']}`", f"`{names.architecture(c)}`", *sizes)
        yield "| " + " | ".join((*cells, f"{arithmetic.cache_bytes(c, 1):,} bytes")) + " |"


def differences_table() -> Iterator[str]:
    """Every line of a config that is obeyed and is not as in DeepSeek-V3's."""
    yield from ("| model | its config says | DeepSeek-V3's | what it governs |", "|---|---|---|---|")
    every = _raw_configs()
    v3 = every.pop("deepseek-v3")
    for name, raw in every.items():
        for key, row in fields.TABLES["config.json"].items():
            if row.verdict != fields.HONOURED or raw.get(key) == v3.get(key):
                continue
            ours, theirs = (f"`{json.dumps(c[key])}`" if key in c else "–" for c in (raw, v3))
            said = f"`{json.dumps(key)}`: {ours}" if key in raw else f"no `{json.dumps(key)}`"
            yield f"| {name} | {said} | {theirs} | {row.why.replace('|', '/')} |"


def missing_table() -> Iterator[str]:
    """Models whose names come up beside these, and what they need."""
    yield from ("| `model_type` | what is missing |", "|---|---|")
    yield from (f"| `{name}` | {why} |" for name, why in family.MISSING.items())


TABLES = {
    "family": family_table,
    "differences": differences_table,
    "missing": missing_table,
    "formats": formats_table,
    "codes": codes_table,
    "tensors": tensors_table,
    "errors": errors_table,
    "fields": fields_table,
}


def live(page: str) -> str:
    """A page with the rows of OPS that it asks for."""
    return re.sub(
        r"<!-- live (\w+) -->",
        lambda m: "\n".join(operations_table() if m[1] == "operations" else fast_paths(m[1])),
        page,
    )


# --- what commands print ------------------------------------------------------------------------------------


def output_of(command: str) -> str:
    """What `python -m refimpl.X ...` prints on both streams, run in this process from the root of the
    repository.
    """
    words = shlex.split(command)
    if words[:2] != ["python", "-m"] or not words[2].startswith("refimpl"):
        raise ValueError(f"not a command that is run here: {command}")
    out, here = io.StringIO(), os.getcwd()
    try:
        os.chdir(ROOT)
        with contextlib.redirect_stderr(io.StringIO()):
            hub.embedded()  # so that no output tells of the first run
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            run(importlib.import_module(words[2]).main, words[3:])
    finally:
        os.chdir(here)
    # Notes depend on the machine and its caches; errors are what a page wants to show.
    kept = [
        line.rstrip()
        for line in out.getvalue().rstrip("\n").split("\n")
        if not re.match(r"refimpl: (?!E\d)", line)
    ]
    return "\n".join(kept)


def refresh(page: str) -> str:
    """A page with its tables and the outputs of its ```console blocks as they are now."""
    page = re.sub(
        r"(<!-- table (\w+) -->\n).*?(<!-- end -->)",
        lambda m: m[1] + "\n".join(TABLES[m[2]]()) + "\n" + m[3],
        page,
        flags=re.S,
    )
    return re.sub(
        r"^```console\n(.*?)^```$", lambda m: f"```console\n{_console(m[1])}```", page, flags=re.M | re.S
    )


def _console(text: str) -> str:
    fresh = []
    for command, old in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.M):
        new = output_of(command)
        fresh.append(f"$ {command}\n" + (old if matches(old.rstrip("\n"), new) else new + "\n"))
    return "".join(fresh)


def matches(shown: str, output: str) -> bool:
    """Whether what a page shows is the output, `...` lines left out."""
    pattern = "".join(
        r"(?:.*\n)*" if line.strip() == "..." else re.escape(line) + r"\n" for line in shown.split("\n")
    )
    return re.fullmatch(pattern, output + "\n") is not None


# --- all of it ----------------------------------------------------------------------------------------------


def outputs() -> dict[Path, str]:
    """Every page that is generated in whole or in part, as it should be."""
    found = {DOCS / "formats" / f"{name.lower()}.md": "\n".join(block_page(m)) for name, m in BLOCKS.items()}
    found |= {DOCS / "formats" / f"{kind}.md": "\n".join(float_page(kind)) for kind in FLOATS}
    for path in sorted(DOCS.glob("*.md")):
        found[path] = refresh(path.read_text())
    return found


def main() -> int:
    """The command."""
    print("working out every page, which takes some seconds", file=sys.stderr)
    fresh = outputs()
    stale = [path for path, text in fresh.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        print("\n".join(f"not up to date: {p.relative_to(ROOT)}" for p in stale))
        return 1 if stale else 0
    for path in stale:
        path.parent.mkdir(exist_ok=True)
        path.write_text(fresh[path])
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
