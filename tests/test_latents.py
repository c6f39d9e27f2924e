"""Latent attention on a CPU with all threads (`kernels/latent_numba.py`), beside what the conformance suite
judges: the same bits whatever the threads, the cache as it lies, and a token by itself as in a prompt.
"""

import numpy as np
import pytest

pytest.importorskip("numba", reason="what the kernels are written for")
import refimpl
from refimpl import ops
from refimpl.devices import cpu
from refimpl.kernels import latent_numba, team
from refimpl.reference import attention
from refimpl.reference.packed import dense
from refimpl.tensors import ScaledFP8


def case(tokens: int, heads: int, rows: int, latent: int = 512, n: int = 128, r: int = 64, v: int = 128):
    """Arguments as the model has them: q_nope and the cache's two parts are views of wider arrays."""
    rng = np.random.default_rng(tokens * rows)
    q, cache, kv_b = (
        rng.standard_normal(shape, np.float32)
        for shape in ((tokens, heads, n + r), (rows, latent + r), (heads, n + v, latent))
    )
    q_pe, kv_b = np.ascontiguousarray(q[..., n:]), kv_b / np.float32(latent**0.5)
    return q[..., :n], q_pe, cache[:, :latent], cache[:, latent:], kv_b, 0.1


def true(args, rows=None):
    wide = (x.astype(np.float64) if isinstance(x, np.ndarray) else x for x in args)
    return attention.mla_absorbed(*wide, rows)


SIZES = [(1, 128, 700), (3, 40, 90), (70, 17, 75), (2, 5, 33, 48, 12, 6, 7), (1, 3, 1, 16, 8, 4, 1)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_results_do_not_depend_on_the_threads(size):
    args, before = case(*size), team.threads()
    found = []
    try:
        for threads in (1, 2, 5):
            ops.set_threads(min(threads, team.cores()))
            found.append(latent_numba.attend(*args))
    finally:
        ops.set_threads(before)
    assert all(f.tobytes() == found[0].tobytes() for f in found)
    np.testing.assert_allclose(found[0], true(args), rtol=0, atol=4e-6)


def test_tokens_attend_to_the_rows_that_are_chosen():
    args, rng = case(66, 17, 150), np.random.default_rng(1)
    rows = (rng.random((66, 150)) < 0.1) & (np.arange(150) <= np.arange(84, 150)[:, None])
    rows[np.arange(66), np.arange(84, 150)] = True
    rows[5] = np.arange(150) == 3  # a piece and tiles of which nothing is seen
    np.testing.assert_allclose(latent_numba.attend(*args, rows), true(args, rows), rtol=0, atol=4e-6)


def test_later_rows_are_not_read():
    """Not even numbers that are none reach a token from rows behind it, or one head from another."""
    args = case(40, 20, 90)
    whole = latent_numba.attend(*args)
    args[2][60:], args[3][60:] = np.nan, np.inf
    found = latent_numba.attend(*args)
    assert found[:10].tobytes() == whole[:10].tobytes() and np.isnan(found[10:]).all()
    args = case(5, 20, 30)
    whole = latent_numba.attend(*args)
    args[0][3, 7] = np.nan
    found = latent_numba.attend(*args)
    assert np.isnan(found[3, 7]).all() and np.isnan(found).sum() == found.shape[2]
    kept = np.ones(found.shape[:2], bool)
    kept[3, 7] = False
    assert found[kept].tobytes() == whole[kept].tobytes()


def test_arrays_that_lie_otherwise_are_copied():
    args = case(3, 17, 40)
    turned = [np.asfortranarray(a) if isinstance(a, np.ndarray) else a for a in args]
    assert latent_numba.attend(*turned).tobytes() == latent_numba.attend(*args).tobytes()


@pytest.mark.parametrize(
    "size", [(1, 128, 40), (9, 40, 77), (2, 17, 50, 512, 72, 8, 72), (2, 4, 9, 48)], ids=str
)
def test_codes_of_kv_b_give_the_bits_of_their_numbers(size):
    """Every code, NaN among those of one head; heads whose rows begin within a tile; padded columns."""
    q_nope, q_pe, latent, k_pe, kv_b, scale = case(*size)
    (heads, rows, width), rng = kv_b.shape, np.random.default_rng(2)
    codes = rng.integers(0, 255, (heads * rows, width), np.uint8)
    codes[codes == 0x7F] = 0
    codes[5, 3] = 0x7F
    tiles = -(-heads * rows // 128), -(-width // 128)
    w = ScaledFP8(codes, rng.random(tiles, np.float32) / 300)
    found = latent_numba.attend(q_nope, q_pe, latent, k_pe, w, scale)
    same = latent_numba.attend(q_nope, q_pe, latent, k_pe, dense(w).reshape(kv_b.shape), scale)
    np.testing.assert_array_equal(found, same)
    assert np.isnan(found[:, 0]).all() and np.isfinite(found[:, 1:]).all()


def test_a_model_with_a_large_kv_b_reads_its_codes(monkeypatch):
    """The embedded one's are called large: logits have the same bits without a cache and for a prompt, and
    greedy tokens are the same. Whoever watches a model is shown numbers.
    """
    ids, found = list(range(5, 40)), []
    for least in (cpu.CODED_KV_B, 1):
        monkeypatch.setattr(cpu, "CODED_KV_B", least)
        model = refimpl.load(backend="cpu")
        kept = model.layers[0].self_attn.absorbed.keywords["kv_b"]
        logits = model.logits(ids), model.forward(ids, model.new_cache())
        found.append((type(kept), *logits, list(model.generate(ids, 8))))
    (before, *true), (after, *ours) = found
    assert before is np.ndarray and after is ScaledFP8
    for x, y in zip(ours, true):
        np.testing.assert_array_equal(x, y)
    (kv_b,) = {type(s.inputs["kv_b"]) for s in refimpl.trace(model, ids) if s.name == "mla_naive"}
    assert kv_b is np.ndarray
