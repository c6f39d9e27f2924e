"""The number of threads that the tuner finds on machines that are simulated: nearly the fastest, whatever
makes more threads slower, and it stays there at little cost.
"""

import random
import statistics
from collections.abc import Callable

import pytest

from refimpl.kernels.tuner import Tuner

Machine = Callable[[int], float]  # seconds of a token with so many threads


def flat(n):
    return 0.1


def arithmetic(n):
    return 0.02 + 0.8 / n


def memory(n):
    return 0.02 + max(0.8 / n, 0.08)


def hyperthreads(n):
    return 0.01 + 0.8 / (min(n, 8) + 0.2 * max(0, n - 8))


def in_the_way(n):
    """Two threads of a core that slow each other down."""
    return 0.01 + 0.8 / (min(n, 8) - 0.1 * max(0, n - 8))


def quota(cpus):
    """Threads beyond it use up what those within it need."""
    return lambda n: 0.01 + 0.8 / n if n <= cpus else (0.01 + 0.8 / cpus) * (1.3 + 0.25 * (n - cpus) / cpus)


MACHINES = {
    "flat": flat,
    "arithmetic": arithmetic,
    "memory": memory,
    "hyperthreads": hyperthreads,
    "in the way": in_the_way,
    "quota of 2": quota(2),
    "quota of 8": quota(8),
    "quota of 11": quota(11),
}


def best(machine, most):
    return min(map(machine, range(1, most + 1)))


def run(tuner: Tuner, machine: Machine, tokens: int, noise: float = 0.0, seed: int = 0) -> list[float]:
    """What each token takes on that machine by itself; the tuner is told it with noise, and of one in a
    hundred that took four times as long.
    """
    rng, true = random.Random(seed), []
    for _ in range(tokens):
        true.append(machine(tuner.count))
        odd = 4 if noise and rng.random() < 0.01 else 1
        tuner.took(true[-1] * odd * max(0.2, rng.gauss(1, noise)))
    return true


@pytest.mark.parametrize("most", [2, 4, 15, 31])
@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("name", MACHINES)
def test_it_ends_near_the_fastest_and_stays(name, noise, most):
    machine = MACHINES[name]
    for seed in range(3):
        tuner = Tuner(most, most)
        run(tuner, machine, 1500, noise, seed)
        assert machine(tuner.kept) <= 1.05 * best(machine, most), (tuner.kept, seed)
        assert not tuner.first  # all numbers have been tried
        later = run(tuner, machine, 1500, noise, seed + 100)
        assert machine(tuner.kept) <= 1.05 * best(machine, most), (tuner.kept, seed)
        # With all that is tried now and then.
        assert statistics.mean(later) <= 1.07 * best(machine, most)


@pytest.mark.parametrize("name", MACHINES)
def test_a_noisy_machine_rarely_misleads_it(name):
    machine, near = MACHINES[name], 0
    for seed in range(10):
        tuner = Tuner(15, 15)
        run(tuner, machine, 3000, 0.2, seed)
        near += machine(tuner.kept) <= 1.1 * best(machine, 15)
    assert near >= 8


@pytest.mark.parametrize("seconds", [0.05, 1.0])  # of what the machines above take
def test_trying_costs_little(seconds):
    for machine in MACHINES.values():
        tuner = Tuner(15, 15)
        run(tuner, lambda n, of=machine: seconds * of(n), 20_000, 0.05)
        assert tuner.lost <= 0.02 * tuner.total  # a hundredth, and the trial that went beyond it


def test_it_begins_where_it_is_told_and_goes_up_too():
    tuner = Tuner(16, 8)
    assert tuner.count == 8
    run(tuner, arithmetic, 1000)
    assert tuner.kept >= 15


def test_it_follows_a_machine_that_changes():
    for noise in (0.0, 0.05):
        tuner = Tuner(15, 15)
        run(tuner, arithmetic, 1000, noise)
        assert tuner.kept >= 14
        run(tuner, quota(6), 1000, noise)  # others have come
        assert 0.95 * quota(6)(tuner.kept) <= quota(6)(6)
        run(tuner, arithmetic, 6000, noise)  # and gone, which no token tells
        assert tuner.kept >= 14


def test_a_context_that_grows_is_no_change():
    tuner, switches = Tuner(15, 15), 0
    for token in range(4000):
        before = tuner.searching
        tuner.took((0.02 + 0.8 / tuner.count) * (1 + token / 1000))
        switches += tuner.searching and not before
    assert tuner.kept >= 14 and not switches


def test_one_thread_leaves_nothing_to_try():
    tuner = Tuner(1, 1)
    run(tuner, flat, 100)
    assert tuner.count == tuner.kept == 1 and not tuner.searching
