"""Pictures for the notebooks: bits, blocks, number lines, heat maps, curves and bars, readable on white paper and on a black screen.

They have no background of their own, and every ink is a middle tone. A function returns a `Picture`, which a notebook shows and which says in
words what is on it. matplotlib (extra `notebooks`) is imported when a picture is drawn, and not before.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from refimpl.formats import draw

INK = "#808080"
COLOURS = ("#3d85cc", "#df7a1c", "#2f9d62", "#d4506a", "#9068c9", "#1c9aa6", "#a98a1d", "#7c8a99")
DPI = 80


class Picture:
    """A matplotlib figure and its words; a notebook shows the one, or the other where it cannot show pictures."""

    def __init__(self, figure: Any, words: str):
        self.figure, self.words = figure, words

    def png(self, background: str | None = None) -> bytes:
        """Bytes of a PNG file, transparent unless a colour is given."""
        file = io.BytesIO()
        options = {"transparent": True} if background is None else {"facecolor": background}
        self.figure.savefig(file, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.05, metadata={"Software": None}, **options)
        return file.getvalue()

    def __repr__(self) -> str:
        return f"[picture: {self.words}]"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"image/png": base64.b64encode(self.png()).decode(), "text/plain": repr(self)}


def axes(width: float = 8, height: float = 3, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """(figure, axes) in this module's inks; more than one of the axes is an array. `options` as matplotlib's `subplots`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    found = figure.subplots(rows, columns, **options)
    for ax in np.atleast_1d(found).flat:
        ax.set_facecolor("none")
        ax.tick_params(colors=INK, which="both", labelsize=9)
        for edge, spine in ax.spines.items():
            spine.set_color(INK)
            spine.set_visible(edge in ("left", "bottom"))
        for text in (ax.title, ax.xaxis.label, ax.yaxis.label):
            text.set_color(INK)
            text.set_size(10)
    return figure, found


def legend(ax: Any, **options: Any) -> None:
    """A legend without a box, in this module's ink."""
    ax.legend(frameon=False, labelcolor=INK, fontsize=9, **options)


# --- bits ----------------------------------------------------------------------------------------------------------------------------------------


def float_fields(kind: str) -> dict[str, int]:
    """Widths of the fields of a kind in `draw.FLOATS`, from the highest bit: {"sign": 1, "exponent": 4, "mantissa": 3} for "e4m3"."""
    return {name: width for name, width in zip(("sign", "exponent", "mantissa"), draw.FLOATS[kind]) if width}


def bits(rows: Mapping[str, int], fields: Mapping[str, int], notes: Sequence[str] = ()) -> Picture:
    """Patterns bit by bit, a row each behind its label, coloured by field; `fields` has widths from the highest bit, `notes` what stands behind."""
    count = sum(fields.values())
    figure, ax = axes(min(9.0, 2.6 + 0.34 * count), 0.45 + 0.4 * len(rows))
    colours = [COLOURS[i % len(COLOURS)] for i, width in enumerate(fields.values()) for _ in range(width)]
    for y, (label, pattern) in enumerate(rows.items()):
        for x, colour in enumerate(colours):
            one = pattern >> (count - 1 - x) & 1
            _cell(ax, x, y, colour, one)
            ax.text(x + 0.5, y + 0.5, str(one), ha="center", va="center", fontsize=10, color="white" if one else colour, family="monospace")
        ax.text(-0.3, y + 0.5, label, ha="right", va="center", color=INK, fontsize=10, family="monospace")
        if y < len(notes):
            ax.text(count + 0.3, y + 0.5, notes[y], ha="left", va="center", color=INK, fontsize=10)
    start = 0
    for i, (name, width) in enumerate(fields.items()):
        ax.text(start + width / 2, -0.15, name, ha="center", va="bottom", color=COLOURS[i % len(COLOURS)], fontsize=9)
        start += width
    ax.set(xlim=(0, count), ylim=(len(rows), 0))
    ax.axis("off")
    return Picture(figure, f"bits of {', '.join(rows)}: {', '.join(fields)}")


def _cell(ax: Any, x: float, y: float, colour: str, filled: int) -> None:
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((x + 0.06, y + 0.1), 0.88, 0.8, facecolor=colour if filled else "none", edgecolor=colour, linewidth=1))


