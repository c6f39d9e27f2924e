"""Opening a model: the backend it runs on, the folder it comes from, and where its modules are placed."""

from __future__ import annotations

import sys

from refimpl import ops
from refimpl.config import DeepSeekConfig
from refimpl.devices import check_backend, open_machine, placement
from refimpl.model import Model


def open_model(
    folder,
    backend: str = "auto",
    rules=None,
    activations: str = "fp8",
    threads: int | None = None,
    config_folder=None,
) -> Model:
    """What `refimpl.load` does; see there. `config_folder` has the config.json for weights that lie in a
    folder without.
    """
    from refimpl import hub
    from refimpl.checkpoint.folder import Checkpoint

    check_backend(backend)
    if threads is not None:
        ops.set_threads(threads)
    wanted, backend = backend, ops.best_backend() if backend == "auto" else backend
    checkpoint = Checkpoint.open(hub.embedded() if folder is None else folder, config_folder)
    if checkpoint.mtp:
        print(
            f"refimpl: note: multi-token-prediction layer {', '.join(map(str, checkpoint.mtp))} is skipped",
            file=sys.stderr,
        )
    config = DeepSeekConfig.from_dict(checkpoint.config, where=checkpoint.folder)
    place = None if rules is None else placement.load(rules, config, notes=True)
    if place is not None and backend != "cuda":
        why = "torch sees no GPU" if wanted == "auto" else f"the backend is {backend}"
        print(
            f"refimpl: note: {rules} is read and not used, as {why}: every module runs on the CPU",
            file=sys.stderr,
        )
    machine = open_machine(backend, activations, place)
    machine.check_room(checkpoint, config, activations)
    return Model(config, checkpoint, backend, activations, machine)
