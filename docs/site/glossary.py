"""The glossary as data: a term is a heading of level three of docs/glossary.md, with its other spellings
after commas.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from markdown.extensions.toc import slugify

# What is never searched for terms: fenced and indented code, headings, comments, blocks of HTML, inline code,
# links, HTML tags.
SKIP = re.compile(
    r"^```(?s:.*?)^```|^(?:(?: "
    r"{4}|\t).*\n?)+|^#.*$|<!--(?s:.*?)-->|^<div(?s:.*?)</div>|`[^`\n]*`|\[[^\]]*\]\([^)]*\)|<[^>]+>",
    re.M,
)


def terms(page: str) -> dict[str, str]:
    """{spelling: anchor} of every term; a spelling that stands twice is a KeyError."""
    found: dict[str, str] = {}
    for heading in re.findall(r"^### (.+)$", page, re.M):
        for spelling in map(str.strip, heading.split(",")):
            if spelling in found:
                raise KeyError(f"the glossary defines {spelling!r} twice")
            found[spelling] = slugify(heading, "-")
    return found


def prose(markdown: str) -> Iterator[tuple[bool, str]]:
    """(whether it is prose, text) in order; joined they are the page."""
    at = 0
    for skipped in SKIP.finditer(markdown):
        yield True, markdown[at : skipped.start()]
        yield False, skipped.group()
        at = skipped.end()
    yield True, markdown[at:]


def pattern(spellings: Iterator[str] | list[str]) -> re.Pattern:
    """Finds a term as a whole word, the longest first, small or capital at its beginning, and in the
    plural.
    """
    alternatives = sorted(map(_spelled, spellings), key=len, reverse=True)
    return re.compile(rf"(?<![\w/.-])(?:{'|'.join(alternatives)})(?:s|es)?(?![\w/-]|\.\w)")


def _spelled(term: str) -> str:
    first = f"[{term[0].upper()}{term[0]}]" if term[0].islower() else re.escape(term[0])
    return first + re.escape(term[1:])


def owner(word: str, known: dict[str, str]) -> str:
    """The spelling in the glossary that a found word has."""
    for candidate in (word, word[:1].lower() + word[1:]):
        for spelling in (candidate, candidate.removesuffix("s"), candidate.removesuffix("es")):
            if spelling in known:
                return spelling
    raise KeyError(word)


def link(markdown: str, known: dict[str, str], path: str) -> str:
    """The page with the first use of every term linked to `path`."""
    seen: set[str] = set()

    def first(match: re.Match) -> str:
        anchor = known[owner(match.group(), known)]
        if anchor in seen:
            return match.group()
        seen.add(anchor)
        return f"[{match.group()}]({path}#{anchor}){{ .term }}"

    found = pattern(list(known))
    return "".join(found.sub(first, text) if is_prose else text for is_prose, text in prose(markdown))
