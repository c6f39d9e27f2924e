"""llama.cpp loads the GGUF that `quantize` wrote, and does the embedded model's sums with it (extra
`peers`).
"""

import contextlib

import numpy as np
import pytest

from refimpl.checkpoint.folder import Checkpoint
from refimpl.config import DeepSeekConfig
from refimpl.model import Model
from refimpl.tiny import FP8_DIR, GGUF_FILE
from refimpl.training.evaluate import score
from refimpl.training.problems import problems
from refimpl.training.tokens import Encoder

llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama.cpp: the extra `peers`")
N = 100  # problems of a kind


@pytest.fixture(scope="module")
def llama():
    with contextlib.closing(llama_cpp.Llama(str(GGUF_FILE), n_ctx=512, n_threads=2, verbose=False)) as model:
        yield model


def logits(llama, ids: list[int]) -> np.ndarray:
    """float32 [vocab] after the ids, which are added to what llama.cpp has seen."""
    llama.eval(ids)
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama.ctx, -1), (llama.n_vocab(),)).copy()


def greedy(llama, prompt: list[int], end: int) -> list[int]:
    llama.reset()
    said = [int(logits(llama, prompt).argmax())]
    while said[-1] != end and len(said) < 256:
        said.append(int(logits(llama, said[-1:]).argmax()))
    return said


@pytest.mark.parametrize("kind", ["sum", "difference"])
def test_llama_cpp_does_the_sums_from_the_same_ids(llama, kind):
    encoder, asked = Encoder.open(FP8_DIR), problems(kind, "heldout", N, seed=3)
    theirs = (
        sum(
            encoder.answer(greedy(llama, encoder.prompt("", [], p.question), encoder.eos)) == p.answer
            for p in asked
        )
        / N
    )
    checkpoint = Checkpoint.open(GGUF_FILE)
    ours, _, _ = score(Model(DeepSeekConfig.from_dict(checkpoint.config), checkpoint), encoder, asked)
    print(f"{kind}: llama.cpp {theirs:.0%}, refimpl {ours:.0%}")
    assert ours >= 0.95 and abs(theirs - ours) <= 0.02


def test_llama_cpp_s_logits_are_ours_within_its_activation_rounding(llama):
    ids = Encoder.open(FP8_DIR).prompt("", [], "What is 123 + 456?")
    llama.reset()
    theirs = logits(llama, ids)
    checkpoint = Checkpoint.open(GGUF_FILE)
    ours = Model(DeepSeekConfig.from_dict(checkpoint.config), checkpoint).logits(ids)[-1]
    # Both round activations to 8 bits, by other rules and in other places.
    assert np.abs(ours - theirs).max() <= 0.05 * np.abs(ours).max() and ours.argmax() == theirs.argmax()
