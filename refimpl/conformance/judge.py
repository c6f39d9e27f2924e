"""Run the laws on one kernel: verdicts, each failure with its smallest input found and a line that reproduces
it.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis.errors import FlakyFailure, HypothesisException, Unsatisfiable

from refimpl.conformance import ways
from refimpl.conformance.families.family import Recipe
from refimpl.conformance.inputs.cached import RECIPES
from refimpl.conformance.laws.ladder import FORM, LAWS, WAYS, Law, applying
from refimpl.conformance.manifest import Expected, Manifest
from refimpl.conformance.trial import KernelEnded, KernelRaised, Trial, quiet
from refimpl.conformance.truth.compare import Mismatch
from refimpl.conformance.verdict import FATAL, Verdict
from refimpl.entered import listening
from refimpl.errors import refusal

Before = Callable[[str, str], None]
EVIDENCE = ("bound", "edges", "real_sizes")
"""Laws that prove nothing where their bound says nothing."""

SHRINKING_S = 20.0  # seconds after which the smallest input so far is good enough
SLOW_S = {
    "smoke": 6.0,
    "quick": 6.0,
    "full": 240.0,
    "exhaustive": 3600.0,
}
"""Seconds of a processor that one law may take, which do not depend on what else a machine has to do. What is
left of its drawn examples then is left out, and said; cases that are enumerated are all tried, but for the
smoke level.
"""


class _Found(Exception):
    """Stops hypothesis at an example that fails."""


@dataclass
class Search:
    """One law on one kernel: how many examples were tried, and the last that failed, which is the
    smallest.
    """

    trial: Trial
    law: Law
    seed: int
    shrink: bool
    seconds: float  # from which on examples are left out
    before: Before = lambda law, case: None
    tried: int = 0
    failed: tuple[Recipe, Mismatch] | None = None
    cut: bool = False
    drawn: list[Recipe] = field(default_factory=list)

    def run(self) -> None:
        """Enumerate, or let hypothesis search."""
        self.end = time.process_time() + self.seconds
        if self.law.cases:
            for recipe in self.law.cases(self.trial):
                if self.try_(recipe) or (self.trial.level == "smoke" and self._over()):
                    return
        if self.law.strategies:
            for i, strategy in enumerate(self.law.strategies(self.trial)):
                self._search(strategy, i)
                if self.failed:
                    return

    def _search(self, strategy: Any, number: int) -> None:
        """Try what this seed drew for another kernel of the operation, or another law that draws the same.
        Where that is not known, or one of it fails, hypothesis searches.
        """
        trial, law, before = self.trial, self.law, self.tried
        key = trial.op, trial.manifest, law.strategies, law.count(trial), self.seed, number
        drawn: list[Recipe] | None = RECIPES.get(key)
        if drawn is not None and not any(self.try_(recipe) or self._over() for recipe in drawn):
            return
        if drawn is not None and (self.cut or not self.shrink):
            return
        seen, self.tried, self.failed, self.drawn = self.failed, before, None, []
        self._hypothesis(strategy, number)
        self.failed = self.failed or seen  # what fails only now and then fails
        if not (self.failed or self.cut):
            RECIPES.put(key, self.drawn, len(self.drawn))

    def try_(self, recipe: Recipe) -> bool:
        """Whether this one fails; it is then kept."""
        self.tried += 1
        self.before(self.law.name, json.dumps(recipe, separators=(",", ":")))
        wrong = attempt(self.trial, self.law, recipe)
        if wrong:
            self.failed = recipe, wrong
        return wrong is not None

    def _over(self) -> bool:
        self.cut = time.process_time() > self.end
        return self.cut

    def _hypothesis(self, strategy: Any, number: int) -> None:
        phases = (Phase.generate, Phase.shrink) if self.shrink else (Phase.generate,)
        give_up = None

        @hypothesis.seed(self.seed * 1000 + number)
        @settings(
            max_examples=self.law.count(self.trial),
            database=None,
            deadline=None,
            phases=phases,
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            print_blob=False,
        )
        @hypothesis.given(strategy)
        def search(recipe: Recipe) -> None:
            nonlocal give_up
            if (give_up and time.monotonic() > give_up) or (not self.failed and self._over()):
                return
            self.drawn.append(recipe)
            if self.try_(recipe):
                give_up = give_up or time.monotonic() + SHRINKING_S
                raise _Found

        # What a database would keep examples by, and hypothesis works out of the source where it is not said.
        search._hypothesis_internal_database_key = b""
        try:
            search()
        except (_Found, FlakyFailure, Unsatisfiable):
            pass
        except HypothesisException:
            if not self.failed:
                raise


def attempt(trial: Trial, law: Law, recipe: Recipe) -> Mismatch | None:
    """One law on one recipe. What the kernel raises is a mismatch too."""
    try:
        with quiet():
            return law.check(trial, recipe)
    except KernelRaised as error:
        return Mismatch(f"raised {error}"[:300], breaks="survives" if isinstance(error, KernelEnded) else "")


def judge(
    trial: Trial,
    laws: Iterable[str] | None = None,
    seed: int = 0,
    shrink: bool = True,
    expected: Expected | None = None,
    stop: bool = False,
    told: Callable[[Verdict], None] = lambda v: None,
    before: Before = lambda law, case: None,
) -> list[Verdict]:
    """Verdicts of all laws that apply (or of those named), in the order of the ladder; `stop` at the first
    failure. `before` is called with each law and case that is about to be tried, `told` with each verdict.

    `form` comes first, asked for or not. Where it is broken, or a law of `FATAL`, nothing else is judged:
    one mistake is one failure.
    """
    found: list[Verdict] = []
    wanted = set(laws) if laws else None
    with listening() as heard:
        complete = _climb(trial, wanted, seed, shrink, expected or Expected(), stop, told, before, found)
    if not complete:
        return found
    if trial.ways and (wanted is None or WAYS in wanted) and trial.level != "smoke":
        found.append(_all_ways(trial, heard, expected or Expected()))
        told(found[-1])
    tried = sum(v.examples for v in found)
    for name in [n for n in FATAL if wanted is None or n in wanted]:
        found.append(Verdict(trial.op, trial.label, name, True, tried, 0.0))
        told(found[-1])
    return found


def _climb(
    trial: Trial,
    wanted: set[str] | None,
    seed: int,
    shrink: bool,
    expected: Expected,
    stop: bool,
    told: Callable[[Verdict], None],
    before: Before,
    found: list[Verdict],
) -> bool:
    """The ladder, as `judge` says: verdicts into `found`. Whether the end was reached. Where only `ways` is
    asked for, all laws are tried and none is told.
    """
    for law in applying(trial):
        asked = wanted is None or law.name in wanted
        if not asked and wanted != {WAYS} and (law.name != FORM or trial.formed):
            continue
        seconds = math.inf if law.name == FORM or law.slow else SLOW_S[trial.level]
        search = Search(trial, law, seed, shrink, seconds, before)
        verdict = _verdict(search, expected)
        trial.formed |= verdict.passed and law.name == FORM
        if asked or not verdict.passed:
            found.append(verdict)
            told(verdict)
        if verdict.law in FATAL or (law.name == FORM and not verdict.fine) or (stop and not verdict.passed):
            return False
    return True


def _all_ways(trial: Trial, heard: Counter[str], expected: Expected) -> Verdict:
    wrong = ways.missing(trial.ways, heard)
    reason = expected.reason(trial.op, WAYS) if wrong else None
    verdict = Verdict(trial.op, trial.label, WAYS, wrong is None, len(trial.ways), 0.0, expected=reason)
    verdict.note = ways.not_here(trial.ways)
    if wrong:
        verdict.why = wrong.what
        line = reproduce(trial.op, trial.label, trial.manifest, trial.level, WAYS, "", trial.brought)
        verdict.reproduce = line.partition(" --case")[0]
    return verdict


def fatal(op: str, label: str, law: str, why: str, case: str, line: str, expected: Expected) -> Verdict:
    """The verdict on a call that did not come back, whatever law made it; `line` makes it again."""
    reason = expected.reason(op, law)
    return Verdict(op, label, law, False, 1, 0.0, expected=reason, why=why, case=case, reproduce=line)


def judge_drawn(trial: Trial, law: Law, seed: int) -> Verdict:
    """One law that draws its inputs, on all that this seed draws however long that takes. What is enumerated
    is left out, but for real sizes, of which the same shapes are filled anew.
    """

    def cases(trial: Trial) -> Iterator[Recipe]:
        assert law.cases
        yield from ({**r, "seed": 1000 * seed + r["seed"]} for r in law.cases(trial))

    drawn = replace(law, cases=cases if law.slow else None)
    return _verdict(Search(trial, drawn, seed, True, math.inf), Expected())


def warm_up(trial: Trial) -> None:
    """Let kernels that are compiled at their first call be compiled, so that no law's time goes into that."""
    for recipe in trial.family.edges(trial.op, trial.manifest):
        with suppress(Exception), quiet():
            trial(*trial.build(recipe))


