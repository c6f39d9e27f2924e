"""How the time of a layer's experts and of attention grows: `python -m refimpl.bench growth [FOLDER]`,
DeepSeek-V3's shape, Q4_K.

Prints a line a point, and with a folder draws `growth.svg` there. Medians of a few calls; each call finds its
weights in memory, not in a cache.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from refimpl import ops
from refimpl.bench import measure
from refimpl.bench.cpu import ExpertMatrices
from refimpl.cli import Parser, to_json
from refimpl.devices.speed import median, random_weights
from refimpl.files import atomic, check_writable
from refimpl.tensors import Packed

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CHOSEN = (1, 2, 4, 8, 16, 32)
CONTEXT = (16, 256, 1024, 2048, 4096, 8192)
HEADS, NOPE, ROPE, VALUE, LATENT = 128, 128, 64, 128, 512


class Point(NamedTuple):
    """One measurement: seconds at `x` of what the series varies."""

    series: str
    label: str
    x: int
    seconds: float


def layer(rng: np.random.Generator, sides: ExpertMatrices, tokens: int, chosen: int) -> Callable[[], object]:
    """A call of the experts for so many tokens, routed anew each time."""
    experts, count = ops.load("experts", "cpu"), len(sides[0].data)
    x = rng.standard_normal((tokens, sides[0].shape[2])).astype(np.float32)
    weights = np.full((tokens, chosen), 1 / chosen, np.float32)
    return lambda: experts(x, np.argsort(rng.random((tokens, count)), axis=1)[:, :chosen], weights, *sides)


def points() -> Iterator[Point]:
    """All measurements, one by one."""
    hidden, width, count, chosen = measure.SHAPES["v3"]
    rng, cores = np.random.default_rng(0), os.cpu_count() or 1
    gate, up = (random_weights("Q4_K", count, width, hidden) for _ in range(2))
    sides = gate, up, random_weights("Q4_K", count, hidden, width)
    for threads in sorted({1, cores}):
        ops.set_threads(threads)
        for m in TOKENS:
            yield Point(
                "tokens", f"{threads} thread{'s' * (threads > 1)}", m, median(layer(rng, sides, m, chosen))
            )
        for a in CHOSEN:
            yield Point(
                "experts a token",
                f"{threads} thread{'s' * (threads > 1)}",
                a,
                median(layer(rng, sides, 1, a)),
            )
    layers = [
        tuple(Packed(s.data[e : e + 8], s.ggml_type, (8, *s.shape[1:])) for s in sides)
        for e in range(0, count, 8)
    ]
    for n in range(1, len(layers) + 1):
        calls = [layer(rng, part, 1, chosen) for part in layers[:n]]  # type: ignore[arg-type]
        yield Point("layers", "", n, median(lambda calls=calls: [call() for call in calls]))  # type: ignore[misc]
    yield from attention(rng)


def attention(rng: np.random.Generator) -> Iterator[Point]:
    """One token's attention in one layer behind contexts of several lengths."""
    absorbed = ops.load("mla_absorbed", "cpu")
    shapes = (1, HEADS, NOPE), (1, HEADS, ROPE), (HEADS, NOPE + VALUE, LATENT), (max(CONTEXT), LATENT + ROPE)
    q_nope, q_pe, kv_b, cache = (rng.standard_normal(s).astype(np.float32) for s in shapes)
    for n in CONTEXT:
        args = q_nope, q_pe, cache[:n, :LATENT], cache[:n, LATENT:], kv_b, 0.1
        yield Point("tokens of context", "", n, median(lambda args=args: absorbed(*args)))  # type: ignore[misc]


def draw(found: list[Point], path: Path, *, force: bool = False) -> None:
    """The four series side by side, as `path`; raises as `atomic`."""
    from refimpl.plots import Picture  # brings matplotlib, optional

    titles = {
        "tokens": "experts of a layer, tokens at once",
        "experts a token": "one token, experts in use",
        "layers": "one token, layers",
        "tokens of context": "attention of a layer, context",
    }
    picture = Picture("Time against tokens, experts in use, layers and context.", 9.2, 5.2, 2, 2)
    for ax, (series, title) in zip(picture.axes, titles.items()):
        for label in dict.fromkeys(p.label for p in found if p.series == series):
            own = [p for p in found if (p.series, p.label) == (series, label)]
            ax.plot(
                [p.x for p in own],
                [p.seconds * 1e3 for p in own],
                marker="o",
                markersize=3,
                label=label or None,
            )
        ax.set(title=title, xlabel=series, ylabel="ms")
        if series != "layers":
            ax.set(xscale="log", yscale="log")
            ax.set_xticks([p.x for p in own], [str(p.x) for p in own])
            ax.minorticks_off()
        ax.set_ylim(bottom=0 if series == "layers" else None)
        if any(p.label for p in found if p.series == series):
            picture.legend(ax)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path, force=force) as file:
        picture.figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})


def main(argv: list[str]) -> None:
    """Run `python -m refimpl.bench growth` with these arguments."""
    parser = Parser("python -m refimpl.bench growth", __doc__)
    parser.add_argument(
        "folder", nargs="?", type=Path, help="where growth.svg is drawn (needs matplotlib, extra `notebooks`)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON list")
    parser.add_argument("--force", action="store_true", help="replace the picture, if there is one")
    args = parser.parse_args(argv)
    if args.folder:
        check_writable(args.folder / "growth.svg", force=args.force)
    found = []
    for p in points():
        found.append(p)
        line = f"{p.series:18} {p.label:10} {p.x:6} {p.seconds * 1e3:10.3f} ms"
        print(line, file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.json:
        print(to_json([p._asdict() for p in found]))
    if args.folder:
        draw(found, args.folder / "growth.svg", force=args.force)
