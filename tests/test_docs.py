"""The pages say what the code does: what a program can print is compared with what it prints, the site builds
without a warning.
"""

import doctest
import functools
import importlib
import importlib.util
import inspect
import io
import re
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from refimpl import errors, formats, ops
from refimpl.checkpoint import names, safetensors
from refimpl.checkpoint.stored import FILE_TYPES
from refimpl.formats import draw, q4_k
from refimpl.pages import spec
from tests.sites import once

ROOT = Path(__file__).parent.parent
DOCS, SITE = ROOT / "docs", ROOT / "docs" / "site"
PAGES = sorted(p for p in DOCS.rglob("*.md") if SITE not in p.parents)
PROSE = [*PAGES, *(ROOT / p for p in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "kernels/README.md"))]


def tool(name: str):
    """A module of docs/site, which is no package."""
    sys.path.insert(0, str(SITE))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(SITE))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """The embedded model is merged once for all of these tests, away from the user's cache."""
    monkeypatch.setenv("REFIMPL_CACHE", str(tmp_path_factory.getbasetemp() / "docs-cache"))


def relative(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# --- what is generated is up to date ------------------------------------------------------------------------


def test_generated_pages_tables_and_outputs_are_up_to_date():
    stale = [
        relative(p)
        for p, text in tool("generate").outputs().items()
        if not p.exists() or p.read_text() != text
    ]
    assert not stale, "run: python docs/site/generate.py"


@pytest.mark.parametrize("page", [p for p in PAGES if "```pycon" in p.read_text()], ids=relative)
def test_examples_in_python_do_what_they_show(page):
    told = "\n".join(re.findall(r"^```pycon\n(.*?)^```$", page.read_text(), re.M | re.S))
    test = doctest.DocTestParser().get_doctest(told, {}, page.name, str(page), 0)
    out = io.StringIO()
    with redirect_stderr(io.StringIO()):
        results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=out.write)
    assert results.attempted and not results.failed, out.getvalue()


@pytest.mark.parametrize("name", spec.SPECS)
def test_the_formula_of_a_format_s_page_gives_the_bits_of_its_decoder(name):
    worked, module = tool("worked"), tool("generate").BLOCKS[name]
    formula = spec.SPECS[name].formula
    rng = np.random.default_rng(7)
    for data in (
        worked.block(module),
        *(rng.integers(0, 256, module.BLOCK.itemsize, np.uint8) for _ in range(50)),
    ):
        for field in draw.fields(module):
            if (
                field.kind in draw.FLOATS
            ):  # any scale but NaN and infinity, which the shipped blocks do not have either
                data.view(module.BLOCK)[field.name] = np.float32(rng.uniform(-4, 4)).astype(np.float16)
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(
                worked.evaluate(module, formula, draw.field_values(module, data)), module.dequantize(data)
            )


@pytest.mark.parametrize("name", tool("generate").FLOATS)
def test_the_formula_of_a_float_s_page_gives_every_number(name):
    bias = spec.CODES[name].bias
    sign, exponent, mantissa = draw.FLOATS[name]
    codes = np.arange(min(2 ** (sign + exponent + mantissa), 2**16), dtype=np.uint32)
    if name == "f32":
        codes = codes << 16 | 0x1234
    s, e, m = (
        codes >> (exponent + mantissa) & 1,
        (codes >> mantissa & (2**exponent - 1)).astype(np.float64),
        (codes & (2**mantissa - 1)) / 2**mantissa,
    )
    told = (
        (-1.0) ** s * np.where(e > 0, np.exp2(e - bias) * (1 + m), np.exp2(1.0 - bias) * m)
        if mantissa
        else np.exp2(e - bias)
    )
    found = np.array([tool("generate").decode(name, int(c)) for c in codes])
    finite = np.isfinite(found)
    np.testing.assert_array_equal(found[finite], told[finite])
    assert (~finite).sum() == {"e4m3": 2, "e5m2": 8, "e8m0": 1}.get(
        name, 2 ** (1 + mantissa) if name != "f32" else 2**8
    )


@pytest.mark.parametrize("module", tool("generate").BLOCKS.values(), ids=lambda m: m.NAME)
def test_a_block_is_packed_by_its_own_drawing(module):
    """`draw.pack` puts bits where `draw.owners` says; reading them gives the numbers back, up to the constant
    that a format adds.
    """
    rng, zeros = (
        np.random.default_rng(1),
        draw.field_values(module, np.zeros(module.BLOCK.itemsize, np.uint8)),
    )
    stored = {
        part: rng.integers(0, 2**bits, (7, *zeros[part].shape)) for part, bits in draw.widths(module).items()
    }
    found = dict(zip(module.PARTS, module.unpack(draw.pack(module, stored, 7))))
    for part, bits in draw.widths(module).items():
        off = found[part][:, 0].astype(np.int64) - zeros[part] - stored[part]
        assert (off % 2**bits == 0).all()


