"""How fast a merge is beside a plain copy of the same bytes: `python -m refimpl.bench merge [--gigabytes N]
[--folder DIR] [--json]`.

Layers of DeepSeek-V3's shape with as many experts as make N gigabytes, filled with random bytes. Three
contenders take turns on one disk, in an order that changes: the merge, which reads, writes, sums and syncs;
`shutil.copyfile` of its output's files, each synced after; and the same copy left in the system's memory,
which is not on the disk when it ends. Medians. And the memory that planning and merging took the first time.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from refimpl import convert_model, formats
from refimpl.bench.resident import Memory
from refimpl.checkpoint import gguf, names, safetensors
from refimpl.cli import Parser, integer, number, size, to_json
from refimpl.config import DeepSeekConfig
from refimpl.formats import q4_k
from refimpl.tiny import FP8_DIR

HIDDEN, NARROW, PIECE = 7168, 2048, 1 << 20
LAYERS = 7  # one of them dense


def inputs(folder: Path, gigabytes: float) -> tuple[Path, Path]:
    """A checkpoint and a GGUF; about `gigabytes` of experts in all."""
    stack = formats.nbytes(q4_k.GGML_TYPE, (1, NARROW, HIDDEN)) * 3 * (LAYERS - 1)
    experts = max(4, round(gigabytes * 1e9 / stack) // 4 * 4)
    raw = json.loads((FP8_DIR / "config.json").read_bytes()) | {
        "hidden_size": HIDDEN,
        "moe_intermediate_size": NARROW,
        "intermediate_size": NARROW,
        "num_hidden_layers": LAYERS,
        "vocab_size": 1024,
        "first_k_dense_replace": 1,
        "n_routed_experts": experts,
        "n_group": 4,
        "topk_group": 2,
        "num_nextn_predict_layers": 0,
    }
    config = DeepSeekConfig.from_dict(raw)
    checkpoint, model = folder / "fp8", folder / "model.gguf"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(raw))
    plain = {n: v for n, v in names.hf_inventory(config).items() if not names.is_routed_expert(n)}
    entries = [
        safetensors.Entry(n, kind, shape, _Noise(safetensors.DTYPES[kind].itemsize, shape))
        for n, (kind, shape) in plain.items()
    ]
    safetensors.write(checkpoint / "model.safetensors", entries)
    stacks = {n: s for n, s in names.gguf_inventory(config).items() if names.is_routed_expert(n)}
    blobs = [
        gguf.Entry(n, q4_k.GGML_TYPE, s, _Noise(1, (formats.nbytes(q4_k.GGML_TYPE, s),)))
        for n, s in stacks.items()
    ]
    gguf.write(model, {"general.architecture": "deepseek2"}, blobs)
    return checkpoint, model


class _Noise:
    """Random bytes in pieces: the same megabyte again and again, which no disk is known to notice."""

    data = np.random.default_rng(0).bytes(PIECE)

    def __init__(self, itemsize: int, shape: tuple[int, ...]):
        self.nbytes = itemsize * int(np.prod(shape))

    def __call__(self):
        for left in range(self.nbytes, 0, -PIECE):
            yield self.data[: min(left, PIECE)]


def copy(source: Path, target: Path, sync: bool) -> None:
    """Every file of a folder by `shutil.copyfile`."""
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        if sync:
            with open(target / path.name, "rb+") as file:
                os.fsync(file.fileno())


def race(folder: Path, gigabytes: float, rounds: int) -> tuple[int, int, dict[str, float]]:
    """Bytes of the output, bytes of memory that the first merge took, and the median seconds of each
    contender.
    """
    # Not `speed.race`: what a turn writes is synced before the next one's clock starts and removed after it,
    # and the order changes, as a disk remembers who came before.
    given, memory = inputs(folder, gigabytes), Memory()
    memory.start()
    plan = convert_model.plan(*given)
    convert_model.write(plan, folder / "first")
    growth = memory.growth()
    out = folder / "out"
    jobs: dict[str, Callable[[], None]] = {
        "merge": lambda: convert_model.write(plan, out),
        "copy, synced": lambda: copy(folder / "first", out, True),
        "copy, unsynced": lambda: copy(folder / "first", out, False),
    }
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(rounds):
        for name in [*list(jobs)[turn % 3 :], *list(jobs)[: turn % 3]]:
            os.sync()  # what the one before left is not this one's work
            start = time.perf_counter()
            jobs[name]()
            times[name].append(time.perf_counter() - start)
            shutil.rmtree(out)
    return plan.nbytes, growth, {name: float(np.median(t)) for name, t in times.items()}


def main(argv: list[str]) -> None:
    """Run `python -m refimpl.bench merge` with these arguments."""
    parser = Parser("python -m refimpl.bench merge", __doc__)
    parser.add_argument(
        "--gigabytes",
        type=number(0.001, 1e6),
        default=1.5,
        help="of experts; thrice that is needed on the disk (default 1.5)",
    )
    parser.add_argument(
        "--rounds", type=integer(1), default=5, help="how often each takes its turn (default 5)"
    )
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (default: here)")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder or Path.cwd(), prefix=".bench-merge-") as folder:
        nbytes, growth, seconds = race(Path(folder), args.gigabytes, args.rounds)
    for name, s in seconds.items():
        line = (
            f"{name:15} {s:7.3f} s  {nbytes / s / 1e9:5.2f} GB/s  {seconds['copy, synced'] / s:5.2f} of "
            f"a synced copy"
        )
        print(line, file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(
            to_json(
                {
                    "nbytes": nbytes,
                    "memory": growth,
                    "seconds": seconds,
                    "of_a_synced_copy": seconds["copy, synced"] / seconds["merge"],
                }
            )
        )
    else:
        print(f"{size(nbytes)}, {args.rounds} rounds; a merge took {growth / 2**20:.0f} MiB of memory")
