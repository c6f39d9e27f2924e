"""Which experts each token went to, noted beside the computation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.model import Model


class RouteRecorder:
    """Stands before the routers of a model on the CPU and keeps, while `on`, what they chose. A graph on a
    GPU calls no Python, so there `possible` is False and nothing is noted.
    """

    def __init__(self, model: Model):
        self.possible, self.on = model.backend.place is None, False
        self._found: dict[int, np.ndarray] = {}
        self.layers = [i for i, block in enumerate(model.layers) if hasattr(block.mlp, "route")]
        if self.possible:
            for i in self.layers:
                mlp: Any = model.layers[i].mlp
                mlp.route = self._noting(i, mlp.route)

    def take(self) -> dict[int, list[int]]:
        """{layer: experts of the last token computed while `on`, best first}; then forgotten."""
        found, self._found = self._found, {}
        return {i: [int(e) for e in ids[-1]] for i, ids in found.items()}

    def _noting(self, layer: int, route: Callable) -> Callable:
        def noted(x: np.ndarray) -> Any:
            ids, weights = route(x)
            if self.on:
                self._found[layer] = ids
            return ids, weights

        return noted