def _verdict(search: Search, expected: Expected) -> Verdict:
    trial, law, begun = search.trial, search.law, time.perf_counter()
    silent = trial.silent
    search.run()
    verdict = Verdict(
        trial.op,
        trial.label,
        law.name,
        search.failed is None,
        search.tried,
        time.perf_counter() - begun,
        cut=search.cut,
        silent=trial.silent - silent,
    )
    if search.failed:
        recipe, wrong = search.failed
        verdict.law = wrong.breaks or law.name
        verdict.expected = expected.reason(trial.op, verdict.law)
        verdict.why, verdict.where, verdict.got, verdict.want = (
            wrong.what,
            list(wrong.where),
            wrong.got,
            wrong.want,
        )
        verdict.bound, verdict.times = wrong.bound, wrong.times
        verdict.case = json.dumps(recipe, separators=(",", ":"))
        verdict.reproduce = reproduce(
            trial.op, trial.label, trial.manifest, trial.level, law.name, verdict.case, trial.brought
        )
    elif law.name in EVIDENCE and 2 * verdict.silent > verdict.examples:
        verdict.passed, verdict.expected = False, expected.reason(trial.op, law.name)
        verdict.why = (
            f"says nothing: under accumulation={trial.manifest.accumulation} the bound is above the "
            f"result's own size in {verdict.silent} of {verdict.examples} examples"
        )
    return verdict


