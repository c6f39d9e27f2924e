"""What a running model's seconds go to: its parts on the CPU, and a GPU's kernels and copies."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np


class Watch:
    """Stands in for parts of a running model and adds up their seconds."""

    def __init__(self, model: Any, parts: bool):
        self.seconds: dict[str, float] = {}
        self.model, self.skip = model, False
        for layer in model.layers:
            routed = hasattr(layer.mlp, "experts")
            if routed:
                self._watch_experts(layer.mlp)
            if parts:  # on a GPU these are called while a graph is captured, and then no more
                self._watch(layer, "self_attn", "attention")
                if routed:
                    self._watch(layer.mlp, "shared_experts", "shared expert")
                else:
                    self._watch(layer, "mlp", "dense MLP")

    def _watch(self, owner: Any, name: str, part: str) -> None:
        if getattr(owner, name) is not None:
            setattr(owner, name, self._timed(part, getattr(owner, name)))

    def _watch_experts(self, mlp: Any) -> None:
        """The function itself, which runs in the experts' thread, or in the object that launches it there."""
        holder, name = (mlp.experts, "function") if hasattr(mlp.experts, "function") else (mlp, "experts")
        timed = self._timed("experts", getattr(holder, name))

        def experts(x: np.ndarray, *args: Any, **named: Any) -> np.ndarray:
            return np.zeros(x.shape, np.float32) if self.skip else timed(x, *args, **named)

        setattr(holder, name, experts)

    def clear(self) -> None:
        """Forget all seconds measured so far, also those that the servers have counted."""
        self.seconds.clear()
        for server in self._servers():
            server.worked[0] = 0

    def found(self) -> dict[str, float]:
        """Seconds by part; those of experts that were asked for from graphs among them."""
        asked = sum(server.seconds() for server in self._servers())
        return self.seconds | ({"experts": self.seconds.get("experts", 0.0) + asked} if asked else {})

    def without_experts(self, skip: bool) -> None:
        """Whether experts return at once from now on."""
        self.skip = skip
        for server in self._servers():
            server.skip = skip

    def _servers(self) -> list[Any]:
        """What answers questions of graphs, see `refimpl.devices.cuda_questions`."""
        capture = getattr(self.model.backend, "capture", None)
        return [q.server for q in capture.asked if q.server is not None] if capture else []

    def _timed(self, part: str, function: Callable) -> Callable:
        def timed(*args: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **named)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

        return timed


def gpu_seconds(job: Callable[[], Any]) -> dict[str, float] | None:
    """Seconds of kernels and of copies between host and GPU in a call, by the driver's record; None where it
    keeps none.
    """
    from torch.autograd import DeviceType  # heavy and optional: the extra `gpu`
    from torch.profiler import ProfilerActivity, profile  # optional, and seconds to import

    with profile(activities=[ProfilerActivity.CUDA]) as record:
        job()
    found = {"GPU": 0.0, "transfers": 0.0}
    for event in record.events():
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            crosses = "HtoD" in event.name or "DtoH" in event.name
            found["transfers" if crosses else "GPU"] += event.time_range.elapsed_us() / 1e6
    return found if found["GPU"] else None
