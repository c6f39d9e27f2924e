"""A hybrid folder of a model's true shape with random weights, for measuring a system before its weights are
there.

Blocks are those that this project's quantizers make of normal numbers of standard deviation 0.02, so that
activations stay of ordinary size and the router chooses as it likes; norms are one. A few megabytes of each
format are repeated from a random place on, and every byte of the files is written: what is read later is
memory of its own.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from refimpl import formats
from refimpl.checkpoint import folder, names, safetensors
from refimpl.checkpoint.stored import storage
from refimpl.config import DeepSeekConfig
from refimpl.devices.memory import CONFIGS, Inventory, Stored
from refimpl.devices.speed import random_weights
from refimpl.errors import refusal
from refimpl.files import read_small, write_text
from refimpl.formats import bf16
from refimpl.reference import fp8
from refimpl.tiny import FP8_DIR

MIX = "Q4_K_M"  # llama.cpp's: down projections of half the layers in Q6_K
PATTERN = 8 << 20  # bytes of a format, about
SIGMA = np.float32(0.02)
TICKET = ".refimpl-random-weights"  # lies in a folder whose files may be replaced
Pieces = Iterator[memoryview]


def config(name: str) -> dict[str, Any]:
    """config.json of that name in this package, "tiny" being the embedded model's. UnsupportedError E7021 for
    no such.
    """
    path = FP8_DIR / "config.json" if name == "tiny" else CONFIGS / f"{name}.json"
    if path.parent not in (FP8_DIR, CONFIGS) or not path.exists():
        raise refusal("E7021", name, expected=", ".join(["tiny", *sorted(p.stem for p in CONFIGS.glob("*"))]))
    return json.loads(path.read_text()) | {"num_nextn_predict_layers": 0}


def smaller(
    raw: dict[str, Any], layers: int, experts: int | None = None, vocabulary: int | None = None
) -> dict[str, Any]:
    """A config with so many layers, at least one of each kind, experts and tokens; fewer experts make
    one group.
    """
    dense = min(raw["first_k_dense_replace"], max(1, layers // 4))
    raw = raw | {"num_hidden_layers": layers, "first_k_dense_replace": dense}
    if experts is not None and experts != raw["n_routed_experts"]:
        chosen = min(raw["num_experts_per_tok"], experts)
        raw |= {"n_routed_experts": experts, "n_group": 1, "topk_group": 1, "num_experts_per_tok": chosen}
    return raw | ({"vocab_size": vocabulary} if vocabulary else {})


def inventory(raw: dict[str, Any]) -> Inventory:
    """The inventory of tensors that `refimpl.plan` reckons with."""
    c = DeepSeekConfig.from_dict(raw)
    return Inventory(
        c, {n: Stored(storage(c, n, s, MIX)[0], s) for n, s in names.shapes(c).items()}, "random"
    )


def nbytes(raw: dict[str, Any]) -> int:
    """Bytes of all tensors in the model's files."""
    c = DeepSeekConfig.from_dict(raw)
    return sum(storage(c, n, s, MIX)[1] for n, s in names.shapes(c).items())


def write(raw: dict[str, Any], target: Path, progress: Callable[[int], None]) -> None:
    """Make the folder, a file a layer, several at a time; nothing where it is there already, whole and of
    this config. `progress(n)` is told of every n bytes. ResourceError E5101: something is there that this did
    not make.
    """
    text, config = json.dumps(raw, indent=1), target / "config.json"
    target.mkdir(parents=True, exist_ok=True)
    _claim(target)
    if config.exists() and read_small(config, len(text)) == text.encode():
        progress(nbytes(raw))
        return
    for old in (config, *target.glob("model-*.safetensors")):
        old.unlink(missing_ok=True)
    told = threading.Lock()

    def tell(n: int) -> None:
        with told:
            progress(n)

    c = DeepSeekConfig.from_dict(raw)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for done in [pool.submit(_write_file, c, i, target, tell) for i in range(c.num_hidden_layers + 1)]:
            done.result()
    write_text(config, text)  # last: it says that all is there


