"""Worker threads of our own, which take part in what a kernel does: one parallel region after another, told
by one word of memory.

The question. Between two layers' experts a CPU rests for half a millisecond, and Numba's own regions
(`prange`, by OpenMP) take 60 to 250 microseconds to begin after a rest, on 16 to 32 cores; or they spin
meanwhile, in the way of the thread that drives the GPU. They also give each thread one piece of the work, so
that all wait for the slowest, and on a shared machine there always is a slow one.

The answer is a word that holds all there is to agree on,

    tickets:  | number of the region, 40 bits | chunks that nobody has taken yet, 24 bits |

    caller                               members, who look at `tickets` while they wait
      what to do -> task, args, ...        chunks left?  no -> look again
      tickets = (region + 1, chunks) --->  take some by compare-and-swap (region, left) -> (region, left - n)
      takes chunks too                     do them, take more; when none is left add what was done to `done`
      waits until done = chunks      <---
      what to do -> ... the next one

A compare-and-swap that succeeds proves that the region is still open, and so that what the caller wrote of it
before still holds: it goes on only when all that was taken is done. So nobody has to report for a region, and
who comes late, from sleep or because the system had given its core away, is missed and not waited for. A
barrier is the end of one region and the beginning of the next, some hundred nanoseconds while all are awake.

Chunks are taken many at a time at first and ever fewer towards the end (a half of each thread's fair share of
what is left), so that memory is read in long runs and yet all end together.

Who waits looks for a few microseconds with `pause`, then, for SPIN_S, gives its core to whoever wants it
between looks (BLAS, the thread that drives a GPU), and then sleeps: on Linux by `futex`, where each that
wakes wakes two more; elsewhere by a semaphore of Python's.

Not all members need take part. THREADS says how many threads may; the others sleep, each by a semaphore of
its own, until there is a place for them. How many are fastest is found while tokens are made (`tuner`, asked
by `step`), unless somebody says a number (`set_threads`). What is computed has the same bits.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numba
import numpy as np
from numba import types

from refimpl.kernels import processors
from refimpl.kernels.atomic import add, ask, load, load_half, pause, replace, store
from refimpl.kernels.jit import jit
from refimpl.kernels.tuner import Tuner

# A team's memory, a LINE for each thing that threads write at different times, so that a change of one
# does not take the others' line from the caches of those who look at it:
#
#     byte   0         128    256                                   384        512    640    768      896
#            | tickets | done | task args chunks least threads      | sleeping | bell | stop | failed | system
LINE = 128  # bytes: two lines of the cache, since CPUs fetch them in pairs
# Byte offsets in a team's memory; the words of a region (TASK and what follows) are only written between two.
TICKETS, DONE, TASK, SLEEPING, BELL, STOP, FAILED, SYSTEM = (LINE * i for i in range(8))
ARGS, CHUNKS, LEAST, THREADS = (TASK + 8 * i for i in range(1, 5))
YIELD, FUTEX, FUTEX_NUMBER, SPINS = (SYSTEM + 8 * i for i in range(4))
LEFT = (1 << 24) - 1  # the bits of `tickets` that count chunks
PAUSES = 8  # between two looks at `tickets`
KEEP = 64  # looks before the core is offered to others: some 5 to 20 microseconds
SPIN_S = 2e-3  # before going to sleep: longer than what lies between the experts of two layers
# Multiplications below which one thread is faster alone: some 25 microseconds. Others are awake if they were
# at work in the last milliseconds, but what they need is not in their caches.
MIN_PARALLEL_MACS = 1 << 21
SYSTEM_CALLS = {("linux", "x86_64"): 202, ("linux", "aarch64"): 98}  # futex(2)
WAIT, WAKE = 128, 129  # its operations, for threads of one process


# --- inside -------------------------------------------------------------------------------------------------


@jit
def _do(team, who):
    """Take chunks of the region that is open, and do them, until none is left."""
    done = 0
    while True:
        tickets = load(team + TICKETS)
        left = tickets & LEFT
        if left == 0:
            break
        # Half of a fair share of what is left: long runs at first, short ones at the end.
        fair = left // (2 * load(team + THREADS))  # of another region, perhaps: then `replace` fails
        count = min(left, max(fair, load(team + LEAST)))
        if replace(team + TICKETS, tickets, tickets - count):
            low = load(team + CHUNKS) - left
            if not ask(load(team + TASK), (load(team + ARGS), low, low + count, who)):
                store(team + FAILED, 1)
            done += count
    if done:
        add(team + DONE, done)


@jit
def region(team, task, args, chunks, least):
    """Have a team call task(address of args, low, high, who), until the chunks 0 to `chunks` - 1 are done.

    `task` is the address of a `callback` that returns 1; `least` chunks or more are taken at a time; `who`
    is 0 for the caller and at most the number of members. team 0 is the caller alone. Returns 1, or 0 where
    a task did not.
    """
    if chunks <= 0:
        return 1
    address = args.ctypes.data
    if team == 0 or chunks <= least:
        return min(1, ask(task, (address, 0, chunks, 0)))
    # Nobody goes by these now: all chunks of the last region are done, and `tickets` has none left.
    store(team + TASK, task)
    store(team + ARGS, address)
    store(team + CHUNKS, chunks)
    store(team + LEAST, least)
    store(team + DONE, 0)
    store(team + FAILED, 0)
    # From here on members may begin: everything above must be written by then.
    add(team + TICKETS, LEFT + 1 + chunks)  # the next region's number, and its chunks for the 0 that are left
    # Waking is a system call, some microseconds: not made where all still look.
    if load(team + SLEEPING):
        add(team + BELL, 1)
        _wake(team)
    _do(team, 0)
    looks = 0
    while load(team + DONE) < chunks:
        pause()
        looks += 1
        if looks % (KEEP * PAUSES) == 0:  # a member's core was given away: perhaps it wants this one
            ask(load(team + YIELD), (0,))
    return 1 - load(team + FAILED)


@jit
def _wake(team):
    """Two of those that sleep, by `futex`."""
    if load(team + FUTEX):
        ask(load(team + FUTEX), (load(team + FUTEX_NUMBER), team + BELL, WAKE, 2, 0, 0, 0))


@jit
def _spin(team):
    """Wait for work for SPIN_S. Whether there is some, or the end has come."""
    for look in range(load(team + SPINS)):
        for _ in range(PAUSES):
            pause()
        if load(team + TICKETS) & LEFT or load(team + STOP):
            return True
        if look > KEEP:
            ask(load(team + YIELD), (0,))
    return False


@jit
def _sleep(team):
    """By `futex`, until the bell is rung. Whoever was woken wakes others while there is something to do."""
    # Read before saying "I sleep": a bell that rings in between changes the word, and `futex` does not wait.
    rung = load_half(team + BELL)
    add(team + SLEEPING, 1)
    if not (load(team + TICKETS) & LEFT or load(team + STOP)):  # else the bell may have rung before
        ask(load(team + FUTEX), (load(team + FUTEX_NUMBER), team + BELL, WAIT, rung, 0, 0, 0))
    add(team + SLEEPING, -1)
    if (load(team + TICKETS) & LEFT or load(team + STOP)) and load(team + SLEEPING):
        _wake(team)


@jit
def _member(team, who):
    """Take part in regions until the end has come, or this member may not; where there is no `futex`, until
    there was nothing to do for SPIN_S.
    """
    while not load(team + STOP) and who < load(team + THREADS):
        if _spin(team):
            _do(team, who)
        elif load(team + FUTEX):
            _sleep(team)
        else:
            return


@jit
def _looks(team, count):
    for _ in range(count):
        for _ in range(PAUSES):
            pause()
        ask(load(team + YIELD), (0,))


@jit
def _stop(team):
    store(team + STOP, 1)
    add(team + BELL, 1)
    _wake(team)


# --- outside ------------------------------------------------------------------------------------------------


class Team:
    """`threads` - 1 members beside the caller, for one caller at a time, until `stop`."""

    def __init__(self, threads: int):
        memory = np.zeros((SYSTEM + 2 * LINE) // 8, np.int64)
        self.words = memory[-memory.ctypes.data % LINE // 8 :]  # from a line's boundary on
        self.address = self.words.ctypes.data
        self._bell, self._counting = threading.Semaphore(0), threading.Lock()
        self._places = [threading.Semaphore(0) for _ in range(threads)]
        self._prepare(threads)
        self.members = [
            threading.Thread(target=self._live, args=(who,), name=f"refimpl-{who}", daemon=True)
            for who in range(1, threads)
        ]
        for member in self.members:
            member.start()

    def _prepare(self, threads: int) -> None:
        """Write down what members need to know of the system, and compile what they run."""
        for at, value in zip((YIELD, FUTEX, FUTEX_NUMBER, THREADS), (*system(), threads)):
            self.words[at // 8] = value
        # Compiled by the first call, timed by the second: how many looks SPIN_S is on this machine.
        _looks(self.address, 1)
        start = time.perf_counter()
        _looks(self.address, 100)
        self.words[SPINS // 8] = KEEP + int(SPIN_S / max(1e-8, (time.perf_counter() - start) / 100))
        # Before threads start, as compiling holds a lock that they would all wait for.
        _member.compile((types.int64, types.int64))

    def _live(self, who: int) -> None:
        while not self.words[STOP // 8]:
            _member(self.address, who)
            if who >= self.words[THREADS // 8]:
                self._places[who].acquire()
            elif not self.words[FUTEX // 8] and not self.words[STOP // 8]:
                with self._counting:
                    self.words[SLEEPING // 8] += 1
                self._bell.acquire()

    @property
    def joined(self) -> int:
        """Threads that take part in regions, the caller's among them."""
        return int(self.words[THREADS // 8])

    def join(self, threads: int) -> None:
        """Have so many take part in the regions to come, between two regions."""
        before, self.words[THREADS // 8] = self.joined, threads
        for who in range(before, threads):
            self._places[who].release()

    def wake(self) -> None:
        """Call those that sleep without `futex`, before a region is opened; with it, regions call them."""
        if not self.words[FUTEX // 8] and self.words[SLEEPING // 8]:
            with self._counting:
                self._bell.release(int(self.words[SLEEPING // 8]))
                self.words[SLEEPING // 8] = 0

    def stop(self) -> None:
        """End the members, and wait until they have."""
        _stop(self.address)
        for semaphore in (self._bell, *self._places):
            semaphore.release(max(1, len(self.members)))
        for member in self.members:
            member.join()


def system() -> tuple[int, int, int]:
    """Addresses of the functions that give a thread's core away and that make a system call, and the number
    of `futex`. The last two are 0 where members sleep in Python.
    """
    if sys.platform == "win32":
        return _address(ctypes.windll.kernel32.SwitchToThread), 0, 0
    library, number = ctypes.CDLL(None), SYSTEM_CALLS.get((sys.platform, platform.machine()), 0)
    return _address(library.sched_yield), _address(library.syscall) if number else 0, number


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def cores() -> int:
    """CPUs this process may run on, or as many as NUMBA_NUM_THREADS says."""
    return numba.config.NUMBA_NUM_THREADS


def own_threads() -> int:
    """As many as there are CPUs that a quota leaves this process, all of them where NUMBA_NUM_THREADS says a
    number. Of many one is left to the thread that drives a GPU, and to the system.
    """
    usable = cores()
    if "NUMBA_NUM_THREADS" not in os.environ:
        usable = min(usable, processors.usable())
    return usable - (usable > 4)


class _Joined:
    """The team of this process, made when first needed, for the length of a `with`. One caller at a time has
    it; others wait.
    """

    team: Team | None

    def __init__(self) -> None:
        self.ended = False
        self.tune()
        self._after_fork()

    def tune(self) -> None:
        """The default from now on: `own_threads` for many tokens, and for one as many as turn out fastest,
        beginning with one for each core.
        """
        self.threads = self.wanted = own_threads()
        self.tuner: Tuner | None = Tuner(self.threads, min(self.threads, processors.cores()))

    def _after_fork(self) -> None:
        self.lock, self.team = threading.Lock(), None  # a child has none of its parent's threads
        self.in_step = self.used = False

    def __enter__(self) -> int:
        self.lock.acquire()
        try:
            if self.threads == 1 or self.ended:
                return 0
            if self.team is None:
                self.team = Team(self.threads)
            if self.team.joined != (wanted := min(self.wanted, self.threads)):
                self.team.join(wanted)
            self.used = True
            self.team.wake()
            return self.team.address
        except BaseException:
            self.lock.release()
            raise

    def __exit__(self, *error: object) -> None:
        self.lock.release()

    @contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """Around all that is computed for so many tokens: with one, as many threads take part as `tuner`
        says, and it is told the time.
        """
        tuner = self.tuner
        if tokens > 1 or tuner is None or tuner.most < 2 or self.in_step:
            yield
            return
        self.in_step, self.used, self.wanted = True, False, tuner.count
        start = time.perf_counter()
        try:
            yield
            if self.used:  # a small model's work is done by one thread
                tuner.took(time.perf_counter() - start)
        finally:
            self.in_step, self.wanted = False, self.threads

    def resize(self, threads: int | None) -> None:
        """Exactly so many from now on, or by default."""
        with self.lock:
            before = self.threads
            if threads is None:
                self.tune()
            else:
                self.threads, self.tuner, self.wanted = threads, None, threads
            if self.threads != before:
                self._stop()

    def end(self) -> None:
        with self.lock:
            self.ended = True
            self._stop()

    def _stop(self) -> None:
        if self.team is not None:
            self.team.stop()
        self.team = None


TEAM = _Joined()
atexit.register(TEAM.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=TEAM._after_fork)


def set_threads(n: int | None) -> None:
    """Threads that regions have from now on, the caller's among them: 1 to `cores`, exactly. None: the
    default, where a token's number is found while tokens are made.
    """
    TEAM.resize(None if n is None else max(1, min(n, cores())))


def threads() -> int:
    """The most threads that regions have, the caller's among them: all that are given, or by default."""
    return TEAM.threads


def found() -> tuple[int, bool] | None:
    """Threads that a token is fastest with, as far as was found, and whether all numbers have been tried;
    None where somebody said a number.
    """
    return None if TEAM.tuner is None else (TEAM.tuner.kept, not TEAM.tuner.searching)


ALONE = nullcontext(0)


def workers(products: int) -> Any:
    """The team, where so many products are worth its while; 0, which is nobody."""
    return TEAM if products > MIN_PARALLEL_MACS and TEAM.threads > 1 else ALONE


def done(well: int) -> None:
    """RuntimeError where a worker failed; Numba has printed why."""
    if not well:
        raise RuntimeError("a worker thread of refimpl failed; what it raised is printed above")
