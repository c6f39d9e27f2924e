"""The sources as pages with numbered lines, for the API to point to: `source/refimpl/ops.py.html#L12`."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

import api
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

COLOURS = ("default", "github-dark")  # of pygments, light and dark


def pages(root: Path) -> dict[str, str]:
    """{path in the site: text} of every module of the API, and their style."""
    found = {path_of(m, root): _page(m, root) for m in api.modules(root)}
    return found | {"source/source.css": _style()}


def path_of(module: api.Module, root: Path) -> str:
    """Where a module's source lies in the site."""
    return f"source/{_file(module, root)}.html"


def _file(module: api.Module, root: Path) -> str:
    """The module's file in the repository; the link refimpl/kernels leads to kernels."""
    return re.sub(r"^refimpl/kernels/", "kernels/", module.path.relative_to(root).as_posix())


def _page(module: api.Module, root: Path) -> str:
    file = _file(module, root)
    up = "../" * (file.count("/") + 1)
    shown = highlight(
        module.path.read_text(),
        PythonLexer(stripnl=False),
        HtmlFormatter(linenos="inline", linespans="L", cssclass="highlight"),
    )
    shown = shown.replace('id="L-', 'id="L').replace('class="highlight"', 'class="highlight" tabindex="0"', 1)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f'<title>{escape(file)}</title><link rel="stylesheet" href="{up}source/source.css"></head><body>'
        f'<header><h1>{escape(file)}</h1><p><a href="{up}index.html">refimpl</a> / '
        f'<a href="{up}api/{module.name}.html">API of {escape(module.name)}</a></p></header>'
        f"<main>{shown}</main></body></html>\n"
    )


def _style() -> str:
    light, dark = (HtmlFormatter(style=s).get_style_defs(".highlight") for s in COLOURS)
    ours = (Path(__file__).parent / "source.css").read_text()
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n{ours}"


def with_lines(text: str, module: api.Module, root: Path) -> str:
    """A page of the API with a link to the lines of each definition under its heading."""
    file = _file(module, root)
    target = f"../{path_of(module, root)}"
    lines = _lines(module)

    def linked(found: re.Match) -> str:
        line = lines.get(api.unescape(found[2]))
        return found[0] if line is None else f"{found[0]}\n\n[{file}:{line}]({target}#L{line}){{ .source }}"

    text = re.sub(r"^(##+) (?:class )?(\S+)$", linked, text, flags=re.M)
    head, _, rest = text.partition("\n")
    return f"{head}\n\n[{file}]({target}){{ .source }}\n{rest}"


def _lines(module: api.Module) -> dict[str, int]:
    found: dict[str, int] = {}
    for node, _ in api.members(module.parse().body):
        found[api.name_of(node)] = node.lineno
        for inner in getattr(node, "body", ()):
            if isinstance(inner, api.FUNCTION):
                found[f"{api.name_of(node)}.{inner.name}"] = inner.lineno
    return found
