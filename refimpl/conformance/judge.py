"""Run the laws on one kernel: verdicts, each failure with its smallest input found and a line that reproduces
it.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis.errors import FlakyFailure, HypothesisException, Unsatisfiable

from refimpl.conformance.families.family import Recipe
from refimpl.conformance.inputs.cached import RECIPES
from refimpl.conformance.laws.ladder import LAWS, Law, applying
from refimpl.conformance.manifest import Expected, Manifest
from refimpl.conformance.trial import KernelRaised, Trial, quiet
from refimpl.conformance.truth.compare import Mismatch
from refimpl.conformance.verdict import LEVELS, Verdict
from refimpl.errors import refusal
from refimpl.ops import CODEC, OPS

"""How many times the examples of a law."""

SHRINKING_S = 20.0  # seconds after which the smallest input so far is good enough
SLOW_S = {
    "quick": 6.0,
    "full": 240.0,
    "exhaustive": 3600.0,
}  # seconds of one law; what is left of its examples is then left out, and said


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
    tried: int = 0
    failed: tuple[Recipe, Mismatch] | None = None
    cut: bool = False
    drawn: list[Recipe] = field(default_factory=list)

    def run(self) -> None:
        """Enumerate, or let hypothesis search."""
        self.end = time.monotonic() + self.seconds
        if self.law.cases:
            for recipe in self.law.cases(self.trial):
                if self.try_(recipe) or self._over():
                    return
        if self.law.strategies:
            for i, strategy in enumerate(self.law.strategies(self.trial)):
                self._search(strategy, i)
                if self.failed:
                    return

    def _search(self, strategy: Any, number: int) -> None:
        """Try what this seed drew for another kernel of the operation; where that is not known, or one of it
        fails, hypothesis searches.
        """
        trial, before = self.trial, self.tried
        key = trial.op, trial.manifest, trial.level, self.law.name, self.seed, number
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
        wrong = attempt(self.trial, self.law, recipe)
        if wrong:
            self.failed = recipe, wrong
        return wrong is not None

    def _over(self) -> bool:
        self.cut = time.monotonic() > self.end
        return self.cut

    def _hypothesis(self, strategy: Any, number: int) -> None:
        times = 1 if self.law.once else LEVELS[self.trial.level]
        phases = (Phase.generate, Phase.shrink) if self.shrink else (Phase.generate,)
        give_up = None

        @hypothesis.seed(self.seed * 1000 + number)
        @settings(
            max_examples=self.law.tries(self.trial) * times,
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
        return Mismatch(f"raised {error}"[:300])


def judge(
    trial: Trial,
    laws: Iterable[str] | None = None,
    seed: int = 0,
    shrink: bool = True,
    expected: Expected | None = None,
    stop: bool = False,
    told: Callable[[Verdict], None] | None = None,
) -> list[Verdict]:
    """Verdicts of all laws that apply (or of those named), in the order of the ladder; `stop` at the first
    failure; each is `told` at once.
    """
    found = []
    wanted = set(laws) if laws else None
    warm_up(trial)
    for law in applying(trial):
        if wanted is not None and law.name not in wanted:
            continue
        verdict = _verdict(Search(trial, law, seed, shrink, SLOW_S[trial.level]), expected or Expected())
        found.append(verdict)
        if told:
            told(verdict)
        if stop and not verdict.passed:
            break
    return found


def judge_drawn(trial: Trial, law: Law, seed: int) -> Verdict:
    """One law that draws its inputs, on all that this seed draws however long that takes, and not on what is
    enumerated.
    """
    return _verdict(Search(trial, replace(law, cases=None), seed, True, math.inf), Expected())


def warm_up(trial: Trial) -> None:
    """Let kernels that are compiled at their first call be compiled, so that no law's time goes into that."""
    if trial.label == "reference":
        return
    for recipe in trial.family.edges(trial.op, trial.manifest):
        with suppress(Exception), quiet():
            trial(*trial.build(recipe))