@pytest.mark.parametrize("module", tool("generate").BLOCKS.values(), ids=lambda m: m.NAME)
def test_the_nearest_of_all_blocks_is_not_far(module):
    """What a page shows for a format without quantizer: no more than half again what a quantizer loses."""
    worked = tool("worked")
    if not hasattr(module, "quantize"):
        assert worked.relative_error(module, worked.block(module)) < 2 / 2 ** draw.widths(module)["q"]
    elif "m" not in module.PARTS and module.NAME != "Q8_K":
        x = worked.weights()[: module.WEIGHTS]
        ours, theirs = (
            worked.relative_error(module, f(x)) for f in (partial(worked.nearest, module), module.quantize)
        )
        assert ours <= 1.5 * theirs


@pytest.mark.parametrize("name", spec.SPECS)
def test_every_byte_of_a_weight_that_is_worked_by_hand_is_drawn(name):
    worked, module = tool("worked"), tool("generate").BLOCKS[name]
    for at in worked.walked(module):
        steps = worked.by_hand(module, module.FORMULA, worked.block(module), at)
        used = [n for line in steps if re.match(r"\w+\[", line) for n in re.findall(r"\bbyte (\d+)", line)]
        drawn = [re.search(r" byte +(\d+) ", line)[1] for line in worked.weight_bits(module, at)]
        assert drawn == sorted(set(used), key=int) and drawn


def test_of_a_super_block_an_early_and_a_late_group_are_worked():
    worked = tool("worked")
    groups = [worked.place(q4_k, at)[0] for at in worked.walked(q4_k)]
    assert groups == [0, 5]  # scales of groups 4 to 7 are spread over two bytes


def test_a_format_has_its_page_before_a_person_said_anything(monkeypatch):
    generate, said = tool("generate"), set(spec.SPECS)
    page = {name: "\n".join(generate.block_page(module)) for name, module in generate.BLOCKS.items()}
    monkeypatch.setattr(spec, "SPECS", {})
    for name, module in generate.BLOCKS.items():
        plain = "\n".join(generate.block_page(module))
        assert ("## Formula" in page[name]) == (name in said) and "## Formula" not in plain
        for part in ("## Bytes", "## Bits", "## A block by hand", "are off by"):
            assert part in plain and part in page[name]
    assert all(name in "\n".join(generate.formats_table()) for name in generate.BLOCKS)


def test_every_format_has_its_page():
    assert {p.stem for p in (DOCS / "formats").glob("*.md")} == {
        *(module.NAME.lower() for module in formats.FORMATS.values()),
        *spec.CODES,
    }


# --- names of things ----------------------------------------------------------------------------------------


def test_every_error_code_is_documented_and_every_documented_one_exists():
    source = "".join(
        p.read_text() for folder in ("refimpl", "kernels") for p in (ROOT / folder).rglob("*.py")
    )
    page = (DOCS / "errors.md").read_text()
    named = {key[:5] for key in errors.table()} | set(errors.table())
    used = set(re.findall(r'"(E\d{4}(?: [a-z ]+)?)"', source))
    assert set(errors.table()) <= used <= named
    assert {key[:5] for key in errors.table()} == set(re.findall(r"^\| (E\d{4}) \|", page, re.M))


def test_codes_named_in_the_pages_exist():
    known = set(re.findall(r"^\| (E\d{4}) \|", (DOCS / "errors.md").read_text(), re.M))
    for page in PROSE:
        assert set(re.findall(r"\bE\d{4}\b", page.read_text())) <= known, page


def test_the_readme_s_tree_names_real_files():
    tree = (ROOT / "README.md").read_text().rsplit("```", 2)[1]
    for line in tree.splitlines():
        for name in re.split(r"\s{2,}", line.strip())[0].split():
            assert any(
                (ROOT / at / (name + end)).exists() for at in ("", "refimpl") for end in ("", ".py")
            ), name


