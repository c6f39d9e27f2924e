"""Pages to touch: a block of every format, and a pass of a model to walk."""

from __future__ import annotations

import tempfile
from pathlib import Path

import generate
import numpy as np
import worked

import refimpl
from refimpl import fp8
from refimpl.pages import block, layouts
from refimpl.pages.scaled import SCALED

PROMPT = "What is 12 + 30?"
NOTE = "The block below has the first {} weights of `{}`, an expert of the embedded model, as {} stores them."
WAY = '<a href="../index.html">refimpl</a> / <a href="../touch.html">Pages to touch</a> / {}'
BACK = f'<nav aria-label="The way here">{WAY}</nav>'


def names() -> list[str]:
    """The formats that have such a page."""
    return [*layouts.BLOCKS, *layouts.FLOATS]


def pages() -> dict[str, str]:
    """{path in the site: text}: `blocks/q4_k.html`, ..., what lies beside them, `blocks/walk.html`."""
    found = {f"blocks/{name}": text for name, text in block.files().items()}
    found |= {f"blocks/{name.lower()}.html": _block(name) for name in names()}
    return found | {"blocks/walk.html": _walk()}


def _block(name: str) -> str:
    data = _worked(name) if name in layouts.BLOCKS else _numbers(name)
    back = BACK.format(f'<a href="../{_told(name)}.html">The page of {name}</a>')
    note = NOTE.format(layouts.layout(name)["weights"], worked.TENSOR, name)
    note += " Their signs are left out, as this format has none." if name == "E8M0" else ""
    return block.page(name, data, lead=back, inline=False, tensor=worked.TENSOR, note=note)


def _told(name: str) -> str:
    """The page of the documentation that tells of a format, without its ending."""
    return "fp8-linear" if name in SCALED else f"formats/{name.lower()}"


def _worked(name: str) -> bytes:
    """The block that a format's page works by hand; of scaled FP8 the same weights, by `act_quant`."""
    if name not in SCALED:
        return worked.block(layouts.BLOCKS[name]).tobytes()
    module = SCALED[name]
    codes, scale = fp8.act_quant(worked.weights()[: module.WEIGHTS], ue8m0=name == "FP8_UE8M0")
    block = np.zeros(1, module.BLOCK)
    stored = np.log2(scale).astype(np.int64) + 127 if name == "FP8_UE8M0" else scale
    block[module.PARTS[0]], block["codes"] = stored, codes
    return block.tobytes()


def _numbers(name: str) -> bytes:
    """The weights of the worked blocks as floats; of a format without sign their magnitudes."""
    kind, x = name.lower(), worked.weights()[: layouts.RUN]
    x = np.abs(x) if kind == "e8m0" else x
    width = layouts.layout(name)["bytes"] // layouts.RUN
    return np.array([generate.encode(kind, float(v)) for v in x], f"<u{width}").tobytes()


def _walk() -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "walk.html"
        refimpl.trace(refimpl.load(backend="reference"), PROMPT).to_html(path)
        text = path.read_text(encoding="utf-8")
    back = BACK.format('<a href="../trace.html">Trace</a>')
    return text.replace("</h1>", f"</h1>{back}", 1)


def index() -> str:
    """The page that leads to them."""
    rows = [f"| [{n}](blocks/{n.lower()}.html) | [{n}]({_told(n)}.md) |" for n in names()]
    return "\n".join(
        (
            "# Pages to touch",
            "",
            "**Which bits make weight 37?** Each page below shows one block of a format. Every bit has the "
            "colour of the number that it belongs to. A click flips a bit, and the page says which "
            "weights change.",
            "",
            "You can also drop a GGUF or safetensors file on any of these pages. The page lists its tensors "
            "and shows any block. The file is read in the browser and is never sent anywhere.",
            "",
            "| a block to touch | the page of the format |",
            "|---|---|",
            *rows,
            "",
            "**What happens to one token?** [A token you can walk](blocks/walk.html) shows a pass of the "
            "embedded model step by step. `refimpl.trace(...).to_html(FILE)` writes such a page of any "
            "model, see [Trace](trace.md).",
            "",
        )
    )
