"""What each format costs in accuracy: `python -m refimpl.bench formats [--type Q4_K,Q6_K] [--peer]
[--json]`.

The figure is the relative root mean square error, sqrt(sum (x - y)^2 / sum x^2), of quantizing x and decoding
it again to y: once for Gaussian numbers, once for the weights of the embedded model. Its FP8 matrices lie on
the E4M3 grid already, so the E4M3 row is measured on its BF16 matrices instead. `--peer` adds ggml's own
quantizers (see `refimpl.bench.peers`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from refimpl import formats
from refimpl.bench import peers
from refimpl.checkpoint import codecs, safetensors
from refimpl.cli import Parser, to_json
from refimpl.formats import bf16
from refimpl.reference import fp8
from refimpl.tensors import ScaledFP8
from refimpl.tiny import FP8_DIR

TYPES = ("Q2_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "E4M3")
E4M3_BITS = 8 + 32 / fp8.BLOCK**2  # a code, and a float32 for each tile
RoundTrip = Callable[[np.ndarray], np.ndarray]


def relative_rmse(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    """sqrt(sum (x - y)^2 / sum x^2) over pairs (x, y) of arrays, in float64."""
    lost = total = 0.0
    for x, y in pairs:
        lost += float(np.square(x.astype(np.float64) - y).sum())
        total += float(np.square(x, dtype=np.float64).sum())
    return (lost / total) ** 0.5


def gaussian() -> list[np.ndarray]:
    """One matrix of normal numbers, f32 [512, 1024], the same every time."""
    return [np.random.default_rng(0).standard_normal((512, 1024), np.float32)]


def embedded_weights(stored: str = "F8_E4M3", every: int = 1) -> list[np.ndarray]:
    """Every so-manieth matrix f32 [N, K] of the embedded model that is stored as F8_E4M3 or as BF16, K a
    multiple of 256.
    """
    tensors, _ = safetensors.read_folder(FP8_DIR)
    chosen = [
        t
        for _, t in sorted(tensors.items())
        if t.dtype == stored and len(t.shape) == 2 and t.shape[1] % 256 == 0
    ]
    if stored == "BF16":
        return [bf16.decode(safetensors.view(t)) for t in chosen[::every]]
    scales = [safetensors.view(tensors[t.name + "_scale_inv"]) for t in chosen[::every]]
    return [fp8.weight_dequant(ScaledFP8(safetensors.view(t), s)) for t, s in zip(chosen[::every], scales)]


def ours(name: str) -> RoundTrip:
    """x f32 [N, K] -> the same numbers after this project's quantizer. UnsupportedError E1301, E1303 for
    types it does not write.
    """
    if name == "E4M3":
        return lambda x: fp8.weight_dequant(fp8.weight_quant(x))
    kind = formats.type_id(name)
    formats.quantize(
        kind, np.zeros((1, formats.get(kind).WEIGHTS), np.float32)
    )  # refuse what is only decoded now, not on the way
    return lambda x: codecs.dequantize(kind, codecs.quantize(kind, x))


def peer(name: str) -> RoundTrip:
    """The way there and back of x f32 [N, K], quantized to the type `name` by ggml and decoded here.
    UnsupportedError E5120 when the package llama_cpp is not installed.
    """
    kind = formats.type_id(name)
    return lambda x: codecs.dequantize(kind, peers.quantize(kind, x))


def measure(name: str, with_peer: bool = False) -> dict[str, Any]:
    """One row of the table; the peer's figures are None for E4M3, which ggml lacks."""
    module = None if name == "E4M3" else formats.get(formats.type_id(name))
    row: dict[str, Any] = {
        "type": name,
        "bits": module.BLOCK.itemsize * 8 / module.WEIGHTS if module else E4M3_BITS,
    }
    for label, matrices in (
        ("gaussian", gaussian()),
        ("weights", embedded_weights("F8_E4M3" if module else "BF16")),
    ):
        row[label] = mine = relative_rmse((x, ours(name)(x)) for x in matrices)
        if with_peer:
            theirs = relative_rmse((x, peer(name)(x)) for x in matrices) if module else None
            row |= {f"{label}_peer": theirs, f"{label}_ratio": mine / theirs if theirs else None}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text, errors in percent."""
    columns = [key for key in rows[0] if key not in ("type", "bits")]
    lines = [f"{'type':6} {'bits':>7}  " + "  ".join(f"{c.replace('_', ' '):>14}" for c in columns)]
    for row in rows:
        cells = [
            "-" if row[c] is None else f"{row[c]:.4f}" if c.endswith("ratio") else f"{row[c]:.4%}"
            for c in columns
        ]
        lines.append(f"{row['type']:6} {row['bits']:7.4f}  " + "  ".join(f"{c:>14}" for c in cells))
    return "\n".join(lines)


def main(argv: list[str]) -> int | None:
    """Run `python -m refimpl.bench formats` with these arguments."""
    parser = Parser(prog="python -m refimpl.bench formats", description=__doc__)
    parser.add_argument(
        "--type",
        default=",".join(TYPES),
        metavar="LIST",
        help=f"types, comma between (default {','.join(TYPES)})",
    )
    parser.add_argument(
        "--peer",
        action="store_true",
        help="also ggml's quantizers, and the ratio of ours to theirs (needs llama_cpp)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON list on stdout")
    args = parser.parse_args(argv)
    names = [name.strip().upper() for name in args.type.split(",") if name.strip()]
    if not names:
        parser.error("--type names no type")
    for name in names:
        ours(name)
    if args.peer:
        peers.library()
    rows = [measure(name, args.peer) for name in names]
    print(to_json(rows) if args.json else table(rows))
    return 0
