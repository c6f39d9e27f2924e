"""What the site adds to the pages: the API reference, links from terms to the glossary, and a navigation that
follows the files.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import api
import generate
import glossary

ROOT = HERE.parent.parent


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Leave out pages that are not there, put those that no name but a pattern fits in its place, add at the
    end those that are not named, then the API.
    """
    docs = Path(config.docs_dir)
    listed: set[str] = set()
    named = set(re.findall(r"[\w/-]+\.md", str(config.nav)))

    def present(items: list) -> list:
        kept = []
        for item in items:
            if isinstance(item, dict):
                kept += [{title: inner} for title, children in item.items() if (inner := present(children))]
            elif "*" in item:
                more = sorted({p.relative_to(docs).as_posix() for p in docs.glob(item)} - named)
                listed.update(more)
                kept += more
            elif (docs / item).exists():
                listed.add(item)
                kept.append(item)
        return kept

    nav = present(config.nav or [])
    pages = {p.relative_to(docs).as_posix() for p in docs.rglob("*.md") if HERE not in p.parents}
    nav[-1:-1] = sorted(pages - listed)
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
    """The API's pages, made of docstrings."""
    for path, text in api.pages(ROOT).items():
        files.append(File.generated(config, f"api/{path}", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rows of OPS where a page asks for them; the first use of a term on a page leads to the glossary."""
    markdown = generate.live(markdown)
    if page.file.src_uri == "glossary.md" or page.file.src_uri.startswith("api/"):
        return markdown
    terms = glossary.terms((Path(config.docs_dir) / "glossary.md").read_text())
    return glossary.link(markdown, terms, "../" * page.file.src_uri.count("/") + "glossary.md")


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """No page may fetch anything from elsewhere."""
    found = re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(?:https?:)?//[^"]*"', output)
    if found:
        raise ValueError(f"{page.file.src_uri} loads from elsewhere: {found[0]}")
    return output
