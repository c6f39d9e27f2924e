"""The team of worker threads: every chunk once, the same bits whatever their number, several callers, forks,
sleep, the end.
"""

import gc
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

import refimpl
from refimpl import formats
from refimpl.conformance.inputs.draws import activations, packed
from refimpl.ops import OPS, load
from refimpl.tensors import Packed, ScaledFP8

pytest.importorskip("numba", reason="the team runs Numba's functions")
from refimpl.kernels import linear_numba, processors, team
from refimpl.kernels.atomic import add
from refimpl.kernels.jit import callback, integers, jit

THREADS = (1, 2, 3, 16)  # the last are more than this machine has cores, most likely
LINUX = sys.platform == "linux"


def _count(args, low, high, who):
    a = integers(args)
    for i in range(low, high):
        add(args + 8 * (1 + i), a[0])
    return 1


def _refuse(args, low, high, who):
    if low <= 7 < high:
        raise ValueError("the seventh")
    return 1


@jit
def _many(address, task, args, rounds):
    """How many of these regions ended well; of 1, 2, 3, ... chunks, and as many again."""
    well = 0
    for i in range(rounds):
        well += team.region(address, task, args, i % (len(args) - 1) + 1, 1)
    return well


@pytest.fixture(scope="module")
def count():
    return callback(_count, answers=True)


@pytest.fixture
def sixteen(monkeypatch):
    """A machine of sixteen cores, where every piece of work is worth a team's while."""
    have = linear_numba.threads()
    monkeypatch.setattr(team, "cores", lambda: 16)
    monkeypatch.setattr(processors, "usable", lambda: 16)
    monkeypatch.setattr(team, "MIN_PARALLEL_MACS", 0)
    yield
    monkeypatch.undo()
    linear_numba.set_threads(have)


