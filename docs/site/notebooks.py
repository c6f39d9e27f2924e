"""The notebooks as pages: text, code and stored outputs by nbconvert, their pictures as files.

Nothing is run. PICTURES says which picture stands on which other page.
"""

from __future__ import annotations

import re
from functools import cache
from html import escape
from pathlib import Path
from typing import NamedTuple

import nbformat
from latex2mathml.converter import convert
from nbconvert import MarkdownExporter
from nbformat import NotebookNode

ROOT = Path(__file__).parents[2]

PICTURES: dict[str, tuple[str, ...]] = {
    "formats/e4m3.md": ("01.1", "01.2", "01.3", "01.4"),
    "formats/bf16.md": ("01.5",),
    "fp8-linear.md": ("02.1", "02.2", "10.1", "10.2", "10.3", "10.4", "10.5", "10.6"),
    "formats/q4_k.md": ("03.1", "03.3", "03.4"),
    "formats/f16.md": ("03.2",),
    "formats/q6_k.md": ("03.5",),
    "formats.md": ("03.6", "12.1"),
    "codecs.md": ("04.1", "04.2", "04.3", "04.4"),
    "hybrid-folder.md": ("05.1",),
    "model.md": ("06.1", "06.2", "06.4", "07.1", "07.2", "14.1"),
    "arithmetic.md": ("06.3", "06.5", "11.1", "11.2", "11.3", "11.4"),
    "tiny.md": ("07.3", "07.4", "12.2"),
    "trace.md": ("08.1", "08.2", "08.3", "12.3", "12.4"),
    "cpu-experts.md": ("09.1", "09.2"),
    "conformance.md": ("13.1", "13.2"),
}
"""{page: numbers of pictures}: "03.1" is the first picture of notebook 03."""

NOT_USED: dict[str, str] = {}
"""{number of a picture that stands on no page: the reason}."""


class Picture(NamedTuple):
    """A picture of a notebook: `path` in the site, `alt` its words, the notebook's page and title."""

    path: str
    alt: str
    data: bytes
    page: str
    title: str


def stored() -> list[Path]:
    """The notebooks in their order."""
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


@cache
def _converted() -> tuple[dict[str, str], dict[str, Picture]]:
    texts, pictures = {}, {}
    for path in stored():
        book = nbformat.read(path, as_version=4)
        names = iter(range(1, 1000))
        outputs = [o for cell in book.cells for o in cell.get("outputs", ())]
        drawn = [o for o in outputs if "image/png" in o.get("data", {})]
        exporter = MarkdownExporter()
        text, resources = exporter.from_notebook_node(_prepared(book), {"unique_key": path.stem})
        title = re.sub("[`*$]", "", re.findall(r"^# (.+)$", text, re.M)[0])
        for output, (name, data) in zip(drawn, resources["outputs"].items(), strict=True):
            alt = " ".join(output.data["text/plain"].split()).strip("'\"")
            text = text.replace(f"![png]({name})", image(alt, name))
            key = f"{path.stem[:2]}.{next(names)}"
            pictures[key] = Picture(f"notebooks/{name}", alt, data, f"notebooks/{path.stem}.md", title)
        note = f"*This page is `notebooks/{path.name}` as it is stored. To run it: `jupyter lab`.*"
        texts[f"notebooks/{path.stem}.md"] = re.sub(r"^(# .+\n)", rf"\1\n{note}\n", text, count=1, flags=re.M)
    return texts, pictures


def _prepared(book: NotebookNode) -> NotebookNode:
    """Folded solutions are Markdown too, code cells are Python, and links lead to pages of the site."""
    book.metadata.setdefault("language_info", {})["name"] = "python"
    for cell in book.cells:
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace("<details>", '<details markdown="1">')
            cell.source = cell.source.replace("](../docs/", "](../")
    return book


def image(alt: str, source: str) -> str:
    """A picture in Markdown; inside `<img>` no sign of the text means anything else."""
    return f'<img class="picture" loading="lazy" alt="{escape(alt)}" src="{source}">'


def pages() -> dict[str, str]:
    """{path in the site: Markdown} of every notebook."""
    return _converted()[0]


def pictures() -> dict[str, Picture]:
    """{number as in PICTURES: picture} of every notebook."""
    return _converted()[1]


def gallery(page: str) -> str:
    """Markdown with the pictures that belong on a page, by notebook; "" where there are none."""
    up, lines, last = "../" * page.count("/"), [], ""
    for number in PICTURES.get(page, ()):
        picture = pictures()[number]
        if picture.page != last:
            last = picture.page
            lines += [f"From the notebook [{picture.title}]({up}{picture.page}):", ""]
        shown = image(picture.alt, up + picture.path)
        lines += [f"<figure>{shown}<figcaption>{escape(picture.alt)}</figcaption></figure>", ""]
    return "\n".join(("", "", "## Pictures", "", *lines)) if lines else ""


def with_math(html: str) -> str:
    """HTML whose formulas, as arithmatex leaves them, became MathML, which browsers draw without a script. A
    formula on a line of its own may scroll, so it can be reached with the keyboard.
    """

    def drawn(found: re.Match) -> str:
        tex = found[3].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        block = found[2] == "["
        reached, math = ' tabindex="0"' if block else "", convert(tex, display="block" if block else "inline")
        return f'<{found[1]} class="arithmatex"{reached}>{math}</{found[1]}>'

    return re.sub(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', drawn, html, flags=re.S)