def _claim(target: Path) -> None:
    """Leave the ticket that says whose files these are; E5101 in a folder that has others, and none."""
    ticket = target / TICKET
    if not any(target.iterdir()):
        write_text(ticket, "Random weights of refimpl.bench: all of this folder may be removed.\n")
    elif not ticket.is_file() or ticket.is_symlink() or target.is_symlink():
        raise refusal("E5101 random", target)


def _write_file(c: DeepSeekConfig, number: int, target: Path, progress: Callable[[int], None]) -> None:
    """File 0 has what belongs to no layer, file i + 1 layer i."""
    layer, rng = number - 1 if number else None, np.random.default_rng(number)
    shapes = {n: s for n, s in names.shapes(c).items() if names.layer_of(n) == layer}
    entries, metadata = [], {folder.VERSION: "1"}
    for name, shape in shapes.items():
        kind, stored = names.to_gguf(name), storage(c, name, shape, MIX)
        entries += _entries(kind, name, shape, *stored, rng)
        if names.is_routed_expert(name):
            metadata[kind + folder.SHAPE] = ",".join(map(str, shape))
    file = f"model-{number:05}-of-{c.num_hidden_layers:05}.safetensors"
    safetensors.write(target / file, entries, metadata, progress)


def _entries(
    name: str, hf: str, shape: tuple[int, ...], kind: str, size: int, rng: np.random.Generator
) -> list[safetensors.Entry]:
    start = float(rng.random())
    if names.is_routed_expert(hf):
        number = np.int64(formats.type_id(kind)).tobytes()
        return [
            safetensors.Entry(name, "U8", (size,), partial(_repeated, kind, start, size)),
            safetensors.Entry(name.removesuffix(".weight") + ".ggml_type", "I64", (), lambda: [number]),
        ]
    if kind == "E4M3":
        tiles, count = tuple(-(-n // fp8.BLOCK) for n in shape), math.prod(shape)
        return [
            safetensors.Entry(name, "F8_E4M3", shape, partial(_repeated, kind, start, count)),
            safetensors.Entry(
                name + "_scale_inv", "F32", tiles, partial(_repeated, "scale", start, 4 * math.prod(tiles))
            ),
        ]
    pattern = kind if len(shape) > 1 else "one" if kind == "BF16" else "zero"
    return [safetensors.Entry(name, kind, shape, partial(_repeated, pattern, start, size))]


def _repeated(kind: str, start: float, size: int) -> Pieces:
    """`size` bytes of a format's pattern, round and round, the first from that share of it on."""
    data, unit = _pattern(kind)  # by whichever thread comes first; the others may make it too, and drop it
    at = int(start * (len(data) // unit)) * unit
    while size:
        piece = data[at : at + size]
        yield piece
        size, at = size - len(piece), 0


@cache
def _pattern(kind: str) -> tuple[memoryview, int]:
    """Valid bytes, and of how many a number or block is made."""
    if kind in ("E4M3", "scale"):
        quantized, draw = fp8.weight_quant(_normal(1 << 20)), np.random.default_rng(2)
        drawn: Any = quantized.codes if kind == "E4M3" else quantized.scale
        array, unit = draw.choice(drawn.reshape(-1), PATTERN), drawn.itemsize
    elif kind == "BF16":
        array, unit = bf16.quantize(_normal(PATTERN // 2)), 2
    elif kind in ("one", "zero"):
        array, unit = np.full(PATTERN // 4, 0x3F803F80 if kind == "one" else 0, np.uint32), 4
    else:
        module = formats.get(formats.type_id(kind))
        rows = PATTERN // module.BLOCK.itemsize // 16
        array, unit = random_weights(kind, rows, 16 * module.WEIGHTS).data, module.BLOCK.itemsize
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1).data, unit


def _normal(count: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count // 4096, 4096), np.float32) * SIGMA