# --- regions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("futex", [True, False])
@pytest.mark.parametrize("threads", THREADS)
def test_every_chunk_is_done_once_in_thousands_of_regions(count, monkeypatch, threads, futex):
    if not futex:
        give_away = team.system()[0]
        monkeypatch.setattr(team, "system", lambda: (give_away, 0, 0))
    workers = team.Team(threads)
    try:
        for spins in (workers.words[team.SPINS // 8], 1):  # awake, and fallen asleep after each region
            workers.words[team.SPINS // 8] = spins
            for rounds in (5000, *[1] * 20):
                args = np.array([1] + [0] * 50)
                workers.wake()
                assert _many(workers.address, count.address, args, rounds) == rounds
                per_chunk = [sum(1 for i in range(rounds) if i % 50 >= c) for c in range(50)]
                assert args[1:].tolist() == per_chunk
                time.sleep(0 if rounds > 1 else 0.001)
    finally:
        workers.stop()
    assert not any(member.is_alive() for member in workers.members)


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_who_waits_long_sleeps_and_wakes(count):
    workers = team.Team(4)
    try:
        args = np.array([1] + [0] * 50)
        _many(workers.address, count.address, args, 10)
        end = time.monotonic() + 60
        while workers.words[team.SLEEPING // 8] < 3:
            assert time.monotonic() < end, "members did not go to sleep"
            time.sleep(0.01)
        before = time.process_time()
        time.sleep(0.2)
        assert time.process_time() - before < 0.1  # asleep they take no time
        asleep = {3}
        looked = threading.Event()

        def look():
            # Who wakes up may sleep again at once: what counts is that somebody was seen awake.
            while asleep == {3} and time.monotonic() < end:
                asleep.add(int(workers.words[team.SLEEPING // 8]))
                time.sleep(0)
            looked.set()

        watch = threading.Thread(target=look)
        watch.start()
        while not looked.is_set():
            _many(workers.address, count.address, args, 1000)
        watch.join()
        assert min(asleep) < 3
    finally:
        workers.stop()


@pytest.mark.parametrize("futex", [True, False])
def test_who_may_not_join_sleeps_until_there_is_a_place(count, monkeypatch, futex):
    if not futex:
        give_away = team.system()[0]
        monkeypatch.setattr(team, "system", lambda: (give_away, 0, 0))
    workers = team.Team(8)
    try:
        for joined in (8, 2, 1, 8, 3, 5, 1, 2, 8):
            workers.join(joined)
            assert workers.joined == joined
            args = np.array([1] + [0] * 50)
            workers.wake()
            assert _many(workers.address, count.address, args, 2000) == 2000
            assert args[1:].tolist() == [sum(1 for i in range(2000) if i % 50 >= c) for c in range(50)]
    finally:
        workers.stop()
    assert not any(member.is_alive() for member in workers.members)


def _who(args, low, high, who):
    add(args + 8 * who, high - low)
    return 1


def test_who_may_not_join_takes_no_chunk_and_no_time():
    task, workers = callback(_who, answers=True), team.Team(6)
    args = np.zeros(50, np.int64)
    try:
        _many(workers.address, task.address, args, 3000)  # all are awake
        workers.join(1)
        end = time.monotonic() + 60
        while True:  # at most what is under way do they still take
            args[:] = 0
            _many(workers.address, task.address, args, 300)
            if not args[1:].any():
                break
            assert time.monotonic() < end, "members that may not still join"
        own, start = time.thread_time(), time.process_time()
        for _ in range(200):
            _many(workers.address, task.address, args, 300)
        own, spent = time.thread_time() - own, time.process_time() - start
        assert spent - own < 0.1 * own + 0.05  # all of it is the caller's
        # One that the system had stopped just before it took a chunk takes some when it goes on.
        assert args[1:].sum() < args[0] / 1000
        workers.join(6)
        while not args[1:6].all():
            _many(workers.address, task.address, args, 300)
            assert time.monotonic() < end, "members do not come back"
    finally:
        workers.stop()


def test_a_failing_task_is_heard_of(monkeypatch):
    raised = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: raised.append(str(what.exc_value)))
    task, workers = callback(_refuse, answers=True), team.Team(2)
    try:
        args = np.zeros(51, np.int64)
        for address in (0, workers.address):
            assert _many(address, task.address, args, 7) == 7  # chunks 0 to 6 are well
            assert _many(address, task.address, args, 10) == 7
        assert raised == ["the seventh"] * 6
    finally:
        workers.stop()
    with pytest.raises(RuntimeError, match="a worker thread of refimpl failed"):
        team.done(0)


# --- kernels ------------------------------------------------------------------------------------------------


def weights(rng):
    """Of each kind of strip: lanes, rows, and floats in both ways."""
    codes = rng.integers(0, 120, (700, 512), np.uint8)
    return {
        "Q4_K": packed(rng, formats.get(formats.type_id("Q4_K")), 700, 512),
        "Q8_0": packed(rng, formats.get(formats.type_id("Q8_0")), 700, 512),
        "BF16": packed(rng, formats.get(formats.type_id("BF16")), 700, 512),
        "FP8": ScaledFP8(codes, rng.random((6, 4), np.float32)),
    }


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 33, 300])
def test_linears_have_the_same_bits_with_any_number_of_threads(sixteen, tokens):
    rng = np.random.default_rng(tokens)
    x = activations(rng, "normal", tokens, 512)
    for name, w in weights(rng).items():
        results = []
        for n in THREADS:
            linear_numba.set_threads(n)
            results.append(linear_numba.linear(x, w))
            np.testing.assert_array_equal(results[-1], results[0], err_msg=f"{name}, {n} threads")
        true = OPS["linear"].reference(x, w)
        np.testing.assert_allclose(results[0], true, rtol=0, atol=2e-5 * np.abs(true).max())


def stack(rng, name, *shape):
    return packed(rng, formats.get(formats.type_id(name)), *shape)


@pytest.mark.parametrize("kinds", [("Q4_K", "Q4_K", "Q6_K"), ("Q4_K", "Q6_K", "Q4_K"), ("BF16",) * 3])
@pytest.mark.parametrize("tokens", [1, 20])
def test_experts_have_the_same_bits_with_any_number_of_threads(sixteen, tokens, kinds):
    rng = np.random.default_rng(tokens)
    sides = [stack(rng, k, 6, *s) for k, s in zip(kinds, ((512, 768), (512, 768), (768, 512)))]
    ids = np.array([rng.permutation(6)[:3] for _ in range(tokens)])
    shares = rng.random((tokens, 3), np.float32)
    x = activations(rng, "normal", tokens, 768)
    results = []
    for n in THREADS:
        linear_numba.set_threads(n)
        results.append(load("experts", "cpu")(x, ids, shares, *sides))
        np.testing.assert_array_equal(results[-1], results[0])
    true = OPS["experts"].reference(x, ids, shares, *sides)
    np.testing.assert_allclose(results[0], true, rtol=0, atol=1e-3 * np.abs(true).max())


def tuned(count, most=16):
    """A tuner that always says `count`, and what it was told."""
    told = []
    return SimpleNamespace(count=count, kept=count, most=most, searching=False, took=told.append), told


def test_a_step_of_one_token_has_the_number_that_was_found_and_the_same_bits(sixteen, monkeypatch):
    rng = np.random.default_rng(3)
    x, w = activations(rng, "normal", 1, 512), weights(rng)
    linear_numba.set_threads(1)
    alone = {name: linear_numba.linear(x, of) for name, of in w.items()}
    linear_numba.set_threads(None)
    assert team.threads() == 15
    for n in (15, 4, 1, 9, 2, 15):
        tuner, told = tuned(n)
        monkeypatch.setattr(team.TEAM, "tuner", tuner)
        with team.TEAM.step(1):
            for name, of in w.items():
                np.testing.assert_array_equal(linear_numba.linear(x, of), alone[name])
            assert team.TEAM.team.joined == n
        assert len(told) == 1 and told[0] > 0
        assert team.found() == (n, True)
        with team.TEAM.step(2):  # several tokens have all
            np.testing.assert_array_equal(linear_numba.linear(x, w["Q4_K"]), alone["Q4_K"])
        assert team.TEAM.team.joined == 15 and len(told) == 1


def test_a_step_tells_nothing_without_a_team_or_where_it_raised(sixteen, monkeypatch):
    linear_numba.set_threads(None)
    tuner, told = tuned(3)
    monkeypatch.setattr(team.TEAM, "tuner", tuner)
    with team.TEAM.step(1):
        pass
    with pytest.raises(KeyboardInterrupt), team.TEAM.step(1), team.TEAM:
        raise KeyboardInterrupt
    with team.TEAM.step(1), team.TEAM, team.TEAM.step(1):  # within another, as of two models at once
        pass
    assert len(told) == 1 and team.TEAM.wanted == team.threads()


def test_a_number_that_is_said_is_kept(sixteen):
    linear_numba.set_threads(5)
    assert team.found() is None and team.threads() == 5
    with team.TEAM.step(1), team.TEAM:
        assert team.TEAM.team.joined == 5 and len(team.TEAM.team.members) == 4
    linear_numba.set_threads(None)
    assert team.found() is not None and team.threads() == 15


def test_tuned_steps_of_a_machine_with_fewer_cores_end(sixteen):
    """Sixteen threads on whatever this machine has: the search goes to its end, and bits stay the same."""
    rng = np.random.default_rng(4)
    x, w = activations(rng, "normal", 1, 512), weights(rng)["Q4_K"]
    linear_numba.set_threads(None)
    true = linear_numba.linear(x, w)
    end = time.monotonic() + 20
    while team.TEAM.tuner.first and time.monotonic() < end:
        with team.TEAM.step(1):
            for _ in range(100):
                found = linear_numba.linear(x, w)
        np.testing.assert_array_equal(found, true)
    assert 1 <= team.found()[0] <= 15


def test_several_callers_do_not_disturb_each_other(sixteen):
    linear_numba.set_threads(3)
    rng = np.random.default_rng(5)
    jobs = [(activations(rng, "normal", t, 512), w) for t, w in zip((1, 5, 9, 40), weights(rng).values())]
    alone = [linear_numba.linear(*job) for job in jobs]
    wrong: list[object] = []

    def run(i):
        try:
            for _ in range(50):
                np.testing.assert_array_equal(linear_numba.linear(*jobs[i]), alone[i])
        except BaseException as error:
            wrong.append(error)

    callers = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for c in callers:
        c.start()
    for n in (2, 16, 3):  # and somebody changes their number meanwhile
        linear_numba.set_threads(n)
        time.sleep(0.01)
    for c in callers:
        c.join()
    assert not wrong


SCRIPT = """
import os, sys, threading
import numpy as np
from refimpl.kernels import linear_numba, processors, team
from refimpl.conformance import greedy_ties
from refimpl.conformance.inputs.draws import activations, packed
from refimpl.formats import q4_k
team.cores = lambda: 4
team.MIN_PARALLEL_MACS = 0
linear_numba.set_threads(4)
rng = np.random.default_rng(0)
w, x = packed(rng, q4_k, 256, 512), activations(rng, "normal", 3, 512)
first = linear_numba.linear(x, w)
"""


def run(code):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *filter(None, sys.path)])}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT + code], env=env, capture_output=True, text=True, timeout=300
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
def test_a_fork_has_a_team_of_its_own():
    done = run("""
for again in range(3):
    child = os.fork()
    if not child:
        assert team.TEAM.team is None
        same = all(np.array_equal(linear_numba.linear(x, w), first) for _ in range(20))
        started = len(team.TEAM.team.members)
        team.TEAM.end()
        os._exit(0 if same and started == 3 else 1)
    assert np.array_equal(linear_numba.linear(x, w), first)
    assert os.waitpid(child, 0)[1] == 0
print("well")
""")
    assert done.returncode == 0 and done.stdout == "well\n", done.stderr


