"""Opening a model: the backend it runs on, the folder it comes from, and where its modules are placed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from refimpl import ops
from refimpl.checkpoint.folder import Checkpoint
from refimpl.cli import note
from refimpl.config import DeepSeekConfig, plain_ids
from refimpl.devices import memory, placement
from refimpl.devices.backend import Backend
from refimpl.devices.cpu import CpuBackend, check_gpu
from refimpl.errors import refusal
from refimpl.loading import hub, interleaving, reading
from refimpl.model import Model
from refimpl.text.tokenizer import read_stop_ids


def check_backend(name: str) -> None:
    """UnsupportedError where it cannot run, before anything is read: E5010 no such backend; for "cuda" what
    `check_gpu` raises.
    """
    if name not in ("auto", *ops.BACKENDS):
        raise refusal("E5010", name, expected=" or ".join(("auto", *ops.BACKENDS)))
    if name == "cuda":
        check_gpu()


def open_backend(
    name: str = "auto", activations: str = "fp8", place: Callable[[str], str] | None = None
) -> Backend:
    """The backend of that name, "auto" being the fastest there is here; on "cuda" modules go where `place`
    says, "cpu" or "cuda:N". UnsupportedError as `check_backend`.
    """
    check_backend(name)
    name = ops.best_backend() if name == "auto" else name
    if name != "cuda":
        return CpuBackend(name, activations)
    from refimpl.devices import cuda  # torch: seconds, and an extra

    return cuda.CudaBackend(place or placement.experts_on_cpu, activations)


def open_model(
    folder: Path | str | None,
    backend: str = "auto",
    rules: Path | str | None = None,
    activations: str = "fp8",
    threads: int | None = None,
    config_folder: Path | str | None = None,
    repack: str = "auto",
) -> Model:
    """What `refimpl.load` does; see there. `config_folder` has the config.json for weights that lie in a
    folder without.
    """
    check_backend(backend)
    wanted, backend = backend, ops.best_backend() if backend == "auto" else backend
    checkpoint = Checkpoint.open(hub.embedded() if folder is None else folder, config_folder)
    if checkpoint.mtp:
        layers = ", ".join(map(str, checkpoint.mtp))
        note(f"multi-token-prediction layer {layers} is skipped")
    config = DeepSeekConfig.from_dict(checkpoint.config, where=checkpoint.folder)
    stops = read_stop_ids([p for p in (config_folder, checkpoint.folder) if p is not None], checkpoint.config)
    config = replace(config, eos_token_id=plain_ids(stops))
    place = None if rules is None else placement.load(rules, config, notes=True)
    if place is not None and backend != "cuda":
        why = "torch sees no GPU" if wanted == "auto" else f"the backend is {backend}"
        note(f"{rules} is read and not used, as {why}: every module runs on the CPU")
    opened = open_backend(backend, activations, place)
    if threads is not None:  # by now the libraries that work with them are loaded
        ops.set_threads(threads)
    opened.prefill = memory.check_memory(opened, checkpoint, config)
    weights = interleaving.experts(checkpoint, opened, repack)
    model = Model(config, weights, opened)
    reading.ahead(weights, opened)
    return model
