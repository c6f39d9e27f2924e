"""Pictures for the notebooks. Backgrounds are transparent and all colours are of middle brightness, so that
they read on white and on black.

`Picture` is a matplotlib figure that a notebook shows when it is the last line of a cell; its text says in
words what it shows. The functions draw what comes again and again: the bits of a number, the bytes of a
block, a grid of numbers, a roofline.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import groupby
from types import ModuleType
from typing import Any

import numpy as np

from refimpl.formats import draw

INK = "#808080"
COLOURS = ("#3b7dc4", "#d9722e", "#3a9b62", "#c94f5d", "#8a63c9", "#1f9aa5", "#b08a2a", "#a0568c")
"""Eight that differ from each other, from white and from black, and carry white letters."""


class Picture:
    """A figure of `rows` x `columns` axes; `ax` is the first of them, `axes` all. `text` describes it in a
    sentence.
    """

    def __init__(
        self,
        text: str,
        width: float = 7.2,
        height: float = 2.6,
        rows: int = 1,
        columns: int = 1,
        **options: Any,
    ):
        from matplotlib.figure import Figure  # as above

        self.text = text
        self.figure = Figure(figsize=(width, height), layout="constrained")
        self.figure.patch.set_alpha(0)
        self.axes = self.figure.subplots(rows, columns, squeeze=False, **options).ravel()
        self.ax = self.axes[0]
        for ax in self.axes:
            _style(ax)

    def legend(self, ax: Any = None, **options: Any) -> None:
        """A legend without a frame, its words in ink."""
        (ax or self.ax).legend(frameon=False, labelcolor=INK, fontsize=8, **options)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=110, transparent=True)
        return buffer.getvalue()

    def __repr__(self) -> str:
        return self.text


def _style(ax: Any) -> None:
    ax.patch.set_alpha(0)
    ax.tick_params(colors=INK, labelsize=8, which="both")
    for side, spine in ax.spines.items():
        spine.set_color(INK)
        spine.set_visible(side in ("left", "bottom"))
    ax.xaxis.label.set(color=INK, fontsize=9)
    ax.yaxis.label.set(color=INK, fontsize=9)
    ax.title.set(color=INK, fontsize=10)
    ax.set_prop_cycle(color=COLOURS)
    ax.set_axisbelow(True)


def _bare(ax: Any) -> None:
    """Take ticks and frame away from one of matplotlib's axes."""
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)


def _box(
    ax: Any,
    x: float,
    y: float,
    width: float,
    height: float,
    colour: str,
    text: str = "",
    size: float = 9,
    shade: float = 1.0,
) -> None:
    from matplotlib.colors import to_rgb  # matplotlib: optional, and a second to import
    from matplotlib.patches import Rectangle  # as above

    face = [shade * channel for channel in to_rgb(colour)]
    ax.add_patch(Rectangle((x, y), width, height, facecolor=face, edgecolor=INK, linewidth=0.6))
    ax.text(
        x + width / 2,
        y + height / 2,
        text,
        ha="center",
        va="center",
        color="white",
        fontsize=size,
        family="monospace",
    )


def bits(rows: Mapping[str, Sequence[tuple[str, str]]], text: str = "") -> Picture:
    """One line a row: {"0x2a": [("sign", "0"), ("exponent", "0101"), ("mantissa", "010")]}, a colour for each
    field's name, bits in boxes.
    """
    words = text or "; ".join(
        f"{label}: " + ", ".join(f"{name} {value}" for name, value in parts) for label, parts in rows.items()
    )
    longest = max(sum(len(value) for _, value in parts) for parts in rows.values())
    p = Picture(words, min(7.6, 1.4 + 0.42 * longest), 0.25 + 0.72 * len(rows))
    names = list(dict.fromkeys(name for parts in rows.values() for name, _ in parts))
    for i, (label, parts) in enumerate(rows.items()):
        y, x = -1.7 * i, 0
        p.ax.text(-0.3, y + 0.5, label, ha="right", va="center", color=INK, fontsize=10, family="monospace")
        for name, value in parts:
            for bit in value:
                _box(p.ax, x, y, 1, 1, COLOURS[names.index(name) % 8], bit)
                x += 1
            p.ax.text(
                x - len(value) / 2,
                y - 0.1,
                name,
                ha="center",
                va="top",
                color=COLOURS[names.index(name) % 8],
                fontsize=8,
            )
    p.ax.set_xlim(-0.35 * max(map(len, rows)) - 0.5, longest + 0.2)
    p.ax.set_ylim(-1.7 * len(rows) + 0.9, 1.1)
    _bare(p.ax)
    return p


