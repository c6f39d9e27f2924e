"""How many latent caches there is room for, reckoned as the plan does (devices/memory.py)."""

from __future__ import annotations

from refimpl.cache import INITIAL_ROWS
from refimpl.devices import memory
from refimpl.model import Model

SHARE = 0.5  # of the memory that is free once the model is loaded: what caches may take unless told otherwise


class Room:
    """Memory for the caches of all conversations, by device. `rows` are tokens that a cache has place for."""

    def __init__(self, model: Model, limit_bytes: int | None = None):
        """`limit_bytes` bounds each device; without it, half of what is free there now."""
        self.limit_rows = model.config.max_position_embeddings
        self._inventory = memory.Inventory(model.config, {})
        self._place = model.backend.place or (lambda module: "cpu")
        self._activations = model.backend.activations
        free = memory.free_memory()
        self.limit = {
            device: int(SHARE * free.get(device, free["cpu"])) if limit_bytes is None else limit_bytes
            for device in self.need(1)
        }

    def need(self, rows: int) -> dict[str, int]:
        """Bytes by device of a cache of so many rows; for none, nothing."""
        if not rows:
            return {}
        return memory.totals(memory.cache(self._inventory, self._place, rows, self._activations))

    def grown(self, held: int, rows: int) -> int:
        """Rows that a cache of `held` rows has, at most, once it has place for `rows`: caches at least
        double.
        """
        if rows <= held:
            return held
        return min(self.limit_rows, max(2 * held, rows, INITIAL_ROWS))

    def fits(self, caches: list[int]) -> bool:
        """Whether caches of so many rows each fit together."""
        found: dict[str, int] = {}
        for rows in caches:
            for device, nbytes in self.need(rows).items():
                found[device] = found.get(device, 0) + nbytes
        return all(nbytes <= self.limit[device] for device, nbytes in found.items())
