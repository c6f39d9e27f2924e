"""The page of a block that can be touched, for one format, with a tensor's blocks or with one worked
block."""

from __future__ import annotations

import base64
from html import escape
from typing import Any

from refimpl.pages import html, layouts


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
    end), the
    first of which is block `first` of its tensor; `lead` is HTML; `told` goes to the script (`tensor`,
    `note`).
    """
    given = {"format": name, "data": base64.b64encode(data).decode(), "first": first} | told
    heading = escape(title or f"{name}: a block you can touch")
    body = html.asset("block.html").replace("<!-- title -->", heading).replace("<!-- lead -->", lead)
    start = f"const GIVEN = {html.embedded(given)};\n"
    if inline:
        scripts, style = (
            [layouts.script(), html.asset("block.js"), start + "start(GIVEN);"],
            html.asset("page.css"),
        )
    else:
        scripts, style = ["layouts.js", "block.js", start + "start(GIVEN);"], "page.css"
    return html.page(title or f"{name}, bit by bit", body, scripts, style, inline=inline)


def files() -> dict[str, str]:
    """What lies beside pages that are not `inline`: {name: text}."""
    return {
        "layouts.js": layouts.script(),
        "block.js": html.asset("block.js"),
        "page.css": html.asset("page.css"),
    }