def block(module: ModuleType, width: int = 16) -> Picture:
    """A map of one block of a format: every bit in the colour of the number it belongs to, `width` bytes a row, bit 7 of a byte first.

    Every other group of a number is a shade lighter, so that one sees where a group's bits lie.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    owners = draw.owners(module)
    rows, parts = -(-len(owners) // width), list(dict.fromkeys(o.part for byte in owners for o in byte))
    colours = {part: np.array(to_rgb(COLOURS[i % len(COLOURS)])) for i, part in enumerate(parts)}
    image = np.zeros((rows, width * 8, 4))
    for byte, row in enumerate(owners):
        for bit, owner in enumerate(row):
            lighter = 0.35 * (owner.at[0] % 2) if owner.at else 0
            image[byte // width, byte % width * 8 + 7 - bit] = [*(colours[owner.part] * (1 - lighter) + lighter), 1]
    figure, ax = axes(8.5, 0.7 + 0.3 * rows)
    ax.imshow(image, aspect="auto", interpolation="nearest", extent=(0, width, rows, 0))
    for x in range(width + 1):
        ax.axvline(x, color=INK, linewidth=1)
    for y in range(rows + 1):
        ax.axhline(y, color=INK, linewidth=1)
    ax.set(xticks=np.arange(width) + 0.5, yticks=np.arange(rows) + 0.5, xlabel="byte within the row")
    ax.set_xticklabels(range(width))
    ax.set_yticklabels(range(0, rows * width, width))
    ax.tick_params(length=0)
    handles = [Patch(color=tuple(colours[part]), label=part) for part in parts]
    legend(ax, handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(parts))
    return Picture(figure, f"the {len(owners)} bytes of a {module.NAME} block, each bit coloured by the number it belongs to: {', '.join(parts)}")


# --- numbers -------------------------------------------------------------------------------------------------------------------------------------


def number_line(rows: Mapping[str, Any], limits: tuple[float, float] | None = None, log: bool = False, title: str = "") -> Picture:
    """Where numbers lie: a row of strokes for each set, on one axis; `log` for a logarithmic one."""
    figure, ax = axes(8, 0.9 + 0.5 * len(rows))
    for y, values in enumerate(rows.values()):
        values = np.asarray(values, np.float64).ravel()
        values = values[np.isfinite(values) & ((values > 0) | (not log))]
        ax.vlines(values, y - 0.32, y + 0.32, color=COLOURS[y % len(COLOURS)], linewidth=1.2)
    ax.set(yticks=range(len(rows)), ylim=(len(rows) - 0.4, -0.6), title=title)
    ax.set_yticklabels(rows)
    if log:
        ax.set_xscale("log", base=2)
    if limits:
        ax.set_xlim(*limits)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    return Picture(figure, title or f"number line of {', '.join(rows)}")


def heat(
    values: Any,
    title: str = "",
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    row_label: str = "",
    column_label: str = "",
    unit: str = "",
    numbers: str = "",
    centred: bool = False,
    size: tuple[float, float] | None = None,
) -> Picture:
    """A matrix as colours. `numbers` is a format ("{:.2f}") to write each value with; `centred` makes zero the middle of a two-sided scale."""
    values = np.asarray(values, np.float64)
    default = (min(9.0, 2.2 + 0.3 * max(values.shape[1], 8)), min(7.0, 1.2 + 0.3 * max(values.shape[0], 3)))
    figure, ax = axes(*(size or default))
    top = float(np.nanmax(np.abs(values)))
    scale = {"cmap": "RdBu_r", "vmin": -top, "vmax": top} if centred else {"cmap": "viridis"}
    image = ax.imshow(values, aspect="auto", interpolation="nearest", **scale)
    for (r, c), value in np.ndenumerate(values) if numbers else ():
        red, green, blue, _ = image.cmap(image.norm(value))
        dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.55
        ax.text(c, r, numbers.format(value), ha="center", va="center", fontsize=8, color="white" if dark else "black")
    if len(rows):
        ax.set_yticks(range(len(rows)), rows)
    if len(columns):
        ax.set_xticks(range(len(columns)), columns, rotation=90 if max(map(len, columns)) > 3 else 0)
    ax.set(title=title, xlabel=column_label, ylabel=row_label)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=ax, pad=0.02)
    bar.ax.tick_params(colors=INK, labelsize=8)
    bar.outline.set_visible(False)
    bar.set_label(unit, color=INK, size=9)
    return Picture(figure, title or "heat map")


def curves(
    lines: Mapping[str, tuple[Any, Any]], x: str = "", y: str = "", title: str = "", log: str = "", dots: bool = False, height: float = 3.2
) -> Picture:  # fmt: skip
    """Curves by name, (xs, ys) each; `log` names the logarithmic axes ("x", "y", "xy"), `dots` draws points instead of lines."""
    figure, ax = axes(8, height)
    for i, (label, (xs, ys)) in enumerate(lines.items()):
        style: dict[str, Any] = {"linestyle": "none", "marker": ".", "markersize": 4} if dots else {"linewidth": 1.8}
        ax.plot(xs, ys, color=COLOURS[i % len(COLOURS)], label=label, **style)
    for axis in log:
        getattr(ax, f"set_{axis}scale")("log")
    ax.set(xlabel=x, ylabel=y, title=title)
    ax.grid(color=INK, alpha=0.25, linewidth=0.6)
    if len(lines) > 1:
        legend(ax)
    return Picture(figure, title or f"{y} over {x}: {', '.join(lines)}")


def bars(values: Mapping[str, float], unit: str = "", title: str = "", log: bool = False, form: str = "{:.3g}") -> Picture:
    """Bars side by side from the left, each with its value behind it, written with `form`."""
    figure, ax = axes(8, 0.9 + 0.34 * len(values))
    ax.barh(range(len(values)), list(values.values()), color=[COLOURS[i % len(COLOURS)] for i in range(len(values))], height=0.65)
    for y, value in enumerate(values.values()):
        ax.annotate(form.format(value), (value, y), xytext=(4, 0), textcoords="offset points", va="center", color=INK, fontsize=9)
    ax.set(xlabel=unit, title=title)
    ax.set_yticks(range(len(values)), values)
    ax.invert_yaxis()
    ax.margins(x=0.12)
    if log:
        ax.set_xscale("log")
    return Picture(figure, title or f"bars of {', '.join(values)}")