def reproduce(
    op: str, label: str, manifest: Manifest, level: str, law: str, case: str, brought: str = ""
) -> str:
    """The command that tries that one case again. `label` may end in the environment of its process."""
    words = label.split(" ")
    environment = [w for w in words[1:] if "=" in w]
    label = " ".join(w for w in words if w not in environment)
    named, plain = ":" in label, asdict(Manifest())
    words = [*environment, f"python -m refimpl.conformance --op {op}"]
    words += [f"--kernel {label}" if named else f"--backend {label}"] if label else []
    for name, v in asdict(manifest).items():
        if named and v != plain[name]:
            value = v if isinstance(v, str) else ",".join(v) if isinstance(v, tuple) else json.dumps(v)
            words.append(f"--declare {name}={value}")
    words += [brought] if brought else []
    words += [f"--level {level}"] if level != "quick" else []
    return " ".join([*words, f"--law {law} --case '{case}'"])


def again(trial: Trial, law: str, case: str) -> Mismatch | None:
    """Try one case; InputFormatError E8004 when it is not JSON, E8005 when there is no such law."""
    if law not in LAWS:
        raise refusal("E8005", law, expected=", ".join(LAWS))
    try:
        recipe = json.loads(case)
    except json.JSONDecodeError as error:
        raise refusal("E8004", "--case", found=case[:60]) from error
    try:
        return attempt(trial, LAWS[law], recipe)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise refusal("E8004 whole", "--case", found=f"{type(error).__name__} {error}") from error
