"""Kernels are judged in a process of their own, which may exit, crash, hang or fill its memory: that is a
verdict too, and nobody else's verdicts are lost.

The process says which law it is about to try on which case before it does. When it dies, or is silent for
longer than one case may take, or has more memory than it is given, that case is the finding. What a kernel
prints goes to stderr: the verdicts travel by a pipe that the kernel does not know.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import IO, Any, NamedTuple

from refimpl import ops
from refimpl.conformance import cache_machine, interpreter, model_rules
from refimpl.conformance.importing import find
from refimpl.conformance.judge import again, fatal, judge, reproduce
from refimpl.conformance.lookup import Spec
from refimpl.conformance.manifest import Expected, Manifest
from refimpl.conformance.truth.compare import Mismatch
from refimpl.conformance.verdict import Verdict
from refimpl.errors import InputFormatError, RefimplError

PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from refimpl.conformance import child
child.serve()
"""
THREADS = "REFIMPL_CONFORMANCE_THREADS"
INTERPRETED = {"TRITON_INTERPRET": "1"}
"""Environment in which Triton's kernels are interpreted; read when triton is first imported."""
EVERY_S = 0.2  # between two looks at the memory of the process


class Limits(NamedTuple):
    """What one case may take: the kernel's calls together with the truth that they are compared with."""

    seconds: float = 120.0
    nbytes: float = 24e9  # of the whole process


class Job(NamedTuple):
    """What to judge: all laws or some of them, or one case of one law."""

    spec: Spec
    laws: tuple[str, ...] | None = None
    case: str | None = None
    seed: int = 0
    expected: Expected = Expected()
    stop: bool = False  # of a kernel: at the first law that is broken, whose case stays as it is

    def line(self) -> str:
        """The job as one line of JSON, which `read` turns into a job again."""
        spec = self.spec._replace(manifest=asdict(self.spec.manifest))  # type: ignore[arg-type]
        return json.dumps(self._replace(spec=spec, expected=self.expected.lines))  # type: ignore[arg-type]

    @classmethod
    def read(cls, line: str) -> Job:
        """The job that `line` wrote as one line of JSON."""
        spec, laws, case, seed, lines, stop = json.loads(line)
        op, backend, kernel, declared, level, environment, reference, of_format = spec
        manifest = Manifest().with_values(declared, "--declare")
        environment = tuple((name, value) for name, value in environment)
        expected = Expected([(operation, law, reason) for operation, law, reason in lines])
        spec = Spec(op, backend, kernel, manifest, level, environment, reference, of_format)
        return cls(spec, laws and tuple(laws), case, seed, expected, stop)


class Refused(InputFormatError):
    """What the other process refused, in its own words."""

    def __init__(self, code: str, line: str):
        self.code, self.told = code, line
        Exception.__init__(self, line)

    def line(self) -> str:
        return self.told


class Death(NamedTuple):
    """Which law of `FATAL` was broken, and how."""

    law: str
    why: str


# --- in the process itself ----------------------------------------------------------------------------------


def serve() -> None:
    """Answer jobs until there are no more."""
    jobs, answers = _private_streams()
    if os.environ.get("TRITON_INTERPRET"):
        interpreter.quicken()
    if threads := int(os.environ.get(THREADS, "0")):
        ops.set_threads(threads)
    for line in jobs:
        try:
            wrong = _answer(Job.read(line), answers)
            _send(answers, "done", wrong)
        except RefimplError as error:
            _send(answers, "refused", (error.code, error.line()))
        except Exception:  # of a law, not of the kernel
            _send(answers, "failed", traceback.format_exc())


def _private_streams() -> tuple[IO[str], IO[str]]:
    """The pipes, out of a kernel's reach: it reads nothing, and what it prints goes to stderr."""
    jobs, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return jobs, answers


def _send(answers: IO[str], what: str, value: Any) -> None:
    print(json.dumps((what, value)), file=answers, flush=True)


def _answer(job: Job, answers: IO[str]) -> Mismatch | None:
    def before(law: str, case: str) -> None:
        _send(answers, "trying", (law, case))

    def told(v: Verdict) -> None:
        _send(answers, "verdict", asdict(v))

    if job.spec.op == cache_machine.NAME:
        return _cache(job, before, told)
    if job.spec.op == model_rules.NAME:
        return _model(job, before, told)
    trial = replace(job.spec.trial(), isolated=True)
    if job.case is not None:
        (law,) = job.laws or ()
        before(law, job.case)
        return again(trial, law, job.case)
    judge(trial, job.laws, job.seed, not job.stop, job.expected, job.stop, told, before)
    return None


def _cache(job: Job, before: Callable[[str, str], None], told: Callable[[Verdict], None]) -> Mismatch | None:
    make = find(job.spec.kernel or cache_machine.ROWS[job.spec.backend])
    if job.case is not None:
        before(cache_machine.LAW, job.case)
        return cache_machine.again(make, job.case)
    found = cache_machine.judge(
        make, job.spec.label, job.spec.level, job.seed, expected=job.expected, before=before
    )
    told(found)
    return None


def _model(job: Job, before: Callable[[str, str], None], told: Callable[[Verdict], None]) -> Mismatch | None:
    given, spec = find(job.spec.kernel) if job.spec.kernel else None, job.spec
    if job.case is not None:
        (law,) = job.laws or ()
        before(law, job.case)
        return model_rules.again(given, law, job.case)
    model_rules.judge(
        given, spec.label, spec.level, job.seed, job.laws, expected=job.expected, before=before, told=told
    )
    return None


# --- beside it ----------------------------------------------------------------------------------------------


