"""Sampling against transformers' warpers, and the session's cache against starting anew."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from refimpl.cache import PREFILL
from refimpl.config import DeepSeekConfig
from refimpl.devices.cpu import CpuBackend
from refimpl.errors import InputFormatError, ResourceError
from refimpl.generate import Sampling, Session, draw, probabilities
from refimpl.model import Model
from tests import oracle_hf as oracle

CONFIG = DeepSeekConfig.from_dict(oracle.SMALL | {"max_position_embeddings": 400})
MODEL = Model(CONFIG, oracle.random_checkpoint(oracle.SMALL, 3), CpuBackend("reference", "exact"))


@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.1, 0.6, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 5, 50, 1000]),
    top_p=st.sampled_from([1e-6, 0.3, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_probabilities_are_those_of_transformers(seed, temperature, top_k, top_p, min_p):
    logits = np.random.default_rng(seed).standard_normal(97) * 4
    scores = torch.from_numpy(logits)[None]
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(min(top_k, 97))] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    for warper in warpers:
        scores = warper(None, scores)
    theirs = torch.softmax(scores, -1)[0].numpy()
    np.testing.assert_allclose(
        probabilities(logits, Sampling(temperature, top_k, top_p, min_p)), theirs, atol=1e-12
    )


def test_draws_follow_the_probabilities_and_the_seed():
    logits, s = np.log(np.array([0.5, 0.3, 0.2])), Sampling(temperature=1.0)
    rng = np.random.default_rng(0)
    counts = np.bincount([draw(logits, s, rng) for _ in range(4000)], minlength=3) / 4000
    assert np.abs(counts - [0.5, 0.3, 0.2]).max() < 4 * np.sqrt(0.25 / 4000)
    ids = [list(MODEL.generate([1, 2, 3], 12, temperature=2.0, seed=seed)) for seed in (1, 1, 2)]
    assert ids[0] == ids[1] != ids[2]


def test_greedy_takes_the_first_of_the_largest():
    assert draw(np.array([0.0, 2.0, 2.0], np.float32), Sampling(), np.random.default_rng()) == 1


@pytest.mark.parametrize("logits", [[np.nan, 1.0], [-np.inf, -np.inf], [np.inf, 1.0]])
def test_logits_that_are_no_numbers_are_refused(logits):
    for s in (Sampling(), Sampling(temperature=1.0)):
        with pytest.raises(InputFormatError, match="E4040"):
            draw(np.array(logits), s, np.random.default_rng())


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 2},
    ],
)
def test_sampling_values_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)


def test_banned_ids_are_never_drawn():
    banned = list(range(1, 97))
    assert set(Session(MODEL, banned).generate([5], Sampling(temperature=5.0, seed=0), 20)) == {0}


def test_generation_is_greedy_decoding_without_a_cache():
    ids = [3, 1, 4, 1, 5]
    for token in MODEL.generate(ids, 10):
        logits = MODEL.logits(ids)[-1]
        assert (
            logits[token] >= logits.max() - 1e-4 * np.abs(logits).max()
        )  # the cached pass may round a tie the other way
        ids.append(token)


def test_generation_ends_at_a_stop_id_at_the_limit_and_at_the_context():
    whole = list(MODEL.generate([1, 2], 30))
    stop = frozenset([whole[4]])
    assert list(Session(MODEL).generate([1, 2], Sampling(), 30, stop)) == whole[: whole.index(whole[4]) + 1]
    assert list(Session(MODEL).generate([1, 2], Sampling(), 0)) == []
    prompt = [1] * 390
    assert len(list(Session(MODEL).generate(prompt, Sampling()))) <= 10
    with pytest.raises(ResourceError, match="E6001"):
        list(Session(MODEL).generate([1] * 401, Sampling()))
    with pytest.raises(ValueError, match="empty"):
        list(Session(MODEL).generate([], Sampling()))


@given(data=st.data())
def test_a_session_remembers_what_prompts_share(data):
    """Whatever was asked before, the logits are those of a new session, and only the new tokens are
    computed.
    """
    session, computed = Session(MODEL), []
    forward = MODEL.forward
    prompt: list[int] = []
    for _ in range(data.draw(st.integers(1, 4))):
        keep = data.draw(st.integers(0, len(prompt)))
        prompt = prompt[:keep] + data.draw(
            st.lists(st.integers(0, 96), min_size=0 if keep else 1, max_size=8)
        )
        seen = session.ids[:]
        session.model = type(
            "Counting",
            (),
            {
                "forward": lambda self, ids, *a, **k: computed.append(len(ids)) or forward(ids, *a, **k),
                "config": CONFIG,
            },
        )()
        computed.clear()
        logits = session.prefill(prompt)
        shared = 0
        while shared < min(len(seen), len(prompt) - 1) and seen[shared] == prompt[shared]:
            shared += 1
        assert sum(computed) == len(prompt) - shared
        np.testing.assert_allclose(logits, Session(MODEL).prefill(prompt), atol=1e-4 * np.abs(logits).max())
        assert session.ids == prompt and session.cache.length == len(prompt)


def test_long_prompts_are_computed_in_pieces():
    ids = np.random.default_rng(0).integers(0, 97, PREFILL + 20).tolist()
    logits = Session(MODEL).prefill(ids)
    np.testing.assert_allclose(logits, MODEL.logits(ids)[-1], atol=1e-4 * np.abs(logits).max())


def test_an_interrupted_pass_leaves_a_session_that_works(monkeypatch):
    session = Session(MODEL)
    session.prefill([1, 2, 3])
    calls, layers = [], MODEL.decoder.layers

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return layers[1](*args)

    monkeypatch.setattr(MODEL.decoder, "layers", [layers[0], interrupt, layers[2]])
    session.prefill([1, 2, 3, 4])
    session.prefill([1, 2, 3, 4, 5])
    with pytest.raises(KeyboardInterrupt):
        session.prefill([1, 2, 3, 4, 5, 6])
    monkeypatch.setattr(MODEL.decoder, "layers", layers)
    logits = session.prefill([1, 2, 3, 4, 5, 7])
    np.testing.assert_allclose(
        logits, Session(MODEL).prefill([1, 2, 3, 4, 5, 7]), atol=1e-4 * np.abs(logits).max()
    )
