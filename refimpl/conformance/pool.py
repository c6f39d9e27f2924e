"""Seeds, faults and rewrites dealt out to processes of one thread each, and how a campaign is stopped.

Not by pytest-xdist, which deals out tests that are known beforehand: here a campaign has an end in time, says
how far it is, and runs from an installed wheel. Seeds are hypothesis' own, one for each run.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from itertools import islice
from multiprocessing import active_children, get_context
from typing import Any, NamedTuple

from refimpl import ops

EVERY_S = 10.0  # between two lines of progress

# A process is one thread, except where the law of threads asks for more; those must not wait by spinning
# beside other processes.
ALONE = {
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}


def dealt(
    processes: int,
    initialize: Callable[..., None],
    given: tuple,
    work: Callable[..., Any],
    jobs: Iterable[tuple],
    end: float = float("inf"),
) -> Iterator[Any]:
    """work(*job) of each job as it is done, None whenever EVERY_S went by without one; none is dealt out
    after `end` (time.time), and to each process one before it asks for it.

    Each process calls initialize(*given) first. All of these are functions of modules.
    """
    _alone(True)
    left = iter(jobs)
    with _ended(ProcessPoolExecutor(processes, get_context("spawn"), initialize, given)) as pool:
        waiting: set[Future[Any]] = {_submitted(pool, work, job) for job in islice(left, 2 * processes)}
        while waiting:
            done, waiting = wait(waiting, EVERY_S, FIRST_COMPLETED)
            yield from (f.result() for f in done)
            if not done:
                yield None
            more = islice(left, len(done) if time.time() < end else 0)
            waiting |= {_submitted(pool, work, job) for job in more}


class Task(NamedTuple):
    """Arguments of the work, and variables that its process has beside this one's."""

    given: tuple
    environment: dict[str, str]


def in_order(processes: int, threads: int, work: Callable[..., Any], tasks: Sequence[Task]) -> Iterator[Any]:
    """work(*given) of each task, in the order of the tasks, each as soon as it and those before it are known.

    As many hands as processes have a process of so many `threads` for each environment, begun when the first
    task needs it. `work` is a function of a module.
    """
    _alone(processes > 1)
    pools: dict[tuple, ProcessPoolExecutor] = {}

    def done(task: Task) -> Any:
        key = threading.get_ident(), *task.environment.items()
        if key not in pools:
            pools[key] = stack.enter_context(_ended(process(task.environment, threads)))
        return _submitted(pools[key], work, task.given).result()

    with ExitStack() as stack, _ended(ThreadPoolExecutor(processes)) as hands:
        yield from hands.map(done, tasks)


def process(environment: dict[str, str], threads: int) -> ProcessPoolExecutor:
    """One process, in which `environment` is set before numba and triton are imported and read it."""
    return ProcessPoolExecutor(1, get_context("spawn"), _begun, (environment, threads))


def _begun(environment: dict[str, str], threads: int) -> None:
    os.environ |= environment
    ops.set_threads(threads)


def _alone(beside_others: bool) -> None:
    """Let processes that are begun from now on be one thread each."""
    if beside_others:
        os.environ |= {name: value for name, value in ALONE.items() if name not in os.environ}


def _submitted(pool: ProcessPoolExecutor, work: Callable[..., Any], job: tuple) -> Future[Any]:
    """The work in the pool, whose processes are begun here and never hear of Ctrl-C: who began them does."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(work, *job)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _ended(pool: Any) -> Iterator[Any]:
    """At its end nothing runs any more. What still works when an exception leaves is not waited for."""
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


class Stopped:
    """Within it, Ctrl-C and SIGTERM end the block, and what it found so far is kept; `early` says that one
    came.
    """

    early = False

    def __enter__(self) -> Stopped:
        # Only the main thread may say what a signal does, and a caller in another keeps what it has.
        main = threading.current_thread() is threading.main_thread()
        self.before = signal.signal(signal.SIGTERM, self._stop) if main else None
        return self

    def _stop(self, number: int, frame: Any) -> None:
        self.early = True
        raise KeyboardInterrupt

    def __exit__(self, kind: type[BaseException] | None, *more: object) -> bool:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)
        self.early |= kind is KeyboardInterrupt
        return self.early

    def code(self, bad: bool) -> int:
        """The exit code of a campaign: 1 if it found something bad, 130 if it was stopped before its end."""
        return 1 if bad else 130 if self.early else 0
