"""Reference: refimpl.reference.experts.experts of one token, for one layer after the other. Whoever asks says
so by a word of memory and needs no Python for it, such as a GPU in the middle of a graph.

    who asks                                    `_answer`
      x, ids, weights, where both can read them
      asked = 1                        ----->   looks at `asked` while it waits
      something else meanwhile                  the experts of the first layer in the list -> y
      waits until answered >= 1        <-----   answered = 1
      reads y
      ... asked = 2, the next layer    ----->   ...

One call answers for all layers of a token. For so long it is the team's caller (`team`), and takes part in
the work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache

import numba
import numpy as np

from refimpl.kernels.activations_numba import LAYOUTS
from refimpl.kernels.atomic import cycles, load_half, pause, store_half
from refimpl.kernels.experts_numba import (
    _layer,
    _plan,
    _silu_pieces,
    _task,
    _weighted_pieces,
    _weighted_sum,
)
from refimpl.kernels.jit import integers, jit
from refimpl.kernels.linear_numba import NOTHING, JobLayout, activation_layout, job_layout, matrix
from refimpl.kernels.team import TEAM, cores
from refimpl.kernels.workspace import U8, WORKSPACE
from refimpl.tensors import Interleaved, Packed, Stack

# A row of numbers, int64 [17], that describes a layer to compiled code:
#
#     0          1                  2 .. 6        7 .. 11     12 .. 16
#     | experts  | gate, up alike   | gate        | up        | down      |
#                                   | first matrix, stride, quantizer, bytes of a token, address of words |
LOOKS = 1 << 20  # at `asked`, until Python may look whether to go on: some 50 milliseconds
# Places in `Layer.numbers`. Of gate, of up and of down: address of the first matrix, bytes from one to the
# next, address of what quantizes their activations, bytes of a token's, address of `JobLayout.words`.
EXPERTS, ALIKE, GATE, UP, DOWN = 0, 1, 2, 7, 12
DATA, STRIDE, QUANTIZER, ACT_BYTES, LAYOUT = range(5)
ROWS = 4  # place in `JobLayout.words`


class Layer:
    """Stacks [E, N, K] of a layer's experts, as `_answer` wants them. ValueError for what its kernel does not
    take: other than packed ones, or activations that are not quantized.
    """

    ANSWERED = 64  # bytes from `asked` to `answered`: a line of the cache further

    def __init__(self, gate: Stack, up: Stack, down: Stack, activations: str = "fp8"):
        self.stacks = gate, up, down  # their memory is pointed into
        self.layouts: list[JobLayout] = []
        numbers, kinds, experts = [], [], 0
        for stack in self.stacks:
            m = matrix(stack) if isinstance(stack, Packed | Interleaved) else None
            how = m and activation_layout(m, activations)
            if not isinstance(stack, Packed | Interleaved) or m is None or how not in LAYOUTS:
                raise ValueError("experts that are multiplied otherwise")
            of = job_layout(m, how, False)
            numbers += [m.data, stack.data.strides[0], of.quantizer, of.act_bytes, of.words.ctypes.data]
            kinds.append(m.kind)
            experts = len(stack.data)
            self.layouts.append(of)
        self.numbers = np.array((experts, kinds[0] == kinds[1], *numbers), np.int64)

    def rows(self, side: int) -> int:
        """Rows of a matrix of gate (0), up (1) or down (2)."""
        return int(self.layouts[side].words[ROWS])


ANSWERED = Layer.ANSWERED


@jit
def _matrices(numbers, at, used, data, acts, tokens):
    """Gate, up or down as `experts_numba._layer` wants them; their addresses are written to `data`."""
    for i in range(len(used)):
        data[i] = numbers[at + DATA] + used[i] * numbers[at + STRIDE]
    n = numbers[at + ACT_BYTES]
    return (
        numbers[at + QUANTIZER],
        acts[: tokens * n].reshape(tokens, n),
        numba.carray(integers(numbers[at + LAYOUT]), 11),
        data,
        np.zeros(len(data), np.int64),
    )


@jit
def _experts(team, silu, weighted, numbers, x, ids, weights, y, memory):
    """What `experts_numba.experts` does, for one token: x f32 [1, D], ids i64 [1, A] and weights f32 [1, A]
    to y f32 [1, D]. Returns 1, or 0 where a worker failed.
    """
    gate_acts, up_acts, gate_up, hidden, hidden_acts, parts, own = memory
    used, first, counts, tokens, pairs = _plan(ids, numbers[EXPERTS])
    n, width = ids.size, integers(numbers[GATE + LAYOUT])[ROWS]
    jobs = len(used)
    # Addresses of gate, then of up: one list of jobs where both are of one kind, halves of it where not.
    data = np.empty(2 * jobs, np.int64)
    gate = _matrices(numbers, GATE, used, data[:jobs], gate_acts, 1)
    up = _matrices(numbers, UP, used, data[jobs:], up_acts, 1)
    down = _matrices(numbers, DOWN, used, np.empty(jobs, np.int64), hidden_acts, n)
    # Memory is for the largest layer; each takes as much of it as it needs, from the start.
    gate_up, hidden = gate_up[: 2 * n * width].reshape(2 * n, width), hidden[: n * width].reshape(n, width)
    parts = parts[: n * y.size].reshape(n, y.size)
    rest = gate_up, hidden, down, parts, own, NOTHING
    # Numba compiles `_layer` twice, as a tuple of one group and a tuple of two are different types.
    if numbers[ALIKE]:
        inner = (gate[0], gate[1], gate[2], data, np.zeros(len(data), np.int64))
        well = _layer(team, silu, x, tokens, first, counts, (inner,), *rest)
    else:
        well = _layer(team, silu, x, tokens, first, counts, (gate, up), *rest)
    return well & _weighted_sum(team, weighted, parts, pairs, weights, y)


@jit
def _answer(team, silu, weighted, layers, start, asked, x, ids, weights, y, memory, worked, skip):
    """Answer from question `start` + 1 on, one for each row of layers int64 [L, NUMBERS]. Returns how many
    are answered, when all are or none has come for a while; -1 where a worker failed. Cycles of work are
    added to worked[0], and with `skip` there is none.
    """
    for n in range(start, len(layers)):
        looks = 0
        # A look is no system call; to sleep and be woken would add to the time of each layer.
        while load_half(asked) <= n:
            pause()
            looks += 1
            # Python has signals to look at, and may have to stop.
            if looks == LOOKS:
                return n
        begun = cycles()
        if not skip and not _experts(team, silu, weighted, layers[n], x, ids, weights, y, memory):
            return -1
        worked[0] += cycles() - begun
        store_half(asked + ANSWERED, n + 1)
    return len(layers)


@jit
def _now():
    return cycles()


@cache
def _rate() -> float:
    """Cycles that are counted in a second."""
    _now()  # compiled
    start, first = time.perf_counter(), _now()
    time.sleep(0.05)
    return max(1, _now() - first) / (time.perf_counter() - start)


class Server:
    """Answers for the experts of `layers`, question by question. Memory that both sides see: flags i32 [32],
    of which the first is `asked` and the seventeenth `answered`; x f32 [1, D], ids i64 [1, A] and weights
    f32 [1, A], read when asked; y f32 [1, D], written before answering.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        flags: np.ndarray,
        x: np.ndarray,
        ids: np.ndarray,
        weights: np.ndarray,
        y: np.ndarray,
    ):
        self.layers, self.flags, self.shared = layers, flags, (x, ids, weights, y)
        self.numbers = np.array([layer.numbers for layer in layers])
        self.worked, self.skip = np.zeros(1, np.int64), False  # for who measures
        n, width = ids.size, max(layer.rows(0) for layer in layers)

        def most(name: str, side: int, times: int) -> np.ndarray:
            bytes_of_one = max(layer.layouts[side].act_bytes for layer in layers)
            return WORKSPACE.array(f"served {name}", (times * bytes_of_one,), U8)

        # One set of memory for all layers: they answer one after the other.
        scratch = max(of.scratch_bytes for layer in layers for of in layer.layouts)
        self.memory = (
            most("gate", 0, 1),
            most("up", 1, 1),
            WORKSPACE.array("served gate and up", (2 * n * width,)),
            WORKSPACE.array("served hidden", (n * width,)),
            most("down", 2, n),
            WORKSPACE.array("served parts", (n * y.size,)),
            WORKSPACE.array("served strip", (cores(), scratch), U8),
        )

    def seconds(self) -> float:
        """Seconds of work so far, waiting left out; 0.0 where nothing counts them."""
        return int(self.worked[0]) / _rate()

    def reset(self) -> None:
        """No question is asked, none answered: before whoever asks begins."""
        self.flags[:] = 0

    def answer(self, going_on: Callable[[], object]) -> None:
        """Answer all questions. While none comes, `going_on` is called now and then, and may raise. Whatever
        is raised, no question is left open, as a GPU would wait for its answer for ever.
        """
        answered = 0
        try:
            while answered < len(self.layers):
                with TEAM as team:
                    answered = _answer(
                        team,
                        _task(_silu_pieces),
                        _task(_weighted_pieces),
                        self.numbers,
                        answered,
                        self.flags.ctypes.data,
                        *self.shared,
                        self.memory,
                        self.worked,
                        self.skip,
                    )
                if answered < 0:
                    raise RuntimeError("a worker thread of refimpl failed; what it raised is printed above")
                if answered < len(self.layers):
                    going_on()
        finally:
            # Where something was raised, as if all were answered: nobody waits for ever.
            self.flags[Layer.ANSWERED // 4] = len(self.layers)