def block(module: ModuleType, data: np.ndarray, across: int = 16, show: str = "hex") -> Picture:
    """The bytes of one block, u8 [block bytes], in rows of `across`, every bit coloured by the number it
    belongs to, the highest bit on the left.

    `show`: "hex", the byte; "group", which group a bit's number is of; "" for colours alone.
    """
    owners = draw.owners(module)
    parts = list(dict.fromkeys(o.part for row in owners for o in row))
    lines = -(-len(owners) // across)
    p = Picture(
        f"The {len(owners)} bytes of a {module.NAME} block, coloured by {', '.join(parts)}",
        7.6,
        0.5 + 0.3 * lines,
    )
    for i, row in enumerate(owners):
        x, y = i % across, -(i // across)
        for (part, at), run in groupby(
            reversed(list(enumerate(row))), key=lambda pair: (pair[1].part, pair[1].at)
        ):
            places = [bit for bit, _ in run]
            group = str(at[0]) if show == "group" and at else ""
            shade = 0.75 if len(at) > 1 and at[0] % 2 else 1.0
            left = x + (7 - places[0]) / 8
            _box(p.ax, left, y, len(places) / 8, 1, COLOURS[parts.index(part) % 8], group, 6.5, shade)
        if show == "hex":
            p.ax.text(
                x + 0.5,
                y + 0.5,
                f"{data[i]:02x}",
                ha="center",
                va="center",
                color="white",
                fontsize=7.5,
                family="monospace",
            )
    for line in range(lines):
        p.ax.text(
            -0.15,
            -line + 0.5,
            str(line * across),
            ha="right",
            va="center",
            color=INK,
            fontsize=7,
            family="monospace",
        )
    for k, part in enumerate(parts):
        p.ax.text(
            across * k / len(parts), 1.35, f"\u25a0 {part}", color=COLOURS[k % 8], fontsize=9, va="center"
        )
    p.ax.set_xlim(-0.9, across + 0.05)
    p.ax.set_ylim(-lines + 0.95, 1.8)
    _bare(p.ax)
    return p


def grid(
    values: np.ndarray,
    text: str,
    numbers: str = "",
    rows: Sequence[Any] = (),
    columns: Sequence[Any] = (),
    colours: str = "viridis",
    limits: tuple[float, float] | None = None,
    width: float = 7.2,
    height: float | None = None,
    bar: str = "",
) -> Picture:
    """A matrix [R, C] as a grid of colours, with `numbers` (a format such as ".2f") the numbers in it, with
    `bar` a colour bar of that name.
    """
    values = np.atleast_2d(values)
    cell = width * (0.85 if bar else 0.95) / values.shape[1]
    p = Picture(text, width, height or min(7.0, max(1.0, 0.7 + cell * values.shape[0])))
    fill_grid(p, p.ax, values, numbers, rows, columns, colours, limits, bar)
    return p


def fill_grid(
    p: Picture,
    ax: Any,
    values: np.ndarray,
    numbers: str = "",
    rows: Sequence[Any] = (),
    columns: Sequence[Any] = (),
    colours: str = "viridis",
    limits: tuple[float, float] | None = None,
    bar: str = "",
) -> None:
    """Draw values [rows, columns] as a grid of colours into `ax`, one of several axes of a picture. `numbers`
    is a format for the value in each cell, "" for none; `limits` are the values at the ends of the colours.
    """
    low, high = limits or (float(np.nanmin(values)), float(np.nanmax(values)))
    image = ax.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    _bare(ax)
    if len(rows):
        ax.set_yticks(range(len(rows)), [str(r) for r in rows])
    if len(columns):
        ax.set_xticks(range(len(columns)), [str(c) for c in columns])
    ax.tick_params(length=0)
    for r, c in np.ndindex(values.shape) if numbers else ():
        red, green, blue, _ = image.cmap(image.norm(values[r, c]))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        ax.text(
            c,
            r,
            format(values[r, c], numbers),
            ha="center",
            va="center",
            fontsize=7.5,
            color="white" if dark else "black",
        )
    if bar:
        colour_bar = p.figure.colorbar(image, ax=ax, shrink=0.9, pad=0.01)
        colour_bar.outline.set_visible(False)
        colour_bar.ax.tick_params(colors=INK, labelsize=8)
        colour_bar.set_label(bar, color=INK, fontsize=9)


def ticks(
    lines: Mapping[str, np.ndarray],
    text: str,
    log: bool = False,
    height: float | None = None,
    label: str = "number",
) -> Picture:
    """Numbers as strokes on a line each, to compare where grids of numbers are fine and where coarse; `label`
    stands under the axis.
    """
    p = Picture(text, 7.2, height or 0.75 + 0.45 * len(lines))
    for i, values in enumerate(lines.values()):
        p.ax.vlines(np.asarray(values, np.float64), -i - 0.32, -i + 0.32, color=COLOURS[i % 8], linewidth=0.9)
    p.ax.set_yticks([-i for i in range(len(lines))], list(lines))
    if log:
        p.ax.set_xscale("log", base=2)
    p.ax.set_xlabel(label)
    p.ax.spines["left"].set_visible(False)
    p.ax.tick_params(axis="y", length=0)
    return p


def bars(
    values: Mapping[str, float], text: str, label: str = "", numbers: str = ".3g", log: bool = False
) -> Picture:
    """Horizontal bars with their numbers behind them, the first on top."""
    p = Picture(text, 7.2, 0.6 + 0.3 * len(values))
    sizes = list(values.values())
    drawn = p.ax.barh(range(len(sizes)), sizes, color=[COLOURS[i % 8] for i in range(len(sizes))], height=0.7)
    p.ax.bar_label(drawn, [format(v, numbers) for v in sizes], padding=4, color=INK, fontsize=8)
    p.ax.set_yticks(range(len(sizes)), list(values))
    p.ax.invert_yaxis()
    p.ax.set_xlabel(label)
    if log:
        p.ax.set_xscale("log")
    p.ax.margins(x=0.12)
    p.ax.spines["left"].set_visible(False)
    p.ax.tick_params(axis="y", length=0)
    return p


def roofline(gflops: float, gbps: float, points: Mapping[str, float], text: str) -> Picture:
    """What a machine of that peak and that bandwidth can reach, over flops per byte; `points` are kernels
    with theirs, on the roof.
    """
    p = Picture(text, 7.2, 3.2)
    at = np.array([*points.values(), gflops / gbps])
    x = np.geomspace(at.min() / 4, at.max() * 8, 200)
    p.ax.loglog(x, np.minimum(gflops, x * gbps), color=INK, linewidth=1.6)
    for i, (name, intensity) in enumerate(points.items()):
        y = min(gflops, intensity * gbps)
        p.ax.plot(intensity, y, "o", color=COLOURS[i % 8], markersize=7)
        p.ax.annotate(
            name,
            (intensity, y),
            xytext=(9, -11),
            textcoords="offset points",
            color=COLOURS[i % 8],
            fontsize=8.5,
        )
    p.ax.axvline(gflops / gbps, color=INK, linewidth=0.7, linestyle=":")
    p.ax.set_xlabel("operations for each byte read")
    p.ax.set_ylabel("Gflop/s at most")
    return p
