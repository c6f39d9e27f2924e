"""Seeds dealt out to processes of one thread each.

Not by pytest-xdist, which deals out tests that are known beforehand: here a campaign has an end in time, says
how far it is, and runs from an installed wheel. Seeds are hypothesis' own, one for each run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import islice
from multiprocessing import get_context
from typing import Any

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
    """work(*job) of each job as it is done, None whenever EVERY_S went by without one; none is begun after
    `end` (time.time).

    Each process calls initialize(*given) first. All of these are functions of modules.
    """
    os.environ |= {name: value for name, value in ALONE.items() if name not in os.environ}
    left = iter(jobs)
    pool = ProcessPoolExecutor(processes, get_context("spawn"), initialize, given)
    try:
        waiting: set[Future[Any]] = {pool.submit(work, *job) for job in islice(left, processes)}
        while waiting:
            done, waiting = wait(waiting, EVERY_S, FIRST_COMPLETED)
            yield from (f.result() for f in done)
            if not done:
                yield None
            more = islice(left, len(done) if time.time() < end else 0)
            waiting |= {pool.submit(work, *job) for job in more}
    finally:
        pool.shutdown(cancel_futures=True)
