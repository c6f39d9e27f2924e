"""The page of a block that can be touched, for one format, with a tensor's blocks or with one worked block,
and what `spec` says of the format.
"""

from __future__ import annotations

import base64
import re
from html import escape
from typing import Any

from refimpl.pages import html, layouts, spec

NAMES = ("layouts.js", "words.js", "numbers.js", "files.js", "block.js", "page.css")


def page(
    name: str,
    data: bytes,
    *,
    title: str = "",
    lead: str = "",
    first: int = 0,
    inline: bool = True,
    **told: Any,
) -> str:
    """The page of the layout `name`, with `data`: whole blocks (a run of plain numbers may be short at the
    end), the first of which is block `first` of its tensor. `lead` is HTML, and what the format is for comes
    behind it. `told` goes to the script: the `tensor`, and a `note` on where the blocks come from.
    """
    given = {"format": name, "data": base64.b64encode(data).decode(), "first": first} | told
    heading = escape(title or f"{name}: a block you can touch")
    lead += _about(name)
    body = html.asset("block.html").replace("<!-- title -->", heading).replace("<!-- lead -->", lead)
    start = f"const GIVEN = {html.embedded(given)};\nstart(GIVEN);"
    if inline:
        *scripts, sheet = files().values()
    else:
        *scripts, sheet = NAMES
    return html.page(title or f"{name}, bit by bit", body, [*scripts, start], sheet, inline=inline)


def _about(name: str) -> str:
    """The question of a format and its answer, as HTML; "" of a format of which nobody has said anything."""
    told = spec.of(name)
    if told is None:
        return ""
    text = re.sub("`([^`]*)`", r"<code>\1</code>", escape(told.answer))
    return f"<p><strong>{escape(told.question)}</strong> {text}</p>"


def files() -> dict[str, str]:
    """What lies beside pages that are not `inline`: {name: text}, scripts in their order and then the
    style.
    """
    made = {"layouts.js": layouts.script(), "words.js": f"const WORDS = {html.embedded(spec.words())};\n"}
    return {name: made.get(name) or html.asset(name) for name in NAMES}
