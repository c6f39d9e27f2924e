"""A page as one text: a head without anything from elsewhere, styles and scripts in it or beside it."""

from __future__ import annotations

import json
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@cache
def asset(name: str) -> str:
    """The text of a file of this folder: a style or a script."""
    return (HERE / name).read_text(encoding="utf-8")


def embedded(value: Any) -> str:
    """A value as JSON that may stand in a script of a page: names of tensors and texts of tokens end no
    script.
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def page(title: str, body: str, scripts: list[str], style: str, *, inline: bool = True) -> str:
    """A whole page. `scripts` are texts and `style` is one; where not `inline`, names of files beside the
    page.
    """
    sheet = f"<style>\n{style}</style>" if inline else f'<link rel="stylesheet" href="{escape(style)}">'
    ends = [
        f"<script>\n{s}</script>"
        if inline or "\n" in s or "=" in s
        else f'<script src="{escape(s)}"></script>'
        for s in scripts
    ]
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">',
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
            "style-src 'self' 'unsafe-inline' file:; script-src 'self' 'unsafe-inline' file:\">",
            f"<title>{escape(title)}</title>",
            sheet,
            "</head><body>",
            body,
            *ends,
            "</body></html>\n",
        )
    )
