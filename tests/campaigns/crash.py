"""Merges that are killed, fail at the k-th act on a file, run out of room or memory, or meet another: the
output is whole or absent, and the same command ends with the bytes of a merge that nothing disturbed.

`cases` is how many merges are killed, half of them at a random act and half at a random time, each up to
three times before it may finish. Every act fails once where there are at least as many cases as acts, and
evenly chosen ones otherwise.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from refimpl import convert_model
from refimpl.errors import RefimplError, ResourceError
from refimpl.tiny import FP8_DIR, GGUF_DIR
from tests.campaigns import WHOLE, Part, Report
from tests.campaigns.faults import Faults

SHORT, LONG = 6, 200
ERRNOS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.EACCES)
ROOT = Path(__file__).parents[2]
INPUTS = (str(FP8_DIR), str(GGUF_DIR))


class Bench:
    """A folder to merge in, and what must come out."""

    def __init__(self, folder: Path):
        self.folder, self.plan = folder / "here", convert_model.plan(FP8_DIR, GGUF_DIR)
        start = time.monotonic()
        convert_model.write(self.plan, folder / "true")
        self.seconds = time.monotonic() - start
        self.true = contents(folder / "true")

    def fresh(self) -> Path:
        """The output's path in an empty folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        return self.folder / "out"

    def wrong(self, output: Path) -> Iterator[str]:
        """What is wrong with an output that need not be there."""
        if output.exists() and contents(output) != self.true:
            yield "an output that is not whole"

    def end(self, output: Path) -> Iterator[str]:
        """What is wrong after the command was given again."""
        try:
            convert_model.write(self.plan, output)
        except (RefimplError, OSError) as error:
            # The fault came after the rename, and nothing was left that told whose the output is.
            if getattr(error, "code", None) != "E5101":
                yield f"going on: {error}"
        if not output.exists() or contents(output) != self.true:
            yield "the end differs from a merge undisturbed"
        if left := sorted(p.name for p in self.folder.iterdir() if p != output):
            yield f"left behind: {', '.join(left)}"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes."""
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def start(fault: str, k: int, output: Path) -> subprocess.Popen[str]:
    """A merge in a process of its own, see `faults`."""
    command = [sys.executable, "-m", "tests.campaigns.faults", fault, str(k), *INPUTS, str(output)]
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=os.environ | {"PYTHONPATH": path}
    )


def _go(processes: list[subprocess.Popen[str]]) -> None:
    """Let those begin that `wait`, when all of them do."""
    for process in processes:
        process.stdout.readline()  # type: ignore[union-attr]
    for process in processes:
        process.stdin.close()  # type: ignore[union-attr]
        process.stdin = None


def run(cases: int, seed: int, folder: Path, part: Part = WHOLE) -> Report:
    """Kills, then faults at every act, then limits, then merges at one time."""
    bench = Bench(folder)
    with Faults(0, _never).installed() as faults:
        convert_model.write(bench.plan, bench.fresh())
    acts = len(faults.acts)
    few = cases < 20
    parts = {
        "killed": kills(bench, part.share(range(cases)), seed, acts),
        "failing acts": failing(bench, part.share(range(1, acts + 1, max(1, acts // (8 * cases))))),
        "files of limited size": limited(
            bench, "size", part.share([k * 80_000 for k in range(1, 4 if few else 21)])
        ),
        "limited memory": limited(
            bench,
            "memory",
            part.share([1 << k for k in range(14, 30, 6 if few else 1)] if sys.platform == "linux" else []),
        ),
        "at one time": together(bench, part.share(range(2, 5 if few else 9, 2 if few else 1))),
    }
    failures: list[str] = []
    counts: dict[str, Counter[str]] = {}
    for name, outcomes in parts.items():
        counts[name] = Counter()
        for outcome, wrong in outcomes:
            counts[name][outcome] += 1
            failures += [f"{name}, {outcome}: {w}" for w in wrong]
    return Report(
        sum(map(Counter.total, counts.values())), failures, counts, {"acts on files in one merge": acts}
    )


Outcomes = Iterator[tuple[str, list[str]]]


def _never(act: str) -> None:
    raise AssertionError(act)


def kills(bench: Bench, cases: Sequence[int], seed: int, acts: int) -> Outcomes:
    """(how often it was killed, what was wrong) for each merge."""
    for case in cases:
        rng = random.Random(f"crash/{seed}/{case}")
        output, killed, wrong = bench.fresh(), 0, list[str]()
        for _ in range(rng.randint(1, 3)):
            if case % 2:
                process = start("kill", rng.randint(1, acts), output)
            else:
                process = start("wait", 0, output)
                _go([process])
                time.sleep(rng.uniform(0, 1.5 * bench.seconds + 0.1))  # and the time to plan
                process.kill()
            process.communicate()
            killed += process.returncode == -9
            wrong += bench.wrong(output)
        yield f"killed {killed} times", wrong + list(bench.end(output))


def failing(bench: Bench, acts: Sequence[int]) -> Outcomes:
    """(name of the error, what was wrong) for the failure of each act."""
    for at in acts:
        number = random.Random(f"failing/{at}").choice(ERRNOS)

        def fail(act: str, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        output, outcome, wrong = bench.fresh(), "no error", list[str]()
        try:
            with Faults(at, fail).installed():
                convert_model.write(bench.plan, output)
        except (ResourceError, OSError) as error:
            outcome = error.code if isinstance(error, ResourceError) else errno.errorcode[error.errno or 0]
            full = number in (errno.ENOSPC, errno.EDQUOT)
            if full != (outcome == "E5102") or (not full and outcome != errno.errorcode[number]):
                wrong.append(f"act {at} with {errno.errorcode[number]}: {error}")
        yield outcome, wrong + list(bench.wrong(output)) + list(bench.end(output))


def limited(bench: Bench, kind: str, limits: Sequence[int]) -> Outcomes:
    """(code of the error, what was wrong) for each limit."""
    for limit in limits:
        output = bench.fresh()
        process = start(kind, limit, output)
        _, errors = process.communicate()
        last = (errors.splitlines() or [""])[-1]
        fine = process.returncode == 0 or (
            process.returncode == 1 and last.startswith("refimpl: E5") and "Traceback" not in errors
        )
        wrong = [] if fine else [f"{limit} bytes: exit code {process.returncode}, {errors[-300:]!r}"]
        yield (
            "fine" if process.returncode == 0 else last.split()[1] if fine else "crash",
            wrong + list(bench.wrong(output)) + list(bench.end(output)),
        )


def together(bench: Bench, counts: Sequence[int]) -> Outcomes:
    """(how the merges ended, what was wrong) for as many merges to one output at one time."""
    for count in counts:
        output = bench.fresh()
        processes = [start("wait", 0, output) for _ in range(count)]
        _go(processes)
        errors = [process.communicate()[1] for process in processes]
        won = [p.returncode for p in processes].count(0)
        # One that comes to the lock after the winner has left finds the output there.
        lost = sum(
            p.returncode == 1 and e.splitlines()[-1].split()[1] in ("E5103", "E5101")
            for p, e in zip(processes, errors, strict=True)
        )
        wrong = [] if (won, lost) == (1, count - 1) else [f"{won} of {count} won, {lost} were told: {errors}"]
        left = sorted(p.name for p in bench.folder.iterdir() if p != output)
        yield (
            "one of them won" if not wrong else "none or several",
            wrong + list(bench.wrong(output)) + [f"left behind: {n}" for n in left],
        )
