"""One model, many conversations: a thread that computes a piece of each in turn.

A turn of a round is one new token, or one piece of a prompt (`LatentCache.prefill` tokens). So nobody waits
longer than a round, and everybody gets the same number of tokens. Each conversation has a latent cache of its
own. When it ends the cache is kept, and a later prompt of the same scope that begins in the same way takes it
over; caches that wait so are the first to go when room is needed.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from refimpl.errors import RefimplError, refusal
from refimpl.generate import Sampling, Session, draw
from refimpl.model import Model
from refimpl.server.room import Room
from refimpl.server.routes import RouteRecorder

FLUSH_SECONDS = 0.01


class Busy(Exception):
    """All places are taken and enough are waiting. `retry_after`: seconds until one may be free."""

    def __init__(self, retry_after: int):
        super().__init__(f"retry after {retry_after} s")
        self.retry_after = retry_after


class Token(NamedTuple):
    """One new token. `logprob` is that of the model, before temperature and the like; None if not asked
    for.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # the likeliest, (id, logprob)
    experts: dict[int, list[int]] | None = None  # by layer; None for the last token, which goes nowhere


class End(NamedTuple):
    """A turn is over: "stop", "length", "cancelled", or "error" with what was raised."""

    reason: str
    cached: int = 0  # tokens of the prompt that were not computed again
    error: BaseException | None = None


@dataclass(frozen=True)
class Turn:
    """What is asked of the engine. Caches are shared within a `scope` only."""

    prompt: list[int]
    sampling: Sampling
    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    scope: str = ""
    top: int | None = None  # runners-up wanted; None: no probabilities at all
    experts: bool = False


@dataclass(eq=False)
class Job:
    """A turn under way. `emit` is called from the engine's thread, once for each Token and last with the End;
    it must not wait.
    """

    turn: Turn
    emit: Callable[[Token | End], None]
    cancelled: bool = False
    session: Session | None = None
    steps: Iterator[Token | None] | None = None
    reason: str = "length"
    cached: int = 0
    rows: int = 0
    started: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class Kept:
    """The cache of a conversation that nobody is computing for."""

    session: Session
    scope: str
    rows: int
    prompt: int  # tokens of it that its last prompt had