def test_the_readme_s_picture_has_the_figures_of_the_arithmetic(capsys):
    assert not importlib.import_module("refimpl.arithmetic").main(["files", "parameters", "token"])
    printed = capsys.readouterr().out
    figures = set(re.findall(r"[\d.]+ GB(?!/s)", (DOCS / "img" / "hybrid.svg").read_text()))
    sums = {"17 GB", "394 GB", "1.4 GB", "12 GB"}  # of the rows that are on the card; rounded
    assert all(f in printed for f in figures - sums) and "11.4 GB" in figures


def commands(text: str) -> set[tuple[str, str]]:
    """(module, arguments) of every `python -m refimpl...` and `refimpl ...` of a page."""
    return {
        (m, rest.split("#")[0].split("\\n")[0])
        for m, rest in re.findall(r"python -m (refimpl(?:\.\w+)*)([^`\n|);\"]*)", text)
    }


def main_of(module: str):
    """The function behind `python -m module`; None when there is none."""
    found = importlib.util.find_spec(module)
    name = f"{module}.__main__" if found is not None and found.submodule_search_locations else module
    return (
        getattr(importlib.import_module(name), "main", None)
        if found is not None and importlib.util.find_spec(name)
        else None
    )


@functools.cache
def flags_of(module: str, *subcommand: str) -> set[str]:
    out = io.StringIO()
    with redirect_stdout(out), suppress(SystemExit):
        main_of(module)([*subcommand, "--help"])
    return set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", out.getvalue()))


KINDS = (
    ("refimpl", "*.py"),
    ("kernels", "*.py"),
    ("kernels", "*.pyx"),
    ("kernels", "*.pxi"),
    ("notebooks", "*.ipynb"),
)
SOURCES = sorted(p for folder, kind in KINDS for p in (ROOT / folder).rglob(kind))


@pytest.mark.parametrize("page", [p for p in (*PROSE, *SOURCES) if commands(p.read_text())], ids=relative)
def test_every_command_and_flag_that_is_named_exists(page):
    for module, rest in sorted(commands(page.read_text())):
        if module in ("refimpl", "refimpl.COMMAND"):
            continue
        assert main_of(module), f"python -m {module}"
        wanted = {word.split("=")[0] for word in re.findall(r"(?<!\S)\[?(--?[a-zA-Z][\w-]*)", rest)}
        subcommand = [w for w in rest.split()[:1] if module == "refimpl.bench" and w[0].isalpha()]
        assert wanted <= flags_of(module, *subcommand), f"python -m {module}{rest}"


@pytest.mark.parametrize("page", PROSE, ids=relative)
def test_every_measured_figure_stands_beside_a_command(page):
    """A section with rates or times in it names the command, test or make target that printed them."""
    for section in re.split(r"^(?=## )", page.read_text(), flags=re.M):
        measured = re.search(
            r"\d\s?(?:[GM]B/s|tokens/s|GF/s|[TG]flop/s|TFLOPS?|ms|µs|us|MiB above)\b", section
        )
        assert not measured or re.search(r"python (?:-m |setup)|pytest |make |REFIMPL_|\]\(", section), (
            f"{relative(page)}: {measured.group()}"
        )


def test_links_between_files_lead_somewhere():
    """Also those that the site does not check: of the README and its neighbours."""
    for page in PROSE:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            path = target.split("#")[0]
            if (
                path and "://" not in path and not re.match(r"(\.\./)?api/", path)
            ):  # the API's pages are made when the site is built
                assert (page.parent / path).exists(), f"{relative(page)}: {target}"


# --- the glossary -------------------------------------------------------------------------------------------

# Capitals that need no explanation: units, makers, names of things.
PLAIN = {
    "API",
    "REFIMPL_CACHE",
    "REFIMPL_SIMD",
    "REFIMPL_API_KEY",
    "FILE",
    "HTTP",
    "TOML",
    "WSL2",
    "ASCII",
    "BPE",
    "CI",
    "GB",
    "HF",
    "IEEE",
    "JSON",
    "KV",
    "MB",
    "ML",
    "MX",
    "OCP",
    "OPS",
    "RAM",
    "TB",
    "URL",
    "UTF-8",
    "VRAM",
}
PLAIN |= {"AMD", "NVIDIA", "RTX", "H100", "H200", "DDR5-4800", "DDR5-5600", "DDR5-6000"}
PLAIN |= {"GLM", "GLM-4", "GLM-5"}  # names of models


