"""What the site adds to the pages: the API reference with its sources, the notebooks and their pictures,
pages to touch, links from terms to the glossary, and a navigation that follows the files.
"""

from __future__ import annotations

import re
import sys
from fnmatch import fnmatch
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import api
import generate
import glossary
import sources
import touch

import notebooks

ROOT = HERE.parent.parent


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Leave out pages that are not there, put those that no name but a pattern fits in its place, add at the
    end those that are not named, then the API.
    """
    docs = Path(config.docs_dir)
    listed: set[str] = set()
    pages = {p.relative_to(docs).as_posix() for p in docs.rglob("*.md") if HERE not in p.parents}
    there = pages | {"touch.md", *notebooks.pages()}
    named = set(re.findall(r"[\w/-]+\.md", str(config.nav)))

    def present(items: list) -> list:
        kept = []
        for item in items:
            if isinstance(item, dict):
                kept += [{title: inner} for title, children in item.items() if (inner := present(children))]
            elif "*" in item:
                more = sorted(name for name in there - named if fnmatch(name, item))
                listed.update(more)
                kept += more
            elif item in there:
                listed.add(item)
                kept.append(item)
        return kept

    nav = present(config.nav or [])
    nav[-1:-1] = sorted(there - listed)
    config.nav = [
        *nav,
        {
            "API": [
                "api/index.md",
                *({m.name.removeprefix("refimpl."): f"api/{m.name}.md"} for m in api.modules(ROOT)),
            ]
        },
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages that are made of something else: of docstrings and sources, of notebooks, of formats."""
    by_name = {f"{m.name}.md": m for m in api.modules(ROOT)}
    made: dict[str, str | bytes] = {
        f"api/{path}": sources.with_lines(text, by_name[path], ROOT) if path in by_name else text
        for path, text in api.pages(ROOT).items()
    }
    made |= sources.pages(ROOT) | notebooks.pages() | touch.pages() | {"touch.md": touch.index()}
    made |= {picture.path: picture.data for picture in notebooks.pictures().values()}
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rows of OPS where a page asks for them; links to notebooks, sources and blocks to touch; pictures of
    notebooks; the first use of a term on a page leads to the glossary.
    """
    here = page.file.src_uri
    markdown = generate.live(markdown)
    if here.startswith(("api/", "notebooks/")) or here in ("glossary.md", "touch.md"):
        return markdown
    up = "../" * here.count("/")
    markdown = _linked(markdown, up)
    if here.startswith("formats/") and here[8:-3] in map(str.lower, touch.names()):
        link = f"[Touch its bits]({up}blocks/{here[8:-3]}.html): flip one, and see which weights change."
        markdown = re.sub(r"^## ", f"{link}\n\n## ", markdown, count=1, flags=re.M)
    terms = glossary.terms((Path(config.docs_dir) / "glossary.md").read_text())
    return glossary.link(markdown, terms, up + "glossary.md") + notebooks.gallery(here)


def _linked(markdown: str, up: str) -> str:
    """A notebook or a module that is named by its path, in prose, leads to its page."""
    known = {f"notebooks/{p.name}": f"notebooks/{p.stem}.md" for p in notebooks.stored()}
    known |= {path[7:-5]: path for path in (sources.path_of(m, ROOT) for m in api.modules(ROOT))}

    def link(found: re.Match) -> str:
        path = found[1]
        return f"[`{path}`]({up}{known[path]})" if path in known else found[0]

    parts = re.split(r"(^```.*?^```|\[[^\]]*\]\([^)]*\))", markdown, flags=re.M | re.S)
    return "".join(p if n % 2 else re.sub(r"`([\w/]+\.(?:py|ipynb))`", link, p) for n, p in enumerate(parts))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML; what scrolls can be reached with the keyboard."""
    return re.sub(r"<(pre|table)(?=[ >])", r'<\1 tabindex="0"', notebooks.with_math(html))


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """No page may fetch anything from elsewhere."""
    found = re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(?:https?:)?//[^"]*"', output)
    if found:
        raise ValueError(f"{page.file.src_uri} loads from elsewhere: {found[0]}")
    return output
