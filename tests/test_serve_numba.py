"""Experts that are asked for by a word of memory: the answers are those of the experts' own function."""

import threading
import time

import numpy as np
import pytest

from refimpl.conformance.inputs.draws import activations, packed
from refimpl.formats import q4_k, q6_k

pytest.importorskip("numba", reason="the cpu backend's kernels are compiled by Numba")
from refimpl.kernels import experts_numba, serve_numba


class Asker:
    """Three layers of experts and the memory that is shared with whoever asks for them."""

    def __init__(self, seed: int, hidden: int = 512, width: int = 256, chosen: int = 4):
        rng = np.random.default_rng(seed)
        self.stacks = [
            (
                packed(rng, q4_k, 16, width, hidden),
                packed(rng, up, 16, width, hidden),
                packed(rng, q6_k, 16, hidden, width),
            )
            for up in (q4_k, q6_k, q4_k)
        ]
        self.flags = np.zeros(32, np.int32)
        self.x, self.y = np.zeros((1, hidden), np.float32), np.zeros((1, hidden), np.float32)
        self.ids, self.weights = np.zeros((1, chosen), np.int64), np.zeros((1, chosen), np.float32)
        layers = [serve_numba.Layer(*stacks) for stacks in self.stacks]
        self.server = serve_numba.Server(layers, self.flags, self.x, self.ids, self.weights, self.y)

    def ask(self, n: int, rng: np.random.Generator) -> bool:
        """Ask for layer n's experts and wait: whether the answer is theirs."""
        self.x[:] = activations(rng, "normal", *self.x.shape)
        self.ids[0], self.weights[0] = rng.permutation(16)[: self.ids.size], rng.random(self.ids.size)
        inputs = self.x.copy(), self.ids.copy(), self.weights.copy()
        self.flags[0] = n + 1
        while self.flags[serve_numba.ANSWERED // 4] < n + 1:
            time.sleep(0)
        return bool(np.array_equal(self.y, experts_numba.experts(*inputs, *self.stacks[n])))


def test_what_is_asked_for_is_answered_layer_by_layer_and_token_by_token():
    asker, found, rng = Asker(1), [], np.random.default_rng(2)
    for _ in range(3):
        asker.server.reset()

        def questions():
            for n in range(3):
                if n == 1:
                    time.sleep(0.3)  # longer than the server looks before it asks whether to go on
                found.append(asker.ask(n, rng))

        thread, waits = threading.Thread(target=questions), []
        thread.start()
        asker.server.answer(lambda: waits.append(None))
        thread.join()
        assert waits
    assert found == [True] * 9


def test_whoever_gives_up_leaves_no_question_open():
    asker = Asker(3)

    def failed():
        raise RuntimeError("the device")

    with pytest.raises(RuntimeError, match="the device"):
        asker.server.answer(failed)
    assert asker.flags[serve_numba.ANSWERED // 4] == 3


def test_what_the_kernel_does_not_take_is_not_served():
    rng = np.random.default_rng(4)
    gate, up, down = (packed(rng, q4_k, 2, 256, 256) for _ in range(3))
    with pytest.raises(ValueError):
        serve_numba.Layer(gate, up, down, activations="exact")
    with pytest.raises(ValueError):
        serve_numba.Layer([np.zeros((256, 256), np.float32)] * 2, up, down)