class Engine:
    """Takes turns with up to `places` conversations; `waiting` more stand in line, beyond that there is
    Busy.
    """

    def __init__(
        self, model: Model, banned: np.ndarray, room: Room | None = None, places: int = 64, waiting: int = 64
    ):
        self.model, self.banned, self.room = model, banned, room or Room(model)
        self.places, self.most_waiting = places, waiting
        self.routes = RouteRecorder(model)
        self.active: list[Job] = []
        self.line: deque[Job] = deque()
        self.kept: deque[Kept] = deque()  # the one longest unused first
        self.tokens = 0  # made since the start
        # Called after each round, and within one every FLUSH_SECONDS, for listeners that gather what is said.
        self.flush: Callable[[], None] = lambda: None
        self._flushed = 0.0
        self._seconds = 1.0  # of a turn, on average of late
        self._changed, self._closing = threading.Condition(), False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread still runs."""
        return self._thread.is_alive()

    def submit(self, turn: Turn, emit: Callable[[Token | End], None]) -> Job:
        """Stand in line. Busy when the line is full; ResourceError E6001 when the turn exceeds the context,
        E9003 when its cache alone exceeds the memory for caches.
        """
        rows = len(turn.prompt) + turn.max_new_tokens
        if rows > self.room.limit_rows:
            raise refusal("E6001", "context", found=rows, expected=f"at most {self.room.limit_rows}")
        if not self.room.fits([self.room.grown(0, rows)]):
            raise refusal("E9003", "context", found=rows)
        with self._changed:
            if len(self.line) >= self.most_waiting or self._closing or not self.alive:
                raise Busy(self._retry_after())
            job = Job(turn, emit)
            self.line.append(job)
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Give the place of a job back, before its next token. Harmless when it is over."""
        with self._changed:
            job.cancelled = True

    def close(self) -> None:
        """End the thread; jobs under way are cancelled."""
        with self._changed:
            self._closing = True
            for job in (*self.active, *self.line):
                job.cancelled = True
            self._changed.notify()
        self._thread.join()

    def cache_bytes(self) -> int:
        """Bytes that all caches hold."""
        sessions = [j.session for j in list(self.active) if j.session] + [k.session for k in list(self.kept)]
        return sum(s.cache.nbytes for s in sessions)

    def _retry_after(self) -> int:
        rounds = 1 + len(self.line) / max(1, self.places)
        return int(min(60, max(1, rounds * self._seconds)))

    # --- the thread -----------------------------------------------------------------------------------------

    def _loop(self) -> None:
        with np.errstate(all="ignore"):  # damaged weights are reported by `draw`, in one line
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self.active or self.line or self._closing)
                    self._admit()
                    if self._closing and not self.active:
                        return
                for job in list(self.active):
                    self._step(job)
                    if time.monotonic() - self._flushed > FLUSH_SECONDS:
                        self._flush()
                self._flush()

    def _flush(self) -> None:
        self._flushed = time.monotonic()
        self.flush()

    def _admit(self) -> None:
        """Let those in who stand in line, in their order, as far as there are places and memory."""
        for job in [j for j in self.line if j.cancelled]:
            self.line.remove(job)
            self._tell(job, End("cancelled"))
        while self.line and len(self.active) < self.places and self._seat(self.line[0]):
            self.active.append(self.line.popleft())

    def _seat(self, job: Job) -> bool:
        """Give a job its cache, if there is room for it: the rest of the line waits behind it, so that a long
        one is not passed by for ever.
        """
        rows = len(job.turn.prompt) + job.turn.max_new_tokens
        found = self._matching(job.turn)
        held = found.rows if found else 0
        others = [j.rows for j in self.active]
        while not self.room.fits(
            [*others, self.room.grown(held, rows), *(k.rows for k in self.kept if k is not found)]
        ):
            victim = next((k for k in self.kept if k is not found), None)
            if victim is not None:
                self.kept.remove(victim)
            elif found is not None:  # its cache would double beyond what a new one takes
                self.kept.remove(found)
                found, held = None, 0
            else:
                return False
        if found is not None:
            self.kept.remove(found)
        job.session = found.session if found else Session(self.model, self.banned)
        job.rows, job.cached = self.room.grown(held, rows), job.session.kept(job.turn.prompt)
        job.steps = self._steps(job, job.session)
        return True

    def _matching(self, turn: Turn) -> Kept | None:
        """The kept cache to go on with: the one that shares most, if that is half of its prompt or more. Of
        one that shares less another conversation may have more use. What it answered does not count:
        templates leave the thinking out of the history, so that a next turn parts from it there.
        """
        best = max(
            (k for k in self.kept if k.scope == turn.scope),
            key=lambda k: k.session.kept(turn.prompt),
            default=None,
        )
        if best is None or 2 * best.session.kept(turn.prompt) < max(2, best.prompt):
            return None
        return best

    def _steps(self, job: Job, session: Session) -> Iterator[Token | None]:
        """One piece of work at a time: None while the prompt is read, then new tokens."""
        turn, rng = job.turn, np.random.default_rng(job.turn.sampling.seed)
        for logits in session.pieces(turn.prompt):  # noqa: B007 - the last ones are used
            yield None
        for left in range(turn.max_new_tokens, 0, -1):
            logits[self.banned] = -np.inf
            token = Token(draw(logits, turn.sampling, rng))
            if turn.top is not None:
                token = _with_probabilities(token, logits, turn.top)
            if token.id in turn.stop_ids:
                job.reason = "stop"
            over = left == 1 or token.id in turn.stop_ids
            if not turn.experts:
                yield token
                if over:
                    return
                logits = session.forward([token.id])
                continue
            # The experts that a token goes to are known when it has gone there: it is told a step later.
            if not over:
                self.routes.on = True
                try:
                    logits = session.forward([token.id])
                finally:
                    self.routes.on = False
                token = token._replace(experts=self.routes.take() or None)
            yield token
            if over:
                return

    def _step(self, job: Job) -> None:
        """One piece of work of a job, and what it comes to."""
        if job.cancelled:
            self._finish(job, End("cancelled", job.cached))
            return
        try:
            assert job.steps is not None
            token = next(job.steps)
        except StopIteration:
            self._finish(job, End(job.reason, job.cached))
        except (RefimplError, MemoryError) as error:
            self._finish(job, End("error", job.cached, error), keep=False)
        except Exception as error:  # a defect here must not end the conversations of all others
            traceback.print_exc(file=sys.stderr)
            self._finish(job, End("error", job.cached, error), keep=False)
        else:
            if token is not None:
                self.tokens += 1
                self._tell(job, token)

    def _finish(self, job: Job, end: End, keep: bool = True) -> None:
        with self._changed:
            self.active.remove(job)
            if keep and job.session is not None and job.session.ids:
                self.kept.append(Kept(job.session, job.turn.scope, job.rows, len(job.turn.prompt)))
                if len(self.kept) > self.places:
                    self.kept.popleft()
            self._seconds += 0.2 * (time.monotonic() - job.started - self._seconds)
        job.steps = job.session = None
        self._tell(job, end)

    def _tell(self, job: Job, what: Token | End) -> None:
        try:
            job.emit(what)
        except Exception:  # the listener's loop is closed: nobody is left to tell
            job.cancelled = True


def _with_probabilities(token: Token, logits: np.ndarray, top: int) -> Token:
    scores = logits.astype(np.float64) - logits.max()
    scores -= np.log(np.exp(scores).sum())
    best = np.argsort(-scores, kind="stable")[:top]
    return token._replace(
        logprob=float(scores[token.id]),
        top=tuple((int(i), float(scores[i])) for i in best if np.isfinite(scores[i])),
    )