@dataclass
class Child:
    """A process that judges one job after the other, started anew after each that it does not survive."""

    limits: Limits = Limits()  # noqa: RUF009
    environment: dict[str, str] = field(default_factory=dict)
    threads: int = 0  # of kernels and BLAS; 0: as many as they take
    process: subprocess.Popen[str] | None = None

    def judge(self, job: Job, told: Callable[[Verdict], None] = lambda v: None) -> list[Verdict]:
        """Verdicts as `judge.judge` gives them, and one more where the process did not survive."""
        found: list[Verdict] = []
        for what, value in self._ask(job):
            if what == "verdict":
                found.append(Verdict(**value))
                told(found[-1])
            elif what == "died":
                death, law, case = value
                line = self.reproduce(job, law, case) if law else ""
                found.append(
                    fatal(job.spec.op, job.spec.label, death.law, death.why, case, line, job.expected)
                )
                told(found[-1])
        return found

    def again(self, job: Job) -> Mismatch | None:
        """One case: what is wrong with it, if anything."""
        for what, value in self._ask(job):
            if what == "died":
                return Mismatch(value[0].why, breaks=value[0].law)
            if what == "done":
                return value and Mismatch(*value)
        raise AssertionError("the process neither ended nor answered")

    def close(self) -> None:
        """Kill the child process, if there is one, and wait for it, its reader thread and its pipes."""
        if self.process:
            self.process.kill()
            self.process.wait()
            self.reader.join()
            for pipe in (self.process.stdin, self.process.stdout):
                with suppress(BrokenPipeError):
                    pipe.close()  # type: ignore[union-attr]
        self.process = None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @staticmethod
    def reproduce(job: Job, law: str, case: str) -> str:
        """The command that tries this case again."""
        if job.spec.op == cache_machine.NAME:
            return cache_machine.reproduce(job.spec.label, case)
        if job.spec.op == model_rules.NAME:
            return model_rules.reproduce(job.spec.label, law, case)
        spec = job.spec
        return reproduce(spec.op, spec.label, spec.manifest, spec.level, law, case, spec.brought())

    def _launch(self) -> None:
        command = [sys.executable, "-c", PROGRAM, json.dumps(sys.path)]
        env = os.environ | self.environment | ({THREADS: str(self.threads)} if self.threads else {})
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True
        )
        self.messages: queue.SimpleQueue[tuple[str, Any] | None] = queue.SimpleQueue()
        self.reader = threading.Thread(target=_read, args=(self.process.stdout, self.messages), daemon=True)
        self.reader.start()

    def _ask(self, job: Job) -> Iterator[tuple[str, Any]]:
        """The messages about a job; the last is "done" or "died"."""
        if self.process is None:
            self._launch()
        assert self.process and self.process.stdin
        with suppress(BrokenPipeError):
            print(job.line(), file=self.process.stdin, flush=True)
        law, case = "", ""
        while True:
            what, value = self._next()
            if what == "refused":
                raise Refused(*value)
            if what == "failed":
                raise RuntimeError(f"the law {law} itself failed on {case}:\n{value}")
            if what == "trying":
                law, case = value
                continue
            if what == "died":
                self.close()
                yield what, (value, law, case)
                return
            yield what, value
            if what == "done":
                return

    def _next(self) -> tuple[str, Any]:
        """The next message, or what became of the process that should have sent it."""
        assert self.process
        patience = Patience(self.process.pid, self.limits.seconds)
        while True:
            try:
                message = self.messages.get(timeout=EVERY_S)
                return message or ("died", Death("survives", _how_ended(self.process.wait())))
            except queue.Empty:
                pass
            if patience.ended():
                why = f"no end after {self.limits.seconds:g} s; the process was killed"
                return "died", Death("returns", why)
            if (used := _resident(self.process.pid)) > self.limits.nbytes:
                why = (
                    f"{used / 1e9:.1f} GB of memory; the process was killed at {self.limits.nbytes / 1e9:.1f}"
                )
                return "died", Death("survives", why)


BUSY = 10
"""Times its limit that a case may take on a machine that is busy with other things."""
IDLE_S = 10.0
"""Seconds without any work, after which a process that is over its limit is not only waiting for its turn."""


@dataclass
class Patience:
    """Whether a process has had its time for a case. On a busy machine, where it gets little of a processor,
    it has more than `seconds`, as long as it works and has not had that much of one.
    """

    pid: int
    seconds: float

    def __post_init__(self) -> None:
        self.begun = self.worked = time.monotonic()
        self.before = self.used = _processor_s(self.pid)

    def ended(self) -> bool:
        """Asked again and again, whether it is to be killed now."""
        now, used = time.monotonic(), _processor_s(self.pid)
        if used > self.used:
            self.used, self.worked = used, now
        if now - self.begun <= self.seconds:
            return False
        idle = now - self.worked > min(IDLE_S, self.seconds)
        return idle or used - self.before > self.seconds or now - self.begun > BUSY * self.seconds


def _processor_s(pid: int) -> float:
    """Seconds of a processor that a process has used so far. 0 where /proc is not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()  # behind the name, which may hold anything
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _read(pipe: IO[str], messages: queue.SimpleQueue) -> None:
    """All messages, and None at the end of them; a process that dies may leave half a line."""
    with suppress(json.JSONDecodeError, OSError):
        for line in pipe:
            messages.put(tuple(json.loads(line)))
    messages.put(None)


def _how_ended(code: int) -> str:
    if code < 0:
        return f"ended the process by {signal.Signals(-code).name} ({signal.strsignal(-code)})"
    return f"ended the process with exit code {code}"


def _resident(pid: int) -> int:
    """Bytes of memory that a process really has: sparse mappings count for nothing. 0 where /proc is not."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