def test_a_term_is_defined_once_and_used_somewhere():
    glossary, page = tool("glossary"), (DOCS / "glossary.md").read_text()
    known = glossary.terms(page)
    for text in re.split(r"^### .+$", page, flags=re.M)[1:]:
        assert text.strip(), "a term without a definition"
    found = glossary.pattern(list(known))
    sources = [p.read_text() for folder in ("refimpl", "kernels") for p in (ROOT / folder).rglob("*.py")]
    pages = [
        text
        for p in PROSE
        if p.name != "glossary.md"
        for is_prose, text in glossary.prose(p.read_text())
        if is_prose
    ]
    used = {known[glossary.owner(m.group(), known)] for text in sources + pages for m in found.finditer(text)}
    assert set(known.values()) - used == set(), "terms that no page uses"


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "glossary.md"], ids=relative)
def test_every_abbreviation_is_in_the_glossary(page):
    """A word of capitals and digits is a term, the name of a format, a tensor type or an error, or plain."""
    glossary, text = tool("glossary"), (DOCS / "glossary.md").read_text()
    known = {
        *glossary.terms(text),
        *re.findall(r"\*([\w-]+)\*", text),
        *PLAIN,
        *formats.KNOWN_UNSUPPORTED.values(),
        *safetensors.DTYPES,
    }
    known |= {m.NAME for m in formats.FORMATS.values()} | set(FILE_TYPES)
    words = " ".join(text for is_prose, text in glossary.prose(page.read_text()) if is_prose)
    found = {
        w.removesuffix("s") for w in re.findall(r"(?<![\w./-])[A-Z][A-Z0-9][A-Z0-9_-]*s?(?![\w/(-])", words)
    }
    assert {w for w in found if not re.fullmatch(r"E\d{4}|[A-Z]\d", w)} <= known


def test_the_first_use_of_a_term_is_linked_and_nothing_else():
    glossary = tool("glossary")
    known = {"block": "block", "K-quant": "k-quant", "minima": "minimum-minima"}
    page = (
        "# A block\n\nA `block`, blocks of [block](x.md) and block.\n\n    "
        "block\n\n```text\nblock\n```\nK-quants, Minima and unblock, block-wise."
    )
    made = glossary.link(page, known, "g.md")
    assert made.count("g.md#block") == 1 and "[blocks](g.md#block){ .term } of [block](x.md)" in made
    assert "[K-quants](g.md#k-quant)" in made and "[Minima](g.md#minimum-minima)" in made
    assert re.sub(r"\[([^\]]*)\]\(g\.md#[\w-]*\)\{ \.term \}", r"\1", made) == page
    with pytest.raises(KeyError, match="twice"):
        glossary.terms("### block\n### nibble, block\n")


# --- the site -----------------------------------------------------------------------------------------------


def test_the_site_builds_without_a_warning(tmp_path_factory):
    site = once(tmp_path_factory)
    made = {p.relative_to(site).as_posix() for p in site.rglob("*.html")}
    assert (
        made >= {p.relative_to(DOCS).with_suffix(".html").as_posix() for p in PAGES}
        and "api/refimpl.ops.html" in made
    )
    home = (site / "index.html").read_text()
    assert all(f"<code>{key}</code>" in home for key in ops.OPS) and "<!-- live" not in home


def test_the_api_reference_is_complete():
    """Every public function and class of every module that can be imported here has its entry, with the
    docstring's first line.
    """
    api = tool("api")
    pages = api.pages(ROOT)
    for module in api.modules(ROOT):
        try:
            loaded = importlib.import_module(module.name)
        except ImportError:
            continue
        page = pages[f"{module.name}.md"]
        assert f"`{module.name}`" in pages["index.md"] and page.startswith(f"# {module.name}\n")
        for name, thing in vars(loaded).items():
            if (
                not name.startswith("_")
                and getattr(thing, "__module__", None) == module.name
                and (inspect.isclass(thing) or inspect.isfunction(thing))
            ):
                heading = (
                    f"## class {api.escape(name)}\n" if inspect.isclass(thing) else f"## {api.escape(name)}\n"
                )
                assert heading in page, f"{module.name}.{name}"
                if thing.__doc__ and not thing.__doc__.startswith(f"{name}("):
                    assert api.escape(inspect.getdoc(thing).splitlines()[0]) in page, f"{module.name}.{name}"


def test_names_in_the_pages_are_names_of_the_checkpoint():
    """`model.layers.N....weight` and `blk.N....weight` in any page are tensors that exist, by the table of
    names.
    """
    for page in PROSE:
        for name in re.findall(
            r"`((?:model\.layers|blk)\.\d+\.[\w.]+\.(?:weight|weight_scale_inv|ggml_type))`", page.read_text()
        ):
            assert names.to_gguf(names.split_expert(name)[0]), f"{relative(page)}: {name}"
