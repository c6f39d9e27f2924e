"""One token as CUDA graphs, captured from outside: the function that is captured knows nothing of it.

    graph    copy to the host,      graph           wait for the experts,    graph             ...
             launch the experts                     copy their result back
    norm, attention, norm, route    shared expert                            +, +, norm, attention, ...

What cannot be part of a graph, because the host takes part in it, says so by `Capture.between`: the graph
ends there, the call becomes a step of its own, and another graph begins. Where the experts can be asked for
from inside a graph (`Questions`), a whole token is one:

    graph   norm, attention, norm, route, ask, shared expert, wait for the answer, +, +, norm, attention, ...
    host    answers, question by question
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any
from weakref import WeakSet

import torch

from refimpl.devices.cuda_cache import DeviceCache
from refimpl.devices.cuda_questions import Questions, supported


class Capture:
    """What records graphs and the steps between them; one for all of a backend, as their memory comes from
    one pool, which they may share since they are always replayed in the order they were captured in.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        # Empty graphs, one a device, for as long as this lives: torch gives up a pool with its last graph,
        # and when a cache has grown there is none of the old graphs left.
        self._anchors: dict[torch.device, torch.cuda.CUDAGraph | None] = {}
        self._steps: list[Callable[[], Any]] | None = None  # None: nothing is being captured
        self._graph: torch.cuda.CUDAGraph | None = None
        self.asked: WeakSet[Questions] = WeakSet()  # of all graphs that have some
        self.questions: Questions | None = None  # of the graph that is being captured, if it can have some

    def between(self, step: Callable[[], Any]) -> None:
        """Call step(): now, or, where a graph is being captured, between this graph and the next whenever
        they are replayed. What it reads and writes must be tensors it holds on to.
        """
        if self._steps is None:
            step()
            return
        self._end()
        self._steps.append(step)
        self._begin()

    def record(self, function: Callable, args: tuple, device: torch.device) -> tuple[list[Callable], Any]:
        """Call function(*args) without running what it launches: the steps that will, and what it returned,
        whose values come with the steps.
        """
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        self._steps = steps = []  # type: ignore[var-annotated]
        self._asks = supported(device)
        stream = _stream(device)
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                if device not in self._anchors:
                    self._begin()
                    self._anchors[device] = self._end()
                    steps.clear()
                self._begin()
                try:
                    out = function(*args)
                finally:
                    self._end()
        finally:
            self._steps = None
        torch.cuda.current_stream().wait_stream(stream)
        return steps, out

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        self.questions = Questions() if self._asks else None
        # The experts' thread may wait for an event meanwhile: only this thread is watched.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._graph = graph

    def _end(self) -> torch.cuda.CUDAGraph | None:
        graph, self._graph = self._graph, None
        questions, self.questions = self.questions, None
        if graph is None or self._steps is None:
            return None
        with warnings.catch_warnings():  # nothing need lie between two steps
            warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
            graph.capture_end()
        if questions is not None and questions.layers:
            self.asked.add(questions)
            self._steps.append(partial(questions.replay, graph))
        else:
            self._steps.append(graph.replay)
        return graph


class CudaGraph:
    """A function of activations (x [T, ...] first) and other things. For one token it is captured the first
    time, and replayed as long as those others are the same and the cache among them has the same rows.

    The tensors of that first call are the graph's own from then on: later ones are copied into them.
    """

    def __init__(self, function: Callable, capture: Capture):
        self.function, self.capture = function, capture
        self.key: tuple | None = None
        self.steps: list[Callable[[], Any]] = []

    def __call__(self, *args: Any) -> Any:
        """What the function returns; for one token always the same tensor, with other values each time.
        Without a cache (None among the arguments), and for several tokens, the function is called as it is.
        """
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        others = (a for a in args if not isinstance(a, torch.Tensor))
        key = tuple((id(a), a.epoch) if isinstance(a, DeviceCache) else a for a in others)
        if len(tensors[0]) > 1 or None in key:
            return self.function(*args)
        if key != self.key:
            return self._first(key, args, tensors)
        for own, a in zip(self.inputs, tensors):
            if a is not own:
                own.copy_(a)
        for step in self.steps:
            step()
        return self.out

    def _first(self, key: tuple, args: tuple, tensors: list[torch.Tensor]) -> Any:
        self.key = self.out = None
        self.steps, self.args = [], ()  # what the old graphs and their cache held is free for the new ones
        out = self.function(*args)  # compiles and allocates what capturing must not
        self.inputs, self.args = tensors, args  # a cache that is held keeps its id for itself
        self.steps, self.out = self.capture.record(self.function, args, tensors[0].device)
        self.key = key
        return self.out.copy_(out)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures: the matrix library keeps a workspace for each."""
    return torch.cuda.Stream(device)
