"""Compile ahead what a model needs, so that its first answer does not wait for it: `python -m refimpl.warmup
[--backend cpu|cuda]`.

Kernels are compiled when first called, and kept on disk for later processes. Which ones a model calls depends
on what its weights are stored as and on how many tokens come at a time; so one layer of each kind the model
has is run, on all the numbers of tokens that make a difference. Of a large model a few experts are read for
it. Before that, the kernels of the CPU are compiled by several processes at a time.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from refimpl import ops
from refimpl.cache import PREFILL
from refimpl.checkpoint import names
from refimpl.checkpoint.folder import Checkpoint
from refimpl.cli import Parser, run, to_json
from refimpl.cli.waiting import at_terminal
from refimpl.config import DeepSeekConfig
from refimpl.devices import memory
from refimpl.devices.backend import Backend
from refimpl.loading import compiling, hub, interleaving
from refimpl.loading.opening import check_backend, open_backend
from refimpl.model import Model
from refimpl.reference import interleaved

LONG = 1 << 13  # rows of room that have other kernels for one token on a GPU than few rows
# Tokens at a time: one; few, by the widths of tiles on a GPU; enough for the BLAS on a CPU; a prompt's, and
# where there is room for more, that.
TOKENS = (1, 2, 16, 17, 33, 65, 129, PREFILL)


class Sample(Mapping[str, Any]):
    """A checkpoint of some of another's layers, numbered anew."""

    def __init__(self, checkpoint: Mapping[str, Any], layers: list[int]):
        self.checkpoint, self.layers, self.folder = (
            checkpoint,
            layers,
            getattr(checkpoint, "folder", "checkpoint"),
        )

    def _theirs(self, name: str) -> str:
        found = re.match(r"blk\.(\d+)(\..*)", name)
        return (
            f"blk.{self.layers[int(found[1])]}{found[2]}"
            if found and int(found[1]) < len(self.layers)
            else name
        )

    def __getitem__(self, name: str) -> Any:
        return self.checkpoint[self._theirs(name)]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._theirs(name) in self.checkpoint

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint)

    def __len__(self) -> int:
        return len(self.checkpoint)


def kinds(inventory: memory.Inventory) -> list[int]:
    """The first layer of each kind: dense or with experts, and what its tensors are stored as."""
    stored: dict[int, set[tuple[str, str]]] = {i: set() for i in range(inventory.config.num_hidden_layers)}
    for name, tensor in inventory.tensors.items():
        if found := re.match(r"model\.layers\.(\d+)\.(.*)", name):
            stored[int(found[1])].add((found[2], tensor.kind))
    first: dict[frozenset, int] = {}
    for layer, tensors in stored.items():
        first.setdefault(frozenset(tensors), layer)
    return list(first.values())


def sample(checkpoint: Mapping[str, Any], config: DeepSeekConfig) -> tuple[DeepSeekConfig, Sample]:
    """A model of one layer of each kind."""
    layers = kinds(memory.Inventory.of(checkpoint, config))
    dense = sum(config.is_dense(i) for i in layers)
    return replace(config, num_hidden_layers=len(layers), first_k_dense_replace=dense), Sample(
        checkpoint, layers
    )


def warm(checkpoint: Mapping[str, Any], config: DeepSeekConfig, backend: Backend) -> Model:
    """Run the sample once for every number of tokens. Raises what loading a model raises."""
    small, layers = sample(checkpoint, config)
    backend.prefill = memory.check_memory(backend, layers, small)
    model = Model(small, layers, backend)
    if interleaving.pays(backend.name, backend.activations):
        _warm_interleaved(layers)
    for tokens in sorted({*TOKENS, backend.prefill}):
        if tokens < config.max_position_embeddings:
            cache = model.new_cache()
            model.forward([0] * tokens, cache, last_only=True)  # one token many times: few experts
            model.forward([0], cache)
    if backend.name == "cuda" and config.max_position_embeddings >= LONG:
        cache = model.new_cache()
        cache.reserve(LONG)
        model.forward([0], cache)
        few = next(n for n in TOKENS if n >= memory.EXPANDED_FROM)
        cache.advance(LONG - 1 - few)  # rows of zeros: a prompt behind them takes them in pieces
        model.forward([0] * few, cache, last_only=True)
    return model


def _warm_interleaved(checkpoint: Mapping[str, Any]) -> None:
    """Run what multiplies rows that lie side by side, as loading rearranges them, on one expert."""
    for name in filter(names.is_routed_expert, checkpoint):
        if interleaved.can_interleave(stack := checkpoint[name]) and len(stack.shape) == 3:
            w = interleaved.interleave(stack.expert(0))
            for tokens in TOKENS[:3]:
                ops.load("linear", "cpu")(np.zeros((tokens, w.shape[1]), np.float32), w)
            return


def main(argv: list[str]) -> None:
    """Run `python -m refimpl.warmup` with these arguments."""
    parser = Parser("python -m refimpl.warmup", __doc__)
    parser.add_argument(
        "--model_path",
        metavar="DIR",
        help="config, and the weights unless --gguf_path names them (default: the embedded model)",
    )
    parser.add_argument("--gguf_path", metavar="DIR", help="the weights")
    parser.add_argument("--backend", default="auto", choices=("auto", *ops.BACKENDS[1:]))
    parser.add_argument("--activations", default="fp8", choices=("fp8", "exact"))
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args(argv)
    check_backend(args.backend)
    checkpoint = Checkpoint.open(args.gguf_path or args.model_path or hub.embedded(), args.model_path)
    config = DeepSeekConfig.from_dict(checkpoint.config, where=checkpoint.folder)
    start = time.perf_counter()
    backend, shown = open_backend(args.backend, args.activations), at_terminal()
    shown.watch_compiler()
    repack = interleaving.pays(backend.name, backend.activations)
    with shown.during("running one layer of each kind"):
        stages = compiling.stages(sample(checkpoint, config)[1], config, backend, repack)
        compiling.ahead(stages, shown.compiled if shown.live else None)
        model = warm(checkpoint, config, backend)
    seconds, layers = time.perf_counter() - start, model.checkpoint.layers  # type: ignore[attr-defined]
    if args.json:
        print(to_json({"backend": model.backend.name, "layers": layers, "seconds": seconds}))
    else:
        print(
            f"{model.backend.name}: kernels for layers like {', '.join(map(str, layers))} are compiled and "
            f"kept ({seconds:.1f} s)"
        )


if __name__ == "__main__":
    raise SystemExit(run(main))