def test_a_fork_in_the_middle_of_another_thread_s_region_does_not_wait_for_it():
    if not hasattr(os, "fork"):
        pytest.skip("there are no forks here")
    done = run("""
import time
team.TEAM.lock.acquire()  # as another thread would have it
child = os.fork()
if not child:
    os._exit(0 if np.array_equal(linear_numba.linear(x, w), first) else 1)
team.TEAM.lock.release()
print(os.waitpid(child, 0)[1])
""")
    assert done.returncode == 0 and done.stdout == "0\n", done.stderr


def test_the_process_ends_with_its_team_and_after_it_callers_are_alone():
    done = run("""
import atexit
def late():
    assert np.array_equal(linear_numba.linear(x, w), first) and team.TEAM.team is None
    print([t.name for t in threading.enumerate()])
atexit._clear()
atexit.register(late)
atexit.register(team.TEAM.end)
print(len(threading.enumerate()))
""")
    told = [line for line in done.stderr.splitlines() if "compiling the kernels" not in line]
    assert done.returncode == 0 and done.stdout == "4\n['MainThread']\n" and not told, done


# --- what is left behind ------------------------------------------------------------------------------------


def test_a_changed_weight_is_not_taken_for_its_predecessor():
    rng = np.random.default_rng(1)
    w = packed(rng, formats.get(formats.type_id("Q4_K")), 32, 256)
    x = activations(rng, "normal", 1, 256)
    half = Packed(w.data[:, :], w.ggml_type, w.shape)
    for _ in range(100):
        for rows in (32, 16):
            part = Packed(half.data[:rows], w.ggml_type, (rows, 256))
            assert linear_numba.linear(x, part).shape == (1, rows)


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_a_dropped_model_leaves_neither_threads_nor_maps(sixteen, hybrid_folder):
    def maps():
        with open("/proc/self/maps") as file:
            return sum(str(hybrid_folder.resolve()) in line for line in file)

    linear_numba.set_threads(3)
    before, threads = maps(), []
    for _ in range(3):
        model = refimpl.load(hybrid_folder, backend="cpu")
        assert len(list(model.generate([1, 2, 3], 3))) <= 3
        assert maps() > before
        threads.append(threading.active_count())
        del model
        gc.collect()
        assert maps() == before
    assert len(set(threads)) == 1
