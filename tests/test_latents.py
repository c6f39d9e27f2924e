"""Latent attention on a CPU with all threads (`kernels/latent_numba.py`), beside what the conformance suite
judges: the same bits whatever the threads, the cache as it lies, and a token by itself as in a prompt.
"""

import numpy as np
import pytest

pytest.importorskip("numba", reason="what the kernels are written for")
from refimpl import ops
from refimpl.kernels import latent_numba, team
from refimpl.reference import attention


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
