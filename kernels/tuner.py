"""How many threads of a team are fastest, found while it works: from the times of one piece of work that is
done again and again, such as a token.

Nobody can say beforehand. A quota of CPU time, a host that takes cores away, two threads of one core and the
threads of other programs all make more threads slower than fewer, each in its own way, and some come and go.
So now and then another number is tried, in turns with the one that is kept:

    kept   other  kept   other  ...      spans of some tokens, SPAN_S or longer
      A      B      A      B

B takes A's place where it is faster by GAIN beyond doubt: the ratio of the means, give or take two standard
errors. Means and not medians, and spans longer than a period of Linux's quotas (0.1 s): who has used up a
quota is fast until then and stands still for the rest.

At first, and when times have changed by CHANGED, all numbers of MOVES are tried, beginning again with each
that is better. After that, one is tried whenever what trying has cost is less than SHARE of all time.
"""

from __future__ import annotations

import math
from collections import deque

MOVES = (3 / 4, 1 / 2, 4 / 3, 2.0, 7 / 8, 8 / 7, 15 / 16, 16 / 15)  # other numbers, relative to the one kept
GAIN = 0.02  # less is not worth a change: noise would move the number about
DOUBT, LEAST_ERROR = 2.0, 0.07  # standard errors; of one piece of work, as few times look alike by chance
ROUNDS = 8  # of a trial; the last decides with half as much doubt
WORSE = 1.5  # so much longer, and a trial ends at once
WARM = 3  # first pieces, which are not counted: they compile, and touch memory for the first time
SETTLE, SETTLE_S = 1, 0.1  # pieces and seconds at the beginning of a span that are not counted
SPAN, SPAN_S = 3, 0.2  # and those that are, at least
REST = 10  # spans between two trials, once all numbers have been tried
CHANGED = 0.2  # of the usual time, in two spans one after the other
SHARE, CHANGED_SHARE = 0.01, 0.05  # of all time that may be lost by trying: usually, and after a change


class Times:
    """Seconds of pieces of work, and what is known of their mean."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def add(self, seconds: float) -> None:
        """One piece more."""
        self.count, self.total = self.count + 1, self.total + seconds
        self.squares += seconds * seconds

    def join(self, other: Times) -> None:
        """All pieces of another."""
        self.count, self.total = self.count + other.count, self.total + other.total
        self.squares += other.squares

    @property
    def mean(self) -> float:
        """Of all pieces."""
        return self.total / self.count

    @property
    def error(self) -> float:
        """The mean's standard error, relative to it."""
        variance = max(0.0, self.squares / self.count - self.mean**2) / max(1, self.count - 1)
        return math.sqrt(variance) / self.mean


class Tuner:
    """`count`, 1 to `most`, is the number for the next piece of work; `took` is told its seconds."""

    def __init__(self, most: int, first: int):
        self.most, self.kept, self.count = most, first, first
        self.other = first  # that is tried beside it
        self.warm = WARM
        self.settling, self.span = Times(), Times()
        self.before: Times | None = None  # the last whole span of the number that is kept
        self.a, self.b, self.rounds = Times(), Times(), 0  # of the trial that goes on
        self.usual, self.doubt, self.odd, self.rested = 0.0, 0.0, 0, 0  # of spans of the number kept
        self.total = self.lost = 0.0
        self.left = self._moves()
        # Whether all numbers are being tried, one after the other, and whether for the first time.
        self.searching = self.first = True

    def took(self, seconds: float) -> None:
        """A piece of work took so long with `count` threads. Afterwards `count` may be another."""
        if self.warm:
            self.warm -= 1
            return
        self.total += seconds
        if self.count != self.kept and self.before:
            self.lost += max(0.0, seconds - self.before.mean)
        if self.settling.count < SETTLE or self.settling.total < SETTLE_S:
            self.settling.add(seconds)
            return
        self.span.add(seconds)
        if self.count != self.kept and self.before and self.span.mean > WORSE * self.before.mean:
            self._end()
        elif self.span.count >= SPAN and self.span.total >= SPAN_S:
            span, self.span = self.span, Times()
            (self._as_kept if self.count == self.kept else self._as_other)(span)

    # --- spans of the number that is kept ---

    def _as_kept(self, span: Times) -> None:
        self.before = span
        if self.rounds:  # a trial goes on
            self._use(self.other)
            return
        if self.searching:
            self._try_next()
            return
        self._watch(span)
        self.rested += 1
        if self.rested >= REST and self.lost <= SHARE * self.total:
            self.rested = 0
            # The nearest first: they cost the least, and from there a search goes on.
            self.left = self.left or deque(reversed(self._moves()))
            self._try_next()

    def _watch(self, span: Times) -> None:
        """Search anew where the machine has changed."""
        if not self.usual:
            self.usual, self.doubt = span.mean, span.error
        apart = span.mean / self.usual - 1
        doubt = DOUBT * math.hypot(span.error, self.doubt)
        odd = math.copysign(1, apart) if abs(apart) > CHANGED + doubt else 0
        if odd and odd == self.odd and self.lost <= CHANGED_SHARE * self.total:
            self._search()
            return
        self.odd = int(odd)
        if not odd:  # it follows a context that grows
            self.usual += 0.1 * (span.mean - self.usual)
            self.doubt *= 0.9

    def _search(self) -> None:
        self.searching, self.left, self.usual, self.odd = True, self._moves(), 0.0, 0
        self._try_next()

    # --- trials ---

    def _moves(self) -> deque[int]:
        """Other numbers, each once, in the order of MOVES."""
        return deque(dict.fromkeys(n for m in MOVES if (n := self._moved(m)) != self.kept))

    def _moved(self, move: float) -> int:
        n = self.kept * move
        return max(1, math.floor(n)) if move < 1 else min(self.most, math.ceil(n))

    def _try_next(self) -> None:
        """Begin a trial, if a number is left for one."""
        if not self.left:
            if self.first:  # what the first search has cost does not count: without it nothing is known
                self.first, self.total, self.lost = False, 0.0, 0.0
            self.searching = False
            return
        self.other = self.left.popleft()
        self.a, self.b, self.rounds = Times(), Times(), 1
        self._use(self.other)

    def _use(self, count: int) -> None:
        self.count, self.settling, self.span = count, Times(), Times()

    def _as_other(self, span: Times) -> None:
        """A span of the other number has ended: decide, or go on with the one that is kept."""
        assert self.before
        self.a.join(self.before)
        self.b.join(span)
        ratio, last = self.b.mean / self.a.mean, self.rounds == ROUNDS
        error = max(math.hypot(self.a.error, self.b.error), LEAST_ERROR / math.sqrt(self.b.count))
        error *= DOUBT / (1 + last)
        # Not in the first round: a hiccup or two in a span of three pieces looks like a gain.
        if self.rounds > 1 and ratio * (1 + error) < 1 - GAIN:
            self._keep(span)
        elif last or ratio * (1 - error) > 1 - GAIN:
            self._end()
        else:
            self.rounds += 1
            self._use(self.kept)

    def _keep(self, span: Times) -> None:
        """The other number from now on. What was better may be better still a step further."""
        old, self.kept, self.before, self.rounds = self.kept, self.other, span, 0
        self.usual, self.odd, self.searching = 0.0, 0, True
        numbers = (self._moved(self.kept / old), *self._moves())
        self.left = deque(dict.fromkeys(n for n in numbers if (n - old) * (self.kept - old) > 0))
        self.left = deque(n for n in self.left if n != self.kept)
        self._try_next()

    def _end(self) -> None:
        self.rounds = 0
        self._use(self.kept)