def _verdict(search: Search, expected: Expected) -> Verdict:
    trial, law, start = search.trial, search.law, time.perf_counter()
    search.run()
    verdict = Verdict(
        trial.op,
        trial.label,
        law.name,
        search.failed is None,
        search.tried,
        time.perf_counter() - start,
        cut=search.cut,
    )
    if search.failed:
        recipe, wrong = search.failed
        verdict.expected = expected.reason(trial.op, law.name)
        verdict.why, verdict.where, verdict.got, verdict.want = (
            wrong.what,
            list(wrong.where),
            wrong.got,
            wrong.want,
        )
        verdict.bound, verdict.times = wrong.bound, wrong.times
        verdict.case = json.dumps(recipe, separators=(",", ":"))
        verdict.reproduce = reproduce(trial, law.name, verdict.case)
    return verdict


def reproduce(trial: Trial, law: str, case: str) -> str:
    """The command that tries that one case again."""
    which = (
        f"--kernel {trial.label}" if ":" in trial.label else f"--backend {trial.label}" if trial.label else ""
    )
    default = Manifest()
    pairs = [
        (n, v) for n, v in asdict(trial.manifest).items() if ":" in trial.label and v != getattr(default, n)
    ]
    declared = [
        f"--declare {n}={v if isinstance(v, str) else ','.join(v) if isinstance(v, tuple) else json.dumps(v)}"
        for n, v in pairs
    ]
    level = [f"--level {trial.level}"] if trial.level != "quick" else []
    return " ".join(
        filter(
            None,
            [
                f"python -m refimpl.conformance --op {trial.op}",
                which,
                *declared,
                *level,
                f"--law {law} --case '{case}'",
            ],
        )
    )


def again(trial: Trial, law: str, case: str) -> Mismatch | None:
    """Try one case; InputFormatError E8004 when it is not JSON, E8005 when there is no such law."""
    if law not in LAWS:
        raise refusal("E8005", law, expected=", ".join(LAWS))
    try:
        recipe = json.loads(case)
    except json.JSONDecodeError as error:
        raise refusal("E8004", "--case", found=case[:60]) from error
    return attempt(trial, LAWS[law], recipe)


# --- which kernel -------------------------------------------------------------------------------------------


def find(name: str) -> Callable[..., Any]:
    """The function called `package.module:function`; InputFormatError E8006."""
    module, colon, function = name.partition(":")
    if not colon:
        raise refusal("E8006 kernel", name, expected="package.module:function")
    try:
        found: Any = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise refusal(
            "E8006 imported", name, error=error, expected="package.module:function on Python's path"
        ) from error
    return found


def checked(op: str) -> str:
    """The operation's own name; InputFormatError E8007 for none."""
    if op not in OPS:
        raise refusal("E8007", op, expected=", ".join(OPS))
    return op


def row(op: str, backend: str, level: str = "quick") -> Trial:
    """A row of the table: an operation on a backend, "reference" included, under this project's own
    promises.
    """
    target = OPS[op].fast.get(backend)
    if backend != "reference" and target is None:
        raise refusal("E8008", op, found=backend, expected=", ".join(("reference", *OPS[op].fast)))
    kernel = OPS[op].reference if target is None else find(target)
    return Trial(op, kernel, _tensors(op) if backend == "cuda" else _arrays(op), backend, level)


def _arrays(op: str) -> Manifest:
    """What is compiled from C keeps a NaN's sign and payload as its reference does."""
    return Manifest(nan="bits" if OPS[op].fast.get("cpu", "").startswith(CODEC) else "any")


def _tensors(op: str) -> Manifest:
    """What a GPU holds. Without one Triton's interpreter runs, which swaps parts of the language in during a
    call and has room for one thread.
    """
    import torch

    gpu = torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET")
    weights = ("plain",) if op == "embed" else ("fp8", "plain")
    sums = "tensor-core" if gpu else "float32"
    return Manifest(
        array="torch",
        device="cuda" if gpu else "cpu",
        accumulation=sums,
        weights=weights,
        concurrent=gpu,
        threads=False,
    )


def table() -> list[tuple[str, str]]:
    """Every (operation, fast path) of OPS, and every reference, which has to obey the same laws."""
    return [(op, backend) for op, r in OPS.items() for backend in ("reference", *r.fast)]
